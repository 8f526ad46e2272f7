"""Prompts and prefixes on models with habits: second tables of tokens, masks made early, images, caches as prefixes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from handmade import assert_acts, assert_close, random_params
from test_left_padding import BERT, CAUSAL, IDS, LLAMA, MASK, OTHER, PADDING, TEXT, P, family, prompted
from torch import Tensor, nn
from transformers import DynamicCache
from zoo_architecture import builder, randomise
from zoo_transformers import SPECIAL

import funcdelta as fd
from funcdelta.structures.modules.interface import attention_below

# -- models that look tokens up a second time ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
@torch.no_grad()
def test_a_prompt_has_the_second_embedding_of_padding(name: str) -> None:
    """By hand: the text's own rows of the second table, behind the padding token's, which images have there too."""
    model: Any = CAUSAL[name]()
    delta, params, rows = prompted(model)
    inner, pad = model.model, model.config.pad_token_id
    ids = torch.cat([torch.full((1, P), pad), OTHER], 1)
    second = inner.embed_tokens_per_layer(ids).view(1, P + 9, 2, 8)
    x = torch.cat([rows.unsqueeze(0), inner.embed_tokens(OTHER)], 1)
    expected = model(inputs_embeds=x, per_layer_inputs=second).logits
    assert_close(delta.apply(params, OTHER).logits, expected)
    embeds: dict[str, Any] = {"inputs_embeds": inner.embed_tokens(OTHER), "per_layer_inputs": second[:, P:]}
    assert_close(delta.apply(params, **embeds).logits, expected)
    if name == "gemma4":  # finds the tokens of embeddings by itself
        assert_close(delta.apply(params, inputs_embeds=embeds["inputs_embeds"]).logits, expected)
    # A delta on both tables acts on the text, once, in every engine.
    tables = fd.LoraConfig(lora_r=1, modified_modules=("embed_tokens_per_layer", "embed_tokens"))
    both = fd.DeltaModel(model, delta.configs[0], tables)
    stack = random_params(both, n=2)
    loop = both.apply_many(stack, IDS, attention_mask=MASK, engine="loop").logits
    for engine in ("fold", "vmap"):
        assert_close(both.apply_many(stack, IDS, attention_mask=MASK, engine=engine).logits, loop)
    assert_acts(loop[0], delta.apply({key: stack[key][0] for key in params}, IDS, attention_mask=MASK).logits)


# -- prefixes as what a cache holds ------------------------------------------------------------------------------------

FULL: dict[str, Any] = {**LLAMA, "layer_types": ["full_attention"] * 2}
CACHING: dict[str, Callable[[], nn.Module]] = {
    **{name: CAUSAL[name] for name in ("llama", "qwen2", "qwen3", "gpt2", "opt")},
    "gemma2": family("Gemma2", **FULL),
    "gemma3": family("Gemma3", config="Gemma3TextConfig", **FULL),
    "phi": family("Phi", **LLAMA),
    "gpt neox": family("GPTNeoX", **BERT, **SPECIAL),
    "cohere": family("Cohere", **LLAMA),
    "gpt-oss": family("GptOss", **FULL, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CACHING)
@torch.no_grad()
def test_a_prefix_is_a_cache_that_has_no_positions(name: str, implementation: str) -> None:
    """The plain backbone with the keys in its cache, as PEFT gives them, and numbers that do not count them."""
    if implementation == "sdpa" and name in ("gemma2", "gpt-oss"):
        pytest.skip("soft caps and sinks have no sdpa")
    model: Any = CACHING[name]()
    model.set_attn_implementation(implementation)
    sites = attention_below("", model)
    delta = fd.PrefixModel(model, modified_modules=sites, prefix_token_num=P, reparameterize=False)
    params = random_params(delta)
    cache = DynamicCache(config=model.config)
    for i, site in enumerate(delta.sites):
        leaves = (params[f"{site}.prefix.past_{kind}"] for kind in ("key", "value"))
        heads = model.config.get_text_config().num_key_value_heads if "num_key_value_heads" in str(model.config) else 2
        keys, values = (leaf.view(P, heads, -1).transpose(0, 1).expand(2, -1, -1, -1) for leaf in leaves)
        cache.update(keys.clone(), values.clone(), i)
    at, longer = (MASK.cumsum(1) - 1).clamp(min=0), F.pad(MASK, (P, 0), value=1)
    expected = model(IDS, attention_mask=longer, position_ids=at, cache=cache).logits
    found = delta.apply(params, IDS, attention_mask=MASK).logits
    assert_close(found[0, PADDING:], expected[0, PADDING:])
    assert_close(found[1], expected[1])
    assert_acts(found[1], model(IDS, attention_mask=MASK).logits[1])


# -- images and text -------------------------------------------------------------------------------------------------

IMAGE, TOKENS = 60, 4
VISION: dict[str, Any] = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
GRID: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 8,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "intermediate_size": 16,
    "out_hidden_size": 16,
    "deepstack_visual_indexes": [0, 1],
    "num_position_embeddings": 16,
}
OF_IMAGES: dict[str, Any] = {"image_token_id": IMAGE, "tie_word_embeddings": False}
TEXT_CONFIG: dict[str, Any] = {**LLAMA, "num_hidden_layers": 2}


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, image_size=4, patch_size=2)
    text = transformers.LlamaConfig(**TEXT_CONFIG)
    fields = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **fields, **OF_IMAGES)
    )


def gemma3() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, image_size=8, patch_size=2)
    kinds = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(**TEXT_CONFIG, sliding_window=6, layer_types=kinds)
    fields = {"mm_tokens_per_image": TOKENS, "boi_token_id": 58, "eoi_token_id": 59}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(vision_config=vision.to_dict(), text_config=text.to_dict(), **fields, **OF_IMAGES)
    )


def paligemma() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, image_size=4, patch_size=2, projection_dim=16)
    text = transformers.GemmaConfig(**TEXT_CONFIG)
    fields = {"projection_dim": 16, "hidden_size": 16, "image_token_id": IMAGE}
    config = transformers.PaliGemmaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **fields)
    model = transformers.PaliGemmaForConditionalGeneration(config)
    # Its fused attention forgets that the text is causal where nothing is padded, in Transformers 5.24.
    model.set_attn_implementation("eager")
    return model


def gemma4() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    per_layer = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
    text = {**TEXT_CONFIG, **per_layer, "global_head_dim": 4, "sliding_window": 6, "layer_types": kinds}
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 4, "global_head_dim": 4, "patch_size": 2}
    vision |= {"pooling_kernel_size": 2, "position_embedding_size": 16}
    fields = {"image_token_id": IMAGE, "video_token_id": 61, "audio_token_id": 62, "boi_token_id": 58}
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, **fields)
    return transformers.Gemma4ForConditionalGeneration(config)


def qwen(family: str, hidden: int) -> Any:
    text = {**TEXT_CONFIG, "rope_parameters": MROPE | ({"mrope_interleaved": True} if family == "Qwen3VL" else {})}
    fields = {"video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
    config = getattr(transformers, f"{family}Config")
    made = config(text_config=text, vision_config={**GRID, "hidden_size": hidden}, **fields, **OF_IMAGES)
    return getattr(transformers, f"{family}ForConditionalGeneration")(made)


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def no_marks(ids: Tensor) -> dict[str, Any]:
    return {}


def marks(name: str, ids: Tensor) -> dict[str, Any]:
    return {name: (ids == IMAGE).long()}


GRIDS: dict[str, Any] = {"pixel_values": pixels(16, 12), "image_grid_thw": torch.tensor([[1, 4, 4]])}
Given = Callable[[Tensor], dict[str, Any]]
SEEING: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Given]] = {
    "llava": (llava, {"pixel_values": pixels(1, 3, 4, 4)}, no_marks),
    "gemma3": (gemma3, {"pixel_values": pixels(1, 3, 8, 8)}, functools.partial(marks, "token_type_ids")),
    "gemma3 as text": (gemma3, {"pixel_values": pixels(1, 3, 8, 8)}, no_marks),
    "qwen2_vl": (lambda: qwen("Qwen2VL", 16), GRIDS, functools.partial(marks, "mm_token_type_ids")),
    "qwen3_vl": (lambda: qwen("Qwen3VL", 8), GRIDS, functools.partial(marks, "mm_token_type_ids")),
}
WRITTEN = {"paligemma": paligemma, "gemma4": gemma4}
PICTURE = torch.tensor([[7, 8, 58, *[IMAGE] * TOKENS, 59, 9, 10, 11]])


@functools.cache
def seeing(name: str) -> Any:
    model = builder(SEEING[name][0] if name in SEEING else WRITTEN[name])()
    if name in SEEING:
        # Transformers hooks its layers when it is first asked for hidden states.
        model(PICTURE, **SEEING[name][1], **SEEING[name][2](PICTURE))
    return model


def on_text(name: str, method: str) -> fd.DeltaModel:
    model = seeing(name)
    if method == "soft prompt":
        return fd.SoftPromptModel(model, soft_token_num=P)
    sites = attention_below("model.language_model", model.model.language_model)
    return fd.PrefixModel(model, modified_modules=sites, prefix_token_num=P, reparameterize=False)


@pytest.mark.parametrize("method", ["soft prompt", "prefix"])
@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_a_padded_row_with_an_image_gives_what_it_gives_alone(name: str, method: str) -> None:
    _, image, given = SEEING[name]
    delta = on_text(name, method)
    params, off = random_params(delta), P if method == "soft prompt" else 0
    left, mask = F.pad(PICTURE, (PADDING, 0), value=1), F.pad(torch.ones_like(PICTURE), (PADDING, 0))
    alone = delta.apply(params, PICTURE, **image, **given(PICTURE)).logits[:, off:]
    padded = delta.apply(params, left, attention_mask=mask, **image, **given(left)).logits[:, off + PADDING :]
    assert_close(padded, alone)
    assert_acts(alone, seeing(name)(PICTURE, **image, **given(PICTURE)).logits)
    right, behind = F.pad(PICTURE, (0, PADDING), value=1), F.pad(torch.ones_like(PICTURE), (0, PADDING))
    found = delta.apply(params, right, attention_mask=behind, **image, **given(right)).logits
    assert_close(found[:, off : off + PICTURE.shape[1]], alone)
    words = delta.apply(params, IDS, attention_mask=MASK).logits
    assert_close(words[:1, off + PADDING :], delta.apply(params, TEXT).logits[:, off:])
    view: Any = delta.bind(params)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    options["suppress_tokens"] = [IMAGE]  # for which there is no picture
    one = view.generate(PICTURE, attention_mask=torch.ones_like(PICTURE), **image, **given(PICTURE), **options)
    two = view.generate(left, attention_mask=mask, **image, **given(left), **options)
    assert_close(torch.stack(two.logits), torch.stack(one.logits))
    assert_close(one.logits[0], alone[:, -1])
    slow = view.generate(left, attention_mask=mask, use_cache=False, **image, **given(left), **options)
    assert_close(torch.stack(two.logits), torch.stack(slow.logits))


@pytest.mark.parametrize("method", ["soft prompt", "prefix"])
@pytest.mark.parametrize("name", WRITTEN)
@torch.no_grad()
def test_numbers_that_a_model_of_images_gives_its_text_do_not_count_padding(name: str, method: str) -> None:
    """These number positions above the text model, from 1 or from 0, whatever the mask says."""
    delta = on_text(name, method)
    stack, off = random_params(delta, n=2), P if method == "soft prompt" else 0
    params = fd.take(stack, 0)
    alone = delta.apply(params, TEXT).logits[:, off:]
    assert_acts(alone, seeing(name)(TEXT).logits)
    left = delta.apply(params, IDS, attention_mask=MASK, use_cache=False).logits
    assert_close(left[:1, off + PADDING :], alone)
    first = delta.apply(params, IDS[:, :6], attention_mask=MASK[:, :6], use_cache=True)
    cache = "cache" if "cache" in first else "past_key_values"
    assert_close(
        delta.apply(params, IDS[:, 6:], attention_mask=MASK, **{cache: first[cache]}).logits, left[:, off + 6 :]
    )
    many = [delta.apply_many(stack, IDS, attention_mask=MASK, engine=engine).logits for engine in ("loop", "fold")]
    assert_close(*many)
    assert_close(many[0][0], left)


def seen_by(length: int, image: slice, window: int | None) -> Tensor:
    """(1, 1, length, length): who sees whom behind ``P`` rows of a prompt, written as loops."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            both = all(image.start <= k < image.stop for k in (i, j))
            near = window is None or i - j < window
            seen[i, j] = (j <= i and near) or (both and (window is None or abs(i - j) < window))
    return seen.view(1, 1, length, length)


