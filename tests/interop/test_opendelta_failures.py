"""What goes wrong in OpenDelta, silently or loudly, and cannot happen here: one test a failure of its inventory.

The first line of each docstring is the failure; the names follow the numbers B1 to B31 and the rows of its own pages.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, assert_acts, assert_close, logits, low_rank, raises_saying, random_params
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration
from zoo import ZOO

import funcdelta as fd
from funcdelta.auto import MethodModel
from funcdelta.methods.config import METHODS

MODELS: list[type[MethodModel]] = [
    value for value in vars(fd).values() if inspect.isclass(value) and issubclass(value, MethodModel)
]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(model, **{"lora_r": 2, "modified_modules": list(names) or None} | fields)


def hugging(name: str) -> tuple[nn.Module, dict[str, Any]]:
    return ZOO[name].build(), ZOO[name].inputs(2)


def bert() -> nn.Module:
    """Wide enough for the defaults of every method."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=120, **sizes)).eval()


# --- B1 to B10: attaching, matching, freezing ------------------------------------------------------


def test_b01_attach_after_detach(x: Tensor) -> None:
    """A delta that was detached could never be attached again."""
    delta = lora(MLP().eval(), "a")
    params = random_params(delta)
    full = delta.attach(params)
    again = delta.attach({**delta.detach(full), **params})
    assert torch.equal(delta.apply(again, x), delta.apply(params, x))
    assert torch.equal(delta.apply(delta.detach(again), x), delta.backbone(x))


def test_b02_detaching_in_any_order(x: Tensor) -> None:
    """Two deltas on one module had to be detached in reverse order, or the next forward failed."""
    model = MLP().eval()
    delta = fd.DeltaModel(
        model,
        fd.LoraConfig(lora_r=2, modified_modules=["a"]),
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=["a"]),
    )
    params = random_params(delta)
    for kept in ("lora", "adapter"):
        some = {name: leaf for name, leaf in params.items() if f".{kept}." in name}
        alone = fd.DeltaModel(model, next(config for config in delta.configs if config.delta_type == kept))
        assert torch.equal(delta.apply(some, x), alone.apply(some, x))
    assert torch.equal(delta.apply({}, x), model(x))


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_b03_exclude_modules_of_every_method(kind: type[MethodModel]) -> None:
    """LoRA took exclude_modules and did not look at it."""
    model, first = bert(), "encoder.layer.0."
    every = {a.site.path for a in kind(model).plan.all()}
    if not any(path.startswith(first) for path in every):  # one site, not in a layer
        with raises_saying(fd.errors.MatchError, "exclude_modules", "the only site"):
            kind(model, exclude_modules=["embeddings", *every])
        return
    kept = {a.site.path for a in kind(model, exclude_modules=["encoder.layer.0"]).plan.all()}
    assert kept == {path for path in every if not path.startswith(first)} != set()


def test_b04_exclude_modules_with_the_methods_own_sites() -> None:
    """With exclude_modules given and modified_modules not, nothing was modified, without a word."""
    model, _ = hugging("bert")
    delta = lora(model, exclude_modules=["bert.encoder.layer.0"])
    assert set(delta.sites) == {site for site in lora(model).sites if "layer.1." in site}
    with raises_saying(fd.errors.MatchError, "'layer.0'", "bert.encoder.layer.0"):
        lora(model, exclude_modules=["layer.0"])


