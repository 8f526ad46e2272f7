"""A leaf: the tensor that a member starts with, and what else has to be known of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .acts import CALL, OWN

FIXED = "."
"""In the place of an axis that keeps its length."""

HOLDER = nn.Module()
"""What a view holds leaves in; no leaf can be called as one of its attributes."""


class Leaf(NamedTuple):
    """A member's tensor as it starts. A method may give the bare tensor where nothing else has to be said.

    Attributes:
        value: the tensor.
        axes: one word an axis. Axes of one name have one size, and zeros at their end change nothing of what the method
            computes, so that members of unlike size can share a stack; ``.`` is an axis that keeps its length. An axis
            that holds k pieces of such a size, each of which may grow, is written ``k*name``.
        trains: whether optimisers change it; scales, masks and frozen bases do not train.
        of: ``"member"``, each has its own; or ``"all"``: drawn when the delta is built, the same for however many
            members, and so neither in params nor in a stack. A method gets it as any leaf, without a member axis. It is
            drawn apart from the members, so no member's leaf can start from it.

    >>> Leaf(torch.zeros(6, 4), "3*rank .").value.shape
    torch.Size([6, 4])
    """

    value: Tensor
    axes: str = ""
    trains: bool = True
    of: str = "member"


Leaves = Mapping[str, Leaf | Tensor]
"""What a method gives: ``{leaf name: leaf}``."""


def as_leaves(given: Leaves, who: str) -> dict[str, Leaf]:
    """``given`` with every bare tensor as a leaf; raises ``ConfigError``, naming ``who`` gave it, for anything else.

    >>> as_leaves({"scale": torch.ones(())}, "MyConfig.init")["scale"].trains
    True
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{who} gave {type(given).__name__}; expected a dict of leaves, {{leaf name: tensor}}.")
    found: dict[str, Leaf] = {}
    for name, leaf in given.items():
        leaf = leaf if isinstance(leaf, Leaf) else Leaf(leaf)
        if not isinstance(leaf.value, Tensor):
            raise ConfigError(f"{who} gave {type(leaf.value).__name__} for {name!r}; expected a tensor.")
        if leaf.value.requires_grad:  # whoever differentiates asks for gradients of params
            leaf = leaf._replace(value=leaf.value.detach())
        found[name] = leaf
    return found


def declared(given: Leaves, who: str) -> dict[str, Leaf]:
    """The same, with all that a method says of its leaves checked, once, as a delta is built.

    >>> declared({"a": Leaf(torch.ones(2, 4), "rank ."), "b": Leaf(torch.ones(3), "rank")}, "MyConfig.init")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: MyConfig.init: axes called 'rank' have one size, but 'a' has 2 there and 'b' 3: ...
    """
    found = as_leaves(given, who)
    for name, leaf in found.items():
        _check_name(name, found, who)
        if leaf.of not in ("member", "all"):
            raise ConfigError(f'{who} says that {name!r} is of {leaf.of!r}: write "member" or "all".')
        if not isinstance(leaf.trains, bool):
            raise ConfigError(f"{who} says trains={leaf.trains!r} of {name!r}: write True or False.")
        if leaf.value.layout != torch.strided or leaf.value.is_nested or leaf.value.is_quantized:
            raise ConfigError(f"{who} gave a tensor of the layout {leaf.value.layout} for {name!r}: give a dense one.")
        if not isinstance(leaf.axes, str) or (leaf.axes and len(leaf.axes.split()) != leaf.value.ndim):
            raise ConfigError(
                f"{who} names the axes of {name!r} {leaf.axes!r}, but its shape is {tuple(leaf.value.shape)}: write "
                f'one word an axis, as in "rank .", and "." for one that keeps its length.'
            )
    _check_sizes(found, who)
    return found


def members_and_all(leaves: Mapping[str, Leaf]) -> tuple[dict[str, Leaf], dict[str, Tensor]]:
    """The leaves that each member has, and the tensors that all have together.

    >>> members_and_all({"d": Leaf(torch.ones(2)), "basis": Leaf(torch.ones(2, 3), of="all")})[1].keys()
    dict_keys(['basis'])
    """
    own = {name: leaf for name, leaf in leaves.items() if leaf.of == "member"}
    return own, {name: leaf.value for name, leaf in leaves.items() if leaf.of == "all"}


