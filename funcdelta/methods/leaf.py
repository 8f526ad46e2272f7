"""A leaf: the tensor that a member starts with, and what else has to be known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..errors import ConfigError

FIXED = "."
"""In the place of an axis that keeps its length."""


class Leaf(NamedTuple):
    """A member's tensor as it starts. A method may give the bare tensor where nothing else has to be said.

    Attributes:
        value: the tensor.
        axes: one word an axis. Axes of one name have one size, and zeros at their end change nothing of what the method
            computes, so that members of unlike size can share a stack; ``.`` is an axis that keeps its length. An axis
            that holds k pieces of such a size, each of which may grow, is written ``k*name``.
        trains: whether optimisers change it; scales, masks and frozen bases do not train.
        of: ``"member"``, each has its own; or ``"all"``: drawn when the delta is built, the same for however many
            members, and so neither in params nor in a stack. A method gets it as any leaf, without a member axis.

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
        if leaf.axes and len(leaf.axes.split()) != leaf.value.ndim:
            raise ConfigError(
                f"{who} names the axes of {name!r} {leaf.axes!r}, but its shape is {tuple(leaf.value.shape)}: write "
                f'one word an axis, "." for one that keeps its length.'
            )
        if leaf.of not in ("member", "all"):
            raise ConfigError(f'{who} says that {name!r} is of {leaf.of!r}: write "member" or "all".')
        found[name] = leaf
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
            count, _, name = word.rpartition("*")
            if name == FIXED:
                continue
            one = found.setdefault(name, Growing())
            if leaf in one.axes:
                raise ConfigError(f"Two axes of {leaf!r} are called {name!r}: give each a name of its own.")
            one.axes[leaf], one.pieces[leaf] = i - len(each), int(count or 1)
    return found
