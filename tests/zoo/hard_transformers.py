"""Hard models from Transformers and diffusers, made from tiny configs without network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import transformers
from hard_case import CLASSES, HIDDEN, VOCABULARY, Batch, Hard, floats, right_padding, tokens
from torch import Tensor, nn

IMAGE = VOCABULARY - 1
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DECODER = {**SIZES, **SPECIAL, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False}
PER_LAYER = {
    **DECODER,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"] * 2,
}
PAIR = {**SPECIAL, "vocab_size": VOCABULARY, "d_model": HIDDEN, "decoder_start_token_id": 2}
VISION = {**SIZES, "vocab_size": None, "image_size": 8, "patch_size": 4, "projection_dim": 8}


def model(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A constructor of Transformers' class ``name`` with ``config(**options)``."""

    def make() -> nn.Module:
        made = getattr(transformers, name)(getattr(transformers, config)(**options))
        for module in made.modules():
            if type(module).__name__.endswith("Router") and "dtype" in vars(module):
                # Left to itself it casts its layer to float32 in every call.
                vars(module)["dtype"] = torch.float64
        return made

    return make


def logits(output: Any) -> Tensor:
    """The ``logits``."""
    return output.logits


def text(rows: int, seed: int, variant: int) -> Batch:
    """Token ids and a mask: whole rows first, then rows padded on the right, then other lengths."""
    length = (5, 6, 4)[variant]
    mask = torch.ones(rows, length, dtype=torch.long) if variant == 0 else right_padding(rows, length, variant)
    return {"input_ids": tokens(rows, seed, length, IMAGE), "attention_mask": mask}


def pair(rows: int, seed: int, variant: int) -> Batch:
    """Those of ``text``, and the decoder's tokens."""
    return {**text(rows, seed, variant), "decoder_input_ids": tokens(rows, seed + 77, (4, 3, 4)[variant], IMAGE)}


def few_tokens(rows: int, seed: int, variant: int) -> Batch:
    """Text whose tokens are a handful, so that most experts get none: two ids in the first variant."""
    batch = pair(rows, seed, variant)
    limit = (5, 20, IMAGE)[variant]
    return {key: value if "mask" in key else 3 + value % (limit - 3) for key, value in batch.items()}


def pictures(rows: int, seed: int, variant: int) -> Batch:
    """Images of 32 × 32."""
    del variant
    return {"pixel_values": floats(rows, seed, 3, 32, 32)}


def small_pictures(rows: int, seed: int, variant: int) -> Batch:
    """Images of the size that the model expects, then larger ones with interpolated positions, then smaller text."""
    size = (8, 16)[variant]
    batch: Batch = {"pixel_values": floats(rows, seed, 3, size, size)}
    return {**batch, "interpolate_pos_encoding": True} if variant else batch


def with_pictures(rows: int, seed: int, variant: int) -> Batch:
    """Text with an image in every row, then only in every other one, then in none."""
    ids = tokens(rows, seed, 7, IMAGE)
    shown = [row for row in range(rows) if variant == 0 or (variant == 1 and row % 2 == 0)]
    ids[shown, 1:5] = IMAGE
    batch: Batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**batch, "pixel_values": floats(len(shown), seed, 3, 8, 8)} if shown else batch


def one_with_picture(batch: Batch, row: int) -> Batch:
    """One row, with its image if it has one."""
    has = (batch["input_ids"] == IMAGE).any(1)
    alone = {key: batch[key][row : row + 1] for key in ("input_ids", "attention_mask")}
    if "pixel_values" not in batch or not has[row]:
        return alone
    image = int(has[:row].sum())
    return {**alone, "pixel_values": batch["pixel_values"][image : image + 1]}


