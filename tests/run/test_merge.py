"""Merging writes a delta into weight space exactly, into new tensors, or says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, Tied, Twice, assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd
from funcdelta.merge import merge, merged


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def assert_merges(delta: fd.DeltaModel, params: dict[str, Tensor], *args: Any, **options: Any) -> None:
    """The merged weights in the plain backbone, by every road, are the delta; the backbone stays as it was."""
    before = snapshot(delta.backbone)
    expected = delta.apply(params, *args)
    assert_acts(expected, delta.backbone(*args))
    state = delta.merge(params, **options)
    assert set(state) >= set(delta.backbone.state_dict())
    # A module under two names has one slot: torch would put the swapped tensor back into it.
    slots = {
        f"{path}.{own}".lstrip(".")
        for path, m in delta.backbone.named_modules()
        for own in (*m._parameters, *m._buffers)
    }
    given = {name: tensor for name, tensor in state.items() if name in slots}
    assert_close(torch.func.functional_call(delta.backbone, given, args, tie_weights=False), expected)
    merged = delta.merged(params, **options)
    assert type(merged) is type(delta.backbone)
    assert_close(merged(*args), expected)
    own = {parameter.data_ptr() for parameter in delta.backbone.parameters()}
    assert not own & {parameter.data_ptr() for parameter in merged.parameters()}
    for name, tensor in delta.backbone.named_parameters():
        assert state[name].dtype == tensor.dtype
    assert_unchanged(delta.backbone, before)


@pytest.mark.parametrize(
    "configs",
    [
        [fd.LoraConfig(lora_r=2, modified_modules=["a", "b"])],
        [fd.BitFitConfig(modified_modules=["a", "b"])],
        [fd.LoraConfig(lora_r=2, modified_modules=["a"], unfrozen_modules=["deltas", "a", "head"])],
        [kind(modified_modules=["a"]) for kind in (fd.LoraConfig, fd.LoraConfig, fd.BitFitConfig)],
    ],
    ids=["lora", "bitfit", "a trained leaf under a lora", "three on one site"],
)
def test_merged_weights_are_the_delta(configs: list[fd.BaseDeltaConfig], x: Tensor) -> None:
    delta = fd.DeltaModel(MLP().eval(), *configs)
    params = random_params(delta)
    assert_merges(delta, params, x)
    fresh = MLP().eval()
    fresh.load_state_dict(delta.merge(params))
    assert_close(fresh(x), delta.apply(params, x))


def test_what_is_not_there_is_not_merged(x: Tensor) -> None:
    delta = fd.DeltaModel(
        MLP().eval(), fd.AdapterConfig(modified_modules=["a"]), fd.LoraConfig(modified_modules=["a", "b"])
    )
    params = random_params(delta)
    with raises_saying(fd.errors.MergeError, "adapter", "a", "bind"):
        delta.merge(params)
    with raises_saying(fd.errors.MergeError, "adapter", "a", "bind"):
        delta.merged(params)
    assert_merges(delta, {name: leaf for name, leaf in params.items() if ".adapter." not in name}, x)
    assert all(torch.equal(tensor, delta.backbone.state_dict()[name]) for name, tensor in delta.merge({}).items())
    assert torch.equal(delta.merged({})(x), delta.backbone(x))


def test_a_bias_that_was_not_there(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).eval()
    delta = fd.BitFitModel(model, modified_modules=["0", "2"])
    params = random_params(delta)
    assert_merges(delta, params, x)
    assert torch.equal(delta.merge(params)["0.bias"], params["0.bitfit.bias"])


def test_a_norm_without_a_bias_cannot_hold_an_offset(x: Tensor) -> None:
    delta = fd.BitFitModel(ZOO["llama"].build(), modified_modules=["input_layernorm"])
    with raises_saying(fd.errors.MergeError, "input_layernorm", "RMSNorm", "bias"):
        delta.merge(random_params(delta))


@pytest.mark.parametrize("layer", ["conv2d", "conv1d", "grouped", "embedding", "transposed"])
def test_every_kind_of_layer(layer: str) -> None:
    from transformers.pytorch_utils import Conv1D

    modules = {
        "conv2d": (nn.Conv2d(3, 6, (3, 2), stride=2, padding=1, dilation=(1, 2)), torch.randn(2, 3, 9, 9)),
        "conv1d": (nn.Conv1d(4, 6, 3, padding="same", bias=False), torch.randn(2, 4, 9)),
        "grouped": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 9, 9)),
        "embedding": (nn.Embedding(11, 4, padding_idx=1), torch.randint(11, (3, 5))),
        "transposed": (Conv1D(6, 4), torch.randn(3, 4)),
    }
    module, inputs = modules[layer]
    delta = fd.LoraModel(nn.Sequential(module).eval(), lora_r=2, modified_modules=["0"])
    assert_merges(delta, random_params(delta), inputs)


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_one_end_of_a_tied_pair_is_untied_only_when_asked(name: str) -> None:
    model, tokens = Tied().eval(), torch.randint(11, (5, 6))
    delta = fd.LoraModel(model, lora_r=2, modified_modules=[name])
    params = random_params(delta)
    for refused in (delta.merge, delta.merged):
        with raises_saying(fd.errors.MergeError, "embedding.weight", "head.weight", "tied", "untie=True"):
            refused(params)
    assert_merges(delta, params, tokens, untie=True)
    merged = delta.merged(params, untie=True)
    assert merged.embedding.weight is not merged.head.weight
    assert model.embedding.weight is model.head.weight


def test_a_trained_tied_tensor_merges_into_all_its_ends() -> None:
    model, tokens = Tied().eval(), torch.randint(11, (5, 6))
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["body"], unfrozen_modules=["deltas", "head"])
    params = random_params(delta)
    assert_merges(delta, params, tokens)
    merged = delta.merged(params)
    assert merged.embedding.weight is merged.head.weight


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom"])
def test_an_untied_model_of_transformers_is_saved_and_loaded_untied(name: str, tmp_path: Any) -> None:
    architecture = ZOO[name]
    model, inputs = architecture.build(), architecture.inputs(3)
    assert model.config.tie_word_embeddings
    delta = fd.LoraModel(model, modified_modules=["lm_head"])
    params = random_params(delta)
    expected = delta.apply(params, **inputs).logits
    merged = delta.merged(params, untie=True)
    assert_close(merged(**inputs).logits, expected)
    merged.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, expected)
    assert model.config.tie_word_embeddings


def test_a_module_under_two_names_is_no_tied_pair(x: Tensor) -> None:
    delta = fd.LoraModel(Twice().eval(), lora_r=2, modified_modules=["first"])
    params = random_params(delta)
    assert_merges(delta, params, x)
    state = delta.merge(params)
    assert torch.equal(state["first.weight"], state["second.weight"])
    fresh = Twice().eval()
    fresh.load_state_dict(state)
    assert_close(fresh(x), delta.apply(params, x))


class Repeated(nn.Module):
    """One block three times, and then a head: (b, 4) to (b, 3)."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh())
        self.blocks = nn.ModuleList([block] * 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("name", ["blocks.0.0", "blocks.0"])
def test_a_trained_leaf_of_a_repeated_block_is_written_under_every_name(name: str, x: Tensor) -> None:
    model = Repeated().eval()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["head"], unfrozen_modules=["deltas", name])
    params = random_params(delta)
    assert_merges(delta, params, x)
    state = delta.merge(params)
    assert [torch.equal(state[f"blocks.{i}.0.weight"], params["blocks.0.0.weight"]) for i in range(3)] == [True] * 3
    fresh = Repeated().eval()
    fresh.load_state_dict(state)
    assert_close(fresh(x), delta.apply(params, x))
    by_hand = x
    for _ in range(3):
        by_hand = torch.tanh(by_hand @ params["blocks.0.0.weight"].T)
    assert_close(delta.merged(params)(x), by_hand @ state["head.weight"].T + state["head.bias"])


