"""Soft prompts: against embeddings put together by hand in the plain backbone, OpenDelta's logits, hand decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from backbone_snapshot import assert_unchanged, snapshot
from subjects import CANNOT_ACT
from torch import Tensor, nn
from zoo import ZOO
from zoo_architecture import padding, randomise, tokens
from zoo_transformers import BERT_SIZES, GPT_SIZES, LLAMA_SIZES, SPECIAL, pretrained

import funcdelta as fd

P = 3


def prompted(model: nn.Module, **fields: Any) -> tuple[fd.DeltaModel, dict[str, Tensor], Tensor]:
    """A delta, params away from their start, and the rows themselves."""
    delta = fd.SoftPromptModel(model, soft_token_num=P, **fields)
    params = fd.tree.randn_like(delta.init(0), seed=1)
    return delta, params, next(iter(params.values()))


def by_hand(rows: Tensor, embedded: Tensor) -> Tensor:
    return torch.cat([rows.expand(embedded.shape[0], *rows.shape), embedded], 1)


def ones_before(mask: Tensor, value: int = 1) -> Tensor:
    return torch.cat([torch.full((mask.shape[0], P), value), mask], 1)


def left_padded() -> tuple[Tensor, Tensor]:
    """Ids with padding number 1, and their mask: row 1 has two fewer tokens."""
    ids, mask = tokens(2), torch.ones(2, 6, dtype=torch.long)
    ids[1, :2], mask[1, :2] = 1, 0
    return ids, mask


@pytest.mark.parametrize("family", ["bert", "gpt2", "opt", "t5"])
def test_opendelta_computed_the_same(family: str, opendelta_fixtures: Path) -> None:
    saved = torch.load(opendelta_fixtures / family / "backbone.pt", weights_only=True)
    kind = getattr(transformers, saved["cls"])
    model = kind(kind.config_class(**saved["config"])).eval()
    model.load_state_dict(saved["state_dict"], strict=False)
    folder = opendelta_fixtures / family / "soft_prompt"
    config = fd.AutoDeltaConfig.from_finetuned(folder)
    assert config.modified_modules == ("root",)
    delta = fd.DeltaModel(model, config)
    (rows,) = torch.load(folder / "pytorch_model.bin", weights_only=True).values()
    inputs = {key: saved[key] for key in ("input_ids", "attention_mask")}
    if family == "t5":
        inputs["decoder_input_ids"] = saved["decoder_input_ids"]
    found = delta.apply(dict.fromkeys(delta.names, rows), **inputs).logits
    expected = torch.load(folder / "expected.pt", weights_only=True)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


GEMMA = pretrained("Gemma", "ForCausalLM", **LLAMA_SIZES, pad_token_id=0)
BART_SCALED = pretrained(
    "Bart",
    "ForConditionalGeneration",
    **SPECIAL,
    vocab_size=64,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    scale_embedding=True,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
)
NARROW_OPT = pretrained(
    "OPT",
    "ForCausalLM",
    **SPECIAL,
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=32,
    word_embed_proj_dim=8,
)
PLAIN: dict[str, Callable[[], nn.Module]] = {
    **{name: ZOO[name].build for name in ("bert", "albert", "deberta_v2", "distilbert", "gpt2", "llama", "mixtral")},
    **{name: ZOO[name].build for name in ("bloom", "t5", "bart")},
    "gemma": GEMMA,
    "bart with scaled embeddings": BART_SCALED,
    "opt with narrow embeddings": NARROW_OPT,
}


@pytest.mark.parametrize("name", PLAIN)
def test_equals_the_plain_backbone_on_embeddings_put_together_by_hand(name: str) -> None:
    model = PLAIN[name]()
    delta, params, rows = prompted(model)
    ids, mask = tokens(2), padding(2)
    ids_before, mask_before, state = ids.clone(), mask.clone(), snapshot(model)
    pair = {"decoder_input_ids": tokens(2, 7, 4)} if model.config.is_encoder_decoder else {}
    entered = model.get_encoder() if pair else model
    x, longer = by_hand(rows, entered.get_input_embeddings()(ids)), ones_before(mask)
    with torch.no_grad():
        found = delta.apply(params, ids, attention_mask=mask, **pair).logits
        if pair:
            states = entered(inputs_embeds=x, attention_mask=longer)
            expected = model(encoder_outputs=states, attention_mask=longer, **pair).logits
        else:
            expected = model(inputs_embeds=x, attention_mask=longer).logits
        torch.testing.assert_close(found, expected)
        # Embeddings may be given instead of ids, and a value of None is no input.
        if not pair or "bart" not in name:
            embedded = {"inputs_embeds": entered.get_input_embeddings()(ids), "attention_mask": mask}
            torch.testing.assert_close(delta.apply(params, input_ids=None, **embedded, **pair).logits, expected)
        bare = delta.apply({}, ids, attention_mask=mask, **pair).logits
        assert torch.equal(bare, model(ids, attention_mask=mask, **pair).logits)
        if not pair and bare.ndim == 3:
            stripped, _, _ = prompted(model, strip=True)
            output = stripped.apply(params, ids, attention_mask=mask, output_hidden_states=True)
            assert output.logits.shape == bare.shape
            torch.testing.assert_close(output.logits, expected[:, P:])
    assert torch.equal(ids, ids_before)
    assert torch.equal(mask, mask_before)
    assert_unchanged(model, state)


def test_token_types_position_numbers_and_absent_masks_by_hand() -> None:
    model = ZOO["bert"].build()
    delta, params, rows = prompted(model)
    ids, mask = left_padded()
    types, at = torch.ones_like(ids), (mask.cumsum(1) - 1).clamp(min=0)
    x = by_hand(rows, model.get_input_embeddings()(ids))
    longer = torch.cat([torch.arange(P).expand(2, P), at + P], 1)
    with torch.no_grad():
        found = delta.apply(params, ids, token_type_ids=types, attention_mask=None, position_ids=at).logits
        expected = model(inputs_embeds=x, token_type_ids=ones_before(types, 0), position_ids=longer).logits
        torch.testing.assert_close(found, expected)
        ones = fd.DeltaModel(model, delta.configs[0].replace(other_expand_ids=(("token_type_ids", 1),)))
        expected = model(inputs_embeds=x, token_type_ids=ones_before(types), position_ids=longer).logits
        torch.testing.assert_close(ones.apply(params, ids, None, types, at).logits, expected)


def test_positions_of_roberta_skip_padding() -> None:
    """RoBERTa counts from ids, which it does not see here: padded rows have to equal the same rows without padding."""
    model = ZOO["roberta"].build()
    delta, params, _ = prompted(model)
    ids, mask = left_padded()
    with torch.no_grad():
        found = delta.apply(params, ids, mask).logits
        torch.testing.assert_close(found[1:], delta.apply(params, ids[1:, 2:]).logits)
        numbers = (mask.cumsum(1) * mask) + 1  # what RoBERTa counts, given explicitly
        torch.testing.assert_close(delta.apply(params, ids, mask, position_ids=numbers).logits, found)
        # Padding behind the text counts on, as OpenDelta's and all embeddings do.
        right, behind = ids.clone(), torch.ones_like(mask)
        right[1, :2], right[1, -2:], behind[1, -2:] = 5, model.config.pad_token_id, 0
        counted = torch.arange(ids.shape[1]).expand_as(ids) + 2
        expected = delta.apply(params, right, behind, position_ids=counted).logits
        torch.testing.assert_close(delta.apply(params, right, behind).logits, expected)


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_positions_counted_from_the_mask_skip_padding(name: str) -> None:
    model = ZOO[name].build()
    delta, params, _ = prompted(model)
    ids, mask = left_padded()
    with torch.no_grad():
        found = delta.apply(params, ids, attention_mask=mask).logits
        alone = delta.apply(params, ids[1:, 2:]).logits
    torch.testing.assert_close(found[1:, P + 2 :], alone[:, P:])


def test_labels_of_tokens_are_extended_on_a_copy() -> None:
    model = ZOO["gpt2"].build()
    delta, params, _ = prompted(model)
    ids = tokens(2)
    labels = ids.clone()
    labels[:, :2] = -100
    kept = labels.clone()
    output = delta.apply(params, ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, P - 1 : -1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(labels, kept)
    stripped, _, _ = prompted(model, strip=True)
    logits = output.logits[:, P:-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(stripped.apply(params, ids, labels=labels).loss, expected)


def test_answers_behind_the_prompt() -> None:
    model = pretrained("Bert", "ForQuestionAnswering", **BERT_SIZES | {"num_labels": 2})()
    delta, params, _ = prompted(model)
    start, end = torch.tensor([1, 2]), torch.tensor([3, 5])
    output = delta.apply(params, tokens(2), start_positions=start, end_positions=end)
    expected = F.cross_entropy(output.start_logits, start + P) + F.cross_entropy(output.end_logits, end + P)
    torch.testing.assert_close(output.loss, expected / 2)


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_heads_that_look_for_the_last_token_find_it(family: str) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, **GPT_SIZES} if family == "GPT2" else LLAMA_SIZES
    model = pretrained(family, "ForSequenceClassification", **sizes | {"pad_token_id": 1, "num_labels": 3})()
    delta, params, _ = prompted(model)
    ids, mask = tokens(2), torch.ones(2, 6, dtype=torch.long)
    ids[1, 4:], mask[1, 4:] = 1, 0
    labels = torch.tensor([0, 2])
    with torch.no_grad():
        output = delta.apply(params, ids, attention_mask=mask, labels=labels)
        torch.testing.assert_close(output.logits[1:], delta.apply(params, ids[1:, :4]).logits)
        assert not torch.allclose(output.logits, model(ids, attention_mask=mask).logits)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


# -- generate ------------------------------------------------------------------------------------------------------


def greedy(
    delta: fd.DeltaModel, params: dict[str, Tensor], ids: Tensor, mask: Tensor, name: str, new: int
) -> tuple[Tensor, Tensor]:
    """Tokens and their logits: greedy decoding by whole calls without a cache, explicit in everything."""
    steps = []
    pair = name in ("t5", "bart")
    found = torch.full((len(ids), 1), 2) if pair else ids
    for _ in range(new):
        if pair:
            logits = delta.apply(params, input_ids=ids, attention_mask=mask, decoder_input_ids=found).logits
        else:
            at = {} if name == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
            logits = delta.apply(params, input_ids=found, attention_mask=mask, **at).logits
            mask = F.pad(mask, (0, 1), value=1)
        steps.append(logits[:, -1])
        found = torch.cat([found, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return found, torch.stack(steps)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "llama", "t5", "bart"])
def test_generate_with_a_cache_is_greedy_decoding_by_hand(name: str) -> None:
    model = ZOO[name].build()
    delta, params, _ = prompted(model)
    ids, mask = left_padded() if name != "bart" else (tokens(2), padding(2))
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    if name in ("t5", "bart"):
        options["decoder_start_token_id"] = 2
    view = delta.bind(params)
    with torch.no_grad():
        expected, logits = greedy(delta, params, ids, mask, name, 5)
        output = view.generate(ids, **options, return_dict_in_generate=True, output_logits=True)  # type: ignore[operator]
        assert torch.equal(output.sequences, expected)
        torch.testing.assert_close(torch.stack(output.logits), logits)
        bare = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
        assert not torch.allclose(bare.logits[0], logits[0], rtol=1e-3)
        beams = [view.generate(ids, **options, num_beams=3, use_cache=cached) for cached in (True, False)]  # type: ignore[operator]
    assert torch.equal(*beams)
    assert beams[0].shape == expected.shape


def test_going_on_from_a_cache_by_hand() -> None:
    model = ZOO["llama"].build()
    delta, params, _ = prompted(model)
    ids, mask = left_padded()
    at = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = delta.apply(params, ids, attention_mask=mask, position_ids=at).logits
        for counted in (False, True):  # the mask with or without the prompt's positions
            first = delta.apply(params, ids[:, :4], attention_mask=mask[:, :4], position_ids=at[:, :4], use_cache=True)
            # Transformers 5.24 calls it cache, and the old name stands beside it.
            name = "cache" if "cache" in first else "past_key_values"
            cache = {name: first[name]}
            more = ones_before(mask) if counted else mask
            numbers = at[:, 4:] + P if counted else at[:, 4:]
            rest = delta.apply(params, ids[:, 4:], attention_mask=more, position_ids=numbers, **cache).logits
            torch.testing.assert_close(rest, whole[:, P + 4 :])
        with pytest.raises(fd.errors.ParamsError, match=r"attention_mask has 5 positions, the cache 9 and the input 2"):
            delta.apply(params, ids[:, 4:], attention_mask=mask[:, :5], **cache)


def test_states_of_an_encoder_run_without_it_stay_as_they_are() -> None:
    model = ZOO["t5"].build()
    delta, params, _ = prompted(model)
    ids, mask = tokens(2), padding(2)
    more = {"attention_mask": mask, "decoder_input_ids": tokens(2, 7, 4)}
    with torch.no_grad():
        states = model.get_encoder()(ids, mask)
        found = delta.apply(params, encoder_outputs=states, **more).logits
        assert torch.equal(found, model(encoder_outputs=states, **more).logits)


# -- what it acts on, and with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), CANNOT_ACT)
def test_says_where_it_cannot_act(method: str, name: str) -> None:
    with pytest.raises(fd.errors.MatchError, match=CANNOT_ACT[method, name]):
        fd.DeltaModel(ZOO[name].build(), fd.AutoDeltaConfig.for_type(method)())


class Wrapped(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, input_ids: Tensor) -> Tensor:
        return sum(model(input_ids).logits.sum((1, 2)) for model in self.models)  # type: ignore[return-value]


def test_found_inside_wrappers() -> None:
    one, two = ZOO["gpt2"].build(), ZOO["llama"].build()
    delta, params, _ = prompted(Wrapped(one))
    inner = prompted(one)[0]
    assert delta.names == ("models.0.transformer.soft_prompt_layer.soft_embeds",)
    assert inner.names == ("transformer.soft_prompt_layer.soft_embeds",)
    with torch.no_grad():
        expected = inner.apply(dict.fromkeys(inner.names, next(iter(params.values()))), tokens(2)).logits.sum((1, 2))
        torch.testing.assert_close(delta.apply(params, tokens(2)), expected)
    with pytest.raises(
        fd.errors.MatchError, match=r"several models that take token ids \(models.0.transformer, models.1.mod"
    ):
        prompted(Wrapped(one, two))
    assert prompted(Wrapped(one, two), modified_modules=["models.1.model"])[0].sites == ("models.1.model",)
    with pytest.raises(fd.errors.MatchError, match="exclude_modules leaves out 'transformer'"):
        prompted(one, exclude_modules=["transformer"])
    with pytest.raises(fd.errors.MatchError, match=r"cannot act at .*c_attn: Conv1D has no get_input_embeddings"):
        prompted(one, modified_modules=["c_attn"])


@dataclass(frozen=True)
class WrittenPrompt(fd.BaseDeltaConfig):
    """A prompt that a small network writes: rows tanh(E W), with W shared."""

    def own_sites(self, backbone: nn.Module) -> list[str]:
        return ["transformer"]

    def describe(self, site: fd.Site, module: nn.Module) -> fd.Site:
        from dataclasses import replace

        return replace(site, out_features=16)

    def shared(self, sites: tuple[fd.Site, ...], rng: torch.Generator) -> dict[str, Tensor]:
        return {"writer": torch.randn(4, 16, generator=rng)}

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"codes": torch.randn(2, 4, generator=rng)}

    def prompt(self, site: fd.Site, p: dict[str, Tensor]) -> Tensor:
        return torch.tanh(p["codes"] @ p["writer"])


def test_with_other_deltas_and_trained_embeddings_in_one_fold() -> None:
    """Two prompts (the second stands in front), a LoRA on the embedding that they stand before, an adapter behind."""
    model = ZOO["gpt2"].build()
    delta = fd.DeltaModel(
        model,
        fd.SoftPromptConfig(soft_token_num=P, unfrozen_modules=("deltas", "transformer.wpe")),
        WrittenPrompt(name="written"),
        fd.LoraConfig(lora_r=2, modified_modules=("wte", "c_attn")),
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=("transformer",)),
        example={"input_ids": tokens(2)},
    )
    stack = delta.random_members(2, delta.plan.present(dict.fromkeys(delta.names)))
    ids, mask = tokens(3), padding(3)
    with torch.no_grad():
        loop = delta.apply_many(stack, ids, attention_mask=mask, engine="loop").logits
        assert loop.shape[:3] == (2, 3, 6 + P + 2)
        for engine in ("fold", "vmap"):
            found = delta.apply_many(stack, ids, attention_mask=mask, engine=engine).logits
            torch.testing.assert_close(found, loop, rtol=1e-4, atol=1e-4)
        rows = delta.apply_rows(stack, [1, 0, 1], ids, attention_mask=mask).logits
        torch.testing.assert_close(
            rows, torch.stack([loop[m, i] for i, m in enumerate([1, 0, 1])]), rtol=1e-4, atol=1e-4
        )
        # The order: the second prompt's rows come first.
        only = {key: leaf[0] for key, leaf in stack.items() if "soft_embeds" in key or "written" in key}
        written = torch.tanh(only["transformer.written.codes"] @ only["written.writer"])
        x = torch.cat([written, only["transformer.soft_prompt_layer.soft_embeds"]])
        x = torch.cat([x.expand(3, -1, -1), model.get_input_embeddings()(ids)], 1)
        longer = F.pad(mask, (P + 2, 0), value=1)
        found = delta.apply(only, ids, attention_mask=mask).logits
        torch.testing.assert_close(found, model(inputs_embeds=x, attention_mask=longer).logits)


def test_starts_as_the_first_tokens_with_their_scale() -> None:
    """A fresh prompt is the model's own tokens 0 … P-1, so that its output is known."""
    model = GEMMA()
    delta = fd.SoftPromptModel(model, soft_token_num=P)
    ids = tokens(2)
    with torch.no_grad():
        found = delta.apply(delta.init(0), ids).logits
        expected = model(torch.cat([torch.arange(P).expand(2, P), ids], 1)).logits
    torch.testing.assert_close(found, expected)
    drawn = fd.SoftPromptModel(model, soft_token_num=P, token_init=False, init_range=0.25).init(0, n=3)
    (rows,) = drawn.values()
    assert 0.2 < float(rows.abs().max()) <= 0.25
    assert not torch.equal(rows[0], rows[1])
    with pytest.raises(
        fd.errors.MatchError, match=r"copies 65 tokens, but the vocabulary has 64; write token_init=False"
    ):
        fd.SoftPromptModel(model, soft_token_num=65)


