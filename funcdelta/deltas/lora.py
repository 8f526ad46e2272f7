"""LoRA: ``W + s B A`` with ``s = alpha / r``, through the activations or through the weights.

Shapes: ``lora_A`` (r, in), ``lora_B`` (out, r), ``scale`` (). A convolution's ``lora_A`` is (r, in / groups, *kernel).
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; fused projections are split as in its
reference code (``enable_lora``); ``use_rslora`` is from Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from ..methods.additive import Additive
from ..methods.config import register
from ..methods.layers import TURNED
from ..methods.leaf import Leaf, Leaves
from ..methods.low_rank import LowRank, started
from ..methods.site import Site
from ..methods.switched import check_switches, misfit, switched_on
from ..structures.parts import Part


@register("lora")
@dataclass(frozen=True)
class LoraConfig(Additive):
    """Low-rank adaptation, ``y + s B A dropout(x)``, on linear, embedding and convolution layers.

    Attributes:
        lora_r: the rank r.
        lora_alpha: ``s = lora_alpha / lora_r`` (with ``use_rslora``: over the square root of r).
        lora_dropout: dropout on the input of the low-rank branch, in training.
        use_rslora: rank-stabilised scale.
        enable_lora: for a fused projection (``c_attn``), which of its parts are adapted, each with its own factors:
            ``(True, False, True)`` means q and v of q, k, v, like ``["attn@.q@", "attn@.v@"]``. If the parts are not
            known for a family, they are taken to be equal and side by side.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 6))
    >>> delta = fd.DeltaModel(backbone, fd.LoraConfig(lora_r=2, modified_modules=["0"]))
    >>> delta.shapes
    {'0.lora.lora_A': (2, 4), '0.lora.lora_B': (6, 2), '0.lora.scale': ()}
    """

    default_name: ClassVar[str] = "lora"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@.q@", "attn@.v@")
    identity_at_start: ClassVar[bool] = True
    in_leaves: ClassVar[tuple[str, ...]] = ("lora_r", "lora_alpha", "use_rslora")
    as_leaves: ClassVar[tuple[str, ...]] = ("lora_dropout",)
    dropout_field: ClassVar[str] = "lora_dropout"

    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    enable_lora: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_switches("enable_lora", self.enable_lora)
        if self.lora_r < 1:
            raise ConfigError(f"lora_r={self.lora_r}: write at least 1; to run without a delta, apply({{}}, ...).")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout}: write a probability in [0, 1).")

    def check(self, site: Site) -> str | None:
        refusal = super().check(site)
        if refusal is None and self.enable_lora is not None:
            refusal = misfit(site, "enable_lora", self.enable_lora, self.modified_modules is not None)
        return refusal

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        a, b = started(site, self.matrix_shape(site), self.lora_r, max(1, len(self.parts(site))), rng)
        rank = math.sqrt(self.lora_r) if self.use_rslora else self.lora_r
        return {"lora_A": a, "lora_B": b, "scale": Leaf(torch.tensor(self.lora_alpha / rank), trains=False)}

    def low_rank(self, site: Site, p: dict[str, Tensor]) -> LowRank:
        return LowRank(p["lora_B"], p["lora_A"], p["scale"])

    def from_factors(self, site: Site, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The factors as they are, with ``s = 1``."""
        ((b, a),) = factors.values()
        if site.kind in TURNED:
            b, a = a.mT, b.mT
        return {"lora_A": a.unflatten(1, self.matrix_shape(site)[1:]), "lora_B": b, "scale": b.new_ones(())}

    def with_rank(self, rank: int) -> Self:
        return self.replace(lora_r=rank, lora_alpha=rank, use_rslora=False)

    def parts(self, site: Site) -> tuple[Part, ...]:
        """The parts of the output that have their own factors; empty if one pair serves for all of it."""
        return site.parts if self.enable_lora is None else switched_on(site, self.enable_lora)
