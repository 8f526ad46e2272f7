"""The program: what a call does to the backbone (nothing), and where its state stays."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import (
    ENGINES,
    MLP,
    Fails,
    assert_acts,
    assert_close,
    assert_engines_agree,
    raises_saying,
    random_params,
)
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=model, lora_r=2, modified_modules=list(names), **fields)


# -- the backbone stays as it was ----------------------------------------------------------------------------------


def test_nothing_is_copied_but_buffers() -> None:
    model = ZOO["conv2d"].build()
    delta = lora(model, "hidden")
    seen: dict[str, int] = {}

    def look(skeleton: nn.Module) -> None:
        for name, tensor in [*skeleton.named_parameters(), *skeleton.named_buffers()]:
            seen[name] = tensor.data_ptr()

    fd.DeltaModel(model, *delta.configs, prepare=look)
    for name, parameter in model.named_parameters():
        assert seen[name] == parameter.data_ptr()
    for name, buffer in model.named_buffers():
        assert name not in seen or seen[name] != buffer.data_ptr()


def test_batch_norm_in_training_never_writes_its_statistics() -> None:
    model = ZOO["conv2d"].build().train()
    before = snapshot(model)
    delta = lora(model, "conv1", "hidden")
    images = torch.randn(6, 3, 9, 9)
    params, stack = random_params(delta), random_params(delta, 3)
    delta.apply(params, images)
    delta.apply({}, images)
    delta.apply_many(stack, images)
    torch.vmap(lambda p: delta.apply(p, images))(stack)
    view = delta.bind(params)
    view(images)
    view.train()(images)
    assert_unchanged(model, before)
    reference = copy.deepcopy(model)
    assert_close(delta.apply({}, images), reference(images))


@pytest.mark.parametrize("where", ["apply", *ENGINES, "auto", "apply_rows", "bind", "grad", "value_and_grad"])
def test_an_error_of_the_model_leaves_everything_as_it_was(where: str, x: Tensor) -> None:
    model = Fails().eval()
    before = snapshot(model)
    delta = lora(model, "a", unfrozen_modules=["deltas", "b"])
    params, stack = random_params(delta), random_params(delta, 3)
    expected = delta.apply(params, x)
    view = delta.bind(params)
    calls: dict[str, Callable[[], Any]] = {
        "apply": lambda: delta.apply(params, x, fail=True),
        "apply_rows": lambda: delta.apply_rows(stack, [0, 1, 2, -1, 0], x, fail=True),
        "bind": lambda: view(x, fail=True),
        "grad": lambda: torch.func.grad(lambda p: delta.apply(p, x, fail=True).sum())(params),
        "value_and_grad": lambda: fd.value_and_grad(lambda p: delta.apply(p, x, fail=True).sum())(stack),
    }
    for engine in (*ENGINES, "auto"):
        calls[engine] = lambda engine=engine: delta.apply_many(stack, x, engine=engine, fail=True)
    with pytest.raises(ZeroDivisionError, match="the model's own error"):
        calls[where]()
    assert_unchanged(model, before)
    assert torch.equal(delta.apply(params, x), expected)
    assert torch.equal(delta.apply({}, x), model(x))
    assert_close(view(x), expected)
    assert_engines_agree(delta, stack, x)


def test_eight_threads_with_eight_deltas_and_every_engine(x: Tensor) -> None:
    model = MLP().eval()
    before = snapshot(model)
    deltas = [
        fd.DeltaModel(model, config)
        for config in (
            fd.LoraConfig(lora_r=2, modified_modules=["a"]),
            fd.LoraConfig(lora_r=3, modified_modules=["b", "head"], name="slow"),
            fd.AdapterConfig(bottleneck_dim=3, modified_modules=["b"]),
            fd.BitFitConfig(modified_modules=["a", "b"]),
        )
    ] * 2
    stacks = [random_params(delta, 3, seed=i) for i, delta in enumerate(deltas)]
    expected = [
        torch.stack([delta.apply(fd.take(stack, i), x) for i in range(3)])
        for delta, stack in zip(deltas, stacks, strict=True)
    ]
    problems: list[BaseException] = []
    start = threading.Barrier(len(deltas))

    def work(i: int) -> None:
        start.wait()
        try:
            for engine in (*ENGINES, "auto") * 3:
                assert_close(deltas[i].apply_many(stacks[i], x, engine=engine), expected[i])
                assert_close(deltas[i].apply_rows(stacks[i], [2] * len(x), x), expected[i][2])
                assert torch.equal(deltas[i].apply({}, x), model(x))
        except BaseException as problem:  # carried to the main thread, which raises it
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(deltas))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    assert_unchanged(model, before)


def test_gradients_reach_params_and_inputs_but_not_the_backbone(x: Tensor) -> None:
    model = MLP().eval()
    delta = lora(model, "a", unfrozen_modules=["deltas", "head"])
    params = {name: leaf.requires_grad_() for name, leaf in random_params(delta).items()}
    x.requires_grad_()
    delta.apply(params, x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {name for name, leaf in params.items() if leaf.grad is not None} == set(params) - set(delta.constants)


# -- mode ----------------------------------------------------------------------------------------------------------


def test_mode_belongs_to_the_delta() -> None:
    model = ZOO["bert"].build()
    inputs = ZOO["bert"].inputs(2)
    delta = lora(model, "query")
    training = delta.mode(train=True)
    assert (delta.training, training.training, model.training) == (False, True, False)
    assert torch.equal(delta.apply({}, **inputs).logits, delta.apply({}, **inputs).logits)
    assert not torch.equal(training.apply({}, **inputs).logits, training.apply({}, **inputs).logits)
    torch.manual_seed(3)
    found = training.apply({}, **inputs).logits
    torch.manual_seed(3)
    assert torch.equal(found, copy.deepcopy(model).train()(**inputs).logits)
    assert not model.training
    assert not training.mode(train=False).training


def test_the_backbones_flag_counts_when_the_delta_is_built_and_never_after() -> None:
    model = ZOO["bert"].build()
    inputs = ZOO["bert"].inputs(2)
    delta = lora(model, "query")
    params = delta.init(0)
    model.train()
    same: list[bool] = []

    def work() -> None:
        same.append(torch.equal(delta.apply(params, **inputs).logits, delta.apply(params, **inputs).logits))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    work()
    assert same == [True, True]
    assert not delta.training
    assert not delta.bind(params).training


# -- what cannot be seen from outside a call -----------------------------------------------------------------------


@pytest.mark.parametrize("first", ["hessian", "grad of grad", "jvp", "vmap of grad", "inference_mode", "no_grad"])
def test_the_first_call_may_be_made_anywhere(first: str) -> None:
    model = ZOO["conv2d"].build()
    delta = fd.BitFitModel(model, modified_modules=["conv1"])
    params = random_params(delta)
    images = torch.randn(2, 3, 9, 9)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return delta.apply(p, images).square().sum()

    def gradient_norm(p: dict[str, Tensor]) -> Tensor:
        return fd.tree.norm(torch.func.grad(loss)(p))

    for _ in range(2):
        if first == "hessian":
            torch.func.hessian(loss)(params)
        elif first == "grad of grad":
            torch.func.grad(gradient_norm)(params)
        elif first == "jvp":
            torch.func.jvp(loss, (params,), (params,))
        elif first == "vmap of grad":
            torch.vmap(torch.func.grad(loss))(fd.stack([params, params]))
        else:
            with torch.inference_mode() if first == "inference_mode" else torch.no_grad():
                loss(params)
                delta.apply_many(fd.stack([params, params]), images)
    torch.func.grad(gradient_norm)(params)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    loss(leaves).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    delta.apply_many(fd.stack([params, params]), images)


def test_weights_changed_in_place_are_seen(x: Tensor) -> None:
    model = MLP().eval()
    delta = lora(model, "b")
    params = random_params(delta)
    before = delta.apply(params, x)
    with torch.no_grad():
        model.a.weight.mul_(2)
    assert torch.equal(delta.apply({}, x), model(x))
    assert_acts(delta.apply(params, x), before)


@pytest.mark.parametrize("call", ["apply", "detached", "apply_many", "apply_rows", "bind"])
def test_a_moved_backbone_is_an_error_that_names_refresh(call: str, x: Tensor) -> None:
    model = MLP().eval()
    delta = lora(model, "a")
    params = random_params(delta)
    stack = fd.stack([params, params])
    delta.apply(params, x)
    model.double()
    wide = x.double()
    with raises_saying(fd.errors.StaleBackboneError, "float32", "float64", "delta.refresh()"):
        {
            "apply": lambda: delta.apply(params, wide),
            "detached": lambda: delta.apply({}, wide),
            "apply_many": lambda: delta.apply_many(stack, wide),
            "apply_rows": lambda: delta.apply_rows(stack, [0, 1, 0, 1, 0], wide),
            "bind": lambda: delta.bind(params),
        }[call]()
    assert delta.refresh() is delta
    assert delta.apply(params, wide).dtype == torch.float64
    assert delta.init(0)["a.lora.lora_A"].dtype == torch.float64
    assert torch.equal(delta.apply({}, wide), model(wide))
    assert delta.attach(params)["b.weight"].dtype == torch.float64
    assert delta.mode(train=True).apply(params, wide).dtype == torch.float64


def test_prepare_is_given_every_private_copy(x: Tensor) -> None:
    model = MLP().eval()
    given: list[nn.Module] = []
    delta = fd.DeltaModel(model, fd.LoraConfig(modified_modules=["a"]), prepare=given.append)
    delta.apply(delta.init(0), x)
    assert given
    assert all(type(skeleton) is MLP and skeleton is not model for skeleton in given)


class Remembers(nn.Module):
    """Counts its calls in a buffer, and multiplies by the count."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x) * self.count


