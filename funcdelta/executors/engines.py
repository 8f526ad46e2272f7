"""Executors: how many members run. ``loop`` calls them in turn, ``vmap`` maps them, ``fold`` puts them into the batch.

*Fold outside, vmap inside*: members are folded into the batch axis, (n, b, …) → (n·b, …), so the backbone runs its
normal fast path once; only at a site is the hidden value split again, and the method's function mapped over members.
``trunk`` is a fold in which what comes before the first delta runs once, where all members see one batch. ``rows`` is
a fold of picked members with one row each. All give the same numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calls.layout import Layout
from ..calls.lift import Folded
from ..calls.recompute import kept_run, named_refusal, needs_keeping
from ..calls.sharded import check_kept, check_ran
from ..calls.skeleton import TENSOR, Call, Params
from ..calls.trunk import WORTH, Trunk, install, members_of
from ..errors import EngineError, FoldError, ParamsError
from ..functional.attention import attention_for_this_call
from ..pytrees.opaque import holds_tensors, spare, why_opaque
from ..stacks.params import take
from ..stacks.routing import Index, pick_rows, read_index
from .inputs import Inputs
from .probe import layout_for, runners
from .trunk_probe import trunk_for

if TYPE_CHECKING:
    from ..model import DeltaModel


def call_single(
    delta: DeltaModel, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], reached: set[str] | None = None
) -> Any:
    """One member: the backbone's own output; ``reached`` collects the sites that the call passes through."""
    skeleton = delta.skeletons.get(delta.mode_flag, hooked=bool(params))
    call = Call(params, reached=reached)
    if params and needs_keeping(skeleton):
        skeleton = delta.skeletons.spare(delta.mode_flag)
        overrides = skeleton.overrides(params)
        check_kept(skeleton.units, overrides)
        return kept_run(skeleton, call, overrides, args, kwargs)
    if skeleton.units:
        call.runners = delta.plan.runners(params)
    with attention_for_this_call(), named_refusal(skeleton):
        try:
            output = skeleton.run("", params, args, kwargs, call)
        except RuntimeError as error:
            if skeleton.writes_buffers or "mutate a captured Tensor" not in str(error):
                raise
            skeleton.writes_buffers = True
            call = Call(params, reached=reached, runners=call.runners)
            output = skeleton.run("", params, args, kwargs, call)
    check_ran(call.runners, call.ran)
    return output


def call_loop(delta: DeltaModel, stack: Params, inputs: Inputs) -> Any:
    """Members in turn, outputs stacked."""
    outputs = [call_single(delta, take(stack, i), *spare(inputs.member(i))) for i in range(inputs.n)]
    leaves = [_flatten(output) for output in outputs]
    spec = leaves[0][1]
    columns = zip(*[row for row, _ in leaves], strict=True)
    joined = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(joined, spec)