class NeedsExample(nn.Module):
    """A block whose width no weight tells, and dummy inputs that do not fit."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    dummy_inputs: Any = {"x": torch.zeros(2, 7)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_b05_nothing_fails_in_silence_while_shapes_are_found(x: Tensor) -> None:
    """Errors of the forward pass that creates layers were swallowed, and the delta then had no parameters."""
    with raises_saying(fd.errors.MatchError, "block", "dummy_inputs", "give example="):
        fd.AdapterModel(NeedsExample(), modified_modules=["block"])
    delta = fd.AdapterModel(NeedsExample(), bottleneck_dim=2, modified_modules=["block"], example=(x,))
    assert delta.shapes["block.adapter.down_proj.weight"] == (2, 6)
    half = ZOO["bert"].build().half()
    assert fd.AdapterModel(half).sites == fd.AdapterModel(ZOO["bert"].build()).sites
    # A site that returns a model output instead of a tuple.
    model, inputs = hugging("bert")
    whole = fd.AdapterModel(model, bottleneck_dim=2, modified_modules=["bert.encoder"], example=inputs)
    assert_acts(whole.apply(random_params(whole), **inputs).logits, model(**inputs).logits)


def test_b06_lora_on_a_fused_projection() -> None:
    """On GPT-2 a default LoRA added no parameter."""
    model, inputs = hugging("gpt2")
    delta = lora(model)
    assert len(delta.sites) == len(model.transformer.h)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    assert_acts(logits(delta.apply(random_params(delta), **inputs)), logits(model(**inputs)))


def test_b07_a_name_that_matches_nothing() -> None:
    """A misspelt name gave a delta without parameters, without a word, also beside one that matched."""
    for names in (["qurey"], ["query", "qurey"]):
        with raises_saying(fd.errors.MatchError, "'qurey'", "query"):
            lora(hugging("bert")[0], *names)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_b08_the_head_of_a_language_model_can_be_trained(name: str) -> None:
    """lm_head stood in the default exclude_modules, so it was never left trainable."""
    delta = lora(hugging(name)[0], unfrozen_modules=["deltas", "lm_head"])
    head = set(delta.plan.trained)
    assert len(head) == 1
    trainable, _ = delta.freeze_module(delta.attach(delta.init(0)))
    assert head <= set(trainable)


def test_b09_freezing_twice() -> None:
    """The second freeze_module raised."""
    delta = lora(MLP(), "a")
    full = delta.attach(delta.init(0))
    first, second = (delta.freeze_module(full, exclude=["deltas", "head"]) for _ in range(2))
    assert [part.keys() for part in first] == [part.keys() for part in second]
    assert not any(hasattr(delta.backbone, name) for name in ("_delta_infos", "delta_modules"))


def test_b10_the_delta_is_not_frozen_by_leaving_out_a_word() -> None:
    """Without the word deltas in the list, as in an example of the manual, the delta itself was frozen."""
    with raises_saying(fd.errors.ConfigError, "'deltas'", "unfrozen_modules=['deltas', 'head']"):
        lora(MLP(), "a", unfrozen_modules=["head"])


# --- B11 to B20: methods ---------------------------------------------------------------------------


def t5(**fields: Any) -> T5ForConditionalGeneration:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24, "num_layers": 2, "vocab_size": 40}
    return T5ForConditionalGeneration(T5Config(**{**sizes, "decoder_start_token_id": 0, **fields})).eval()


TOKENS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 3, 3, 4, 1]]),
    "decoder_input_ids": torch.tensor([[0, 4], [0, 4]]),
}


def test_b05_sites_that_are_called_with_keywords() -> None:
    """Parallel adapters on OPT, which passes hidden states as keywords, had no parameters, without a word."""
    model, inputs = hugging("opt")
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=2)
    assert {a.site.path.split(".")[3] for a in delta.plan.all()} == {"0", "1"}
    assert_acts(logits(delta.apply(random_params(delta), **inputs)), logits(model(**inputs)))


def test_b11_prefixes_on_t5_keep_the_position_bias() -> None:
    """With a prefix every T5 layer but the first lost its relative positions, without a word."""
    model = t5()
    with torch.no_grad():
        model.encoder.block[0].layer[0].SelfAttention.o.weight.zero_()  # positions act through the second layer alone
    delta = fd.PrefixModel(model, prefix_token_num=3, reparameterize=False)
    params, name = random_params(delta), "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    found = delta.apply(params, **TOKENS).encoder_last_hidden_state
    other = torch.randn_like(model.get_parameter(name))
    assert_acts(delta.apply({**params, name: other}, **TOKENS).encoder_last_hidden_state, found)


def test_b12_prefixes_where_heads_do_not_divide_the_width() -> None:
    """The size of a head was taken for width / heads, which fails on T5 v1.1 small."""
    model = t5(num_heads=3, d_kv=5, feed_forward_proj="gated-gelu")
    delta = fd.PrefixModel(model, prefix_token_num=3, reparameterize=False)
    assert set(delta.shapes.values()) == {(3, 15)}
    assert_acts(delta.apply(random_params(delta), **TOKENS).logits, model(**TOKENS).logits)


def test_b13_prefixes_on_distilbert() -> None:
    """Prefixes on DistilBERT always failed."""
    model, inputs = hugging("distilbert")
    delta = fd.PrefixModel(model, prefix_token_num=3, reparameterize=False)
    assert_acts(logits(delta.apply(random_params(delta), **inputs)), logits(model(**inputs)))


def test_b14_spans_are_paired_by_path() -> None:
    """On a gated T5 the second end of a parallel adapter was paired with the attention of the next layer."""
    delta = fd.ParallelAdapterModel(t5(feed_forward_proj="gated-gelu"), bottleneck_dim=2)
    spans = [(a.site.path, a.site.exit) for a in delta.plan.all() if a.site.exit is not None]
    assert len(spans) == 4
    for entry, end in spans:
        assert entry.rpartition(".")[0] == end.rpartition(".")[0]
        assert end.endswith(".wo")
    with raises_saying(fd.errors.ConfigError, "3 names", "pairs"):
        fd.ParallelAdapterModel(MLP(), modified_modules=["a", "b", "head"])


def test_b16_one_default_and_every_leaf_is_saved(tmp_path: Path) -> None:
    """Compacter's config and model had unlike defaults, and a rule that does not train was not saved."""
    model = nn.Sequential(nn.Linear(4, 64))
    made = fd.CompacterModel(model, modified_modules=["0"])
    read = fd.AutoDeltaConfig.from_dict({"delta_type": "compacter", "modified_modules": ["0"]})
    assert made.configs == (read,)
    delta = fd.CompacterModel(model, learn_phm=False, modified_modules=["0"])
    params = random_params(delta)
    delta.save_finetuned(params, tmp_path / "run")
    loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", model)[1]
    rules = [name for name in delta.constants if name.endswith("phm_rule")]
    assert rules
    assert all(torch.equal(loaded[name], params[name]) for name in rules)