@torch.no_grad()
def test_masks_that_a_model_of_images_makes_early_have_the_prompt_in_front() -> None:
    """Gemma 3: images see all of themselves, layers have a window, and both masks are made above the text model."""
    model = seeing("gemma3")
    delta, params, rows = prompted(model)
    _, image, given = SEEING["gemma3"]
    inner = model.model
    x = inner.get_input_embeddings()(PICTURE)
    features = inner.get_image_features(image["pixel_values"], return_dict=True).pooler_output
    x = x.masked_scatter((PICTURE == IMAGE).unsqueeze(-1).expand_as(x), features)
    x = torch.cat([rows.unsqueeze(0), x], 1)
    length, where = x.shape[1], slice(P + 3, P + 3 + TOKENS)
    masks = {"full_attention": seen_by(length, where, None), "sliding_attention": seen_by(length, where, 6)}
    states = inner.language_model(inputs_embeds=x, attention_mask=masks).last_hidden_state
    found = delta.apply(params, PICTURE, **image, **given(PICTURE)).logits
    assert_close(found, model.lm_head(states))


@torch.no_grad()
def test_positions_of_images_move_as_a_whole() -> None:
    """Qwen2-VL counts three axes above its text model, from which ids are gone: the prompt counts alike on each."""
    model = seeing("qwen2_vl")
    delta, params, rows = prompted(model)
    _, image, given = SEEING["qwen2_vl"]
    inner = model.model
    x = inner.get_input_embeddings()(PICTURE)
    features = inner.get_image_features(**image, return_dict=True).pooler_output
    x = x.masked_scatter((PICTURE == IMAGE).unsqueeze(-1).expand_as(x), torch.cat(list(features)))
    x = torch.cat([rows.unsqueeze(0), x], 1)
    # 7, 8 and the start are 0, 1, 2; the image is 2 x 2 from 3 on; the text goes on behind its largest number.
    patches = torch.tensor([[3, 3, 3, 3], [3, 3, 4, 4], [3, 4, 3, 4]])
    text = torch.cat([torch.arange(3).expand(3, 3), patches, torch.arange(5, 9).expand(3, 4)], 1)
    at = torch.cat([torch.arange(P).expand(3, P), text + P], 1).unsqueeze(1)
    states = inner.language_model(inputs_embeds=x, position_ids=at).last_hidden_state
    found = delta.apply(params, PICTURE, **image, **given(PICTURE)).logits
    assert_close(found, model.lm_head(states))


