"""torch.compile of whole training steps and of routed rows, and torch.export of a bound delta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import MLP, assert_close, raises_saying, random_params
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd

X, LABELS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture
def delta() -> fd.DeltaModel:
    torch._dynamo.reset()
    return fd.DeltaModel(
        MLP().eval(),
        fd.LoraConfig(lora_r=2, modified_modules=["a"], unfrozen_modules=["deltas", "head"]),
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=["b"]),
    )


def training_step(delta: fd.DeltaModel, many: bool) -> Any:
    """Values, gradients and the optimiser's update, in one pure function."""
    optimizer = fd.optim.adamw(lr=1e-2)

    def loss(params: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        if not many:
            return F.cross_entropy(delta.apply(params, x), labels)
        outs = delta.apply_many(params, x, engine="fold")
        return torch.vmap(F.cross_entropy, in_dims=(0, None))(outs, labels)

    def step(params: dict[str, Tensor], state: Any, x: Tensor, labels: Tensor) -> Any:
        losses, grads = fd.value_and_grad(loss)(params, x, labels)
        updates, state = optimizer.update(grads, state, params)
        return losses, fd.tree.add(params, updates), state

    return step, optimizer


@pytest.mark.parametrize("many", [False, True], ids=["one", "many"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_whole_step_in_one_graph(delta: fd.DeltaModel, backend: str, many: bool) -> None:
    params = random_params(delta, 3 if many else None)
    step, optimizer = training_step(delta, many)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    expected = found = (None, params, optimizer.init(params))
    for i in range(4):
        expected = step(*expected[1:], X, LABELS)
        # The first step's state is fresh, the second's has moved; from then on nothing is new.
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            found = compiled(*found[1:], X, LABELS)
        assert_close(found[0], expected[0], 1e-5)
    for name, leaf in expected[1].items():
        assert_close(found[1][name], leaf, 1e-4)
        assert torch.equal(leaf, params[name]) == (name in delta.constants)


def test_other_values_members_and_rows_need_no_other_graph(delta: fd.DeltaModel) -> None:
    stack, index = random_params(delta, 3), torch.tensor([0, 1, -1, 2, 0])
    delta.apply_rows(stack, index, X)
    rows = torch.compile(lambda stack, index, x: delta.apply_rows(stack, index, x), fullgraph=True, backend="eager")
    assert_close(rows(stack, index, X), delta.apply_rows(stack, index, X))
    others, turned = random_params(delta, 3, seed=1), index.flip(0)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(rows(others, turned, X.flip(0)), delta.apply_rows(others, turned, X.flip(0)))


class Applied(nn.Module):
    """A delta as a module whose params are inputs."""

    def __init__(self, delta: fd.DeltaModel) -> None:
        super().__init__()
        self.backbone, self.apply_delta = delta.backbone, delta.apply

    def forward(self, params: dict[str, Tensor], **inputs: Any) -> Any:
        return self.apply_delta(params, **inputs)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_exported_programs_give_the_same_numbers(name: str) -> None:
    torch._dynamo.reset()
    architecture = ZOO[name]
    delta = fd.LoraModel(
        architecture.build(),
        modified_modules=[architecture.default_target],
        unfrozen_modules=["deltas", architecture.head],
    )
    inputs, other = ({**architecture.inputs(3, seed), "use_cache": False} for seed in (0, 1))
    if name == "bert":
        inputs, other = architecture.inputs(3, 0), architecture.inputs(3, 1)
    params, others = random_params(delta), random_params(delta, seed=1)
    with torch.no_grad():
        bound = torch.export.export(delta.bind(params), (), inputs).module()
        assert_close(architecture.call(bound, other), architecture.output(delta.apply(params, **other)), 1e-5)
        applied = torch.export.export(Applied(delta), (params,), inputs).module()
        found = architecture.output(applied(others, **other))
        assert_close(found, architecture.output(delta.apply(others, **other)), 1e-5)


class Followed(nn.Module):
    """Reads a number and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.factor = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), 0.5
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.factor * self.scale


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a layer": (lambda model: model.b.__setitem__(0, nn.Linear(4, 4)), "b.0 is another Linear"),
    "a parameter": (lambda model: setattr(model.a, "weight", nn.Parameter(torch.ones(4, 4))), "a.weight"),
    "a hook": (lambda model: model.b.register_forward_hook(lambda module, given, y: 2 * y), "hook was added to b"),
    "storage": (lambda model: setattr(model.a.bias, "data", torch.ones(4)), "a.bias has other storage"),
    "a buffer": (lambda model: setattr(model, "scale", 2 * torch.ones(4)), "a buffer was replaced, or a number"),
    "a number": (lambda model: setattr(model, "factor", 2.0), "a buffer was replaced, or a number"),
}

COMPILED: dict[str, Callable[[fd.DeltaModel, dict[str, Tensor], Tensor], Tensor]] = {
    "apply": lambda delta, stack, x: delta.apply(fd.take(stack, 0), x),
    "many": lambda delta, stack, x: delta.apply_many(stack, x),
    "vmap of grad": lambda delta, stack, x: torch.vmap(
        torch.func.grad(lambda params: delta.apply(params, x).square().sum())
    )(stack)["a.lora.lora_B"],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", COMPILED)
def test_a_compiled_call_sees_that_the_backbone_changed(way: str, change: str) -> None:
    torch._dynamo.reset()
    delta = fd.LoraModel(Followed().eval(), modified_modules=["a"], lora_r=2)
    stack = random_params(delta, 2)

    def call(stack: dict[str, Tensor], x: Tensor) -> Tensor:
        return COMPILED[way](delta, stack, x)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if change == "a layer" else "eager")
    assert_close(compiled(stack, X), call(stack, X))
    with torch.no_grad():
        delta.backbone.scale.mul_(3)  # numbers are followed
    assert_close(compiled(stack, X), call(stack, X))
    act, said = CHANGES[change]
    act(delta.backbone)
    with raises_saying(fd.StaleBackboneError, said):
        compiled(stack, X)
    delta.refresh()
    assert_close(compiled(stack, X), call(stack, X))
