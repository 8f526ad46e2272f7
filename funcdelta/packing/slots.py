"""Slots: which configs of different members share one packed config of a stack.

Two configs share a slot if they are of one method, agree in every field that a call reads, and have leaves of the same
shapes, or of shapes that the method allows to be padded with zeros. A member's configs keep the order in which they
act.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParamsError
from ..methods.config import BaseDeltaConfig
from ..methods.leaf import growing
from ..model import DeltaModel
from ..plan.attachment import Attachment
from ..plan.sharing import Shared
from ..trees.stack import members
from .packed import Origin, Packed


@dataclass(frozen=True)
class Chunk:
    """Adjacent members of one delta; ``number`` is that of the stack they came in, ``None`` for single members."""

    delta: DeltaModel
    stack: Mapping[str, Tensor]
    number: int | None

    @property
    def kind(self) -> Any:
        """Chunks of one kind use the same slots and origins."""
        return self.delta.configs, self.number

    @property
    def n(self) -> int:
        """The number of members."""
        return members(self.stack)


@dataclass
class Slot:
    """A packed config in the making: the origins that share it, and where each of them acts."""

    name: str
    origins: list[Origin] = field(default_factory=list)
    sites: dict[str, Attachment] = field(default_factory=dict)
    whole: bool = True
    shared: Shared | None = None
    index: dict[Any, int] = field(default_factory=dict)

    def why_not(self, config: BaseDeltaConfig, own: Mapping[str, Attachment], group: Shared | None) -> str | None:
        """Why ``config`` cannot share this slot (``"size"``: its leaves cannot be padded); ``None`` if it can."""
        known = self.origins[0].config
        if known.alike() != config.alike():
            return "method"
        same_sites = own.keys() == self.sites.keys()
        if not same_sites and any(a.fixed for a in (*own.values(), *self.sites.values())):
            return "sites"
        parts = any(a.site.parts for a in (*own.values(), *self.sites.values()))
        if not same_sites and (
            "" in own or "" in self.sites or parts or (config.gives("expand") and group is not None)
        ):
            return "sites"
        for path in own.keys() & self.sites.keys():
            a, b = own[path], self.sites[path]
            if a.site.exit != b.site.exit or a.site.parts != b.site.parts:
                return "sites"
            if not _same(a.fixed, b.fixed):
                return "method"
            if _beside_padding(a) != _beside_padding(b):
                return "size"
        return None if _shared_shapes(group) == _shared_shapes(self.shared) else "size"

    def _paths(self) -> set[str]:
        return {a.site.path for a in self.sites.values()}

    def config(self, taken: set[str], everyone: bool, delta: DeltaModel) -> Packed:
        """The packed config, under a name that neither another config nor the backbone has."""
        first = self.origins[0].config
        if first.gives("prompt") and not everyone:
            raise ParamsError(
                f"{self.name} makes inputs longer, so members with and without it, or with other lengths, cannot share "
                f"a batch. Pack the members of each length separately."
            )
        fields: dict[str, Any] = {f.name: getattr(first, f.name) for f in dataclasses.fields(BaseDeltaConfig)}
        if not self.whole:
            ends = [(path, a.site.exit or path) for path, a in self.sites.items()]
            names = [end for pair in ends for end in pair] if first.gives("spans") else [path for path, _ in ends]
            fields |= {
                "modified_modules": tuple(map(exactly, names)),
                "exclude_modules": None,
                "common_structure": None,
            }
        fields |= {"name": _free_name(self.name, taken, self._paths(), delta.backbone), "unfrozen_modules": ("deltas",)}
        every = self.sites.keys()
        origins = (o if set(o.sites or ()) != every else dataclasses.replace(o, sites=None) for o in self.origins)
        return Packed(**fields, origins=tuple(origins), optional=not everyone)


def place(chunk: Chunk, slots: list[Slot], padding: str) -> tuple[int, ...]:
    """The slots of the configs of the chunk's delta, in the order in which they act; adds slots where none fits."""
    delta, start = chunk.delta, 0
    places: list[int] = []
    for config, name in zip(delta.configs, delta.plan.names, strict=True):
        own = sites_of(delta, name)
        group = next((group for group in delta.plan.shared if group.name == name), None)
        reasons = [slot.why_not(config, own, group) for slot in slots[start:]]
        for i, reason in enumerate(reasons):
            sites = slots[start + i].sites
            both = own.keys() & sites.keys()
            if padding == "group" and any(_shapes(own[path]) != _shapes(sites[path]) for path in both):
                reasons[i] = reason or "size"
        if padding == "pad" and "size" in reasons and None not in reasons:
            raise ParamsError(
                f"{config.delta_type}: the leaves of {name} differ in sizes that cannot be padded with zeros. Write "
                f'padding="auto", which gives each size its own leaves, or pack them separately.'
            )
        place = start + reasons.index(None) if None in reasons else len(slots)
        if place == len(slots):
            slots.append(Slot(name, shared=group))
        slot = slots[place]
        if slot.origins and own.keys() != slot.sites.keys():
            slot.whole = False
        slot.index[chunk.kind] = len(slot.origins)
        slot.origins.append(Origin(config, tuple(own), chunk.number, name))
        slot.sites = {**own, **slot.sites}
        places.append(place)
        start = place + 1
    return tuple(places)


def sites_of(delta: DeltaModel, name: str) -> dict[str, Attachment]:
    """The sites of the delta called ``name``, by path.

    >>> list(sites_of(fd.LoraModel(nn.Sequential(nn.Linear(4, 8)), modified_modules=["0"]), "lora"))
    ['0']
    """
    return {a.site.address: a for a in delta.plan.all() if a.name == name}


def _shared_shapes(group: Shared | None) -> dict[str, tuple[int, ...]]:
    return {} if group is None else {leaf: group.shapes[key] for leaf, key in group.leaves.items()}


def _same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two configs agree in the tensors that all members have in common."""
    if left.keys() != right.keys():
        return False
    return all(t is right[name] or torch.equal(t, right[name]) for name, t in left.items())


def _shapes(a: Attachment) -> dict[str, list[int]]:
    """The shapes of a site's own leaves."""
    return {leaf: list(shape) for leaf, shape in a.own.items()}


def _beside_padding(a: Attachment) -> dict[str, list[int]]:
    """The shapes of a site's own leaves, with 0 for sizes that may be padded."""
    shapes = _shapes(a)
    for axes in growing(a.axes).values():
        for leaf, axis in axes.axes.items():
            shapes[leaf][axis] = 0
    return shapes


def exactly(name: str) -> str:
    """A pattern for ``modified_modules`` that matches only this module or parameter."""
    return f"[r]^{re.escape(name)}$"


def _free_name(base: str, taken: set[str], sites: Iterable[str], backbone: nn.Module) -> str:
    places = [backbone, *(backbone.get_submodule(path) for path in sites)]
    name, number = base, 0
    while name in taken or any(hasattr(place, name) for place in places):
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name
