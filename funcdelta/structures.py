"""Backbone-independent site names (``attn@.q@``, ``ff@.w2@``): one table a family of Transformers models.

A row maps a common name to targets in that family's own names, read by the rules of :mod:`funcdelta.match`.
Methods name their default sites in common names; a new family is one more table.
"""

from __future__ import annotations

from torch import nn

from .errors import MatchError
from .match import near

BERT = {
    "attn@": ("attention",),
    "attn@.q@": ("attention.self.query",),
    "attn@.k@": ("attention.self.key",),
    "attn@.v@": ("attention.self.value",),
    "attn@.proj@": ("attention.output.dense",),
    "ff@": ("intermediate", r"[r]layer\.\d+\.output"),
    "ff@.w1@": ("intermediate.dense",),
    "ff@.w2@": (r"[r]layer\.\d+\.output\.dense",),
    "layer_norm@": ("attention.output.LayerNorm", r"[r]layer\.\d+\.output\.LayerNorm"),
}
DEBERTA = BERT | {
    "attn@.q@": ("attention.self.query_proj",),
    "attn@.k@": ("attention.self.key_proj",),
    "attn@.v@": ("attention.self.value_proj",),
}
DISTILBERT = {
    "attn@": (r"[r]layer\.\d+\.attention",),
    "attn@.q@": ("attention.q_lin",),
    "attn@.k@": ("attention.k_lin",),
    "attn@.v@": ("attention.v_lin",),
    "attn@.proj@": ("attention.out_lin",),
    "ff@": ("ffn",),
    "ff@.w1@": ("ffn.lin1",),
    "ff@.w2@": ("ffn.lin2",),
    "layer_norm@": ("sa_layer_norm", "output_layer_norm"),
}
GPT2 = {
    "attn@": ("attn",),
    # The projection is fused: q, k and v are adapted together unless enable_lora says which.
    "attn@.q@": ("attn.c_attn",),
    "attn@.k@": ("attn.c_attn",),
    "attn@.v@": ("attn.c_attn",),
    "attn@.proj@": ("attn.c_proj",),
    "ff@": ("mlp",),
    "ff@.w1@": ("mlp.c_fc",),
    "ff@.w2@": ("mlp.c_proj",),
    "layer_norm@": ("ln_1", "ln_2", "ln_f"),
}
OPT = {
    "attn@": ("self_attn",),
    "attn@.q@": ("self_attn.q_proj",),
    "attn@.k@": ("self_attn.k_proj",),
    "attn@.v@": ("self_attn.v_proj",),
    "attn@.proj@": ("self_attn.out_proj",),
    "ff@": ("fc1", "fc2"),
    "ff@.w1@": ("fc1",),
    "ff@.w2@": ("fc2",),
    "layer_norm@": ("self_attn_layer_norm", "final_layer_norm"),
}
T5 = {
    "attn@": ("SelfAttention",),
    "attn@.q@": ("SelfAttention.q",),
    "attn@.k@": ("SelfAttention.k",),
    "attn@.v@": ("SelfAttention.v",),
    "attn@.proj@": ("SelfAttention.o",),
    "ff@": ("DenseReluDense",),
    "ff@.w1@": (r"[r]DenseReluDense\.wi(_\d)?",),
    "ff@.w2@": ("DenseReluDense.wo",),
    "layer_norm@": ("layer_norm",),
}
LLAMA = {
    "attn@": ("self_attn",),
    "attn@.q@": ("self_attn.q_proj",),
    "attn@.k@": ("self_attn.k_proj",),
    "attn@.v@": ("self_attn.v_proj",),
    "attn@.proj@": ("self_attn.o_proj",),
    "ff@": ("mlp",),
    "ff@.w1@": ("mlp.gate_proj", "mlp.up_proj"),
    "ff@.w2@": ("mlp.down_proj",),
    "layer_norm@": ("input_layernorm", "post_attention_layernorm"),
}

FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "bert": BERT,
    "electra": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "deberta-v2": DEBERTA,
    "distilbert": DISTILBERT,
    "gpt2": GPT2,
    "opt": OPT,
    "t5": T5,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
}


def resolve(backbone: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """Targets in the backbone's own names for ``names``; names without ``@`` stay as they are.

    >>> resolve(torch.nn.Sequential(), ("query",))
    ('query',)
    """
    if not any("@" in name for name in names):
        return names
    kinds = families(backbone)
    if not kinds:
        raise MatchError(
            f"{type(backbone).__name__} is of no family with common names ({', '.join(FAMILIES)}), so "
            f"{', '.join(names)} mean nothing here: give modified_modules in the backbone's own names."
        )
    targets: list[str] = []
    for name in names:
        if "@" not in name:
            targets.append(name)
            continue
        found = [target for kind in kinds for target in FAMILIES[kind].get(name, ())]
        if not found:
            known = list(dict.fromkeys(key for kind in kinds for key in FAMILIES[kind]))
            raise MatchError(f"{name!r} is no common name of {', '.join(kinds)}.{near(name, known)}")
        targets += found
    return tuple(dict.fromkeys(targets))


def families(backbone: nn.Module) -> list[str]:
    """The families found in ``backbone`` or inside any wrapper, by their Transformers model type.

    >>> families(torch.nn.Linear(2, 2))
    []
    """
    kinds = [getattr(getattr(module, "config", None), "model_type", None) for module in backbone.modules()]
    return [kind for kind in dict.fromkeys(kinds) if kind in FAMILIES]
