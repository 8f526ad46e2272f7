"""One member: the backbone's own output with a delta in it."""

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
from .fsdp import check_kept, check_ran
from .layout import Run
from .lookups import padded_lookups
from .old_functions import named_functions
from .outputs import LAZY, refuse_lazy
from .program import Program


def call_single(
    program: Program, params: Params, args: tuple[Any, ...], kwargs: dict[str, Any], reached: set[str] | None = None
) -> Any:
    """The output for one member; ``reached`` collects the sites that the call passes through."""
    skeleton = program.skeletons.get(program.training, hooked=bool(params))
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
            skeleton.memory.writes_buffers = True
            call = Call(params, reached=reached, runs=call.runs)
            output = skeleton.run("", params, args, kwargs, call)
    check_ran(call.runs, call.notes.get("ran", set()))
    return output


def tell_missed(program: Program, given: Iterable[str], reached: set[str]) -> None:
    """After the first call with the leaves ``given`` in this mode: a warning that names sites not passed through.

    What is not reached adds nothing to that call, and nothing changes how later calls compute: layers may be skipped
    at random, experts may get no tokens, a batch may have no images.

    Raises :class:`MatchError` where a method acts on the hidden values of a module that is never called although its
    tensors are read: what it should change happens elsewhere.
    """
    given = frozenset(given)
    missed = missed_sites(program.plan, given, reached)
    for path in missed:
        if read_mark(path) in reached:
            raise MatchError(
                f"{path} is read by a module above it and not called, and the delta there acts on hidden values alone, "
                f"so it would do nothing. Name the module above, {path.rpartition('.')[0] or 'the model'!r}."
            )
    program.verified.add((program.training, given))
    if missed and missed[0] not in program.warned:
        program.warned.add(missed[0])
        more = f" and {len(missed) - 1} more" if len(missed) > 1 else ""
        warnings.warn(
            f"This call did not pass through {missed[0]}{more} of {len(program.plan.attachments)} sites, so the delta "
            f"adds nothing there in this call. That is right for experts without tokens, layers skipped at random or a "
            f"batch without images. Where a site never runs, name another module, or leave it out: "
            f'exclude_modules=["{missed[0]}"].',
            UnreachedWarning,
            stacklevel=4,
        )


def missed_sites(plan: Any, params: Iterable[str], reached: set[str]) -> list[str]:
    """The sites of ``params`` whose hidden values nothing passed through, or whose attention was not called."""
    return [
        path
        for path, attachments in plan.attachments.items()
        if any(
            a.among(params)
            and ((a.by_values and path not in reached) or (a.in_attention and attention_mark(path) not in reached))
            for a in attachments
        )
    ]