def test_a_bias_that_was_not_there_is_written_under_every_name(x: Tensor) -> None:
    delta = fd.BitFitModel(Repeated().eval(), modified_modules=["[r]blocks.0.0$"])
    params = random_params(delta)
    state = delta.merge(params)
    assert [torch.equal(state[f"blocks.{i}.0.bias"], params["blocks.0.0.bitfit.bias"]) for i in range(3)] == [True] * 3
    assert_close(delta.merged(params)(x), delta.apply(params, x))


class ReadInAList(nn.Module):
    """Reads its layer's weight once more from a list: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kept = [self.layer.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) @ self.kept[0]


@pytest.mark.parametrize("untie", [False, True])
def test_a_tensor_in_a_list_is_merged_with_its_parameter(untie: bool, x: Tensor) -> None:
    model = ReadInAList().eval()
    delta = fd.LoraModel(nn.Sequential(model, nn.Linear(4, 3)).eval(), lora_r=2, modified_modules=["0.layer"])
    params = random_params(delta)
    merged = delta.merged(params, untie=untie)
    weight = delta.merge(params)["0.layer.weight"]
    assert_acts(weight, model.layer.weight)
    assert_close(merged[0](x), torch.tanh(x @ weight.T + model.layer.bias) @ weight)


def test_running_statistics_among_params_are_written(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["0"])
    params = random_params(delta)
    seen = {"1.running_mean": torch.randn(6), "1.running_var": torch.rand(6) + 1, "scratch": torch.ones(2)}
    state = merge(delta, params | seen)
    assert all(torch.equal(state[name], seen[name]) for name in ("1.running_mean", "1.running_var"))
    assert state.keys() == model.state_dict().keys()
    hand = copy.deepcopy(model)
    hand.load_state_dict(state)
    module = merged(delta, params | seen)
    assert_close(module(x), hand(x))
    assert_acts(module(x), delta.merged(params)(x))
    assert torch.equal(module.scratch, seen["scratch"])
    assert not model.scratch.any()


def test_a_changed_backbone_leaf_among_params_is_written(x: Tensor) -> None:
    delta = fd.LoraModel(MLP().eval(), lora_r=2, modified_modules=["a"])
    full = delta.attach(random_params(delta))
    assert delta.merge(full).keys() == delta.merge(random_params(delta)).keys()
    full["b.weight"] = full["b.weight"] + 1.0
    expected = delta.apply(full, x)
    assert_close(merged(delta, full)(x), expected)


def test_merging_is_differentiable(x: Tensor) -> None:
    delta = fd.LoraModel(MLP().eval(), lora_r=2, modified_modules=["a"])
    params = random_params(delta)

    def merged_loss(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(delta.backbone, delta.merge(p), (x,)).square().sum()

    found = torch.func.grad(merged_loss)(params)
    expected = torch.func.grad(lambda p: delta.apply(p, x).square().sum())(params)
    for name in params:
        assert_close(found[name], expected[name])


def test_merging_members_by_vmap(x: Tensor) -> None:
    delta = fd.LoraModel(MLP().eval(), lora_r=2, modified_modules=["a"])
    stack = random_params(delta, 3)
    weights = torch.vmap(lambda p: delta.merge(p)["a.weight"])(stack)
    for i in range(3):
        assert_close(weights[i], delta.merge(fd.take(stack, i))["a.weight"])


def test_dropout_is_no_part_of_the_weights(x: Tensor) -> None:
    delta = fd.LoraModel(MLP().eval(), modified_modules=["a"], lora_dropout=0.5)
    params = random_params(delta)
    for name, tensor in delta.merge(params).items():
        assert torch.equal(delta.mode(train=True).merge(params)[name], tensor)


def test_merging_twice_counts_twice_and_starts_from_new_tensors(x: Tensor) -> None:
    delta = fd.LoraModel(MLP().eval(), lora_r=2, modified_modules=["a"])
    params = random_params(delta)
    state = delta.merge(params)
    once = state["a.weight"] - delta.backbone.a.weight
    loaded = copy.deepcopy(delta.backbone)
    loaded.load_state_dict(state)
    again = fd.LoraModel(loaded, lora_r=2, modified_modules=["a"]).merge(params)
    assert_close(again["a.weight"] - delta.backbone.a.weight, 2 * once)


def test_merged_model_has_the_backbones_mode_and_trains_as_it_did() -> None:
    model = ZOO["bert"].build()
    model.classifier.requires_grad_(False)
    delta = fd.LoraModel(model, modified_modules=["query"])
    merged = delta.merged(random_params(delta))
    assert not merged.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in merged.named_parameters()} == flags


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("style", ["parametrizations", "utils"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_computed_weights_cannot_hold_a_change(norm: str, style: str, x: Tensor) -> None:
    place = nn.utils.parametrizations if style == "parametrizations" else nn.utils
    model = nn.Sequential(getattr(place, norm)(nn.Linear(4, 4)), nn.Linear(4, 3)).eval()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["0", "1"])
    params = random_params(delta)
    assert_acts(delta.apply(params, x), model(x))  # the old style keeps what it computed, which deepcopy refuses
    with raises_saying(fd.errors.MergeError, "0", "weight"):
        delta.merge(params)
    beside = fd.LoraModel(model, lora_r=2, modified_modules=["1"])
    params = random_params(beside)
    assert_close(beside.merged(params)(x), beside.apply(params, x))
