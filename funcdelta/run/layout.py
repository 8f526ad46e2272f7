"""The layout of a fold: which axis counts the members' rows in every hidden value, module input and output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import FoldError

Dims = tuple[int | None, ...]


class LayoutMismatchError(FoldError):
    """A call runs other modules, or with other sizes, than its layout says; callers then learn the layout anew."""


class MixedBackwardError(FoldError):
    """Members together get other gradients than alone, both in one batch and under vmap."""


@dataclass(frozen=True)
class Hidden:
    """Which axes of a site's hidden input ``x`` and output ``y`` count rows; ``None`` if all rows share the value."""

    x: int | None
    y: int | None


@dataclass(frozen=True)
class Ends:
    """Which axis counts rows in every tensor that one call of a module takes and returns.

    Attributes:
        dtypes: the dtypes of its outputs.
        writes: the positions of the inputs that it was seen to write.
    """

    inputs: Dims
    outputs: Dims
    dtypes: tuple[torch.dtype, ...] = ()
    writes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """A module that runs once per member within a fold.

    Attributes:
        keys: the keys of the params that are used in it.
        how: ``map``: one call of the module under vmap; ``loop``: one member after the other, which cannot mix rows.
        why: the reason, for people.
        visits: where the rows are, for each of its calls.
    """

    keys: tuple[str, ...]
    how: Literal["map", "loop"] = "map"
    why: str = ""
    visits: tuple[Ends, ...] = ()

    def at(self, path: str, index: int | None) -> Ends:
        """The axes at the ``index``-th call of the module; with ``None``, those that all its calls have."""
        return _visit(self.visits, path, index)


@dataclass(frozen=True)
class Layout:
    """Where the rows are for one input structure: at every call of every site, and in the model's output.

    Attributes:
        sites: the axes at each call of a site, by path.
        runs: the modules that run once per member, by path.
        outputs: the axis of rows of each leaf of the model's output.
        names: the names of these leaves.
        unused: modules whose tensors differ by member but that were not called; if one is, the layout does not fit.
        draws: whether random numbers are drawn, counting dropout, which a probe turns off.
        compared: whether the probe compared the members' outputs in one batch with those of each alone.
    """

    sites: Mapping[str, tuple[Hidden, ...]] = field(default_factory=dict)
    runs: Mapping[str, Run] = field(default_factory=dict)
    outputs: Dims = ()
    names: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    draws: bool = False
    compared: bool = False

    def site(self, path: str, index: int | None) -> Hidden:
        """The axes at the ``index``-th call of the site at ``path``; with ``None``, those that all its calls have."""
        return _visit(self.sites.get(path, ()), path, index)

    def joined(self, other: Layout) -> Layout:
        """A layout for both of two calls of one structure, each of which may have skipped sites of the other.

        >>> one, two = Layout({"a": (Hidden(0, 0),)}), Layout({"b": (Hidden(1, 1),)})
        >>> sorted(one.joined(two).sites)
        ['a', 'b']
        """
        sites = {**other.sites, **{path: known for path, known in self.sites.items() if path not in other.sites}}
        runs = {**other.runs, **{path: run for path, run in self.runs.items() if path not in other.runs}}
        # A module that either call did use is known by now.
        unused = frozenset(path for path in self.unused & other.unused if path not in runs)
        return replace(other, sites=sites, runs=runs, unused=unused, draws=self.draws or other.draws)


def _visit(known: tuple[Any, ...], path: str, index: int | None) -> Any:
    if index is None:
        if any(visit != known[0] for visit in known[1:]):
            raise FoldError(
                f"{path} is called several times with rows on different axes, and when it is recomputed for the "
                f'backward pass it cannot be told which call that is. Use engine="loop", or do not checkpoint it.'
            )
        index = 0
    if index >= len(known):
        raise LayoutMismatchError(
            f"{path} was called {index + 1} times, but {len(known)} times when the layout of these inputs was "
            f"learned: which modules run depends on the rows."
        )
    return known[index]


def scalar_message(name: str) -> str:
    """Why a scalar output cannot be split by member, and what to compute instead."""
    return (
        f"The output {name} is a scalar, which cannot be split by member when members share a batch. Leave out labels= "
        f"and compute one loss per member from the logits: torch.vmap(F.cross_entropy)(outs.logits, labels), with "
        f'logits (n, b, classes) and labels (n, b). Or use engine="loop".'
    )


def tolerance_of(*tensors: Tensor) -> float:
    """How far tensors that should be equal may differ, relative to the largest number in them: ``4 sqrt(eps)``.

    >>> tolerance_of(torch.ones(1)) < 0.002, tolerance_of(torch.ones(1, dtype=torch.bfloat16)) > 0.3
    (True, True)
    """
    kinds, device = [tensor.dtype for tensor in tensors], tensors[0].device.type
    if torch.is_autocast_enabled(device):
        kinds.append(torch.get_autocast_dtype(device))
    # Kernels sum in different orders for different batch sizes, which may cost up to half of the digits.
    return 4 * max(torch.finfo(kind).eps for kind in kinds) ** 0.5


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding that another batch size brings.

    >>> close(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7])), close(torch.tensor([1.0]), torch.tensor([1.1]))
    (True, False)
    """
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype and torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    tolerance = tolerance_of(a, b)
    a, b = a.detach().double(), b.detach().double()
    finite = a.isfinite()
    scale = a[finite].abs().max() if finite.any() else torch.ones(())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(scale.clamp(min=1e-30)), equal_nan=True)
