"""Compacter: ``h + P_up(act(P_down(h)))`` after a site, with ``P(x) = x (Σᵢ Aᵢ ⊗ (Sᵢ Tᵢ)) + b``.

Shapes of a layer (in, out) with n = hypercomplex_division and k = phm_rank: ``phm_rule`` A (n, n, n), ``W_left`` S
(n, in / n, k), ``W_right`` T (n, k, out / n), ``b`` (out); without ``factorized_phm`` one ``W`` (n, in / n, out / n),
with ``factorized_phm_rule`` ``phm_rule_left`` (n, n, 1) and ``phm_rule_right`` (n, 1, n). ``down_sampler`` is (d, m)
and ``up_sampler`` (m, d) with m = d // reduction_factor; both d and m must be multiples of n.
Source: Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers"; fields, names (the
``compactor`` in keys too) and initial values are OpenDelta's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MatchError
from ..functional.activations import activation
from ..functional.hypercomplex import through_layer
from ..functional.hypercomplex_start import RULE_STARTS, WEIGHT_STARTS, fresh_blocks, fresh_rule
from ..functional.hypercomplex_widths import misfit
from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaf, Leaves
from ..methods.site import Site


@register("compacter")
@dataclass(frozen=True)
class CompacterConfig(BaseDeltaConfig):
    """Adapter of two hypercomplex layers, ``h + P_up(act(P_down(h)))``, after any site with a hidden output.

    Attributes:
        reduction_factor: the bottleneck is the site's width divided by this, rounded down.
        non_linearity: ``relu``, ``tanh``, ``swish``, ``gelu_new``, ``gelu_orig``, ``leakyrelu`` or a name that
            Transformers knows.
        phm_c_init: how rules start, ``normal`` N(0, 0.01) or ``uniform`` U(±0.01).
        hypercomplex_division: the number n of Kronecker products in a layer.
        learn_phm: whether rules train; if not they are constants, which are saved with the rest.
        hypercomplex_nonlinearity: how weights start (OpenDelta's word): ``glorot-uniform``, ``glorot-normal`` or
            ``normal`` N(0, phm_init_range).
        shared_phm_rule: one rule for both layers at all sites.
        factorized_phm: weights as factors of rank ``phm_rank`` instead of full blocks.
        shared_W_phm: one set of weights for all sites, which must have one width; each site keeps its own biases.
        factorized_phm_rule: rules as factors of rank 1.
        phm_rank: the rank k of factorised weights.
        phm_init_range: the standard deviation of ``normal`` weights.
        kronecker_prod: how OpenDelta computes the same product; it has no effect here.
        use_bias_up_sampler, use_bias_down_sampler: whether the layers have biases, which start at zero.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 64))
    >>> delta = fd.CompacterModel(backbone, modified_modules=["0"])
    >>> delta.shapes["0.compactor.down_sampler.phm_rule"], delta.shapes["0.compactor.down_sampler.W_left"]
    ((4, 4, 4), (4, 16, 1))
    >>> fd.CompacterModel(backbone, shared_phm_rule=True, modified_modules=["0"]).names[:2]
    ('compactor.phm_rule', '0.compactor.down_sampler.W_left')
    """

    default_name: ClassVar[str] = "compactor"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@.proj@", "ff@.w2@")
    in_leaves: ClassVar[tuple[str, ...]] = (
        *("reduction_factor", "phm_rank", "phm_c_init", "phm_init_range"),
        *("hypercomplex_nonlinearity", "kronecker_prod"),
    )
    least: ClassVar[Mapping[str, float]] = {
        "reduction_factor": 1,
        "hypercomplex_division": 1,
        "phm_rank": 1,
        "phm_init_range": 0,
    }
    one_of: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "phm_c_init": RULE_STARTS,
        "hypercomplex_nonlinearity": WEIGHT_STARTS,
    }

    reduction_factor: int = 16
    non_linearity: str = "gelu_new"
    phm_c_init: str = "normal"
    hypercomplex_division: int = 4
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    shared_phm_rule: bool = False
    factorized_phm: bool = True
    shared_W_phm: bool = False  # noqa: N815  (OpenDelta's name)
    factorized_phm_rule: bool = False
    phm_rank: int = 1
    phm_init_range: float = 0.0001
    kronecker_prod: bool | None = None
    use_bias_up_sampler: bool = True
    use_bias_down_sampler: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.non_linearity)

    def check(self, site: Site) -> str | None:
        return misfit(site.out_features, self.hypercomplex_division, self.reduction_factor)

    def unmergeable(self, site: Site) -> str | None:
        return "it adds a non-linear function of the output, which no weight of the site computes"

    def shared(self, sites: tuple[Site, ...], rng: torch.Generator) -> Leaves:
        found = self._rule(rng) if self.shared_phm_rule else {}
        if self.shared_W_phm:
            widths = {site.width: site.path for site in reversed(sites)}
            if len(widths) > 1:
                told = ", ".join(f"{path} has {width}" for width, path in widths.items())
                raise MatchError(
                    f"shared_W_phm=True needs sites of one width, but {told} outputs. Write one config per width, each "
                    f"with a different name=, or leave shared_W_phm out."
                )
            for layer, shape in self._layers(sites[0]).items():
                found |= {f"{layer}.{name}": leaf for name, leaf in self._weight(layer, *shape, rng).items()}
        return found

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        found: dict[str, Leaf] = {}
        for layer, (features, outputs) in self._layers(site).items():
            own = {} if self.shared_phm_rule else self._rule(rng)
            own |= {} if self.shared_W_phm else self._weight(layer, features, outputs, rng)
            if getattr(self, f"use_bias_{layer}"):
                # The bottleneck is n blocks side by side, and each of them grows.
                grows = layer == "down_sampler" and not self.shared_W_phm
                own["b"] = Leaf(torch.zeros(outputs), f"{self.hypercomplex_division}*bottleneck" if grows else "")
            found |= {f"{layer}.{name}": leaf for name, leaf in own.items()}
        return found

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        axis = site.features_axis(y)
        down = activation(self.non_linearity)(through_layer(y.movedim(axis, -1), p, "down_sampler"))
        return y + through_layer(down, p, "up_sampler").movedim(-1, axis)

    def _layers(self, site: Site) -> dict[str, tuple[int, int]]:
        """The input and output widths of the two layers at a site."""
        d, m = site.width, site.width // self.reduction_factor
        return {"down_sampler": (d, m), "up_sampler": (m, d)}

    def _rule(self, rng: torch.Generator) -> dict[str, Leaf]:
        """A fresh rule, or its two factors."""
        n = self.hypercomplex_division
        factors = {"phm_rule_left": (n, n, 1), "phm_rule_right": (n, 1, n)}
        named = (factors if self.factorized_phm_rule else {"phm_rule": (n, n, n)}).items()
        return {name: Leaf(fresh_rule(self.phm_c_init, shape, rng), trains=self.learn_phm) for name, shape in named}

    def _weight(self, layer: str, features: int, outputs: int, rng: torch.Generator) -> dict[str, Leaf]:
        """A fresh weight of n blocks, or its two factors."""
        n, k = self.hypercomplex_division, self.phm_rank
        rows, columns = features // n, outputs // n
        into, out = (".", "bottleneck") if layer == "down_sampler" else ("bottleneck", ".")
        if self.factorized_phm:
            given = {"W_left": ((n, rows, k), f". {into} rank"), "W_right": ((n, k, columns), f". rank {out}")}
        else:
            given = {"W": ((n, rows, columns), f". {into} {out}")}
        start, spread = self.hypercomplex_nonlinearity, self.phm_init_range
        return {name: Leaf(fresh_blocks(start, shape, spread, rng), axes) for name, (shape, axes) in given.items()}
