"""Pretrained weights: MiniLM-L6 and SmolLM2-135M. Slow: seconds to load, more to generate."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import ENGINES, assert_acts, assert_close, random_params
from torch import Tensor, nn

import funcdelta as fd

pytestmark = pytest.mark.slow

SENTENCES = [
    "A cat sits on the mat.",
    "The committee will publish its report on inflation next week.",
    "Rain.",
    "He plays the violin, badly.",
]


@pytest.fixture(scope="module")
def minilm(minilm_path: Path) -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    import transformers

    model = transformers.AutoModel.from_pretrained(minilm_path, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(minilm_path)


@pytest.fixture(scope="module")
def smollm(smollm_path: Path) -> tuple[nn.Module, Any]:
    """The language model in float32 and its tokenizer."""
    import transformers

    where = {"gguf_file": smollm_path.name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading GGUF warns about its own internals
        model = transformers.AutoModelForCausalLM.from_pretrained(smollm_path.parent, dtype=torch.float32, **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(smollm_path.parent, **where)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def encoded(minilm: tuple[nn.Module, Any]) -> dict[str, Tensor]:
    return dict(minilm[1](SENTENCES, padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def speaking(smollm: tuple[nn.Module, Any]) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=smollm[0], lora_r=4, modified_modules=["q_proj", "v_proj"])


def greedily(model: Any, tokenizer: Any, text: str, tokens: int = 12) -> Tensor:
    """The tokens of ``text`` and their most likely continuation."""
    inputs = tokenizer(text, return_tensors="pt")
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.eos_token_id or 0}
    return model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)


def small_change(delta: fd.DeltaModel, n: int | None = None) -> dict[str, Tensor]:
    """Members that say other things than the backbone, and still words."""
    start = delta.init(0, n=n)
    moved = random_params(delta, n)
    return fd.tree.lerp(start, moved, 0.2)


# -- MiniLM --------------------------------------------------------------------------------------------------------


def test_minilm_folded_is_peft_in_turn(minilm: tuple[nn.Module, Any], encoded: dict[str, Tensor]) -> None:
    peft = pytest.importorskip("peft")
    model, _ = minilm
    before = snapshot(model)
    delta = fd.LoraModel(backbone_model=model, lora_r=8, lora_alpha=16, modified_modules=["query", "value"])
    stack = random_params(delta, 4)
    outs = {
        engine: delta.apply_many(stack, **encoded, engine=engine).last_hidden_state for engine in (*ENGINES, "auto")
    }
    routed = delta.apply_rows(stack, [3, 0, 2, -1], **encoded).last_hidden_state
    with warnings.catch_warnings():
        # PEFT still asks Transformers for a property under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])
        other = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for i in range(4):
        member = fd.take(stack, i)
        with torch.no_grad():
            for path in delta.sites:
                layer = other.get_submodule(f"base_model.model.{path}")
                layer.lora_A["default"].weight.copy_(member[f"{path}.lora.lora_A"])
                layer.lora_B["default"].weight.copy_(member[f"{path}.lora.lora_B"])
            expected = other(**encoded).last_hidden_state
        assert_acts(expected, model(**encoded).last_hidden_state)
        for found in outs.values():
            assert_close(found[i], expected, 1e-4)
        for row, index in enumerate([3, 0, 2, -1]):
            if index == i:
                assert_close(routed[row], expected[row], 1e-4)
    assert_close(routed[3], model(**encoded).last_hidden_state[3], 1e-5)
    assert_unchanged(model, before)


def test_minilm_trains_members_as_if_alone(minilm: tuple[nn.Module, Any], encoded: dict[str, Tensor]) -> None:
    delta = fd.LoraModel(backbone_model=minilm[0], lora_r=4, modified_modules=["query", "value"])
    stack = random_params(delta, 3)

    def losses(s: dict[str, Tensor]) -> Tensor:
        return delta.apply_many(s, **encoded, engine="fold").last_hidden_state.square().mean((1, 2, 3))

    values, grads = fd.value_and_grad(losses)(stack)
    for i in range(3):
        alone, value = torch.func.grad_and_value(lambda p: delta.apply(p, **encoded).last_hidden_state.square().mean())(
            fd.take(stack, i)
        )
        assert_close(values[i], value)
        for name in alone:
            assert_close(grads[name][i], alone[name], 1e-4)


def test_minilm_in_eight_threads(minilm: tuple[nn.Module, Any], encoded: dict[str, Tensor]) -> None:
    model, _ = minilm
    before = snapshot(model)
    delta = fd.LoraModel(backbone_model=model, lora_r=4, modified_modules=["query", "value"])
    stack = random_params(delta, 8)
    with torch.no_grad():
        expected = [delta.apply(fd.take(stack, i), **encoded).last_hidden_state for i in range(8)]
    problems: list[BaseException] = []
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        try:
            with torch.no_grad():
                for _ in range(3):
                    assert_close(delta.apply(fd.take(stack, i), **encoded).last_hidden_state, expected[i], 1e-5)
        except BaseException as problem:  # carried to the main thread, which raises it
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [fd.LoraConfig(), fd.AdapterConfig(), fd.BitFitConfig()], ids=lambda c: c.delta_type)
def test_minilm_saved_and_loaded(
    config: fd.BaseDeltaConfig, minilm: tuple[nn.Module, Any], encoded: dict[str, Tensor], tmp_path: Path
) -> None:
    model, _ = minilm
    delta = fd.DeltaModel(model, config)
    stack = random_params(delta, 2)
    delta.save_finetuned(stack, tmp_path / "run")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=copy.deepcopy(model))
    found = again.apply_many(loaded, **encoded).last_hidden_state
    assert torch.equal(found, delta.apply_many(stack, **encoded).last_hidden_state)


def test_minilm_in_half_precision(minilm: tuple[nn.Module, Any], encoded: dict[str, Tensor]) -> None:
    model, _ = minilm
    wide = fd.LoraModel(backbone_model=model, lora_r=4, modified_modules=["query", "value"])
    half = fd.LoraModel(backbone_model=copy.deepcopy(model).bfloat16(), lora_r=4, modified_modules=["query", "value"])
    stack = small_change(wide, 3)
    expected = wide.apply_many(stack, **encoded).last_hidden_state
    for engine in ENGINES:
        found = half.apply_many(stack, **encoded, engine=engine).last_hidden_state
        assert found.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(found.float(), expected, dim=-1).min() > 0.98


# -- SmolLM2 -------------------------------------------------------------------------------------------------------


def test_a_fresh_delta_knows_the_capital_of_france(smollm: tuple[nn.Module, Any], speaking: fd.DeltaModel) -> None:
    model, tokenizer = smollm
    before = snapshot(model)
    text = "The capital of France is"
    said = greedily(speaking.bind(speaking.init(0)), tokenizer, text)
    assert "Paris" in tokenizer.decode(said[0])
    assert torch.equal(said, greedily(model, tokenizer, text))
    assert torch.equal(said, greedily(speaking.bind({}), tokenizer, text))
    assert_unchanged(model, before)


def test_generating_bound_is_generating_merged(smollm: tuple[nn.Module, Any], speaking: fd.DeltaModel) -> None:
    model, tokenizer = smollm
    params = small_change(speaking)
    texts = "Once upon a time there was"
    said = greedily(speaking.bind(params), tokenizer, texts, 16)
    assert torch.equal(said, greedily(speaking.merged(params), tokenizer, texts, 16))
    assert not torch.equal(said, greedily(model, tokenizer, texts, 16))


def test_generating_for_several_members_at_once(smollm: tuple[nn.Module, Any], speaking: fd.DeltaModel) -> None:
    """One step of each member's own prompt, folded, is each member alone."""
    tokenizer = smollm[1]
    stack = small_change(speaking, 3)
    tokens = tokenizer("Water boils at a temperature of", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outs = speaking.apply_many(stack, input_ids=tokens, engine="fold").logits
        routed = speaking.apply_rows(stack, [2, -1, 0], input_ids=tokens.expand(3, -1)).logits
        for i in range(3):
            alone = speaking.apply(fd.take(stack, i), input_ids=tokens).logits
            assert_close(outs[i], alone, 1e-4)
        assert_close(routed[0], outs[2][0], 1e-4)
        assert_close(routed[1:2], smollm[0](input_ids=tokens).logits, 1e-4)


def test_generating_row_by_row_is_generating_one_by_one(smollm: tuple[nn.Module, Any], speaking: fd.DeltaModel) -> None:
    model, tokenizer = smollm
    before = snapshot(model)
    stack, index = small_change(speaking, 4), [3, 0, 2, 1]
    texts = ["The capital of France is", "Rain", "Once upon a time there was", "Water boils at a temperature of"]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.pad_token or tokenizer.eos_token, "left"
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = speaking.bind_rows(stack, index).generate(**inputs, **options)[:, -8:]
    for row, i in enumerate(index):
        alone = speaking.bind(fd.take(stack, i)).generate(**tokenizer(texts[row], return_tensors="pt"), **options)
        assert torch.equal(said[row], alone[0, -8:]), (texts[row], tokenizer.decode(said[row]))
    assert not torch.equal(said, model.generate(**inputs, **options)[:, -8:])
    assert_unchanged(model, before)


def test_a_head_tied_to_the_embedding(smollm: tuple[nn.Module, Any]) -> None:
    model, tokenizer = smollm
    assert model.lm_head.weight is model.model.embed_tokens.weight
    delta = fd.LoraModel(backbone_model=model, lora_r=2, modified_modules=["lm_head"])
    params = small_change(delta)
    tokens = tokenizer("Water boils", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = delta.apply(params, input_ids=tokens).logits
        with pytest.raises(fd.errors.MergeError, match="untie=True"):
            delta.merge(params)
        assert_close(delta.merged(params, untie=True)(input_ids=tokens).logits, expected, 1e-4)
