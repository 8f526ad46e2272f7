"""LoRA: ``W + s B A`` with ``s = alpha / r``, through the activations or through the weights.

Shapes: ``lora_A`` (r, in), ``lora_B`` (out, r), ``scale`` (). A convolution's ``lora_A`` is (r, in / groups, *kernel).
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the split of a fused projection is that
of its reference code (``enable_lora``), ``use_rslora`` is Kalajdzievski 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import BaseDeltaConfig, Paddable, packed_weight, register
from ..errors import ConfigError
from ..functional.dropout import dropout
from ..functional.tokenwise import linear
from ..sites.parts import Part, equal_parts, place
from ..sites.site import Site

CONVOLVE: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
KINDS = ("linear", "transposed_linear", "embedding", *CONVOLVE)
TURNED = ("transposed_linear", "embedding")
"""Kinds whose weight is (in, out)."""


@register("lora")
@dataclass(frozen=True)
class LoraConfig(BaseDeltaConfig):
    """Low-rank adaptation, ``y + s B A dropout(x)``, on linear, embedding and convolution sites.

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
    acts_on_parts: ClassVar[bool] = True
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
        if site.kind not in KINDS:
            why = f": {site.why}" if site.why else ""
            return f"LoRA acts on Linear, Conv1D, Embedding and Conv1d/2d/3d, not on {site.module_type}{why}"
        if site.weight is None and site.kind in CONVOLVE:
            return f"{site.module_type} has no weight tensor"
        if self.lora_dropout and site.kind != "embedding" and not self.holds_on_values(site):
            return (
                f"lora_dropout={self.lora_dropout} drops what enters the low-rank branch, and here B A is added to the "
                f"weight of {site.module_type} instead, because no formula on its activations holds. Write "
                f"lora_dropout=0 for this site"
            )
        if self.enable_lora is not None:
            if site.kind not in ("linear", "transposed_linear"):
                return f"enable_lora splits fused linear projections, not {site.module_type}"
            if site.fused and len(site.fused) != len(self.enable_lora):
                names = ", ".join(part.name for part in site.fused)
                return f"enable_lora has {len(self.enable_lora)} parts, but its output has {len(site.fused)}: {names}"
            if not site.fused and site.width % len(self.enable_lora):
                return f"enable_lora has {len(self.enable_lora)} equal parts, but it has {site.width} outputs"
            if self.modified_modules is not None and site.parts and set(site.parts) != set(self._parts(site)):
                names = ", ".join(part.name for part in site.parts)
                return f"enable_lora={self.enable_lora} means other parts than modified_modules, which name {names}"
        return None

    def unmergeable(self, site: Site) -> str | None:
        if site.weight is None:
            return f"{site.module_type} has no weight tensor"
        return packed_weight(site) if site.packed else None

    def holds_on_values(self, site: Site) -> bool:
        if site.own_forward:
            return False
        if site.kind == "embedding":
            # Rows that are shortened are not linear in the weight, and its gradient is divided by counts of tokens.
            return site.option("max_norm") is None and not site.option("scale_grad_by_freq")
        return site.kind not in CONVOLVE or site.option("padding_mode") == "zeros"

    def constants(self, site: Site) -> tuple[str, ...]:
        return ("scale",)

    def padding(self, site: Site) -> dict[str, Paddable]:
        pieces = {"lora_A": max(1, len(self._parts(site)))}
        return {"rank": Paddable(self.lora_r, {"lora_A": -1 - len(self._fan_in(site)), "lora_B": -1}, pieces)}

    def tokenwise(self, site: Site) -> bool:
        return site.kind in ("linear", "transposed_linear")

    def init(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        parts, fan_in = self._parts(site), self._fan_in(site)
        if site.kind == "embedding":
            # The output is a row of A, so it is A that has to start at zero.
            a, b = torch.zeros(self.lora_r, *fan_in), torch.randn(site.width, self.lora_r, generator=rng)
        else:
            bound = 1 / math.sqrt(math.prod(fan_in))  # Kaiming uniform with a = sqrt 5, as torch.nn.Linear
            a = torch.empty(max(1, len(parts)) * self.lora_r, *fan_in).uniform_(-bound, bound, generator=rng)
            b = torch.zeros(sum(part.size for part in parts) or site.width, self.lora_r)
        rank = math.sqrt(self.lora_r) if self.use_rslora else self.lora_r
        return {"lora_A": a, "lora_B": b, "scale": torch.tensor(self.lora_alpha / rank)}

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        """``y + s B (A x)``: two thin products, never the dense ``B A``."""
        a, b = p["lora_A"], p["lora_B"]
        if site.kind == "embedding":
            change, padding = F.embedding(x, a.mT) @ (p["scale"] * b).mT, site.option("padding_idx")
            if padding is not None:
                # The table gives that row a value and no gradient, so neither factor may get one through it.
                change = torch.where((x == padding).unsqueeze(-1), change.detach(), change)
            return y + change
        if site.training:
            x = dropout(x, p.get("lora_dropout", self.lora_dropout), True)
        if site.kind in CONVOLVE:
            groups, ones = site.option("groups"), [1] * (a.ndim - 2)
            convolve = CONVOLVE[site.kind]
            made_with = {key: site.option(key) for key in ("stride", "padding", "dilation")}
            hidden = convolve(x, a.repeat(groups, *[1] * (a.ndim - 1)), groups=groups, **made_with)
            return y + convolve(hidden, (p["scale"] * b).view(*b.shape, *ones), groups=groups)
        parts = site.parts if self.enable_lora is None else self._parts(site)
        if not parts:
            # Scaled between the two products, where there are fewest numbers.
            if a.ndim == 2:
                return y + F.linear(F.linear(x, a) * p["scale"], b)
            hidden = torch.bmm(x, a.mT) * p["scale"]
            if y.dtype.itemsize < 4:  # half precision rounds as it does for one member
                return y + torch.bmm(hidden, b.mT)
            return torch.baddbmm(y, hidden, b.mT)
        hidden = linear(x, a).chunk(len(parts), -1)
        rows = (p["scale"] * b).split([part.size for part in parts], -2)
        return y + place([linear(h, row) for h, row in zip(hidden, rows, strict=True)], parts, site.width)

    def weights(self, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        """``W + s B A``, in the layout of the module's weight."""
        a, b = p["lora_A"], p["scale"] * p["lora_B"]
        parts = self._parts(site)
        if not parts:
            change = b @ a.flatten(1)
        else:
            pairs = zip(a.chunk(len(parts), 0), b.split([part.size for part in parts], 0), strict=True)
            change = place([part_b @ part_a for part_a, part_b in pairs], parts, site.width, 0)
        if site.kind in TURNED:
            change = change.mT
        return w | {"weight": w["weight"] + change.reshape(w["weight"].shape)}

    def unfactored(self, site: Site) -> str | None:
        parts = self._parts(site)
        if parts:
            names = ", ".join(part.name for part in parts)
            return f"LoRA acts on parts ({names}) of its output, each with factors of its own"
        return None

    def factors(self, site: Site, p: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """``(s B, A)``; with the weight's axes the other way round ``(Aᵀ, s Bᵀ)``."""
        b, a = p["scale"] * p["lora_B"], p["lora_A"].flatten(1)
        return {"weight": (a.mT, b.mT) if site.kind in TURNED else (b, a)}

    def from_factors(self, site: Site, factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """The factors as they are, with ``s = 1``."""
        b, a = factors["weight"]
        if site.kind in TURNED:
            b, a = a.mT, b.mT
        return {"lora_A": a.unflatten(1, self._fan_in(site)), "lora_B": b, "scale": b.new_ones(())}

    def with_rank(self, rank: int) -> Self:
        return self.replace(lora_r=rank, lora_alpha=rank, use_rslora=False)

    def _parts(self, site: Site) -> tuple[Part, ...]:
        """The parts of the output that have factors of their own; none: one pair for all of it."""
        if self.enable_lora is None:
            return site.parts
        every = site.fused or equal_parts([str(i) for i in range(len(self.enable_lora))], site.width)
        return tuple(part for part, on in zip(every, self.enable_lora, strict=True) if on)

    @staticmethod
    def _fan_in(site: Site) -> tuple[int, ...]:
        """The shape that one row of ``lora_A`` covers."""
        if site.kind in CONVOLVE and site.weight is not None:
            return tuple(site.weight[1:])
        assert site.in_features is not None
        return (site.in_features,)