def test_a_call_has_no_memory(x: Tensor) -> None:
    model = Remembers().eval()
    before = snapshot(model)
    delta = lora(model, "layer")
    params, stack = random_params(delta), random_params(delta, 3)
    first = delta.apply(params, x)
    many = delta.apply_many(stack, x, engine="fold")
    for _ in range(2):
        assert torch.equal(delta.apply(params, x), first)
        assert torch.equal(delta.apply_many(stack, x, engine="fold"), many)
        assert torch.equal(delta.apply({}, x), copy.deepcopy(model)(x))
    assert_engines_agree(delta, stack, x)
    assert_unchanged(model, before)


@pytest.mark.parametrize("first", ["a plain call", "a transform"])
def test_a_model_that_writes_buffers_under_transforms(first: str, x: Tensor) -> None:
    model = Remembers().eval()
    before = snapshot(model)
    delta = lora(model, "layer")
    stack = random_params(delta, 3)
    if first == "a plain call":
        delta.apply(fd.take(stack, 0), x)
    grads = torch.vmap(torch.func.grad(lambda p: delta.apply(p, x).square().sum()))(stack)
    _, expected = fd.value_and_grad(lambda s: delta.apply_many(s, x, engine="fold").square().sum((1, 2)))(stack)
    for name, grad in grads.items():
        assert_close(grad, expected[name])
    assert_unchanged(model, before)


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_is_left_alone(training: bool, x: Tensor) -> None:
    """Reading its weight in training mode writes buffers."""
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Linear(4, 3)).train(training)
    before = snapshot(model)
    delta = lora(model, "0", "1")
    params = random_params(delta)
    assert torch.equal(delta.apply(params, x), delta.apply(params, x))
    delta.apply_many(fd.stack([params, params]), x)
    delta.refresh()
    delta.bind(params)
    delta.attach(params)
    assert_unchanged(model, before)


