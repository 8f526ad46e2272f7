"""Conditions of a call: what a method's functions get beside leaves and hidden values, ``p["call.mask"]`` and the like.

What tells of the texts is noted where a text model is entered, once a call; the caller's own come as the input
``conditions`` and are taken out before the model sees them. At a site they follow the hidden values, as further values
of the member's function: axis 0 counts rows there too, so that a fold splits them by member as it does the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FoldError, MatchError, ParamsError
from ..match import near
from ..plan.plan import Plan
from ..transforms import innermost, is_wrapped
from .bound import Bound
from .call import Call, Host
from .counting import Counting
from .forward import accepts
from .positions import named
from .text_model import encoder_path
from .texts import A_TOKEN, OF_TEXTS, Text, read_text, text_model_of

GIVEN = "conditions"
"""The input by which a caller gives conditions."""

CONDITIONS = "conditions of the call"
"""Where a call keeps what it tells (:class:`Told`)."""

Values = tuple[Tensor, ...]
Dims = tuple[int | None, ...]


class Told:
    """What one call tells: what the caller gave, and what each text model was given, by its path.

    Attributes:
        refusals: why nothing is known of the text at a site, by the site's path; ``of``: its text model else.
    """

    def __init__(self, of: Mapping[str, str], refusals: Mapping[str, str]) -> None:
        self.of, self.refusals = of, refusals
        self.given: Mapping[str, Tensor] = {}
        self.texts: dict[str, Text] = {}

    def reads_text(self, site: str) -> bool:
        """Whether the text at a site is known, with the mask that the caller gave for it."""
        text = self.texts.get(self.of.get(site, ""))
        return site in self.of and text is not None and not text.refused

    def of_text(self, call: Call, name: str, site: str) -> Text:
        """The text at a site, of which the condition ``name`` is wanted."""
        why = self.refusals.get(site)
        at = self.of.get(site, "")
        text = self.texts.get(at)
        if why is None and text is None:
            why = f"{at or 'the model'}, which takes the text, was not called"
        if why is None and text is not None and text.refused:
            why = f"{text.refused} (in {at or 'the model'})"
        if why is None and call.ended and call.visits.get(_visits(at), 0) > 1:
            why = f"{site} runs again for a backward pass, and {at or 'the model'} was called several times"
        if why is not None or text is None:
            raise MatchError(_unknown(name, site, why or "nothing tells of it"))
        return text


class Conditions:
    """The hooks by which a skeleton's calls tell what the methods of ``plan`` want to know.

    >>> delta = fd.DeltaModel(nn.Sequential(nn.Linear(2, 2)), fd.LoraConfig(modified_modules=["0"]))
    >>> delta.plan.conditions, delta.program.skeletons.get(False).conditions is None
    ((), True)
    """

    def __init__(self, skeleton: Host, plan: Plan) -> None:
        self.skeleton = skeleton
        self.of: dict[str, str] = {}
        self.refusals: dict[str, str] = {}
        root = skeleton.module
        if accepts(root, GIVEN):
            raise MatchError(
                f"{type(root).__name__}.forward takes an input called {GIVEN} itself, by which calls would tell the "
                f"methods their conditions: wrap the model in a module whose forward calls it by another name."
            )
        for attachment in plan.all():
            path = attachment.site.exit or attachment.site.path
            if any(name in OF_TEXTS for name in attachment.acts().conditions):
                try:
                    self.of[path] = text_model_of(root, path)
                except MatchError as error:
                    self.refusals[path] = str(error)
        encoder = encoder_path(root)  # which generate calls by itself
        self.entries = frozenset({"", *self.of.values(), *([] if encoder is None else [encoder])})
        """The modules that may be given ``conditions``."""
        self.wanted = plan.conditions
        for path in dict.fromkeys(self.of.values()):
            counting = Counting(skeleton, path)
            counting.open()
            hook = _Reading(self, counting)
            counting.module.register_forward_pre_hook(hook, with_kwargs=True)
        for path in self.entries:
            root.get_submodule(path).register_forward_pre_hook(_Taking(self, path), prepend=True, with_kwargs=True)

    def told(self, call: Call) -> Told:
        """What the call under way tells so far."""
        return call.note(CONDITIONS, lambda: Told(self.of, self.refusals))


class _Taking:
    """A hook that takes the caller's conditions out of a module's inputs, before any other sees these."""

    def __init__(self, conditions: Conditions, path: str) -> None:
        self.conditions, self.path = conditions, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        told = self.conditions.told(self.conditions.skeleton.under_way(self.path))
        if GIVEN not in kwargs:
            return None
        told.given = kwargs[GIVEN] or {}
        check_given(self.conditions.wanted, told.given)
        return args, {name: value for name, value in kwargs.items() if name != GIVEN}


class _Reading:
    """A hook that notes what a text model is given, after prompts have made it longer."""

    def __init__(self, conditions: Conditions, counting: Counting) -> None:
        self.conditions, self.counting = conditions, counting

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counting = self.counting
        call = self.conditions.skeleton.under_way(counting.path)
        call.visit(_visits(counting.path))
        told = self.conditions.told(call)
        given, asked = named(counting.inputs, args, kwargs, counting.path), counting.asked(call)
        mask = given.get("attention_mask")
        if asked is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = asked.get("attention_mask")
        # A model around this one numbers the padding, too, where its own caller says nothing.
        numbered = asked is None or asked.get("position_ids") is not None
        by_hand = given.get("position_ids") if numbered else None
        first = 0 if counting.padding is None else counting.padding + 1
        with contextlib.nullcontext() if call.watch is None else call.watch.paused():
            told.texts[counting.path] = read_text(given, told.given.get("mask", mask), by_hand, first)


def _visits(path: str) -> str:
    return f"{path} (text)"


def _unknown(name: str, site: str, why: str) -> str:
    return (
        f"{site} wants the condition {name} of the call, which is not known there: {why}. Leave the site out, "
        f'exclude_modules=["{site}"], or say it: conditions={{"{name}": ...}}.'
    )


def told(call: Call, path: str, bound: Bound, values: Values, dims: Dims) -> tuple[Values, Dims]:
    """The hidden ``values`` at a site with the conditions that its method wants behind them, and their axes of rows.

    Raises ``MatchError`` where a condition is not known there, ``ParamsError`` where the caller should have given it.
    """
    found: Told | None = call.notes.get(CONDITIONS)
    if found is None:
        raise FoldError(
            f"{path} wants conditions of the call ({', '.join(bound.conditions)}), and runs outside of it: within a "
            f"module that runs once per member, or again for a backward pass of a view, which does not keep them. Use "
            f'engine="vmap" or "loop", and where activations are checkpointed delta.apply instead of a view.'
        )
    with contextlib.nullcontext() if call.watch is None else call.watch.paused():
        more = [_one(call, found, name, path, bound, values, dims) for name in bound.conditions]
    return (*values, *[value for value, _ in more]), (*dims, *[dim for _, dim in more])


def _one(
    call: Call, found: Told, name: str, path: str, bound: Bound, values: Values, dims: Dims
) -> tuple[Tensor, int | None]:
    """One condition, with the axis that counts the rows of all members; ``None``: it is the same for each of them."""
    given = found.given.get(name)
    if given is not None and name in OF_TEXTS:
        given = given.ne(0) if name == "mask" else given.to(torch.int64)
    if given is None or (name == "mask" and found.reads_text(path)):
        if name not in OF_TEXTS:
            raise ParamsError(
                f"{bound.attachment.name} at {path} wants the condition {name}, which the call did not give: write "
                f'conditions={{"{name}": a tensor with one entry a row}}.'
            )
        text = found.of_text(call, name, path)
        try:
            given = OF_TEXTS[name](text)
        except ParamsError as error:
            raise ParamsError(_unknown(name, path, str(error))) from error
        if any(_same(value, other) for value in values for other in text.others):
            raise MatchError(_unknown(name, path, "what enters it is not the text, but another input of the model"))
    if given.ndim == 0:
        return given, None
    return _by_rows(call, name, given, path, bound, values[0], dims[0])


def _by_rows(
    call: Call, name: str, given: Tensor, path: str, bound: Bound, hidden: Tensor, dim: int | None
) -> tuple[Tensor, int | None]:
    """``given`` where its leading axes are those of the hidden value, as the method sees it."""
    order, site = bound.attachment.config.axis_order, bound.attachment.site
    seen = tuple(order) if order is not None and len(order) == hidden.ndim else tuple(range(hidden.ndim))
    shape = [hidden.shape[axis] for axis in seen]
    n, rows = 1 if call.lift is None else call.lift.n, given.shape[0]
    fits = (bool(shape) and rows in (1, shape[0])) or (call.lift is not None and rows * n == shape[0])
    if call.lift is not None and (dim is None or dim != seen[0]):
        fits = False
    if name in A_TOKEN:
        features = site.features_axis(hidden) % hidden.ndim if hidden.ndim else 0
        alike = given.ndim > 1 and len(shape) == 3 and shape[1] == given.shape[1]
        fits = fits and alike and seen[2] == features
    if not fits:
        raise MatchError(_misfit(name, path, tuple(given.shape), tuple(shape)))
    if call.lift is not None and rows == shape[0]:
        return given, 0
    if rows == 1 and name in OF_TEXTS:
        given = given.expand(shape[0] // n, *given.shape[1:])
    return given, None


def _misfit(name: str, site: str, given: tuple[int, ...], hidden: tuple[int, ...]) -> str:
    if name in OF_TEXTS:
        parts = "(rows, tokens, features)" if name in A_TOKEN else "rows in front"
        why = f"it is {given}, and the hidden value there is {hidden}, which is not {parts} of the same text"
        return _unknown(name, site, why)
    return (
        f'conditions={{"{name}": ...}} has the shape {given}, and the hidden value at {site} is {hidden}: give one entry '
        f"a row, a single one, (1, ...), for all rows, or a number; where rows are not in front there, leave the site "
        f'out, exclude_modules=["{site}"].'
    )


def _same(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one, also where a transform or a checkpoint has wrapped one of them."""
    if value is other:
        return True
    if value.shape != other.shape or torch.compiler.is_compiling():
        return False
    a, b = innermost(value), innermost(other)
    return not (is_wrapped(a) or is_wrapped(b)) and a.numel() > 0 and a.data_ptr() == b.data_ptr() != 0


