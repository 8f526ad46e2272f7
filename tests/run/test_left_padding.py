"""Rows padded in front, as a collator gives them: beside a prompt or a prefix each gives what it gives alone.

The slow form is the row without its padding, and for windows and labels the plain backbone on embeddings put together
by hand. What cannot be right is refused, with what to write instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from handmade import assert_close, random_params
from torch import Tensor, nn
from zoo import ZOO
from zoo_architecture import builder
from zoo_transformers import BERT_SIZES, LLAMA_SIZES, SPECIAL

import funcdelta as fd
from funcdelta.structures.modules.interface import attention_below

P, PADDING = 3, 4
TEXT = torch.tensor([[7, 8, 9, 10, 11]])
OTHER = torch.tensor([[20, 21, 22, 23, 24, 25, 26, 27, 28]])
# Row 0 is TEXT behind four positions of padding, row 1 has none.
IDS = torch.cat([F.pad(TEXT, (PADDING, 0), value=1), OTHER])
MASK = torch.ones_like(IDS)
MASK[0, :PADDING] = 0

LLAMA: dict[str, Any] = {**LLAMA_SIZES, "pad_token_id": 1}
BERT: dict[str, Any] = BERT_SIZES
SLIDING: dict[str, Any] = {**LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER: dict[str, Any] = {
    **SLIDING,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
}
GEMMA3N: dict[str, Any] = {**PER_LAYER, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None}
T5: dict[str, Any] = {
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 1,
}
ROTARY_ENCODER: dict[str, Any] = {
    **BERT,
    **SPECIAL,
    "local_attention": 4,
    "global_attn_every_n_layers": 2,
    "cls_token_id": 2,
}


def family(name: str, kind: str = "ForCausalLM", /, config: str | None = None, **sizes: Any) -> Callable[[], nn.Module]:
    """A builder whose config may have another name than its model."""
    make = getattr(transformers, config or f"{name}Config")
    return builder(lambda: getattr(transformers, name + kind)(make(**sizes)))


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": family("Llama", **LLAMA),
    "qwen2": family("Qwen2", **LLAMA),
    "qwen3": family("Qwen3", **LLAMA),
    "mistral with a window": family("Mistral", **{**LLAMA, "sliding_window": 4}),
    "gemma2": family("Gemma2", **SLIDING),
    "gemma3": family("Gemma3", config="Gemma3TextConfig", **SLIDING),
    "gemma3n": family("Gemma3n", config="Gemma3nTextConfig", **GEMMA3N),
    "gemma4": family("Gemma4", config="Gemma4TextConfig", **{**PER_LAYER, "global_head_dim": 4}),
    "llama4 with chunks": family(
        "Llama4", config="Llama4TextConfig", **LLAMA, intermediate_size_mlp=24, attention_chunk_size=4, moe_layers=[]
    ),
    "gpt2": ZOO["gpt2"].build,
    "opt": ZOO["opt"].build,
    "biogpt": family("BioGpt", **BERT, **SPECIAL),
    "bloom": ZOO["bloom"].build,
    "mpt": family("Mpt", vocab_size=64, d_model=16, n_layers=2, n_heads=2, max_seq_len=32),
    "openai gpt": family("OpenAIGPT", "LMHeadModel", vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2),
    "lfm2 with convolutions": family("Lfm2", **LLAMA, layer_types=["conv", "full_attention"]),
}
BOTH_WAYS: dict[str, Callable[[], nn.Module]] = {
    "bert": family("Bert", "ForMaskedLM", **BERT),
    "roberta": family("Roberta", "ForMaskedLM", **BERT, **SPECIAL),
    "distilbert": family("DistilBert", "Model", vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "modernbert with a window": family("ModernBert", "Model", **ROTARY_ENCODER),
    "t5": family("T5", "ForConditionalGeneration", vocab_size=64, d_model=16, **T5),
}
NO_INTERFACE = {"bloom", "mpt", "openai gpt"}


def of_rows(output: Any, name: str, padding: int, off: int) -> Tensor:
    """What a model gives for the first row's text: all of it for a decoder's own tokens."""
    values = output.logits if "logits" in output else output.last_hidden_state
    return values[:1] if name == "t5" else values[:1, off + padding :]


@functools.cache
def case(name: str, method: str) -> tuple[fd.DeltaModel, dict[str, Tensor], dict[str, Any]]:
    """A delta, a stack of two members away from their start, and what the model takes besides its text."""
    model = {**CAUSAL, **BOTH_WAYS}[name]()
    if method == "soft prompt":
        delta = fd.SoftPromptModel(model, soft_token_num=P)
    else:
        delta = fd.PrefixModel(
            model, modified_modules=attention_below("", model), prefix_token_num=P, reparameterize=False
        )
    pair: dict[str, Any] = {"decoder_input_ids": torch.tensor([[2, 30, 31]])} if name == "t5" else {}
    return delta, random_params(delta, n=2), pair


CASES = [(name, method) for name in (*CAUSAL, *BOTH_WAYS) for method in ("soft prompt", "prefix")]
CASES = [(name, method) for name, method in CASES if method == "soft prompt" or name not in NO_INTERFACE]


@pytest.mark.parametrize(("name", "method"), CASES)
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(name: str, method: str) -> None:
    delta, stack, pair = case(name, method)
    params, off = fd.take(stack, 0), P if method == "soft prompt" else 0
    alone = of_rows(delta.apply(params, input_ids=TEXT, **pair), name, 0, off)
    again = of_rows(delta.apply(params, input_ids=TEXT, attention_mask=torch.ones_like(TEXT), **pair), name, 0, off)
    assert_close(again, alone)
    two: dict[str, Any] = {key: value.expand(2, -1) for key, value in pair.items()}
    left = delta.apply(params, input_ids=IDS, attention_mask=MASK, **two)
    assert_close(of_rows(left, name, PADDING, off), alone)
    # What the caller says of positions is what they are, and the right side is as it was.
    if name not in ("bloom", "mpt", "t5", "roberta", "distilbert"):
        at = (MASK.cumsum(1) - 1).clamp(min=0)
        told = delta.apply(params, input_ids=IDS, attention_mask=MASK, position_ids=at, **two)
        assert_close(of_rows(told, name, PADDING, off), alone)
    right, behind = F.pad(TEXT, (0, PADDING), value=1), F.pad(torch.ones_like(TEXT), (0, PADDING))
    found = of_rows(delta.apply(params, input_ids=right, attention_mask=behind, **pair), name, 0, off)
    assert_close(found if name == "t5" else found[:, : TEXT.shape[1]], alone)


@pytest.mark.parametrize(("name", "method"), CASES)
def test_all_engines_and_gradients_agree_on_padded_rows(name: str, method: str) -> None:
    delta, stack, pair = case(name, method)
    off = P if method == "soft prompt" else 0
    inputs: dict[str, Any] = {
        "input_ids": IDS,
        "attention_mask": MASK,
        **{key: value.expand(2, -1) for key, value in pair.items()},
    }

    def given(output: Any) -> Tensor:
        return output.logits if "logits" in output else output.last_hidden_state

    with torch.no_grad():
        loop = given(delta.apply_many(stack, engine="loop", **inputs))
        for engine in ("fold", "vmap")[: 1 if name == "bloom" else 2]:
            assert_close(given(delta.apply_many(stack, engine=engine, **inputs)), loop)
        rows = given(delta.apply_rows(stack, [1, 0], **inputs))
        assert_close(rows, torch.stack([loop[1, 0], loop[0, 1]]))
    if name == "bloom":  # its GELU is an autograd.Function that torch.func refuses
        return
    weights = torch.randn(loop.shape[-1])

    def total(p: dict[str, Tensor], padding: int, **text: Any) -> Tensor:
        return (of_rows(delta.apply(p, **text, **pair), name, padding, off) * weights).sum()

    member = fd.take(stack, 0)
    alone = torch.func.grad(total)(member, 0, input_ids=TEXT)
    padded = torch.func.grad(total)(member, PADDING, input_ids=IDS[:1], attention_mask=MASK[:1])
    scale = max(float(leaf.abs().max()) for leaf in alone.values())
    for key, leaf in alone.items():
        assert_close(padded[key] / scale, leaf / scale)


@pytest.mark.parametrize(
    ("name", "method"), [(n, m) for n, m in CASES if (n in CAUSAL and n != "openai gpt") or n == "t5"]
)
@torch.no_grad()
def test_generating_from_a_padded_row_is_generating_from_the_row(name: str, method: str) -> None:
    delta, stack, _ = case(name, method)
    view: Any = delta.bind(fd.take(stack, 0))
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    alone = view.generate(TEXT, attention_mask=torch.ones_like(TEXT), **options)
    padded = view.generate(IDS, attention_mask=MASK, **options)
    assert_close(torch.stack(padded.logits)[:, :1], torch.stack(alone.logits))
    if name != "lfm2 with convolutions":
        whole = view.generate(IDS, attention_mask=MASK, use_cache=False, **options)
        assert_close(torch.stack(padded.logits), torch.stack(whole.logits))


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gpt2", "opt", "gemma4"])
@pytest.mark.parametrize("method", ["soft prompt", "prefix"])
@torch.no_grad()
def test_going_on_from_a_cache_without_position_ids(name: str, method: str) -> None:
    delta, stack, _ = case(name, method)
    params = fd.take(stack, 0)
    whole = delta.apply(params, input_ids=IDS, attention_mask=MASK).logits[:, -3:]
    first = delta.apply(params, input_ids=IDS[:, :6], attention_mask=MASK[:, :6], use_cache=True)
    cache = "cache" if "cache" in first else "past_key_values"
    rest = delta.apply(params, input_ids=IDS[:, 6:], attention_mask=MASK, **{cache: first[cache]}).logits
    assert_close(rest, whole)


def prompted(model: nn.Module, **fields: Any) -> tuple[fd.DeltaModel, dict[str, Tensor], Tensor]:
    """A soft prompt, params away from their start, and the rows themselves."""
    delta = fd.SoftPromptModel(model, soft_token_num=P, **fields)
    params = random_params(delta)
    return delta, params, next(iter(params.values()))


@pytest.mark.parametrize("name", ["mistral with a window", "gemma3", "gpt2", "openai gpt"])
def test_labels_of_a_padded_row_begin_behind_the_prompt(name: str) -> None:
    """By hand: the prompt's last row gives the first token, in the plain backbone, within its window."""
    model = CAUSAL[name]()
    delta, params, rows = prompted(model)
    labels = IDS.masked_fill(MASK == 0, -100)
    found = delta.apply(params, input_ids=IDS, attention_mask=MASK, labels=labels).loss
    losses = []
    for text in (TEXT, OTHER):
        x = torch.cat([rows.unsqueeze(0), model.get_input_embeddings()(text)], 1)
        logits = model(inputs_embeds=x).logits[:, P - 1 : -1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none"))
    assert_close(found, torch.cat(losses).mean())


def test_labels_of_padding_stay_with_the_padding() -> None:
    """Who trains on padding too trains its own logits: by hand, ``[padding; prompt; text]`` in the plain backbone."""
    model: Any = CAUSAL["llama"]()
    delta, params, rows = prompted(model)
    ids, mask = IDS[:1], MASK[:1]
    found = delta.apply(params, input_ids=ids, attention_mask=mask, labels=ids).loss
    x = model.get_input_embeddings()(ids)
    x = torch.cat([x[:, :PADDING], rows.unsqueeze(0), x[:, PADDING:]], 1)
    longer = torch.cat([mask[:, :PADDING], torch.ones(1, P, dtype=torch.long), mask[:, PADDING:]], 1)
    labels = torch.cat([ids[:, :PADDING], torch.full((1, P), -100), ids[:, PADDING:]], 1)
    at = (longer.cumsum(1) - 1).clamp(min=0)
    logits = model(inputs_embeds=x, attention_mask=longer, position_ids=at).logits
    assert_close(found, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


@torch.no_grad()
def test_numbers_that_count_the_padding_are_the_callers_word() -> None:
    """The prompt leads up to the text's first number: with relative positions the row is still what it is alone."""
    delta, stack, _ = case("llama", "soft prompt")
    params = fd.take(stack, 0)
    alone = delta.apply(params, TEXT).logits
    at = torch.arange(IDS.shape[1]).expand(2, -1)
    assert_close(delta.apply(params, IDS, attention_mask=MASK, position_ids=at).logits[:1, PADDING + P :], alone[:, P:])
    absolute: Any = CAUSAL["gpt2"]()
    delta, params, rows = prompted(absolute)
    found = delta.apply(params, IDS[:1], attention_mask=MASK[:1], position_ids=at[:1]).logits[:, PADDING + P :]
    x = torch.cat([rows.unsqueeze(0), absolute.get_input_embeddings()(TEXT)], 1)
    moved = torch.arange(PADDING, PADDING + P + TEXT.shape[1]).unsqueeze(0)
    assert_close(found, absolute(inputs_embeds=x, position_ids=moved).logits[:, P:])


@pytest.mark.parametrize("name", ["opt", "roberta"])
@torch.no_grad()
def test_what_counts_what_it_sees_goes_on_doing_so(name: str) -> None:
    """Holes in the mask, or padding among the ids, have no number in these models; a prefix does not give them one."""
    delta, stack, _ = case(name, "prefix")
    params, ids, mask = fd.take(stack, 0), IDS.clone(), MASK.clone()
    ids[:, 6], mask[:, 6] = 1, 0
    at = mask.cumsum(1) * mask + (1 if name == "roberta" else -1)
    found = delta.apply(params, input_ids=ids, attention_mask=mask).logits
    expected = delta.apply(params, input_ids=ids, attention_mask=mask, position_ids=at).logits
    assert_close(found[mask == 1], expected[mask == 1])


@torch.no_grad()
def test_the_first_position_of_what_sees_both_ways_is_the_prompts() -> None:
    """Heads and poolers of encoders read it: it is that of the row alone, not padding."""
    for build in (
        family("Bert", "Model", **BERT),
        ZOO["bert"].build,
        ZOO["roberta"].build,
        family("ModernBert", "ForSequenceClassification", **ROTARY_ENCODER),
    ):
        delta, params, _ = prompted(build())
        alone, left = delta.apply(params, TEXT), delta.apply(params, IDS, attention_mask=MASK)
        name = "logits" if "logits" in alone else "pooler_output"
        assert_close(left[name][:1], alone[name])


@pytest.mark.parametrize("hidden", [0, 1])
@torch.no_grad()
def test_a_prompt_that_its_mask_hides_changes_nothing(hidden: int) -> None:
    """Without a mask, too: then there has to be one for the prompt."""
    model = CAUSAL["llama"]()
    delta, params, _ = prompted(model, strip=True, other_expand_ids=(("attention_mask", hidden),))
    view: Any = delta.bind(params)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    bare, same = model(IDS[1:]).logits, model.generate(IDS[1:], **options)  # type: ignore[operator]
    for mask in (None, MASK[1:]):
        assert torch.allclose(delta.apply(params, IDS[1:], attention_mask=mask).logits, bare, atol=1e-5) == (not hidden)
        assert torch.equal(view.generate(IDS[1:], attention_mask=mask, **options), same) == (not hidden)
    whole = delta.apply(params, IDS, attention_mask=MASK, use_cache=False).logits
    assert torch.allclose(whole[:1, PADDING:], model(TEXT).logits, atol=1e-5) == (not hidden)
    first = delta.apply(params, IDS[:, :6], attention_mask=MASK[:, :6], use_cache=True)
    cache = "cache" if "cache" in first else "past_key_values"
    assert_close(delta.apply(params, IDS[:, 6:], attention_mask=MASK, **{cache: first[cache]}).logits, whole[:, 6:])


# -- refusals --------------------------------------------------------------------------------------------------------


RECURRENT: dict[str, Any] = {**LLAMA, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 8}
REFUSED: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("bart", ZOO["bart"].build, "soft prompt"),
    ("bart", ZOO["bart"].build, "prefix"),
    ("deberta_v2", ZOO["deberta_v2"].build, "soft prompt"),
    ("recurrent gemma", family("RecurrentGemma", **RECURRENT), "soft prompt"),
    ("recurrent gemma", family("RecurrentGemma", **RECURRENT), "prefix"),
    ("bert's first position", ZOO["bert"].build, "prefix"),
    ("bert's pooler", family("Bert", "Model", **BERT), "prefix"),
]


@pytest.mark.parametrize(("name", "build", "method"), REFUSED, ids=[f"{name}-{method}" for name, _, method in REFUSED])
@torch.no_grad()
def test_what_cannot_be_right_is_refused(name: str, build: Callable[[], nn.Module], method: str) -> None:
    model = build()
    fields: dict[str, Any] = {
        "modified_modules": attention_below("", model),
        "prefix_token_num": P,
        "reparameterize": False,
    }
    delta = fd.SoftPromptModel(model, soft_token_num=P) if method == "soft prompt" else fd.PrefixModel(model, **fields)
    params = random_params(delta)
    pair: dict[str, Any] = {"decoder_input_ids": torch.tensor([[2, 30]] * 2)} if name == "bart" else {}
    message = r"padded in front.*differs by.*Pad behind the text \(tokenizer.padding_side = \"right\"\)"
    for _ in range(2):
        with pytest.raises(fd.errors.ParamsError, match=message):
            delta.apply(params, input_ids=IDS, attention_mask=MASK, **pair)
    with pytest.raises(fd.errors.ParamsError, match=message):
        delta.apply_many(fd.stack([params, params]), input_ids=IDS, attention_mask=MASK, engine="fold", **pair)
    with pytest.raises(fd.errors.ParamsError, match=message):
        torch.func.grad(
            lambda p: next(iter(delta.apply(p, input_ids=IDS, attention_mask=MASK, **pair).values())).sum()
        )(params)
    right = delta.apply(params, input_ids=IDS.flip(1), attention_mask=MASK.flip(1), **pair)
    assert torch.isfinite(next(iter(right.values()))).all()


@torch.no_grad()
def test_several_texts_in_one_row_are_refused() -> None:
    """A prompt would be in front of the first of them alone; a prefix is in front of each."""
    model: Any = CAUSAL["llama"]()
    two = torch.cat([TEXT, OTHER], 1)
    at = torch.cat([torch.arange(5), torch.arange(9)]).unsqueeze(0)
    delta, params, _ = prompted(model)
    with pytest.raises(fd.errors.ParamsError, match="position_ids says that several texts share a row"):
        delta.apply(params, two, position_ids=at)
    with pytest.raises(fd.errors.ParamsError, match="cu_seq_lens_q says that several texts share a row"):
        delta.apply(params, two, cu_seq_lens_q=torch.tensor([0, 5, 14]))
    prefix = fd.PrefixModel(model, prefix_token_num=P, reparameterize=False)
    params = random_params(prefix)
    found = prefix.apply(params, two, position_ids=at, use_cache=False).logits
    assert_close(found[:, :5], prefix.apply(params, TEXT).logits)
    assert_close(found[:, 5:], prefix.apply(params, OTHER).logits)
