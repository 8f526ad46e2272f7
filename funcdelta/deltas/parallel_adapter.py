"""Parallel adapter: ``y + s (U act(D x + d) + u)``, beside one module or beside a span of them.

``x`` is what enters the first module of a pair and ``y`` what leaves the second. Shapes: ``down_proj.weight`` (m, in),
``down_proj.bias`` (m), ``up_proj.weight`` (out, m), ``up_proj.bias`` (out), ``scaled`` (), all at the first module.
Source: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning"; weights start as N(0, 0.01)
and biases at zero as in OpenDelta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, MatchError
from ..functional.activations import activation
from ..functional.tokenwise import linear
from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaf, Leaves
from ..methods.site import Site


@register("parallel_adapter")
@dataclass(frozen=True)
class ParallelAdapterConfig(BaseDeltaConfig):
    """Bottleneck adapter in parallel, ``y + s (U act(D x + d) + u)``, from one module's input to another's output.

    ``modified_modules`` is a flat list of pairs: ``("attn", "attn", "fc1", "fc2")`` puts one adapter beside every
    ``attn`` and one from the input of every ``fc1`` to the output of the ``fc2`` in its block. A single name is paired
    with itself.

    Attributes:
        bottleneck_dim: the width m of the bottleneck.
        non_linearity: ``relu``, ``tanh``, ``swish``, ``gelu_new``, ``gelu_orig``, ``leakyrelu`` or a name that
            Transformers knows.
        scaled: the scale s; a constant leaf, so that it may differ by member.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    >>> delta = fd.ParallelAdapterModel(backbone, bottleneck_dim=2, modified_modules=["0", "2"])
    >>> for name, shape in delta.shapes.items(): print(name, shape)
    0.parallel_adapter.down_proj.weight (2, 4)
    0.parallel_adapter.down_proj.bias (2,)
    0.parallel_adapter.up_proj.weight (3, 2)
    0.parallel_adapter.up_proj.bias (3,)
    0.parallel_adapter.scaled ()
    """

    default_name: ClassVar[str] = "parallel_adapter"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@", "attn@", "ff@.w1@", "ff@.w2@")
    in_leaves: ClassVar[tuple[str, ...]] = ("bottleneck_dim", "scaled")
    least: ClassVar[Mapping[str, float]] = {"bottleneck_dim": 1}

    bottleneck_dim: int = 24
    non_linearity: str = "gelu_new"
    scaled: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.non_linearity)

    def spans(self, names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
        if len(names) == 1:
            names *= 2
        if len(names) % 2:
            raise ConfigError(
                f"modified_modules={list(names)} has {len(names)} names, but a parallel adapter takes pairs: where it "
                f"begins and where it ends. Write a single module twice: {[names[0], names[0]]}."
            )
        return tuple(zip(names[::2], names[1::2], strict=True))

    def check(self, site: Site) -> str | None:
        if site.kind == "embedding" or (site.kind == "span" and site.option("entry") == "embedding"):
            return "its input is token ids, not features"
        if site.kind.startswith("conv") and any(step != 1 for step in site.option("stride")):
            return f"its stride is {site.option('stride')}, so its output has other positions than its input"
        return None

    def unmergeable(self, site: Site) -> str | None:
        return "it adds a non-linear function of the input, which no weight computes"

    def tokenwise(self, site: Site) -> bool:
        return site.channel_axis == -1

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        m = self.bottleneck_dim
        return {
            "down_proj.weight": Leaf(torch.randn(m, site.input_width, generator=rng) * 0.01, "bottleneck ."),
            "down_proj.bias": Leaf(torch.zeros(m), "bottleneck"),
            "up_proj.weight": Leaf(torch.randn(site.width, m, generator=rng) * 0.01, ". bottleneck"),
            "up_proj.bias": torch.zeros(site.width),
            "scaled": Leaf(torch.tensor(float(self.scaled)), trains=False),
        }

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        axis = site.features_axis(x)
        h = x.movedim(axis, -1)
        down = activation(self.non_linearity)(linear(h, p["down_proj.weight"], p["down_proj.bias"]))
        change = linear(down, p["up_proj.weight"], p["up_proj.bias"]).movedim(-1, axis)
        if change.ndim != y.ndim or any(a not in (1, b) for a, b in zip(change.shape, y.shape, strict=True)):
            raise MatchError(
                f"The parallel adapter from {site.path} to {site.exit or site.path} turns {tuple(x.shape)} into "
                f"{tuple(change.shape)}, which does not fit the output {tuple(y.shape)}. Name modules between which "
                f"the positions stay the same."
            )
        return y + p["scaled"] * change
