"""How OpenDelta spells each method: attribute names in keys, fields in ``config.json``, and what it cannot hold.

A key is ``<module>.<attribute>.<inner><leaf>``. The second delta of a kind on a module has ``_1`` after its attribute;
from the third on, only the attribute's first word remains: ``low_rank_adapter``, ``low_rank_adapter_1``, ``low_2``.
This is the only file of the package that names methods.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...methods.config import BaseDeltaConfig
from ...methods.site import Site

Leaves = dict[str, dict[str, Tensor]]
"""``{site path: {leaf: tensor}}``."""

BASE_FIELDS = ("modified_modules", "exclude_modules", "unfrozen_modules", "common_structure")
PROVENANCE = ("backbone_class", "backbone_checkpoint_name", "backbone_hash")
DEAD_FIELDS = ("sequential", "backend", "interactive_modify")
"""Fields of some versions that never had an effect on outputs."""

FORMAT_VERSION = "0.3.0"
"""The version that the last OpenDelta writes."""


@dataclass(frozen=True)
class Inexact:
    """A field of ours and its ``value`` that reproduces what OpenDelta computes at sites of ``classes``."""

    field: str
    value: Any
    classes: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Spelling:
    """One method in OpenDelta's files.

    Attributes:
        attribute: name of the child at a site that has the site's own leaves.
        shared: name of the child at the first site that has the leaves shared by all sites.
        inner: the part of a key between attribute and leaf.
        bare: leaves that old versions kept in the module itself, without an attribute.
        own: leaves that are saved as new values of the module's own tensors, not as offsets.
        unsaved: whether OpenDelta leaves a module out of its files although the config names it.
        derived: leaves that the config determines, so that no file has them.
        unused: leaves in files that no output depends on.
        sites: OpenDelta's default sites; if empty, the backbone alone determines the sites.
        fields: fields of ``config.json``, with the value to write for those that no config here has.
        covered: fields of ours that OpenDelta lacks and :attr:`settle` expresses by others.
        heeds_exclusion: whether ``exclude_modules`` has an effect.
        hosts: classes of the modules that carry the attribute, if those are not the sites.
        inexact: what OpenDelta computes differently.
        settle: converts a config and the leaves of its sites to OpenDelta's fields and leaves.
        refuse: why OpenDelta cannot hold the delta at a site.
    """

    attribute: str
    sites: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    shared: str | None = None
    inner: str = ""
    bare: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    unsaved: Callable[[nn.Module], bool] = lambda module: False
    derived: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    covered: tuple[str, ...] = ()
    heeds_exclusion: bool = True
    hosts: tuple[str, ...] = ()
    inexact: Inexact | None = None
    settle: Callable[[BaseDeltaConfig, Leaves], tuple[dict[str, Any], Leaves]] = lambda config, leaves: ({}, leaves)
    refuse: Callable[[Any, Site], str | None] = lambda config, site: None


OURS = object()
"""Marks a field that our config has, too."""


def _ours(*names: str, **written: Any) -> dict[str, Any]:
    return dict.fromkeys(names, OURS) | written


# -- LoRA --------------------------------------------------------------------------------------------------------------


def _lora_scale(config: Any, leaves: Leaves) -> tuple[dict[str, Any], Leaves]:
    """Express the scales as ``lora_alpha / lora_r``; if they differ by site, multiply them into ``lora_B``."""
    scales = {path: float(p["scale"]) for path, p in leaves.items()}
    alpha: float = config.lora_alpha
    if len(set(scales.values())) == 1:
        first = next(iter(leaves.values()))["scale"]
        if first.new_tensor(alpha / config.lora_r) != first:
            alpha = float(first) * config.lora_r
        return {"lora_alpha": int(alpha) if alpha == int(alpha) else alpha}, leaves
    factor = {path: scale * config.lora_r / alpha for path, scale in scales.items()}
    return {}, {path: p | {"lora_B": p["lora_B"] * factor[path]} for path, p in leaves.items()}


def _lora_refusal(config: Any, site: Site) -> str | None:
    if site.parts:
        return f"its LoRA acts on whole layers, not on {', '.join(part.name for part in site.parts)} alone"
    return None if site.kind == "linear" else f"its LoRA acts on nn.Linear only, not on {site.module_type}"


# -- others ------------------------------------------------------------------------------------------------------------


def _has_no_bias(module: nn.Module) -> bool:
    """Whether OpenDelta would create the bias in the first forward pass, too late for saving."""
    return not isinstance(module, nn.Linear) and getattr(module, "bias", None) is None


def _scale_of_parallel(config: Any, leaves: Leaves) -> tuple[dict[str, Any], Leaves]:
    """Multiply the scale, which OpenDelta's model does not take, into the second layer."""
    last = ("up_proj.weight", "up_proj.bias")
    return {}, {
        path: p | {leaf: p[leaf] * p["scaled"] for leaf in last} if p["scaled"] != 1 else p
        for path, p in leaves.items()
    }


