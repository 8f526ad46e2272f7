"""Places leaves in the modules of a view, and arranges how the modules read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..match import below, within
from ..run.reading import Rewritten, watch_reads
from ..run.skeleton import Skeleton
from .calls import Calls
from .frozen import PATH, Leaves, show


def replace(skeleton: Skeleton, ends: tuple[str, ...], value: Tensor, trains: bool, places: list[Any]) -> None:
    """Put ``value`` in place of a tensor of the backbone: under all of its names (``ends``) and at ``places``."""
    made: Any = None
    for end in ends:
        path, _, own = end.rpartition(".")
        owner = skeleton.module.get_submodule(path)
        if own in owner._buffers:
            made = value.to(skeleton.dtypes.get(end, value.dtype)) if made is None else made
            owner._buffers[own] = made
        else:
            if made is None:
                value = value if trains else value.to(skeleton.dtypes[end])
                made = nn.Parameter(value, requires_grad=trains and value.is_floating_point())
            owner._parameters[own] = made
    for place, key in places:
        place[key] = made


def place(module: nn.Module, name: str, value: Tensor, trains: bool) -> None:
    """Register ``value`` under its dotted name, adding modules for the parts of the path that do not exist."""
    *path, own = name.split(".")
    owner = module
    for token in path:
        if token not in owner._modules:
            owner.add_module(token, Leaves())
        owner = owner.get_submodule(token)
    if trains and value.is_floating_point():
        owner.register_parameter(own, nn.Parameter(value))
    else:
        owner.register_buffer(own, value)


def runners(skeleton: Skeleton, leaves: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """``{path: keys of leaves}`` of the outermost modules whose tensors are rewritten at each call."""
    plan: Any = skeleton.plan
    found: dict[str, list[str]] = {}
    for attachment in plan.all():
        if attachment.by_weights and attachment.among(leaves):
            path = attachment.site.path
            # A tensor that its parent reads is rewritten on reading; but a shard is incomplete until the parent runs.
            reader = path.rpartition(".")[0] if attachment.read_by_parent and skeleton.units else path
            found.setdefault(reader, []).extend(attachment.leaves.values())
    for name, ends in plan.trained.items():
        # A leaf whose dtype differs from its module's is cast at each call; others were put in place for good.
        for end in ends if name in leaves and leaves[name].dtype != skeleton.dtypes[name] else ():
            found.setdefault(end.rpartition(".")[0], []).append(name)
    outermost = {path for path in found if not any(path != other and within(path, other) for other in found)}
    keys: dict[str, tuple[str, ...]] = {}
    for path in outermost:
        reached = [a for a in plan.all() if any(within(end, path) for end in a.ends)]
        inside = [key for a in reached for key in a.leaves.values()]
        keys[path] = tuple(key for key in dict.fromkeys(found[path] + inside) if key in leaves)
    return keys


def guard_sites(skeleton: Skeleton, calls: Calls) -> None:
    """Guard the tensors of sites, too, unless a delta has rewritten them."""
    read = skeleton.read_outside

    def outside(path: str, name: str, tensor: Tensor) -> Tensor:
        found = read(path, name, tensor)
        if calls.sees_all() or not (found is tensor or (isinstance(found, Rewritten) and found.same)):
            return found
        return show(tensor, skeleton.module.get_submodule(path), name, calls.guards)

    skeleton.read_outside = outside


def lower_reads(skeleton: Skeleton, ends: Iterable[str]) -> None:
    """Cast leaves to their module's dtype for code that reads them from outside the module."""
    lowered = [end for end in ends if skeleton.module.get_parameter(end).dtype != skeleton.dtypes[end]]
    for path in dict.fromkeys(end.rpartition(".")[0] for end in lowered):
        opened = skeleton.open(path)

        def outside(name: str, tensor: Tensor, path: str = path) -> Tensor:
            dtype = skeleton.dtypes.get(below(path, name), tensor.dtype)
            found = skeleton.read_outside(path, name, tensor)
            return found if found.dtype == dtype else found.to(dtype)

        watch_reads(opened.module, lambda opened=opened: opened.running > 0, outside, skeleton.kinds)


def follow_dtypes(skeleton: Skeleton, module: nn.Module, fn: Callable[[Tensor], Tensor]) -> None:
    """Update the dtypes that leaves in place of the backbone's tensors are cast to, after the view was converted."""
    path = vars(module)[PATH]
    for own in module._parameters:
        name = below(path, own)
        if module._parameters[own] is not None and name in skeleton.dtypes:
            like = torch.empty(0, dtype=skeleton.dtypes[name], device=module._parameters[own].device)  # pyright: ignore[reportOptionalMemberAccess]
            skeleton.dtypes[name] = fn(like).dtype
