"""LoRA against independent statements of it: PEFT's own numbers, and dense weights."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import (
    ENGINES,
    MLP,
    assert_acts,
    assert_close,
    assert_engines_agree,
    logits,
    raises_saying,
    random_params,
    transposed,
)
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd

# -- LoRA against PEFT ---------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """One layer with a name, for PEFT."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(4, 6), torch.randn(5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), torch.randn(2, 5, 4)),
    "transposed linear": (lambda: transposed(4, 6), torch.randn(2, 5, 4)),
    "embedding": (lambda: nn.Embedding(11, 4), torch.arange(10).reshape(2, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
    "strided conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), torch.randn(2, 3, 9, 9)),
    "strided conv2d": (lambda: nn.Conv2d(3, 6, (3, 1), stride=(2, 1), padding=(1, 0)), torch.randn(2, 3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1), torch.randn(2, 2, 4, 4, 4)),
}


def peft_with(model: nn.Module, params: dict[str, Tensor], target: list[str], **fields: Any) -> nn.Module:
    """PEFT's LoRA on a copy of ``model`` with the factors of ``params``, in evaluation mode."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        # PEFT still asks Transformers for a property under its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        other = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=target, **fields)).eval()
    taken = 0
    with torch.no_grad():
        for name, module in other.named_modules():
            path = name.removeprefix("base_model.model.")
            if f"{path}.lora.lora_A" not in params:
                continue
            a, b = params[f"{path}.lora.lora_A"], params[f"{path}.lora.lora_B"]
            if "default" in getattr(module, "lora_embedding_A", {}):
                module.lora_embedding_A["default"].copy_(a)
                module.lora_embedding_B["default"].copy_(b)
            else:
                module.lora_A["default"].weight.copy_(a)
                module.lora_B["default"].weight.copy_(b.reshape(module.lora_B["default"].weight.shape))
            taken += 1
    assert taken == len(params) // 3
    return other


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("stabilised", [False, True])
def test_lora_is_pefts(name: str, stabilised: bool) -> None:
    make, x = LAYERS[name]
    model = Wrapped(make()).eval()
    fields = {"lora_alpha": 5, "use_rslora": stabilised}
    delta = fd.LoraModel(model, lora_r=3, modified_modules=["layer"], **fields)
    params = random_params(delta)
    scale = 5 / (math.sqrt(3) if stabilised else 3)
    assert_close(params["layer.lora.scale"], torch.tensor(scale))
    options = {"fan_in_fan_out": True} if name == "transposed linear" else {}
    expected = peft_with(model, params, ["layer"], r=3, **fields, **options)(x)
    assert_acts(expected, model(x))
    assert_close(delta.apply(params, x), expected)
    assert_engines_agree(delta, random_params(delta, 3), x)


@pytest.mark.parametrize(
    ("name", "target", "options"),
    [
        ("bert", ["query", "value", "intermediate.dense", "word_embeddings"], {}),
        ("gpt2", ["c_attn", "c_fc", "wte"], {"fan_in_fan_out": True}),
        ("llama", ["q_proj", "down_proj", "embed_tokens", "lm_head"], {}),
        ("t5", ["q", "wo"], {}),
        ("vit", ["q_proj", "projection"], {}),
    ],
)
def test_whole_models_with_lora_are_pefts(name: str, target: list[str], options: dict[str, Any]) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs(3)
    delta = fd.LoraModel(model, lora_r=4, lora_alpha=6, modified_modules=target)
    params = random_params(delta)
    expected = peft_with(model, params, target, r=4, lora_alpha=6, **options)(**inputs)
    assert_acts(logits(expected), logits(model(**inputs)))
    assert_close(logits(delta.apply(params, **inputs)), logits(expected))


def test_lora_gradients_are_pefts() -> None:
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs(3)
    delta = fd.LoraModel(model, lora_r=4, modified_modules=["query", "value"])
    params = random_params(delta)
    other = peft_with(model, params, ["query", "value"], r=4, lora_alpha=16)
    other(**inputs).logits.square().sum().backward()
    found = torch.func.grad(lambda p: delta.apply(p, **inputs).logits.square().sum())(params)
    modules = dict(other.named_modules())
    for path in delta.sites:
        layer = modules[f"base_model.model.{path}"]
        assert_close(found[f"{path}.lora.lora_A"], layer.lora_A["default"].weight.grad)
        assert_close(found[f"{path}.lora.lora_B"], layer.lora_B["default"].weight.grad)


# -- LoRA against dense weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2},
        {"padding": "same"},
        {"padding": "valid", "stride": 3},
        {"groups": 2},
        {"groups": 4, "stride": 2, "dilation": 2, "padding": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_convolutions_with_every_option_are_their_dense_form(dimensions: int, options: dict[str, Any]) -> None:
    kind = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    layer = kind(4, 8, 3, **options)
    delta = fd.LoraModel(nn.Sequential(layer).eval(), lora_r=2, lora_alpha=3, modified_modules=["0"])
    params, x = random_params(delta), torch.randn(2, 4, *[11] * dimensions)
    a, b = params["0.lora.lora_A"], params["0.lora.lora_B"]
    assert a.shape == (2, 4 // layer.groups, *[3] * dimensions)
    assert b.shape == (8, 2)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight += 1.5 * torch.einsum("or,r...->o...", b, a)
    assert_close(delta.apply(params, x), dense(x))
    assert_engines_agree(delta, random_params(delta, 3), x)


def test_depthwise_convolution() -> None:
    layer = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    delta = fd.LoraModel(nn.Sequential(layer).eval(), lora_r=2, modified_modules=["0"])
    params, x = random_params(delta), torch.randn(2, 6, 5, 5)
    assert_close(delta.merged(params)(x), delta.apply(params, x))
    assert_engines_agree(delta, random_params(delta, 3), x)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_every_padding_mode_is_its_dense_form(mode: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    delta = fd.LoraModel(nn.Sequential(layer).eval(), lora_r=2, lora_alpha=3, modified_modules=["0"])
    params, x = random_params(delta), torch.randn(2, 3, 7, 7)
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.weight += 1.5 * torch.einsum("or,r...->o...", params["0.lora.lora_B"], params["0.lora.lora_A"])
    assert_close(delta.apply(params, x), dense(x))
    assert_engines_agree(delta, random_params(delta, 3), x)


def test_a_padding_token_has_a_value_and_no_gradient() -> None:
    table, tokens = nn.Embedding(11, 4, padding_idx=1), torch.tensor([[1, 1, 1]])
    delta = fd.LoraModel(nn.Sequential(table).eval(), lora_r=2, modified_modules=["0"])
    params = random_params(delta)
    assert_acts(delta.apply(params, tokens), table(tokens))
    found = torch.func.grad(lambda p: delta.apply(p, tokens).square().sum())(params)
    assert not found["0.lora.lora_A"].any()
    assert not found["0.lora.lora_B"].any()


@pytest.mark.parametrize("enabled", [(True, False, True), (False, True, False), (True, True, True), (True, False)])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_parts_of_a_fused_projection_have_factors_of_their_own(enabled: tuple[bool, ...], kind: str) -> None:
    layer = nn.Linear(4, 12) if kind == "linear" else transposed(4, 12)
    delta = fd.LoraModel(
        nn.Sequential(layer).eval(), lora_r=2, lora_alpha=3, enable_lora=enabled, modified_modules=["0"]
    )
    params, x = random_params(delta), torch.randn(2, 5, 4)
    size = 12 // len(enabled)
    assert params["0.lora.lora_A"].shape == (2 * sum(enabled), 4)
    assert params["0.lora.lora_B"].shape == (size * sum(enabled), 2)
    factors = iter(
        zip(
            params["0.lora.lora_A"].split(2),
            params["0.lora.lora_B"].split(size),
            strict=True,
        )
    )
    change = torch.zeros(12, 4)
    for part, on in enumerate(enabled):
        if on:
            a, b = next(factors)
            change[part * size : (part + 1) * size] = 1.5 * b @ a
    assert_close(delta.apply(params, x), layer(x) + x @ change.T)
    merged = delta.merge(params)["0.weight"]
    assert_close(merged, layer.weight + (change if kind == "linear" else change.T))
    assert_engines_agree(delta, random_params(delta, 3), x)


def test_query_and_value_of_gpt2() -> None:
    model, inputs = ZOO["gpt2"].build(), ZOO["gpt2"].inputs(3)
    delta = fd.LoraModel(model, lora_r=2, enable_lora=[True, False, True], modified_modules=["c_attn"])
    params = random_params(delta)
    state = delta.merge(params)
    name = "transformer.h.0.attn.c_attn.weight"
    q, k, v = (state[name] - model.state_dict()[name]).chunk(3, dim=1)
    assert q.any()
    assert v.any()
    assert not k.any()
    assert_close(delta.merged(params)(**inputs).logits, delta.apply(params, **inputs).logits)


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ({"enable_lora": [False, False]}, ["enable_lora", "True"]),
        ({"enable_lora": [True, False, True]}, ["8", "3", "enable_lora"]),
        ({"lora_r": 0}, ["lora_r=0", "at least 1"]),
        ({"lora_dropout": 1.0}, ["lora_dropout=1.0"]),
        ({"lora_dropout": -0.1}, ["lora_dropout=-0.1"]),
    ],
)
def test_impossible_fields(fields: dict[str, Any], pieces: list[str]) -> None:
    with raises_saying(fd.errors.FuncdeltaError, *pieces):
        fd.LoraModel(MLP(), modified_modules=["a"], **fields)


# -- LoRA's dropout and start --------------------------------------------------------------------------------------


@pytest.fixture
def dropping() -> fd.DeltaModel:
    return fd.LoraModel(MLP().eval(), lora_r=2, lora_dropout=0.5, modified_modules=["a"])


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_dropout_differs_by_member_and_is_reproducible(engine: str, dropping: fd.DeltaModel) -> None:
    params, x = random_params(dropping), torch.randn(64, 4)
    stack, training = fd.broadcast(params, 3), dropping.mode(train=True)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return training.apply_many(stack, x, engine=engine)

    first = run(1)
    assert torch.equal(run(1), first)
    assert_acts(run(2), first)
    assert_acts(first[0], first[1])
    assert_acts(first[1], first[2])
    quiet = dropping.apply_many(stack, x, engine=engine)
    for member in quiet:
        assert_close(member, dropping.apply(params, x))


def test_dropout_falls_on_the_low_rank_branch_alone(dropping: fd.DeltaModel) -> None:
    x = torch.randn(4000, 4)
    training = dropping.mode(train=True)
    assert_close(training.apply(dropping.init(0), x), dropping.backbone(x))
    linear = nn.Sequential(nn.Linear(4, 3)).eval()
    delta = fd.LoraModel(linear, lora_r=2, lora_dropout=0.25, modified_modules=["0"])
    params = random_params(delta)
    torch.manual_seed(0)
    found = delta.mode(train=True).apply(params, x)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.25)
    change = params["0.lora.scale"] * params["0.lora.lora_B"] @ params["0.lora.lora_A"]
    assert_close(found, linear(x) + dropped @ change.T)
    mean = torch.stack([delta.mode(train=True).apply(params, x[:50]) for _ in range(600)]).mean(0)
    assert_close(mean, delta.apply(params, x[:50]), 0.1)


def test_dropout_in_gradients_and_rows(dropping: fd.DeltaModel) -> None:
    training, x = dropping.mode(train=True), torch.randn(6, 4)
    stack = fd.broadcast(random_params(dropping), 3)
    losses, _ = fd.value_and_grad(lambda p: training.apply(p, x).square().sum())(stack)
    assert len(set(losses.tolist())) == 3
    same = x[:1].expand(6, 4)
    rows = training.apply_rows(stack, [0, 0, 1, 1, 2, -1], same)
    assert_acts(rows[0], rows[1])
    assert_close(rows[5], dropping.backbone(same)[5])
    torch.vmap(lambda p: training.apply(p, x), randomness="different")(stack)


def test_lora_starts_at_the_identity_away_from_zero() -> None:
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6)).eval()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["0", "1"])
    params, tokens = delta.init(0), torch.arange(10)
    assert torch.equal(delta.apply(params, tokens), model(tokens))
    assert params["1.lora.lora_A"].any()
    assert not params["1.lora.lora_B"].any()
    assert params["0.lora.lora_B"].any()
    assert not params["0.lora.lora_A"].any()
    assert float(params["1.lora.lora_A"].abs().max()) <= 1 / math.sqrt(4)


def test_scales_of_members_are_their_own() -> None:
    delta = fd.LoraModel(MLP().eval(), lora_r=2, lora_alpha=4, modified_modules=["a"])
    x, params = torch.randn(5, 4), random_params(delta)
    stack = fd.broadcast(params, 3) | {"a.lora.scale": torch.tensor([0.0, 2.0, 4.0])}
    outs = delta.apply_many(stack, x, engine="fold")
    assert_close(outs[0], delta.backbone(x))
    assert_close(outs[1], delta.apply(params, x))
    doubled = fd.LoraModel(delta.backbone, lora_r=2, lora_alpha=8, modified_modules=["a"])
    assert_close(outs[2], doubled.apply({**params, "a.lora.scale": doubled.init(0)["a.lora.scale"]}, x))