def checked(plan: Plan, model: nn.Module, params: Mapping[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` whose ``conditions`` are known to the methods; without them, where no method acts in the call.

    >>> delta = fd.DeltaModel(nn.Sequential(nn.Linear(2, 2)), fd.LoraConfig(modified_modules=["0"]))
    >>> delta.apply(delta.init(0), torch.zeros(1, 2), conditions={"gate": torch.ones(1)})
    Traceback (most recent call last):
    ...
    funcdelta.errors.ParamsError: conditions=['gate']: no method of this delta wants conditions of a call, so leave \
them out.
    """
    given = kwargs[GIVEN]
    if not plan.conditions:
        if accepts(model, GIVEN):
            return kwargs  # the model's own input
        shown = list(given) if isinstance(given, Mapping) else given
        raise ParamsError(f"{GIVEN}={shown!r}: no method of this delta wants conditions of a call, so leave them out.")
    if given is not None:
        check_given(plan.conditions, given)
    if given is None or not params:
        return {name: value for name, value in kwargs.items() if name != GIVEN}
    return kwargs


def check_given(wanted: Sequence[str], given: Any) -> None:
    """Raise ``ParamsError`` unless the conditions ``given`` are tensors by names that methods want.

    >>> check_given(("gate",), {"gate": torch.ones(3)})
    """
    if not isinstance(given, Mapping):
        raise ParamsError(f'{GIVEN}= is a dict of tensors by name, {{"gate": gates}}; found {type(given).__name__}.')
    for name, value in given.items():
        if name not in wanted:
            raise ParamsError(
                f"No method of this delta wants the condition {name!r}, only {', '.join(wanted)}.{near(name, wanted)}"
            )
        if not isinstance(value, Tensor):
            raise ParamsError(
                f'{GIVEN}={{"{name}": ...}} takes a tensor with one entry a row; found {type(value).__name__}.'
            )
