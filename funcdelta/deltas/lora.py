"""LoRA: ``W + s B A`` with ``s = alpha / r``, through the activations or through the weights.

Shapes: ``lora_A`` (r, in), ``lora_B`` (out, r), ``scale`` (). A convolution's ``lora_A`` is (r, in / groups, *kernel).
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the split of a fused projection is that
of its reference code (``enable_lora``), ``use_rslora`` is Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional.dropout import dropout
from ..methods.additive import Additive, LowRank
from ..methods.config import register
from ..methods.layers import LINEAR, TURNED
from ..methods.leaf import Leaf, Leaves
from ..sites.parts import Part, equal_parts
from ..sites.site import Site


@register("lora")
@dataclass(frozen=True)
class LoraConfig(Additive):
    """Low-rank adaptation, ``y + s B A dropout(x)``, on linear, embedding and convolution layers.

    Attributes:
        lora_r: the rank r.
        lora_alpha: ``s = lora_alpha / lora_r`` (with ``use_rslora``: over the square root of r).
        lora_dropout: dropout on the input of the low-rank branch, in training.
        use_rslora: rank-stabilised scale.
        enable_lora: for a fused projection (``c_attn``), which of its parts are adapted: ``(True, False, True)``
            adapts q and v of q,k,v, each with factors of its own. The common names ``["attn@.q@", "attn@.v@"]``
            mean the same. Where the parts lie is known of families with common names; elsewhere they are equal
            and side by side.

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

    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    enable_lora: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_lora is not None and not all(isinstance(on, bool) for on in self.enable_lora):
            raise ConfigError(
                f"enable_lora={self.enable_lora!r}: write True or False for each part, as (True, False, True)."
            )
        if self.lora_r < 1:
            raise ConfigError(
                f"lora_r={self.lora_r}: the rank must be at least 1; apply({{}}, ...) runs without a delta."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout}: write a probability in [0, 1).")
        if self.enable_lora is not None and not any(self.enable_lora):
            raise ConfigError(f"enable_lora={self.enable_lora} adapts nothing: set at least one part to True.")

    def check(self, site: Site) -> str | None:
        refusal = super().check(site)
        if refusal is not None:
            return refusal
        if self.lora_dropout and site.kind != "embedding" and not self.holds_on_values(site):
            return (
                f"lora_dropout={self.lora_dropout} drops what enters the low-rank branch, and here B A is added to the "
                f"weight of {site.module_type} instead, because no formula on its activations holds. Write "
                f"lora_dropout=0 for this site"
            )
        return self._check_parts(site) if self.enable_lora is not None else None

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        many = self.matrix_shape(site)[:-2] if site.kind == "tensor" else ()  # one pair of factors an expert
        rows, *fan_in = self.matrix_shape(site)[len(many) :]
        pieces = max(1, len(self.parts(site)))
        if site.kind == "embedding":
            # The output is a row of A, so it is A that has to start at zero.
            a, b = torch.zeros(self.lora_r, *fan_in), torch.randn(rows, self.lora_r, generator=rng)
        else:
            bound = 1 / math.sqrt(math.prod(fan_in))  # Kaiming uniform with a = sqrt 5, as torch.nn.Linear
            a = torch.empty(*many, pieces * self.lora_r, *fan_in).uniform_(-bound, bound, generator=rng)
            b = torch.zeros(*many, rows, self.lora_r)
        rank = math.sqrt(self.lora_r) if self.use_rslora else self.lora_r
        return {
            "lora_A": Leaf(a, " ".join(["."] * len(many) + [f"{pieces}*rank"] + ["."] * len(fan_in))),
            "lora_B": Leaf(b, " ".join(["."] * (len(many) + 1) + ["rank"])),
            "scale": Leaf(torch.tensor(self.lora_alpha / rank), trains=False),
        }

    def low_rank(self, site: Site, p: dict[str, Tensor]) -> LowRank:
        return LowRank(p["lora_B"], p["lora_A"], p["scale"])

    def entering(self, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        if site.kind == "embedding" or not site.training:
            return x
        return dropout(x, p.get("lora_dropout", self.lora_dropout), True)

    def from_factors(self, site: Site, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The factors as they are, with ``s = 1``."""
        ((b, a),) = factors.values()
        if site.kind in TURNED:
            b, a = a.mT, b.mT
        return {"lora_A": a.unflatten(1, self.matrix_shape(site)[1:]), "lora_B": b, "scale": b.new_ones(())}

    def with_rank(self, rank: int) -> Self:
        return self.replace(lora_r=rank, lora_alpha=rank, use_rslora=False)

    def parts(self, site: Site) -> tuple[Part, ...]:
        """The parts of the output that have factors of their own; none: one pair for all of it."""
        if self.enable_lora is None:
            return site.parts
        every = site.fused or equal_parts([str(i) for i in range(len(self.enable_lora))], site.width)
        return tuple(part for part, on in zip(every, self.enable_lora, strict=True) if on)

    def _check_parts(self, site: Site) -> str | None:
        """Why ``enable_lora`` does not fit the output of ``site``."""
        assert self.enable_lora is not None
        if site.kind not in LINEAR:
            return f"enable_lora splits fused linear projections, not {site.module_type}"
        if site.fused and len(site.fused) != len(self.enable_lora):
            names = ", ".join(part.name for part in site.fused)
            return f"enable_lora has {len(self.enable_lora)} parts, but its output has {len(site.fused)}: {names}"
        if not site.fused and site.width % len(self.enable_lora):
            return f"enable_lora has {len(self.enable_lora)} equal parts, but it has {site.width} outputs"
        if self.modified_modules is not None and site.parts and set(site.parts) != set(self.parts(site)):
            names = ", ".join(part.name for part in site.parts)
            return f"enable_lora={self.enable_lora} means other parts than modified_modules, which name {names}"
        return None
