"""A method that unlike members share in one stack: ``present · f(mask · p)``, made of any registered method.

A *packed* config is the method's own class with the configs that its members came with, its *origins*. Beside the
method's leaves a member has constants: ``source``, which origin it came from (-1: none); ``size.<name>`` at a site
where members differ in a paddable size, and ``present`` where some member has no delta. What is longer than the
member's own size is masked before the method's functions see it, and what a member without the delta would give is
replaced by what the site gave, so that neither has a gradient and no optimiser can make either matter. A gradient of
zero is not enough for that: in a backward pass 0 times NaN is NaN. So what goes into the functions of a member that has
no delta is chosen, too, and what they compute finds no way back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..config import DERIVED, AutoDeltaConfig, BaseDeltaConfig
from ..errors import ConfigError
from ..sites.site import Site

PACKED = "packed."
"""Before the delta type of the method that members share."""

SIZE = "size."
OWN_LEAVES = ("present", "source")


@dataclass(frozen=True)
class Origin:
    """What members of a packed delta were before: their config, and where it acted.

    Attributes:
        config: as it was, with its own name and its own names of sites.
        sites: the paths of its sites; ``None``: all of the packed delta's.
        stack: for members that came as one stack its number, so that they leave as one.

    >>> Origin(fd.LoraConfig(lora_r=2), ("0",)).to_dict()
    {'config': {'delta_type': 'lora', 'lora_r': 2}, 'sites': ['0'], 'stack': None}
    """

    config: BaseDeltaConfig
    sites: tuple[str, ...] | None = None
    stack: int | None = None

    def at(self, path: str) -> bool:
        """Whether its members have the delta at ``path``."""
        return self.sites is None or path in self.sites

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        sites = None if self.sites is None else list(self.sites)
        return {"config": self.config.to_diff_dict(), "sites": sites, "stack": self.stack}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """The origin that :meth:`to_dict` describes."""
        sites = data.get("sites")
        config = AutoDeltaConfig.from_dict(data["config"])
        return cls(config, None if sites is None else tuple(sites), data.get("stack"))


@dataclass(frozen=True)
class Packed(BaseDeltaConfig):
    """The part of a packed config that is the same for every method; :func:`packed_class` adds the method.

    Attributes:
        origins: the configs that members came with; a member's ``source`` counts them.
        optional: whether there are members without any of them.
    """

    method: ClassVar[type[BaseDeltaConfig]]

    origins: tuple[Origin, ...] = field(default=(), repr=False)
    optional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        origins = tuple(one if isinstance(one, Origin) else Origin.from_dict(one) for one in self.origins)
        if not origins:
            raise ConfigError(f"{type(self).__name__} needs origins: it is made by fd.pack.")
        object.__setattr__(self, "origins", origins)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "origins": [origin.to_dict() for origin in self.origins]}

    def __reduce__(self) -> Any:
        # The class is made when it is needed, so that nothing can look it up by name.
        return _made_again, (self.method, {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    def baked(self) -> Self:
        origins = tuple(dataclasses.replace(origin, config=origin.config.baked()) for origin in self.origins)
        return super().baked().replace(origins=origins)

    # -- what members have -----------------------------------------------------------------------------------------

    def init(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        """The leaves of the first origin at ``site``, as large as the largest one's, with the site's constants."""
        first = self._first(site.path)
        leaves = self.padded(site, first.config.init(site, rng))
        sizes = first.config.padding(site)
        leaves |= {SIZE + name: torch.tensor(float(sizes[name].size)) for name in self._unlike(site)}
        return leaves | ({"present": torch.ones(())} if self._lacking(site.path) else {})

    def shared(self, sites: tuple[Site, ...], rng: torch.Generator) -> dict[str, Tensor]:
        leaves = {name: torch.tensor(float(getattr(self.origins[0].config, name))) for name in self.varying}
        return super().shared(sites, rng) | leaves | {"source": torch.zeros(())}

    def constants(self, site: Site) -> tuple[str, ...]:
        present = ("present",) if self._lacking(site.path) else ()
        unlike = tuple(SIZE + name for name in self._unlike(site))
        return (*super().constants(site), *unlike, *present, "source", *self.varying)

    def check(self, site: Site) -> str | None:
        own = (origin.config.check(site) for origin in self.origins if origin.at(site.path))
        return next((why for why in own if why is not None), None)

    def present(self, p: Mapping[str, Tensor]) -> Tensor | None:
        return p.get("present")

    # -- a member's functions --------------------------------------------------------------------------------------

    def own(self, site: Site, p: dict[str, Tensor]) -> dict[str, Tensor]:
        """The method's own leaves, masked beyond the member's sizes, and all of them where it has no delta."""
        found = {leaf: t for leaf, t in p.items() if leaf not in OWN_LEAVES and not leaf.startswith(SIZE)}
        if "present" in p:
            found = {leaf: harmless(p, t) for leaf, t in found.items()}
        if any(leaf.startswith(SIZE) for leaf in p):
            for name, paddable in self.padding(site).items():
                if SIZE + name in p:
                    for leaf, axis in paddable.axes.items():
                        found[leaf] = masked(found[leaf], axis, p[SIZE + name], paddable.pieces.get(leaf, 1))
        return found

    def padded(self, site: Site, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """``leaves`` of one member, as long as the largest origin's by zeros."""
        found = dict(leaves)
        for name, paddable in self.padding(site).items():
            for leaf, axis in paddable.axes.items():
                found[leaf] = longer(found[leaf], axis, self._sizes(site)[name][1], paddable.pieces.get(leaf, 1))
        return found

    # -- what origins have -----------------------------------------------------------------------------------------

    def _first(self, path: str) -> Origin:
        return next((origin for origin in self.origins if origin.at(path)), self.origins[0])

    def _lacking(self, path: str) -> bool:
        """Whether some member has no delta at ``path``."""
        return self.optional or not all(origin.at(path) for origin in self.origins)

    def _unlike(self, site: Site) -> list[str]:
        """The paddable sizes at ``site`` in which origins differ."""
        return [name for name, (least, most) in self._sizes(site).items() if least != most]

    def _sizes(self, site: Site) -> dict[str, tuple[int, int]]:
        """The least and the most of every paddable size among the origins at ``site``."""
        key = (site.path, site.in_features, site.out_features)
        if key not in self._known:
            found: dict[str, tuple[int, int]] = {}
            for origin in self.origins:
                for name, paddable in origin.config.padding(site).items() if origin.at(site.path) else ():
                    least, most = found.get(name, (paddable.size, paddable.size))
                    found[name] = min(least, paddable.size), max(most, paddable.size)
            self._known[key] = found
        return self._known[key]

    @functools.cached_property
    def _known(self) -> dict[Any, dict[str, tuple[int, int]]]:
        return {}

    @functools.cached_property
    def varying(self) -> tuple[str, ...]:
        """The fields in which origins differ and that the method takes from leaves."""
        return tuple(
            name for name in self.as_leaves if len({getattr(origin.config, name) for origin in self.origins}) > 1
        )


