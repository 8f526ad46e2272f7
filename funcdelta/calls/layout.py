"""Where is the batch? A probe learns which axis of every hidden tensor and output counts rows.

Before members are folded into the batch for the first time, one row and then two rows go through the skeleton with
random leaves. An axis that doubles carries the batch; a tensor that does not change is shared by all rows. If the
first row's values differ between the two runs, rows are mixed somewhere, and folding members would mix members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import FoldError
from ..functional.dropout import dropout

Dims = tuple[int | None, ...]


@dataclass(frozen=True)
class Hidden:
    """Which axis of a site's hidden input and output counts rows; ``None``: the same for all rows."""

    x: int | None
    y: int | None


@dataclass(frozen=True)
class SiteLayout:
    """The same for every tensor that a module takes and returns."""

    inputs: Dims
    outputs: Dims
    dtypes: tuple[torch.dtype, ...]
    """Of the outputs: autocast treats mapped weights otherwise than plain ones."""


@dataclass(frozen=True)
class Layout:
    """The batch axes of one input structure: at every visit of every site, and in the model's output."""

    hidden: dict[str, tuple[Hidden, ...]]
    runs: dict[str, tuple[SiteLayout, ...]]
    outputs: Dims

    def site(self, path: str, index: int | None) -> Hidden:
        """The axes at the ``index``-th call of the site at ``path``; ``None``: at every one."""
        return _visit(self.hidden, path, index)

    def run(self, path: str, index: int | None) -> SiteLayout:
        """The same for a whole call of the module at ``path``."""
        return _visit(self.runs, path, index)


def _visit(visits: dict[str, tuple[Any, ...]], path: str, index: int | None) -> Any:
    known = visits.get(path, ())
    if index is None:
        if any(visit != known[0] for visit in known):
            raise FoldError(
                f"{path} is called several times with rows on different axes, and runs again for the backward pass: "
                f'which of the calls it is cannot be told. Use engine="loop", or do not checkpoint it.'
            )
        index = 0
    if index >= len(known):
        raise FoldError(
            f"{path} was called {index + 1} times, but {len(known)} times with one row: which modules run depends on "
            f'the rows, so members cannot share a batch. Use engine="vmap" or "loop".'
        )
    return known[index]


