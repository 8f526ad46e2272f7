"""Tables of text encoders: BERT and similar models, DeBERTa-v2, DistilBERT, ALBERT, ModernBERT."""

from __future__ import annotations

from .layouts import side_by_side
from .pieces import HEAD, attention, feed_forward, final_norm
from .rows import Fused, Table


def _bert(q: str, k: str, v: str) -> dict[str, str | Table]:
    """The body of a BERT with these projections."""
    inside = (f"self.{q}", f"self.{k}", f"self.{v}", "output.dense")
    return {
        "embeddings.word_embeddings": "embeddings@",
        "encoder": "encoder@",
        "encoder.layer": "encoder@.block@",
        "encoder.layer.*": {
            **attention("attention", *inside),
            "attention.output.LayerNorm": "attn@.layer_norm@",
            **attention("crossattention", *inside, common="crossattn@"),
            "crossattention.output.LayerNorm": "crossattn@.layer_norm@",
            # Two modules make up the feed-forward network.
            "intermediate": "ff@",
            "intermediate.dense": "ff@.w1@",
            "output": "ff@",
            "output.dense": "ff@.w2@",
            "output.LayerNorm": "ff@.layer_norm@",
        },
    }


BERT: Table = {
    **_bert("query", "key", "value"),
    "cls.predictions": "lm_head@",
    "cls.predictions.decoder": "lm_head@.proj@",
}
ROBERTA: Table = {
    **_bert("query", "key", "value"),
    "lm_head": "lm_head@",
    "lm_head.decoder": "lm_head@.proj@",
}
ELECTRA: Table = {
    **_bert("query", "key", "value"),
    "generator_lm_head": HEAD,
}
DEBERTA: Table = {
    **_bert("query_proj", "key_proj", "value_proj"),
    "cls.predictions": "lm_head@",
    "cls.predictions.decoder": "lm_head@.proj@",
}
DISTILBERT: Table = {
    "embeddings.word_embeddings": "embeddings@",
    "transformer": "encoder@",
    "transformer.layer": "encoder@.block@",
    "transformer.layer.*": {
        **attention("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        "sa_layer_norm": "attn@.layer_norm@",
        **feed_forward("ffn", "lin1", "lin2"),
        "output_layer_norm": "ff@.layer_norm@",
    },
    "vocab_projector": HEAD,
}
ALBERT: Table = {
    "embeddings.word_embeddings": "embeddings@",
    "encoder": "encoder@",
    # Layers are in groups, and are numbered within their group.
    "encoder.albert_layer_groups.*.albert_layers": "encoder@.albert_layer_groups.*.block@",
    "encoder.albert_layer_groups.*.albert_layers.*": {
        **attention("attention", "query", "key", "value", "dense"),
        "attention.LayerNorm": "attn@.layer_norm@",
        # No module contains both.
        "ffn": ("ff@.w1@", "ff@"),
        "ffn_output": ("ff@.w2@", "ff@"),
        "full_layer_layer_norm": "ff@.layer_norm@",
    },
    "predictions": "lm_head@",
    "predictions.decoder": "lm_head@.proj@",
}
MODERNBERT: Table = {
    "embeddings.tok_embeddings": "embeddings@",
    "layers": "encoder@.block@",
    "layers.*": {
        "attn_norm": "attn@.layer_norm@",
        "attn": "attn@",
        "attn.Wqkv": Fused("attn@", ("q", "k", "v"), side_by_side),
        "attn.Wo": "attn@.proj@",
        "mlp_norm": "ff@.layer_norm@",
        "mlp": "ff@",
        "mlp.Wi": Fused("ff@", ("gate", "up"), side_by_side, whole="ff@.w1@"),
        "mlp.Wo": "ff@.w2@",
    },
    "final_norm": final_norm("encoder@"),
    "decoder": HEAD,
}
