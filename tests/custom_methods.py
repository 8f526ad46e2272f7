"""Methods registered from outside the package, as a user would: by registration alone they get every law."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import funcdelta as fd


@fd.register("test_gate")
@dataclass(frozen=True)
class GateConfig(fd.BaseDeltaConfig):
    """``g tanh(y)`` added to what leaves the site, and ``x`` shifted by a multiple of itself before it."""

    identity_at_start: ClassVar[bool] = True

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"gate": torch.zeros(()), "shift": torch.zeros(())}

    def before(self, site: fd.Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return x + p["shift"] * x if x.is_floating_point() else x

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["gate"] * torch.tanh(y)

    def tokenwise(self, site: fd.Site) -> bool:
        return True


@fd.register("test_rows")
@dataclass(frozen=True)
class RowScaleConfig(fd.BaseDeltaConfig):
    """``(1 + s) W``: a method that only rewrites weights, with a constant ``size``."""

    identity_at_start: ClassVar[bool] = True

    def check(self, site: fd.Site) -> str | None:
        return None if site.weight is not None else f"{site.module_type} has no weight"

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        assert site.weight is not None
        rows = torch.zeros(site.weight[0], *[1] * (len(site.weight) - 1))
        return {"rows": rows, "size": fd.Leaf(torch.tensor(0.5), trains=False)}

    def weights(self, site: fd.Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        return w | {"weight": w["weight"] * (1 + p["size"] * p["rows"])}


@fd.register("test_shared")
@dataclass(frozen=True)
class SharedGainConfig(fd.BaseDeltaConfig):
    """``y + c g tanh(y)``: the gain g stands once for all sites, c once a site."""

    identity_at_start: ClassVar[bool] = True

    def shared(self, sites: tuple[fd.Site, ...], rng: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.randn((), generator=rng)}

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"own": torch.zeros(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["own"] * p["gain"] * torch.tanh(y)


@fd.register("test_written")
@dataclass(frozen=True)
class WrittenConfig(fd.BaseDeltaConfig):
    """``y + gᵢ tanh(y)``, where one table writes the gains of all sites, gᵢ = Tᵢ·c, or each site owns its gain."""

    written: bool = True

    def shared(self, sites: tuple[fd.Site, ...], rng: torch.Generator) -> dict[str, Tensor]:
        if not self.written:
            return {}
        return {"code": torch.randn(3, generator=rng), "table": torch.randn(len(sites), 3, generator=rng)}

    def expand(self, sites: tuple[fd.Site, ...], p: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        gains = p["table"] @ p["code"]
        return {site.path: {"gain": gain} for site, gain in zip(sites, gains.unbind(), strict=True)}

    def baked(self) -> WrittenConfig:
        return self.replace(written=False)

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {} if self.written else {"gain": torch.zeros(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["gain"] * torch.tanh(y)


@fd.register("test_ia3")
@dataclass(frozen=True)
class ScaledOutputConfig(fd.BaseDeltaConfig):
    """``l · y``, the output of a layer scaled feature by feature, bias included: IA3 (Liu et al. 2022)."""

    identity_at_start: ClassVar[bool] = True

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"scaled": torch.ones(site.width)}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y * p["scaled"].view(-1, *[1] * (-1 - site.features_axis(y)))


@fd.register("test_hadamard")
@dataclass(frozen=True)
class HadamardConfig(fd.Additive):
    """``ΔW = (B₁ A₁) ⊙ (B₂ A₂)`` on every kind of layer, from ``change`` alone: LoHa (Hyeon-Woo et al. 2021)."""

    identity_at_start: ClassVar[bool] = True
    rank: int = 2

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        rows, *columns = self.matrix_shape(site)
        flat = math.prod(columns)
        return {
            "b1": fd.Leaf(torch.zeros(rows, self.rank), ". first"),
            "a1": fd.Leaf(torch.randn(self.rank, flat, generator=rng), "first ."),
            "b2": fd.Leaf(torch.randn(rows, self.rank, generator=rng), ". second"),
            "a2": fd.Leaf(torch.randn(self.rank, flat, generator=rng), "second ."),
        }

    def change(self, site: fd.Site, p: dict[str, Tensor]) -> Tensor:
        product = (p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"])
        return product.view(self.matrix_shape(site))


@fd.register("test_chain")
@dataclass(frozen=True)
class ChainedConfig(fd.ChainConfig):
    """LoRA, and an adapter on what it gives."""

    composed: ClassVar[bool] = False
    parts: tuple[fd.BaseDeltaConfig, ...] = (fd.LoraConfig(lora_r=2), fd.AdapterConfig(bottleneck_dim=3))


@fd.register("test_average")
@dataclass(frozen=True)
class AveragedConfig(fd.AverageConfig):
    """Two LoRAs of unlike rank, and their shares."""

    composed: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = True
    parts: tuple[fd.BaseDeltaConfig, ...] = (fd.LoraConfig(lora_r=2), fd.LoraConfig(lora_r=3))
    shares: tuple[float, ...] | None = (0.7, 0.4)


@fd.register("test_mixture")
@dataclass(frozen=True)
class MixedConfig(fd.MixtureConfig):
    """LoRAs mixed by gates that each token sets, as in X-LoRA (Buehler and Buehler 2024), and a chain among them."""

    composed: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = True
    parts: tuple[fd.BaseDeltaConfig, ...] = (
        fd.LoraConfig(lora_r=2),
        fd.parallel(fd.LoraConfig(lora_r=1), GateConfig(), name="both"),
    )
