"""Converts a (delta, params) pair to the factors of its change at every site, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MergeError, ParamsError
from ..methods.config import BaseDeltaConfig
from ..model import DeltaModel
from ..packing.packed import Packed
from ..packing.slots import exactly
from ..plan.attachment import Attachment
from ..plan.sharing import expand_member, expand_stack
from ..run.checked import checks_of
from ..transforms import outside_transforms
from ..trees.constants import still

Factors = tuple[Tensor, Tensor]
"""``(B, A)`` with ΔW = B A: (..., rows, r) and (..., r, columns)."""


@dataclass(frozen=True)
class Factored:
    """The changes that one member, or each of n, makes to the weights.

    Attributes:
        delta: the delta whose backbone and mode a result gets.
        base: the config that a result is made from.
        n: the number of members of a stack; ``None`` for one member.
        sites: ``{site path: {own name: (B, A)}}``.
        trained: ``{name: p - w}`` of trained backbone leaves.
    """

    delta: DeltaModel
    base: BaseDeltaConfig
    n: int | None
    sites: dict[str, dict[str, Factors]]
    trained: dict[str, Tensor]


def is_stack(delta: DeltaModel, params: Any) -> bool:
    """Whether ``params`` is a stack; raises ``ParamsError`` unless every leaf is known and has its shape.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> is_stack(delta, delta.init(0)), is_stack(delta, delta.init(0, n=2))
    (False, True)
    """
    if not isinstance(delta, DeltaModel):
        raise ParamsError(f"fd.algebra takes a delta and its params; found {type(delta).__name__} for the delta.")
    return checks_of(delta).is_stack(params)


def read(delta: DeltaModel, params: Mapping[str, Tensor]) -> Factored:
    """The factors of ``params``; raises ``MergeError`` if a method has none.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> [tuple(factor.shape) for factor in read(delta, delta.init(0)).sites["0"]["weight"]]
    [(8, 2), (2, 4)]
    """
    stacked = is_stack(delta, params)
    missing = [name for name in delta.names if name not in params]
    if missing:
        raise ParamsError(f"params lack {len(missing)} leaves of the delta, first {missing[0]!r}. Pass all of them.")
    attachments = need_factors(delta)
    still = {name: leaf.detach() if name in delta.constants else leaf for name, leaf in params.items()}
    full = (expand_stack if stacked else expand_member)(delta.plan.shared, still)
    sites: dict[str, dict[str, Factors]] = {}
    for a in attachments:
        own = sites.setdefault(a.site.path, {})
        for name, factors in factors_of(a, a.of(full), stacked).items():
            own[name] = beside(own[name], factors) if name in own else factors
    parameters = dict(delta.backbone.named_parameters())
    trained = {name: full[name] - parameters[name].detach().to(full[name]) for name in delta.plan.trained}
    n = next(iter(params.values())).shape[0] if stacked else None
    return Factored(delta, attachments[0].config, n, sites, trained)


def need_factors(delta: DeltaModel) -> list[Attachment]:
    """Every attachment of ``delta``; raises ``MergeError`` unless each has factors."""
    for config in delta.configs:
        if isinstance(config, Packed):
            raise MergeError(
                "This delta was made by fd.pack, and its members may differ in ranks or sites: write "
                "fd.algebra.sum_exact(fd.unpack(delta, stack)), or use the pairs of fd.unpack one by one."
            )
    for a in delta.plan.all():
        reason = unfactored(a)
        if reason:
            raise MergeError(
                f"{a.name} at {a.site.path} has no change ΔW = B A of a weight: {reason}. Use fd.tree to add or "
                f"average its leaves (factor space), or combine outputs: delta.apply_many(stack, ...).mean(0)."
            )
    return delta.plan.all()


def unfactored(a: Attachment) -> str | None:
    """Why the delta has no factors at this site; ``None`` if it has.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), modified_modules=["0"])
    >>> unfactored(delta.plan.all()[0]) is None
    True
    """
    acts = a.acts()
    if acts.factors is not None:
        return None
    kind = a.config.delta_type or type(a.config).__name__
    told = acts.unfactored or acts.unmergeable
    if told is None and acts.weights is None:
        told = f"{kind} has no weights form"
    return told or f"{kind} changes weights, but not by a product of low-rank factors"


def factors_of(a: Attachment, p: dict[str, Tensor], stacked: bool) -> dict[str, Factors]:
    """``{own name: (B, A)}`` of one attachment."""
    factors = a.acts().factors
    assert factors is not None

    def one(p: dict[str, Tensor]) -> dict[str, Factors]:
        return factors(p)

    return torch.vmap(one)(p) if stacked else one(p)


def beside(left: Factors, right: Factors) -> Factors:
    """The factors of the sum: ``B A + B' A' = [B B'] [A; A']``."""
    return torch.cat([left[0], right[0]], -1), torch.cat([left[1], right[1]], -2)


def rank_of(factored: Factored) -> int:
    """The largest rank of any site."""
    return max(a.shape[-2] for own in factored.sites.values() for _, a in own.values())


def write(factored: Factored, rank: int) -> tuple[DeltaModel, dict[str, Tensor]]:
    """``(delta, params)`` of that rank with these factors, zero-padded where their rank is smaller."""
    delta = _delta(factored, rank)
    parameters = dict(delta.backbone.named_parameters())
    found = {name: parameters[name].detach().to(change) + change for name, change in factored.trained.items()}
    for a in delta.plan.all():
        padded = {name: _padded(pair, rank) for name, pair in factored.sites[a.site.path].items()}

        def one(factors: dict[str, Factors], a: Attachment = a) -> dict[str, Tensor]:
            return a.config.from_factors(a.site, factors)

        leaves = one(padded) if factored.n is None else torch.vmap(one)(padded)
        found |= {a.leaves[leaf]: tensor.contiguous() for leaf, tensor in leaves.items()}
    params = still({name: found[name] for name in delta.names}, delta.constants)
    is_stack(delta, params)
    return delta, params


def _padded(factors: Factors, rank: int) -> Factors:
    b, a = factors
    more = rank - a.shape[-2]
    return (F.pad(b, (0, more)), F.pad(a, (0, 0, 0, more))) if more else factors


def _delta(factored: Factored, rank: int) -> DeltaModel:
    """The delta itself if its config fits already, else a new one with the config that does."""
    old = factored.delta
    config = factored.base.with_rank(rank)
    own = {a.site.path for a in old.plan.all() if a.config is factored.base}
    if own != factored.sites.keys():
        names = tuple(map(exactly, factored.sites))
        config = dataclasses.replace(config, modified_modules=names, exclude_modules=None, common_structure=None)
    if len(old.configs) > 1 or old.plan.trained.keys() != factored.trained.keys():
        config = dataclasses.replace(config, unfrozen_modules=("deltas", *map(exactly, factored.trained)))
    if old.configs == (config,):
        return old
    with outside_transforms():  # building a delta draws leaves to learn their shapes
        new = DeltaModel(old.backbone, config, example=old.example, prepare=old.prepare)
    return new if old.mode_flag is None else new.mode(train=old.mode_flag)
