"""Methods around an attention, against hooks on the model's own modules and attention written out by hand."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from backbone_snapshot import assert_unchanged, snapshot
from custom_methods import LlamaAdapterConfig
from handmade import assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface
from zoo import ZOO, padding, tokens
from zoo_architecture import randomise
from zoo_transformers import BERT_SIZES, GPT_SIZES, LLAMA_SIZES

import funcdelta as fd

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
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", WIDE),
    "mistral": ("Mistral", "ForCausalLM", {**WIDE, "sliding_window": 3}),
    "gpt2": ("GPT2", "LMHeadModel", {**GPT_SIZES, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
    "bert": ("Bert", "ForSequenceClassification", BERT_SIZES),
    "t5": ("T5", "ForConditionalGeneration", T5_SIZES),
}
every = pytest.mark.parametrize("name", MODELS)
Params = dict[str, Tensor]


def model_of(name: str, implementation: str = "sdpa") -> Any:
    family, kind, sizes = MODELS[name]
    model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**sizes))
    model.set_attn_implementation(implementation)
    return randomise(model, seed=0).eval()


def inputs_of(name: str, rows: int = 3) -> dict[str, Any]:
    given = {"input_ids": tokens(rows), "attention_mask": padding(rows)}
    return given | ({"decoder_input_ids": tokens(rows, seed=1)} if name == "t5" else {})


@dataclass(frozen=True)
class TwiceConfig(fd.BaseDeltaConfig):
    """``run(q, k, v) + g run(s q, k, t v)``: the model's attention, and once more of other queries and values."""

    default_name = "twice"
    default_modified_modules = ("attn@",)

    def init(self, site: fd.Site, rng: torch.Generator) -> Params:
        heads = site.attention.heads
        return {"g": torch.zeros(()), "s": torch.ones(site.attention.query_heads), "t": torch.ones(heads)}

    def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
        s, t = p["s"].view(-1, 1, 1), p["t"].view(-1, 1, 1)
        return run(q, k, v) + p["g"] * run(s * q, k, t * v)


@dataclass(frozen=True)
class InTurnConfig(TwiceConfig):
    """``run(q, k, v + g run(s q, k, t v))`` where there is a query for every key: what is run depends on a run."""

    default_name = "in_turn"

    def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
        inner = run(p["s"].view(-1, 1, 1) * q, k, p["t"].view(-1, 1, 1) * v)
        return run(q, k, v + p["g"] * inner)


# -- written by hand -----------------------------------------------------------------------------------------------


def heads(rows: Tensor, size: int) -> Tensor:
    return rows.unflatten(-1, (-1, size)).transpose(-2, -3)


def prompt_attention(query: Tensor, keys: Tensor, values: Tensor, gate: Tensor) -> Tensor:
    """(rows, tokens, heads · size); query (rows, heads, tokens, size), keys and values (fewer heads, P, size)."""
    found = []
    for head in range(query.shape[1]):
        few = head // (query.shape[1] // keys.shape[0])
        scores = query[:, head] @ keys[few].T / math.sqrt(query.shape[-1])
        found.append(gate[head] * scores.softmax(-1) @ values[few])
    return torch.cat(found, -1)


