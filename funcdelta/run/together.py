"""One folded run of the model: rows of several members share the batch."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import FoldError
from ..functional.attention import attention_for_this_call, wanted
from ..transforms import current_transform
from .call import Call, Params
from .checkpointing import kept_run, needs_keeping
from .fold import Folded
from .layout import Layout
from .old_functions import named_functions
from .program import Program
from .trunk import TRUNK, Trunk, install


def folded_run(
    program: Program,
    stack: Params,
    layout: Layout,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    lift: Folded,
    reached: set[str] | None = None,
    trunk: Trunk | None = None,
) -> Any:
    """The model's output for a batch with rows of several members, lifted by ``lift`` at every site."""
    skeleton = program.skeletons.get(program.training)
    if trunk is not None:
        install(skeleton, trunk)
    call = Call(stack, lift=lift, layout=layout, runs=layout.runs, reached=reached)
    if not torch.compiler.is_compiling():
        for path in layout.runs:
            skeleton.open(path)
    if trunk is not None:
        call.notes[TRUNK] = trunk
    if skeleton.recomputing and needs_keeping(skeleton):
        if trunk is not None:
            raise FoldError(
                f'engine="trunk": {min(skeleton.recomputing) or "the backbone"} checkpoints its activations, and a '
                f'recomputation would not be shared by the members. Use engine="fold".'
            )
        kept = program.skeletons.spare(program.training)
        for path in layout.runs:
            kept.open(path)
        return kept_run(kept, call, {}, args, kwargs)
    if not torch.compiler.is_compiling() and current_transform() is None and not wanted.yes:
        call.plain = reached is None and not layout.runs and trunk is None and not layout.unused
        return skeleton.run("", {}, args, kwargs, call)
    with attention_for_this_call(), named_functions():
        return skeleton.run("", {}, args, kwargs, call)
