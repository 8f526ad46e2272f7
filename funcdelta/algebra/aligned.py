"""Merges changes in a basis that they share, and averages leaves with a warning if that is not meaningful."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import FactorMeanWarning, ParamsError
from ..model import DeltaModel
from ..trees.leaves import compute_dtype
from ..trees.stack import members
from .factored import Factored, Factors, is_stack, rank_of, read, write
from .merging import shares_of, ties, weighted_sum
from .sums import Pair, summands_of

Merge = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FAR = 0.1
"""The relative error of the mean of leaves, compared with the members' mean change, above which soup warns."""


def knots(pairs: Iterable[Pair] | Pair, merge: Merge = ties) -> tuple[DeltaModel, dict[str, Tensor]]:
    """U Σ merge(V₁ᵀ, …, Vₙᵀ), where [ΔW₁ … ΔWₙ] = U Σ [V₁ᵀ … Vₙᵀ] at every site: a merge of aligned changes.

    The entries of low-rank changes rarely correspond; in the common basis U they do. ``merge`` gets
    ``{site.weight: (n, R, columns)}``, where R is the sum of all ranks, and returns the same without the axis n, as
    :func:`ties` does. If it takes the mean, the result is the exact mean. No ΔW is formed, only a QR of the factors B
    side by side and an SVD of (R, n · columns). ``pairs`` are single members, or one ``(delta, stack)``, as in
    :func:`sum_exact`. Changes of trained backbone leaves are merged as they are.

    Stoica et al. 2024, "Model Merging with SVD to Tie the KnOTS".

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> stack = fd.tree.randn_like(delta.init(0, n=3), seed=0)
    >>> mean = fd.algebra.knots((delta, stack), merge=lambda aligned: {k: v.mean(0) for k, v in aligned.items()})
    >>> expected = fd.algebra.materialise(delta, stack)["0.weight"].mean(0)
    >>> torch.allclose(fd.algebra.materialise(*mean)["0.weight"], expected, atol=1e-5)
    True
    """
    parts = summands_of(pairs)
    if parts[0].n is not None:
        raise ParamsError("knots merges single members: pass a list of (delta, member) pairs, or one (delta, stack).")
    bases: dict[tuple[str, str], Tensor] = {}
    aligned: dict[str, Tensor] = {}
    for path, own in _all_sites(parts).items():
        for name in own:
            basis, turned = _aligned([part.sites.get(path, {}).get(name) for part in parts])
            bases[path, name] = basis
            aligned[f"{path}.{name}"] = turned
    trained = dict.fromkeys(name for part in parts for name in part.trained)
    changes = {name: _stacked([part.trained.get(name) for part in parts]) for name in trained}
    merged = merge(aligned | changes)
    lacking = sorted((aligned | changes).keys() - (merged.keys() if isinstance(merged, Mapping) else ()))
    if lacking:
        found = f"no {lacking[0]!r}" if isinstance(merged, Mapping) else type(merged).__name__
        raise ParamsError(f"merge of knots must return a dict with the names that it was given; found {found}.")
    sites: dict[str, dict[str, Factors]] = {}
    for (path, name), basis in bases.items():
        sites.setdefault(path, {})[name] = (basis, merged[f"{path}.{name}"])
    total = dataclasses.replace(parts[0], sites=sites, trained={name: merged[name] for name in changes})
    return write(total, rank_of(total))


