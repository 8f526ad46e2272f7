"""Rows with different members that cannot share a batch: each row alone, or the whole batch once per member.

A row alone is what ``apply_rows`` promises. If an input has no rows to pick from (two images, and only the model knows
which text each belongs to), every member runs the whole batch instead, and its rows are picked from the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError, EngineWarning, FuncdeltaError
from ..trees.opaque import PLAIN, holds_tensors, spare
from .containers import is_cache
from .inputs import Inputs
from .layout import close
from .outputs import check_visible, flatten, names
from .written import changed, marks

Run = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""``run(row, args, kwargs)``: the output of ``args`` and ``kwargs`` with the member of that row."""

Join = Callable[[Sequence[Tensor]], "Tensor | None"]
"""Joins one tensor of every run to one; ``None`` if they do not fit together."""


def run_in_turn(inputs: Inputs, members: Sequence[int], run: Run) -> Any:
    """The output of a batch whose row i runs with the member ``members[i]``.

    Caches among the inputs, and other inputs that a run writes, afterwards hold for each row what its run wrote.
    """
    try:
        alone = [_one(inputs.rows([row]), row, run) for row in range(inputs.b)]
    except FuncdeltaError:
        raise
    except Exception as error:
        try:
            return _by_member(inputs, members, run)
        except Exception as other:
            if type(other) is type(error) and str(other) == str(error):
                raise  # the model's own error, which has nothing to do with rows
            raise EngineError(
                f"a single row fails ({type(error).__name__}: {error}), and so does the whole batch with one member "
                f"({type(other).__name__}: {other})."
            ) from error
    if not inputs.odd:
        return _of_rows(inputs, alone)
    output = _by_member(inputs, members, run)
    # Nobody knows whether an input without rows belongs to all rows or to some: both ways have to agree.
    for row, single in enumerate(alone):
        for name, own in _tensors(single.output).items():
            whole = _tensors(output).get(name)
            if whole is None or whole.ndim <= inputs.batch_dim or whole.shape[inputs.batch_dim] != inputs.b:
                continue
            if not close(whole.narrow(inputs.batch_dim, row, 1), own):
                raise EngineError(
                    f"the input {inputs.odd[0]} has no rows, and with it a row alone gets other numbers ({name}) than "
                    f"in the whole batch."
                )
    return output


@dataclass(frozen=True)
class One:
    """One run: its output, the caches that it was given, and the inputs that it has written, by position."""

    output: Any
    caches: list[Any]
    written: dict[int, Tensor]


def _one(part: Inputs, row: int, run: Run) -> One:
    """A run on copies of its inputs."""
    copied = part.copied()
    copied.leaves = [spare(leaf) for leaf in copied.leaves]
    own = [(i, leaf) for i, leaf in enumerate(copied.leaves) if isinstance(leaf, Tensor)]
    tensors = [leaf for _, leaf in own]
    before = marks(tensors)
    output = run(row, *copied.shared())
    shown = [(leaf, name) for leaf, name in zip(flatten(output)[0], names(output), strict=True) if not is_cache(leaf)]
    check_visible([leaf for leaf, _ in shown], [name for _, name in shown], copied.shared()[1])
    caches = [leaf for i, leaf in enumerate(copied.leaves) if copied.is_cache(i)]
    return One(output, caches, dict(own[at] for at in changed(tensors, before)))


def _tensors(output: Any) -> dict[Any, Tensor]:
    """The tensors of an output, by name or position."""
    if isinstance(output, Tensor):
        return {"of the model": output}
    pairs = output.items() if isinstance(output, Mapping) else enumerate(output if isinstance(output, tuple) else ())
    return {name: value for name, value in pairs if isinstance(value, Tensor)}


def _by_member(inputs: Inputs, members: Sequence[int], run: Run) -> Any:
    """The output whose rows come from whole batches, one for each member."""
    first = {member: row for row, member in reversed(list(enumerate(members)))}
    order = list(first)
    axis, b = inputs.batch_dim, inputs.b

    def pick(tensors: Sequence[Tensor], axis: int = axis) -> Tensor | None:
        if len({tensor.shape for tensor in tensors}) > 1:
            return None
        if tensors[0].ndim > axis and tensors[0].shape[axis] == b:
            return torch.stack([tensors[order.index(m)].select(axis, row) for row, m in enumerate(members)], axis)
        return tensors[0] if all(close(tensors[0], other) for other in tensors[1:]) else None

    runs = [_one(inputs, first[member], run) for member in order]
    for i in {i for one in runs for i in one.written}:
        whole: Tensor = inputs.leaves[i]
        made = [one.written.get(i, whole) for one in runs]
        picked = pick(made, inputs.row_axis[i]) if i in inputs.row_axis else made[-1]
        if picked is not None:
            whole.copy_(picked)
    return _together(inputs, runs, pick)


