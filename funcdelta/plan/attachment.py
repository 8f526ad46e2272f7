"""One delta at one site: its leaves there, and what it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..methods.acts import Acts, with_fixed
from ..methods.config import BaseDeltaConfig
from ..methods.site import Site


@dataclass(frozen=True)
class Attachment:
    """One delta at one site.

    Attributes:
        name: the delta's name, between the site's path and the leaf in every key of params.
        leaves: ``{leaf: key}`` of all that the method's functions get here, shared and expanded leaves too.
        shapes, dtypes: of one member's own leaves here, by key in params.
        by_weights: whether the delta acts by rewriting the site's tensors instead of its hidden values: methods that
            give nothing else, and where a formula on hidden values would not hold (see ``acts_by_weights``).
        by_values: whether it acts on the hidden values that enter or leave the site.
        key: the key in params of the first leaf, own or shared, which stands for all.
        leading: the leaf whose precision the method computes in, the first that trains.
        fixed: what all members have together, beside their leaves: ``{leaf: tensor}``.
        reads: pairs of a leaf among these and the backbone's tensor that it is; params may hold another in its place.
        in_attention: whether the delta adds keys and values to the site's attention, or wraps it.
        prompt_rows: how many positions it adds before the input.
        read_by_parent: whether the module above reads the site's tensors and never calls it.
        has_two_forms: whether it acts on hidden values, and could as well by rewriting the site's tensors.
    """

    name: str
    config: BaseDeltaConfig
    site: Site
    leaves: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    constants: tuple[str, ...]
    by_weights: bool
    by_values: bool
    key: str
    leading: str
    fixed: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    reads: tuple[tuple[str, str], ...] = ()
    in_attention: bool = False
    prompt_rows: int = 0
    has_two_forms: bool = False
    read_by_parent: bool = False
    _acts: tuple[Acts, Acts] = field(init=False, repr=False, compare=False)

    @property
    def ends(self) -> tuple[str, ...]:
        """The modules where it takes part in a call: its own, or those where its span begins and ends."""
        return (self.site.path,) if self.site.exit is None else (self.site.path, self.site.exit)

    def among(self, params: Mapping[str, Any]) -> bool:
        """Whether ``params`` holds this delta's leaves."""
        return self.key in params

    def of(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This delta's leaves under their own names."""
        found = {leaf: params[key] for leaf, key in self.leaves.items()}
        return found | {leaf: params[name] for leaf, name in self.reads if name in params} if self.reads else found

    def at(self, training: bool) -> Site:
        """The site in training or evaluation mode."""
        return self.site if self.site.training == training else dataclasses.replace(self.site, training=training)

    def __post_init__(self) -> None:
        # In both modes, once: a call of what rewrites weights asks for it at every site.
        both = tuple(with_fixed(self.config.acts(self.at(mode)), self.fixed, self.leading) for mode in (False, True))
        object.__setattr__(self, "_acts", both)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_acts"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.__post_init__()

    def acts(self, training: bool = False) -> Acts:
        """What the delta does here, in training or evaluation mode."""
        return self._acts[training]

    @property
    def axes(self) -> dict[str, str]:
        """What the axes of its own leaves are called, ``{leaf: names}``."""
        return dict(self.site.axes)

    @property
    def own(self) -> dict[str, tuple[int, ...]]:
        """``{leaf: shape}`` of the leaves that no other site has."""
        return {leaf: self.shapes[key] for leaf, key in self.leaves.items() if key in self.shapes}
