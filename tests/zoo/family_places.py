"""Where the parts of each family's layers are: written by hand, apart from the library's tables."""

from __future__ import annotations

from collections.abc import Mapping

Places = Mapping[str, str]
"""``{common name: own names, separated by spaces, below the layer}``."""


def projections(own: str, names: str, common: str = "attn@") -> dict[str, str]:
    """``{"attn@.q@": "self_attn.q_proj", ...}`` for q, k, v and the output's projection."""
    return {
        f"{common}.{part}@": f"{own}.{name}" for part, name in zip(("q", "k", "v", "proj"), names.split(), strict=True)
    }


BERT_LAYER = {
    "attn@": "attention",
    **projections("attention", "self.query self.key self.value output.dense"),
    "ff@": "intermediate output",
    "ff@.w1@": "intermediate.dense",
    "ff@.w2@": "output.dense",
    "attn@.layer_norm@": "attention.output.LayerNorm",
    "ff@.layer_norm@": "output.LayerNorm",
    "layer_norm@": "attention.output.LayerNorm output.LayerNorm",
}
DEBERTA_LAYER = {**BERT_LAYER, **projections("attention", "self.query_proj self.key_proj self.value_proj output.dense")}
LLAMA_LAYER = {
    "attn@": "self_attn",
    **projections("self_attn", "q_proj k_proj v_proj o_proj"),
    "ff@": "mlp",
    "ff@.w1@": "mlp.gate_proj mlp.up_proj",
    "ff@.gate@": "mlp.gate_proj",
    "ff@.up@": "mlp.up_proj",
    "ff@.w2@": "mlp.down_proj",
    "layer_norm@": "input_layernorm post_attention_layernorm",
    "attn@.layer_norm@": "input_layernorm",
    "ff@.layer_norm@": "post_attention_layernorm",
}
GEMMA2_LAYER = {
    **LLAMA_LAYER,
    "attn@.layer_norm@": "input_layernorm post_attention_layernorm",
    "ff@.layer_norm@": "pre_feedforward_layernorm post_feedforward_layernorm",
    "layer_norm@": "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm",
}
GPT2_LAYER = {
    "attn@": "attn",
    "attn@.q,k,v@": "attn.c_attn",
    "attn@.q@": "attn.c_attn",
    "attn@.k@": "attn.c_attn",
    "attn@.v@": "attn.c_attn",
    "attn@.proj@": "attn.c_proj",
    "crossattn@": "crossattention",
    "crossattn@.q@": "crossattention.q_attn",
    "crossattn@.k@": "crossattention.c_attn",
    "crossattn@.v@": "crossattention.c_attn",
    "crossattn@.proj@": "crossattention.c_proj",
    "ff@": "mlp",
    "ff@.w1@": "mlp.c_fc",
    "ff@.w2@": "mlp.c_proj",
    "layer_norm@": "ln_1 ln_cross_attn ln_2",
}
FUSED_LAYER = {
    "attn@": "attention",
    "attn@.q@": "attention.query_key_value",
    "attn@.k@": "attention.query_key_value",
    "attn@.v@": "attention.query_key_value",
    "attn@.proj@": "attention.dense",
    "ff@": "mlp",
    "ff@.w1@": "mlp.dense_h_to_4h",
    "ff@.w2@": "mlp.dense_4h_to_h",
    "layer_norm@": "input_layernorm post_attention_layernorm",
}
OPT_LAYER = {
    "attn@": "self_attn",
    **projections("self_attn", "q_proj k_proj v_proj out_proj"),
    "ff@": "fc1 fc2",
    "ff@.w1@": "fc1",
    "ff@.w2@": "fc2",
    "layer_norm@": "self_attn_layer_norm final_layer_norm",
}
T5_SELF = {
    "attn@": "layer.0",
    **projections("layer.0.SelfAttention", "q k v o"),
    "attn@.layer_norm@": "layer.0.layer_norm",
}
T5_CROSS = {
    "crossattn@": "layer.1",
    **projections("layer.1.EncDecAttention", "q k v o", "crossattn@"),
    "crossattn@.layer_norm@": "layer.1.layer_norm",
}


def t5_places(w1: str) -> tuple[tuple[str, Places], ...]:
    def feed_forward(at: str) -> dict[str, str]:
        return {
            "ff@": at,
            "ff@.w1@": " ".join(f"{at}.DenseReluDense.{name}" for name in w1.split()),
            "ff@.w2@": f"{at}.DenseReluDense.wo",
        }

    norms = "layer.0.layer_norm layer.1.layer_norm"
    return (
        ("encoder.block", {**T5_SELF, **feed_forward("layer.1"), "layer_norm@": norms}),
        (
            "decoder.block",
            {**T5_SELF, **T5_CROSS, **feed_forward("layer.2"), "layer_norm@": f"{norms} layer.2.layer_norm"},
        ),
    )


T5_OTHERS = {
    "embeddings@": "shared encoder.embed_tokens decoder.embed_tokens",
    "layer_norm@": "encoder.final_layer_norm decoder.final_layer_norm",
    "lm_head@": "lm_head",
}
BART_ENCODER_LAYER = {**OPT_LAYER, "attn@.layer_norm@": "self_attn_layer_norm", "ff@.layer_norm@": "final_layer_norm"}
BART_DECODER_LAYER = {
    **BART_ENCODER_LAYER,
    "crossattn@": "encoder_attn",
    **projections("encoder_attn", "q_proj k_proj v_proj out_proj", "crossattn@"),
    "layer_norm@": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm",
}
BART_LAYERS = (("model.encoder.layers", BART_ENCODER_LAYER), ("model.decoder.layers", BART_DECODER_LAYER))
CLIP_LAYER = {
    "attn@": "self_attn",
    **projections("self_attn", "q_proj k_proj v_proj out_proj"),
    "ff@": "mlp",
    "ff@.w1@": "mlp.fc1",
    "ff@.w2@": "mlp.fc2",
    "attn@.layer_norm@": "layer_norm1",
    "ff@.layer_norm@": "layer_norm2",
    "layer_norm@": "layer_norm1 layer_norm2",
}
