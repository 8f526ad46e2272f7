"""Checks that a row padded in front gets what it gets without padding, for models where that is uncertain.

With the right position numbers most models agree. But a model may also number positions itself, add a bias for each
distance, attend to a window, or read the first position of every row. Such a model is run on one row of the call, with
its padding and without. If the outputs for the text differ, the call is refused.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParamsError
from ..structures.modules.structure import named_tensors
from ..transforms import concrete, is_wrapped, outside_transforms
from .call import Call, Host, Params
from .containers import flatten
from .layout import close
from .positions import CACHES

NOT_FOR_CHECKS = (*CACHES, "labels")


def check_padding(
    skeleton: Host,
    module: nn.Module,
    given: Mapping[str, Any],
    lead: Tensor,
    hidden: Callable[[int], slice],
    params: Params,
    what: str,
    made: tuple[str, ...] = (),
) -> bool:
    """Compare the row of ``given`` with most padding to itself without padding; False if no row is padded in front.

    Args:
        given: the inputs of ``module``, by name.
        lead: how much padding each row has.
        hidden: a function of an amount of padding that returns the positions it takes.
        params: those of the member that acts in both runs.
        what: the delta and the module's path, for the message.
        made: names of inputs that the library added, which the row without padding does not get.

    Raises :class:`ParamsError` if the two differ by more than rounding.
    """
    with outside_transforms(), torch.no_grad():
        leads = concrete(lead)
        row = int(leads.argmax())
        padding = int(leads[row])
        if padding == 0:
            return False
        wrapped = {name: concrete(t) for name, t in named_tensors(skeleton.module) if is_wrapped(t)}
        padded = one_row(given, row, len(leads))
        length = padded["attention_mask"].shape[1]
        kept = torch.ones(length, dtype=torch.bool)
        kept[hidden(padding)] = False
        alone = {name: _kept(name, value, kept) for name, value in padded.items() if name not in made}
        with skeleton.swapped(wrapped):
            try:
                found, expected = (run_alone(skeleton, module, one, Call(params)) for one in (padded, alone))
            except Exception as error:  # one row without its padding may be an input that the model does not take
                said = (str(error).splitlines() or [type(error).__name__])[0]
                problem = f"it cannot be checked whether that changes the outputs for the text ({said})"
                raise ParamsError(_refusal(what, problem)) from error
    for place, tensor in found.items():
        cut = _kept(place, tensor, kept)
        if place in expected and cut.shape == expected[place].shape and not close(cut, expected[place]):
            gap = float((cut - expected[place]).abs().max())
            named = place or "the output"
            problem = f"for the text of such a row {named} differs by {gap:.2g} from what it is without padding"
            raise ParamsError(_refusal(what, problem))
    return True


def checkable(skeleton: Host, call: Call, lead: Tensor) -> bool:
    """Whether the module can run once more beside the call: not if it is compiled, probed, sharded or on meta."""
    if torch.compiler.is_compiling() or call.watch is not None or skeleton.units:
        return False
    plain = concrete(lead)
    return type(plain) is Tensor and plain.device.type != "meta"


def _refusal(what: str, problem: str) -> str:
    return (
        f"{what}: some rows of this call are padded in front, and {problem}. The module seems to derive positions from "
        f"more than its mask and position_ids. Pad behind the text "
        f'(tokenizer.padding_side = "right"), or call it with rows of one length.'
    )


def one_row(given: Mapping[str, Any], row: int, rows: int) -> dict[str, Any]:
    """The inputs of one of ``rows`` rows, without caches, which it would fill.

    >>> one_row({"input_ids": torch.tensor([[5], [6]]), "use_cache": True}, 1, 2)
    {'input_ids': tensor([[6]]), 'use_cache': False}
    """
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in NOT_FOR_CHECKS:
            continue
        if isinstance(value, Tensor):
            value = concrete(value)
            axis = -2 if name == "position_ids" else 0
            if value.ndim > 1 and value.shape[axis] > 1:
                value = value.narrow(axis, row if value.shape[axis] == rows else 0, 1)
        found[name] = value
    return found | ({"use_cache": False} if "use_cache" in given else {})


def _kept(name: str, value: Any, kept: Tensor) -> Any:
    """The entries at the positions that are kept, if ``value`` has one per position; else ``value``."""
    if not isinstance(value, Tensor) or value.ndim < 2 or name.startswith("encoder_"):
        return value
    axis = value.ndim - 1 if name == "position_ids" else 1
    return (
        value if value.shape[axis] != len(kept) else value.index_select(axis, kept.nonzero().flatten().to(value.device))
    )


def run_alone(skeleton: Host, module: nn.Module, inputs: dict[str, Any], call: Call) -> dict[str, Tensor]:
    """The tensors that the module gives in evaluation mode, by name, in a ``call`` beside the one under way.

    >>> from .skeleton import Skeleton
    >>> skeleton = Skeleton(nn.Linear(2, 3), None, False, None)
    >>> run_alone(skeleton, skeleton.module, {"input": torch.zeros(1, 2)}, Call({}))[""].shape
    torch.Size([1, 3])
    """
    before, training = skeleton.call, [part for part in module.modules() if part.training]
    skeleton.call = call
    for part in training:
        part.training = False
    try:
        # In an empty context: Transformers would add this run's hidden states to those that the caller asked for.
        output = contextvars.Context().run(lambda: module(**inputs))
    finally:
        skeleton.call = before
        for part in training:
            part.training = True
    leaves, tree = flatten(output)
    return {place: leaf for place, leaf in zip(tree.places(), leaves, strict=True) if isinstance(leaf, Tensor)}
