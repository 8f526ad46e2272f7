"""Half precision, autocast and quantised layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from handmade import (
    ENGINES,
    MLP,
    assert_acts,
    assert_close,
    assert_engines_agree,
    raises_saying,
    random_params,
)
from torch import Tensor, nn
from torch.nn import functional as F

import funcdelta as fd


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=model, lora_r=2, modified_modules=list(names), **fields)


# -- half precision and autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_output_and_float32_leaves(dtype: torch.dtype, x: Tensor) -> None:
    model = MLP().eval().to(dtype)
    half = x.to(dtype)
    delta = lora(model, "a", unfrozen_modules=["deltas", "head"])
    assert all(leaf.dtype == torch.float32 for leaf in delta.init(0).values())
    assert torch.equal(delta.apply({}, half), model(half))
    params, stack = random_params(delta), random_params(delta, 3)
    wide = lora(copy.deepcopy(model).float(), "a", unfrozen_modules=["deltas", "head"])
    assert delta.apply(params, half).dtype == dtype
    assert_close(delta.apply(params, half).float(), wide.apply(params, half.float()), 5e-2)
    for engine in ENGINES:
        outs = delta.apply_many(stack, half, engine=engine)
        assert outs.dtype == dtype
        assert_close(outs.float(), wide.apply_many(stack, half.float()), 5e-2)
    assert delta.apply_rows(stack, [0, -1, 1, 2, 0], half).dtype == dtype
    _, grads = fd.value_and_grad(lambda s: delta.apply_many(s, half).float().square().mean((1, 2)))(stack)
    assert all(grads[name].dtype == torch.float32 and grads[name].any() for name in delta.names if "scale" not in name)
    assert delta.bind(params)(half).dtype == dtype
    assert delta.merge(params)["head.weight"].dtype == dtype
    assert delta.merged(params)(half).dtype == dtype


def test_leaves_in_a_chosen_dtype(x: Tensor) -> None:
    model = MLP().eval()
    delta = lora(model, "a")
    for dtype in (torch.bfloat16, torch.float64):
        params = delta.init(0, dtype=dtype)
        assert all(leaf.dtype == dtype for leaf in params.values())
        assert delta.apply(params, x).dtype == torch.float32
        assert delta.apply_many(fd.stack([params] * 2), x, engine="fold").dtype == torch.float32


@pytest.mark.parametrize("trained", [(), ("head",)])
def test_autocast(trained: tuple[str, ...], x: Tensor) -> None:
    model = MLP().eval()
    delta = lora(model, "a", unfrozen_modules=["deltas", *trained])
    stack = random_params(delta, 3)
    exact = delta.apply_many(stack, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta.apply({}, x), model(x))
        assert delta.apply(fd.take(stack, 0), x).dtype == torch.bfloat16
        for engine in ENGINES:
            # torch.vmap leaves a linear layer with a mapped weight and a bias out of autocast: dtypes may differ.
            assert_close(delta.apply_many(stack, x, engine=engine).float(), exact, 5e-2)
        if not trained:
            assert delta.apply_many(stack, x, engine="fold").dtype == torch.bfloat16


class Int8Linear(nn.Module):
    """A linear layer with whole numbers for weights, under any name."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.name = layer.in_features, layer.out_features, name
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer(name, (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, getattr(self, self.name).to(x.dtype) * self.scale)


@pytest.mark.parametrize("name", ["weight", "qweight"])
def test_quantised_layers_need_nothing_more(name: str, x: Tensor) -> None:
    model = nn.Sequential(Int8Linear(nn.Linear(4, 8), name), nn.Tanh(), nn.Linear(8, 3)).eval()
    delta = lora(model, "0", "2")
    stack = random_params(delta, 3)
    assert all(leaf.dtype == torch.float32 for leaf in stack.values())
    assert_acts(assert_engines_agree(delta, stack, x)[0], model(x))
    with raises_saying(fd.errors.MergeError, "0", "weight"):
        delta.merge(fd.take(stack, 0))