def test_b18_the_scale_of_a_parallel_adapter(x: Tensor) -> None:
    """The field scaled existed and was always 1."""
    model = nn.Sequential(nn.Linear(4, 3))
    one, two = (fd.ParallelAdapterModel(model, modified_modules=["0"], scaled=s) for s in (1.0, 2.5))
    params, changes = random_params(one), []
    for delta in (one, two):
        changes.append(delta.apply(params | {name: delta.init(0)[name] for name in delta.constants}, x) - model(x))
    assert_acts(changes[0], torch.zeros(()))
    assert_close(changes[1], 2.5 * changes[0])


def test_b19_low_rank_adapters_of_any_rank(x: Tensor) -> None:
    """A rank above 1 failed at the first call, after a construction without parameters."""
    model = nn.Sequential(nn.Linear(4, 64))
    delta = fd.LowRankAdapterModel(model, low_rank_rank=3, non_linearity="relu", modified_modules=["0"])
    params = random_params(delta)
    p = {name.removeprefix("0.low_rank_adapter."): leaf for name, leaf in params.items()}

    def layer(value: Tensor, name: str) -> Tensor:
        return value @ (p[f"{name}.W_left"] @ p[f"{name}.W_right"]) + p[f"{name}.b"]

    h = model(x)
    assert_close(delta.apply(params, x), h + layer(layer(h, "down_sampler").relu(), "up_sampler"))