def call_vmap(delta: DeltaModel, stack: Params, inputs: Inputs) -> Any:
    """Members mapped by ``torch.vmap``; work before the first site is shared where inputs are."""
    found: list[Any] = []

    def member(p: Params, mapped: list[Tensor]) -> tuple[Tensor, ...]:
        output = call_single(delta, p, *spare(inputs.fill_mapped(mapped)))
        leaves, spec = _flatten(output)
        found[:] = [spec, [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    try:
        results = iter(torch.vmap(member, in_dims=(0, 0), randomness="different")(stack, inputs.mapped()))
    except EngineError:
        raise
    except RuntimeError as error:
        reason = known_vmap_limit(str(error))
        if reason is None:
            raise
        raise EngineError(f'{reason}. Use engine="fold" (or "loop").') from error
    spec, others = found
    return pytree.tree_unflatten([next(results) if other is TENSOR else other for other in others], spec)


def _flatten(output: Any) -> tuple[list[Any], Any]:
    """``tree_flatten`` of the model's output, which must not hide tensors: they would be one member's, or all."""
    leaves, spec = pytree.tree_flatten(output)
    for leaf in leaves:
        if not torch.compiler.is_compiling() and holds_tensors(leaf):
            raise EngineError(f"An output of many members {why_opaque(leaf)}")
    return leaves, spec


def known_vmap_limit(message: str) -> str | None:
    """What torch's message means, for the limits of ``torch.vmap`` that another engine does not have."""
    if "data-dependent control flow" in message:
        return "torch.vmap cannot map this model over inputs whose values steer Python code (a mapped attention_mask)"
    if "Batching rule not implemented" in message or "could not generate a fallback" in message:
        return f"torch.vmap cannot map this model ({message.splitlines()[0][:120]})"
    if "It looks like you're calling .item()" in message:
        return "torch.vmap cannot map this model: it reads values of tensors in Python"
    if "setup_context" in message or "autograd.Function" in message:
        return "torch.vmap cannot map this model: it has an autograd.Function without a batching rule"
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    if autocast and ("same dtype" in message or "scalar type" in message):
        return "torch.vmap leaves layers with mapped weights out of autocast, so dtypes do not meet"
    if message.startswith("vmap") or "vmap" in message.split(":")[0]:
        return f"torch.vmap cannot map this model ({message.splitlines()[0][:160]})"
    return None


def call_fold(delta: DeltaModel, stack: Params, inputs: Inputs) -> Any:
    """All members' rows in one batch."""
    return _fold(delta, stack, inputs)


def call_trunk(delta: DeltaModel, stack: Params, inputs: Inputs) -> Any:
    """A fold whose modules before the first delta run once, with one member's rows."""
    return _fold(delta, stack, inputs, least=0.0)


def call_best_fold(delta: DeltaModel, stack: Params, inputs: Inputs) -> Any:
    """:func:`call_trunk` where all members see one batch and enough of the arithmetic is shared, else a fold."""
    if any(inputs.is_mapped):
        return _fold(delta, stack, inputs)
    return _fold(delta, stack, inputs, least=WORTH, otherwise_fold=True)


def _fold(
    delta: DeltaModel, stack: Params, inputs: Inputs, least: float | None = None, otherwise_fold: bool = False
) -> Any:
    """A fold, with a shared trunk of at least the share ``least`` of the arithmetic if that is given."""
    if inputs.b == 0:
        return call_loop(delta, stack, inputs)
    if inputs.n == 1:
        leaves, spec = _flatten(call_single(delta, take(stack, 0), *spare(inputs.member(0))))
        return pytree.tree_unflatten([t.unsqueeze(0) if isinstance(t, Tensor) else t for t in leaves], spec)
    args, kwargs = inputs.folded()
    layout = layout_for(delta, stack, args, kwargs, inputs.row_axis, inputs.n * inputs.b)
    lift, trunk = Folded(inputs.n, inputs.b), None
    if least is not None:
        trunk = _trunk(delta, stack, inputs, layout, args, kwargs, least)
        if otherwise_fold and (trunk.refused or trunk.share < least):
            trunk = None
        elif trunk.refused:
            raise FoldError(f'engine="trunk": {trunk.refused}')
    try:
        output = _folded_run(delta, stack, layout, args, kwargs, lift, trunk)
    except FoldError:
        if trunk is None or not otherwise_fold:
            raise
        output = _folded_run(delta, stack, layout, args, kwargs, lift)
    leaves, spec = _flatten(output)
    split = [
        members_of(leaf, dim, inputs.n, inputs.b) if isinstance(leaf, Tensor) else leaf
        for leaf, dim in zip(leaves, layout.outputs, strict=True)
    ]
    return pytree.tree_unflatten(split, spec)


def _trunk(
    delta: DeltaModel,
    stack: Params,
    inputs: Inputs,
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    least: float,
) -> Trunk:
    mapped = [name for name, mapped in zip(inputs.names, inputs.is_mapped, strict=True) if mapped]
    if mapped:
        return Trunk({}, 0.0, f'members share no work where each has its own {mapped[0]}. Use engine="fold".')
    return trunk_for(delta, stack, args, kwargs, inputs.row_axis, inputs.n * inputs.b, layout, least)


def route_rows(
    delta: DeltaModel,
    stack: Params,
    n: int,
    index: Index,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Row i of the batch with member ``index[i]`` of the stack; -1 runs the bare backbone."""
    index, present = read_index(index, n, next(iter(stack.values())).device)
    inputs = Inputs(delta.backbone, n, args, kwargs, None, delta.batch_dim)
    if index.shape[0] != inputs.b:
        raise ParamsError(f"index has {index.shape[0]} entries for a batch of {inputs.b} rows: give one member a row.")
    if inputs.b == 0:
        return call_single(delta, {name: leaf[0] for name, leaf in stack.items()}, args, kwargs)
    if inputs.b == 1 and present is None:
        return call_single(delta, {name: leaf[index[0]] for name, leaf in stack.items()}, args, kwargs)
    taken = pick_rows(stack, index)
    layout = layout_for(delta, taken, args, kwargs, inputs.row_axis, inputs.b)
    return _folded_run(delta, taken, layout, args, kwargs, Folded(inputs.b, 1, present))


def _folded_run(
    delta: DeltaModel,
    stack: Params,
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    lift: Folded,
    trunk: Trunk | None = None,
) -> Any:
    skeleton = delta.skeletons.get(delta.mode_flag)
    if trunk is not None:
        install(skeleton, trunk)
    call = Call(stack, lift=lift, layout=layout, runners=runners(delta, stack, layout), trunk=trunk)
    if needs_keeping(skeleton):
        if trunk is not None:
            raise FoldError(
                f'engine="trunk": {min(skeleton.recomputing) or "the backbone"} checkpoints its activations, and what '
                f'runs again there would not be shared. Use engine="fold".'
            )
        return kept_run(delta.skeletons.spare(delta.mode_flag), call, {}, args, kwargs)
    with attention_for_this_call():
        return skeleton.call_with(skeleton.module, {}, args, kwargs, call)


BY_NAME = {"fold": call_fold, "trunk": call_trunk, "vmap": call_vmap, "loop": call_loop}
"""The executors that ``engine=`` names."""
