"""Prefix tuning, against attention written as loops, OpenDelta's own outputs, and greedy decoding without a cache."""

from __future__ import annotations

import functools
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from zoo import ZOO, padding, tokens
from zoo_architecture import randomise
from zoo_transformers import GPT_SIZES, LLAMA_SIZES, SPECIAL

import funcdelta as fd
from funcdelta.errors import UnreachedWarning

PREFIX = 3
# Head size 8 where width / heads is 4: keys are as wide as queries' heads say only by chance.
WIDE = {**LLAMA_SIZES, "head_dim": 8, "pad_token_id": 1}
T5_SIZES = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}


def model_of(family: str, kind: str, implementation: str | None = None, **sizes: Any) -> nn.Module:
    model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**sizes))
    if implementation is not None:
        model.config._attn_implementation = implementation
    return randomise(model, seed=0)


@dataclass(frozen=True)
class NarrowConfig(fd.BaseDeltaConfig):
    """A method whose keys are too narrow for any site."""

    default_name = "narrow"

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"k": torch.zeros(3, 5)}

    def attend(self, site: fd.Site, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return p["k"], p["k"]


def plain_prefix(model: nn.Module, *modules: str, **fields: Any) -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    """Prefixes that each site owns, and a member."""
    delta = fd.PrefixModel(
        model, modified_modules=modules or None, prefix_token_num=PREFIX, reparameterize=False, **fields
    )
    return delta, delta.init(0)


# -- the formula ---------------------------------------------------------------------------------------------------


def attention_by_loops(
    q: Tensor, k: Tensor, v: Tensor, p: tuple[Tensor, Tensor], seen: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """(rows, queries, heads · size): each query's softmax over the prefix and the keys that ``seen`` lets it see.

    q (rows, heads, queries, size), k and v (rows, fewer heads, length, size), p two of (P, fewer heads · size), seen
    (rows, queries, length), bias (heads, queries, length).
    """
    rows, heads, queries, _ = q.shape
    few = k.shape[1]
    past_key, past_value = (each.view(len(each), few, -1) for each in p)
    out = torch.zeros(rows, queries, heads, v.shape[-1])
    for row in range(rows):
        for head in range(heads):
            shared = head // (heads // few)
            for i in range(queries):
                scores = [q[row, head, i] @ past_key[j, shared] * scale for j in range(len(past_key))]
                values = [past_value[j, shared] for j in range(len(past_key))]
                for j in range(k.shape[2]):
                    if seen[row, i, j]:
                        add = 0.0 if bias is None else bias[head, i, j]
                        scores.append(q[row, head, i] @ k[row, shared, j] * scale + add)
                        values.append(v[row, shared, j])
                out[row, i, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out.flatten(2)


class Spy:
    """Keeps what a module of a view was called with and what it gave."""

    def __init__(self, view: nn.Module, path: str) -> None:
        self.module: Any = view.get_submodule(path)
        self.module.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.x = args[0] if args else kwargs["hidden_states"]
        self.kwargs, self.y = kwargs, output[0]

    def heads(self, layer: str, size: int) -> Tensor:
        return self.module.get_submodule(layer)(self.x).unflatten(-1, (-1, size)).transpose(1, 2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_bert_equals_loops(implementation: str) -> None:
    model = ZOO["bert"].build()
    model.set_attn_implementation(implementation)
    delta, params = plain_prefix(model)
    assert delta.sites == tuple(f"bert.encoder.layer.{i}.attention.self" for i in range(2))
    view = delta.bind(params)
    spy = Spy(view, delta.sites[1])
    mask = padding(3)
    view(input_ids=tokens(3), attention_mask=mask)
    p = tuple(params[f"{delta.sites[1]}.prefix.past_{kind}"] for kind in ("key", "value"))
    q, k, v = (spy.heads(name, 8) for name in ("query", "key", "value"))
    seen = mask.bool().unsqueeze(1).expand(3, 6, 6)
    assert_close(spy.y, attention_by_loops(q, k, v, p, seen, 8**-0.5))


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_grouped_heads_and_sliding_windows_equal_loops(family: str, masked: bool) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    window = 3 if family == "Mistral" else 99
    model = model_of(family, "ForCausalLM", **WIDE, **({"sliding_window": window} if window < 99 else {}))
    delta, params = plain_prefix(model)
    assert delta.shapes["model.layers.0.self_attn.prefix.past_key"] == (PREFIX, 2 * 8)
    view = delta.bind(params)
    spy = Spy(view, delta.sites[1])
    mask = padding(3) if masked else None
    view(input_ids=tokens(3), attention_mask=mask)
    p = tuple(params[f"{delta.sites[1]}.prefix.past_{kind}"] for kind in ("key", "value"))
    q, k, v = (spy.heads(name, 8) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = apply_rotary_pos_emb(q, k, *spy.kwargs["position_embeddings"])
    ago = torch.arange(6).unsqueeze(1) - torch.arange(6)
    seen = ((ago >= 0) & (ago < window)).expand(3, 6, 6)
    seen = seen & mask.bool().unsqueeze(1) if mask is not None else seen
    assert_close(spy.y, spy.module.o_proj(attention_by_loops(q, k, v, p, seen, 8**-0.5)))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@torch.no_grad()
def test_t5_keeps_its_position_bias_in_every_layer(stack: str) -> None:
    model: Any = model_of("T5", "ForConditionalGeneration", **T5_SIZES)
    delta, params = plain_prefix(model)
    assert len(delta.sites) == 4
    view = delta.bind(params)
    site = f"{stack}.block.1.layer.0.SelfAttention"
    spy = Spy(view, site)
    mask = padding(3)
    view(input_ids=tokens(3), attention_mask=mask, decoder_input_ids=tokens(3, seed=1))
    first = model.get_submodule(f"{stack}.block.0.layer.0.SelfAttention")
    p = tuple(params[f"{site}.prefix.past_{kind}"] for kind in ("key", "value"))
    seen = torch.ones(6, 6, dtype=torch.bool).tril().expand(3, 6, 6)
    seen = mask.bool().unsqueeze(1).expand(3, 6, 6) if stack == "encoder" else seen
    q, k, v = (spy.heads(name, 6) for name in "qkv")
    out = attention_by_loops(q, k, v, p, seen, 1.0, first.compute_bias(6, 6)[0])
    assert_close(spy.y, spy.module.o(out))


def test_an_attention_of_the_users_own_choice_gets_the_same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the manner of flash attention: a mask (rows, length) or none, triangles aligned at the last key."""

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
        queries, length = query.shape[2], key.shape[2]
        seen = torch.ones(queries, length, dtype=torch.bool).tril(length - queries)
        seen = seen if mask is None else seen & mask.bool().view(-1, 1, 1, length)
        scores = (query @ key.mT * module.scaling).masked_fill(~seen, -1e9)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(AttentionInterface._global_mapping, "test_flash", flash)
    monkeypatch.setitem(masks, "test_flash", masks["flash_attention_2"])
    model = model_of("Llama", "ForCausalLM", **WIDE)
    delta, params = plain_prefix(model)
    stack = fd.stack([params, delta.init(1)])
    other = fd.PrefixModel(
        model_of("Llama", "ForCausalLM", "test_flash", **WIDE), prefix_token_num=PREFIX, reparameterize=False
    )
    for extra in ({}, {"attention_mask": padding(3).flip(-1)}):
        real = extra.get("attention_mask", torch.ones(3, 6)).bool()
        expected = delta.apply_rows(stack, [1, -1, 0], input_ids=tokens(3), **extra).logits
        found = other.apply_rows(stack, [1, -1, 0], input_ids=tokens(3), **extra).logits
        assert_close(found[real], expected[real])
    windowed = model_of("Mistral", "ForCausalLM", "test_flash", **WIDE, sliding_window=8)
    with raises_saying(fd.errors.MatchError, "model.layers.0.self_attn", "window of 8", 'attn_implementation="sdpa"'):
        windowed_delta, windowed_params = plain_prefix(windowed)
        windowed_delta.apply(windowed_params, input_ids=tokens(3))


# -- OpenDelta -----------------------------------------------------------------------------------------------------


def opendelta_case(folder: Path, kind: str, **fields: Any) -> tuple[Any, dict[str, Tensor], dict[str, Any], Tensor]:
    """A delta made like OpenDelta's, its leaves, inputs, and the logits that OpenDelta gave."""
    saved = torch.load(folder / "backbone.pt", weights_only=True)
    model_class = getattr(transformers, saved["cls"])
    # Numbers of special tokens that its vocabulary does not have would be warned about.
    model = model_class(model_class.config_class(**{**saved["config"], "bos_token_id": None, "eos_token_id": None}))
    model.load_state_dict(saved["state_dict"], strict=False)
    config = json.loads((folder / kind / "config.json").read_text())
    sizes = {name: config[name] for name in ("prefix_token_num", "reparameterize", "embed_dim", "mid_dim")}
    delta = fd.PrefixModel(model.eval(), **sizes, **fields)
    params = {}
    for name, leaf in torch.load(folder / kind / "pytorch_model.bin", weights_only=True).items():
        before, _, shared = name.partition(".reparams.")
        params[f"prefix.{shared}" if shared else before.replace("attention.prefix", "attention.self.prefix")] = leaf
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    inputs = {name: saved[name] for name in names if saved.get(name) is not None and name != "decoder_input_ids"}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = saved["decoder_input_ids"]
    return delta, params, inputs, torch.load(folder / kind / "expected.pt", weights_only=True)["logits"]


@pytest.mark.parametrize("kind", ["prefix", "prefix_noreparam"])
@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5"])
@torch.no_grad()
def test_opendelta_gives_the_same(opendelta_fixtures: Path, backbone: str, kind: str) -> None:
    fields = {"position_bias": "first_layer_only"} if backbone == "t5" else {}
    delta, params, inputs, expected = opendelta_case(opendelta_fixtures / backbone, kind, **fields)
    assert sorted(params) == sorted(delta.names)
    assert_close(delta.apply(params, **inputs).logits, expected, 1e-5)
    if backbone == "t5":
        right, _, _, _ = opendelta_case(opendelta_fixtures / backbone, kind)
        assert_acts(right.apply(params, **inputs).logits, expected)


# -- one network for all prefixes ----------------------------------------------------------------------------------


@torch.no_grad()
def test_baked_prefixes_give_the_same() -> None:
    delta = fd.PrefixModel(ZOO["gpt2"].build(), prefix_token_num=PREFIX, embed_dim=5, mid_dim=7)
    assert delta.shapes == {
        "prefix.wte.weight": (PREFIX, 5),
        "prefix.control_trans.0.weight": (7, 5),
        "prefix.control_trans.0.bias": (7,),
        "prefix.control_trans.2.weight": (2 * 2 * 16, 7),
        "prefix.control_trans.2.bias": (2 * 2 * 16,),
    }
    stack, inputs = random_params(delta, n=2), {"input_ids": tokens(3), "attention_mask": padding(3)}
    baked, plain = delta.bake(stack)
    assert_close(baked.apply_many(plain, **inputs).logits, delta.apply_many(stack, **inputs).logits, 1e-6)
    hidden = torch.tanh(
        stack["prefix.wte.weight"][1] @ stack["prefix.control_trans.0.weight"][1].T
        + stack["prefix.control_trans.0.bias"][1]
    )
    written = hidden @ stack["prefix.control_trans.2.weight"][1].T + stack["prefix.control_trans.2.bias"][1]
    assert_close(plain["transformer.h.1.attn.prefix.past_value"][1], written.view(PREFIX, 4, 16)[:, 3])
    with raises_saying(fd.errors.ConfigError, "plain already", "nothing to bake"):
        baked.bake(plain)


def test_fresh_prefixes_are_standard_normal() -> None:
    model = model_of("Bert", "Model", hidden_size=256, num_attention_heads=2, num_hidden_layers=1, vocab_size=9000)
    delta = fd.PrefixModel(model, prefix_token_num=100, reparameterize=False)
    for leaf in delta.init(0).values():
        assert abs(float(leaf.mean())) < 0.02
        assert math.isclose(float(leaf.std()), 1.0, abs_tol=0.02)


# -- generation ----------------------------------------------------------------------------------------------------

GENERATES = {
    "llama": ("Llama", "ForCausalLM", WIDE),
    "gemma2": ("Gemma2", "ForCausalLM", {**WIDE, "sliding_window": 4}),
    "gpt2": ("GPT2", "LMHeadModel", {**GPT_SIZES, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "t5": ("T5", "ForConditionalGeneration", T5_SIZES),
}


@pytest.mark.parametrize("name", GENERATES)
@torch.no_grad()
def test_generation_with_a_cache_equals_a_loop_without(name: str) -> None:
    family, kind, sizes = GENERATES[name]
    model: Any = model_of(family, kind, **sizes)
    before = snapshot(model)
    delta, params = plain_prefix(model, *(["self_attn"] if name == "gemma2" else []))
    prompt = {"input_ids": tokens(3), "attention_mask": padding(3).flip(-1)}  # padded on the left
    found = torch.zeros(3, 1, dtype=torch.long) if name == "t5" else prompt["input_ids"]
    mask = prompt["attention_mask"]
    for _ in range(6):
        if name == "t5":
            inputs = {**prompt, "decoder_input_ids": found}
        else:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs = {"input_ids": found, "attention_mask": mask, "position_ids": positions}
            mask = torch.cat([mask, mask.new_ones(3, 1)], -1)
        found = torch.cat([found, delta.apply(params, use_cache=False, **inputs).logits[:, -1:].argmax(-1)], -1)
    view: Any = delta.bind(params)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    generated = view.generate(**prompt, **options)
    assert torch.equal(generated, found)
    assert not torch.equal(generated, model.generate(**prompt, **options))
    beams = view.generate(**prompt, **options, num_beams=3)
    assert torch.equal(beams, view.generate(**prompt, **options, num_beams=3, use_cache=False))
    assert_unchanged(model, before)


# -- with everything else ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "kind"), [("Llama", "ForCausalLM"), ("Bert", "Model")])
@torch.no_grad()
def test_no_mask_is_a_mask_of_ones_in_every_engine(family: str, kind: str, implementation: str) -> None:
    delta, params = plain_prefix(model_of(family, kind, implementation, **(WIDE | {"head_dim": 4})))
    stack, ids = fd.stack([params, delta.init(1)]), tokens(3)
    whole = torch.stack([delta.apply(fd.take(stack, i), ids, attention_mask=torch.ones(3, 6))[0] for i in range(2)])
    for engine in ("loop", "vmap", "fold"):
        assert_close(delta.apply_many(stack, ids, engine=engine)[0], whole)
    rows = delta.apply_rows(stack, [1, -1, 0], ids)[0]
    assert_close(rows, torch.stack([whole[1, 0], delta.apply({}, ids)[0][1], whole[0, 2]]))
    assert_close(delta.apply_many(stack, ids[:1])[0], whole[:, :1])


@torch.no_grad()
def test_beside_other_deltas_and_trained_leaves_of_the_same_module() -> None:
    """gpt-oss has parameters of its own in the module that attends: it then runs once per member."""
    model = model_of("GptOss", "ForCausalLM", **WIDE, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    lora = fd.LoraConfig(lora_r=2, modified_modules=["q_proj"])
    prefix = fd.PrefixConfig(
        prefix_token_num=PREFIX,
        reparameterize=False,
        modified_modules=["self_attn"],
        unfrozen_modules=["deltas", "sinks"],
    )
    two = fd.PrefixConfig(
        prefix_token_num=1, reparameterize=False, modified_modules=["layers.1.self_attn"], name="second"
    )
    delta = fd.DeltaModel(model, lora, prefix, two)
    stack, inputs = random_params(delta, n=2), {"input_ids": tokens(2), "attention_mask": padding(2)}
    each = [delta.apply(fd.take(stack, i), **inputs).logits for i in range(2)]
    assert_close(delta.apply_many(stack, **inputs, engine="fold").logits, torch.stack(each))
    assert_close(delta.bind(fd.take(stack, 1))(**inputs).logits, each[1])
    # Two prefixes are one twice as long, and each delta acts without the others.
    some = {name: leaf for name, leaf in fd.take(stack, 0).items() if ".lora." not in name and "sinks" not in name}
    long = fd.PrefixModel(
        model, prefix_token_num=PREFIX + 1, reparameterize=False, modified_modules=["layers.1.self_attn"]
    )
    place = "model.layers.1.self_attn"
    joined = {
        f"{place}.prefix.{leaf}": torch.cat([some[f"{place}.{name}.{leaf}"] for name in ("second", "prefix")])
        for leaf in ("past_key", "past_value")
    }
    last = {name: leaf for name, leaf in some.items() if "layers.1" in name}
    pair = fd.DeltaModel(model, prefix.replace(modified_modules=["layers.1.self_attn"]), two)
    assert_close(pair.apply(last, **inputs).logits, long.apply(joined, **inputs).logits)
    alone = {name: leaf for name, leaf in fd.take(stack, 0).items() if ".lora." in name}
    assert_close(
        delta.apply(alone, **inputs).logits,
        fd.DeltaModel(model, lora).apply(alone, **inputs).logits,
    )


@torch.no_grad()
def test_half_precision_and_a_change_of_attention() -> None:
    model: Any = model_of("Llama", "ForCausalLM", **WIDE).to(torch.bfloat16)
    delta, params = plain_prefix(model)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    out = delta.apply(params, input_ids=tokens(2)).logits
    assert out.dtype == torch.bfloat16
    assert torch.equal(pickle.loads(pickle.dumps(delta)).apply(params, input_ids=tokens(2)).logits, out)
    exact, _ = plain_prefix(model_of("Llama", "ForCausalLM", **WIDE))
    assert_close(out.float(), exact.apply(params, input_ids=tokens(2)).logits, 0.05)
    model.float()
    assert_close(delta.refresh().apply(params, input_ids=tokens(2)).logits, out.float(), 0.05)
    view: Any = exact.bind(params)
    expected = view(input_ids=tokens(2)).logits
    view.set_attn_implementation("eager")
    assert_close(view(input_ids=tokens(2)).logits, expected)
    assert view.config._attn_implementation == "eager"
    attentions = view(input_ids=tokens(2), output_attentions=True).attentions
    assert attentions[0].shape == (2, 4, 6, PREFIX + 6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_of_a_view_have_the_same_gradients(reentrant: bool) -> None:
    model: Any = ZOO["llama"].build().train()
    delta = fd.PrefixModel(model, prefix_token_num=PREFIX, embed_dim=4, mid_dim=4)
    params, inputs = delta.init(0), {"input_ids": tokens(2), "labels": tokens(2)}
    expected = torch.func.grad(lambda p: delta.apply(p, **inputs).loss)(params)
    view: Any = delta.bind(params)
    for layer in view.model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
    view.enable_input_require_grads()
    for _ in range(2):
        view.zero_grad()
        view(**inputs).loss.backward()
        for name, parameter in view.named_parameters():
            if name in expected:
                assert_close(parameter.grad, expected[name])


@torch.no_grad()
def test_images_and_speech() -> None:
    """A model of images says what it reads, without an example."""
    vit = ZOO["vit"]
    delta, params = plain_prefix(vit.build(), *vit.attention)
    assert_acts(
        vit.call(lambda *a, **k: delta.apply(params, *a, **k), vit.inputs(2)), vit.call(delta.backbone, vit.inputs(2))
    )
    names = ("attention_heads", "layers", "ffn_dim")
    sizes = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in names}
    sizes |= {"vocab_size": 64, "d_model": 16, "num_mel_bins": 4, "max_source_positions": 4}
    whisper = model_of("Whisper", "Model", **SPECIAL, **sizes, decoder_start_token_id=2)
    inputs = {"input_features": torch.randn(2, 4, 8), "decoder_input_ids": tokens(2)}
    delta, params = plain_prefix(whisper, "self_attn", "encoder_attn", example=inputs)
    assert len(delta.sites) == 6
    for site in delta.sites[::2]:
        one = {name: leaf for name, leaf in params.items() if name.startswith(site)}
        alone, _ = plain_prefix(whisper, site, example=inputs)
        assert_acts(alone.apply(one, **inputs).last_hidden_state, whisper(**inputs).last_hidden_state)
    stack = fd.stack([params, delta.init(1)])
    each = torch.stack([delta.apply(fd.take(stack, i), **inputs).last_hidden_state for i in range(2)])
    assert_close(delta.apply_many(stack, **inputs, engine="fold").last_hidden_state, each)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, architecture in ZOO.items() if not architecture.attention])
def test_where_it_cannot_act_it_says_so(name: str) -> None:
    architecture = ZOO[name]
    with raises_saying(fd.errors.MatchError, "prefix cannot act at", "attention interface", "acts on hidden values"):
        fd.PrefixModel(architecture.build(), modified_modules=["[r].+"])


def test_what_cannot_be_is_refused() -> None:
    bert = ZOO["bert"].build()
    with raises_saying(
        fd.errors.MatchError, "bert.encoder.layer.0.attention.self.query", "Linear neither is nor holds"
    ):
        fd.PrefixModel(bert, modified_modules=["query"])
    with raises_saying(fd.errors.ConfigError, "prefix_token_num=0", "at least 1"):
        fd.PrefixConfig(prefix_token_num=0)
    with raises_saying(fd.errors.ConfigError, "position_bias='none'", '"kept" or "first_layer_only"'):
        fd.PrefixConfig(position_bias="none")
    delta, params = plain_prefix(bert)
    with raises_saying(fd.errors.MergeError, "cannot be merged", "keys and values that no weight"):
        delta.merge(params)
    with raises_saying(fd.errors.MatchError, "no family", "attn@"):
        fd.PrefixModel(MLP())


def test_sites_of_unlike_width_need_prefixes_of_their_own() -> None:
    class Two(nn.Module):
        """Two encoders of unlike width, side by side."""

        def __init__(self) -> None:
            super().__init__()
            self.a = ZOO["bert"].build()
            self.b = model_of("Bert", "Model", hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=64)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.a(input_ids).logits.sum(-1) + self.b(input_ids).last_hidden_state.sum((-1, -2))

    example = {"input_ids": tokens(2)}
    with raises_saying(
        fd.errors.ConfigError, "equally wide", "b.encoder.layer.0.attention.self", "reparameterize=False"
    ):
        fd.PrefixModel(Two(), example=example)
    delta, params = plain_prefix(Two(), example=example)
    assert params["b.encoder.layer.0.attention.self.prefix.past_key"].shape == (PREFIX, 8)
    assert delta.apply(params, **example).shape == (2,)


def test_a_site_that_its_example_or_a_call_leaves_out_is_named() -> None:
    model = model_of("T5", "ForConditionalGeneration", **T5_SIZES)
    example = {"encoder_outputs": (torch.zeros(2, 6, 16),), "decoder_input_ids": tokens(2)}
    with raises_saying(
        fd.errors.MatchError, "encoder.block.0.layer.0.SelfAttention", "did not go through", "exclude_modules"
    ):
        plain_prefix(model, example=example)
    delta, params = plain_prefix(model)
    with pytest.warns(UnreachedWarning, match=r"did not pass through encoder.block.0.layer.0.SelfAttention"):
        found = delta.apply(params, **example).logits
    decoder, _ = plain_prefix(model, "[r]decoder.+SelfAttention")
    assert_close(found, decoder.apply({name: params[name] for name in decoder.names}, **example).logits)
    with raises_saying(fd.errors.ConfigError, "attend gave keys (3, 5)", "expected (P, 24)", "4 heads of 6"):
        fd.DeltaModel(model, NarrowConfig(modified_modules=["SelfAttention"])).apply(
            {name: torch.zeros(3, 5) for name in [f"{site}.narrow.k" for site in delta.sites]},
            input_ids=tokens(2),
            decoder_input_ids=tokens(2),
        )