def test_b20_soft_prompts_leave_their_inputs_alone() -> None:
    """The caller's mask grew, positional inputs and None failed, and token 0 was taken for padding."""
    model, inputs = hugging("bert")
    delta = fd.SoftPromptModel(model, soft_token_num=3)
    params, before = random_params(delta), {name: value.clone() for name, value in inputs.items()}
    found = delta.apply(params, **inputs).logits
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert_close(delta.apply(params, inputs["input_ids"], inputs["attention_mask"]).logits, found)
    assert_close(delta.apply(params, **inputs, token_type_ids=None, position_ids=None).logits, found)
    ids = inputs["input_ids"].clone()
    ids[:, 1] = 0  # a token like any other where no mask says otherwise
    ones = torch.ones_like(ids)
    assert_close(delta.apply(params, ids).logits, delta.apply(params, ids, attention_mask=ones).logits)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_b20_soft_prompts_generate_and_take_labels(name: str) -> None:
    """On decoders generate failed or put the prompt before every new token, and labels had the wrong length."""
    model, inputs = hugging(name)
    delta = fd.SoftPromptModel(model, soft_token_num=3, strip=True)
    params, ids = random_params(delta), inputs["input_ids"][:1, :4]
    tokens = ids
    with torch.no_grad():
        for _ in range(3):  # one token after the other, each from the whole text
            tokens = torch.cat([tokens, delta.apply(params, tokens).logits[:, -1:].argmax(-1)], 1)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    found = delta.bind(params).generate(ids, **options, eos_token_id=None, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    assert torch.equal(found[:, :7], tokens)
    output = delta.apply(params, ids, labels=ids)
    by_hand = nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    assert_close(output.loss, by_hand)


# --- B15, B17, B21 to B25: methods, files, copies --------------------------------------------------


def test_b15_bitfit_on_t5() -> None:
    """BitFit put random float32 biases on the CPU into T5, and the norms' were created too late to be trained."""
    model, inputs = hugging("t5")
    delta = fd.BitFitModel(model)
    params = delta.init(0)
    assert all(not leaf.any() for leaf in params.values())
    assert_close(logits(delta.apply(params, **inputs)), logits(model(**inputs)), 1e-6)
    norms = [name for name in delta.names if "layer_norm" in name]
    assert norms
    leaves = {name: leaf.requires_grad_() for name, leaf in params.items()}
    logits(delta.apply(leaves, **inputs)).square().sum().backward()
    assert all(float(leaves[name].grad.abs().max()) > 0 for name in norms)  # pyright: ignore[reportOptionalMemberAccess]
    half = fd.BitFitModel(ZOO["t5"].build().bfloat16())
    site = next(iter(half.plan.attachments.values()))[0].site
    assert (site.dtype, site.leaf_dtype) == (torch.bfloat16, torch.float32)
    on_meta = fd.BitFitModel(ZOO["t5"].build().to("meta"))
    assert {leaf.device.type for leaf in on_meta.init(0).values()} == {"meta"}


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_b17_no_method_takes_a_backend_and_forgets_it(kind: type[MethodModel]) -> None:
    """Compacter took a backend and did not hand it on."""
    with raises_saying(fd.errors.ConfigError, "backend='bmt'", "leave out"):
        kind(bert(), backend="bmt")
    assert kind(bert(), backend="hf").names


def test_b21_the_hash_is_of_the_untouched_backbone(tmp_path: Path, x: Tensor) -> None:
    """Saving a bfloat16 model failed, and the hash was of the backbone with whatever stood and was trained in it."""
    model = MLP().eval()
    hashes = set()
    for i, delta in enumerate((lora(model, "a"), lora(model, "b"), fd.AdapterModel(model, modified_modules=["a"]))):
        delta.apply(random_params(delta), x)
        delta.save_finetuned(random_params(delta, seed=i), tmp_path / "run")
        hashes.add(fd.AutoDeltaConfig.from_finetuned(tmp_path / "run").backbone_hash)
    assert len(hashes) == 1
    half = MLP().bfloat16()
    delta = lora(half, "a")
    delta.save_finetuned(delta.init(0), tmp_path / "half")
    fd.AutoDeltaModel.from_finetuned(tmp_path / "half", backbone_model=half)
    with raises_saying(fd.errors.CheckpointError, "another backbone", "check_hash=False"):
        fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=half)


def test_b22_from_config_takes_a_dict_and_overriding_fields() -> None:
    """A dict failed, and fields and check_hash beside the config were ignored."""
    config = fd.LoraConfig(lora_r=8, modified_modules=["a"])
    for given in (config, config.to_dict()):
        delta = fd.AutoDeltaModel.from_config(given, backbone_model=MLP(), lora_r=2)
        assert delta.shapes["a.lora.lora_A"] == (2, 4)
    with raises_saying(fd.errors.CheckpointError, "another backbone"):
        fd.AutoDeltaModel.from_config(config.replace(backbone_hash="fd1:0"), MLP(), check_hash=True)


