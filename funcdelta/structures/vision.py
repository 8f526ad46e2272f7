"""Tables of image and image-text encoders: ViT and the two towers of CLIP."""

from __future__ import annotations

from .pieces import attention, feed_forward, final_norm
from .rows import Table

VIT: Table = {
    "embeddings.patch_embeddings": "embeddings@",
    "layers": "encoder@.block@",
    "layers.*": {
        "layernorm_before": "attn@.layer_norm@",
        **attention("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
        "layernorm_after": "ff@.layer_norm@",
        **feed_forward("mlp", "fc1", "fc2"),
    },
    # The names in older releases of Transformers.
    "encoder": "encoder@",
    "encoder.layer": "encoder@.block@",
    "encoder.layer.*": {
        "layernorm_before": "attn@.layer_norm@",
        **attention("attention", "attention.query", "attention.key", "attention.value", "output.dense"),
        "layernorm_after": "ff@.layer_norm@",
        "intermediate": "ff@",
        "intermediate.dense": "ff@.w1@",
        "output": "ff@",
        "output.dense": "ff@.w2@",
    },
    "layernorm": final_norm("encoder@"),
}

_CLIP: Table = {
    "encoder": "encoder@",
    "encoder.layers": "encoder@.block@",
    "encoder.layers.*": {
        "layer_norm1": "attn@.layer_norm@",
        **attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
        "layer_norm2": "ff@.layer_norm@",
        **feed_forward("mlp", "fc1", "fc2"),
    },
}
CLIP_TEXT: Table = {
    **_CLIP,
    "embeddings.token_embedding": "embeddings@",
    "final_layer_norm": final_norm("encoder@"),
}
CLIP_VISION: Table = {
    **_CLIP,
    "embeddings.patch_embedding": "embeddings@",
    "post_layernorm": final_norm("encoder@"),
}
