"""BitFit: ``y + b``, a trained offset on the bias of every linear, convolution and norm.

Shapes: ``bias`` (out,). The leaf is an offset that starts at zero, so a bias that does not exist yet starts at zero
too, and a neutral member is all zeros. Source: Ben Zaken et al. 2021, "BitFit".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..config import BaseDeltaConfig, register
from ..sites.site import Site, site_of

KINDS_WITH_BIAS = ("linear", "transposed_linear", "conv1d", "conv2d", "conv3d", "transposed_conv", "norm")


@register("bitfit")
@dataclass(frozen=True)
class BitFitConfig(BaseDeltaConfig):
    """Bias-only tuning, ``y + b``; a container stands for every linear, convolution and norm below it.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.LayerNorm(6))
    >>> delta = fd.DeltaModel(backbone, fd.BitFitConfig(modified_modules=["0", "1"]))
    >>> delta.shapes
    {'0.bitfit.bias': (6,), '1.bitfit.bias': (6,)}
    """

    default_name: ClassVar[str] = "bitfit"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@", "ff@", "layer_norm@")
    identity_at_start: ClassVar[bool] = True

    def spread(self, path: str, module: nn.Module) -> Iterator[str]:
        # A parametrised layer has modules below it and is a layer all the same.
        if all(name == "parametrizations" for name, _ in module.named_children()):
            yield path
            return
        for below, child in module.named_modules():
            inside = [name for name, _ in child.named_children() if name != "parametrizations"]
            if (
                not inside
                and "parametrizations" not in below.split(".")
                and site_of(below, child).kind in KINDS_WITH_BIAS
            ):
                yield f"{path}.{below}"

    def tokenwise(self, site: Site) -> bool:
        return site.channel_axis == -1

    def init(self, site: Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"bias": torch.zeros(site.width)}

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        if site.channel_axis == -1:
            return y + p["bias"]
        return y + p["bias"].view(-1, *[1] * (y.ndim - 1 - site.channel_axis % y.ndim))

    def weights(self, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        """``bias + b``, or ``b`` where the module has no bias yet."""
        return w | {"bias": w["bias"] + p["bias"] if "bias" in w else p["bias"]}

    def unmergeable(self, site: Site) -> str | None:
        if site.bias is not None or site.kind in ("linear", "conv1d", "conv2d", "conv3d", "transposed_conv"):
            return None
        return f"{site.module_type} adds no bias, so an offset on its output cannot be written into its weights"
