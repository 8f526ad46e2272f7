"""One config for members of different configs, around any method: ``f(mask · p)`` where the member has the delta.

A *packed* config holds the configs that its members came with, its *origins*, and acts like the first of them. Beside
the method's leaves a member has constants: ``source``, its origin's number (-1: none); ``size.<name>`` at sites where
members differ in the size of the axes with that name; and ``present`` at sites where some members have no delta.
Entries beyond the member's size are masked before the method's functions see them. For a member without the delta, the
function's output is replaced by the site's own. So neither has a gradient, and no optimiser can make them matter. A
mask on the output alone would not do: in a backward pass 0 times NaN is NaN. Therefore the inputs of the functions are
replaced as well, by finite numbers through which no gradient flows back.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..methods.acts import Acts, Attention, on_leaves
from ..methods.config import AutoDeltaConfig, BaseDeltaConfig, register
from ..methods.leaf import Growing, Leaf, Leaves, as_leaves, growing
from ..methods.own import Own
from ..methods.site import Site

SIZE = "size."
OWN_LEAVES = ("present", "source")


@dataclass(frozen=True)
class Origin:
    """Where members of a packed delta came from: their config, and where it acted.

    Attributes:
        config: the config as it was, with its own name and its own names of sites.
        sites: the paths of its sites; ``None`` for all of the packed delta's.
        name: the name of its delta.
        stack: the number of the stack that the members came in, so that they are unpacked as one stack.

    >>> Origin(fd.LoraConfig(lora_r=2), ("0",)).to_dict()
    {'config': {'delta_type': 'lora', 'lora_r': 2}, 'sites': ['0'], 'stack': None, 'name': ''}
    """

    config: BaseDeltaConfig
    sites: tuple[str, ...] | None = None
    stack: int | None = None
    name: str = ""

    def at(self, path: str) -> bool:
        """Whether its members have the delta at ``path``."""
        return self.sites is None or path in self.sites

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        sites = None if self.sites is None else list(self.sites)
        return {"config": self.config.to_diff_dict(), "sites": sites, "stack": self.stack, "name": self.name}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Origin:
        """The origin that :meth:`to_dict` describes."""
        sites = data.get("sites")
        config = AutoDeltaConfig.from_dict(data["config"])
        return cls(config, None if sites is None else tuple(sites), data.get("stack"), data.get("name", ""))


@register("packed")
@dataclass(frozen=True)
class Packed(BaseDeltaConfig):
    """The config that :func:`funcdelta.pack` makes of configs that share a slot and agree in all that a call reads.

    Attributes:
        origins: the configs that members came with; a member's ``source`` is an index into them.
        optional: whether some members have none of them.
    """

    composed: ClassVar[bool] = True

    origins: tuple[Origin, ...] = field(default=(), repr=False)
    optional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        origins = tuple(one if isinstance(one, Origin) else Origin.from_dict(one) for one in self.origins)
        if not origins:
            raise ConfigError(f"{type(self).__name__} needs origins. Do not write it yourself: fd.pack makes it.")
        object.__setattr__(self, "origins", origins)

    @property
    def method(self) -> BaseDeltaConfig:
        """The config whose functions all members share."""
        return self.origins[0].config

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "origins": [origin.to_dict() for origin in self.origins]}

    # -- passed on to the method -----------------------------------------------------------------------------------

    def gives(self, function: str) -> bool:
        return self.method.gives(function)

    def default_names(self) -> tuple[str, ...]:
        return self.method.default_names()

    def seed_name(self, name: str) -> str:
        return self.origins[0].name or name

    def takes_tensors(self) -> bool:
        return self.method.takes_tensors()

    def takes_parts(self) -> bool:
        return self.method.takes_parts()

    def spans(self, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        return self.method.spans(names)

    def own_sites(self, backbone: nn.Module) -> list[str] | None:
        return self.method.own_sites(backbone)

    def describe(self, site: Site, module: nn.Module) -> Site:
        return self.method.describe(site, module)

    def spread(self, path: str, module: nn.Module) -> Iterator[str]:
        return self.method.spread(path, module)

    def check(self, site: Site) -> str | None:
        own = (origin.config.check(site) for origin in self.origins if origin.at(site.address))
        return next((why for why in own if why is not None), None)

    def baked(self) -> Self:
        origins = tuple(dataclasses.replace(origin, config=origin.config.baked()) for origin in self.origins)
        return self.replace(origins=origins)

    # -- a member's leaves -----------------------------------------------------------------------------------------

    def leaves(self, site: Site, own: Own, rng: torch.Generator) -> Leaves:
        """The leaves of the first origin at ``site``, padded to the largest origin's size, with the constants."""
        here = [origin for origin in self.origins if origin.at(site.address)] or [self.origins[0]]
        # Only the first one draws from rng, as it would alone; of the others only the sizes are used.
        drawn = [as_leaves(origin.config.leaves(site, own, rng), "init") for origin in here[:1]]
        drawn += [
            as_leaves(origin.config.leaves(site, own, torch.Generator().manual_seed(0)), "init") for origin in here[1:]
        ]
        first = drawn[0]
        refuse_kept(first, type(self.method).__name__)
        member = {leaf: one for leaf, one in first.items() if one.of == "member"}
        shapes = [{name: tuple(leaf.value.shape) for name, leaf in each.items()} for each in drawn]
        found = dict(first)
        for name, axes in growing({leaf: one.axes for leaf, one in member.items()}).items():
            sizes = [axes.size(each) for each in shapes]
            for leaf, axis in axes.axes.items():
                longest = longer(found[leaf].value, axis, max(sizes), axes.pieces[leaf])
                found[leaf] = found[leaf]._replace(value=longest)
            if min(sizes) != max(sizes):
                found[SIZE + name] = Leaf(torch.tensor(float(sizes[0])), trains=False)
        return found | ({"present": Leaf(torch.ones(()), trains=False)} if self._lacking(site.address) else {})

    def shared_leaves(self, sites: tuple[Site, ...], own: Mapping[str, Own], rng: torch.Generator) -> Leaves:
        varying = {name: float(getattr(self.method, name)) for name in self.varying} | {"source": 0.0}
        constants = {name: Leaf(torch.tensor(value), trains=False) for name, value in varying.items()}
        here = tuple(site for site in sites if self.origins[0].at(site.address))
        given = self.method.shared_leaves(here, own, rng)
        refuse_kept(given, type(self.method).__name__)
        return {**given, **constants}

    def expand(self, sites: tuple[Site, ...], p: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        passed = {leaf: p[leaf] for leaf in ("source", *self.varying)}
        written = {leaf: tensor for leaf, tensor in p.items() if leaf not in passed}
        # present is a leaf of a site; a member without the delta at any site is known by its source.
        here = {"present": p["source"] + 1}
        written = {leaf: harmless(here, tensor) for leaf, tensor in written.items()}
        found = self.method.expand(sites, written) if written else {site.address: {} for site in sites}
        return {path: leaves | passed for path, leaves in found.items()}

    # -- a member's functions --------------------------------------------------------------------------------------

    def acts(self, site: Site) -> Acts:
        axes = growing(dict(site.axes))
        acts = on_leaves(self.method.acts(site), functools.partial(members_own, axes))
        before, after, weights, around = acts.before, acts.after, acts.weights, acts.around

        def packed_weights(p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
            assert weights is not None
            # No one_way here: it would make n copies of every tensor, also of those that the method leaves alone.
            changed = weights(p, w)
            if "present" not in p:
                return changed
            # A tensor that the module lacks, such as a bias, counts as zero.
            olds = {name: w[name] if name in w else torch.zeros_like(tensor) for name, tensor in changed.items()}
            return {
                name: tensor if tensor is olds[name] else where_present(p, tensor, olds[name])
                for name, tensor in changed.items()
            }

        def packed_around(p: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, run: Attention) -> Tensor:
            assert around is not None
            if "present" not in p:
                return around(p, q, k, v, run)
            own, given = run(q, k, v), (one_way(p, q), one_way(p, k), one_way(p, v))

            def from_here(*values: Tensor) -> Tensor:
                same = all(value is one for value, one in zip(values, given, strict=True))
                return one_way(p, own if same else run(*values))

            return where_present(p, around(p, *given, from_here), own)

        return dataclasses.replace(
            acts,
            around=around and packed_around,
            before=before and (lambda p, x: where_present(p, before(p, one_way(p, x)), x)),
            after=after and (lambda p, y, x: where_present(p, after(p, one_way(p, y), one_way(p, x)), y)),
            weights=weights and packed_weights,
            factors=None,
            present=lambda p: p.get("present"),
        )

    # -- how origins differ ----------------------------------------------------------------------------------------

    def _lacking(self, path: str) -> bool:
        """Whether some member has no delta at ``path``."""
        return self.optional or not all(origin.at(path) for origin in self.origins)

    @property
    def varying(self) -> tuple[str, ...]:
        """The fields that the method takes from leaves and in which origins differ."""
        method = self.method
        return tuple(
            name for name in method.as_leaves if len({getattr(origin.config, name) for origin in self.origins}) > 1
        )


def refuse_kept(leaves: Iterable[str], who: str) -> None:
    """Raise ``ConfigError`` if a method's leaf has the name of one of the constants that packing adds.

    >>> refuse_kept(["lora_A", "size.lora_A"], "MyConfig")
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: MyConfig has a leaf 'size.lora_A', but packed deltas reserve 'present', 'source' ...
    """
    taken = next((leaf for leaf in leaves if leaf in OWN_LEAVES or leaf.startswith(SIZE)), None)
    if taken is not None:
        raise ConfigError(
            f"{who} has a leaf {taken!r}, but packed deltas reserve 'present', 'source' and names that begin with "
            f"'{SIZE}'. Rename the leaf, or the part of a composition."
        )


def members_own(axes: Mapping[str, Growing], p: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The method's own leaves, masked beyond the member's sizes, and :func:`harmless` if it has no delta.

    >>> axes = growing({"lora_B": ". rank"})
    >>> members_own(axes, {"lora_B": torch.ones(1, 2), "size.rank": torch.tensor(1.0), "source": torch.tensor(0.0)})
    {'lora_B': tensor([[1., 0.]])}
    """
    found = {leaf: t for leaf, t in p.items() if leaf not in OWN_LEAVES and not leaf.startswith(SIZE)}
    if "present" in p:
        found = {leaf: harmless(p, t) for leaf, t in found.items()}
    if any(leaf.startswith(SIZE) for leaf in p):
        for name, own in axes.items():
            for leaf, axis in own.axes.items() if SIZE + name in p else ():
                found[leaf] = masked(found[leaf], axis, p[SIZE + name], own.pieces[leaf])
    return found


def where_present(p: Mapping[str, Tensor], new: Tensor, old: Tensor) -> Tensor:
    """``new`` for a member that has the delta, else ``old``.

    >>> where_present({"present": torch.tensor(0.0)}, torch.ones(1), torch.zeros(1))
    tensor([0.])
    """
    return torch.where(p["present"] > 0, new, old) if "present" in p else new


def harmless(p: Mapping[str, Tensor], leaf: Tensor) -> Tensor:
    """``leaf``, or for a member without the delta its finite numbers, detached.

    >>> harmless({"present": torch.tensor(0.0)}, torch.tensor([2.0, torch.nan]))
    tensor([2., 0.])
    """
    return torch.where(p["present"] > 0, leaf, leaf.detach().nan_to_num(0.0, 0.0, 0.0))


def one_way(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """``x``, detached for a member without the delta.

    >>> x = torch.tensor(1.0, requires_grad=True)
    >>> torch.autograd.grad(3 * one_way({"present": torch.tensor(0.0)}, x), x)
    (tensor(0.),)
    """
    return torch.where(p["present"] > 0, x, x.detach()) if "present" in p and x.is_floating_point() else x


def masked(leaf: Tensor, axis: int, size: Tensor, pieces: int = 1) -> Tensor:
    """``leaf`` with zeros after the first ``size`` entries of each of ``pieces`` pieces of ``axis``, a negative number.

    Raises ``ConfigError`` if the dtype of ``size`` cannot represent such sizes exactly.

    >>> masked(torch.ones(6), -1, torch.tensor(2.0), pieces=2)
    tensor([1., 1., 0., 1., 1., 0.])
    """
    length = leaf.shape[axis]
    if length * torch.finfo(size.dtype).eps > 2:
        raise ConfigError(f"{size.dtype} cannot count to {length}; keep the leaves called size.… in float32.")
    at = torch.arange(length, device=leaf.device) % (length // pieces)
    return torch.where(at.view(-1, *[1] * (-axis - 1)) < size, leaf, leaf.new_zeros(()))


def longer(leaf: Tensor, axis: int, size: int, pieces: int = 1) -> Tensor:
    """``leaf`` with every one of ``pieces`` pieces of ``axis`` padded with zeros to ``size``.

    >>> longer(torch.ones(2), -1, 2, pieces=2)
    tensor([1., 0., 1., 0.])
    """
    missing = size - leaf.shape[axis] // pieces
    if missing == 0:
        return leaf
    apart = leaf.unflatten(axis, (pieces, -1))
    return nn.functional.pad(apart, [*[0, 0] * (-axis - 1), 0, missing]).flatten(axis - 1, axis)


def shorter(leaf: Tensor, axis: int, size: int, pieces: int = 1) -> Tensor:
    """The inverse of :func:`longer`: the first ``size`` entries of every piece.

    >>> shorter(torch.tensor([1.0, 0.0, 1.0, 0.0]), -1, 1, pieces=2)
    tensor([1., 1.])
    """
    if leaf.shape[axis] == size * pieces:
        return leaf
    return leaf.unflatten(axis, (pieces, -1)).narrow(axis, 0, size).flatten(axis - 1, axis)
