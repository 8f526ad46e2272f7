"""Prefix tuning: ``softmax(q [P_k; k]ᵀ s) [P_v; v]``, trained keys and values in front of a self-attention's own.

Shapes: ``past_key``, ``past_value`` (P, heads · size), with the heads of the keys where queries have more of them.
Reparameterised, one network writes the prefixes of all L sites of width d, in the order of the sites: leaves
``wte.weight`` (P, e), ``control_trans.0.weight`` (m, e), ``control_trans.0.bias`` (m), ``control_trans.2.weight``
(2 L d, m), ``control_trans.2.bias`` (2 L d). Source: Li and Liang 2021, "Prefix-Tuning"; names and starts are
OpenDelta's. A prefix gets neither rotation nor positions, and its keys are never masked. The text of a row that is
padded in front gets the position numbers that it has alone, unless ``position_ids`` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..functional.prefix_network import fresh_network, written
from ..methods.config import BaseDeltaConfig, register
from ..methods.leaf import Leaves
from ..methods.site import Site


@register("prefix")
@dataclass(frozen=True)
class PrefixConfig(BaseDeltaConfig):
    """Prefix tuning of attention modules that go through Transformers' attention interface.

    A matched module stands for every such attention module that it is or contains.

    Attributes:
        prefix_token_num: the length P of the prefix.
        reparameterize: whether one network computes all prefixes; ``delta.bake(params)`` turns them into plain ones.
        embed_dim, mid_dim: the widths e and m of that network.
        position_bias: for models that compute one (T5). ``"kept"``: zeros for the prefix. ``"first_layer_only"``, for
            checkpoints trained with OpenDelta: the first layer's is computed as if the prefix were tokens, and those
            of the others are lost.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    >>> backbone = BertModel(BertConfig(vocab_size=9000, **sizes))
    >>> delta = fd.PrefixModel(backbone, prefix_token_num=3, reparameterize=False)
    >>> delta.shapes["encoder.layer.0.attention.self.prefix.past_key"]
    (3, 8)
    """

    default_name: ClassVar[str] = "prefix"
    default_modified_modules: ClassVar[tuple[str, ...]] = ("attn@",)
    in_leaves: ClassVar[tuple[str, ...]] = ("prefix_token_num", "embed_dim", "mid_dim")
    least: ClassVar[Mapping[str, float]] = dict.fromkeys(in_leaves, 1)
    one_of: ClassVar[Mapping[str, tuple[str, ...]]] = {"position_bias": ("kept", "first_layer_only")}

    prefix_token_num: int = 6
    reparameterize: bool = True
    embed_dim: int = 512
    mid_dim: int = 512
    position_bias: str = "kept"

    def init(self, site: Site, rng: torch.Generator) -> Leaves:
        if self.reparameterize:
            return {}
        tokens, shape = self.prefix_token_num, site.attention
        return {
            "past_key": torch.randn(tokens, shape.key_width, generator=rng),
            "past_value": torch.randn(tokens, shape.value_width, generator=rng),
        }

    def shared(self, sites: tuple[Site, ...], rng: torch.Generator) -> Leaves:
        if not self.reparameterize:
            return {}
        widths = {site.path: (site.attention.key_width, site.attention.value_width) for site in sites}
        width = widths[sites[0].path][0]
        for path, found in widths.items():
            if found != (width, width):
                raise ConfigError(
                    f"One network computes the prefixes of all sites, which must be equally wide, but {sites[0].path} "
                    f"has keys of width {width}, and {path} keys and values of widths {found}. Write "
                    f"reparameterize=False, or one config per width."
                )
        outputs = 2 * len(sites) * width
        return fresh_network(self.prefix_token_num, self.embed_dim, self.mid_dim, outputs, rng)

    def expand(self, sites: tuple[Site, ...], p: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """``W₂ tanh(W₀ E + b₀) + b₂``, cut into a key and a value for each site in turn."""
        pieces = written(p).chunk(2 * len(sites), -1)
        return {site.path: {"past_key": pieces[2 * i], "past_value": pieces[2 * i + 1]} for i, site in enumerate(sites)}

    def baked(self) -> Self:
        if not self.reparameterize:
            raise ConfigError("These prefixes are plain already (reparameterize=False), so there is nothing to bake.")
        return self.replace(reparameterize=False)

    def attend(self, site: Site, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return p["past_key"], p["past_value"]

    def widen_bias(self, site: Site, module: nn.Module, bias: Tensor, added: int) -> Tensor:
        if self.position_bias == "kept":
            return super().widen_bias(site, module, bias, added)
        attention, queries, length = cast(Any, module), bias.shape[-2], added + bias.shape[-1]
        if not attention.has_relative_attention_bias:
            return bias.new_zeros(()).expand(*bias.shape[:-1], length)
        return attention.compute_bias(queries, length, device=bias.device, past_seen_tokens=length - queries)

    def unmergeable(self, site: Site) -> str | None:
        return "a prefix adds keys and values that no weight of the module produces"
