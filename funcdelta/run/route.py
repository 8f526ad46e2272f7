"""Rows: each row of a batch with a member of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError, ParamsError
from ..planning.sharing import expand_stack
from ..pytrees.opaque import spare
from ..stacks.resident import Resident
from ..stacks.routing import Index, pick_rows, read_index
from .auto import run_first_that_can
from .call import Params
from .first_time import with_layout
from .fold import Folded
from .inputs import Inputs
from .layout import Layout
from .layouts import key_of, layout_of
from .outputs import flatten, refuse_lazy
from .program import Program, first_of
from .single import call_single
from .together import folded_run


def route_rows(
    program: Program,
    stack: Mapping[str, Tensor],
    expanded: Params,
    n: int,
    index: Index,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reached: set[str] | None,
) -> Any:
    """Row i of the batch with member ``index[i]`` of the stack; -1 runs the bare backbone.

    Where rows cannot share a batch, each runs by itself.
    """
    read, present = read_index(index, None if isinstance(stack, Resident) else n, first_of(expanded).device)
    inputs = Inputs(program.backbone, 1, args, kwargs, None, program.batch_dim, entries=read.shape[0])
    if read.shape[0] != inputs.b:
        raise ParamsError(f"index has {read.shape[0]} entries for a batch of {inputs.b} rows: give one member a row.")
    if inputs.b == 0:
        return call_single(program, {name: leaf[0] for name, leaf in expanded.items()}, args, kwargs)
    picked = stack.pick(read) if isinstance(stack, Resident) else None
    taken = (
        pick_rows(expanded, read, some_bare=present is not None)
        if picked is None
        else expand_stack(program.plan.shared, picked)
    )
    if inputs.b == 1 and present is None:
        return call_single(program, {name: leaf[0] for name, leaf in taken.items()}, args, kwargs, reached)

    def folded() -> Any:
        layout = layout_of(program, taken, inputs, by_row=True)
        lift = Folded(inputs.b, 1, present)

        def run(layout: Layout) -> Any:
            output = folded_run(program, taken, layout, args, kwargs, lift, reached)
            refuse_lazy(output)
            return output

        return with_layout(program, taken, inputs, layout, run, by_row=True)

    def in_turn() -> Any:
        """Row by row, outputs joined where the rows of the whole are."""
        outputs = []
        for i in range(inputs.b):
            own = {} if present is not None and not bool(present[i]) else {k: leaf[i] for k, leaf in taken.items()}
            outputs.append(call_single(program, own, *spare(inputs.rows([i]).shared()), reached))
        return joined(outputs, inputs)

    if torch.compiler.is_compiling():
        return folded()
    return run_first_that_can(
        program, lambda: key_of(program, taken, inputs, by_row=True), {"fold": folded, "loop": in_turn}, "apply_rows"
    )


def joined(outputs: list[Any], inputs: Inputs) -> Any:
    """Outputs of single rows as those of one batch."""
    flat = [flatten(output) for output in outputs]
    _, rebuild = flat[0]
    found = []
    for column in zip(*(leaves for leaves, _ in flat), strict=True):
        if not isinstance(column[0], Tensor):
            found.append(column[0])
            continue
        axis = inputs.batch_dim
        if any(t.ndim <= axis or t.shape[axis] != 1 for t in column):
            axis = next((a for a in range(column[0].ndim) if all(t.shape[a] == 1 for t in column)), -1)
        if axis < 0:
            raise EngineError(
                f"An output of one row has the shape {tuple(column[0].shape)}, without an axis of rows: rows of "
                f"several members cannot be given as one batch. Call delta.apply(params, ...) for each."
            )
        shapes = {(*t.shape[:axis], *t.shape[axis + 1 :]) for t in column}
        if len(shapes) > 1:
            raise EngineError(
                f"Outputs of single rows have the shapes {', '.join(str(tuple(t.shape)) for t in column[:3])} and do "
                f"not fit into one batch: run such rows by themselves, delta.apply({{}}, ...) for the bare backbone."
            )
        found.append(torch.cat(column, axis))
    return rebuild(found)
