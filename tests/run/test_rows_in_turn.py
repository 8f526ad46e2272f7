"""Rows that cannot share a batch, of models that read images with texts: each as its own member would run it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from handmade import assert_close, raises_saying, random_params
from hard_transformers import VISION, llava, one_with_picture, with_pictures
from torch import Tensor, nn

import funcdelta as fd

pytestmark = pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")

INDEX = [2, -1, 0, 2]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@functools.cache
def subject() -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    delta = fd.LoraModel(llava().eval(), modified_modules=["q_proj", "v_proj"])
    stack = random_params(delta, 3)
    return delta, {key: leaf if key in delta.constants else 3 * leaf for key, leaf in stack.items()}


def member(delta: fd.DeltaModel, stack: dict[str, Tensor], i: int) -> nn.Module:
    return delta.bind(fd.take(stack, i) if i >= 0 else {})


@pytest.mark.parametrize("images", ["in every row", "in every other row", "in none"])
@pytest.mark.parametrize("how", ["apply_rows", "bind_rows"])
def test_texts_with_images(images: str, how: str) -> None:
    delta, stack = subject()
    batch = with_pictures(4, 0, ["in every row", "in every other row", "in none"].index(images))
    run = functools.partial(delta.apply_rows, stack, INDEX) if how == "apply_rows" else delta.bind_rows(stack, INDEX)
    with torch.no_grad():
        found = run(**batch).logits
        for r, i in enumerate(INDEX):
            assert_close(found[r], member(delta, stack, i)(**one_with_picture(batch, r)).logits[0], 1e-5)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_texts_with_images_are_continued(images: int, options: dict[str, Any]) -> None:
    delta, stack = subject()
    batch, options = with_pictures(4, 0, images), {**GREEDY, **options}
    found = delta.bind_rows(stack, INDEX).generate(**batch, **options)
    for r, i in enumerate(INDEX):
        alone = member(delta, stack, i).generate(**one_with_picture(batch, r), **options)
        assert torch.equal(found[r : r + 1], alone)


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_images_are_not_repeated_for_several_sequences(images: int, options: dict[str, Any]) -> None:
    """Transformers repeats what it has read of them, for patches in one list cannot be repeated by themselves."""
    delta, stack = subject()
    with raises_saying(fd.EngineError, "pixel_values cannot be repeated", "delta.bind(fd.take(stack, i))"):
        delta.bind_rows(stack, INDEX).generate(**with_pictures(4, 0, images), **{**GREEDY, **options})
    text = with_pictures(4, 0, 2)
    found = delta.bind_rows(stack, INDEX).generate(**text, **GREEDY, num_beams=2)
    for r, i in enumerate(INDEX):
        own = member(delta, stack, i).generate(**one_with_picture(text, r), **GREEDY, num_beams=2)
        assert torch.equal(found[r : r + 1], own)


def test_what_the_whole_batch_and_a_row_alone_do_not_agree_on_is_refused() -> None:
    class First(nn.Module):
        """Takes as many entries of a table as there are rows, whoever they are for."""

        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            y = self.a(x)
            return y + table[: len(x)] * (1 if y.sum() > 0 else 2)

    delta = fd.LoraModel(First().eval(), lora_r=2, modified_modules=["a"])
    stack, x = random_params(delta, 3), torch.randn(4, 4)
    for run in (functools.partial(delta.apply_rows, stack, INDEX), delta.bind_rows(stack, INDEX)):
        with torch.no_grad(), raises_saying(fd.EngineError, "table has no rows", "other numbers"):
            run(x, torch.randn(5, 4))


def test_a_generate_that_calls_parts_of_the_model_says_what_to_write() -> None:
    torch.manual_seed(0)
    sizes = {key: VISION[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    text = {
        **sizes,
        "vocab_size": 40,
        "intermediate_size": 24,
        "encoder_hidden_size": 16,
        "max_position_embeddings": 32,
    }
    text |= {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**sizes, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    config = transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    delta = fd.LoraModel(transformers.BlipForConditionalGeneration(config).eval(), modified_modules=["qkv", "query"])
    stack = random_params(delta, 3)
    tokens, pixels = torch.randint(3, 40, (4, 5)), torch.randn(4, 3, 8, 8)
    view = delta.bind_rows(stack, INDEX)
    with torch.no_grad():
        found = view(input_ids=tokens, pixel_values=pixels).logits
        for r, i in enumerate(INDEX):
            own = member(delta, stack, i)(input_ids=tokens[r : r + 1], pixel_values=pixels[r : r + 1]).logits
            assert_close(found[r : r + 1], own, 1e-5)
    with raises_saying(fd.EngineError, "vision_model", "one by one: delta.bind(fd.take(stack, i))"):
        view.generate(input_ids=tokens.clone(), pixel_values=pixels, max_new_tokens=3)
    rows = [0, 3]
    assert (
        member(delta, stack, 2).generate(input_ids=tokens[rows], pixel_values=pixels[rows], max_new_tokens=3).ndim == 2
    )
