"""BitFit: ``y + b``, a trained offset on the bias of every linear, convolution and norm.

Shapes: ``bias`` (out,). The leaf is an offset that starts at zero, also for layers without a bias, so a neutral member
is all zeros. Source: Ben Zaken et al. 2021, "BitFit".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaves
from ..methods.site import Site, site_of
from ..structures.modules.forwards import family, is_known, reads_bias

KINDS_WITH_BIAS = ("linear", "transposed_linear", "conv1d", "conv2d", "conv3d", "transposed_conv", "norm")


@register("bitfit")
@dataclass(frozen=True)
class BitFitConfig(BaseDeltaConfig):
    """Bias-only tuning, ``y + b``; a container stands for every linear, convolution and norm below it.

    In a layer with a bias and a custom forward, the offset is added to that bias.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 6, bias=False), torch.nn.LayerNorm(6))
    >>> delta = fd.DeltaModel(backbone, fd.BitFitConfig(modified_modules=["0", "1"]))
    >>> delta.shapes
    {'0.bitfit.bias': (6,), '1.bitfit.bias': (6,)}
    """

    default_name: ClassVar[str] = "bitfit"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@", "ff@", "layer_norm@")
    identity_at_start: ClassVar[bool] = True

    def spread(self, path: str, module: nn.Module) -> Iterator[str]:
        # A parametrised layer, or one that pads its input, is a layer although it has modules below it.
        if _is_layer(module) or all(name == "parametrizations" for name, _ in module.named_children()):
            yield path
            return
        for below, child in module.named_modules():
            if "parametrizations" in below.split(".") or not below:
                continue
            leaf = all(name == "parametrizations" for name, _ in child.named_children())
            if (leaf or _is_layer(child)) and site_of(below, child).kind in KINDS_WITH_BIAS:
                yield f"{path}.{below}"

    def describe(self, site: Site, module: nn.Module) -> Site:
        if site.bias is not None or site.kind not in KINDS_WITH_BIAS:
            return site
        reads = (site.kind != "norm" and is_known(module)) or reads_bias(module, _inputs(site))
        return dataclasses.replace(site, options=(*site.options, ("reads_bias", reads)))

    def tokenwise(self, site: Site) -> bool:
        return site.channel_axis == -1 and len(site.bias or (1,)) == 1

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        return {"bias": torch.zeros(site.bias or (site.width,))}

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        if site.channel_axis == -1:
            return y + p["bias"]
        return y + p["bias"].view(-1, *[1] * (-1 - site.features_axis(y)))

    def weights(self, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        """``bias + b``, or ``b`` if the module has no bias."""
        return w | {"bias": w["bias"] + p["bias"] if "bias" in w else p["bias"]}

    def unmergeable(self, site: Site) -> str | None:
        if site.bias is not None or dict(site.options).get("reads_bias", False):
            return None
        return f"{site.module_type} adds no bias, so an offset on its output cannot be written into its weights"


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is one of torch's linears, convolutions or norms, or derived from one."""
    return family(module) in KINDS_WITH_BIAS


def _inputs(site: Site) -> list[Tensor]:
    """Inputs to try on a layer of that kind, in the shapes that it may take."""
    rng = torch.Generator().manual_seed(0)
    width = site.in_features or 1
    shapes: list[tuple[int, ...]] = [(2, width), (2, 3, width), (2, width, 6, 5), (2, width, 5), (2, width, 6, 5, 5)]
    if "conv" in site.kind and site.weight is not None:
        shapes = [(2, width, *[size + 32 for size in site.weight[2:]])]
    return [torch.randn(shape, generator=rng) for shape in shapes]