def three_positions(rows: int, seed: int, variant: int) -> Batch:
    """Text padded on the left, with positions (3, b, s) for time, height and width."""
    batch = text(rows, seed, variant)
    mask = batch["attention_mask"].flip(1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[None].repeat(3, 1, 1)
    positions[2] *= 2
    return {**batch, "attention_mask": mask, "position_ids": positions}


def one_with_positions(batch: Batch, row: int) -> Batch:
    """One row; positions are cut along their second axis."""
    cut = slice(row, row + 1)
    return {key: value[:, cut] if key == "position_ids" else value[cut] for key, value in batch.items()}


def sounds(rows: int, seed: int, variant: int) -> Batch:
    """Waves of 200 samples, or of 160."""
    return {"input_values": floats(rows, seed, (200, 160)[variant])}


def noises(rows: int, seed: int, variant: int) -> Batch:
    """Latents, a time that all share, and a text to condition on."""
    return {
        "sample": floats(rows, seed, 4, 8, 8),
        "timestep": torch.tensor(7 + variant),
        "encoder_hidden_states": floats(rows, seed + 9, (5, 3)[variant], 8),
    }


def unet() -> nn.Module:
    """A UNet of two scales with cross attention."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )


def hard(name: str, make: Callable[[], nn.Module], inputs: Any, *targets: str, flags: str = "", **options: Any) -> Hard:
    """A hard model with its flags in one string."""
    return Hard(name, make, inputs, targets, flags=frozenset(flags.split()), **{"output": logits, **options})


switch = model(
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    **PAIR,
    d_kv=8,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    num_experts=4,
    expert_capacity=2,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    router_jitter_noise=0.0,
    dropout_rate=0.0,
    tie_word_embeddings=False,
)
nllb = model(
    "NllbMoeForConditionalGeneration",
    "NllbMoeConfig",
    **PAIR,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    num_experts=2,
    expert_capacity=9,
    encoder_sparse_step=1,
    decoder_sparse_step=1,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    moe_token_dropout=0.0,
    router_jitter_noise=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
    max_position_embeddings=32,
    second_expert_policy="all",
    tie_word_embeddings=False,
)
wav2vec2 = model(
    "Wav2Vec2ForSequenceClassification",
    "Wav2Vec2Config",
    **SIZES,
    conv_dim=(8, 8),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.5,
    mask_time_prob=0.0,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    feat_proj_dropout=0.0,
    final_dropout=0.0,
    num_labels=CLASSES,
    classifier_proj_size=8,
)
clip = model(
    "CLIPVisionModelWithProjection",
    "CLIPVisionConfig",
    **{key: value for key, value in VISION.items() if value is not None},
)
llava = lambda: transformers.LlavaForConditionalGeneration(  # noqa: E731
    transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{k: v for k, v in VISION.items() if v is not None}),
        text_config=transformers.LlamaConfig(**DECODER),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
)
qwen2_vl = lambda: transformers.Qwen2VLForConditionalGeneration(  # noqa: E731
    transformers.Qwen2VLConfig(
        text_config={
            **DECODER,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
)

TRANSFORMERS = [
    hard(
        "switch",
        switch,
        few_tokens,
        *(r"[r]experts\.expert_\d+\.w[io]", "q", "v"),
        flags="float32 no_func",
        variants=3,
    ),
    hard("switch_router", switch, few_tokens, "router.classifier", "q", flags="float32 no_func", variants=3),
    hard(
        "nllb_moe",
        nllb,
        pair,
        *(r"[r]experts\.expert_\d+\.fc[12]", "q_proj", "v_proj"),
        flags="float32 mixes training keeps no_func",
        variants=3,
    ),
    hard("nllb_moe_evaluation", nllb, pair, "q_proj", "v_proj", flags="float32 mixes keeps no_func", variants=3),
    hard(
        "mixtral",
        model(
            "MixtralForCausalLM",
            "MixtralConfig",
            **DECODER,
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_implementation="batched_mm",
        ),
        text,
        *("q_proj", "v_proj"),
        flags="float32 generates",
        variants=3,
    ),
    hard(
        "mixtral_router",
        model(
            "MixtralForCausalLM",
            "MixtralConfig",
            **DECODER,
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_implementation="eager",
        ),
        text,
        *("mlp.gate", "v_proj"),
        flags="float32 may_refuse",
        variants=3,
    ),
    hard(
        "llama4",
        model(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            **DECODER,
            intermediate_size_mlp=24,
            num_local_experts=4,
            num_experts_per_tok=1,
            attention_chunk_size=64,
        ),
        text,
        *("feed_forward.router", "q_proj"),
        flags="float32",
        variants=3,
    ),
    hard(
        "llava",
        llava,
        with_pictures,
        *("q_proj", "v_proj"),
        flags="float32 generates",
        without_rows=("pixel_values",),
        row=one_with_picture,
        variants=3,
    ),
    hard(
        "qwen2_vl",
        qwen2_vl,
        three_positions,
        *("q_proj", "v_proj"),
        flags="float32 routes",
        without_rows=("position_ids",),
        row=one_with_positions,
        variants=3,
    ),
    hard(
        "recurrent_gemma",
        model(
            "RecurrentGemmaForCausalLM",
            "RecurrentGemmaConfig",
            **{**DECODER, "num_hidden_layers": 3, "eos_token_id": None},
            lru_width=16,
            attention_window_size=8,
            conv1d_width=3,
            block_types=["recurrent", "recurrent", "attention"],
        ),
        text,
        *("conv_1d", "linear_x"),
        flags="float32 generates keeps",
        variants=3,
    ),
    hard(
        "gemma3",
        model("Gemma3ForCausalLM", "Gemma3TextConfig", **DECODER, sliding_window=8),
        text,
        *("embed_tokens", "q_proj"),
        flags="float32 folds routes generates",
        variants=3,
    ),
    hard(
        "gemma3n",
        model(
            "Gemma3nForCausalLM",
            "Gemma3nTextConfig",
            **PER_LAYER,
            laurel_rank=4,
            altup_num_inputs=2,
            sliding_window=16,
            activation_sparsity_pattern=None,
        ),
        text,
        *("embed_tokens_per_layer", "q_proj"),
        flags="float32",
        weights=0.2,
        variants=3,
    ),
    hard(
        "gemma4",
        model("Gemma4ForCausalLM", "Gemma4TextConfig", **PER_LAYER, global_head_dim=8, sliding_window=32),
        text,
        *("embed_tokens_per_layer", "embed_tokens", "q_proj"),
        flags="float32",
        variants=3,
    ),
    hard(
        "bit",
        model(
            "BitForImageClassification",
            "BitConfig",
            num_channels=3,
            embedding_size=8,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="preactivation",
            num_groups=4,
            num_labels=CLASSES,
        ),
        pictures,
        *("conv2", "classifier.1"),
        flags="folds routes",
    ),
    hard(
        "levit",
        model(
            "LevitForImageClassification",
            "LevitConfig",
            image_size=32,
            hidden_sizes=[8, 12, 16],
            num_attention_heads=[2, 2, 2],
            depths=[1, 1, 1],
            key_dim=[4, 4, 4],
            patch_size=16,
            mlp_ratio=[2, 2, 2],
            attention_ratio=[2, 2, 2],
            num_labels=CLASSES,
        ),
        pictures,
        "classifier.linear",
        trained=(r"[r]attention_biases",),
        flags="keeps",
        weights=0.15,
    ),
    hard(
        "convnext",
        model(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[8, 12, 16, 16],
            depths=[1, 1, 1, 1],
            patch_size=2,
            num_labels=CLASSES,
        ),
        pictures,
        *("pwconv1", "dwconv"),
        trained=("embeddings.layernorm",),
        flags="folds routes",
    ),
    hard(
        "wav2vec2",
        wav2vec2,
        sounds,
        *("q_proj", "v_proj"),
        flags="draws random training",
        variants=2,
    ),
    hard(
        "clip",
        clip,
        small_pictures,
        *("position_embedding", "q_proj"),
        output=lambda output: output.image_embeds,
        variants=2,
    ),
]
if importlib.util.find_spec("diffusers"):
    TRANSFORMERS.append(
        hard(
            "unet",
            unet,
            noises,
            *("to_q", "conv1"),
            output=lambda output: output.sample,
            flags="folds routes float32",
            same_for_all=("timestep",),
            variants=2,
        )
    )
