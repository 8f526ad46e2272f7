"""Compositions of methods at one site: one after another, side by side, averaged, or mixed by a gate.

``chain`` hands what one part gives to the next. The others let every part see what the site itself gave, and add up the
changes ``dᵢ = partᵢ(y, x) - y``: ``parallel`` gives ``y + Σ dᵢ``, ``average`` ``y + Σ cᵢ dᵢ`` with constant c, and
``mixture`` ``y + Σ gᵢ dᵢ`` with gates g = softmax(…) that train.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional.tokenwise import linear
from .acts import Acts, Attention, Params, depends_on_call
from .composition import Composition
from .config import BaseDeltaConfig, register
from .leaf import Leaf, Leaves
from .own import Own
from .site import Site

GATES = ("call", "token")


@register("chain")
@dataclass(frozen=True)
class ChainConfig(Composition):
    """``partₖ(… part₁(y))``: each part gets what the one before it gave.

    >>> backbone, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(2, 4)
    >>> parts = fd.LoraConfig(lora_r=1), fd.AdapterConfig(bottleneck_dim=2)
    >>> chained = fd.DeltaModel(backbone, fd.methods.ChainConfig(parts=parts, modified_modules=["0"]))
    >>> params = fd.tree.map(torch.rand_like, chained.init(0))
    >>> beside = fd.DeltaModel(backbone, *(part.replace(modified_modules=["0"]) for part in parts))
    >>> renamed = {name.replace("0.chain.", "0."): leaf for name, leaf in params.items()}
    >>> torch.equal(chained.apply(params, x), beside.apply(renamed, x))
    True
    """

    default_name: ClassVar[str] = "chain"

    def check(self, site: Site) -> str | None:
        refusal = super().check(site)
        parts = list(self.parts_at(site).items())
        changed = next((i for i, (_, acts) in enumerate(parts) if acts.weights is not None), len(parts))
        reading = next((name for name, acts in parts[changed + 1 :] if acts.reads), None)
        if refusal is not None or reading is None:
            return refusal
        return f"its part {reading} reads the site's own tensors, and the parts before it change them: put it first"

    def acts(self, site: Site) -> Acts:
        parts = list(self.parts_at(site).values())
        befores = [one.before for one in parts if one.before is not None]
        afters = [one.after for one in parts if one.after is not None]
        arounds = [one.around for one in parts if one.around is not None]
        rewrites = [one.weights for one in parts if one.weights is not None]

        def before(p: Params, x: Tensor) -> Tensor:
            return functools.reduce(lambda value, act: act(p, value), befores, x)

        def after(p: Params, y: Tensor, x: Tensor) -> Tensor:
            return functools.reduce(lambda value, act: act(p, value, x), afters, y)

        def weights(p: Params, w: Params) -> Params:
            return functools.reduce(lambda tensors, act: act(p, tensors), rewrites, w)

        def around(p: Params, q: Tensor, k: Tensor, v: Tensor, run: Attention) -> Tensor:
            return functools.reduce(functools.partial(_inside, p), arounds, run)(q, k, v)

        given = before if befores else None, after if afters else None, around if arounds else None
        return _whole(self, parts, *given, weights)


def _inside(p: Params, run: Attention, act: Callable[..., Tensor]) -> Attention:
    """``act`` around ``run``, as an attention that another method may wrap."""
    return lambda q, k, v: act(p, q, k, v, run)


class Summed(Composition):
    """The base of compositions that add up their parts' changes, each times a share."""

    def shares_of(self, site: Site, p: Params, y: Tensor | None) -> Sequence[Tensor | float]:
        """What each part's change is multiplied by; ``y`` is the site's output, ``None`` for its weights."""
        raise ConfigError(f"{type(self).__name__} gives no shares_of(self, site, p, y).")

    def acts(self, site: Site) -> Acts:
        parts = list(self.parts_at(site).values())

        def before(p: Params, x: Tensor) -> Tensor:
            found = x
            for one, share in zip(parts, self.shares_of(site, p, None), strict=True):
                given = x if one.before is None else one.before(p, x)
                found = found if given is x else found + share * (given - x)
            return found

        def after(p: Params, y: Tensor, x: Tensor) -> Tensor:
            found = y
            for one, share in zip(parts, self.shares_of(site, p, y), strict=True):
                found = found if one.after is None else found + share * (one.after(p, y, x) - y)
            return found

        def weights(p: Params, w: Params) -> Params:
            found = dict(w)
            for one, share in zip(parts, self.shares_of(site, p, None), strict=True):
                assert one.weights is not None
                for name, tensor in one.weights(p, dict(w)).items():
                    old = w[name] if name in w else torch.zeros_like(tensor)
                    if tensor is not old:
                        found[name] = found.get(name, torch.zeros_like(tensor)) + share * (tensor - old)
            return found

        def around(p: Params, q: Tensor, k: Tensor, v: Tensor, run: Attention) -> Tensor:
            own = found = run(q, k, v)
            for one, share in zip(parts, self.shares_of(site, p, None), strict=True):
                found = found if one.around is None else found + share * (one.around(p, q, k, v, run) - own)
            return found

        befores, afters, arounds = (
            any(getattr(one, act) is not None for one in parts) for act in ("before", "after", "around")
        )
        given = before if befores else None, after if afters else None, around if arounds else None
        return _whole(self, parts, *given, weights)


