"""Configs that hold configs: one delta whose parts all act at the same sites, each with leaves of its own.

A part's leaves stand under its name, ``<site>.<composition>.<part>.<leaf>``, so parts may be unlike in method and in
rank. What a composition does is composed of what its parts do (:class:`Acts`), so that it is applied, folded, routed,
packed and saved as any method is, and merged where its parts can be.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MatchError
from .acts import CALL, OWN, Acts, Params, on_leaves
from .config import AutoDeltaConfig, BaseDeltaConfig
from .leaf import FIXED, Leaf, Leaves, as_leaves
from .own import Own
from .site import Site

REFUSED = {
    "prompt": "makes the input longer",
    "attend": "adds keys and values to attention",
    "spans": "begins at one module and ends at another",
}
"""What cannot be composed at one site: such a config is given to the delta beside the composition."""

OF_THE_WHOLE = ("exclude_modules", "unfrozen_modules", "unfrozen_init", "common_structure", "batch_dim", "axis_order")
"""Fields that a part leaves to its composition."""


@dataclass(frozen=True)
class Composition(BaseDeltaConfig):
    """The base of compositions: ``parts``, and the sites where all of them act.

    Attributes:
        parts: the configs. Those that name ``modified_modules`` name the same.

    >>> config = fd.chain(fd.LoraConfig(lora_r=2, modified_modules=["0"]), fd.AdapterConfig(bottleneck_dim=4))
    >>> config.modified_modules, list(config.named)
    (('0',), ['lora', 'adapter'])
    """

    composed: ClassVar[bool] = True
    in_leaves: ClassVar[tuple[str, ...]] = ("parts",)

    parts: tuple[BaseDeltaConfig, ...] = field(default=(), repr=True)

    def __post_init__(self) -> None:
        given = self.parts if isinstance(self.parts, (tuple, list)) else (self.parts,)
        parts = tuple(AutoDeltaConfig.from_dict(part) if isinstance(part, Mapping) else part for part in given)
        what = self.delta_type
        if not parts or not all(isinstance(part, BaseDeltaConfig) for part in parts):
            raise ConfigError(f"fd.{what} takes configs: fd.{what}(fd.LoraConfig(lora_r=4), fd.AdapterConfig()).")
        for part in parts:
            refused = next((why for function, why in REFUSED.items() if part.gives(function)), None)
            if refused is not None:
                raise ConfigError(
                    f"{part.delta_type} {refused}, so it has no place in fd.{what}: give it to the delta beside it, "
                    f"fd.DeltaModel(backbone, fd.{what}(...), {type(part).__name__}(...))."
                )
            defaults = {one.name: one.default for one in dataclasses.fields(BaseDeltaConfig)}
            said = next((name for name in OF_THE_WHOLE if getattr(part, name) != defaults[name]), None)
            if said is not None:
                raise ConfigError(f"{said} of a part holds for all parts: write fd.{what}(..., {said}=...).")
        named = {part.modified_modules: part for part in parts if part.modified_modules is not None}
        if self.modified_modules is not None:
            named = {tuple(self.modified_modules): self, **named}
        if len(named) > 1:
            first, other = list(named)[:2]
            raise ConfigError(
                f"The parts of fd.{what} act at the same sites; found modified_modules={list(first)} and "
                f"{list(other)}. Name them once, fd.{what}(..., modified_modules=[...]), or give the delta two configs."
            )
        if named:
            object.__setattr__(self, "modified_modules", next(iter(named)))
        taken = next((part.name for part in parts if f"{part.name}." in (OWN, CALL)), None)
        if taken is not None:
            raise ConfigError(
                f'A part is called "{taken}", as what methods read of the site ("own") and of the call ("call") is: '
                f"give it another name=."
            )
        alone = tuple(part.replace(modified_modules=None) for part in parts)
        object.__setattr__(self, "parts", alone)
        super().__post_init__()

    @property
    def named(self) -> dict[str, BaseDeltaConfig]:
        """The parts by name: their own, or their method's with a number from the second on."""
        found: dict[str, BaseDeltaConfig] = {}
        for part in self.parts:
            base = part.name or part.default_name or part.delta_type or type(part).__name__.lower()
            name, number = base, 0
            while name in found:
                number += 1
                name = f"{base}_{number}"
            found[name] = part
        return found

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "parts": [part.to_diff_dict() for part in self.parts]}

    # -- facts: what holds of all parts ------------------------------------------------------------------------------

    def gives(self, function: str) -> bool:
        return any(part.gives(function) for part in self.parts)

    def default_names(self) -> tuple[str, ...]:
        names = {part.default_names(): name for name, part in self.named.items()}
        if len(names) > 1:
            told = "; ".join(f"{part} at {', '.join(own) or 'none'}" for own, part in list(names.items())[:2])
            raise MatchError(
                f"The parts of fd.{self.delta_type} have other sites of their own ({told}), and act at the same ones: "
                f"name these, fd.{self.delta_type}(..., modified_modules=[...])."
            )
        return next(iter(names))

    def takes_tensors(self) -> bool:
        return all(part.takes_tensors() for part in self.parts)

    def takes_parts(self) -> bool:
        return all(part.takes_parts() for part in self.parts)

    def alike(self) -> Hashable:
        fixed = tuple(
            (part.alike(), tuple(getattr(part, name) for name in part.as_leaves)) for part in self.named.values()
        )
        return super().alike(), tuple(self.named), fixed

    def spread(self, path: str, module: nn.Module) -> Iterator[str]:
        found = [list(part.spread(path, module)) for part in self.parts]
        if any(one != found[0] for one in found):
            raise MatchError(
                f"{path} means other sites for {self.parts[0].delta_type} than for another part of fd."
                f"{self.delta_type}: name the layers themselves."
            )
        yield from found[0]

    def describe(self, site: Site, module: nn.Module) -> Site:
        for part in self.parts:
            site = part.describe(site, module)
        return site

    def check(self, site: Site) -> str | None:
        told = ((name, part.check(site)) for name, part in self.named.items())
        refusal = next((f"its part {name}: {why}" for name, why in told if why is not None), None)
        if refusal is not None:
            return refusal
        parts = self.parts_at(site)
        by_weights = [name for name, acts in parts.items() if acts.weights and not (acts.by_values and acts.exact)]
        if not by_weights or self.acts(site).weights is not None:
            return None
        without = next((name for name, acts in parts.items() if acts.weights is None), None)
        other = f"its part {without} has no weights form" if without else "the composition has none"
        return f"its part {by_weights[0]} acts there by the weights of {site.module_type} alone, and {other}"

    # -- leaves --------------------------------------------------------------------------------------------------------

    def leaves(self, site: Site, own: Own, rng: torch.Generator) -> Leaves:
        site = dataclasses.replace(site, axes=())
        given = [part.leaves(site, own, one) for part, one in zip(self.parts, self._generators(rng), strict=True)]
        return self._under_names(given)

    def shared_leaves(self, sites: tuple[Site, ...], own: Mapping[str, Own], rng: torch.Generator) -> Leaves:
        generators = self._generators(rng)
        given = [part.shared_leaves(sites, own, one) for part, one in zip(self.parts, generators, strict=True)]
        return self._under_names(given)

    def expand(self, sites: tuple[Site, ...], p: Params) -> dict[str, Params]:
        found: dict[str, Params] = {site.address: {} for site in sites}
        for name, part in self.named.items():
            own = part_of(p, name)
            each = part.expand(sites, own) if own and part.gives("expand") else dict.fromkeys(found, own)
            for path, leaves in each.items():
                found[path] |= {f"{name}.{leaf}": tensor for leaf, tensor in leaves.items()}
        return found

    def baked(self) -> Self:
        return self.replace(parts=tuple(part.baked() if part.gives("expand") else part for part in self.parts))

    def _generators(self, rng: torch.Generator) -> list[torch.Generator]:
        """One a part, so that what a part draws does not depend on how much the others do."""
        seeds = torch.randint(2**62, (len(self.parts),), generator=rng).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _under_names(self, given: list[Leaves]) -> dict[str, Leaf]:
        found: dict[str, Leaf] = {}
        for (name, part), leaves in zip(self.named.items(), given, strict=True):
            for leaf, one in as_leaves(leaves, f"{type(part).__name__}.init").items():
                words = (_named_axis(word, name) for word in one.axes.split())
                found[f"{name}.{leaf}"] = one._replace(axes=" ".join(words))
        return found

    # -- what it does --------------------------------------------------------------------------------------------------

    def parts_at(self, site: Site) -> dict[str, Acts]:
        """What each part does at ``site``, with the composition's leaves."""
        alone = dataclasses.replace(site, axes=())
        return {
            name: on_leaves(part.acts(alone), functools.partial(part_of, name=name))
            for name, part in self.named.items()
        }


def part_of(p: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The leaves of the part ``name`` under their own names.

    >>> part_of({"lora.scale": torch.ones(()), "gate": torch.zeros(2)}, "lora")
    {'scale': tensor(1.)}
    """
    start = f"{name}."
    own = {leaf.removeprefix(start): tensor for leaf, tensor in p.items() if leaf.startswith(start)}
    return own | {leaf: tensor for leaf, tensor in p.items() if leaf.startswith((OWN, CALL))}


def _named_axis(word: str, part: str) -> str:
    count, star, name = word.rpartition("*")
    return word if name == FIXED else f"{count}{star}{part}.{name}"