def added_by_hand(name: str, module: Any, p: Params, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """What LLaMA-Adapter adds to the output of an attention module of the model called ``name``."""
    if name in ("llama", "mistral"):
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = (heads(layer(x), 8) for layer in (module.q_proj, module.k_proj))
        q, _ = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        rows = module.k_proj(p["prompt"]), module.v_proj(p["prompt"])
        return module.o_proj(prompt_attention(q, *(heads(one, 8) for one in rows), p["gate"]))
    if name == "gpt2":
        q = heads(module.c_attn(x)[..., :16], 8)
        made = prompt_attention(q, heads(p["keys"], 8), heads(p["values"], 8), p["gate"])
        return made @ module.c_proj.weight
    if name == "bert":
        rows = module.key(p["prompt"]), module.value(p["prompt"])
        return prompt_attention(heads(module.query(x), 8), *(heads(one, 8) for one in rows), p["gate"])
    rows = module.k(p["prompt"]), module.v(p["prompt"])
    return module.o(prompt_attention(heads(module.q(x), 6), *(heads(one, 6) for one in rows), p["gate"]))


@contextlib.contextmanager
def hooked(name: str, model: nn.Module, sites: tuple[str, ...], params: Params) -> Iterator[None]:
    """The model as LLaMA-Adapter changes it for one member, by hooks on its attention modules."""

    def hook(site: str) -> Any:
        start = f"{site}.test_llama_adapter."
        p = {key.removeprefix(start): leaf for key, leaf in params.items() if key.startswith(start)}

        def act(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return (output[0] + added_by_hand(name, module, p, x, kwargs), *output[1:])

        return act

    handles = [model.get_submodule(s).register_forward_hook(hook(s), with_kwargs=True) for s in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def everywhere(model: Any) -> tuple[str, ...]:
    """Names of all attention modules, those that see an encoder among them."""
    return ("SelfAttention", "EncDecAttention") if model.config.model_type == "t5" else ("attn@",)


def adapter(model: nn.Module, **fields: Any) -> fd.DeltaModel:
    return fd.DeltaModel(model, LlamaAdapterConfig(modified_modules=everywhere(model), **fields))


@every
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_llama_adapter_equals_hooks_in_every_engine(name: str, implementation: str) -> None:
    model, inputs = model_of(name, implementation), inputs_of(name)
    delta = adapter(model)
    assert len(delta.sites) == (6 if name == "t5" else 2)
    stack = random_params(delta, 3)
    expected = []
    for i in range(3):
        with hooked(name, model, delta.sites, fd.take(stack, i)):
            expected.append(model(**inputs).logits)
    bare = model(**inputs).logits
    assert_acts(expected[0], bare)
    for engine in ("loop", "vmap", "fold"):
        assert_close(delta.apply_many(stack, **inputs, engine=engine).logits, torch.stack(expected))
    rows = delta.apply_rows(stack, [2, -1, 0], **inputs).logits
    assert_close(rows, torch.stack([expected[2][0], bare[1], expected[0][2]]))
    assert_close(delta.bind(fd.take(stack, 1))(**inputs).logits, expected[1])
    assert_close(delta.apply(delta.init(0), **inputs).logits, bare, 1e-6)


@every
def test_gradients_of_a_fold_are_those_of_hooks(name: str) -> None:
    model, inputs = model_of(name), inputs_of(name)
    delta = adapter(model)
    stack = random_params(delta, 2)
    many = functools.partial(delta.apply_many, engine="fold")
    _, grads = fd.value_and_grad(lambda p: many(p, **inputs).logits.square().flatten(1).sum(1))(stack)
    for i in range(2):
        alone = {key: leaf.clone().requires_grad_() for key, leaf in fd.take(stack, i).items()}
        with hooked(name, model, delta.sites, alone):
            found = torch.autograd.grad(model(**inputs).logits.square().sum(), list(alone.values()))
        for key, grad in zip(alone, found, strict=True):
            assert_close(grads[key][i], grad, 1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_peft_gives_the_same() -> None:
    from peft import AdaptionPromptConfig, get_peft_model

    def model() -> Any:  # PEFT takes heads to be as wide as the model
        return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_SIZES)), seed=0).eval()

    delta = adapter(model())
    params, ids = random_params(delta), tokens(3)
    config = AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(model(), config)
    for site in delta.sites:
        module = theirs.base_model.model.get_submodule(site)
        with torch.no_grad():
            gate = params[f"{site}.test_llama_adapter.gate"]  # one for all heads, as PEFT has it
            gate.fill_(float(gate[0]))
            module.adaption_gate.fill_(float(gate[0]))
            module.adaption_prompt.copy_(params[f"{site}.test_llama_adapter.prompt"])
    found = delta.apply(params, ids).logits
    assert_acts(found, delta.apply({}, ids).logits)
    assert_close(found, theirs(ids).logits)


# -- other queries, keys and values --------------------------------------------------------------------------------


def plain_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> Tensor:
    """(rows, heads, queries, size), with an additive mask and a position bias."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (module.scaling if scaling is None else scaling)
    for more in (mask, kwargs.get("position_bias")):
        scores = scores if more is None else scores + more
    return scores.softmax(-1) @ v


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> str:
    """An attention function of Transformers that does what ``TwiceConfig`` says, with leaves from ``module.hand``."""

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        run = functools.partial(
            plain_attention, module, mask=mask, **{key: kwargs.get(key) for key in ("scaling", "position_bias")}
        )
        p = module.hand
        changed = run(q * p["s"].view(-1, 1, 1), k, v * p["t"].view(-1, 1, 1))
        if p["kind"] == "twice":
            return (run(q, k, v) + p["g"] * changed).transpose(1, 2), None
        return run(q, k, v + p["g"] * changed).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "test_hand", attention)
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, "test_hand", masks["eager"])
    return "test_hand"


def expected_by_hand(name: str, sites: tuple[str, ...], stack: Params, kind: str, inputs: Any) -> Tensor:
    model = model_of(name, "test_hand")
    found = []
    for i in range(fd.members(stack)):
        for site in sites:
            leaves = {leaf: stack[f"{site}.{kind}.{leaf}"][i] for leaf in "gst"}
            model.get_submodule(site).hand = {**leaves, "kind": kind}
        found.append(model(**inputs).logits)
    return torch.stack(found)


CHANGING: list[tuple[str, type[TwiceConfig]]] = [
    *((name, TwiceConfig) for name in MODELS),
    ("bert", InTurnConfig),
    ("gpt2", InTurnConfig),
]


@pytest.mark.parametrize(("name", "method"), CHANGING)
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_the_models_attention_of_other_queries_and_values(
    by_hand: str, name: str, method: type[TwiceConfig], masked: bool
) -> None:
    inputs = inputs_of(name)
    if not masked:
        del inputs["attention_mask"]
    for implementation in ("sdpa", "eager"):
        model = model_of(name, implementation)
        delta = fd.DeltaModel(model, method(modified_modules=everywhere(model)))
        stack = random_params(delta, 3)
        expected = expected_by_hand(name, delta.sites, stack, method.default_name or "", inputs)
        assert_acts(expected[0], delta.apply({}, **inputs).logits)
        for engine in ("loop", "vmap", "fold"):
            assert_close(delta.apply_many(stack, **inputs, engine=engine).logits, expected)
        rows = delta.apply_rows(stack, [2, -1, 0], **inputs).logits
        assert_close(rows[0], expected[2, 0])
        assert_close(rows[1], delta.apply({}, **inputs).logits[1])


@pytest.mark.parametrize(("name", "method"), [("llama", TwiceConfig), ("t5", TwiceConfig), ("bert", InTurnConfig)])
def test_compiled_calls_are_the_same(name: str, method: type[TwiceConfig]) -> None:
    inputs = inputs_of(name)
    for config in (method(), LlamaAdapterConfig(modified_modules=["attn@"])):
        torch._dynamo.reset()
        delta = fd.DeltaModel(model_of(name), config)
        stack, many = random_params(delta, 2), functools.partial(delta.apply_many, engine="fold")

        def loss(p: Params, call: Any = many) -> Tensor:
            return call(p, **inputs).logits.square().flatten(1).sum(1)

        expected, grads = fd.value_and_grad(loss)(stack)
        found, compiled = torch.compile(fd.value_and_grad(loss), backend="aot_eager")(stack)
        assert_close(found, expected, 1e-4)
        for key, grad in grads.items():
            assert_close(compiled[key], grad, 1e-4)
        one = torch.compile(lambda p, d=delta: d.apply(p, **inputs).logits, backend="eager")
        assert_close(one(fd.take(stack, 1)), delta.apply(fd.take(stack, 1), **inputs).logits)


def test_derivatives_of_every_order() -> None:
    inputs = inputs_of("bert")
    for config in (TwiceConfig(), LlamaAdapterConfig(modified_modules=["attn@"])):
        delta = fd.DeltaModel(model_of("bert").double(), config)
        stack = {name: leaf.double() for name, leaf in random_params(delta, 2).items()}
        direction = fd.tree.randn_like(stack, 0)

        def gradients(engine: str, p: Params, delta: fd.DeltaModel = delta) -> Params:
            many = functools.partial(delta.apply_many, engine=engine)
            return torch.func.grad(lambda p: many(p, **inputs).logits.square().sum())(p)

        alone = torch.func.jvp(functools.partial(gradients, "loop"), (stack,), (direction,))
        found = torch.func.jvp(functools.partial(gradients, "fold"), (stack,), (direction,))
        for ours, theirs in zip(found, alone, strict=True):
            for name, leaf in theirs.items():
                assert_close(ours[name], leaf, 1e-8)


# -- generation, precision, checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "t5"])
@torch.no_grad()
def test_generation_with_a_cache_equals_a_loop_without(name: str) -> None:
    model = model_of(name)
    before = snapshot(model)
    for config in (TwiceConfig(), LlamaAdapterConfig(modified_modules=["attn@"])):
        delta = fd.DeltaModel(model, config)
        params = random_params(delta)
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
        assert torch.equal(view.generate(**prompt, **options), found)
        beams = view.generate(**prompt, **options, num_beams=3)
        assert torch.equal(beams, view.generate(**prompt, **options, num_beams=3, use_cache=False))
    assert_unchanged(model, before)


def test_a_row_padded_in_front_is_what_it_is_alone() -> None:
    """The prompt's keys have no position, so that a query's own position decides how they are seen."""
    for name in ("llama", "gpt2"):
        delta = adapter(model_of(name))
        params, ids = random_params(delta), tokens(2)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        together = delta.apply(params, input_ids=ids, attention_mask=mask).logits
        assert_close(together[:1, 2:], delta.apply(params, input_ids=ids[:1, 2:]).logits)


@torch.no_grad()
def test_half_precision_is_raised_for_the_method_alone() -> None:
    seen: list[torch.dtype] = []

    class Looks(TwiceConfig):
        def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
            seen.extend((q.dtype, run(q * p["g"], k, v).dtype))
            return super().around(site, p, q, k, v, run)

    for implementation in ("sdpa", "eager"):
        delta = fd.DeltaModel(model_of("llama", implementation).to(torch.bfloat16), Looks())
        exact = fd.DeltaModel(model_of("llama", implementation), Looks())
        stack = random_params(exact, 2)
        for engine in ("loop", "fold"):
            out = delta.apply_many(stack, **inputs_of("llama"), engine=engine).logits
            assert out.dtype == torch.bfloat16
            assert_close(out.float(), exact.apply_many(stack, **inputs_of("llama"), engine=engine).logits, 0.05)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_of_a_view_have_the_same_gradients(reentrant: bool) -> None:
    model: Any = ZOO["llama"].build().train()
    inputs = {"input_ids": tokens(2), "labels": tokens(2)}
    for config in (TwiceConfig(), LlamaAdapterConfig(modified_modules=["attn@"])):
        delta = fd.DeltaModel(model, config)
        params = random_params(delta)
        expected = torch.func.grad(lambda p, d=delta: d.apply(p, **inputs).loss)(params)
        view: Any = delta.bind(params)
        for layer in view.model.layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=reentrant)
        view.enable_input_require_grads()
        view(**inputs).loss.backward()
        for name, parameter in view.named_parameters():
            if name in expected:
                assert_close(parameter.grad, expected[name])


def test_a_checkpointed_fold_has_the_same_gradients() -> None:
    model: Any = model_of("llama").train()
    inputs = {"input_ids": tokens(2)}
    for config in (TwiceConfig(), LlamaAdapterConfig(modified_modules=["attn@"])):
        delta = fd.DeltaModel(model, config)
        stack = random_params(delta, 2)

        def gradients(delta: fd.DeltaModel, stack: Params = stack) -> list[Tensor]:
            leaves = {name: leaf.clone().requires_grad_() for name, leaf in stack.items()}
            out = delta.apply_many(leaves, **inputs, engine="fold").logits
            return list(torch.autograd.grad(out.square().sum(), list(leaves.values())))

        expected = gradients(delta)
        checkpointing: Any = model_of("llama").train()
        checkpointing.activation_checkpointing_enable({"use_reentrant": False})
        for ours, theirs in zip(gradients(fd.DeltaModel(checkpointing, config)), expected, strict=True):
            assert_close(ours, theirs, 1e-4)


def test_the_models_dropout_is_drawn_once_for_what_was_given() -> None:
    class Same(TwiceConfig):
        """Nothing, if the model's attention is the same both times."""

        def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
            return p["g"] * (run(q, k, v) - run(q, k, v))

    class Nothing(TwiceConfig):
        def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
            return torch.zeros_like(q)

    model = ZOO["bert"].build().train()
    for module in model.modules():  # of the attention alone
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    for engine in ("loop", "fold"):  # torch cannot map the dropout of scores that no member has changed
        outs = []
        for method in (Same(name="one"), Nothing(name="one")):
            delta = fd.DeltaModel(model, method).mode(train=True)
            outs.append(delta.apply_many(delta.init(0, n=2), **inputs_of("bert"), engine=engine).logits)
        assert_close(*outs)


# -- an attention of the user's own choice -------------------------------------------------------------------------


@torch.no_grad()
def test_a_kernel_that_torch_cannot_map_runs_on_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the manner of flash attention: a mask (rows, length) or none, and no rule for ``vmap``."""
    rows: list[int] = []

    def flash(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> Any:
        for one in (q, k, v):
            assert not torch._C._functorch.is_functorch_wrapped_tensor(one)
        rows.append(q.shape[0])
        groups, length = q.shape[1] // k.shape[1], k.shape[2]
        k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        seen = torch.ones(q.shape[2], length, dtype=torch.bool).tril(length - q.shape[2])
        seen = seen if mask is None else seen & mask.bool().view(-1, 1, 1, length)
        scores = (q @ k.mT * module.scaling).masked_fill(~seen, -1e9)
        return (scores.softmax(-1) @ v).transpose(1, 2), None

    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(AttentionInterface._global_mapping, "test_kernel", flash)
    monkeypatch.setitem(masks, "test_kernel", masks["flash_attention_2"])
    for config in (TwiceConfig(), LlamaAdapterConfig(modified_modules=["attn@"])):
        delta, other = (fd.DeltaModel(model_of("llama", kind), config) for kind in ("sdpa", "test_kernel"))
        stack = random_params(delta, 3)
        for extra in ({}, {"attention_mask": padding(3)}):
            inputs = {"input_ids": tokens(3), **extra}
            real = extra.get("attention_mask", torch.ones(3, 6)).bool()
            expected = delta.apply_many(stack, **inputs).logits
            other.apply_many(stack, **inputs, engine="fold")
            rows.clear()
            found = other.apply_many(stack, **inputs, engine="fold").logits
            assert set(rows) == {9}
            assert_close(found[:, real], expected[:, real])


# -- with others ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_several_wrap_each_other_and_see_prefixes(by_hand: str) -> None:
    model, inputs = model_of("bert"), inputs_of("bert")
    prefix = fd.PrefixConfig(prefix_token_num=2, reparameterize=False)
    one, two = LlamaAdapterConfig(modified_modules=["attn@"]), TwiceConfig()
    beside = fd.DeltaModel(model, one, two, prefix, fd.LoraConfig(modified_modules=["query"], lora_r=2))
    stack = random_params(beside, 3)
    each = torch.stack([beside.apply(fd.take(stack, i), **inputs).logits for i in range(3)])
    for engine in ("vmap", "fold"):
        assert_close(beside.apply_many(stack, **inputs, engine=engine).logits, each)
    # Keys in front are seen by what is wrapped, whatever was given first.
    first = fd.DeltaModel(model, prefix, one, two, fd.LoraConfig(modified_modules=["query"], lora_r=2))
    assert_close(first.apply_many(stack, **inputs).logits, each)
    other = fd.DeltaModel(model, two, one, prefix, fd.LoraConfig(modified_modules=["query"], lora_r=2))
    assert_acts(other.apply_many(stack, **inputs).logits, each)
    # One after another is what a chain does.
    pair = fd.DeltaModel(model, one, two)
    chained = fd.DeltaModel(model, fd.chain(one, two.replace(modified_modules=["attn@"])))
    wrapped = {name: leaf for name, leaf in stack.items() if ".lora." not in name and ".prefix." not in name}
    renamed = {name.replace(".self.", ".self.chain."): leaf for name, leaf in wrapped.items()}
    assert_close(chained.apply_many(renamed, **inputs).logits, pair.apply_many(wrapped, **inputs).logits)


SUMS = {
    "parallel": lambda *parts: fd.parallel(*parts),
    "average": lambda *parts: fd.average(*parts, shares=(0.7, 0.4)),
    "mixture": lambda *parts: fd.mixture(*parts, gate="call"),
    "nested": lambda *parts: fd.chain(fd.parallel(*parts), LlamaAdapterConfig(name="third")),
}


@pytest.mark.parametrize("kind", SUMS)
@torch.no_grad()
def test_sums_of_wrappers(kind: str, tmp_path: Any) -> None:
    model, inputs = model_of("llama"), inputs_of("llama")
    parts = (
        LlamaAdapterConfig(modified_modules=["attn@"]),
        LlamaAdapterConfig(modified_modules=["attn@"], prompt_rows=2),
    )
    delta = fd.DeltaModel(model, SUMS[kind](*parts))
    stack = random_params(delta, 3)
    each = torch.stack([delta.apply(fd.take(stack, i), **inputs).logits for i in range(3)])
    for engine in ("vmap", "fold"):
        assert_close(delta.apply_many(stack, **inputs, engine=engine).logits, each)
    if kind != "nested":
        # What LLaMA-Adapter adds does not depend on what is wrapped, so that shares are gates.
        both = fd.DeltaModel(model, parts[0].replace(name="a"), parts[1].replace(name="b"))
        params = fd.take(stack, 1)
        moved: Params = {}
        for site in delta.sites:
            start = f"{site}.{kind}"
            shares = torch.ones(2)
            shares = params.get(f"{start}.shares", shares)
            shares = params[f"{start}.gate.bias"].softmax(-1) if kind == "mixture" else shares
            for i, (old, new) in enumerate((("test_llama_adapter", "a"), ("test_llama_adapter_1", "b"))):
                moved[f"{site}.{new}.prompt"] = params[f"{start}.{old}.prompt"]
                moved[f"{site}.{new}.gate"] = params[f"{start}.{old}.gate"] * shares[i]
        assert_close(both.apply(moved, **inputs).logits, each[1])
    again, loaded = fd.AutoDeltaModel.from_finetuned(delta.save_finetuned(stack, tmp_path / "saved"), model)
    assert_close(again.apply_many(loaded, **inputs).logits, each)


@torch.no_grad()
def test_unlike_members_in_one_stack() -> None:
    model, inputs = model_of("llama"), inputs_of("llama")
    made = []
    for config in (
        LlamaAdapterConfig(modified_modules=["attn@"]),
        LlamaAdapterConfig(modified_modules=["layers.1.self_attn"]),
        LlamaAdapterConfig(modified_modules=["layers.0.self_attn"]),
        TwiceConfig(),
    ):
        delta = fd.DeltaModel(model, config)
        made.append((delta, random_params(delta, seed=len(made))))
    expected = torch.stack([delta.apply(params, **inputs).logits for delta, params in made])
    packed, stack = fd.pack(made)
    for engine in ("loop", "vmap", "fold"):
        assert_close(packed.apply_many(stack, **inputs, engine=engine).logits, expected)
    rows = packed.apply_rows(stack, [3, 1, -1], **inputs).logits
    bare = made[0][0].apply({}, **inputs).logits
    assert_close(rows, torch.stack([expected[3, 0], expected[1, 1], bare[2]]))


# -- refusals ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    model = model_of("llama")
    delta = adapter(model)
    with raises_saying(fd.errors.MergeError, "model.layers.0.self_attn cannot be merged", "wraps the attention"):
        delta.merge(delta.init(0))
    with raises_saying(fd.errors.MatchError, "test_llama_adapter cannot act at", "attention interface"):
        fd.DeltaModel(ZOO["bloom"].build(), LlamaAdapterConfig(modified_modules=["self_attention"]))
    with raises_saying(fd.errors.MatchError, "q_proj", "Linear neither is nor holds an attention"):
        fd.DeltaModel(model, LlamaAdapterConfig(modified_modules=["q_proj"]))
    with raises_saying(fd.errors.MatchError, "its part test_llama_adapter wraps attention", 'gate="call"'):
        fd.DeltaModel(model, fd.mixture(LlamaAdapterConfig(modified_modules=["attn@"]), LlamaAdapterConfig()))
    with raises_saying(fd.errors.MatchError, "reads model.layers.0.self_attn.k_proj.weight", "unfrozen_modules"):
        adapter(model, unfrozen_modules=["deltas", "k_proj"])


def test_a_method_that_reads_below_its_site_reads_what_no_other_rewrites() -> None:
    from custom_methods import RowScaleConfig

    wrapper = LlamaAdapterConfig(modified_modules=["attn@"])
    with raises_saying(fd.errors.MatchError, "reads model.layers.0.self_attn.v_proj.weight", "test_rows rewrites"):
        fd.DeltaModel(model_of("llama"), wrapper, RowScaleConfig(modified_modules=["v_proj"]))


@pytest.mark.parametrize("many", [False, True])
def test_shapes_are_checked(many: bool) -> None:
    class Longer(TwiceConfig):
        def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
            return run(q, torch.cat([k, k], -2), torch.cat([v, v], -2))

    class Flat(TwiceConfig):
        def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
            return run(q, k, v).transpose(1, 2).flatten(2)

    class InPlace(TwiceConfig):
        def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
            return run(q.mul_(2), k, v)

    for method, pieces in (
        (Longer, ("run(q, k, v)", "expected those that the method was given", "attend(site, p)")),
        (Flat, ("Flat.around gave", "at bert.encoder.layer.0.attention.self", "value size")),
        (InPlace, ("changed a hidden value in place",)),
    ):
        delta = fd.DeltaModel(model_of("bert"), method())
        with raises_saying(fd.errors.ConfigError, *pieces):
            if many:
                delta.apply_many(delta.init(0, n=2), **inputs_of("bert"), engine="fold")
            else:
                delta.apply(delta.init(0), **inputs_of("bert"))


@dataclass(frozen=True)
class WritesConfig(fd.BaseDeltaConfig):
    """Writes into what the model's attention gave, and asks for it again."""

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"gain": torch.ones(())}

    def around(self, site: fd.Site, p: Params, q: Tensor, k: Tensor, v: Tensor, run: Any) -> Tensor:
        y = run(q, k, v)
        y.mul_(3.0)
        return p["gain"] * y - 2 * run(q, k, v)


@pytest.mark.parametrize("many", [False, True])
def test_what_run_gave_is_not_written(many: bool) -> None:
    model = model_of("llama")
    delta = fd.DeltaModel(model, WritesConfig(modified_modules=everywhere(model)))
    call = functools.partial(delta.apply_many, delta.init(0, n=2), engine="fold") if many else None
    call = call or functools.partial(delta.apply, delta.init(0))
    with torch.no_grad(), pytest.raises(fd.errors.ConfigError, match="changed in place"):
        call(**inputs_of("llama"))
