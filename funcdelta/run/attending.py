"""What methods do at an attention site of a skeleton: they add keys and values for each row of the call, or wrap it.

Added keys have no position, so that the queries' own positions decide how they are seen: a row that is padded in front
needs the numbers that its text has alone. The module that takes the text gets them before its attention runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FoldError
from ..transforms import concrete
from .attention import Added, attend_with, attention_mark, by_head
from .bound import Bound
from .call import Call, Host, Params
from .counting import Counting
from .opened import act
from .padding import check_padding, checkable
from .positions import named, seen_length
from .text_model import is_causal, takes_text
from .wrapping import wrapped


def attention_of(skeleton: Host, path: str, attended: list[Bound], around: list[Bound]) -> Callable[..., Any]:
    """The attention function of the module at ``path``: its own, with what the methods do for the call under way.

    Keys that some add are seen by the model's own attention, and so by what others wrap, the last one outermost.
    """
    Numbered.below(skeleton, path, attended + around)

    def attention(original: Any, implementation: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = skeleton.under_way(path)
        if call.reached is not None:
            call.reached.add(attention_mark(path))
        acting = [bound for bound in attended if bound.key in call.params]
        wrapping = [bound for bound in around if bound.key in call.params]
        if not acting and not wrapping:
            return original(module, *args, **kwargs)

        def own(query: Tensor, key: Tensor, value: Tensor) -> Any:
            if not acting:
                return original(module, query, key, value, *args[3:], **kwargs)
            added = [_added(call, path, bound, module.training, query, key) for bound in acting]
            return attend_with(added, path, original, implementation, module, query, key, value, *args[3:], **kwargs)

        inner = own
        for bound in wrapping:
            inner = _with(call, path, bound, module, inner)
        return inner(*args[:3])

    return attention


def _with(call: Call, path: str, bound: Bound, module: nn.Module, attention: Callable[..., Any]) -> Callable[..., Any]:
    """``attention`` with one method around it."""
    return lambda *given: wrapped(call, path, bound, module, attention, given)


class Numbered:
    """The hook by which the module at ``path``, which takes the text, gets numbers of positions without padding.

    ``attended`` are the methods that act in it.
    """

    def __init__(self, skeleton: Host, path: str) -> None:
        self.skeleton, self.path = skeleton, path
        self.counting = Counting(skeleton, path)
        # What sees both ways is often read at its first position, which may be padding.
        self.settled = self.counting.settles and is_causal(self.counting.module)
        self.attended: list[Bound] = []
        self.checked = False

    @classmethod
    def below(cls, skeleton: Host, path: str, attended: list[Bound]) -> None:
        """Have the nearest module above the attention at ``path`` that takes the text numbered, if there is one."""
        above = path
        while above:
            above = above.rpartition(".")[0]
            module = skeleton.module.get_submodule(above)
            if takes_text(module):
                hooks = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
                known = next((owner for owner in hooks if isinstance(owner, cls)), None)
                if known is None:
                    known = cls(skeleton, above)
                    known.counting.open()
                    module.register_forward_pre_hook(known.enter, with_kwargs=True)
                known.attended += attended
                return

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the numbers of the positions, or make sure that the module needs none."""
        call = self.skeleton.under_way(self.path)
        if not any(bound.key in call.params for bound in self.attended):
            return None
        given = named(self.counting.inputs, args, kwargs, self.path)
        text = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        mask = self.counting.mask(call, given)
        lead = self.counting.lead(mask)
        if lead is None or not isinstance(text, Tensor):
            return None
        seen = seen_length(given)
        numbers = self.counting.numbers(call, given, lead, seen, text.shape[1])
        if not (self.settled or seen or self.checked) and checkable(self.skeleton, call, lead):
            self._check(call, {**given, **numbers}, lead, tuple(numbers))
        return ((), {**given, **numbers}) if numbers else None

    def _check(self, call: Call, given: dict[str, Any], lead: Tensor, made: tuple[str, ...]) -> None:
        """Compare a padded row with itself alone, heads and all, where numbers of positions do not settle it."""
        acting = [bound.attachment for bound in self.attended if bound.key in call.params]
        keys = [key for attachment in acting for key in attachment.leaves.values()]
        params = {key: call.params[key] for key in keys}
        params = {key: concrete(leaf if call.lift is None else leaf[0]) for key, leaf in params.items()}
        module, asked = self.counting.module, self.counting.asked(call)
        if asked is not None and self.counting.caller is not None and asked.get("attention_mask") is not None:
            module, given, made = self.counting.caller, asked, ()
        what = f"{acting[0].name} at {self.path or type(module).__name__}"
        self.checked, found = True, False  # it is entered again while it is compared
        try:
            found = check_padding(self.skeleton, module, given, lead, lambda n: slice(0, n), params, what, made)
        finally:
            self.checked = found


def _added(call: Call, path: str, bound: Bound, training: bool, query: Tensor, key: Tensor) -> Added:
    """What one method adds at an attention site, for every row of this call."""
    attachment = bound.attachment
    shape, rows = attachment.site.attention, query.shape[0]
    # One number a row: enough to tell which rows are whose.
    slot, p = key.new_zeros(()).expand(rows, 1, 1), bound.leaves(call.params)
    if call.watch is not None and call.lift is not None and call.watch.axis(path, query) != 0:
        raise FoldError(f"{path} attends with rows that are not on the first axis")
    both, _ = act(call, path, bound, training, (slot,), (0,))
    acts = bound.acts[training]
    visible, present = None, acts.present
    if (present is not None and present(p) is not None) or (call.lift is not None and call.lift.present is not None):

        def seen(p: Params, slot: Tensor) -> Tensor:
            shown = present(p) if present is not None else None
            return torch.ones_like(slot) if shown is None else torch.zeros_like(slot) + shown

        visible = seen(p, slot) if call.lift is None else call.lift(seen, p, (slot,), (0,), path)[0]
        visible = visible.flatten() > 0
    keys, values = both.split([shape.key_width, shape.value_width], -1)
    return Added(by_head(keys, shape.heads), by_head(values, shape.heads), visible, acts.widen_bias)
