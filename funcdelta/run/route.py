"""``apply_rows``: each row of a batch runs with its own member."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ParamsError
from ..plan.sharing import expand_stack
from ..trees.resident import Resident
from ..trees.routing import Index, pick_rows, read_index
from .auto import run_first_that_can
from .call import Params
from .first_time import with_layout
from .fold import Folded
from .in_turn import run_in_turn
from .inputs import Inputs
from .layout import Layout
from .layouts import key_of, layout_of
from .outputs import refuse_lazy
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
    """The output whose row i is computed with member ``index[i]`` of the stack, or by the bare backbone for -1.

    Rows that cannot share a batch run one after the other.
    """
    read, present = read_index(index, None if isinstance(stack, Resident) else n, first_of(expanded).device)
    inputs = Inputs(program.backbone, 1, args, kwargs, None, program.batch_dim, entries=read.shape[0])
    if read.shape[0] != inputs.b:
        raise ParamsError(f"index has {read.shape[0]} entries for a batch of {inputs.b} rows; give one entry per row.")
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

    def folded(inputs: Inputs) -> Any:
        layout = layout_of(program, taken, inputs, by_row=True)
        lift = Folded(inputs.b, 1, present)

        def run(layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output = folded_run(program, taken, layout, args, kwargs, lift, reached)
            refuse_lazy(output)
            return output

        return with_layout(program, taken, inputs, layout, inputs.shared(), run, by_row=True)

    def in_turn(inputs: Inputs) -> Any:
        def run(row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            bare = present is not None and not bool(present[row])
            own = {} if bare else {name: leaf[row] for name, leaf in taken.items()}
            return call_single(program, own, args, kwargs, reached)

        return run_in_turn(inputs, read.tolist(), run)

    if torch.compiler.is_compiling():
        return folded(inputs)
    ways = {"fold": folded, "loop": in_turn}
    return run_first_that_can(program, lambda: key_of(program, taken, inputs, by_row=True), ways, inputs, "apply_rows")
