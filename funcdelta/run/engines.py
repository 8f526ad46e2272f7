"""Engines: how many members run. ``loop`` calls them in turn, ``vmap`` maps them, ``fold`` puts them into the batch.

*Fold outside, vmap inside*: members are folded into the batch axis, (n, b, …) → (n·b, …), so the backbone runs its
normal fast path once; only at a site is the hidden value split again, and the method's function mapped over members.
``trunk`` is a fold in which what comes before the first delta runs once, where all members see one batch. All give the
same numbers, or say why they cannot.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..errors import EngineError, FoldError
from ..transforms import current_transform, inside_transform
from ..trees.opaque import PLAIN, spare
from ..trees.stack import take
from .call import TENSOR, Params
from .first_time import with_layout
from .fold import Folded, members_of
from .inputs import Inputs
from .layout import Layout, LayoutMismatchError
from .layouts import key_of, layout_of, wants_gradients
from .mapped import Mapped, refuse_unmapped
from .outputs import apart, check_visible, flatten, of_each, stack_members
from .program import Program
from .single import call_single
from .together import folded_run
from .trunk import WORTH, Trunk
from .trunk_probe import trunk_for
from .undisturbed import undisturbed


def call_loop(program: Program, stack: Params, inputs: Inputs, reached: set[str] | None = None) -> Any:
    """Members in turn, outputs stacked."""
    outputs = []
    eager = not torch.compiler.is_compiling() and current_transform() is None
    storages = program.skeletons.get(program.training).memory.storages() if eager else frozenset()
    for i in range(inputs.n):
        # What one member's call writes into its inputs is not for the next.
        args, kwargs = spare(inputs.private().member(i))
        output = call_single(program, take(stack, i), args, kwargs, reached)
        outputs.append(apart(output, storages) if storages else output)
    return stack_members(outputs)


def call_vmap(program: Program, stack: Params, inputs: Inputs, reached: set[str] | None = None) -> Any:
    """Members mapped by ``torch.vmap``; work before the first site is shared where inputs are."""
    found: list[Any] = []
    hooked = None if torch.compiler.is_compiling() else program.skeletons.traced(program.training).hooked_backward
    if hooked is not None:
        raise EngineError(
            f"{hooked or 'The model'} has a hook of the backward pass, which torch.vmap leaves out. Use "
            f'engine="auto" or "loop".'
        )

    def member(p: Params, mapped: list[Tensor]) -> tuple[Tensor, ...]:
        output = call_single(program, p, *spare(inputs.fill_mapped(mapped)), reached)
        leaves, rebuild = visible(output)
        found[:] = [rebuild, [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    # Looked at once for inputs of a kind: it costs time in each operation.
    key = None if torch.compiler.is_compiling() else ("vmap", key_of(program, stack, inputs))
    known = key is None or key in program.checked
    if not known:
        refuse_unmapped(program.skeletons.reach, torch.is_grad_enabled() and wants_gradients(stack, inputs))
    try:
        with contextlib.nullcontext() if known else Mapped():
            results = iter(torch.vmap(member, in_dims=(0, 0), randomness="different")(stack, inputs.mapped()))
    except EngineError:
        raise
    except RuntimeError as error:
        reason = known_vmap_limit(str(error))
        if reason is None:
            if torch.compiler.is_compiling() or inside_transform() or not _runs_alone(program, stack, inputs):
                raise
            reason = f"torch.vmap cannot map this model ({str(error).splitlines()[0][:160]})"
        raise EngineError(f'{reason}. Use engine="auto" or "loop".') from error
    if not known:
        program.checked[key] = True
    rebuild, others = found
    return rebuild([next(results) if other is TENSOR else of_each(other, inputs.n) for other in others])


def _runs_alone(program: Program, stack: Params, inputs: Inputs) -> bool:
    """Whether the first member runs by itself, so that what failed is the map and not the model."""
    try:
        with undisturbed():
            call_single(program, take(stack, 0), *spare(inputs.member(0)))
    except Exception:  # the error of the map is the one to tell
        return False
    return True


def visible(output: Any) -> tuple[list[Any], Any]:
    """The leaves of an output of many members, none of which may hide tensors, and what puts others in their place."""
    leaves, tree = flatten(output)
    if not torch.compiler.is_compiling():
        hiding = [leaf for leaf in leaves if not isinstance(leaf, PLAIN)]
        if hiding:
            check_visible(leaves, tree.places())
    return leaves, tree


def known_vmap_limit(message: str) -> str | None:
    """What torch's message means, for the limits of ``torch.vmap`` that another engine does not have.

    >>> known_vmap_limit("Batching rule not implemented for aten::foo")
    'torch.vmap cannot map this model (Batching rule not implemented for aten::foo)'
    """
    if "data-dependent control flow" in message:
        return "torch.vmap cannot map this model over inputs whose values steer Python code (a mapped attention_mask)"
    if "Batching rule not implemented" in message or "could not generate a fallback" in message:
        return f"torch.vmap cannot map this model ({message.splitlines()[0][:120]})"
    if "It looks like you're calling .item()" in message:
        return "torch.vmap cannot map this model: it reads values of tensors in Python"
    if "setup_context" in message or "autograd.Function" in message:
        return "torch.vmap cannot map this model: it has an autograd.Function without a batching rule"
    if "storage" in message or "numpy" in message or "tolist" in message:
        return "torch.vmap cannot map this model: it hands the numbers of tensors to Python or numpy"
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    if autocast and ("same dtype" in message or "scalar type" in message):
        return "torch.vmap leaves layers with mapped weights out of autocast, so dtypes do not meet"
    if message.startswith("vmap") or "vmap" in message.split(":")[0]:
        return f"torch.vmap cannot map this model ({message.splitlines()[0][:160]})"
    return None


def call_fold(program: Program, stack: Params, inputs: Inputs, reached: set[str] | None = None) -> Any:
    """All members' rows in one batch."""
    return _fold(program, stack, inputs, reached)