def _compacter_refusal(config: Any, site: Site) -> str | None:
    for name in ("shared_phm_rule", "shared_W_phm"):
        if getattr(config, name):
            return f"{name} is not implemented there"
    return None if config.learn_phm else "with learn_phm=False the rule is not saved, so it would be drawn anew"


def _low_rank_refusal(config: Any, site: Site) -> str | None:
    right = config.low_rank_rank == 1
    return None if right else "it multiplies the factors elementwise, which is correct for rank 1 only"


SPELLINGS: dict[str, Spelling] = {
    "lora": Spelling(
        attribute="lora",
        sites=("attn@.q@", "attn@.v@"),
        fields=_ours("lora_r", "lora_alpha", "lora_dropout"),
        bare=("lora_A", "lora_B"),
        derived=("scale",),
        covered=("use_rslora",),
        heeds_exclusion=False,
        settle=_lora_scale,
        refuse=_lora_refusal,
    ),
    "adapter": Spelling(
        attribute="adapter",
        sites=("attn@.proj@", "ff@.w2@"),
        fields=_ours("bottleneck_dim", "non_linearity"),
        inner="modulelist.",
    ),
    "parallel_adapter": Spelling(
        attribute="parallel_adapter",
        sites=("attn@", "attn@", "ff@.w1@", "ff@.w2@"),
        fields=_ours("bottleneck_dim", "non_linearity", scaled=None),
        inner="modulelist.",
        derived=("scaled",),
        covered=("scaled",),
        settle=_scale_of_parallel,
    ),
    "bitfit": Spelling(
        attribute="bitfit",
        sites=("attn@", "ff@", "layer_norm@", "lm_head@.proj@"),
        own=("bias",),
        unsaved=_has_no_bias,
    ),
    "compacter": Spelling(
        attribute="compactor",
        sites=("attn@.proj@", "ff@.w2@"),
        fields=_ours(
            *("reduction_factor", "non_linearity", "phm_c_init", "hypercomplex_division", "learn_phm"),
            *("hypercomplex_nonlinearity", "shared_phm_rule", "factorized_phm", "shared_W_phm", "factorized_phm_rule"),
            *("phm_rank", "phm_init_range", "kronecker_prod", "use_bias_up_sampler", "use_bias_down_sampler"),
            bottleneck_dim=None,
            sequential=None,
        ),
        refuse=_compacter_refusal,
    ),
    "low_rank_adapter": Spelling(
        attribute="low_rank_adapter",
        sites=("attn@.proj@", "ff@.w2@"),
        fields=_ours("reduction_factor", "non_linearity", "low_rank_w_init", "low_rank_rank"),
        refuse=_low_rank_refusal,
    ),
    "prefix": Spelling(
        attribute="prefix",
        sites=("attn@",),
        fields=_ours("prefix_token_num", "reparameterize", "embed_dim", "mid_dim"),
        shared="reparams",
        unused=("input_tokens",),
        # In the releases of Transformers that OpenDelta supports, mT5 and XLM-R use the modules of T5 and RoBERTa.
        hosts=(
            *("T5Attention", "MT5Attention", "BertAttention", "RobertaAttention", "XLMRobertaAttention"),
            *("GPT2Attention", "BartAttention"),
        ),
        inexact=Inexact(
            *("position_bias", "first_layer_only", ("T5Attention", "MT5Attention")),
            what="position bias in the first layer only",
        ),
    ),
    "soft_prompt": Spelling(
        attribute="soft_prompt_layer",
        fields=_ours("soft_token_num", "init_range", "token_init"),
    ),
}


def attribute_of(token: str) -> tuple[str, str, int] | None:
    """``(delta type, attribute, number of earlier deltas of the type)`` of one token of a key.

    >>> attribute_of("low_rank_adapter_1"), attribute_of("low_2"), attribute_of("compactor"), attribute_of("query")
    (('low_rank_adapter', 'low_rank_adapter', 1), ('low_rank_adapter', 'low_rank_adapter', 2), \
('compacter', 'compactor', 0), None)
    """
    for delta_type, spelling in SPELLINGS.items():
        for attribute in filter(None, (spelling.attribute, spelling.shared)):
            if token == attribute:
                return delta_type, attribute, 0
            if token == f"{attribute}_1":
                return delta_type, attribute, 1
            number = re.fullmatch(re.escape(attribute.split("_")[0]) + r"_([2-9]|[1-9]\d+)", token)
            if number:
                return delta_type, attribute, int(number[1])
    return None


def attribute_name(delta_type: str, number: int) -> str:
    """The attribute of the ``number``-th delta of a kind, counted from 0.

    >>> [attribute_name("soft_prompt", number) for number in range(3)]
    ['soft_prompt_layer', 'soft_prompt_layer_1', 'soft_2']
    """
    attribute = SPELLINGS[delta_type].attribute
    return attribute if not number else f"{attribute}_1" if number == 1 else f"{attribute.split('_')[0]}_{number}"


def owners_of(leaf: str) -> Iterable[str]:
    """The methods whose leaf of that name may be in the module itself."""
    return (delta_type for delta_type, spelling in SPELLINGS.items() if leaf in spelling.bare)
