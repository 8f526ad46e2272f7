"""DoRA written on the contract is PEFT's, whose norm has no gradient; with the norm's gradient it is the formula's."""

from __future__ import annotations

import copy

import pytest
import torch
from custom_methods import DoraConfig
from torch import Tensor, nn

import funcdelta as fd

peft = pytest.importorskip("peft")

HERE = ["0", "2"]


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)).eval()


def members(delta: fd.DeltaModel, n: int) -> dict[str, Tensor]:
    stack = delta.init(0, n=n)
    return {
        name: leaf + 0.3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(7))
        for name, leaf in stack.items()
    }


def of_peft(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """PEFT's output for one member, and its gradients of the sum of squares."""
    config = peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=HERE, lora_dropout=0.0)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    layers = {path: theirs.get_submodule(f"base_model.model.{path}") for path in HERE}
    leaves = {
        f"{path}.test_dora.{own}": tensor
        for path, layer in layers.items()
        for own, tensor in (
            ("b", layer.lora_B["default"].weight),
            ("a", layer.lora_A["default"].weight),
            ("magnitude", layer.lora_magnitude_vector["default"].weight),
        )
    }
    with torch.no_grad():
        for name, tensor in leaves.items():
            tensor.copy_(params[name])
    output = theirs(x)
    output.square().sum().backward()
    return output.detach(), {name: tensor.grad for name, tensor in leaves.items()}


@pytest.mark.parametrize("engine", ["fold", "vmap", "loop"])
def test_outputs_and_gradients_are_those_of_peft(engine: str) -> None:
    model, x = backbone(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    delta = fd.DeltaModel(model, DoraConfig(detach_norm=True, modified_modules=HERE))
    stack = members(delta, 3)
    losses, grads = fd.value_and_grad(lambda s: delta.apply_many(s, x, engine=engine).square().sum((1, 2)))(stack)
    for i in range(3):
        output, expected = of_peft(model, fd.take(stack, i), x)
        torch.testing.assert_close(losses[i], output.square().sum(), rtol=1e-5, atol=1e-5)
        for name, grad in expected.items():
            torch.testing.assert_close(grads[name][i], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_norm_has_a_gradient_unless_it_is_detached() -> None:
    model, x = backbone(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    detached, whole = (fd.DeltaModel(model, DoraConfig(detach_norm=d, modified_modules=HERE)) for d in (True, False))
    params = fd.take(members(whole, 1), 0)

    def loss(delta: fd.DeltaModel, params: dict[str, Tensor]) -> Tensor:
        return delta.apply(params, x).square().sum()

    assert torch.equal(loss(detached, params), loss(whole, params))
    name = "0.test_dora.a"
    grads = [torch.func.grad(lambda p, d=delta: loss(d, p))(params)[name] for delta in (detached, whole)]
    assert float((grads[0] - grads[1]).abs().max()) > 1e-3
    step = torch.zeros_like(params[name])
    step[0, 0] = 1e-2
    up, down = (loss(whole, {**params, name: params[name] + sign * step}) for sign in (1, -1))
    torch.testing.assert_close(grads[1][0, 0], (up - down) / 2e-2, rtol=2e-2, atol=2e-2)