def test_what_a_model_prepares_in_its_own_way_is_refused_by_name() -> None:
    """Mllama's text sees images through a mask of its own."""
    vision = {
        **VISION,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "max_num_tiles": 1,
    }
    vision |= {"vision_output_dim": 16, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}
    text = {**TEXT_CONFIG, "cross_attention_layers": [1]}
    config = transformers.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    model = randomise(transformers.MllamaForConditionalGeneration(config), seed=0)
    ids, one = torch.tensor([[7, IMAGE, 8, 9]]), torch.ones(1, 1, dtype=torch.long)
    image: dict[str, Any] = {
        "pixel_values": pixels(1, 1, 1, 3, 8, 8),
        "aspect_ratio_ids": one,
        "aspect_ratio_mask": one.view(1, 1, 1),
    }
    seen: dict[str, Any] = {"cross_attention_mask": torch.ones(1, 4, 1, 1, dtype=torch.long)}
    delta, params, _ = prompted(model)
    with pytest.raises(fd.errors.ParamsError, match=r"cross_attention_mask has the shape.*call the model without it"):
        delta.apply(params, ids, **image, **seen)
    assert delta.apply(params, ids).logits.shape == (1, P + 4, 64)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["soft prompt", "prefix"])
def test_checkpointed_layers_give_the_same_gradients_for_padded_rows(name: str, method: str) -> None:
    model: Any = CAUSAL[name]().train()
    delta = (
        fd.SoftPromptModel(model, soft_token_num=P)
        if method == "soft prompt"
        else fd.PrefixModel(model, prefix_token_num=P, reparameterize=False)
    )
    params = random_params(delta)
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    for module in model.modules():  # dropout would draw anew
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    delta = delta.refresh()
    expected = torch.func.grad(lambda p: delta.apply(p, **inputs).loss)(params)
    view: Any = delta.bind(params)
    view.activation_checkpointing_enable({"use_reentrant": False})
    view(**inputs).loss.backward()
    for key, parameter in view.named_parameters():
        if key in expected:
            assert_close(parameter.grad, expected[key])
