"""The layout of a call: looked up by the key of its inputs, or learned from them by a probe."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FoldError
from ..locks import fork_safe_lock
from ..transforms import constant_while_tracing, current_transform
from ..trees.opaque import spare
from .call import Params
from .inputs import Arguments, Inputs
from .layout import Layout
from .moved import moved_apart
from .probe import OTHER_ENGINES, Facts, learn
from .program import Program, program_of
from .rows import rows_of_cache, sizes
from .undisturbed import beside, undisturbed
from .values import MANY, Deciding, can_decide

_requires_grad = attrgetter("requires_grad")

probing = fork_safe_lock()
"""Held while a layout is learned, so that two threads do not learn the same one."""


def layout_of(program: Program, stack: Params, inputs: Inputs, by_row: bool = False, entry: str = "") -> Layout:
    """The layout of these inputs: remembered, or learned from a few of their rows.

    Args:
        by_row: whether each row has its own member.
        entry: the path of the module that is called.
    """
    key = _structure(program, stack, inputs, by_row, entry)
    if torch.compiler.is_compiling():
        return _while_tracing(program, key, stack, inputs, by_row)
    layout = program.layouts.get(key)
    if isinstance(layout, Deciding):
        layout = program.layouts.get((*key, *layout.values(inputs.leaves)))
    if layout is None:
        with probing:
            layout = program.layouts.get(key_of(program, stack, inputs, by_row, entry))
            if layout is None:
                layout = _learned(program, stack, inputs, by_row, entry)
    return layout


def learned_anew(
    program: Program, stack: Params, inputs: Inputs, known: Layout, by_row: bool = False, entry: str = ""
) -> Layout:
    """A layout learned from these inputs and joined with ``known``, which did not fit them."""
    with probing:
        return _learned(program, stack, inputs, by_row, entry, known)


def _learned(
    program: Program, stack: Params, inputs: Inputs, by_row: bool, entry: str, known: Layout | None = None
) -> Layout:
    """Learn a layout and remember it; the values of inputs that Python reads on the way become part of the key."""
    structure, read = _structure(program, stack, inputs, by_row, entry), set[int]()
    before = program.layouts.get(structure)
    if isinstance(before, Deciding) and before.learned >= MANY:
        raise FoldError(
            f"The model reads the values of {' and '.join(inputs.places[i] for i in before.places)} in Python, and its "
            f"layout has been learned for {MANY} of them already: they seem to differ in each call. {OTHER_ENGINES}"
        )
    backward = torch.is_grad_enabled() and wants_gradients(stack, inputs)
    try:
        # A first fold compares outputs later itself (first_time.py); in all other cases the probe has to.
        compare = by_row or bool(entry) or known is not None
        layout = _learn(program, stack, inputs, by_row, entry, read, backward, compare)
    finally:
        if isinstance(before, Deciding):
            program.layouts[structure] = before.with_more(read)
        elif read:
            program.layouts[structure] = Deciding(()).with_more(read)
    layout = layout if known is None else known.joined(layout)
    key = key_of(program, stack, inputs, by_row, entry)
    if not layout.compared:
        for checked in [checked for checked in program.checked if checked[0] == key]:
            del program.checked[checked]  # it was checked with another layout
    program.layouts[key] = layout
    return layout


def key_of(program: Program, stack: Params, inputs: Inputs, by_row: bool = False, entry: str = "") -> Any:
    """The key of a layout: mode, precision, which leaves are given, and all of the inputs that decides."""
    key = _structure(program, stack, inputs, by_row, entry)
    if torch.compiler.is_compiling():
        return key  # there are no values while tracing
    known = program.layouts.get(key)
    return (*key, *known.values(inputs.leaves)) if isinstance(known, Deciding) else key


def _structure(program: Program, stack: Params, inputs: Inputs, by_row: bool, entry: str) -> Any:
    """The key without values of tensors."""
    single = True if by_row or inputs.has_single_rows else False  # noqa: SIM210  (symbolic while torch.compile traces)
    grads = True if torch.is_grad_enabled() else False  # noqa: SIM210  (models may ask)
    if grads and not torch.compiler.is_compiling() and not wants_gradients(stack, inputs):
        grads = None  # then no probe has to check the backward pass
    # Layouts hold the output dtypes of modules that run once per member, and autocast changes these.
    tensors = inputs.tensors()
    device = tensors[0].device.type if tensors else "cpu"
    precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    facts = program.training, precision, single, by_row, entry, grads, program.skeletons.followed
    given = *facts, tuple(stack)
    key = None if torch.compiler.is_compiling() else inputs.keys.get(given)
    if key is None:
        key = inputs.key("|".join(sorted(program.plan.present(stack))), *facts)
        if not torch.compiler.is_compiling():
            inputs.keys[given] = key
    return key


def wants_gradients(stack: Params, inputs: Inputs) -> bool:
    """Whether the call may be differentiated: something requires grad, or a transform is active."""
    if current_transform() is not None or any(map(_requires_grad, stack.values())):
        return True
    return True in map(_requires_grad, inputs.tensors())


def _learn(
    program: Program,
    stack: Params,
    inputs: Inputs,
    by_row: bool,
    entry: str,
    read: set[int],
    backward: bool,
    compare: bool,
) -> Layout:
    """The layout, from the first rows of the first member and the last rows of the last, in reverse order."""
    inputs = inputs.concrete()
    # Different rows, in another order: what a member gets from another's rows then differs from its own.
    first = list(range(1 if by_row else min(inputs.b, 2)))
    last = [inputs.b - 1 - i for i in first]
    ends = (0, first), (0 if by_row else inputs.n - 1, last)
    with undisturbed():
        one, together = [picked(inputs, end) for end in ends], picked(inputs, *ends)
    with beside():
        members = moved_apart(stack, program.plan.constants, ends=True)
    deciding = [i for i, leaf in enumerate(inputs.leaves) if i not in inputs.row_axis and can_decide(leaf)]
    facts = Facts(inputs.row_axis, tuple(deciding), len(first), by_row, backward)
    return learn(program, members, one, together, facts, entry, read, compare)


def picked(inputs: Inputs, *which: tuple[int, Sequence[int]]) -> Arguments:
    """The folded inputs of some rows, given as pairs ``(member, its rows)``; copies of all that a call may change.

    >>> inputs = Inputs(torch.nn.Linear(1, 1), 2, (torch.tensor([[1.0], [2.0], [3.0]]),), {}, None, 0)
    >>> picked(inputs, (0, [0]), (1, [2, 1]))[0][0].flatten()
    tensor([1., 3., 2.])
    """
    leaves = []
    for i, leaf in enumerate(inputs.leaves):
        axis = inputs.row_axis.get(i)
        if axis is not None:
            parts = []
            for member, rows in which:
                own = leaf[member] if inputs.is_mapped[i] else leaf
                parts.append(_these(own, axis, rows))
            leaf = _side_by_side(parts, axis)
        elif inputs.is_mapped[i]:
            leaf = leaf[which[0][0]]
        elif inputs.is_cache(i):
            leaf = rows_of_cache(leaf, [row for _, rows in which for row in rows])
        if isinstance(leaf, Tensor) and axis is None:
            leaf = leaf.clone()
        leaves.append(leaf)
    return spare(inputs.filled(leaves))


def _these(leaf: Any, axis: int, rows: Sequence[int]) -> Any:
    """These rows of a leaf; if it has a single row, that one for each."""
    if isinstance(leaf, list):
        return [leaf[row] for row in rows]
    asked = rows if leaf.shape[axis] != 1 else [0] * len(rows)
    if isinstance(leaf, np.ndarray):
        return leaf.take(asked, axis)
    return leaf.index_select(axis, torch.tensor(asked, device=leaf.device))


def _side_by_side(parts: list[Any], axis: int) -> Any:
    if isinstance(parts[0], list):
        return [entry for part in parts for entry in part]
    return np.concatenate(parts, axis) if isinstance(parts[0], np.ndarray) else torch.cat(parts, axis)


@constant_while_tracing
def _learn_while_tracing(
    handle: int, key: Any, names: tuple[str, ...], shapes: tuple[Any, ...], form: tuple[Any, ...], by_row: bool
) -> bool:
    """Learn a layout while torch.compile traces, which has no values: from made-up rows of the same shapes."""
    program = program_of(handle)
    known = program.layouts.get(key)
    if isinstance(known, Deciding):
        raise FoldError("The model reads values of its inputs in Python, and there are none while compiling.")
    if known is not None and (known.compared or any(checked[0] == key for checked in program.checked)):
        _open_traced(program, key)
        return True
    positional, keywords, row_axis = form
    if len(shapes) != positional + len(keywords):
        raise FoldError(
            "The inputs are nested, and their layout is unknown while compiling. Call apply_many once, uncompiled, "
            "before you compile it."
        )
    rng = torch.Generator().manual_seed(0)
    axes = dict(row_axis)
    leaves = []
    for i, fact in enumerate(shapes):
        if not isinstance(fact, tuple):
            leaves.append(fact)
            continue
        shape, dtype = list(fact[0]), fact[1]
        if i in axes:
            shape[axes[i]] = 2
        # Zeros and ones are valid token numbers, masks and token types alike.
        random = (
            torch.randn(shape, generator=rng) if dtype.is_floating_point else torch.randint(2, shape, generator=rng)
        )
        leaves.append(random.to(dtype))
    args, kwargs = tuple(leaves[:positional]), dict(zip(keywords, leaves[positional:], strict=True))
    inputs = Inputs(program.backbone, 2, args, kwargs, None, program.batch_dim)
    read = set[int]()
    members = program.random_members(2, program.plan.present(dict.fromkeys(names)))
    layout = _learn(program, members, inputs, by_row, "", read, torch.is_grad_enabled(), compare=True)
    if read:
        raise FoldError(
            f"The model reads the values of {inputs.places[min(read)]} in Python, and there are none while compiling."
        )
    program.layouts[key] = layout
    _open_traced(program, key)
    return True


def _open_traced(program: Program, key: Any) -> None:
    """Open the modules that run once per member in the skeleton that compiled code uses; a trace could not."""
    for path in program.layouts[key].runs:
        program.skeletons.traced(program.training).open(path)


def _while_tracing(program: Program, key: Any, stack: Params, inputs: Inputs, by_row: bool) -> Layout:
    # Sizes may be symbolic here. The number of rows does not matter; int() specialises the graph on the others.
    shapes = []
    for i, leaf in enumerate(inputs.leaves):
        shape = sizes(leaf, inputs.is_mapped[i])
        if shape is None or not isinstance(leaf, Tensor):
            shapes.append(leaf)
        else:
            axis = inputs.row_axis.get(i)
            shapes.append((tuple([2 if at == axis else int(size) for at, size in enumerate(shape)]), leaf.dtype))
    positional, keywords = inputs.form
    form = positional, keywords, tuple(inputs.row_axis.items())
    _learn_while_tracing(program.handle, key, tuple(stack), tuple(shapes), form, by_row)
    return program.layouts[key]