def call_trunk(program: Program, stack: Params, inputs: Inputs, reached: set[str] | None = None) -> Any:
    """A fold whose modules before the first delta run once, with one member's rows."""
    return _fold(program, stack, inputs, reached, least=0.0)


def call_best_fold(program: Program, stack: Params, inputs: Inputs, reached: set[str] | None = None) -> Any:
    """:func:`call_trunk` where all members see one batch and enough of the arithmetic is shared, else a fold."""
    if any(inputs.is_mapped):
        return _fold(program, stack, inputs, reached)
    return _fold(program, stack, inputs, reached, least=WORTH, otherwise_fold=True)


def _fold(
    program: Program,
    stack: Params,
    inputs: Inputs,
    reached: set[str] | None,
    least: float | None = None,
    otherwise_fold: bool = False,
) -> Any:
    """A fold, with a shared trunk of at least the share ``least`` of the arithmetic if that is given."""
    n, b = inputs.n, inputs.b
    if b == 0:
        return call_loop(program, stack, inputs, reached)
    if n == 1:
        return stack_members([call_single(program, take(stack, 0), *spare(inputs.member(0)), reached)])
    args, kwargs = inputs.folded()
    layout = layout_of(program, stack, inputs)
    lift, trunk = Folded(n, b), None
    if least is not None:
        trunk = _trunk(program, stack, inputs, layout, args, kwargs, least)
        if otherwise_fold and (trunk.refused or trunk.share < least):
            trunk = None
        elif trunk.refused:
            raise FoldError(f'engine="trunk": {trunk.refused}')

    def run(layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return folded_run(program, stack, layout, args, kwargs, lift, reached, trunk)
        except LayoutMismatchError:
            raise
        except FoldError:
            if trunk is None or not otherwise_fold:
                raise
            return folded_run(program, stack, layout, args, kwargs, lift, reached)

    def split(output: Any, layout: Layout) -> Any:
        leaves, rebuild = visible(output)
        if len(leaves) != len(layout.outputs):
            raise LayoutMismatchError(f"The output has {len(leaves)} leaves, but {len(layout.outputs)} before.")
        named = zip(leaves, layout.outputs, layout.names, strict=True)
        return rebuild(
            [
                members_of(leaf, dim, n, b, name) if isinstance(leaf, Tensor) else of_each(leaf, n)
                for leaf, dim, name in named
            ]
        )

    return with_layout(
        program, stack, inputs, layout, (args, kwargs), lambda layout, *given: split(run(layout, *given), layout)
    )


def _trunk(
    program: Program,
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
    if program.writes_inputs:
        return Trunk({}, 0.0, 'this model writes into its inputs. Use engine="fold".')
    if layout.runs and any(run.how == "loop" for run in layout.runs.values()):
        return Trunk({}, 0.0, 'modules of this model run once per member. Use engine="fold".')
    return trunk_for(program, stack, inputs, layout, least)


BY_NAME = {"fold": call_fold, "trunk": call_trunk, "vmap": call_vmap, "loop": call_loop}
"""The engines that ``engine=`` names."""