@functools.cache
def packed_class(method: type[BaseDeltaConfig]) -> type[Packed]:
    """The packed config class of ``method``: the same functions on masked leaves, without effect where absent.

    >>> packed_class(fd.LoraConfig).delta_type, issubclass(packed_class(fd.LoraConfig), fd.LoraConfig)
    ('packed.lora', True)
    """
    functions: dict[str, Any] = {}

    def give(function: Any) -> None:
        if method.gives(function.__name__):
            functions[function.__name__] = function

    # Typed as they are used: the class that they become part of is of both kinds.
    of_method: Any = method

    @give
    def before(self: Packed, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return where_present(p, of_method.before(self, site, self.own(site, p), one_way(p, x)), x)

    @give
    def after(self: Packed, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return where_present(p, of_method.after(self, site, self.own(site, p), one_way(p, y), one_way(p, x)), y)

    @give
    def weights(self: Packed, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        # Not one_way: that would be n copies of every tensor here, those too that the method leaves as they are.
        changed = of_method.weights(self, site, self.own(site, p), w)
        if "present" not in p:
            return changed
        # A tensor that the module does not have, such as a bias, is as if it were zero.
        olds = {name: w[name] if name in w else torch.zeros_like(tensor) for name, tensor in changed.items()}
        return {
            name: tensor if tensor is olds[name] else where_present(p, tensor, olds[name])
            for name, tensor in changed.items()
        }

    @give
    def attend(self: Packed, site: Site, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return of_method.attend(self, site, self.own(site, p))

    @give
    def prompt(self: Packed, site: Site, p: dict[str, Tensor]) -> Tensor:
        return of_method.prompt(self, site, self.own(site, p))

    @give
    def fill(self: Packed, site: Site, leaves: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
        return leaves | self.padded(site, of_method.fill(self._first(site.path).config, site, leaves, module))

    @give
    def expand(self: Packed, sites: tuple[Site, ...], p: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        passed = {leaf: p[leaf] for leaf in ("source", *self.varying)}
        written = {leaf: tensor for leaf, tensor in p.items() if leaf not in passed}
        # A member without the delta at any site: its source says so, for present is known site by site.
        here = {"present": p["source"] + 1}
        written = {leaf: harmless(here, tensor) for leaf, tensor in written.items()}
        found = of_method.expand(self, sites, written) if written else {site.path: {} for site in sites}
        return {path: leaves | passed for path, leaves in found.items()}

    made = type(f"Packed{method.__name__}", (Packed, method), {"__module__": __name__, **functions})
    made.delta_type = PACKED + method.delta_type if method.delta_type else ""
    made.method = method
    return dataclass(frozen=True)(made)


DERIVED[PACKED.removesuffix(".")] = packed_class


def _made_again(method: type[BaseDeltaConfig], fields: dict[str, Any]) -> Packed:
    return packed_class(method)(**fields)


def where_present(p: Mapping[str, Tensor], new: Tensor, old: Tensor) -> Tensor:
    """``new`` for a member that has the delta, else ``old``.

    >>> where_present({"present": torch.tensor(0.0)}, torch.ones(1), torch.zeros(1))
    tensor([0.])
    """
    return torch.where(p["present"] > 0, new, old) if "present" in p else new


def harmless(p: Mapping[str, Tensor], leaf: Tensor) -> Tensor:
    """``leaf``; of a member without the delta its finite numbers, to which no gradient comes back.

    >>> harmless({"present": torch.tensor(0.0)}, torch.tensor([2.0, torch.nan]))
    tensor([2., 0.])
    """
    return torch.where(p["present"] > 0, leaf, leaf.detach().nan_to_num(0.0, 0.0, 0.0))


def one_way(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``x``, to which no gradient comes back from the function of a member without the delta.

    >>> one_way({"present": torch.tensor(0.0)}, torch.tensor(1.0))
    tensor(1.)
    """
    return torch.where(p["present"] > 0, x, x.detach()) if "present" in p and x.is_floating_point() else x


def masked(leaf: Tensor, axis: int, size: Tensor, pieces: int = 1) -> Tensor:
    """``leaf`` with zeros after the first ``size`` of each of ``pieces`` pieces of ``axis`` (counted from the last).

    Raises ``ConfigError`` where the dtype of ``size`` has no such whole numbers.

    >>> masked(torch.ones(6), -1, torch.tensor(2.0), pieces=2)
    tensor([1., 1., 0., 1., 1., 0.])
    """
    length = leaf.shape[axis]
    if length * torch.finfo(size.dtype).eps > 2:
        raise ConfigError(f"{size.dtype} cannot count to {length}: keep the leaves called size.… in float32.")
    at = torch.arange(length, device=leaf.device) % (length // pieces)
    return torch.where(at.view(-1, *[1] * (-axis - 1)) < size, leaf, leaf.new_zeros(()))


def longer(leaf: Tensor, axis: int, size: int, pieces: int = 1) -> Tensor:
    """``leaf`` with every piece of ``axis`` filled up with zeros to ``size``.

    >>> longer(torch.ones(2), -1, 2, pieces=2)
    tensor([1., 0., 1., 0.])
    """
    missing = size - leaf.shape[axis] // pieces
    if missing == 0:
        return leaf
    apart = leaf.unflatten(axis, (pieces, -1))
    return nn.functional.pad(apart, [*[0, 0] * (-axis - 1), 0, missing]).flatten(axis - 1, axis)


def shorter(leaf: Tensor, axis: int, size: int, pieces: int = 1) -> Tensor:
    """The inverse of :func:`longer`: the first ``size`` of every piece.

    >>> shorter(torch.tensor([1.0, 0.0, 1.0, 0.0]), -1, 1, pieces=2)
    tensor([1., 1.])
    """
    if leaf.shape[axis] == size * pieces:
        return leaf
    return leaf.unflatten(axis, (pieces, -1)).narrow(axis, 0, size).flatten(axis - 1, axis)
