"""Tables of encoder-decoder models: T5 (plain and gated), BART, Whisper."""

from __future__ import annotations

from .pieces import HEAD, attention, final_norm
from .rows import Table


def _t5_attention(layer: str, own: str, common: str) -> dict[str, str]:
    """Rows of T5's attention: the whole sublayer with its norm and residual sum, as in OpenDelta."""
    rows = attention(f"{layer}.{own}", "q", "k", "v", "o", common)
    del rows[f"{layer}.{own}"]
    return {layer: common, **rows, f"{layer}.layer_norm": f"{common}.layer_norm@"}


def _t5_feed_forward(layer: str) -> dict[str, str | tuple[str, ...]]:
    inside = f"{layer}.DenseReluDense"
    return {
        layer: "ff@",
        f"{inside}.wi": "ff@.w1@",
        f"{inside}.wi_0": ("ff@.w1@", "ff@.gate@"),
        f"{inside}.wi_1": ("ff@.w1@", "ff@.up@"),
        f"{inside}.wo": "ff@.w2@",
        f"{layer}.layer_norm": "ff@.layer_norm@",
    }


_T5_SELF = _t5_attention("layer.0", "SelfAttention", "attn@")

T5: Table = {
    "shared": "embeddings@",
    "encoder": "encoder@",
    "encoder.embed_tokens": "encoder@.embeddings@",
    "encoder.block": "encoder@.block@",
    "encoder.block.*": {**_T5_SELF, **_t5_feed_forward("layer.1")},
    "encoder.final_layer_norm": final_norm("encoder@"),
    "decoder": "decoder@",
    "decoder.embed_tokens": "decoder@.embeddings@",
    "decoder.block": "decoder@.block@",
    "decoder.block.*": {
        **_T5_SELF,
        **_t5_attention("layer.1", "EncDecAttention", "crossattn@"),
        **_t5_feed_forward("layer.2"),
    },
    "decoder.final_layer_norm": final_norm("decoder@"),
    "lm_head": HEAD,
}

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
_BART_LAYER: dict[str, str | tuple[str, ...]] = {
    **attention("self_attn", *_PROJECTIONS),
    "self_attn_layer_norm": "attn@.layer_norm@",
    # No module contains both, so each has the alias ff@.
    "fc1": ("ff@.w1@", "ff@"),
    "fc2": ("ff@.w2@", "ff@"),
    "final_layer_norm": "ff@.layer_norm@",
}

BART: Table = {
    "shared": "embeddings@",
    "encoder": "encoder@",
    "encoder.embed_tokens": "encoder@.embeddings@",
    "encoder.layers": "encoder@.block@",
    "encoder.layers.*": _BART_LAYER,
    "decoder": "decoder@",
    "decoder.embed_tokens": "decoder@.embeddings@",
    "decoder.layers": "decoder@.block@",
    "decoder.layers.*": {
        **_BART_LAYER,
        **attention("encoder_attn", *_PROJECTIONS, common="crossattn@"),
        "encoder_attn_layer_norm": "crossattn@.layer_norm@",
    },
    "lm_head": HEAD,
}
WHISPER: Table = {
    **BART,
    "decoder.embed_tokens": "embeddings@",
    "encoder.layer_norm": final_norm("encoder@"),
    "decoder.layer_norm": final_norm("decoder@"),
    "proj_out": HEAD,
}
