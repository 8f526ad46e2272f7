"""Skeletons whose parameters FSDP2 shards over processes: what a delta's calls can do there, and what they refuse.

``fully_shard`` hooks the modules that it is called with (*units*). Before a unit's forward it gathers the parameters
and sets them on the unit's modules, overwriting what is there; afterwards it sets the shards again. A delta can
therefore swap in its own tensors only once the unit's forward has begun.
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
    """The paths of the modules that ``fully_shard`` was called with, in the model's order."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # without importing it, which is slow: a shard has been imported
    kind = getattr(fsdp, "FSDPModule", None)
    return () if kind is None else tuple(path for path, child in module.named_modules() if isinstance(child, kind))


def refuse_sharded(backbone: nn.Module) -> None:
    """Raise `ConfigError` if ``backbone`` itself is sharded: its structure could not be copied."""
    found = units(backbone)
    if found:
        raise ConfigError(
            f"The backbone is already sharded ({found[0] or 'the model itself'} is an FSDPModule), so its structure "
            f"cannot be copied. Pass the plain backbone, and shard the delta's private copy of it: "
            f"DeltaModel(backbone, config, prepare=lambda skeleton: fully_shard(skeleton, mesh=mesh))."
        )


def settle(module: nn.Module, paths: Iterable[str], shards: Shards) -> None:
    """Make a freshly sharded skeleton use the parameters in ``shards``, and its units return no views.

    Parameters that are not in ``shards`` yet are added to it. A unit's output carries the hook that gathers its
    parameters for the backward pass; a view (a fold joins rows by one) would lose it when it is written in place.
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
    """Raise `EngineError` if a unit lies below the module at ``path``, which has to run with a member's tensors."""
    for unit in units:
        if unit != path and (not path or unit.startswith(path + ".")):
            raise EngineError(
                f"{path or 'The model'} has to run with the member's own tensors, but {unit} below it is sharded "
                f"separately (fully_shard), which would put the backbone's tensors back. Call fully_shard on "
                f"{path or 'the model'} and not on what is below it, or leave its tensors out of the delta."
            )


def check_ran(runners: Iterable[str], ran: set[str]) -> None:
    """Raise `EngineError` if a module whose tensors a member replaces was not called."""
    for path in runners:
        if path not in ran:
            raise EngineError(
                f"The delta replaces tensors of {path or 'the model itself'}, but that module was not called: another "
                f"module reads them. In a backbone sharded by fully_shard this is not possible: leave these tensors "
                f"out of the delta."
            )


def check_bound(units: Iterable[str], trained: Iterable[str]) -> None:
    """Raise `ParamsError` if a view on a sharded backbone is to train tensors of the backbone."""
    for name in trained if tuple(units) else ():
        raise ParamsError(
            f"{name} is a trained leaf of a backbone that is sharded by fully_shard, and a view cannot hold it. Train "
            f"params (delta.apply, delta.apply_many), or bind them to a delta made without prepare."
        )


def check_kept(units: Iterable[str], replaced: Iterable[str]) -> None:
    """Raise `EngineError` if tensors of a sharded backbone that checkpoints its layers are to be replaced."""
    for name in replaced if tuple(units) else ():
        raise EngineError(
            f"The delta replaces {name} in a backbone that is sharded by fully_shard and checkpoints its layers, which "
            f"is not possible. Turn gradient checkpointing off, or leave {name} out of the delta."
        )
