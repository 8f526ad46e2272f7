"""Moves leaves of different members into one stack, padded, and out of it again, cropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError
from ..methods.config import BaseDeltaConfig
from ..methods.leaf import growing
from ..model import DeltaModel
from ..plan.attachment import Attachment
from ..plan.sharing import Shared
from .packed import SIZE, Packed, longer, shorter
from .slots import Chunk, Slot, sites_of


@dataclass(frozen=True)
class Shelf:
    """One config of a delta: its name, its sites by path, and the leaves that they share."""

    name: str
    config: BaseDeltaConfig
    sites: dict[str, Attachment]
    shared: Shared | None


def _shelves(delta: DeltaModel) -> list[Shelf]:
    groups = {group.name: group for group in delta.plan.shared}
    named = zip(delta.plan.names, delta.configs, strict=True)
    return [Shelf(name, config, sites_of(delta, name), groups.get(name)) for name, config in named]


def stacked(
    delta: DeltaModel, chunks: Sequence[Chunk], slots: Sequence[Slot], kinds: Mapping[Any, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The stack of all chunks' members, under the names of the packed ``delta``."""
    shelves = _shelves(delta)
    theirs = {chunk.kind: _shelves(chunk.delta) for chunk in chunks}
    columns: dict[str, list[Tensor | float | None]] = {name: [] for name in delta.names}
    like: dict[str, Tensor] = {}
    for chunk in chunks:
        given: dict[str, Tensor | float] = {name: chunk.stack[name] for name in delta.plan.trained}
        own = {place: theirs[chunk.kind][k] for k, place in enumerate(kinds[chunk.kind])}
        for i, shelf in enumerate(shelves):
            source = float(slots[i].index[chunk.kind]) if i in own else -1.0
            given |= _row(shelf, own.get(i), chunk.stack, source, like)
        for name, column in columns.items():
            column.append(given.get(name))
    lacking = any(value is None for column in columns.values() for value in column)
    # Members without a leaf get fresh values: the method's functions must be differentiable there (zeros may not be).
    fresh = delta.init(0) if lacking else {}
    counts = [chunk.n for chunk in chunks]
    return {name: _column(name, column, counts, fresh.get(name), like.get(name)) for name, column in columns.items()}


def _row(
    shelf: Shelf, own: Shelf | None, params: Mapping[str, Tensor], source: float, like: dict[str, Tensor]
) -> dict[str, Tensor | float]:
    """One chunk's leaves of one packed config; puts an example of their dtype and device into ``like``."""
    config, group = shelf.config, shelf.shared
    assert isinstance(config, Packed)
    assert group is not None
    given: dict[str, Tensor | float] = {group.leaves["source"]: source}
    for name in config.varying:
        given[group.leaves[name]] = float(getattr(own.config, name)) if own is not None else 0.0
    if own is not None and own.shared is not None:
        given |= {group.leaves[leaf]: params[key] for leaf, key in own.shared.leaves.items()}
    for path, packed in shelf.sites.items():
        alone = own.sites.get(path) if own is not None else None
        for leaf in ("present",) if "present" in packed.leaves else ():
            given[packed.leaves[leaf]] = float(alone is not None)
        unlike = {leaf.removeprefix(SIZE): key for leaf, key in packed.leaves.items() if leaf.startswith(SIZE)}
        if alone is None or own is None:
            given |= dict.fromkeys(unlike.values(), 1.0)
            continue
        axes = growing(alone.axes)
        given |= {key: float(axes[name].size(alone.own)) for name, key in unlike.items()}
        leaves = {leaf: params[key] for leaf, key in alone.leaves.items() if key in alone.shapes}
        for own_axes in axes.values():
            for leaf, axis in own_axes.axes.items():
                leaves[leaf] = longer(leaves[leaf], axis, own_axes.size(packed.own), own_axes.pieces[leaf])
        given |= {packed.leaves[leaf]: value for leaf, value in leaves.items()}
        shared = own.shared.leaves.values() if own.shared is not None else ()
        example = next(iter([*leaves.values(), *(params[key] for key in shared)]))
        for key in (*packed.shapes, *group.shapes):
            like.setdefault(key, example)
    return given


def _column(
    name: str,
    column: Sequence[Tensor | float | None],
    counts: Sequence[int],
    fresh: Tensor | None,
    like: Tensor | None,
) -> Tensor:
    """One leaf of all chunks, (n, ...); a number holds for all members of a chunk, and ``fresh`` replaces ``None``."""
    given = next((value for value in column if isinstance(value, Tensor)), like)
    assert given is not None
    parts: list[Tensor] = []
    for value, n in zip(column, counts, strict=True):
        if isinstance(value, Tensor):
            part = value
        elif value is not None:
            # Half precision cannot represent large sizes and sources exactly.
            counts_up = name.rpartition(".")[2] == "source" or f".{SIZE}" in name
            dtype = torch.promote_types(given.dtype, torch.float32) if counts_up else given.dtype
            parts.append(torch.full((n,), value, dtype=dtype, device=given.device))
            continue
        else:
            assert fresh is not None
            part = fresh.to(given).expand(n, *fresh.shape)
        if part.dtype != given.dtype or part.device != given.device:
            raise ParamsError(
                f"{name} is {given.dtype} on {given.device} in one member and {part.dtype} on {part.device} in "
                f"another, but a stack has one dtype and device. Convert one of them: leaf.to({given.dtype})."
            )
        parts.append(part)
    return torch.cat(parts)


def taken_out(
    delta: DeltaModel, params: Mapping[str, Tensor], own: DeltaModel, slots: Sequence[int]
) -> dict[str, Tensor]:
    """The params of ``own``, whose configs came from these ``slots`` of the packed ``delta``."""
    shelves, found = _shelves(delta), {name: params[name] for name in own.plan.trained}
    for alone, shelf in zip(_shelves(own), (shelves[i] for i in slots), strict=True):
        if alone.shared is not None and shelf.shared is not None:
            found |= {key: params[shelf.shared.leaves[leaf]] for leaf, key in alone.shared.leaves.items()}
        for path, a in alone.sites.items():
            packed = shelf.sites[path]
            leaves = {leaf: params[packed.leaves[leaf]] for leaf, key in a.leaves.items() if key in a.shapes}
            for axes in growing(a.axes).values():
                for leaf, axis in axes.axes.items():
                    leaves[leaf] = shorter(leaves[leaf], axis, axes.size(a.own), axes.pieces[leaf])
            found |= {a.leaves[leaf]: value for leaf, value in leaves.items()}
    return {name: found[name] for name in own.names}