def values_of(leaves: Mapping[str, Leaf]) -> dict[str, Tensor]:
    """The tensors alone.

    >>> values_of({"scale": Leaf(torch.ones(()), trains=False)})
    {'scale': tensor(1.)}
    """
    return {name: leaf.value for name, leaf in leaves.items()}


@dataclass(frozen=True)
class Growing:
    """The axes of one name: zeros may make all of them longer together.

    Attributes:
        axes: ``{leaf: the axis}``, counted from the last, -1.
        pieces: ``{leaf: k}`` where the axis holds k pieces, each made longer at its own end; else 1.
    """

    axes: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, int] = field(default_factory=dict)

    def size(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How long a piece is in leaves of those shapes.

        >>> growing({"lora_A": "3*rank ."})["rank"].size({"lora_A": (6, 4)})
        2
        """
        leaf, axis = next(iter(self.axes.items()))
        return shapes[leaf][axis] // self.pieces[leaf]


def growing(axes: Mapping[str, str]) -> dict[str, Growing]:
    """The axes that may grow, by their name, of leaves whose axes are called ``{leaf: axes}``.

    >>> growing({"lora_A": "3*rank .", "lora_B": ". rank"})
    {'rank': Growing(axes={'lora_A': -2, 'lora_B': -1}, pieces={'lora_A': 3, 'lora_B': 1})}
    """
    found: dict[str, Growing] = {}
    for leaf, words in axes.items():
        each = words.split()
        for i, word in enumerate(each):
            count, star, name = word.rpartition("*")
            if name == FIXED:
                continue
            if not name or (star and not (count.isascii() and count.isdigit() and int(count))):
                raise ConfigError(
                    f'An axis of {leaf!r} is called {word!r}: write a name, "3*name" for three pieces, or "." for an '
                    f"axis that keeps its length."
                )
            one = found.setdefault(name, Growing())
            if leaf in one.axes:
                raise ConfigError(f"Two axes of {leaf!r} are called {name!r}: give each a name of its own.")
            one.axes[leaf], one.pieces[leaf] = i - len(each), int(count or 1)
    return found


def _check_name(name: object, leaves: Mapping[str, Leaf], who: str) -> None:
    """A leaf's name is a dotted path that a module can hold, beside those of the others."""
    if not isinstance(name, str):
        raise ConfigError(f"{who} gave a leaf called {name!r}; expected a name, as in {{'scale': ...}}.")
    tokens = name.split(".")
    why = next((why for token in tokens if (why := _unfit(token))), None)
    if name.startswith((OWN, CALL)):
        why = f"{OWN}… is how a method gets what it reads of the site, and {CALL}… what a call tells"
    over = next((".".join(tokens[:i]) for i in range(1, len(tokens)) if ".".join(tokens[:i]) in leaves), None)
    if over is not None:
        why = f"{over!r} is another leaf, and nothing stands below a leaf"
    if why is not None:
        raise ConfigError(f"{who} gave a leaf called {name!r}: {why}. Call it something else.")


def _unfit(token: str) -> str | None:
    if not token:
        return "a part of it is empty"
    held = hasattr(HOLDER, token)
    return f"every nn.Module has an attribute {token!r}, and views hold leaves in modules" if held else None


def _sizes(leaves: Mapping[str, Leaf]) -> Iterator[tuple[str, str, float]]:
    """``(axis name, leaf, size of a piece)`` for every axis that may grow."""
    for name, axes in growing({leaf: one.axes for leaf, one in leaves.items()}).items():
        for leaf, axis in axes.axes.items():
            yield name, leaf, leaves[leaf].value.shape[axis] / axes.pieces[leaf]


def _check_sizes(leaves: Mapping[str, Leaf], who: str) -> None:
    first: dict[str, tuple[str, float]] = {}
    for name, leaf, size in _sizes(leaves):
        if size % 1:
            raise ConfigError(f"{who}: the axis called {name!r} of {leaf!r} does not hold whole pieces, but {size}.")
        other, expected = first.setdefault(name, (leaf, size))
        if size != expected:
            raise ConfigError(
                f"{who}: axes called {name!r} have one size, but {other!r} has {expected:.0f} there and {leaf!r} "
                f"{size:.0f}: give one of them another name."
            )