def _of_rows(inputs: Inputs, alone: list[One]) -> Any:
    """The outputs of single rows, joined to one batch."""

    def join(tensors: Sequence[Tensor]) -> Tensor | None:
        axis = inputs.batch_dim
        if any(t.ndim <= axis or t.shape[axis] != 1 for t in tensors):
            axis = next((a for a in range(tensors[0].ndim) if all(t.ndim > a and t.shape[a] == 1 for t in tensors)), -1)
        if axis < 0 or len({(*t.shape[:axis], *t.shape[axis + 1 :]) for t in tensors}) > 1:
            return None
        return torch.cat(list(tensors), axis)

    for row, one in enumerate(alone):
        for i, own in one.written.items():
            whole, axis = inputs.leaves[i], inputs.row_axis.get(i)
            is_part = axis is not None and whole.shape[axis] == inputs.b
            (whole.narrow(axis or 0, row, 1) if is_part else whole).copy_(own)
    return _together(inputs, alone, join)


def _together(inputs: Inputs, runs: list[One], join: Join) -> Any:
    """One output for all runs.

    Fields that cannot be joined raise ``EngineError``; those that hold a part's whole output (a mapping) only warn and
    become ``None``.
    """
    kept = [leaf for i, leaf in enumerate(inputs.leaves) if inputs.is_cache(i)]
    for at, cache in enumerate(kept):
        vars(cache).update(vars(_joined([one.caches[at] for one in runs], join, type(cache).__name__)))
    of = {id(own): cache for one in runs for own, cache in zip(one.caches, kept, strict=True)}
    first = runs[0].output
    if not isinstance(first, MutableMapping) or any(set(one.output) != set(first) for one in runs):
        return _field([one.output for one in runs], join, of, "of the model")
    made: dict[Any, Any] = {}
    for name in first:
        try:
            made[name] = _field([one.output[name] for one in runs], join, of, name)
        except EngineError as error:
            if not isinstance(first[name], Mapping):
                raise  # the next call may continue from it
            made[name] = None
            warnings.warn(f"{error} The field is None.", EngineWarning, stacklevel=2)
    for name, value in made.items():
        first[name] = value
    return first


def _field(values: list[Any], join: Join, of: Mapping[int, Any], name: str) -> Any:
    """One field of the output, joined over all runs; ``of`` says which cache to return for each run's copy."""
    flat, trees = zip(*map(flatten, values), strict=True)
    if any(tree != trees[0] for tree in trees):
        raise EngineError(f"The output {name} has a different structure for different rows.")
    found = []
    for column in zip(*flat, strict=True):
        if not isinstance(column[0], Tensor):
            found.append(
                of.get(id(column[0])) or _joined(list(column), join, name) if is_cache(column[0]) else column[0]
            )
            continue
        whole = join(column)
        if whole is None:
            raise EngineError(
                f"The rows run in turn, and the output {name} has the shape "
                f"{' or '.join(dict.fromkeys(str(tuple(t.shape)) for t in column))}, which cannot be joined to one "
                f"batch. If some rows run the bare backbone (index -1), run them separately: delta.apply({{}}, ...)."
            )
        found.append(whole)
    return trees[0](found)


def _joined(parts: list[Any], join: Join, name: str) -> Any:
    """The first of several objects of one structure, holding the joined tensors of all."""
    first = parts[0]
    if isinstance(first, Tensor):
        alike = all(part.ndim == 0 or part.numel() == 0 for part in parts)
        whole = first if alike else join(parts)
        if whole is None:
            raise EngineError(f"The cache {name} has tensors whose rows cannot be joined to one batch.")
        return whole
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts], join, name) for key in first}
    if type(first) in (list, tuple):
        return type(first)(_joined(list(column), join, name) for column in zip(*parts, strict=True))
    if isinstance(first, PLAIN) or not isinstance(getattr(first, "__dict__", None), dict) or not holds_tensors(first):
        return first
    for key in vars(first):
        vars(first)[key] = _joined([vars(part)[key] for part in parts], join, name)
    return first