@dataclass
class Recorder:
    """What went through the sites during one run of the probe."""

    x: dict[str, list[Tensor]] = field(default_factory=dict)
    y: dict[str, list[Tensor]] = field(default_factory=dict)
    runs: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = field(default_factory=dict)

    def site(self, path: str, x: Tensor, y: Tensor) -> None:
        """Note the hidden input and output of one call."""
        self.x.setdefault(path, []).append(x.detach())
        self.y.setdefault(path, []).append(y.detach())

    def run(self, path: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Note every tensor of one call."""
        self.runs.setdefault(path, []).append(([t.detach() for t in inputs], [t.detach() for t in outputs]))


def compare(one: Recorder, two: Recorder, out_one: list[Any], out_two: list[Any], names: list[str]) -> Layout:
    """The layout that one row and two rows tell; raises :class:`FoldError` with the first place that mixes rows."""
    hidden: dict[str, tuple[Hidden, ...]] = {}
    for path, xs in one.x.items():
        _same_visits(path, len(xs), len(two.x.get(path, ())))
        visits = zip(xs, two.x[path], one.y[path], two.y[path], strict=True)
        hidden[path] = tuple(
            Hidden(
                batch_axis(x1, x2, f"the input of the site {path}"),
                batch_axis(y1, y2, f"the output of the site {path}"),
            )
            for x1, x2, y1, y2 in visits
        )
    runs: dict[str, tuple[SiteLayout, ...]] = {}
    for path, calls in one.runs.items():
        _same_visits(path, len(calls), len(two.runs.get(path, ())))
        runs[path] = tuple(
            SiteLayout(
                _axes(in1, in2, f"an input of {path}"),
                _axes(out1, out2, f"an output of {path}"),
                tuple(out.dtype for out in out1),
            )
            for (in1, out1), (in2, out2) in zip(calls, two.runs[path], strict=True)
        )
    outputs = []
    for name, first, second in zip(names, out_one, out_two, strict=True):
        if isinstance(first, Tensor) and first.ndim == 0:
            raise FoldError(scalar_message(name))
        outputs.append(batch_axis(first, second, f"the output {name}") if isinstance(first, Tensor) else None)
    return Layout(hidden, runs, tuple(outputs))


def scalar_message(name: str) -> str:
    """Why a scalar output cannot be split by member, and what to compute instead."""
    return (
        f"The output {name} is a scalar: it cannot be split by member when members share a batch. Leave out "
        f"labels= and "
        f"compute one loss a member from the logits: torch.vmap(F.cross_entropy)(outs.logits, labels), with logits "
        f'(n, b, classes) and labels (n, b). Or use engine="vmap".'
    )


def _same_visits(path: str, one: int, two: int) -> None:
    if one != two:
        raise FoldError(
            f"{path} is called {one} times for one row and {two} times for two: which modules run depends on the "
            f'rows, so members cannot share a batch. Use engine="vmap" or "loop".'
        )


def _axes(one: list[Tensor], two: list[Tensor], what: str) -> Dims:
    if len(one) != len(two):
        # A mask may be left out when no row is padded; such calls are told apart by size when they come.
        return ()
    return tuple(batch_axis(a, b, what) for a, b in zip(one, two, strict=True))


def batch_axis(one: Tensor, two: Tensor, what: str) -> int | None:
    """The axis that doubles from ``one`` (one row) to ``two`` (two rows), ``None`` if none does.

    Raises :class:`FoldError` if the shapes say anything else, or if the first row's values depend on the second row.

    >>> batch_axis(torch.ones(1, 3), torch.ones(2, 3), "x"), batch_axis(torch.ones(3, 3), torch.ones(3, 3), "x")
    (0, None)
    """
    mixes = f'{what} mixes rows, so members cannot share a batch. Use engine="vmap" or "loop".'
    if one.ndim != two.ndim:
        raise FoldError(f"{mixes} (Shapes {tuple(one.shape)} and {tuple(two.shape)} for one and two rows.)")
    grown = [axis for axis in range(one.ndim) if one.shape[axis] != two.shape[axis]]
    if len(grown) > 1 or any(two.shape[axis] != 2 * one.shape[axis] for axis in grown):
        raise FoldError(f"{mixes} (Shapes {tuple(one.shape)} and {tuple(two.shape)} for one and two rows.)")
    axis = grown[0] if grown else None
    first = two if axis is None else two.narrow(axis, 0, one.shape[axis])
    if not close(one, first):
        raise FoldError(f"{mixes} (The first row's values change when a second row joins it.)")
    return axis


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding that another batch size brings.

    >>> close(torch.tensor([1.0]), torch.tensor([1.0 + 1e-7])), close(torch.tensor([1.0]), torch.tensor([1.1]))
    (True, False)
    """
    if not a.is_floating_point():
        return torch.equal(a, b)
    # The square root leaves half of the digits for the kernels' different orders of summation.
    kinds = [a.dtype, b.dtype]
    if torch.is_autocast_enabled(a.device.type):
        kinds.append(torch.get_autocast_dtype(a.device.type))
    tolerance = 4 * max(torch.finfo(kind).eps for kind in kinds) ** 0.5
    a, b = a.double(), b.double()
    finite = a.isfinite()
    scale = a[finite].abs().max() if finite.any() else torch.ones(())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(scale.clamp(min=1e-30)), equal_nan=True)


class WithoutDropout(TorchFunctionMode):
    """Turns dropout off inside the block: the probe compares values, and masks differ with the batch size."""

    OFF: ClassVar = {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
        *(F.alpha_dropout, F.feature_alpha_dropout, torch.dropout, dropout),
    }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.OFF:
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            kwargs["training"] = False
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = args[:4] + ((0.0, *args[5:]) if len(args) > 4 else ())
            if len(args) > 4:
                del kwargs["dropout_p"]
        return func(*args, **kwargs)