@register("parallel")
@dataclass(frozen=True)
class ParallelConfig(Summed):
    """``y + Σ (partᵢ(y, x) - y)``: every part sees what the site itself gave, and their changes add up.

    >>> config = fd.parallel(fd.LoraConfig(lora_r=2), fd.LoraConfig(lora_r=4), modified_modules=["0"])
    >>> delta = fd.DeltaModel(torch.nn.Sequential(torch.nn.Linear(3, 5)), config)
    >>> [delta.shapes[name] for name in delta.names if name.endswith("lora_A")]
    [(2, 3), (4, 3)]
    """

    default_name: ClassVar[str] = "parallel"

    def shares_of(self, site: Site, p: Params, y: Tensor | None) -> Sequence[Tensor | float]:
        return [1.0] * len(self.parts)


@register("average")
@dataclass(frozen=True)
class AverageConfig(Summed):
    """``y + Σ cᵢ (partᵢ(y, x) - y)`` with constant shares c, ``1 / k`` of k parts unless they are given.

    Attributes:
        shares: one number a part; they need not add up to 1.

    >>> config = fd.average(fd.LoraConfig(), fd.LoraConfig(), shares=(0.75, 0.25), modified_modules=["0"])
    >>> fd.DeltaModel(torch.nn.Sequential(torch.nn.Linear(3, 5)), config).init(0)["0.average.shares"]
    tensor([0.7500, 0.2500])
    """

    default_name: ClassVar[str] = "average"
    in_leaves: ClassVar[tuple[str, ...]] = ("parts", "shares")

    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.shares
        if given is None:
            return
        if not isinstance(given, tuple) or len(given) != len(self.parts) or not all(map(_is_number, given)):
            raise ConfigError(f"shares={given!r}: write one number for each of the {len(self.parts)} parts.")

    def leaves(self, site: Site, own: Own, rng: torch.Generator) -> Leaves:
        count = len(self.parts)
        shares = torch.tensor([float(c) for c in self.shares or [1 / count] * count])
        return {**super().leaves(site, own, rng), "shares": Leaf(shares, trains=False)}

    def shares_of(self, site: Site, p: Params, y: Tensor | None) -> Sequence[Tensor | float]:
        return p["shares"].split(1, -1)


@register("mixture")
@dataclass(frozen=True)
class MixtureConfig(Summed):
    """``y + Σ gᵢ (partᵢ(y, x) - y)`` with trained gates g = softmax(…), which start equal.

    With ``gate="call"`` a member has one gate a part, ``g = softmax(b)``, and can be merged where its parts can. With
    ``"token"`` each token has its own, ``g = softmax(G y + b)``, from what the site itself gives there. Parts that act
    before the site are mixed by ``softmax(b)``.

    Leaves: ``gate.bias`` b (k) and, by token, ``gate.weight`` G (k, width).

    Attributes:
        gate: ``"call"`` or ``"token"``.

    >>> config = fd.mixture(fd.LoraConfig(lora_r=2), fd.AdapterConfig(), gate="token", modified_modules=["0"])
    >>> delta = fd.DeltaModel(torch.nn.Sequential(torch.nn.Linear(3, 5)), config)
    >>> delta.shapes["0.mixture.gate.weight"], delta.shapes["0.mixture.gate.bias"]
    ((2, 5), (2,))
    """

    default_name: ClassVar[str] = "mixture"

    gate: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in GATES:
            raise ConfigError(f'gate={self.gate!r}: write "call" or "token".')
        if "gate" in self.named:
            raise ConfigError('A part of fd.mixture is called "gate", as its own leaves are: give it another name=.')

    def leaves(self, site: Site, own: Own, rng: torch.Generator) -> Leaves:
        count = len(self.parts)
        gates = {"gate.bias": torch.zeros(count)}
        if self.gate == "token":
            gates["gate.weight"] = torch.zeros(count, site.width)
        return {**super().leaves(site, own, rng), **gates}

    def shares_of(self, site: Site, p: Params, y: Tensor | None) -> Sequence[Tensor | float]:
        if self.gate == "call" or y is None:
            return p["gate.bias"].softmax(-1).split(1, -1)
        axis = site.features_axis(y)
        gates = linear(y.movedim(axis, -1), p["gate.weight"], p["gate.bias"]).softmax(-1)
        return [one.movedim(-1, axis) for one in gates.split(1, -1)]

    def check(self, site: Site) -> str | None:
        refusal = super().check(site)
        around = next((name for name, acts in self.parts_at(site).items() if acts.around is not None), None)
        if refusal is not None or around is None or self.gate == "call":
            return refusal
        return f'its part {around} wraps attention, where gates cannot be set by each token: write gate="call"'

    def acts(self, site: Site) -> Acts:
        acts = super().acts(site)
        if self.gate == "call":
            return acts
        why = "its gates differ from token to token, which no weight of the site computes"
        # A gate takes a token's features together, so these have to come last where tokens come in one axis.
        together = acts.tokenwise and site.channel_axis == -1
        return dataclasses.replace(acts, weights=None, unmergeable=why, tokenwise=together)


