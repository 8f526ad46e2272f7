"""Members moved away from each other: fresh ones would all give the same, whatever is mixed among them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..transforms import concrete

SHORTEST, LONGEST = -0.05, 0.1
LOST = 1e4
"""A leaf with larger numbers, or with none that are numbers, tells nothing of rows: it begins at 0."""

APART = 0.05
"""How far members have to be from each other, in every leaf and in their outputs, for a mix of them to show."""


def moved_apart(stack: Mapping[str, Tensor], constants: Iterable[str], ends: bool = False) -> dict[str, Tensor]:
    """All members of a stack, or the first and the last, each moved in one direction by a length of its own.

    >>> moved = moved_apart({"a": torch.zeros(5, 4), "scale": torch.ones(5)}, ["scale"], ends=True)
    >>> moved["a"].shape, moved["scale"], bool((moved["a"][0] == -0.5 * moved["a"][1]).all())
    (torch.Size([2, 4]), tensor([1., 1.]), True)
    """
    found = {name: concrete(leaf) for name, leaf in stack.items()}
    if ends:
        found = {
            name: leaf[:: len(leaf) - 1] if len(leaf) > 1 else leaf.expand(2, *leaf.shape[1:])
            for name, leaf in found.items()
        }
    rng = torch.Generator().manual_seed(0)
    for names in _alike(found, constants):
        leaves = [found[name] for name in names]
        largest = torch.stack(torch._foreach_norm(leaves, float("inf"))).tolist()
        leaves = [leaf if most <= LOST else torch.zeros_like(leaf) for leaf, most in zip(leaves, largest, strict=True)]
        # One draw for all of them: many small ones take longer than all the rest.
        sizes, like = [leaf[0].numel() for leaf in leaves], leaves[0]
        direction = torch.randn(sum(sizes), generator=rng, dtype=torch.float32, device="cpu").to(like)
        lengths = torch.linspace(SHORTEST, LONGEST, len(like), dtype=torch.float64, device="cpu").to(like)
        steps = (lengths[:, None] * direction).split(sizes, 1)
        moved = torch._foreach_add(leaves, [step.view(leaf.shape) for step, leaf in zip(steps, leaves, strict=True)])
        found.update(zip(names, moved, strict=True))
    return found


def are_apart(stack: Mapping[str, Tensor], constants: Iterable[str]) -> bool:
    """Whether the first and the last member of a stack differ much in every leaf that may train.

    >>> are_apart({"a": torch.eye(2)}, []), are_apart({"a": torch.eye(2), "b": torch.zeros(2, 2)}, [])
    (True, False)
    """
    with torch.no_grad():
        for names in _alike(stack, constants):
            first, last = [stack[name][0] for name in names], [stack[name][-1] for name in names]
            distances = torch.stack(torch._foreach_norm(torch._foreach_sub(first, last)))
            if not bool((distances > APART * torch.stack(torch._foreach_norm(first))).all()):
                return False
    return True


def _alike(stack: Mapping[str, Tensor], constants: Iterable[str]) -> Iterator[list[str]]:
    """The names of the leaves that may train, with those of one device and dtype together."""
    kept, found = frozenset(constants), dict[tuple[torch.device, torch.dtype], list[str]]()
    for name, leaf in stack.items():
        if name not in kept and leaf.is_floating_point() and leaf.numel():
            found.setdefault((leaf.device, leaf.dtype), []).append(name)
    yield from found.values()
