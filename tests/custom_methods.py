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


@fd.register("test_rows")
@dataclass(frozen=True)
class RowScaleConfig(fd.BaseDeltaConfig):
    """``(1 + s) W``: a method that only rewrites weights, with a constant ``size``."""

    identity_at_start: ClassVar[bool] = True

    def check(self, site: fd.Site) -> str | None:
        return None if site.weight is not None else f"{site.module_type} has no weight"

    def constants(self, site: fd.Site) -> tuple[str, ...]:
        return ("size",)

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        assert site.weight is not None
        return {"rows": torch.zeros(site.weight[0], *[1] * (len(site.weight) - 1)), "size": torch.tensor(0.5)}

    def weights(self, site: fd.Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        return w | {"weight": w["weight"] * (1 + p["size"] * p["rows"])}