def _whole(
    config: Composition,
    parts: Sequence[Acts],
    before: Callable[[Params, Tensor], Tensor] | None,
    after: Callable[[Params, Tensor, Tensor], Tensor] | None,
    around: Callable[[Params, Tensor, Tensor, Tensor, Attention], Tensor] | None,
    weights: Callable[[Params, Params], Params],
) -> Acts:
    """What the parts do together, and what holds of all of them."""
    names = list(config.named)
    told = [(name, one.unmergeable or _no_weights(one)) for name, one in zip(names, parts, strict=True)]
    why = next((f"its part {name}: {one}" for name, one in told if one is not None), None)
    return Acts(
        before=before,
        after=after,
        around=around,
        weights=weights if all(one.weights is not None for one in parts) else None,
        tokenwise=all(one.tokenwise for one in parts),
        # One part that acts by weights alone makes all of them act so.
        exact=all(one.by_values and one.exact for one in parts),
        unmergeable=why or depends_on_call(config.conditions),
        reads=tuple(dict.fromkeys(name for one in parts for name in one.reads)),
        conditions=tuple(dict.fromkeys([*config.conditions, *(name for one in parts for name in one.conditions)])),
        unfactored="it is a composition of methods; fd.algebra.materialise gives its change of every weight",
    )


def _is_number(share: Any) -> bool:
    return isinstance(share, (int, float)) and math.isfinite(share)


def _no_weights(acts: Acts) -> str | None:
    return "it has no weights form" if acts.weights is None else None


def chain(*parts: BaseDeltaConfig, **fields: Any) -> ChainConfig:
    """The config in which each part gets what the one before it gave; ``fields`` are those of every config.

    >>> fd.chain(fd.LoraConfig(), fd.AdapterConfig(), modified_modules=["ff@.w2@"]).delta_type
    'chain'
    """
    return ChainConfig(parts=parts, **fields)


def parallel(*parts: BaseDeltaConfig, **fields: Any) -> ParallelConfig:
    """The config in which every part sees the site's own output, and their changes add up.

    >>> len(fd.parallel(fd.LoraConfig(), fd.LoraConfig(), modified_modules=["attn@.q@"]).parts)
    2
    """
    return ParallelConfig(parts=parts, **fields)


def average(*parts: BaseDeltaConfig, shares: Sequence[float] | None = None, **fields: Any) -> AverageConfig:
    """The config that adds the parts' changes, each times its share, ``1 / k`` unless ``shares`` are given.

    >>> fd.average(fd.LoraConfig(), fd.LoraConfig(), modified_modules=["attn@.q@"]).shares is None
    True
    """
    return AverageConfig(parts=parts, shares=tuple(shares) if isinstance(shares, Sequence) else shares, **fields)


def mixture(*parts: BaseDeltaConfig, gate: str = "token", **fields: Any) -> MixtureConfig:
    """The config that adds the parts' changes, each times a trained gate: one a ``"call"``, or one a ``"token"``.

    >>> fd.mixture(fd.LoraConfig(), fd.AdapterConfig(), gate="call", modified_modules=["ff@.w2@"]).gate
    'call'
    """
    return MixtureConfig(parts=parts, gate=gate, **fields)


__all__ = ["AverageConfig", "ChainConfig", "MixtureConfig", "ParallelConfig", "average", "chain", "mixture", "parallel"]