def test_half_precision_and_a_view_that_trains() -> None:
    model = randomise(ZOO["bert"].build(), 3).to(torch.bfloat16)
    delta, params, rows = prompted(model)
    assert rows.dtype == torch.float32
    assert delta.apply(params, tokens(2)).logits.dtype == torch.bfloat16
    view = delta.bind(params)
    view(tokens(2), labels=torch.tensor([0, 1])).loss.backward()
    (leaf,) = (p for p in view.parameters() if p.requires_grad)
    assert leaf.grad is not None
    assert leaf.grad.any()


def test_the_config_is_hashable_data() -> None:
    config = fd.SoftPromptConfig(other_expand_ids={"attention_mask": 1, "bbox": 0})  # type: ignore[arg-type]
    assert config == fd.SoftPromptConfig.from_dict(config.to_dict())
    assert hash(config) == hash(config.replace())
    assert dict(config.other_expand_ids) == {"attention_mask": 1, "bbox": 0}
    for fields, message in [
        ({"soft_token_num": 0}, "write at least 1"),
        ({"init_range": -1.0}, "write at least 0"),
        ({"batch_dim": 1}, "write batch_dim=0"),
        ({"other_expand_ids": ("attention_mask",)}, "write pairs of an input's name and a number"),
    ]:
        with pytest.raises(fd.errors.ConfigError, match=message):
            fd.SoftPromptConfig(**fields)


