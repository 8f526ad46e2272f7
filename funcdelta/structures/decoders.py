"""Tables of text decoders: GPT-2, GPT-J, GPT-NeoX, BLOOM, OPT, Llama and similar models, Phi."""

from __future__ import annotations

from .layouts import by_head, grouped_query, side_by_side
from .pieces import HEAD, attention, feed_forward, final_norm, gated
from .rows import Fused, Table

QKV = ("q", "k", "v")

GPT2: Table = {
    "wte": "embeddings@",
    "h": "decoder@.block@",
    "h.*": {
        "ln_1": "attn@.layer_norm@",
        "attn": "attn@",
        "attn.c_attn": Fused("attn@", QKV, side_by_side),
        "attn.c_proj": "attn@.proj@",
        "ln_cross_attn": "crossattn@.layer_norm@",
        "crossattention": "crossattn@",
        "crossattention.q_attn": "crossattn@.q@",
        "crossattention.c_attn": Fused("crossattn@", ("k", "v"), side_by_side),
        "crossattention.c_proj": "crossattn@.proj@",
        "ln_2": "ff@.layer_norm@",
        **feed_forward("mlp", "c_fc", "c_proj"),
    },
    "ln_f": final_norm("decoder@"),
    "lm_head": HEAD,
}
GPTJ: Table = {
    "wte": "embeddings@",
    "h": "decoder@.block@",
    "h.*": {
        # One norm before both attention and feed-forward network.
        "ln_1": ("attn@.layer_norm@", "ff@.layer_norm@"),
        **attention("attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        **feed_forward("mlp", "fc_in", "fc_out"),
    },
    "ln_f": final_norm("decoder@"),
    "lm_head": HEAD,
}
BLOOM: Table = {
    "word_embeddings": "embeddings@",
    "h": "decoder@.block@",
    "h.*": {
        "input_layernorm": "attn@.layer_norm@",
        "self_attention": "attn@",
        "self_attention.query_key_value": Fused("attn@", QKV, by_head),
        "self_attention.dense": "attn@.proj@",
        "post_attention_layernorm": "ff@.layer_norm@",
        **feed_forward("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    },
    "ln_f": final_norm("decoder@"),
    "lm_head": HEAD,
}
GPT_NEOX: Table = {
    "embed_in": "embeddings@",
    "layers": "decoder@.block@",
    "layers.*": {
        "input_layernorm": "attn@.layer_norm@",
        "attention": "attn@",
        "attention.query_key_value": Fused("attn@", QKV, by_head),
        "attention.dense": "attn@.proj@",
        "post_attention_layernorm": "ff@.layer_norm@",
        **feed_forward("mlp", "dense_h_to_4h", "dense_4h_to_h"),
    },
    "final_layer_norm": final_norm("decoder@"),
    "embed_out": HEAD,  # the head's name in older releases of Transformers
    "lm_head": HEAD,
}
OPT: Table = {
    "decoder.embed_tokens": "embeddings@",
    "decoder": "decoder@",
    "decoder.layers": "decoder@.block@",
    "decoder.layers.*": {
        **attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        "self_attn_layer_norm": ("layer_norm@", "attn@.layer_norm@"),
        # No module contains both, so each has the alias ff@.
        "fc1": ("ff@.w1@", "ff@"),
        "fc2": ("ff@.w2@", "ff@"),
        "final_layer_norm": ("layer_norm@", "ff@.layer_norm@"),
    },
    "decoder.final_layer_norm": final_norm("decoder@"),
    "lm_head": HEAD,
}

_SELF_ATTENTION = attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_GATED = gated("mlp", "gate_proj", "up_proj", "down_proj")
_AROUND: Table = {
    "embed_tokens": "embeddings@",
    "layers": "decoder@.block@",
    "norm": final_norm("decoder@"),
    "lm_head": HEAD,
}
_TWO_NORMS = {"input_layernorm": "attn@.layer_norm@", "post_attention_layernorm": "ff@.layer_norm@"}

LLAMA: Table = {**_AROUND, "layers.*": {**_SELF_ATTENTION, **_GATED, **_TWO_NORMS}}
GEMMA2: Table = {
    **_AROUND,
    "layers.*": {
        **_SELF_ATTENTION,
        **_GATED,
        "input_layernorm": "attn@.layer_norm@",
        "post_attention_layernorm": "attn@.layer_norm@",
        "pre_feedforward_layernorm": "ff@.layer_norm@",
        "post_feedforward_layernorm": "ff@.layer_norm@",
    },
}
GEMMA3: Table = {"lm_head": HEAD}
"""The modules of a multimodal Gemma 3 outside its towers."""
MIXTRAL: Table = {
    **_AROUND,
    # The experts' projections are not modules, so the routed network as a whole has the names of both.
    "layers.*": {**_SELF_ATTENTION, **_TWO_NORMS, "mlp": ("ff@", "ff@.w1@", "ff@.w2@")},
}
PHI: Table = {
    **_AROUND,
    "layers.*": {
        **attention("self_attn", "q_proj", "k_proj", "v_proj", "dense"),
        **feed_forward("mlp", "fc1", "fc2"),
        "input_layernorm": ("attn@.layer_norm@", "ff@.layer_norm@"),
    },
    "final_layernorm": final_norm("decoder@"),
}
PHI3: Table = {
    **_AROUND,
    "layers.*": {
        "self_attn": "attn@",
        "self_attn.qkv_proj": Fused("attn@", QKV, grouped_query),
        "self_attn.o_proj": "attn@.proj@",
        "mlp": "ff@",
        "mlp.gate_up_proj": Fused("ff@", ("gate", "up"), side_by_side, whole="ff@.w1@"),
        "mlp.down_proj": "ff@.w2@",
        **_TWO_NORMS,
    },
}
