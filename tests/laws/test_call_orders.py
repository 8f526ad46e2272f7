"""What one call leaves behind or decides is not for the next: writes, objects that steer, zeros, refreshed modes."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from custom_methods import RowScaleConfig
from handmade import assert_close, raises_saying, random_params
from torch import Tensor, nn

import funcdelta as fd


class Model(nn.Module):
    """Two layers, with something between them that a test gives."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between, self.late = nn.Linear(4, 4), nn.Linear(4, 3), between, False

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.b(self.between(self, torch.tanh(self.a(x)), *more))


@dataclass(frozen=True)
class Flaky(fd.BaseDeltaConfig):
    """``y + g``, or nothing."""

    state: ClassVar[list[str]] = []

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.zeros(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Any:
        return y + p["gain"] if self.state else None


def plain(m: Any, y: Tensor, *more: Any) -> Tensor:
    return y


def lora(model: nn.Module, *sites: str) -> fd.DeltaModel:
    return fd.LoraModel(model.double().eval(), lora_r=2, modified_modules=list(sites or ("a", "b")))


def each_alone(delta: fd.DeltaModel, stack: dict[str, Tensor], *args: Any) -> Tensor:
    n = len(next(iter(stack.values())))
    return torch.stack([delta.apply(fd.take(stack, i), *copy.deepcopy(args)) for i in range(n)])


X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def test_a_forward_that_writes_a_parameter_later_is_refused() -> None:
    writes = types.SimpleNamespace(now=False)

    def between(m: Any, y: Tensor) -> Tensor:
        if writes.now:
            with torch.no_grad():
                torch._foreach_add_(list(m.b.parameters()), 1.0)
        return y

    delta = lora(Model(between))
    params = random_params(delta)
    delta.apply(params, X)
    writes.now = True
    with raises_saying(fd.errors.StaleBackboneError, "b.weight was written in place"):
        delta.apply(params, X)


def test_a_forward_that_gives_a_parameter_other_numbers_does_it_in_every_call_anew() -> None:
    def between(m: Any, y: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(m.b.parameters()) * 2, m.b.parameters())
        return y

    delta = lora(Model(between), "a")
    before = copy.deepcopy(delta.backbone.state_dict())
    params = random_params(delta)
    first = delta.apply(params, X)
    assert_close(delta.apply(params, X), first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in delta.backbone.state_dict().items())


STEERING: dict[str, tuple[Any, Any]] = {
    "functions": (lambda y: y, lambda y: y - y.mean(0)),
    "modules": (nn.Softmax(1), nn.Softmax(0)),
    "numbers in objects": (types.SimpleNamespace(axis=1), types.SimpleNamespace(axis=0)),
    "dicts in objects": (types.SimpleNamespace(k={"axis": 1}), types.SimpleNamespace(k={"axis": 0})),
    "zeros": (0.0, -0.0),
}


def steered(m: Any, y: Tensor, by: Any) -> Tensor:
    if isinstance(by, float):
        return y if str(by) == "0.0" else y - y.mean(0)
    if callable(by):
        return by(y)
    axis = by.axis if hasattr(by, "axis") else by.k["axis"]
    return y - y.mean(axis, keepdim=True)


@pytest.mark.parametrize("kind", STEERING)
def test_inputs_that_are_no_tensors_steer(kind: str) -> None:
    delta = lora(Model(steered))
    stack = random_params(delta, 3)
    for by in (*STEERING[kind], *STEERING[kind]):
        assert_close(delta.apply_many(stack, X, by), each_alone(delta, stack, X, by))


def writing(m: Any, y: Tensor, state: Tensor) -> Tensor:
    state += y.detach()
    return y + state


@pytest.mark.parametrize("way", ["fold", "auto", "chunks", "explain"])
def test_only_the_call_itself_may_write_into_its_inputs(way: str) -> None:
    delta = lora(Model(writing))
    stack, state = random_params(delta, 3), torch.zeros(3, 4, dtype=torch.float64)
    expected = each_alone(delta, stack, X, state)
    if way == "explain":
        delta.explain(stack, X, state)
        assert not bool(state.any())
        return
    for _ in range(2):
        given = state.clone()
        options: dict[str, Any] = {"chunk_size": 1} if way == "chunks" else {"engine": way}
        assert_close(delta.apply_many(stack, X, given, **options), expected)


def test_rows_are_written_by_the_call_alone() -> None:
    delta = lora(Model(writing))
    stack, state = random_params(delta, 3), torch.zeros(3, 4, dtype=torch.float64)
    expected = torch.cat([delta.apply(fd.take(stack, i), X[i : i + 1], state[i : i + 1].clone()) for i in range(3)])
    for _ in range(2):
        assert_close(delta.apply_rows(stack, [0, 1, 2], X, state.clone()), expected)


def test_a_hook_of_the_backward_pass_is_no_map() -> None:
    model = Model(plain)
    model.b.register_full_backward_hook(lambda module, given, taken: (given[0] * 2,))
    delta = lora(model)
    with raises_saying(fd.errors.EngineError, "b has a hook of the backward pass", 'engine="auto"'):
        delta.apply_many(random_params(delta, 3), X, engine="vmap")


def test_other_modes_follow_a_refresh() -> None:
    delta = lora(Model(plain), "a")
    evaluating, params = delta.mode(train=False), random_params(delta)
    delta.backbone.b = nn.Linear(4, 3).double()
    delta.refresh()
    full = evaluating.attach(params)
    assert torch.equal(full["b.weight"], delta.backbone.b.weight)
    assert torch.equal(evaluating.apply(full, X), delta.apply(params, X))


def test_a_refreshed_delta_has_the_shapes_of_what_is_there_now() -> None:
    delta = lora(Model(plain))
    delta.backbone.b = nn.Linear(4, 7).double()
    assert delta.refresh().apply(delta.init(0), X).shape == (3, 7)


def test_what_rewrites_tensors_is_merged_before_what_acts_on_values() -> None:
    for order in (1, -1):
        model = Model(plain).double().eval()
        configs = [fd.LoraConfig(lora_r=2, modified_modules=["a"]), RowScaleConfig(modified_modules=["a"])]
        delta = fd.DeltaModel(model, *configs[::order])
        params = random_params(delta)
        assert_close(delta.merged(params)(X), delta.apply(params, X))


def test_a_method_that_gives_no_tensor_later_is_named() -> None:
    delta = fd.DeltaModel(nn.Sequential(nn.Linear(4, 3)), Flaky(modified_modules=["0"]))
    params, x = delta.init(0), torch.ones(2, 4)
    Flaky.state.append("a tensor")
    for _ in range(2):
        delta.apply(params, x)
    Flaky.state.clear()
    with raises_saying(fd.errors.ConfigError, "The method at 0 returned NoneType"):
        delta.apply(params, x)


def test_half_precision_leaves_beside_constants() -> None:
    delta = fd.CompacterModel(nn.Sequential(nn.Linear(64, 64)), modified_modules=["0"], learn_phm=False)
    params = {k: v if k in delta.constants else v.bfloat16() for k, v in random_params(delta).items()}
    x = torch.randn(3, 64)
    assert_close(delta.apply_many(fd.stack([params, params]), x)[1], delta.apply(params, x), 1e-2)


class Lends(nn.Module):
    """Returns a tensor that it holds, which some calls write."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.kind, self.pair = nn.Linear(4, 3), kind, (torch.zeros(3, dtype=torch.float64),)
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        held = self.total if self.kind == "buffer" else self.pair[0]
        if bool(y[0, 0] > 0):
            held.add_(y.detach().sum(0))
        return y, held


@pytest.mark.parametrize("kind", ["buffer", "tuple"])
@pytest.mark.parametrize("signs", [(-1, 1, -1), (1, -1, 1)])
def test_outputs_that_a_model_holds_are_not_written_later(kind: str, signs: tuple[int, ...]) -> None:
    delta = lora(Lends(kind), "a")
    with torch.no_grad():
        delta.backbone.a.weight.zero_(), delta.backbone.a.bias.zero_()
    one = {k: v if k in delta.constants else torch.ones_like(v) for k, v in delta.init(0).items()}
    stack = fd.stack([{k: v * s if k.endswith("lora_B") else v for k, v in one.items()} for s in signs])
    x = torch.ones(2, 4, dtype=torch.float64)
    outputs = [delta.apply(fd.take(stack, i), x) for i in range(3)]
    for y, held in (*outputs, *zip(*delta.apply_many(stack, x, engine="loop"), strict=True)):
        assert_close(held, y.sum(0) if bool(y[0, 0] > 0) else torch.zeros_like(held))


@dataclass(frozen=True)
class WritesOutput(fd.BaseDeltaConfig):
    """``y + gain``, written into y, which the model may still read."""

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.ones(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y.add_(p["gain"])


@dataclass(frozen=True)
class WritesInput(WritesOutput):
    """``y + gain x``, with what is added written into x."""

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + x.mul_(p["gain"]).sum(-1, keepdim=True)


def inferring(call: Callable[[], Any]) -> Any:
    with torch.inference_mode():
        return call()


FIRST_CALLS: dict[str, Callable[[fd.DeltaModel, dict[str, Tensor], Tensor], Any]] = {
    "apply": lambda delta, stack, x: delta.apply(fd.take(stack, 0), x),
    "inference": lambda delta, stack, x: inferring(lambda: delta.apply(fd.take(stack, 0), x)),
    "inference, folded": lambda delta, stack, x: inferring(lambda: delta.apply_many(stack, x, engine="fold")),
    "inference, bound": lambda delta, stack, x: inferring(lambda: delta.bind(fd.take(stack, 0))(x)),
    "grad": lambda delta, stack, x: torch.func.grad(lambda p: delta.apply(p, x).sum())(fd.take(stack, 0)),
    "jvp": lambda delta, stack, x: torch.func.jvp(lambda p: delta.apply(p, x), *[(fd.take(stack, 0),)] * 2),
    "hessian": lambda delta, stack, x: torch.func.hessian(lambda p: delta.apply(p, x).sum())(fd.take(stack, 0)),
    "vmap": lambda delta, stack, x: torch.vmap(delta.apply)(stack, x.expand(2, *x.shape).clone()),
    "mapped": lambda delta, stack, x: delta.apply_many(stack, x.expand(2, *x.shape).clone(), in_dims=0, engine="vmap"),
}


@pytest.mark.parametrize("way", FIRST_CALLS)
@pytest.mark.parametrize("kind", [WritesOutput, WritesInput])
def test_a_method_that_writes_a_hidden_value_is_refused_in_any_first_call(kind: Any, way: str) -> None:
    delta = fd.DeltaModel(Model(plain).double().eval(), kind(modified_modules=["b"], name="writes"))
    stack = delta.init(0, n=2, dtype=torch.float64)
    for _ in range(2):
        with raises_saying(fd.ConfigError, "The method at b changed a hidden value in place", "y = y + change"):
            FIRST_CALLS[way](delta, stack, X)


def test_a_first_call_in_inference_mode_is_one() -> None:
    delta = lora(Model(plain))
    params = random_params(delta)
    assert not delta.program.is_verified(params)
    inferring(lambda: delta.apply(params, X))
    assert delta.program.is_verified(params)
