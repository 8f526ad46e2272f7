"""One tiny model of every family with common names, and where its parts are: written by hand, apart from the tables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from family_places import (
    BART_LAYERS,
    BERT_LAYER,
    CLIP_LAYER,
    DEBERTA_LAYER,
    FUSED_LAYER,
    GEMMA2_LAYER,
    GPT2_LAYER,
    LLAMA_LAYER,
    OPT_LAYER,
    T5_OTHERS,
    Places,
    projections,
    t5_places,
)
from torch import nn
from zoo_architecture import builder
from zoo_transformers import pretrained

BODY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
GROUPED = {**BODY, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "pad_token_id": 0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, **SPECIAL}
T5 = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2}
BART = {
    "vocab_size": 16,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    **SPECIAL,
    "decoder_start_token_id": 1,
}
VISION = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """A model and its places.

    Attributes:
        layers: paths of the stacks of layers, each with what is where in one of its layers.
        others: common names of what is in no layer, with full paths.
        inputs: what the model reads.
    """

    build: Callable[[], nn.Module]
    layers: tuple[tuple[str, Places], ...]
    others: Places
    inputs: str = "text"

    @functools.cached_property
    def model(self) -> nn.Module:
        return self.build()

    def expected(self, name: str, layer: int | None = None) -> list[str]:
        """Every path that ``name`` means, in both layers or in one; those of no layer come last."""
        found = [
            f"{stack}.{i}.{own}"
            for stack, places in self.layers
            for i in ((0, 1) if layer is None else (layer,))
            for own in places.get(name, "").split()
            # ModernBERT's first layer has no norm, and an identity in its place.
            if not isinstance(self.model.get_submodule(f"{stack}.{i}.{own}"), nn.Identity)
        ]
        return found + (self.others.get(name, "").split() if layer is None else [])

    def example(self, rows: int = 2) -> dict[str, torch.Tensor]:
        """Inputs of the model, the same each time."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 16, (rows, 5), generator=generator)
        image = torch.randn(rows, 3, 8, 8, generator=generator)
        sound = torch.randn(rows, 4, 12, generator=generator)
        return {
            "text": {"input_ids": tokens},
            "crossed": {"input_ids": tokens, "encoder_hidden_states": torch.randn(rows, 4, 8, generator=generator)},
            "pair": {"input_ids": tokens, "decoder_input_ids": tokens[:, :3]},
            "sound": {"input_features": sound, "decoder_input_ids": tokens[:, :3]},
            "image": {"pixel_values": image},
            "image and text": {"input_ids": tokens, "pixel_values": image},
        }[self.inputs]

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*(name for _, places in self.layers for name in places), *self.others]))


def bert_like(name: str, path: str, head: Places, layer: Places = BERT_LAYER, **more: Any) -> Family:
    embeddings = {"embeddings@": f"{path}.embeddings.word_embeddings"}
    build = pretrained(name, "ForMaskedLM", **BODY, **SPECIAL, **more)
    return Family(build, ((f"{path}.encoder.layer", layer),), {**embeddings, **head})


def causal(name: str, layer: Places, others: Places, sizes: Mapping[str, Any] = GROUPED, **more: Any) -> Family:
    stack = "transformer.h" if others["embeddings@"].startswith("transformer") else "model.layers"
    places = {"lm_head@": "lm_head", "lm_head@.proj@": "lm_head", **others}
    return Family(pretrained(name, "ForCausalLM", **{**sizes, **more}), ((stack, layer),), places)


LLAMA_OTHERS = {"embeddings@": "model.embed_tokens", "layer_norm@": "model.norm"}
GPT_OTHERS = {"embeddings@": "transformer.wte", "layer_norm@": "transformer.ln_f"}
TEXT_HEAD = {"lm_head@": "cls.predictions", "lm_head@.proj@": "cls.predictions.decoder"}
ROBERTA_HEAD = {"lm_head@": "lm_head", "lm_head@.proj@": "lm_head.decoder"}

