"""Bottleneck adapter: ``h + U act(D h + d) + u`` after a site.

Shapes: ``down_proj.weight`` (m, d), ``down_proj.bias`` (m), ``up_proj.weight`` (d, m), ``up_proj.bias`` (d).
Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; weights start as N(0, 0.01) and biases
at zero as in OpenDelta, so a fresh adapter is near the identity, not at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..functional.activations import activation
from ..functional.tokenwise import linear
from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaf, Leaves
from ..methods.site import Site


@register("adapter")
@dataclass(frozen=True)
class AdapterConfig(BaseDeltaConfig):
    """Bottleneck adapter, ``h + U act(D h + d) + u``, sequentially after any site with a hidden output.

    Attributes:
        bottleneck_dim: the width m of the bottleneck.
        non_linearity: ``relu``, ``tanh``, ``swish``, ``gelu_new``, ``gelu_orig``, ``leakyrelu`` or a name that
            Transformers knows.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 6))
    >>> delta = fd.DeltaModel(backbone, fd.AdapterConfig(bottleneck_dim=2, modified_modules=["0"]))
    >>> delta.shapes["0.adapter.down_proj.weight"], delta.shapes["0.adapter.up_proj.bias"]
    ((2, 6), (6,))
    """

    default_name: ClassVar[str] = "adapter"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@.proj@", "ff@.w2@")
    in_leaves: ClassVar[tuple[str, ...]] = ("bottleneck_dim",)
    least: ClassVar[Mapping[str, float]] = {"bottleneck_dim": 1}

    bottleneck_dim: int = 24
    non_linearity: str = "gelu_new"

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.non_linearity)

    def tokenwise(self, site: Site) -> bool:
        return site.channel_axis == -1

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        d, m = site.width, self.bottleneck_dim
        return {
            "down_proj.weight": Leaf(torch.randn(m, d, generator=rng) * 0.01, "bottleneck ."),
            "down_proj.bias": Leaf(torch.zeros(m), "bottleneck"),
            "up_proj.weight": Leaf(torch.randn(d, m, generator=rng) * 0.01, ". bottleneck"),
            "up_proj.bias": torch.zeros(d),
        }

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        axis = site.features_axis(y)
        h = y.movedim(axis, -1)
        down = activation(self.non_linearity)(linear(h, p["down_proj.weight"], p["down_proj.bias"]))
        change = linear(down, p["up_proj.weight"], p["up_proj.bias"])
        return y + change.movedim(-1, axis)
