"""Refactors changes: to a lower rank, or to the canonical factors that depend on the change alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kinds import count
from ..model import DeltaModel
from ..trees.leaves import compute_dtype
from .factored import Factored, Factors, rank_of, read, write


def truncate(delta: DeltaModel, params: Mapping[str, Tensor], rank: int) -> tuple[DeltaModel, dict[str, Tensor]]:
    """The closest change of rank ``rank`` at every site: ``argmin ‖X - B A‖`` over rank X ≤ rank.

    With ``B = Q R`` and ``Aᵀ = P S``, the r × r matrix ``R Sᵀ`` has the singular values of B A, which is never formed:
    O((in + out) r²). It is optimal in the Frobenius and the spectral norm (Eckart and Young 1936), and in the gauge of
    :func:`canonical`. If ``rank`` exceeds the delta's, zeros are added. Trained backbone leaves stay as they are.

    Gradients are those of ``torch.linalg.svd``: finite if the singular values are positive and distinct (which they
    are not for a fresh delta, whose B is zero).

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=3, modified_modules=["0"])
    >>> params = fd.tree.randn_like(delta.init(0), seed=0)
    >>> small, less = fd.algebra.truncate(delta, params, rank=2)
    >>> {name: tuple(leaf.shape) for name, leaf in less.items()}
    {'0.lora.lora_A': (2, 4), '0.lora.lora_B': (8, 2), '0.lora.scale': ()}
    """
    rank = count(rank, "rank", "singular values truncate keeps", least=1)
    return write(_balanced(read(delta, params), rank), rank)


def canonical(delta: DeltaModel, params: Mapping[str, Tensor]) -> tuple[DeltaModel, dict[str, Tensor]]:
    """The same ΔW in the balanced gauge: ``BᵀB = A Aᵀ = Σ``, the singular values of ΔW, largest first.

    Scales are folded in, and the largest entry of each column of B is positive. So two deltas with the same ΔW get the
    same leaves (if its singular values are distinct), and leaves can be compared, averaged or quantised. The matrices
    are those of ΔW in the weight's own axes. For gradients see :func:`truncate`.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(4, 8)), lora_r=2, modified_modules=["0"])
    >>> _, params = fd.algebra.canonical(delta, fd.tree.randn_like(delta.init(0), seed=0))
    >>> a, b = params["0.lora.lora_A"], params["0.lora.lora_B"]
    >>> torch.allclose(a @ a.mT, b.mT @ b, atol=1e-5)
    True
    """
    part = read(delta, params)
    rank = rank_of(part)
    return write(_balanced(part, rank), rank)


def gauged(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """``(U √Σ, √Σ Vᵀ)`` with the largest entry of each column of U made positive.

    >>> gauged(-torch.eye(2), torch.tensor([4.0, 1.0]), torch.eye(2))[1]
    tensor([[-2., -0.],
            [-0., -1.]])
    """
    largest = u.detach().abs().argmax(-2, keepdim=True)
    root = s.sqrt() * u.detach().gather(-2, largest).sign().squeeze(-2)
    return u * root.unsqueeze(-2), root.unsqueeze(-1) * vh


def _balanced(part: Factored, rank: int) -> Factored:
    sites = {path: {name: _nearest(*pair, rank) for name, pair in own.items()} for path, own in part.sites.items()}
    return dataclasses.replace(part, sites=sites)


def _nearest(b: Tensor, a: Tensor, rank: int) -> Factors:
    """The factors of the closest product of that rank."""
    dtype = compute_dtype(b.dtype)
    left, r = torch.linalg.qr(b.to(dtype))
    right, s = torch.linalg.qr(a.to(dtype).mT)
    u, values, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
    found = gauged(left @ u[..., :rank], values[..., :rank], vh[..., :rank, :] @ right.mT)
    return found[0].to(b.dtype), found[1].to(a.dtype)