def soup(
    delta: DeltaModel, stack: Mapping[str, Tensor], weights: Sequence[float] | Tensor | None = None
) -> dict[str, Tensor]:
    """Σ wᵢ leafᵢ, by default with equal weights: the mean of members in factor space, which keeps their rank.

    Constants that are equal in all members stay as they are.

    It is meaningful if members started from the same leaves and stayed close to each other (Wortsman et al. 2022,
    "Model Soups"), because (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ) is not Σ wᵢ Bᵢ Aᵢ. If the two differ by more than a tenth, a
    ``FactorMeanWarning`` says by how much, and names the exact alternative: ``sum_exact``, then ``truncate``.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> start = fd.tree.randn_like(delta.init(0), seed=0)
    >>> near = fd.stack([start, fd.tree.scale(start, 1.01)])
    >>> fd.algebra.soup(delta, near)["0.lora.lora_A"].shape
    torch.Size([2, 4])
    """
    if not is_stack(delta, stack):
        raise ParamsError("soup averages the members of a stack, but these params are one member: fd.stack([...]).")
    n = members(stack)
    shares = shares_of(weights if weights is not None else [1 / n] * n, n, "soup needs one weight per member")
    # Average differences of constants, so that a constant that all members share keeps its exact value.
    apart = {name: leaf - leaf[:1] if name in delta.constants else leaf for name, leaf in stack.items()}
    mean = weighted_sum(apart, shares)
    mean |= {name: stack[name][0] + mean[name] for name in delta.constants if name in mean}
    off = _far_off(delta, stack, mean, shares)
    if off > FAR:
        warnings.warn(
            f"The mean of these members' leaves differs by {off:.0%} from the mean of their changes, because their "
            f"factors did not start alike, or have moved apart. Exact is fd.algebra.sum_exact((delta, stack), "
            f"weights); fd.algebra.truncate reduces its rank.",
            FactorMeanWarning,
            stacklevel=2,
        )
    return mean


def _far_off(delta: DeltaModel, stack: Mapping[str, Tensor], mean: dict[str, Tensor], shares: Tensor) -> float:
    """‖mean(B) mean(A) - mean(B A)‖ / ‖mean(B A)‖ over all sites."""
    each, leafwise, difference, size = read(delta, stack), read(delta, mean), 0.0, 0.0
    for path, own in leafwise.sites.items():
        for name, (b, a) in own.items():
            outer, inner = each.sites[path][name]
            left = torch.cat((shares.to(outer)[:, None, None] * outer).unbind(), -1)
            right = torch.cat(inner.unbind(), -2)
            size += _square(left, right)
            difference += _square(torch.cat([left, -b], -1), torch.cat([right, a], -2))
    return (difference / size) ** 0.5 if size > 0 else 0.0


def _square(b: Tensor, a: Tensor) -> float:
    """‖B A‖²_F = Σ (BᵀB)∘(A Aᵀ), without forming B A."""
    b, a = b.detach().double(), a.detach().double()
    return max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))


def _all_sites(parts: Sequence[Factored]) -> dict[str, dict[str, None]]:
    """``{site: names}`` over all parts, in order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for part in parts:
        for path, own in part.sites.items():
            found.setdefault(path, {}).update(dict.fromkeys(own))
    return found


def _aligned(pairs: Sequence[Factors | None]) -> tuple[Tensor, Tensor]:
    """``(U Σ, [V₁ᵀ; …; Vₙᵀ])``, (rows, R) and (n, R, columns), of the changes side by side; ``None`` is no change."""
    known = [pair for pair in pairs if pair is not None]
    dtype = compute_dtype(known[0][0].dtype)
    q, r = torch.linalg.qr(torch.cat([b.to(dtype) for b, _ in known], -1))
    columns = iter(r.split([b.shape[-1] for b, _ in known], -1))
    nothing = r.new_zeros(r.shape[0], known[0][1].shape[-1])
    turned = [nothing if pair is None else next(columns) @ pair[1].to(dtype) for pair in pairs]
    u, s, vh = torch.linalg.svd(torch.cat(turned, -1), full_matrices=False)
    apart = torch.stack(vh.split(nothing.shape[-1], -1))
    return (q @ (u * s)).to(known[0][0].dtype), apart.to(known[0][1].dtype)


def _stacked(changes: Sequence[Any]) -> Tensor:
    like = next(change for change in changes if change is not None)
    return torch.stack([torch.zeros_like(like) if change is None else change for change in changes])
