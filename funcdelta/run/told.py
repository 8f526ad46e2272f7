"""What a method's functions at a site get of the call: values that follow the hidden ones, with axes of rows like them.

A condition (rows, ...) has axis 0 split by member in a fold, as hidden values have theirs. Its rows, and its tokens
where it has some, have to be those of the hidden value: a condition that does not fit is refused, never stretched.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ..errors import EngineError, FoldError, MatchError, ParamsError
from ..transforms import innermost, is_wrapped
from .bound import Bound
from .call import Call
from .conditions import CONDITIONS, Told, unknown
from .texts import A_TOKEN, OF_TEXTS

Values = tuple[Tensor, ...]
Dims = tuple[int | None, ...]


def told(
    call: Call, path: str, bound: Bound, values: Values, dims: Dims, entered: Tensor | None = None
) -> tuple[Values, Dims]:
    """The hidden ``values`` at a site with the conditions that its method wants behind them, and their axes of rows.

    ``entered`` is what the model gave to the site, before other methods there changed it.

    Raises ``MatchError`` where a condition is not known there, ``ParamsError`` where the caller should have given it.
    """
    found: Told | None = call.notes.get(CONDITIONS)
    if found is None and call.never_ends:
        raise EngineError(
            f"{path} wants conditions of the call ({', '.join(bound.conditions)}), and runs by itself, or again for a "
            f"backward pass (gradient checkpointing): a view does not keep what a call tells. Call the whole model or "
            f"the text model in it; where activations are checkpointed, train with delta.apply(params, ...)."
        )
    if found is None:
        raise FoldError(
            f"{path} wants conditions of the call ({', '.join(bound.conditions)}), and is in a module that runs once "
            f'per member, where they are not told apart. Use engine="auto", "vmap" or "loop".'
        )
    with contextlib.nullcontext() if call.watch is None else call.watch.paused():
        more = [_one(call, found, name, path, bound, values, dims, entered) for name in bound.conditions]
    return (*values, *[value for value, _ in more]), (*dims, *[dim for _, dim in more])


def _one(
    call: Call,
    found: Told,
    name: str,
    path: str,
    bound: Bound,
    values: Values,
    dims: Dims,
    entered: Tensor | None,
) -> tuple[Tensor, int | None]:
    """One condition, with the axis that counts the rows of all members; ``None``: it is the same for each of them."""
    given = found.given.get(name)
    if given is not None and name in OF_TEXTS:
        given = given.ne(0) if name == "mask" else given.to(torch.int64)
    if given is None or (name == "mask" and found.reads_text(path)):
        if name not in OF_TEXTS:
            raise ParamsError(
                f"{bound.attachment.name} at {path} wants the condition {name}, which the call did not give: write "
                f'conditions={{"{name}": a tensor with one entry a row}}.'
            )
        text = found.of_text(call, name, path)
        try:
            given = found.computed(name, text)
        except ParamsError as error:
            raise ParamsError(unknown(name, path, str(error))) from error
        seen = values if entered is None else (*values, entered)
        if any(_same(value, other) for value in seen for other in text.others):
            raise MatchError(unknown(name, path, "what enters it is not the text, but another input of the model"))
    if given.ndim == 0:
        return given, None
    return _by_rows(call, found, name, given, path, bound, values[0], dims[0])


def _by_rows(
    call: Call, found: Told, name: str, given: Tensor, path: str, bound: Bound, hidden: Tensor, dim: int | None
) -> tuple[Tensor, int | None]:
    """``given`` where its leading axes are those of the hidden value, as the method sees it."""
    order, site = bound.attachment.config.axis_order, bound.attachment.site
    seen = tuple(order) if order is not None and len(order) == hidden.ndim else tuple(range(hidden.ndim))
    shape = [hidden.shape[axis] for axis in seen]
    n, rows = 1 if call.lift is None else call.lift.n, given.shape[0]
    fits = (bool(shape) and rows in (1, shape[0])) or (call.lift is not None and rows * n == shape[0])
    if call.lift is not None and (dim is None or dim != seen[0]):
        fits = False
    if name in A_TOKEN:
        alike = given.ndim > 1 and len(shape) == 3 and shape[1] == given.shape[1]
        fits = fits and alike and (order is not None or site.features_axis(hidden) == -1)
        if fits and shape[0] != shape[1] and not torch.compiler.is_compiling():
            found.ordered.add(path)
    if not fits:
        raise MatchError(_misfit(name, path, tuple(given.shape), tuple(shape)))
    if call.lift is not None and rows == shape[0]:
        return given, 0
    if rows == 1 and name in OF_TEXTS:
        given = given.expand(shape[0] // n, *given.shape[1:])
    return given, None


def _misfit(name: str, path: str, given: tuple[int, ...], hidden: tuple[int, ...]) -> str:
    """What is said where a condition does not have the leading axes of a hidden value."""
    what = f"The condition {name} of the call is {given}, and the hidden value at {path} is {hidden}"
    out = f'leave the site out, exclude_modules=["{path}"]'
    if name in A_TOKEN and len(hidden) == 3 and hidden[1::-1] == given[:2]:
        return f"{what}, with tokens first: write axis_order=(1, 0, 2) in the config of this site, or {out}."
    if name in OF_TEXTS:
        parts = "(rows, tokens, features)" if name in A_TOKEN else "with the rows of this text in front"
        return f"{what}, not {parts}: name a module around it where it is, or {out}."
    return (
        f"{what}: give one entry a row, a single one for all rows, (1, ...), or a number; where rows are not in front "
        f"there, {out}."
    )


def _same(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, also where a transform or a checkpoint has wrapped one of them."""
    if value is other:
        return True
    if value.shape != other.shape or torch.compiler.is_compiling():
        return False
    a, b = innermost(value), innermost(other)
    return not (is_wrapped(a) or is_wrapped(b)) and a.numel() > 0 and a.data_ptr() == b.data_ptr() != 0
