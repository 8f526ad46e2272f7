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

from ..errors import MatchError, ParamsError
from ..match import near
from ..plan.plan import Plan
from .call import Call, Host
from .counting import Counting
from .forward import accepts
from .positions import named
from .square import check_order
from .text_model import encoder_path
from .texts import A_TOKEN, OF_TEXTS, Text, read_text, text_model_of

GIVEN = "conditions"
"""The input by which a caller gives conditions."""

CONDITIONS = "conditions of the call"
"""Where a call keeps what it tells (:class:`Told`)."""


class Told:
    """What one call tells: what the caller gave, and what each text model was given, by its path.

    Attributes:
        refusals: why nothing is known of the text at a site, by the site's path; ``of``: its text model else.
        ordered: the sites at which rows were seen to come first, and tokens second.
        one_row: whether this is a run of one row, to see just that.
    """

    def __init__(self, of: Mapping[str, str], refusals: Mapping[str, str], ordered: set[str]) -> None:
        self.of, self.refusals = of, refusals
        self.given: Mapping[str, Tensor] = {}
        self.texts: dict[str, Text] = {}
        self.made: dict[str, list[tuple[Text, Tensor]]] = {}
        self.ordered, self.one_row = ordered, False

    def reads_text(self, site: str) -> bool:
        """Whether the text at a site is known, with the mask that the caller gave for it."""
        text = self.texts.get(self.of.get(site, ""))
        return site in self.of and text is not None and not text.refused

    def computed(self, name: str, text: Text) -> Tensor:
        """A condition of a text, computed where it is first wanted, and once a call."""
        known = self.made.setdefault(name, [])
        found = next((value for of, value in known if of is text), None)
        if found is None:
            found = OF_TEXTS[name](text)
            known.append((text, found))
        return found

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
            raise MatchError(unknown(name, site, why or "nothing tells of it"))
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
        self.ordered: set[str] = set()
        root = skeleton.module
        if accepts(root, GIVEN):
            raise MatchError(
                f"{type(root).__name__}.forward takes an input called {GIVEN} itself, by which calls would tell the "
                f"methods their conditions: wrap the model in a module whose forward calls it by another name."
            )
        by_token: set[str] = set()
        for attachment in plan.all():
            path, wanted = attachment.site.exit or attachment.site.path, attachment.acts().conditions
            by_token |= {path for name in wanted if name in A_TOKEN}
            if any(name in OF_TEXTS for name in wanted):
                try:
                    self.of[path] = text_model_of(root, path)
                except MatchError as error:
                    self.refusals[path] = str(error)
        self.by_token = {at: [p for p in by_token if self.of.get(p) == at] for at in self.of.values()}
        encoder = encoder_path(root)  # which generate calls by itself
        self.entries: frozenset[str] = frozenset({"", *self.of.values(), *([] if encoder is None else [encoder])})
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
        return call.note(CONDITIONS, lambda: Told(self.of, self.refusals, self.ordered))

    def unsure(self, text: Text, path: str, call: Call) -> bool:
        """Whether a call has as many rows as tokens, and sites at which it was not seen which come first."""
        if text.rows != text.tokens or text.rows == 1 or text.cached or call.lift is not None:
            return False
        if torch.compiler.is_compiling() or call.ended or self.skeleton.units or text.refused:
            return False
        return not self.ordered.issuperset(self.by_token[path])

    def one_row(self, told: Told, path: str, text: Text) -> dict[str, Any]:
        """What a run of the first row alone knows of the call."""
        alone = Told(self.of, self.refusals, self.ordered)
        alone.one_row = True
        alone.given = {n: t[:1] if t.ndim and t.shape[0] == text.rows else t for n, t in told.given.items()}
        none = torch.ones(1, text.tokens, dtype=torch.bool, device=text.device)
        alone.texts[path] = text._replace(rows=1, mask=none, numbers=None, others=())
        return {CONDITIONS: alone}


class _Taking:
    """A hook that takes the caller's conditions out of a module's inputs, before any other sees these."""

    def __init__(self, conditions: Conditions, path: str) -> None:
        self.conditions, self.path = conditions, path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        told = self.conditions.told(self.conditions.skeleton.under_way(self.path))
        if GIVEN not in kwargs:
            return None
        told.given = {} if kwargs[GIVEN] is None else kwargs[GIVEN]
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
        if told.one_row:
            return
        given, asked = named(counting.inputs, args, kwargs, counting.path), counting.asked(call)
        mask = given.get("attention_mask")
        if asked is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            mask = asked.get("attention_mask")
        # A model around this one numbers the padding, too, where its own caller says nothing.
        numbered = asked is None or asked.get("position_ids") is not None
        by_hand = given.get("position_ids") if numbered else None
        first = 0 if counting.padding is None else counting.padding + 1
        with contextlib.nullcontext() if call.watch is None else call.watch.paused():
            text = told.texts[counting.path] = read_text(given, told.given.get("mask", mask), by_hand, first)
            if self.conditions.unsure(text, counting.path, call):
                notes = self.conditions.one_row(told, counting.path, text)
                check_order(self.conditions.skeleton, module, counting.path, given, text.rows, call, notes)
                self.conditions.ordered.update(self.conditions.by_token[counting.path])


def _visits(path: str) -> str:
    return f"{path} (text)"


def unknown(name: str, site: str, why: str) -> str:
    """What is said where a condition is not known at a site.

    >>> unknown("mask", "head", "it is not called")[:70]
    'head wants the condition mask of the call, which is not known there: i'
    """
    return (
        f"{site} wants the condition {name} of the call, which is not known there: {why}. Leave the site out, "
        f'exclude_modules=["{site}"], or say it: conditions={{"{name}": ...}}.'
    )


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
