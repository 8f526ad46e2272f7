"""Methods made from a user's own modules: against the same modules called by hand, on every engine."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, assert_acts, assert_close, assert_engines_agree, raises_saying, random_params
from torch import Tensor, nn
from torch.func import functional_call
from zoo import ZOO

import funcdelta as fd
from funcdelta.methods.config import METHODS


def bottleneck(wide: int, out: int, m: int, dropout: float) -> nn.Module:
    return nn.Sequential(nn.Linear(wide, m), nn.Tanh(), nn.Dropout(dropout), nn.Linear(m, out, bias=False))


@fd.register_module("test_module_sequential")
def After(site: fd.Site, m: int = 3, dropout: float = 0.0) -> nn.Module:  # noqa: N802
    """A bottleneck on what leaves the site."""
    return bottleneck(site.width, site.width, m, dropout)


@fd.register_module("test_module_parallel", insert="parallel")
def Beside(site: fd.Site, m: int = 3, dropout: float = 0.0) -> nn.Module:  # noqa: N802
    return bottleneck(site.in_features or site.width, site.width, m, dropout)


@fd.register_module("test_module_replace", insert="replace")
def Instead(site: fd.Site, m: int = 3, dropout: float = 0.0) -> nn.Module:  # noqa: N802
    return bottleneck(site.in_features or site.width, site.width, m, dropout)


@fd.register_module("test_module_before", insert="before")
def Ahead(site: fd.Site, m: int = 3, dropout: float = 0.0) -> nn.Module:  # noqa: N802
    return bottleneck(site.in_features or site.width, site.in_features or site.width, m, dropout)


KINDS: dict[str, Any] = {"sequential": After, "parallel": Beside, "replace": Instead, "before": Ahead}


BY_HAND = bottleneck(8, 8, 3, 0.0)


def by_hand(insert: str, model: MLP, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The MLP with the module at ``b``, as its parent would write it."""
    p = {name.partition(f"test_module_{insert}.")[2]: leaf for name, leaf in params.items()}
    hidden = torch.tanh(model.a(x))

    def run(value: Tensor) -> Tensor:
        return functional_call(BY_HAND, p, (value,))

    outputs = {
        "sequential": lambda: run(model.b(hidden)),
        "parallel": lambda: model.b(hidden) + run(hidden),
        "replace": lambda: run(hidden),
        "before": lambda: model.b(run(hidden)),
    }
    return model.head(torch.tanh(outputs[insert]()))


@pytest.mark.parametrize("insert", KINDS)
def test_a_module_at_a_site(insert: str, tmp_path: Path) -> None:
    model, x = MLP().eval(), torch.randn(5, 4)
    before, state = snapshot(model), torch.get_rng_state()
    delta = fd.DeltaModel(model, KINDS[insert](modified_modules=["b"]))
    name = f"b.test_module_{insert}"
    assert delta.shapes == {f"{name}.0.weight": (3, 8), f"{name}.0.bias": (3,), f"{name}.3.weight": (8, 3)}
    stack = random_params(delta, 3)
    assert torch.equal(state, torch.get_rng_state())
    found = assert_engines_agree(delta, stack, x)
    for i in range(3):
        assert_close(found[i], by_hand(insert, model, fd.take(stack, i), x))
    rows = delta.apply_rows(stack, [2, -1, 0, 0, 1], x)
    assert_close(rows, torch.stack([found[2][0], model(x)[1], found[0][2], found[0][3], found[1][4]]))
    view = delta.bind(fd.take(stack, 1))
    assert_close(view(x), found[1])
    _, grads = fd.value_and_grad(lambda s: delta.apply_many(s, x).square().sum((1, 2)))(stack)
    expected = torch.func.grad(lambda p: by_hand(insert, model, p, x).square().sum())(fd.take(stack, 2))
    for key, leaf in expected.items():
        assert_close(grads[key][2], leaf)
    delta.save_finetuned(stack, tmp_path / "run")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=model)
    assert type(again.configs[0]) is KINDS[insert]
    assert torch.equal(again.apply_many(loaded, x), delta.apply_many(stack, x))
    with raises_saying(fd.errors.MergeError, "cannot be merged", "no weights form"):
        delta.merge(fd.take(stack, 0))
    assert_unchanged(model, before)


def test_fresh_leaves_are_those_of_a_fresh_module() -> None:
    """As torch draws them, of the seed and the site alone; nobody else's random numbers are spent."""
    model = MLP().eval()
    delta = fd.DeltaModel(model, After(m=64, modified_modules=["a", "b"]))
    one, stack = delta.init(3), delta.init(3, n=2)
    weight = stack["a.test_module_sequential.0.weight"]
    assert float(weight.abs().max()) <= 8**-0.5
    assert float(weight.std()) == pytest.approx((1 / 3) ** 0.5 * 8**-0.5, rel=0.1)
    assert not torch.equal(weight[0], weight[1])
    assert not torch.equal(weight[0], stack["b.test_module_sequential.0.weight"][0])
    assert all(torch.equal(one[name], delta.init(3)[name]) for name in delta.names)


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "conv2d"])
def test_on_real_architectures(name: str) -> None:
    architecture = ZOO[name]
    model, inputs = architecture.build(), architecture.inputs(3)
    example = architecture.inputs(2)
    config = Scale(modified_modules=architecture.linears)
    delta = fd.DeltaModel(model, config, example=example.get("args", example))
    stack = random_params(delta, 2)

    def many(engine: str) -> Tensor:
        return architecture.call(lambda *a, **k: delta.apply_many(stack, *a, engine=engine, **k), inputs)

    with torch.no_grad():
        expected = many("loop")
        assert_acts(expected[0], expected[1])
        assert_close(many("fold"), expected)


