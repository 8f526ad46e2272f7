"""A skeleton whose parameters FSDP2 shards over processes: what the calls of a delta have to heed there.

``fully_shard`` hooks the modules that it is called with (*units*). Before a unit's forward its parameters are gathered
and set on its modules, over whatever stood there; afterwards the shards are set again. So tensors of one's own can
take the place of a unit's only once its forward has begun.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError, EngineError, ParamsError

Shards = dict[tuple[str, bool], nn.Parameter]
"""The sharded parameters that all skeletons of one delta share, by name and by whether they require grad."""


def units(module: nn.Module) -> tuple[str, ...]:
    """The paths of the modules that ``fully_shard`` was called with, in the model's order.

    >>> units(nn.Sequential(nn.Linear(2, 2)))
    ()
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it
    kind = getattr(fsdp, "FSDPModule", None)
    return () if kind is None else tuple(path for path, child in module.named_modules() if isinstance(child, kind))


def refuse_sharded(backbone: nn.Module) -> None:
    """Raise `ConfigError` if ``backbone`` itself is sharded: its structure could not be copied.

    >>> refuse_sharded(nn.Linear(2, 2))
    """
    found = units(backbone)
    if found:
        raise ConfigError(
            f"The backbone is already sharded ({found[0] or 'the model itself'} is an FSDPModule), and its structure "
            f"cannot be copied. Give the plain backbone, and shard the private copy of it: "
            f"DeltaModel(backbone, config, prepare=lambda skeleton: fully_shard(skeleton, mesh=mesh))."
        )


def settle(module: nn.Module, paths: Iterable[str], shards: Shards) -> None:
    """Make a freshly sharded skeleton fit for use: its shards are those in ``shards``, its units return no views.

    What is not in ``shards`` yet is added. A unit's output carries the hook that gathers its parameters for the
    backward pass, which a view (a fold joins rows by one) would lose at the next change in place.
    """
    for path in paths:
        module.get_submodule(path).register_forward_hook(_without_views, prepend=True)
    for path, child in module.named_modules():
        for name, parameter in child._parameters.items():
            if parameter is None or not hasattr(parameter, "full_tensor"):
                continue
            key = (f"{path}.{name}" if path else name, parameter.requires_grad)
            child._parameters[name] = shards.setdefault(key, parameter)


def _without_views(module: nn.Module, args: Any, output: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad and t._is_view() else t, output)


def check_unit(path: str, units: Iterable[str]) -> None:
    """Raise `EngineError` if the module at ``path``, which has to run with tensors of a member, has a unit below it.

    >>> check_unit("encoder.dense", ["", "encoder"])
    """
    for unit in units:
        if unit != path and (not path or unit.startswith(path + ".")):
            raise EngineError(
                f"{path or 'The model'} has to run with tensors of the member's own, and {unit} below it is sharded "
                f"by itself (fully_shard), which would put the backbone's tensors back. Call fully_shard on "
                f"{path or 'the model'} and not on what is below it, or leave its tensors out of the delta."
            )


def check_ran(runners: Iterable[str], ran: set[str]) -> None:
    """Raise `EngineError` if a module whose tensors a member replaces was not called.

    >>> check_ran(["head"], {"head"})
    """
    for path in runners:
        if path not in ran:
            raise EngineError(
                f"The tensors of {path or 'the model itself'} are the member's own, but no call of that module could "
                f"be given them: another module reads them. In a backbone sharded by fully_shard they cannot be "
                f"replaced: leave them out of the delta."
            )


def check_bound(units: Iterable[str], trained: Iterable[str]) -> None:
    """Raise `ParamsError` if a view on a sharded backbone should train tensors of the backbone.

    >>> check_bound([], ["classifier.weight"])
    """
    for name in trained if tuple(units) else ():
        raise ParamsError(
            f"{name} is a trained leaf of a backbone that is sharded by fully_shard, and a view cannot keep it: train "
            f"params (delta.apply, delta.apply_many), or bind them to a delta made without prepare."
        )


def check_kept(units: Iterable[str], replaced: Iterable[str]) -> None:
    """Raise `EngineError` if tensors of a sharded backbone that checkpoints its layers are to be replaced.

    >>> check_kept([], ["head.weight"])
    """
    for name in replaced if tuple(units) else ():
        raise EngineError(
            f"{name} is the member's own, in a backbone that is sharded by fully_shard and checkpoints its layers: "
            f"turn gradient checkpointing off, or leave {name} out of the delta."
        )
