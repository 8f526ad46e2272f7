"""Left padding: the numbers that a padded row's positions have in its text alone, for models that count from 0.

A collator gives a mask and no ``position_ids``, and most models then number the padding too. A bare model with
relative positions does not mind. Beside a prompt or a prefix it would: ``x' = [p; 0; text]`` is as far from its text
as there is padding. So what acts in front gives the numbers that the mask implies, where the model takes them and
does not count that way itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..transforms import is_wrapped
from .call import Call, Host
from .positions import counted, leading, named
from .text_model import caller_of, counts_from_mask, input_embedding, inputs_of, only_attends, padding_position

CALLERS = "callers"
"""Where a call keeps what was given to the outermost model around a module that takes the text."""


class Counting:
    """How the module at ``path`` of a skeleton numbers its positions, and what its caller said of them.

    Attributes:
        inputs: names of the module's inputs.
        takes: whether it takes the numbers of positions.
        itself: whether it counts what the mask shows, without being told.
        settles: whether the numbers of positions and the mask settle how a row is computed, padded or not.
    """

    def __init__(self, skeleton: Host, path: str) -> None:
        self.skeleton, self.path = skeleton, path
        self.module = skeleton.module.get_submodule(path)
        self.inputs = inputs_of(self.module)
        self.takes = "position_ids" in self.inputs
        self.itself = counts_from_mask(self.module)
        self.settles = self.takes and only_attends(self.module)
        embedding = input_embedding(self.module)
        self.padding = None if embedding is None else padding_position(self.module, embedding)
        self.caller: nn.Module | None = caller_of(skeleton.module, path)
        self._names = () if self.caller is None else inputs_of(self.caller)

    def open(self) -> None:
        """Register what notes the caller's own inputs."""
        if self.caller is not None:
            self.caller.register_forward_pre_hook(self._begin, with_kwargs=True)
            self.caller.register_forward_hook(self._end)

    def asked(self, call: Call) -> dict[str, Any] | None:
        """What was given to the outermost model of the call; ``None`` where this module is called directly."""
        return call.note(CALLERS).get(self.path)

    def mask(self, call: Call, given: dict[str, Any]) -> Tensor | None:
        """The mask of the tokens, (b, s), the caller's own where the module gets one made from it."""
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = (self.asked(call) or {}).get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def lead(self, mask: Tensor | None) -> Tensor | None:
        """How many positions are hidden in front of each row; ``None`` without a mask.

        Whether any are is not asked: a fold and a trunk are learned from one call and take the same way in the next.
        """
        return None if mask is None or mask.shape[1] == 0 else leading(mask)

    def numbers(
        self, call: Call, given: dict[str, Any], lead: Tensor | None, start: int, length: int
    ) -> dict[str, Tensor]:
        """Numbers for the positions from ``start`` on, where the module takes them and nobody gave others."""
        if lead is None or not self.takes:
            return {}
        at, asked = given.get("position_ids"), self.asked(call)
        if at is None:
            if self.itself or (self.padding is not None and given.get("input_ids") is not None):
                return {}
            first, hidden = (0, 0) if self.padding is None else (self.padding + 1, self.padding)
            return {"position_ids": counted(lead, start, length, first, hidden)}
        if asked is None or asked.get("position_ids") is not None or at.ndim != 2:
            return {}
        # A model around this one numbered the positions, and the padding too if the last number is that high.
        padded = at[:, -1:] >= start + length - 1
        return {"position_ids": (at - torch.where(padded, lead.unsqueeze(1), 0)).clamp(min=0)}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self.skeleton.under_way(self.path)
        call.note(CALLERS)[self.path] = named(self._names, args, kwargs, self.path)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.skeleton.under_way(self.path).note(CALLERS).pop(self.path, None)


def readable(call: Call, tensor: Any) -> bool:
    """Whether this is a tensor whose numbers Python may read: not while it is traced, mapped or followed.

    >>> from funcdelta.run.call import Call
    >>> readable(Call({}), torch.ones(2)), readable(Call({}), torch.ones(2, device="meta"))
    (True, False)
    """
    if torch.compiler.is_compiling() or call.watch is not None:
        return False
    return type(tensor) is Tensor and not is_wrapped(tensor) and tensor.device.type != "meta"
