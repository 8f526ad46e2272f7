"""Products with a sum of Kronecker products, ``x H`` with ``H = Σᵢ Aᵢ ⊗ Bᵢ`` and often ``Bᵢ = Sᵢ Tᵢ`` (PHM layers).

Shapes: rule A (n, n, n), blocks B (n, in / n, out / n), left S (n, in / n, k), right T (n, k, out / n), H (in, out).
Source: Zhang et al. 2021, "Beyond Fully-Connected Layers with Quaternions: Parameterization of Hypercomplex
Multiplications with 1/n Parameters".
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def kronecker_sum(rule: Tensor, blocks: Tensor) -> Tensor:
    """``Σᵢ Aᵢ ⊗ Bᵢ``, (in, out).

    >>> rule, blocks = torch.randn(2, 2, 2), torch.randn(2, 3, 5)
    >>> by_torch = torch.kron(rule[0], blocks[0]) + torch.kron(rule[1], blocks[1])
    >>> torch.allclose(kronecker_sum(rule, blocks), by_torch, atol=1e-6)
    True
    """
    n, rows, columns = blocks.shape
    return torch.einsum("iac,irs->arcs", rule, blocks).reshape(n * rows, n * columns)


def times_kronecker_sum(x: Tensor, rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``x (Σᵢ Aᵢ ⊗ (Sᵢ Tᵢ))``, (..., in) to (..., out), by two thin products if that is less work than ``x H``.

    The rule is merged into the factor of the narrower side, so that the wider, costlier side has a plain thin factor.

    >>> x, rule, left, right = torch.randn(6, 8), torch.randn(2, 2, 2), torch.randn(2, 4, 1), torch.randn(2, 1, 3)
    >>> dense = x @ kronecker_sum(rule, left @ right)
    >>> torch.allclose(times_kronecker_sum(x, rule, left, right), dense, atol=1e-5)
    True
    """
    n, rows, rank = left.shape
    columns = right.shape[2]
    features, outputs = n * rows, n * columns
    thin, thick = n * rank, n * n * rank
    work = {
        "right": features * thin + thick * outputs,
        "left": features * thick + thin * outputs,
        "dense": features * outputs,
    }
    least = min(work, key=work.__getitem__)
    if least == "right":
        hidden = (x.unflatten(-1, (n, rows)) @ left.transpose(0, 1).reshape(rows, thin)).flatten(-2)
        return hidden @ torch.einsum("iac,iks->aikcs", rule, right).reshape(thick, outputs)
    if least == "left":
        hidden = x @ torch.einsum("iac,irk->arcik", rule, left).reshape(features, thick)
        return (hidden.unflatten(-1, (n, thin)) @ right.reshape(thin, columns)).flatten(-2)
    return x @ kronecker_sum(rule, left @ right)


def through_layer(x: Tensor, p: Mapping[str, Tensor], layer: str) -> Tensor:
    """``x (Σᵢ Aᵢ ⊗ Bᵢ) + b`` by the leaves of one layer: ``<layer>.W`` or its two factors, a bias where there is one.

    The rule is the layer's own, ``<layer>.phm_rule``, or ``phm_rule``, which layers share; either as two factors, too.

    >>> p = {"phm_rule": torch.ones(1, 1, 1), "up.W": torch.eye(2)[None], "up.b": torch.ones(2)}
    >>> through_layer(torch.tensor([3.0, 5.0]), p, "up")
    tensor([4., 6.])
    """
    own = f"{layer}.phm_rule"
    place = own if own in p or f"{own}_left" in p else "phm_rule"
    rule = p[place] if place in p else p[f"{place}_left"] @ p[f"{place}_right"]
    whole = p.get(f"{layer}.W")
    if whole is None:
        product = times_kronecker_sum(x, rule, p[f"{layer}.W_left"], p[f"{layer}.W_right"])
    else:
        product = x @ kronecker_sum(rule, whole)
    return product + p[f"{layer}.b"] if f"{layer}.b" in p else product
