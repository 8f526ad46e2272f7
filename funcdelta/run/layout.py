"""The layout of a fold: which axis of every hidden value, module input and output counts the members' rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import FoldError

Dims = tuple[int | None, ...]


class LayoutMismatchError(FoldError):
    """A call does not go as the one did from which its layout was learned: the layout is learned anew, once."""


class MixedBackwardError(FoldError):
    """Members together get other gradients than alone: in one batch, and where they are mapped, too."""


@dataclass(frozen=True)
class Hidden:
    """Which axis of a site's hidden input and output counts rows; ``None``: the same for all rows."""

    x: int | None
    y: int | None


@dataclass(frozen=True)
class Ends:
    """The same for every tensor that one call of a module takes and returns.

    Attributes:
        dtypes: of what it returns.
        writes: the inputs, by position, that it was seen to write.
    """

    inputs: Dims
    outputs: Dims
    dtypes: tuple[torch.dtype, ...] = ()
    writes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """A module that runs once per member, with the keys of params that are used in it.

    Attributes:
        how: ``map``, by one mapped call of the module; ``loop``, member after member, which mixes nothing.
        why: why it does, for people.
        visits: where the rows are, for each of its calls.
    """

    keys: tuple[str, ...]
    how: Literal["map", "loop"] = "map"
    why: str = ""
    visits: tuple[Ends, ...] = ()

    def at(self, path: str, index: int | None) -> Ends:
        """The axes at the ``index``-th call of the module; ``None``: at every one."""
        return _visit(self.visits, path, index)


@dataclass(frozen=True)
class Layout:
    """The batch axes of one input structure: at every visit of every site, and in the model's output.

    Attributes:
        sites: by path, the axes at each call of the site.
        runs: by path, the modules that run once per member.
        outputs: of the leaves of the model's output.
        names: what these leaves are called.
        unused: modules with leaves of the members' own that are not called; where one is, nothing is known.
        draws: whether random numbers were drawn, or would have been but for dropout that was off.
        compared: whether it was seen, as it was learned, that members give in one batch what each gives alone.
    """

    sites: Mapping[str, tuple[Hidden, ...]] = field(default_factory=dict)
    runs: Mapping[str, Run] = field(default_factory=dict)
    outputs: Dims = ()
    names: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()
    draws: bool = False
    compared: bool = False

    def site(self, path: str, index: int | None) -> Hidden:
        """The axes at the ``index``-th call of the site at ``path``; ``None``: at every one."""
        return _visit(self.sites.get(path, ()), path, index)

    def joined(self, other: Layout) -> Layout:
        """What two calls of one structure tell: the sites of both, where one of them left some out.

        >>> one, two = Layout({"a": (Hidden(0, 0),)}), Layout({"b": (Hidden(1, 1),)})
        >>> sorted(one.joined(two).sites)
        ['a', 'b']
        """
        sites = {**other.sites, **{path: known for path, known in self.sites.items() if path not in other.sites}}
        runs = {**other.runs, **{path: run for path, run in self.runs.items() if path not in other.runs}}
        # What ran alone in one of them, ran inside of a module of the other that does, or is still unknown.
        unused = frozenset(path for path in self.unused & other.unused if path not in runs)
        return replace(other, sites=sites, runs=runs, unused=unused, draws=self.draws or other.draws)


def _visit(known: tuple[Any, ...], path: str, index: int | None) -> Any:
    if index is None:
        if any(visit != known[0] for visit in known[1:]):
            raise FoldError(
                f"{path} is called several times with rows on different axes, and runs again for the backward pass: "
                f'which of the calls it is cannot be told. Use engine="loop", or do not checkpoint it.'
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
        f"The output {name} is a scalar: it cannot be split by member when members share a batch. Leave out labels= "
        f"and compute one loss a member from the logits: torch.vmap(F.cross_entropy)(outs.logits, labels), with "
        f'logits (n, b, classes) and labels (n, b). Or use engine="loop".'
    )


def tolerance_of(*tensors: Tensor) -> float:
    """How far tensors may be from each other that should be equal, as a share of the largest number in them.

    >>> tolerance_of(torch.ones(1)) < 0.002, tolerance_of(torch.ones(1, dtype=torch.bfloat16)) > 0.3
    (True, True)
    """
    kinds, device = [tensor.dtype for tensor in tensors], tensors[0].device.type
    if torch.is_autocast_enabled(device):
        kinds.append(torch.get_autocast_dtype(device))
    # The square root leaves half of the digits for the kernels' different orders of summation.
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
