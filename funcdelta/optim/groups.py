"""Hyper-parameters that depend on the leaf: factors of the learning rate, and the choice of leaves that decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError, MatchError
from ..trees.leaves import named
from ..trees.selecting import Selector, select
from .hyper import Hyper, Values

__all__ = ["Chosen", "Groups"]


class Groups:
    """``groups`` = {selector: factor of lr} and ``decay_mask`` = selector of the leaves that decay.

    Selectors are those of ``fd.partition``, with several names as a tuple. A leaf in several groups gets the product of
    their factors. LoRA+ (Hayou et al. 2024) is ``{"lora_B": 16}``.

    >>> chosen = Groups({"lora_B": 16.0}, None).of({"q.lora_A": torch.ones(2), "q.lora_B": torch.ones(2)})
    >>> chosen.factors
    {'q.lora_B': ("groups['lora_B']",)}
    """

    def __init__(self, groups: Mapping[Any, Hyper] | None, decay_mask: Selector | None) -> None:
        if groups is not None and not isinstance(groups, Mapping):
            raise ConfigError(
                f'groups must be a dict {{selector: factor of lr}}, such as {{"head": 0.1}}; found {groups!r}.'
            )
        self._selectors = {_label(key): key for key in groups or {}}
        self.hypers: dict[str, Hyper] = {_label(key): factor for key, factor in (groups or {}).items()}
        if decay_mask is None or isinstance(decay_mask, str) or callable(decay_mask):
            self.decay_mask = decay_mask
        elif isinstance(decay_mask, Iterable):
            self.decay_mask = tuple(decay_mask)  # an iterator would be exhausted by the second update
        else:
            raise ConfigError(
                f"decay_mask must select the leaves that decay, by names or a predicate, keep(name) or "
                f"keep(name, leaf); found {decay_mask!r}. For no weight decay at all write weight_decay=0.0."
            )

    def of(self, params: Any) -> Chosen:
        """The selectors applied to ``params``; raises ``MatchError`` for a name that selects no leaf."""
        if not self._selectors and self.decay_mask is None:
            return Chosen({}, None)
        leaves = {name: leaf for name, leaf in named(params) if isinstance(leaf, Tensor)}
        factors: dict[str, tuple[str, ...]] = {}
        for label, selector in self._selectors.items():
            for name in _select(leaves, selector, label):
                factors[name] = (*factors.get(name, ()), label)
        return Chosen(factors, None if self.decay_mask is None else _select(leaves, self.decay_mask, "decay_mask"))


class Chosen:
    """The groups of every leaf (``factors``), and whether it decays.

    >>> Chosen({}, {"w"}).decays("w"), Chosen({}, {"w"}).decays("b"), Chosen({}, None).decays("b")
    (True, False, True)
    """

    def __init__(self, factors: dict[str, tuple[str, ...]], decayed: set[str] | None) -> None:
        self.factors, self._decayed = factors, decayed

    @property
    def alike(self) -> bool:
        """Whether all leaves are treated alike, with no groups and no ``decay_mask``."""
        return not self.factors and self._decayed is None

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the leaf."""
        return self._decayed is None or name in self._decayed

    def product(self, values: Values, hyper: str, name: str) -> str:
        """The name in ``values`` of ``hyper`` times the factors of the leaf's groups."""
        labels = self.factors.get(name)
        if labels is None:
            return hyper
        product = " · ".join((hyper, *labels))
        if product not in values.of:
            value = values.of[hyper]
            for label in labels:
                value = value * values.of[label]
            values.of[product] = value
        return product

    def scaled(self, values: Values, hyper: str, leaf: Tensor, name: str) -> Tensor:
        """``hyper`` times the factors of the leaf's groups, in the leaf's dtype and shape."""
        return values(self.product(values, hyper, name), leaf, name)


def _label(selector: Any) -> str:
    """The name of a group in errors, unique for each selector."""
    return f"groups[{selector!r}]"


def _select(leaves: dict[str, Tensor], selector: Selector, place: str) -> set[str]:
    try:
        return select(leaves, selector)
    except MatchError as error:
        raise MatchError(f"{place}: {error}") from error
