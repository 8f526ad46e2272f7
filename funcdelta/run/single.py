"""The call of one member, and what is said of sites that it does not reach."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from ..errors import MatchError, UnreachedWarning
from ..functional.attention import attention_for_this_call, wanted
from ..transforms import current_transform
from .attention import attention_mark
from .call import Call, Params, read_mark
from .checkpointing import kept_run, named_refusal, needs_keeping
from .conditions import GIVEN
from .fsdp import check_kept, check_ran
from .layout import Run
from .lookups import padded_lookups
from .old_functions import named_functions
from .outputs import LAZY, refuse_lazy
from .program import Program


def call_single(
    program: Program, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], reached: set[str] | None = None
) -> Any:
    """The backbone's output with one member's delta; the paths of sites that the call reaches go into ``reached``."""
    skeleton = program.skeletons.get(program.training, hooked=bool(params))
    if not params and GIVEN in kwargs and program.plan.conditions:  # of rows that are the bare backbone's
        kwargs = {name: value for name, value in kwargs.items() if name != GIVEN}
    call = Call(params, reached=reached)
    simple = not (torch.compiler.is_compiling() or skeleton.recomputing or skeleton.units)
    if simple and current_transform() is None and not wanted.yes:
        # What takes the place of a tensor that a method reads is looked for with care.
        call.plain = reached is None and (not skeleton.reads or skeleton.reads.isdisjoint(params))
        output = skeleton.run("", params, args, kwargs, call)
        if type(output) in LAZY:
            refuse_lazy(output)
        return output
    if params and needs_keeping(skeleton):
        skeleton = program.skeletons.spare(program.training)
        overrides = skeleton.overrides(params)
        check_kept(skeleton.units, overrides)
        return kept_run(skeleton, call, overrides, args, kwargs)
    if skeleton.units:
        call.runs = {path: Run(keys) for path, keys in program.plan.outermost(params).items()}
    with attention_for_this_call(), named_functions(), named_refusal(skeleton), padded_lookups(skeleton.pads):
        try:
            output = skeleton.run("", params, args, kwargs, call)
        except RuntimeError as error:
            if skeleton.memory.writes_buffers or "mutate a captured Tensor" not in str(error):
                raise
            # Only now is it known that the model writes its buffers, which transforms forbid: run again with copies.
            skeleton.memory.writes_buffers = True
            call = Call(params, reached=reached, runs=call.runs)
            output = skeleton.run("", params, args, kwargs, call)
    check_ran(call.runs, call.notes.get("ran", set()))
    return output


def tell_missed(program: Program, given: Iterable[str], reached: set[str]) -> None:
    """Warn, after the first call with the leaves ``given`` in this mode, of sites that it did not pass through.

    Only a warning, because such sites may be right: layers that are skipped at random, experts without tokens, a batch
    without images. Later calls are not affected.

    Raises :class:`MatchError` if a method acts on the hidden values of a module that was not called but whose tensors
    were read: the layer is computed elsewhere, without the delta.
    """
    given = frozenset(given)
    missed = missed_sites(program.plan, given, reached)
    for path in missed:
        if read_mark(path) in reached:
            raise MatchError(
                f"A module above {path} reads its tensors without calling it, and the delta there acts only on hidden "
                f"values, so it would do nothing. Name the module above, {path.rpartition('.')[0] or 'the model'!r}."
            )
    program.verified.add((program.training, given))
    if missed and missed[0] not in program.warned:
        program.warned.add(missed[0])
        more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        warnings.warn(
            f"This call did not pass through {missed[0]}{more} of {len(program.plan.attachments)} sites, so the delta "
            f"adds nothing there in this call. That is right for experts without tokens, layers skipped at random or a "
            f"batch without images. If a site never runs, name another module, or leave it out: "
            f'exclude_modules=["{missed[0]}"].',
            UnreachedWarning,
            stacklevel=4,
        )


def missed_sites(plan: Any, params: Iterable[str], reached: set[str]) -> list[str]:
    """The sites of ``params`` that no hidden value passed through, or whose attention was not called."""
    return [
        path
        for path, attachments in plan.attachments.items()
        if any(
            a.among(params)
            and ((a.by_values and path not in reached) or (a.in_attention and attention_mark(path) not in reached))
            for a in attachments
        )
    ]
