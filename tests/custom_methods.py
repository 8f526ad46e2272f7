"""Methods registered from outside the package, as a user would: by registration alone they get every law."""

from __future__ import annotations

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
