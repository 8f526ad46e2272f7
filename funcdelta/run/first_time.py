"""The first call with inputs of new sizes: does each member get in one batch what it gets alone?

A layout is learned from a few rows, so a model that takes another branch for many rows, or for long ones, shows only
here, on all rows at hand. If the members differ clearly and nothing is drawn at random, the call's own output is
checked: against a call with the members in other places, and against one member alone. Otherwise the same is done with
copies of the members that are moved apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import FoldError
from ..transforms import concrete, current_transform
from ..trees.opaque import spare
from ..trees.stack import take
from .call import Params
from .fold import Folded, members_of
from .inputs import Arguments, Inputs
from .layout import Layout, LayoutMismatchError, close, tolerance_of
from .layouts import key_of, learned_anew
from .moved import APART, are_apart, moved_apart
from .on_copies import on_copies
from .outputs import flatten
from .probe import OTHER_ENGINES, unequal
from .program import Program
from .single import call_single
from .together import folded_run
from .undisturbed import beside, undisturbed

ATTEMPTS = 6
"""How often a layout is learned for one call: with layers that are skipped at random, a probe may miss some."""


def with_layout(
    program: Program,
    stack: Params,
    inputs: Inputs,
    layout: Layout,
    given: Arguments,
    run: Callable[..., Any],
    by_row: bool = False,
) -> Any:
    """``run(layout, *given)``; if ``layout`` does not fit the call, again with one that is learned from its inputs.

    With ``by_row`` each row has its own member, and errors do not speak of engines.
    """

    def once(layout: Layout) -> Any:
        if not program.writes_inputs or torch.compiler.is_compiling():
            return run(layout, *given)
        return on_copies(inputs, lambda own: run(layout, *(own.shared() if by_row else own.folded())))

    for attempt in range(ATTEMPTS):
        try:
            return _checked(program, stack, inputs, layout, once, by_row)
        except LayoutMismatchError as error:
            if torch.compiler.is_compiling() or attempt == ATTEMPTS - 1:
                # apply_rows has no engine=, and runs the rows in turn when it catches this.
                raise error if by_row else LayoutMismatchError(f"{error} {OTHER_ENGINES}") from error
            layout = learned_anew(program, stack, inputs, layout, by_row)
    raise AssertionError("every attempt returns or raises")


def _checked(
    program: Program, stack: Params, inputs: Inputs, layout: Layout, run: Callable[[Layout], Any], by_row: bool
) -> Any:
    """``run(layout)``, checked if inputs of these sizes are new."""
    if torch.compiler.is_compiling() or id(layout) in inputs.checked:
        return run(layout)
    shapes = tuple(tuple(leaf.shape) for leaf in inputs.leaves if isinstance(leaf, Tensor))
    key = key_of(program, stack, inputs, by_row), inputs.n, inputs.b, shapes
    itself, output = False, None
    if key not in program.checked:
        with beside():
            plain = inputs.concrete().copied()  # the call may write into what it is given
        itself = not by_row and not layout.draws and not program.writes_inputs and current_transform() is None
        itself = itself and are_apart(stack, program.plan.constants)
        output = run(layout) if itself else None
        if not (itself and _is_evidence(program, stack, plain, layout, flatten(output)[0])):
            _check_moved(program, stack, plain, layout, by_row)
        program.checked[key] = True
    inputs.checked[id(layout)] = layout  # kept alive, so that no other layout can have the same id
    return output if itself else run(layout)


def _is_evidence(program: Program, stack: Params, inputs: Inputs, layout: Layout, leaves: list[Any]) -> bool:
    """Whether the call's own output proves that members do not mix: they differ clearly, and each is right."""
    return any(map(_differ, leaves)) and not _odd_output(program, stack, inputs, layout, leaves, by_row=False)


def _differ(leaf: Any) -> bool:
    """Whether an output of the last member differs from the first member's by much more than rounding."""
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or not leaf.numel():
        return False
    first, last = leaf[0].detach(), leaf[-1].detach()
    far = max(APART, 16 * tolerance_of(leaf))
    return bool((last - first).abs().max() > far * torch.maximum(first.abs().max(), last.abs().max()))


def _check_moved(program: Program, stack: Params, inputs: Inputs, layout: Layout, by_row: bool) -> None:
    """Raise :class:`FoldError` unless members that are moved apart get in one batch what each gets alone."""
    n, rows = (inputs.b, 1) if by_row else (inputs.n, inputs.b)
    with beside():
        moved = moved_apart(stack, program.plan.constants)
    leaves = _in_one_batch(program, moved, inputs, layout, by_row)
    odd = _odd_output(program, moved, inputs, layout, leaves, by_row)
    if not odd:
        return
    if not layout.compared:
        learned_anew(program, stack, inputs, layout)  # if a few rows show it as well, this error names the module
    program.layouts.pop(key_of(program, stack, inputs, by_row), None)
    raise FoldError(
        f"{n} members with {rows} rows each get other numbers in one batch than alone (output {odd}): what the model "
        f"computes depends on how many rows there are, or on how long they are. {OTHER_ENGINES}"
    )


def _in_one_batch(program: Program, stack: Params, inputs: Inputs, layout: Layout, by_row: bool) -> list[Any]:
    """The leaves (n, b, …) of the output of all members in one batch."""
    n, rows = (inputs.b, 1) if by_row else (inputs.n, inputs.b)
    with undisturbed(layout.draws):
        copied = inputs.copied()
        args, kwargs = spare(copied.shared() if by_row else copied.folded())
        together, _ = flatten(folded_run(program, stack, layout, args, kwargs, Folded(n, rows)))
        return [
            members_of(leaf, dim, n, rows, name) if isinstance(leaf, Tensor) else leaf
            for name, leaf, dim in zip(layout.names, together, layout.outputs, strict=True)
        ]


def _odd_output(
    program: Program, stack: Params, inputs: Inputs, layout: Layout, leaves: list[Any], by_row: bool
) -> str | None:
    """The name of the first output (n, b, …) that is not what each member gets alone; ``None`` if all are right.

    The last member is compared with itself alone, and every member with itself one place further in the batch: what
    holds at the last place then holds at all, for two more runs instead of n.
    """
    n = inputs.b if by_row else inputs.n
    with undisturbed(layout.draws):
        copied = inputs.copied()
        own = copied.rows([n - 1]).shared() if by_row else copied.member(n - 1)
        plain = {name: concrete(leaf) for name, leaf in stack.items()}
        alone, _ = flatten(call_single(program, take(plain, n - 1), *spare(own)))
        turned = inputs.copied().rows([*range(1, n), 0]) if by_row else inputs.copied().turned()
        others = {name: leaf.roll(-1, 0) for name, leaf in plain.items()}
        others = _in_one_batch(program, others, turned, layout, by_row)
    if not len(alone) == len(leaves) == len(others):
        return "of the model"
    for name, leaf, again, expected in zip(layout.names, leaves, others, alone, strict=True):
        if isinstance(leaf, Tensor) and isinstance(expected, Tensor):
            if not (close(leaf[-1], expected) and close(again, leaf.roll(-1, 0))):
                return name
        elif not by_row and unequal(leaf, expected):
            return name
    return None