def test_an_embedding_that_renormalises_itself_does_not_touch_the_backbone() -> None:
    model = nn.Sequential(nn.Embedding(11, 4, max_norm=0.5), nn.Linear(4, 3)).eval()
    before, tokens = snapshot(model), torch.arange(11)[None]
    delta = lora(model, "1")
    try:
        delta.apply({}, tokens)
        delta.apply(random_params(delta), tokens)
    except fd.errors.FuncdeltaError as error:
        assert "0.weight" in str(error)  # noqa: PT017  (either outcome is right)
    assert_unchanged(model, before)


class Wide(nn.Module):
    """Ten layers that run, and others that stand beside them: as many tensors as are asked for."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])
        self.beside = nn.ModuleList([nn.Linear(1, 1) for _ in range(tensors // 2 - 10)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("trained", [(), ("layers.9",)])
def test_the_work_of_a_call_does_not_grow_with_the_backbone(trained: tuple[str, ...]) -> None:
    """Counted in calls of functions, by 300 and by 3,000 tensors; buffers cost one comparison each."""

    def calls(tensors: int) -> int:
        model, x, count = Wide(tensors).eval(), torch.ones(2, 2), 0
        delta = fd.LoraModel(
            model, lora_r=2, modified_modules=[f"layers.{i}" for i in range(9)], unfrozen_modules=["deltas", *trained]
        )
        params = delta.init(0)
        delta.apply(params, x)

        def counted(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            delta.apply(params, x)
        finally:
            sys.setprofile(None)
        return count

    assert calls(300) == calls(3000)
