"""Members moved away from each other: fresh ones compute the same, so that mixing them would not show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..transforms import concrete

_lists: Any = torch  # type checkers do not know torch._foreach_norm and the like

SHORTEST, LONGEST = -0.05, 0.1
LOST = 1e4
"""Larger numbers, infinities and NaN would drown all differences; they are replaced by 0."""

APART = 0.05
"""The relative distance, in every leaf and in the outputs, at which a mix of members would show."""


def moved_apart(stack: Mapping[str, Tensor], constants: Iterable[str], ends: bool = False) -> dict[str, Tensor]:
    """All members of a stack, or its two ``ends``, moved in one random direction by different lengths.

    >>> moved = moved_apart({"a": torch.zeros(5, 4), "scale": torch.ones(5)}, ["scale"], ends=True)
    >>> moved["a"].shape, moved["scale"], bool((moved["a"][0] == -0.5 * moved["a"][1]).all())
    (torch.Size([2, 4]), tensor([1., 1.]), True)
    """
    found = {name: concrete(leaf) for name, leaf in stack.items()}
    if ends:
        found = {
            name: leaf[:: n - 1] if (n := leaf.shape[0]) > 1 else leaf.expand(2, *leaf.shape[1:])
            for name, leaf in found.items()
        }
    rng = torch.Generator().manual_seed(0)
    for names in _alike(found, constants):
        # All leaves at once, because many small draws and sums would take longer than everything else.
        shapes = [found[name].shape for name in names]
        flat = torch.cat([found[name].reshape(shape[0], -1) for name, shape in zip(names, shapes, strict=True)], 1)
        flat = torch.where(flat.abs() <= LOST, flat, 0)
        direction = torch.randn(flat.shape[1], generator=rng, dtype=torch.float32, device="cpu").to(flat)
        lengths = torch.linspace(SHORTEST, LONGEST, flat.shape[0], dtype=torch.float64, device="cpu").to(flat)
        flat += lengths[:, None] * direction
        parts = flat.split([shape[1:].numel() for shape in shapes], 1)
        found.update((name, part.reshape(shape)) for name, part, shape in zip(names, parts, shapes, strict=True))
    return found


def are_apart(stack: Mapping[str, Tensor], constants: Iterable[str]) -> bool:
    """Whether the first and the last member of a stack differ clearly in every leaf that may train.

    >>> are_apart({"a": torch.eye(2)}, []), are_apart({"a": torch.eye(2), "b": torch.zeros(2, 2)}, [])
    (True, False)
    """
    with torch.no_grad():
        for names in _alike(stack, constants):
            first, last = [stack[name][0] for name in names], [stack[name][-1] for name in names]
            distances = torch.stack(_lists._foreach_norm(_lists._foreach_sub(first, last)))
            if not bool((distances > APART * torch.stack(_lists._foreach_norm(first))).all()):
                return False
    return True


def _alike(stack: Mapping[str, Tensor], constants: Iterable[str]) -> Iterator[list[str]]:
    """The names of the leaves that may train, grouped by device and dtype."""
    kept, found = frozenset(constants), dict[tuple[torch.device, torch.dtype], list[str]]()
    for name, leaf in stack.items():
        if name not in kept and leaf.is_floating_point() and leaf.numel():
            found.setdefault((leaf.device, leaf.dtype), []).append(name)
    yield from found.values()