def test_b23_the_path_of_a_config_may_be_a_file(tmp_path: Path) -> None:
    """A path to a JSON file, which the manual allows, failed."""
    config = fd.LoraConfig(lora_r=3)
    assert fd.AutoDeltaConfig.from_finetuned(config.save_finetuned(tmp_path) / "config.json") == config


def test_b24_sharing_a_delta_needs_no_call_before(tmp_path: Path) -> None:
    """Uploading failed unless log() had been called."""
    delta = lora(MLP(), "a")
    with raises_saying(fd.errors.ConfigError, "push_to_dc", "push_to_hub"):
        delta.save_finetuned(delta.init(0), tmp_path / "run", push_to_dc=True)


def test_b25_copies_are_copies(x: Tensor) -> None:
    """A deep copy of the model went on calling the original's modules, and pickling failed."""
    model = MLP().eval()
    delta = lora(model, "a")
    params = random_params(delta)
    expected = delta.apply(params, x)
    other, view = copy.deepcopy(model), delta.bind(params)
    copied = copy.deepcopy(view)
    with torch.no_grad():
        for name, leaf in view.named_parameters():
            if name in delta.names:
                leaf.zero_()
        fresh = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(other(x), fresh(x))
    assert pickle.loads(pickle.dumps(other))(x).equal(other(x))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(2)
    assert torch.equal(copied(x), expected)
    travelled = pickle.loads(pickle.dumps(delta))
    assert torch.equal(travelled.apply(pickle.loads(pickle.dumps(params)), x), expected)


