"""The zoo's architectures from Transformers, made from tiny configs without network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn
from zoo_architecture import CLASSES, HIDDEN, VOCABULARY, Architecture, builder, numbers, text, text_pair


def pretrained(family: str, kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A builder of Transformers' ``<family><kind>`` with ``<family>Config(**options)``."""
    return builder(lambda: getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**options)))


def logits(output: Any) -> Tensor:
    """The ``logits`` of a Transformers output."""
    return output.logits


# Most have these: Transformers' mask builder reads the mask; fused attention has no double backward.
ENCODER = frozenset({"mask", "dropout", "vmap_mask_raises", "needs_math_attention"})
DECODER = frozenset({"mask", "cache", "vmap_mask_raises", "needs_math_attention", "float32_inside"})
NO_FUNC = {"no_func", "no_vmap", "no_vmap_grad", "no_jvp"}

SPECIAL = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
# The sizes of an encoder in the field names that BERT introduced.
BERT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_labels": CLASSES,
}
# Grouped-query attention: four query heads share two key and value heads.
LLAMA_SIZES = {
    **BERT_SIZES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
# Left to itself Transformers takes experts_implementation="grouped_mm", without float64 and forward mode.
MIXTRAL_SIZES = {**LLAMA_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT_SIZES = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 3}

TRANSFORMERS = [
    Architecture(
        name="bert",
        build=pretrained("Bert", "ForSequenceClassification", **BERT_SIZES),
        inputs=text,
        linears=("query", "value", "intermediate.dense", "attention.output.dense", "word_embeddings"),
        blocks=("attention", "output.dense"),
        attention=("attention",),
        head="classifier",
        default_target="query",
        output=logits,
        flags=ENCODER | {"batch_free_site"},
    ),
    Architecture(
        name="roberta",
        build=pretrained("Roberta", "ForSequenceClassification", **BERT_SIZES, **SPECIAL),
        inputs=text,
        linears=("query", "value", "intermediate.dense"),
        blocks=("attention", "output.dense"),
        attention=("attention",),
        head="classifier",
        default_target="query",
        output=logits,
        flags=ENCODER,
    ),
    Architecture(
        name="distilbert",
        build=pretrained(
            "DistilBert",
            "ForSequenceClassification",
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=32,
            num_labels=CLASSES,
        ),
        inputs=text,
        linears=("q_lin", "v_lin", "lin1", "lin2"),
        blocks=("attention", "ffn"),
        attention=("attention",),
        head="classifier",
        default_target="q_lin",
        output=logits,
        flags=ENCODER | {"batch_free_site"},
    ),
    Architecture(
        name="albert",
        build=pretrained("Albert", "ForSequenceClassification", **BERT_SIZES, embedding_size=8),
        inputs=text,
        linears=("query", "value", "ffn", "ffn_output", "embedding_hidden_mapping_in"),
        blocks=("attention", "ffn_output"),
        attention=("attention",),
        head="classifier",
        default_target="query",
        output=logits,
        flags=ENCODER | {"batch_free_site", "shared"},
    ),
    Architecture(
        name="deberta_v2",
        build=pretrained(
            "DebertaV2",
            "ForSequenceClassification",
            **BERT_SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        ),
        inputs=text,
        linears=("query_proj", "value_proj", "intermediate.dense"),
        blocks=("attention", "output.dense"),
        head="classifier",
        default_target="query_proj",
        output=logits,
        flags=frozenset({"mask", "dropout", "batch_free_site", "batch_free_target", "shared"}),
    ),
    Architecture(
        name="gpt2",
        build=pretrained("GPT2", "LMHeadModel", **GPT_SIZES, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=32),
        inputs=text,
        linears=("c_attn", "c_fc", "attn.c_proj", "wte"),
        blocks=("attn", "mlp"),
        attention=("attn",),
        head="ln_f",
        default_target="c_attn",
        output=logits,
        flags=ENCODER | {"cache", "tied", "batch_free_site"},
    ),
    Architecture(
        name="opt",
        build=pretrained(
            "OPT",
            "ForCausalLM",
            **SPECIAL,
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=32,
            word_embed_proj_dim=HIDDEN,
        ),
        inputs=text,
        linears=("q_proj", "v_proj", "fc1", "fc2"),
        blocks=("self_attn", "fc2"),
        attention=("self_attn",),
        head="decoder.final_layer_norm",
        default_target="q_proj",
        output=logits,
        flags=ENCODER | {"cache", "tied", "token_site"},
    ),
    Architecture(
        name="bloom",
        build=pretrained("Bloom", "ForCausalLM", **GPT_SIZES, hidden_size=HIDDEN, n_layer=2, n_head=2),
        inputs=text,
        linears=("query_key_value", "dense_h_to_4h", "self_attention.dense"),
        blocks=("self_attention", "mlp"),
        head="ln_f",
        default_target="query_key_value",
        output=logits,
        flags=frozenset({"mask", "cache", "tied", "float32_inside", "vmap_mask_raises", "no_fullgraph"} | NO_FUNC),
    ),
    Architecture(
        name="llama",
        build=pretrained("Llama", "ForCausalLM", **LLAMA_SIZES),
        inputs=text,
        linears=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens"),
        blocks=("self_attn", "mlp"),
        attention=("self_attn",),
        head="lm_head",
        default_target="q_proj",
        output=logits,
        flags=DECODER,
    ),
    Architecture(
        name="qwen3",
        build=pretrained("Qwen3", "ForCausalLM", **LLAMA_SIZES),
        inputs=text,
        linears=("q_proj", "v_proj", "gate_proj", "down_proj"),
        blocks=("self_attn", "mlp"),
        attention=("self_attn",),
        head="lm_head",
        default_target="q_proj",
        output=logits,
        flags=DECODER,
    ),
    Architecture(
        name="mixtral",
        build=pretrained("Mixtral", "ForCausalLM", **MIXTRAL_SIZES, experts_implementation="batched_mm"),
        inputs=text,
        linears=("q_proj", "v_proj", "o_proj"),
        blocks=("self_attn", "mlp"),
        attention=("self_attn",),
        head="lm_head",
        default_target="q_proj",
        output=logits,
        flags=DECODER | {"moe", "token_site"},
    ),
    Architecture(
        name="mixtral_grouped",
        build=pretrained("Mixtral", "ForCausalLM", **MIXTRAL_SIZES),
        inputs=text,
        linears=("q_proj", "v_proj", "o_proj"),
        blocks=("self_attn", "mlp"),
        attention=("self_attn",),
        head="lm_head",
        default_target="q_proj",
        output=logits,
        flags=frozenset({"mask", "cache", "moe", "token_site", "vmap_mask_raises", "no_float64", "no_jvp"}),
    ),
    Architecture(
        name="t5",
        build=pretrained(
            "T5",
            "ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
        ),
        inputs=text_pair,
        linears=("q", "EncDecAttention.v", "wi", "wo"),
        blocks=("SelfAttention", "EncDecAttention", "DenseReluDense"),
        attention=("SelfAttention",),
        head="decoder.final_layer_norm",
        default_target="q",
        output=logits,
        flags=ENCODER | {"cache", "tied", "float32_inside", "batch_free_site"},
    ),
    Architecture(
        name="bart",
        build=pretrained(
            "Bart",
            "ForConditionalGeneration",
            **SPECIAL,
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        ),
        inputs=text_pair,
        linears=("q_proj", "v_proj", "fc1", "fc2"),
        blocks=("self_attn", "encoder_attn", "fc2"),
        attention=("self_attn", "encoder_attn"),
        head="decoder.layernorm_embedding",
        default_target="q_proj",
        output=logits,
        flags=ENCODER | {"cache", "tied"},
    ),
    Architecture(
        name="vit",
        build=pretrained(
            "ViT",
            "ForImageClassification",
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        ),
        inputs=numbers("pixel_values", 3, 8, 8),
        linears=("q_proj", "v_proj", "fc1", "projection"),
        blocks=("attention", "mlp"),
        attention=("attention",),
        head="classifier",
        default_target="q_proj",
        output=logits,
        flags=frozenset({"needs_math_attention"}),
    ),
]
