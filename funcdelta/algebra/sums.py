"""Sums and multiples of changes: Σ wᵢ ΔWᵢ, exact, by concatenating factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ParamsError
from ..model import DeltaModel
from ..trees.stack import unstack
from .factored import Factored, Factors, beside, is_stack, rank_of, read, write

Pair = tuple[DeltaModel, Mapping[str, Tensor]]


def sum_exact(
    pairs: Iterable[Pair] | Pair, weights: Sequence[float | Tensor] | Tensor | None = None
) -> tuple[DeltaModel, dict[str, Tensor]]:
    """Σ wᵢ Bᵢ Aᵢ, without cross terms: ``B = [w₁B₁ w₂B₂ …]``, ``A = [A₁; A₂; …]``; ranks add up.

    Args:
        pairs: ``(delta, params)`` pairs on one backbone, of any ranks and sites; params are all single members, or
            all stacks of n, which are added member by member. Or one ``(delta, stack)``, whose members are added up.
        weights: one number or tensor () per summand, for stacks also (n,) with one value per member; by default 1.

    The sum has the config of the first pair and acts at every site of any pair. If only some of the deltas act at a
    site, or with a smaller rank, both factors are padded with zeros, whose gradients are zero. Trained backbone leaves
    become ``w + Σ wᵢ (pᵢ - w)``.

    Raises ``MergeError`` if a method has no low-rank factors, and ``ParamsError`` for pairs that cannot be added.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> stack = fd.tree.randn_like(delta.init(0, n=3), seed=0)
    >>> mean, params = fd.algebra.sum_exact((delta, stack), weights=[1 / 3, 1 / 3, 1 / 3])
    >>> {name: tuple(leaf.shape) for name, leaf in params.items()}
    {'0.lora.lora_A': (6, 4), '0.lora.lora_B': (8, 6), '0.lora.scale': ()}
    >>> expected = fd.algebra.materialise(delta, stack)["0.weight"].mean(0)
    >>> torch.allclose(fd.algebra.materialise(mean, params)["0.weight"], expected, atol=1e-5)
    True
    """
    summands = summands_of(pairs)
    if weights is not None and not isinstance(weights, Iterable):
        raise ParamsError(f"sum_exact takes one weight per summand, a list of {len(summands)}; found {weights!r}.")
    factors = list(weights) if weights is not None else [1.0] * len(summands)
    if len(factors) != len(summands):
        raise ParamsError(f"sum_exact got {len(factors)} weights for {len(summands)} summands: write one for each.")
    parts = [_times(part, w) for part, w in zip(summands, factors, strict=True)]
    first = parts[0]
    sites: dict[str, dict[str, Factors]] = {}
    trained: dict[str, Tensor] = {}
    for part in parts:
        for path, own in part.sites.items():
            known = sites.setdefault(path, {})
            for name, pair in own.items():
                known[name] = beside(known[name], pair) if name in known else pair
        for name, change in part.trained.items():
            trained[name] = trained[name] + change if name in trained else change
    total = dataclasses.replace(first, sites=sites, trained=trained)
    return write(total, rank_of(total))


def add(a: Pair, b: Pair) -> tuple[DeltaModel, dict[str, Tensor]]:
    """ΔW_a + ΔW_b, by :func:`sum_exact`.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> one, two = (fd.LoraModel(backbone, lora_r=r, modified_modules=["0"]) for r in (1, 2))
    >>> total, params = fd.algebra.add((one, one.init(0)), (two, two.init(1)))
    >>> total.configs[0].lora_r
    3
    """
    return sum_exact([a, b])


def scale(delta: DeltaModel, params: Mapping[str, Tensor], s: float | Tensor) -> tuple[DeltaModel, dict[str, Tensor]]:
    """s·ΔW, where ``s`` is a number or a tensor (), for a stack also (n,) with one value per member.

    ``fd.tree.scale(params, s)``, in contrast, multiplies every factor, and so a product of two by s².

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> params = fd.tree.map(torch.ones_like, delta.init(0))
    >>> half = fd.algebra.scale(delta, params, 0.5)
    >>> fd.algebra.materialise(delta, params)["0.weight"][0, 0], fd.algebra.materialise(*half)["0.weight"][0, 0]
    (tensor(2.), tensor(1.))
    """
    part = _times(read(delta, params), s)
    return write(part, rank_of(part))


def summands_of(pairs: Any) -> list[Factored]:
    """The factors of every summand, checked to be addable."""
    if isinstance(pairs, Sequence) and len(pairs) == 2 and isinstance(pairs[0], DeltaModel):
        delta, stack = pairs
        if not is_stack(delta, stack):
            raise ParamsError(
                "sum_exact((delta, params)) adds up the members of a stack, but these params are one member. To add "
                "several members pass a list: sum_exact([(delta, params), ...])."
            )
        return [read(delta, member) for member in unstack(dict(stack))]
    pairs = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, Mapping) else []
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 and isinstance(p[0], DeltaModel) for p in pairs):
        raise ParamsError(
            "sum_exact takes pairs, one or more: fd.algebra.sum_exact([(delta_a, params_a), (delta_b, params_b)]), "
            "or the members of a stack: fd.algebra.sum_exact((delta, stack))."
        )
    parts = [read(delta, params) for delta, params in pairs]
    for number, part in enumerate(parts):
        if part.delta.backbone is not parts[0].delta.backbone:
            raise ParamsError(
                f"Pair {number} has another backbone than pair 0, so their changes belong to different weights. Build "
                f"both deltas on one backbone."
            )
        if part.n != parts[0].n:
            one, other = (f"a stack of {p.n}" if p.n is not None else "one member" for p in (parts[0], part))
            raise ParamsError(
                f"Pair 0 is {one} but pair {number} is {other}: pass only members, or only stacks of one length. To "
                f"add one member to every member of a stack write fd.broadcast(params, n)."
            )
    return parts


def _times(part: Factored, s: float | Tensor) -> Factored:
    """s·ΔW."""
    if not isinstance(s, int | float | Tensor):
        raise ParamsError(f"The factor of a change must be a number or a tensor; found {s!r}.")
    if isinstance(s, Tensor) and s.ndim and (part.n is None or tuple(s.shape) != (part.n,)):
        expected = "a tensor ()" if part.n is None else f"a tensor () or ({part.n},), one value per member"
        raise ParamsError(f"The factor must be a number or {expected}; found shape {tuple(s.shape)}.")

    def times(leaf: Tensor) -> Tensor:
        return leaf * (s.to(leaf).reshape(-1, *[1] * (leaf.ndim - 1)) if isinstance(s, Tensor) and s.ndim else s)

    sites = {path: {name: (times(b), a) for name, (b, a) in own.items()} for path, own in part.sites.items()}
    return dataclasses.replace(part, sites=sites, trained={name: times(leaf) for name, leaf in part.trained.items()})