def test_b26_a_names_prefix_ends_at_a_dot() -> None:
    """Common names took bert_extra for bert, and excluding layer.1 excluded layer.10."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = hugging("bert")[0].bert
            self.bert_extra = nn.ModuleDict({"query": nn.Linear(4, 4)})

    assert lora(Wrapped()).sites == tuple(site for site in lora(hugging("bert")[0]).sites)
    from handmade import Layers

    assert "layer.10" in lora(Layers(), "[r]layer\\.\\d+", exclude_modules=["layer.1"]).sites


def test_b27_the_third_of_a_kind_keeps_its_name() -> None:
    """The third delta of a kind at a module was called low_2 instead of low_rank_adapter_2."""
    kind = METHODS["test_failures_long_name"]
    delta = fd.DeltaModel(MLP(), *(kind(modified_modules=["a"]) for _ in range(4)))
    stem = "a.test_failures_long_name"
    assert [name.rpartition(".")[0] for name in delta.names] == [stem, *(f"{stem}_{i}" for i in (1, 2, 3))]


@fd.register("test_failures_long_name")
@dataclasses.dataclass(frozen=True)
class LongNameConfig(fd.BaseDeltaConfig):
    """y + b."""

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"b": torch.zeros(site.width)}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["b"]


def test_b28_loading_accounts_for_every_key(tmp_path: Path) -> None:
    """Missing and unexpected keys of a checkpoint were passed over."""
    delta = lora(MLP(), "a", "b")
    delta.save_finetuned(delta.init(0), tmp_path / "run")
    state = load_file(tmp_path / "run" / "delta.safetensors")
    renamed = {name.replace("b.lora", "c.lora"): leaf for name, leaf in state.items()}
    with raises_saying(
        fd.errors.CheckpointError, "3 missing: b.lora.lora_A", "3 not known to the delta: c.lora.lora_A"
    ):
        fd.AutoDeltaModel.from_finetuned(tmp_path / "run", delta.backbone, state_dict=renamed)


def test_b29_saving_stores_the_delta_alone(tmp_path: Path) -> None:
    """Without freezing first the whole model was saved."""
    delta = lora(MLP(), "a", unfrozen_modules=["deltas", "head"])
    assert all(parameter.requires_grad for parameter in delta.backbone.parameters())
    delta.save_finetuned(delta.init(0), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "delta.safetensors")
    assert (
        set(saved)
        == set(delta.names)
        == {
            *(f"a.lora.{leaf}" for leaf in ("lora_A", "lora_B", "scale")),
            "head.weight",
            "head.bias",
        }
    )


def test_b30_nothing_is_marked_on_the_backbone(x: Tensor, tmp_path: Path) -> None:
    """Parameters once marked as a delta stayed so: no delta could be frozen or saved without all others."""
    model = MLP().eval()
    before = snapshot(model)
    first, second = fd.BitFitModel(model, modified_modules=["a"]), lora(model, "a")
    for delta in (first, second):
        view = delta.bind(random_params(delta))
        view(x).sum().backward()
        delta.save_finetuned(fd.unbind(view), tmp_path / delta.delta_type)
    assert_unchanged(model, before)
    assert not any(vars(parameter) for parameter in model.parameters())
    assert set(load_file(tmp_path / "lora" / "delta.safetensors")) == set(second.names)
    trainable, _ = second.freeze_module(second.attach(second.init(0)) | first.init(0))
    assert set(trainable) == {"a.lora.lora_A", "a.lora.lora_B"}


def test_b31_any_signature_needs_no_made_up_inputs() -> None:
    """Plain networks were run on made-up token numbers, so that others than input_ids failed."""

    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, left: Tensor, *, right: Tensor) -> Tensor:
            return self.layer(left + right)

    model, state = TwoInputs(), torch.get_rng_state()
    delta = fd.AdapterModel(model, modified_modules=["layer"])
    assert torch.equal(state, torch.get_rng_state())
    left, right = torch.randn(2, 3, 4)
    assert_acts(delta.apply(random_params(delta), left, right=right), model(left, right=right))


# --- what the page of the base classes says, and what happened -------------------------------------


def test_page_names_are_whole_tokens() -> None:
    """Examples of the page are for other arguments than it says; names end a path, token by token."""
    key = "transformer.layer.10.attention.out_lin"
    assert [fd.find_key(key, [name]) for name in ("out_lin", "attention.out_lin", "lin", "0.attention.out_lin")] == [
        True,
        True,
        False,
        False,
    ]
    assert not fd.find_key(key, ["attention"])


def test_page_what_is_unfrozen_trains(x: Tensor) -> None:
    """Names of parameters had no effect at modules that carry a delta, nor raw names beside common ones."""
    delta = lora(MLP(), "a", unfrozen_modules=["deltas", "bias"])
    assert {name for name in delta.names if "lora" not in name} == {"a.bias", "b.bias", "head.bias"}
    params = {name: leaf.requires_grad_() for name, leaf in delta.init(0).items()}
    delta.apply(params, x).sum().backward()
    assert params["a.bias"].grad is not None
    for names in (["LayerNorm"], ["layer_norm@"]):
        encoder = lora(hugging("bert")[0], unfrozen_modules=["deltas", *names])
        assert "bert.encoder.layer.1.output.LayerNorm.weight" in encoder.names
    with raises_saying(fd.errors.MatchError, "'LayrNorm'", "LayerNorm"):
        lora(hugging("bert")[0], unfrozen_modules=["deltas", "LayrNorm"])


def test_page_a_name_of_its_own_at_every_site() -> None:
    """A name for the delta's root was documented, and there was no such argument."""
    assert lora(MLP(), "a", name="slow").names[0] == "a.slow.lora_A"


def test_page_a_modified_module_may_be_modified_again(x: Tensor) -> None:
    """The page says that a modified module cannot be modified again; it depended on what was there."""
    model = MLP().eval()
    delta = fd.DeltaModel(model, *(fd.LoraConfig(lora_r=2, modified_modules=["a"]) for _ in range(2)))
    params = random_params(delta)
    change = sum(x @ low_rank(params, f"a.{name}").T for name in ("lora", "lora_1"))
    assert_close(delta.apply(params, x), model.head(torch.tanh(model.b(torch.tanh(model.a(x) + change)))))


def test_page_arguments_that_never_were() -> None:
    """The page lists a prefix for freeze_module and others that no method took."""
    delta = lora(MLP(), "a")
    with pytest.raises(TypeError, match="prefix"):
        delta.freeze_module(delta.attach(delta.init(0)), prefix="a")  # pyright: ignore[reportCallIssue]
    with raises_saying(fd.errors.ConfigError, "registraction_name"):
        lora(MLP(), "a", registraction_name="deltas")