@fd.register_module("test_module_scale", insert="sequential")
def Scale(site: fd.Site) -> nn.Module:  # noqa: N802
    """1 + a gain a feature, with the identity as a buffer."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.zeros(site.width))
            self.one = nn.Buffer(torch.ones(()))

        def forward(self, y: Tensor) -> Tensor:
            gain = self.gain.view(-1, *[1] * (y.ndim - 1 - site.channel_axis % y.ndim))
            return y * (self.one + gain)

    return Gain()


def test_buffers_are_constants() -> None:
    model, x = MLP().eval(), torch.randn(5, 4)
    delta = fd.DeltaModel(model, Scale(modified_modules=["a"]))
    assert delta.constants == ("a.test_module_scale.one",)
    params = delta.init(0)
    assert torch.equal(delta.apply(params, x), model(x))
    params["a.test_module_scale.one"] = torch.tensor(2.0)
    assert_close(delta.apply(params, x), model.head(torch.tanh(model.b(torch.tanh(2 * model.a(x))))))


def test_dropout_follows_the_mode() -> None:
    model, x = MLP().eval(), torch.randn(64, 4)
    delta = fd.DeltaModel(model, After(dropout=0.5, modified_modules=["b"]))
    params = random_params(delta)
    assert torch.equal(delta.apply(params, x), delta.apply(params, x))
    train = delta.mode(train=True)
    assert_acts(train.apply(params, x), train.apply(params, x))
    outs = train.apply_many(fd.broadcast(params, 2), x, engine="fold")
    assert_acts(outs[0], outs[1])


def test_compiled_and_in_threads() -> None:
    model, x = MLP().eval(), torch.randn(5, 4)
    delta = fd.DeltaModel(model, Beside(modified_modules=["a", "b"]))
    stack = random_params(delta, 4)
    alone = torch.stack([delta.apply(fd.take(stack, i), x) for i in range(4)])
    torch._dynamo.reset()
    one = torch.compile(lambda p: delta.apply(p, x), fullgraph=True, backend="eager")
    many = torch.compile(lambda s: delta.apply_many(s, x, engine="fold"), fullgraph=True, backend="eager")
    assert_close(one(fd.take(stack, 1)), alone[1])
    assert_close(many(stack), alone)
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(delta.apply(fd.take(stack, i), x), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    again = pickle.loads(pickle.dumps(delta))
    assert_close(again.apply(fd.take(stack, 2), x), alone[2])


def test_second_order() -> None:
    model, x = MLP().eval(), torch.randn(5, 4)
    delta = fd.DeltaModel(model, After(modified_modules=["b"]))
    bias, rest = fd.partition(random_params(delta), "0.bias")

    def loss(bias: dict[str, Tensor], run: Any) -> Tensor:
        return run(fd.combine(bias, rest)).square().sum()

    found = torch.func.hessian(lambda b: loss(b, lambda p: delta.apply(p, x)))(bias)
    expected = torch.func.hessian(lambda b: loss(b, lambda p: by_hand("sequential", model, p, x)))(bias)
    key = next(iter(bias))
    assert_close(found[key][key], expected[key][key])


def test_messages() -> None:
    register = fd.register_module
    with raises_saying(fd.errors.ConfigError, "insert='after'", "sequential"):
        register("test_bad", insert="after")
    with raises_saying(fd.errors.ConfigError, "'m'", "default"):
        register("test_bad")(lambda site, m: nn.Linear(m, m))
    with raises_saying(fd.errors.ConfigError, "'name'", "another name"):
        register("test_bad")(lambda site, name="x": nn.Linear(1, 1))
    with raises_saying(fd.errors.ConfigError, "sizes=[1]", "tuple"):
        register("test_bad")(lambda site, sizes=[1]: nn.Linear(1, 1))
    with raises_saying(fd.errors.ConfigError, "takes no argument", "site"):
        register("test_bad")(lambda: nn.Linear(1, 1))
    with raises_saying(fd.errors.ConfigError, "'lora'", "already"):
        register("lora")(After.make)
    assert "test_bad" not in METHODS
    cases = {
        "test_bad_type": (lambda site: torch.zeros(1), ("Tensor", "b", "nn.Module")),
        "test_bad_norm": (lambda site: nn.BatchNorm1d(8), ("BatchNorm1d", "track_running_stats=False")),
    }
    for name, (make, pieces) in cases.items():
        kind = register(name)(make)
        try:
            with raises_saying(fd.errors.ConfigError, *pieces):
                fd.DeltaModel(MLP(), kind(modified_modules=["b"]))
        finally:
            del METHODS[name]
    with raises_saying(fd.errors.ConfigError, "bottleneck", "m"):
        After(bottleneck=3)
    with raises_saying(fd.errors.ConfigError, "m=2.5"):
        After(m=2.5)
