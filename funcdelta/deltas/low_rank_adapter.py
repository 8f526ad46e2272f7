"""Low-rank adapter: ``h + L_up(act(L_down(h)))`` after a site, with ``L(x) = x (W_left W_right) + b``.

Shapes, with width d, bottleneck m = d // reduction_factor and rank k: ``down_sampler.W_left`` (d, k),
``down_sampler.W_right`` (k, m), ``down_sampler.b`` (m); ``up_sampler.W_left`` (m, k), ``up_sampler.W_right`` (k, d),
``up_sampler.b`` (d). Source: Karimi Mahabadi et al. 2021, "Compacter" (its low-rank baseline). OpenDelta multiplies the
two factors elementwise, which equals the matrix product only for rank 1; here it is a matrix product for any rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional.activations import activation
from ..functional.glorot import GLOROT, glorot
from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaf, Leaves
from ..methods.site import Site

LAYERS = ("down_sampler", "up_sampler")


@register("low_rank_adapter")
@dataclass(frozen=True)
class LowRankAdapterConfig(BaseDeltaConfig):
    """Adapter of two low-rank layers, ``h + L_up(act(L_down(h)))``, after any site with a hidden output.

    Attributes:
        reduction_factor: the bottleneck is the site's width divided by this, rounded down.
        non_linearity: ``relu``, ``tanh``, ``swish``, ``gelu_new``, ``gelu_orig``, ``leakyrelu`` or a name that
            Transformers knows.
        low_rank_w_init: how factors start, ``glorot-uniform`` or ``glorot-normal``; biases start at zero.
        low_rank_rank: the rank k of both layers.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta = fd.LowRankAdapterModel(backbone, reduction_factor=2, low_rank_rank=3, modified_modules=["0"])
    >>> delta.shapes["0.low_rank_adapter.down_sampler.W_left"], delta.shapes["0.low_rank_adapter.up_sampler.W_right"]
    ((8, 3), (3, 8))
    """

    default_name: ClassVar[str] = "low_rank_adapter"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@.proj@", "ff@.w2@")
    in_leaves: ClassVar[tuple[str, ...]] = ("reduction_factor", "low_rank_w_init", "low_rank_rank")
    least: ClassVar[Mapping[str, float]] = {"reduction_factor": 1, "low_rank_rank": 1}
    one_of: ClassVar[Mapping[str, tuple[str, ...]]] = {"low_rank_w_init": GLOROT}

    reduction_factor: int = 32
    non_linearity: str = "gelu_new"
    low_rank_w_init: str = "glorot-uniform"
    low_rank_rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.non_linearity)

    def check(self, site: Site) -> str | None:
        d = site.out_features
        if d is None or d >= self.reduction_factor:
            return None
        return (
            f"{site.path} has {d} outputs, fewer than reduction_factor={self.reduction_factor}, so the bottleneck "
            f"would be empty; write a reduction_factor of at most {d}"
        )

    def unmergeable(self, site: Site) -> str | None:
        return "it adds a non-linear function of the output, which no weight of the site computes"

    def tokenwise(self, site: Site) -> bool:
        return site.channel_axis == -1

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        d, k = site.width, self.low_rank_rank
        m = d // self.reduction_factor
        kind = self.low_rank_w_init
        return {
            "down_sampler.W_left": Leaf(glorot(kind, (d, k), rng), ". rank"),
            "down_sampler.W_right": Leaf(glorot(kind, (k, m), rng), "rank bottleneck"),
            "down_sampler.b": Leaf(torch.zeros(m), "bottleneck"),
            "up_sampler.W_left": Leaf(glorot(kind, (m, k), rng), "bottleneck rank"),
            "up_sampler.W_right": Leaf(glorot(kind, (k, d), rng), "rank ."),
            "up_sampler.b": torch.zeros(d),
        }

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        axis = site.features_axis(y)
        h = y.movedim(axis, -1)
        down = _layer(h, p, "down_sampler")
        change = _layer(activation(self.non_linearity)(down), p, "up_sampler")
        return y + change.movedim(-1, axis)


def _layer(x: Tensor, p: dict[str, Tensor], name: str) -> Tensor:
    """``x (W_left W_right) + b``, multiplied in the order that takes less work."""
    left, right = p[f"{name}.W_left"], p[f"{name}.W_right"]
    (features, rank), outputs = left.shape[-2:], right.shape[-1]
    if rank * (features + outputs) > features * outputs:
        return x @ (left @ right) + p[f"{name}.b"]
    return x @ left @ right + p[f"{name}.b"]
