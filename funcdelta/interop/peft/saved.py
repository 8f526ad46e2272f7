"""Trained leaves of the backbone as PEFT keeps them: whole modules by ``modules_to_save``, biases by ``bias``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ...match import below, within
from ...model import DeltaModel


class Saved(NamedTuple):
    """What is written of trained leaves.

    Attributes:
        tensors: by name, that of the backbone but for ``base_layer``.
        modules: those of ``modules_to_save``.
        bias: the mode, ``none``, ``lora_only`` or ``all``.
    """

    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    bias: str


def saved_leaves(delta: DeltaModel, params: Mapping[str, Tensor], targets: Sequence[str]) -> Saved:
    """The trained leaves of ``delta``, whose LoRAs are at the modules ``targets``.

    A module all of whose tensors train is one of ``modules_to_save``; PEFT loads other tensors all the same. It takes
    these names as ends of paths, not by whole tokens, so that one is left out where another path ends alike.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> delta = fd.LoraModel(backbone, modified_modules=["0"], unfrozen_modules=["deltas", "1"])
    >>> saved = saved_leaves(delta, delta.init(0), ["0"])
    >>> list(saved.tensors), saved.modules, saved.bias
    (['1.weight', '1.bias'], ('1',), 'none')
    """
    ends = {end: name for name, every in delta.plan.trained.items() for end in every}
    modules = dict(delta.backbone.named_modules(remove_duplicate=False))
    biases = {name for name, _ in delta.backbone.named_parameters(remove_duplicate=False) if name.endswith("bias")}
    at_targets = {below(path, "bias") for path in targets}
    whole = [path for path in modules if path and _is_whole(path, modules[path], ends, targets)]
    outer = [path for path in whole if not any(path != other and within(path, other) for other in whole)]
    outer = [path for path in outer if sum(other.endswith(path) for other in modules) == 1]
    rest = [name for name in ends if not any(within(name, path) for path in outer)]
    mode = "none"
    if rest and set(rest) <= biases:
        mode = "lora_only" if set(rest) <= at_targets else "all"
    found = {_key(name, modules, targets): params[first].detach() for name, first in ends.items()}
    for path in outer:  # PEFT looks for all that the module has
        buffers = modules[path].named_buffers(remove_duplicate=False)
        persistent = modules[path].state_dict().keys()
        found |= {f"{path}.{own}": tensor.detach() for own, tensor in buffers if own in persistent}
    return Saved(found, tuple(outer), mode)


def _is_whole(path: str, module: nn.Module, ends: Mapping[str, str], targets: Sequence[str]) -> bool:
    """Whether all tensors of the module train, and no LoRA acts in it."""
    own = [f"{path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False)]
    return bool(own) and all(name in ends for name in own) and not any(within(target, path) for target in targets)


def _key(name: str, modules: Mapping[str, nn.Module], targets: Sequence[str]) -> str:
    """``name`` with ``base_layer`` for each wrapper: one a LoRA; of an attention module its output projection, too."""
    path, _, own = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    if parent in targets and isinstance(modules[parent], nn.MultiheadAttention):
        return f"{parent}.base_layer.{last}.base_layer.{own}"
    return ".".join([path, *["base_layer"] * targets.count(path), own])