# -- loud errors -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_extended_is_refused() -> None:
    model = ZOO["gpt2"].build()
    delta, params, _ = prompted(model)
    ids = tokens(2)
    prepared = torch.zeros(2, 1, 6, 6)
    with pytest.raises(
        fd.errors.ParamsError, match=r"attention_mask has the shape \(2, 1, 6, 6\).*can only be added to a mask"
    ):
        delta.apply(params, ids, attention_mask=prepared)
    with pytest.raises(
        fd.errors.ParamsError, match=r"attention_mask has the shape \(2, 5\), but the input has 6 positions"
    ):
        delta.apply(params, ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(
        fd.errors.ParamsError, match=r"has 32 positions, but the prompt \(3\) and the text \(30\) need 33: shorte"
    ):
        delta.apply(params, tokens(2, length=30))
    assert delta.apply(params, tokens(2, length=29)).logits.shape == (2, 32, 64)
    with pytest.raises(fd.errors.EngineError, match=r"StaticCache was made for the text without the prompt"):
        delta.bind(params).generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=1)  # type: ignore[operator]
    with pytest.raises(fd.errors.MergeError, match="rows before the input are not a function of the weights"):
        delta.merge(params)
    with pytest.raises(ValueError, match="input_ids"):
        delta.apply(params, attention_mask=torch.ones(2, 6))

    xlnet = pretrained("XLNet", "Model", vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=16)()
    delta, params, _ = prompted(xlnet)
    with pytest.raises(fd.errors.ParamsError, match=r'add \("perm_mask", value\) to other_expand_ids'):
        delta.apply(params, ids, perm_mask=torch.zeros(2, 6, 6))
    with pytest.raises(fd.errors.EngineError, match="was given mems, which does not tell"):
        delta.apply(params, ids, mems=[torch.zeros(4, 2, 16)])


def test_at_the_root_of_a_bare_transformer(tmp_path: Path) -> None:
    model = pretrained("Bert", "Model", **BERT_SIZES)()
    delta, params, rows = prompted(model)
    assert delta.names == ("soft_prompt_layer.soft_embeds",)
    ids = tokens(2)
    with torch.no_grad():
        expected = model(inputs_embeds=by_hand(rows, model.get_input_embeddings()(ids)))
        found = delta.bind(params)(ids)
        torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)
        torch.testing.assert_close(found.pooler_output, expected.pooler_output)
        folded = delta.apply_many(fd.stack([params, delta.init(0)]), ids, engine="fold")
        torch.testing.assert_close(folded.last_hidden_state[0], expected.last_hidden_state)
        stripped = prompted(model, strip=True)[0].apply(params, ids, return_dict=False)
        torch.testing.assert_close(stripped[0], expected.last_hidden_state[:, P:])
    delta.save_finetuned(params, tmp_path / "delta")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=model)
    assert again.configs == delta.configs
    assert torch.equal(loaded[delta.names[0]], rows)
