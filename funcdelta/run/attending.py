"""What methods add at an attention site of a skeleton: a member's keys and values, for each row of the call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import FoldError
from .attention import Added, attend_with, attention_mark, by_head
from .bound import Bound
from .call import Call, Params
from .opened import act

if TYPE_CHECKING:
    from .skeleton import Skeleton


def attention_of(skeleton: Skeleton, path: str, attended: list[Bound]) -> Callable[..., Any]:
    """The attention function of the module at ``path``: its own, with what the methods add for the call under way."""

    def attention(original: Any, implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = skeleton.under_way(path)
        if call.reached is not None:
            call.reached.add(attention_mark(path))
        acting = [bound for bound in attended if bound[0].among(call.params)]
        if not acting:
            return original(module, *args, **kwargs)
        added = [_added(call, path, bound, module.training, args[0], args[1]) for bound in acting]
        return attend_with(added, path, original, implementation, module, *args, **kwargs)

    return attention


def _added(call: Call, path: str, bound: Bound, training: bool, query: Tensor, key: Tensor) -> Added:
    """What one method adds at an attention site, for every row of this call."""
    attachment, function = bound
    shape, rows = attachment.site.attention, query.shape[0]
    # One number a row: enough to tell which rows are whose.
    slot, p = key.new_zeros(()).expand(rows, 1, 1), attachment.of(call.params)
    if call.watch is not None and call.lift is not None and call.watch.axis(path, query) != 0:
        raise FoldError(f"{path} attends with rows that are not on the first axis")
    both, _ = act(call, path, function[training], p, (slot,), (0,))
    visible, present = None, attachment.config.present
    if present(p) is not None or (call.lift is not None and call.lift.present is not None):

        def seen(p: Params, slot: Tensor) -> Tensor:
            shown = present(p)
            return torch.ones_like(slot) if shown is None else torch.zeros_like(slot) + shown

        visible = seen(p, slot) if call.lift is None else call.lift(seen, p, (slot,), (0,), path)[0]
        visible = visible.flatten() > 0
    keys, values = both.split([shape.key_width, shape.value_width], -1)
    widen = functools.partial(attachment.config.widen_bias, attachment.at(training))
    return Added(by_head(keys, shape.heads), by_head(values, shape.heads), visible, widen)
