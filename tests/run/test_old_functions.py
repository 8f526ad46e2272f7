"""Laws of models with an ``autograd.Function``: autograd goes through all of them, ``torch.func`` through new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import assert_close, raises_saying
from torch import Tensor, nn

import funcdelta as fd


class Old(torch.autograd.Function):
    """tanh, in the style in which ``forward`` takes the context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


class New(torch.autograd.Function):
    """tanh, in the style that can be transformed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * (1 - ctx.saved_tensors[0] ** 2)


class Model(nn.Module):
    def __init__(self, function: Any, mixes: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.function, self.mixes = nn.Linear(4, 4), nn.Linear(4, 3), function, mixes

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.a(x))
        return self.b(h - h.mean(0) if self.mixes else h)


X = torch.linspace(-1, 1, 12).view(3, 4)


def members(function: Any, mixes: bool = False) -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    delta = fd.LoraModel(Model(function, mixes), modified_modules=["a"], lora_r=2)
    return delta, fd.tree.randn_like(delta.init(0, n=2), seed=1)


TRANSFORMED: dict[str, Callable[[fd.DeltaModel, dict[str, Tensor]], Any]] = {
    "vmap": lambda delta, stack: torch.vmap(lambda p: delta.apply(p, X))(stack),
    "engine": lambda delta, stack: delta.apply_many(stack, X, engine="vmap"),
    "grad": lambda delta, stack: torch.func.grad(lambda p: delta.apply(p, X).sum())(fd.take(stack, 0)),
    "grad of many": lambda delta, stack: torch.func.grad(lambda p: delta.apply_many(p, X).sum())(stack),
    "grad of a fold": lambda delta, stack: torch.func.grad(lambda p: delta.apply_many(p, X, engine="fold").sum())(
        stack
    ),
    "grad of rows": lambda delta, stack: torch.func.grad(lambda p: delta.apply_rows(p, [0, 1, 0], X).sum())(stack),
    "grad of a view": lambda delta, stack: torch.func.grad(lambda x: delta.bind(fd.take(stack, 0))(x).sum())(X),
}


@pytest.mark.parametrize("way", TRANSFORMED)
def test_torch_func_through_an_old_function_is_refused_by_name(way: str) -> None:
    delta, stack = members(Old.apply)
    with raises_saying(fd.EngineError, "Old", "setup_context", "fd.value_and_grad(loss)", 'engine="auto"'):
        TRANSFORMED[way](delta, stack)


@pytest.mark.parametrize("way", TRANSFORMED)
def test_torch_func_goes_through_a_new_one(way: str) -> None:
    delta, stack = members(New.apply)
    found = TRANSFORMED[way](delta, stack)
    setattr(delta.backbone, "function", torch.tanh)  # noqa: B010
    expected = TRANSFORMED[way](delta.refresh(), stack)
    for name in found if isinstance(found, dict) else [...]:
        assert_close(found[name], expected[name])


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")
def test_autograd_goes_through_an_old_function_by_auto(mixes: bool) -> None:
    delta, stack = members(Old.apply, mixes)

    def loss(stack: dict[str, Tensor], engine: str = "auto") -> Tensor:
        return delta.apply_many(stack, X, engine=engine).square().flatten(1).sum(1)

    losses, gradients = fd.value_and_grad(loss)(stack)
    for i in range(2):
        p = {name: leaf.clone().requires_grad_() for name, leaf in fd.take(stack, i).items()}
        own = delta.apply(p, X).square().sum()
        own.backward()
        assert_close(losses[i], own.detach())
        for name, gradient in gradients.items():
            expected = p[name].grad
            assert_close(gradient[i], torch.zeros_like(gradient[i]) if expected is None else expected)