FAMILIES: dict[str, Family] = {
    "bert": bert_like("Bert", "bert", TEXT_HEAD),
    "roberta": bert_like("Roberta", "roberta", ROBERTA_HEAD),
    "xlm-roberta": bert_like("XLMRoberta", "roberta", ROBERTA_HEAD),
    "electra": bert_like(
        "Electra", "electra", {"lm_head@": "generator_lm_head", "lm_head@.proj@": "generator_lm_head"}
    ),
    "deberta-v2": bert_like(
        "DebertaV2", "deberta", TEXT_HEAD, DEBERTA_LAYER, relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "albert": Family(
        pretrained("Albert", "ForMaskedLM", **BODY, **SPECIAL, embedding_size=4, inner_group_num=2),
        (
            (
                "albert.encoder.albert_layer_groups.0.albert_layers",
                {
                    "attn@": "attention",
                    **projections("attention", "query key value dense"),
                    "ff@": "ffn ffn_output",
                    "ff@.w1@": "ffn",
                    "ff@.w2@": "ffn_output",
                    "layer_norm@": "attention.LayerNorm full_layer_layer_norm",
                },
            ),
        ),
        {"embeddings@": "albert.embeddings.word_embeddings", "lm_head@.proj@": "predictions.decoder"},
    ),
    "distilbert": Family(
        pretrained("DistilBert", "ForMaskedLM", vocab_size=16, dim=8, n_layers=2, n_heads=2, hidden_dim=12),
        (
            (
                "distilbert.transformer.layer",
                {
                    "attn@": "attention",
                    **projections("attention", "q_lin k_lin v_lin out_lin"),
                    "ff@": "ffn",
                    "ff@.w1@": "ffn.lin1",
                    "ff@.w2@": "ffn.lin2",
                    "layer_norm@": "sa_layer_norm output_layer_norm",
                },
            ),
        ),
        {"embeddings@": "distilbert.embeddings.word_embeddings", "lm_head@.proj@": "vocab_projector"},
    ),
    "modernbert": Family(
        pretrained("ModernBert", "ForMaskedLM", **BODY, **SPECIAL, cls_token_id=1, sep_token_id=2),
        (
            (
                "model.layers",
                {
                    "attn@": "attn",
                    "attn@.q@": "attn.Wqkv",
                    "attn@.k@": "attn.Wqkv",
                    "attn@.v@": "attn.Wqkv",
                    "attn@.proj@": "attn.Wo",
                    "ff@": "mlp",
                    "ff@.w1@": "mlp.Wi",
                    "ff@.gate@": "mlp.Wi",
                    "ff@.w2@": "mlp.Wo",
                    "layer_norm@": "attn_norm mlp_norm",
                },
            ),
        ),
        {
            "embeddings@": "model.embeddings.tok_embeddings",
            "layer_norm@": "model.final_norm",
            "lm_head@.proj@": "decoder",
        },
    ),
    "gpt2": Family(
        pretrained("GPT2", "LMHeadModel", **GPT, add_cross_attention=True),
        (("transformer.h", GPT2_LAYER),),
        {"lm_head@": "lm_head", "lm_head@.proj@": "lm_head", **GPT_OTHERS},
        "crossed",
    ),
    "gptj": causal(
        "GPTJ",
        {
            "attn@": "attn",
            **projections("attn", "q_proj k_proj v_proj out_proj"),
            "ff@": "mlp",
            "ff@.w1@": "mlp.fc_in",
            "ff@.w2@": "mlp.fc_out",
            "layer_norm@": "ln_1",
        },
        GPT_OTHERS,
        GPT,
        rotary_dim=2,
    ),
    "gpt_neox": Family(
        pretrained("GPTNeoX", "ForCausalLM", **BODY, **SPECIAL),
        (("gpt_neox.layers", FUSED_LAYER),),
        {"embeddings@": "gpt_neox.embed_in", "layer_norm@": "gpt_neox.final_layer_norm"},
    ),
    "bloom": causal(
        "Bloom",
        {name: own.replace("attention.", "self_attention.") for name, own in FUSED_LAYER.items()}
        | {"attn@": "self_attention"},
        {"embeddings@": "transformer.word_embeddings", "layer_norm@": "transformer.ln_f"},
        {"vocab_size": 16, "hidden_size": 8, "n_layer": 2, "n_head": 2, **SPECIAL},
    ),
    "opt": Family(
        pretrained(
            "OPT",
            "ForCausalLM",
            vocab_size=16,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=12,
            max_position_embeddings=16,
            word_embed_proj_dim=8,
            **SPECIAL,
        ),
        (("model.decoder.layers", OPT_LAYER),),
        {"embeddings@": "model.decoder.embed_tokens", "layer_norm@": "model.decoder.final_layer_norm"},
    ),
    "llama": causal("Llama", LLAMA_LAYER, LLAMA_OTHERS),
    "mistral": causal("Mistral", LLAMA_LAYER, LLAMA_OTHERS),
    "qwen2": causal("Qwen2", LLAMA_LAYER, LLAMA_OTHERS),
    "qwen3": causal("Qwen3", LLAMA_LAYER, LLAMA_OTHERS),
    "gemma": causal("Gemma", LLAMA_LAYER, LLAMA_OTHERS),
    "gemma2": causal("Gemma2", GEMMA2_LAYER, LLAMA_OTHERS),
    "gemma3_text": Family(
        builder(lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED))),
        (("model.layers", GEMMA2_LAYER),),
        LLAMA_OTHERS,
    ),
    "gemma3": Family(
        pretrained("Gemma3", "ForConditionalGeneration", text_config=GROUPED, vision_config=VISION),
        (("model.language_model.layers", GEMMA2_LAYER),),
        {"embeddings@": "model.language_model.embed_tokens", "layer_norm@": "model.language_model.norm"}
        | {"lm_head@": "lm_head"},
    ),
    "mixtral": causal(
        "Mixtral",
        {
            "attn@": "self_attn",
            **projections("self_attn", "q_proj k_proj v_proj o_proj"),
            "ff@": "mlp",
            "ff@.w1@": "mlp",
            "ff@.w2@": "mlp",
            "layer_norm@": "input_layernorm post_attention_layernorm",
        },
        LLAMA_OTHERS,
        num_local_experts=2,
    ),
    "phi": causal(
        "Phi",
        {
            "attn@": "self_attn",
            **projections("self_attn", "q_proj k_proj v_proj dense"),
            "ff@": "mlp",
            "ff@.w1@": "mlp.fc1",
            "ff@.w2@": "mlp.fc2",
            "layer_norm@": "input_layernorm",
        },
        {**LLAMA_OTHERS, "layer_norm@": "model.final_layernorm"},
        {**BODY, **SPECIAL},
    ),
    "phi3": causal(
        "Phi3",
        {
            "attn@": "self_attn",
            "attn@.q@": "self_attn.qkv_proj",
            "attn@.k@": "self_attn.qkv_proj",
            "attn@.v@": "self_attn.qkv_proj",
            "attn@.proj@": "self_attn.o_proj",
            "ff@": "mlp",
            "ff@.w1@": "mlp.gate_up_proj",
            "ff@.up@": "mlp.gate_up_proj",
            "ff@.w2@": "mlp.down_proj",
            "layer_norm@": "input_layernorm post_attention_layernorm",
        },
        LLAMA_OTHERS,
        **SPECIAL,
    ),
    "t5": Family(pretrained("T5", "ForConditionalGeneration", **T5), t5_places("wi"), T5_OTHERS, "pair"),
    "gated t5": Family(
        pretrained("T5", "ForConditionalGeneration", **T5, feed_forward_proj="gated-gelu"),
        t5_places("wi_0 wi_1"),
        T5_OTHERS,
        "pair",
    ),
    "mt5": Family(pretrained("MT5", "ForConditionalGeneration", **T5), t5_places("wi_0 wi_1"), T5_OTHERS, "pair"),
    "bart": Family(
        pretrained("Bart", "ForConditionalGeneration", **BART),
        BART_LAYERS,
        {"embeddings@": "model.shared model.encoder.embed_tokens model.decoder.embed_tokens", "lm_head@": "lm_head"},
        "pair",
    ),
    "whisper": Family(
        pretrained("Whisper", "ForConditionalGeneration", **BART, num_mel_bins=4, max_source_positions=6),
        BART_LAYERS,
        {
            "embeddings@": "model.decoder.embed_tokens",
            "layer_norm@": "model.encoder.layer_norm model.decoder.layer_norm",
            "lm_head@.proj@": "proj_out",
        },
        "sound",
    ),
    "vit": Family(
        pretrained("ViT", "ForImageClassification", **VISION),
        (
            (
                "vit.layers",
                {
                    "attn@": "attention",
                    **projections("attention", "q_proj k_proj v_proj o_proj"),
                    "ff@": "mlp",
                    "ff@.w1@": "mlp.fc1",
                    "ff@.w2@": "mlp.fc2",
                    "layer_norm@": "layernorm_before layernorm_after",
                },
            ),
        ),
        {"embeddings@": "vit.embeddings.patch_embeddings", "layer_norm@": "vit.layernorm"},
        "image",
    ),
    "clip": Family(
        pretrained("CLIP", "Model", text_config={**BODY, **SPECIAL}, vision_config=VISION, projection_dim=6),
        (("text_model.encoder.layers", CLIP_LAYER), ("vision_model.encoder.layers", CLIP_LAYER)),
        {
            "embeddings@": "text_model.embeddings.token_embedding vision_model.embeddings.patch_embedding",
            "layer_norm@": "text_model.final_layer_norm vision_model.post_layernorm",
        },
        "image and text",
    ),
}
