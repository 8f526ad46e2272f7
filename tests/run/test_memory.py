"""A call leaves nothing behind: not in any kind of state that a module can hold, and nothing in the backbone."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from handmade import raises_saying
from torch import Tensor, nn

import funcdelta as fd


class Slots:
    """An object without a dict."""

    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


class Keeping(nn.Module):
    """(b, 4) to (b, 4); ``step(self)`` reads and changes what it keeps, and makes a factor of it."""

    def __init__(self, made: Any, step: Callable[[Any], Any]) -> None:
        super().__init__()
        self.a, self.held, self.step = nn.Linear(4, 4), made, step
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.step(self)


def slots(m: Any) -> Any:
    m.held.n += 1
    return m.held.n


def array(m: Any) -> Any:
    m.held += 1
    return float(m.held[0])


def queue(m: Any) -> Any:
    m.held.append(2.0)
    return sum(m.held)


def tensor_in_a_list(m: Any) -> Any:
    return m.held[0].add_(1).clone()


def tensor_in_an_object(m: Any) -> Any:
    return m.held.t.add_(1).clone()


def tensor_in_a_tuple(m: Any) -> Any:
    return m.held[0].add_(1).clone()


def deep(m: Any) -> Any:
    entries = m.held[0]["a"]["b"]["c"]
    entries[0] += 1
    return entries[0]


def data(m: Any) -> Any:
    m.seen.data.add_(1)
    return m.seen.clone()


def child(m: Any) -> Any:
    if "x" in m.held:
        return 2.0
    m.held["x"] = nn.Identity()
    return 1.0


def parameter(m: Any) -> Any:
    if "w" not in m._parameters:
        m.w = nn.Parameter(m.a.weight.detach().sum())
    return m.w


def buffer(m: Any) -> Any:
    if not m.a._buffers:
        m.a.register_buffer("sum", m.a.weight.detach().sum())
    return m.a.sum


def hook(m: Any) -> Any:
    m.held.register_forward_pre_hook(lambda module, args: None)
    return len(m.held._forward_pre_hooks)


def hidden(m: Any) -> Any:
    m.held[0].calls = getattr(m.held[0], "calls", 0) + 1
    return m.held[0].calls


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "slots": (Slots, slots),
    "array": (lambda: np.zeros(1), array),
    "deque": (collections.deque, queue),
    "count": (lambda: itertools.count(1), lambda m: next(m.held)),
    "iterator of a list": (lambda: iter([1.0, 2.0, 3.0]), lambda m: next(m.held)),
    "generator": (lambda: torch.Generator().manual_seed(0), lambda m: torch.rand((), generator=m.held)),
    "generator of numpy": (lambda: np.random.default_rng(0), lambda m: float(m.held.random())),
    "old generator of numpy": (lambda: np.random.RandomState(0), lambda m: float(m.held.rand())),
    "generator of Python": (lambda: random.Random(0), lambda m: m.held.random()),
    "deep": (lambda: [{"a": {"b": {"c": [0]}}}], deep),
    "tensor in a list": (lambda: [torch.zeros(())], tensor_in_a_list),
    "tensor in a tuple": (lambda: (torch.zeros(()),), tensor_in_a_tuple),
    "tensor in an object": (lambda: types.SimpleNamespace(t=torch.zeros(())), tensor_in_an_object),
    "data of a buffer": (int, data),
    "new child": (nn.ModuleDict, child),
    "new parameter": (int, parameter),
    "first buffer": (int, buffer),
    "first hook": (nn.Identity, hook),
    "module in a list": (lambda: [nn.Identity()], hidden),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_call_sees_what_an_earlier_one_left(kind: str) -> None:
    made, step = KINDS[kind]
    model, x = Keeping(made(), step), torch.randn(3, 4)
    untouched = copy.deepcopy(model)
    delta = fd.LoraModel(model, modified_modules=["a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    alone = [fd.LoraModel(copy.deepcopy(untouched), modified_modules=["a"], lora_r=2) for _ in range(2)]
    expected = [one.apply(fd.take(stack, i), x) for i, one in enumerate(alone)]
    for i in (0, 1, 0, 1):
        assert torch.equal(delta.apply(fd.take(stack, i), x), expected[i])
    torch.testing.assert_close(delta.apply_many(stack, x, engine="loop"), torch.stack(expected))
    torch.testing.assert_close(model(x), untouched(x))


class OfClass(nn.Module):
    """A cache that its class has."""

    cache: dict[str, Tensor] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if "sum" not in self.cache:
            self.cache["sum"] = self.a.weight.detach().sum()
        return self.a(x) + self.cache["sum"]


class OfMethod(nn.Module):
    """A method that remembers what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    @functools.lru_cache  # noqa: B019
    def table(self) -> Tensor:
        return self.a.weight.detach().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.table()


@pytest.mark.parametrize("kind", [OfClass, OfMethod])
def test_caches_of_classes_and_methods_hold_one_members_numbers_for_no_other(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(3, 4)
    delta = fd.LoraModel(model, modified_modules=["a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    for i in (0, 1):
        p = fd.take(stack, i)
        weight = model.a.weight + p["a.lora.scale"] * p["a.lora.lora_B"] @ p["a.lora.lora_A"]
        expected = nn.functional.linear(x, weight, model.a.bias) + weight.sum()
        torch.testing.assert_close(delta.apply(p, x), expected)
        torch.testing.assert_close(delta.apply_many(stack, x)[i], expected)


class InPlace(nn.Linear):
    """A constraint that is kept by every call."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.renorm_(2, 0, 0.5)
        return super().forward(x)


class Another(nn.Linear):
    """The same, by other storage."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


class Quiet(nn.Linear):
    """The same, by another name, where autograd does not look."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.weight
            weight.copy_(torch.renorm(weight, 2, 0, 0.5))
        return super().forward(x)


class Above(nn.Module):
    """The same, by the module above."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data.renorm_(2, 0, 0.5)
        return self.inner(x)


@pytest.mark.parametrize("kind", [InPlace, Another, Quiet, Above])
@pytest.mark.parametrize("site", ["0", "1"])
def test_a_forward_that_writes_parameters_writes_none_of_the_backbones(kind: Any, site: str) -> None:
    model, x = nn.Sequential(kind(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    if kind is Above and site == "0":
        with raises_saying(fd.errors.MatchError, "may write 0.inner.weight", 'exclude_modules=["0.inner"]'):
            fd.LoraModel(model, modified_modules=["0.inner"], lora_r=2)
        return
    delta = fd.LoraModel(model, modified_modules=[site], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    first = fd.take(stack, 0)
    outputs = [delta.apply(first, x), delta.apply_many(stack, x)[0], delta.bind(first)(x)]
    outputs.append(delta.apply_many(stack, x, engine="loop")[0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = delta.merged(first)(x)
    for output in outputs:
        torch.testing.assert_close(output, expected)
    with torch.no_grad():
        model[0].load_state_dict({name: 0.1 * tensor for name, tensor in model[0].state_dict().items()})
    torch.testing.assert_close(delta.apply(first, x), delta.merged(first)(x))


def clamped(tensor: Tensor) -> None:
    tensor.clamp_(min=0)


class Unseen(nn.Linear):
    """Writes where its code does not tell."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            clamped(self.weight)
        return super().forward(x)


def test_a_parameter_that_is_written_where_code_does_not_tell_is_told() -> None:
    delta = fd.LoraModel(nn.Sequential(Unseen(4, 4), nn.Linear(4, 4)), modified_modules=["1"])
    with raises_saying(
        fd.errors.StaleBackboneError, "0.weight was written in place", "weight = self.weight.clamp(min=0)"
    ):
        delta.apply(delta.init(0), torch.randn(2, 4))


def test_a_table_with_a_largest_norm_can_be_bound() -> None:
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 3))
    before, tokens = model[0].weight.detach().clone(), torch.randint(9, (3, 5))
    delta = fd.LoraModel(model, modified_modules=["1"], lora_r=2)
    params = fd.tree.randn_like(delta.init(0), seed=1)
    torch.testing.assert_close(delta.bind(params)(tokens), delta.merged(params)(tokens))
    assert torch.equal(before, model[0].weight)


class Doubled(nn.Module):
    """Has its layer run with twice its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.func.functional_call(self.a, {"weight": 2 * self.a.weight}, (x,)))


def test_a_site_that_runs_with_a_tensor_made_of_its_own_counts_the_delta_once() -> None:
    model, x = Doubled(), torch.randn(3, 4)
    delta = fd.LoraModel(model, modified_modules=["a", "head"], lora_r=2)
    stack = delta.init(0, n=2)
    calls: list[Callable[[], Any]] = [
        lambda: delta.apply(fd.take(stack, 0), x),
        lambda: delta.apply_many(stack, x),
        lambda: delta.bind(fd.take(stack, 0))(x),
    ]
    for call in calls:
        with raises_saying(fd.errors.MatchError, "reads a.weight", 'unfrozen_modules=["deltas", "a.weight"]'):
            call()
    trained = fd.LoraModel(model, modified_modules=["head"], lora_r=2, unfrozen_modules=["deltas", "a.weight"])
    stack = fd.tree.randn_like(trained.init(0, n=2), seed=1)
    expected = [trained.merged(fd.take(stack, i))(x) for i in range(2)]
    torch.testing.assert_close(trained.apply_many(stack, x), torch.stack(expected))


class Compiled(nn.Module):
    """Keeps an attribute and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.known = nn.Linear(4, 4), None
        self.register_buffer("table", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        if self.known is None:
            self.known = hidden.detach().sum()
        self.last = hidden
        return hidden + self.table + self.known


def test_compiled_calls_leave_nothing_behind_and_follow_buffers() -> None:
    model, x = Compiled(), torch.randn(3, 4)
    delta = fd.LoraModel(model, modified_modules=["a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    compiled = torch.compile(lambda p, x: delta.apply(p, x), backend="eager", fullgraph=True)
    for i in (0, 1, 0):
        torch.testing.assert_close(compiled(fd.take(stack, i), x), delta.apply(fd.take(stack, i), x))
    model.table.data.fill_(5.0)
    torch.testing.assert_close(compiled(fd.take(stack, 1), x), delta.apply(fd.take(stack, 1), x))


class Late(nn.Module):
    """Writes a buffer where its inputs are positive, and computes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kept = nn.Linear(4, 4), [torch.ones(4)]
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            self.change()
        return self.a(x) * self.scale * self.kept[0]

    def change(self) -> None:
        self.scale.mul_(2)


class LateSum(Late):
    def change(self) -> None:
        self.scale += 1


class LateEntry(Late):
    def change(self) -> None:
        self.scale[0] = 3.0


class LateUnseen(Late):
    def change(self) -> None:
        torch.add(self.scale, 1, out=self.scale)


class LateInList(Late):
    def change(self) -> None:
        self.kept[0].add_(1)


WAYS: dict[str, Callable[[fd.DeltaModel, dict[str, Tensor], Tensor], Tensor]] = {
    "apply": lambda delta, stack, x: delta.apply(fd.take(stack, 0), x),
    "many": lambda delta, stack, x: delta.apply_many(stack, x),
    "loop": lambda delta, stack, x: delta.apply_many(stack, x, engine="loop"),
    "rows": lambda delta, stack, x: delta.apply_rows(stack, [0, 1, 0], x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Late, LateSum, LateEntry, LateUnseen, LateInList])
@pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")
def test_a_graph_does_not_see_what_a_later_call_writes(kind: Any, way: str) -> None:
    delta, x = fd.LoraModel(kind(), modified_modules=["a"], lora_r=2), torch.rand(3, 4) + 1
    stack = {name: leaf.requires_grad_() for name, leaf in fd.tree.randn_like(delta.init(0, n=2), seed=1).items()}
    leaves = [stack["a.lora.lora_A"], stack["a.lora.lora_B"]]
    inputs = (-x, x, -2 * x, 2 * x)
    each = [torch.autograd.grad(WAYS[way](delta, stack, one).sum(), leaves) for one in inputs]
    together = torch.autograd.grad(sum((WAYS[way](delta, stack, one).sum() for one in inputs), torch.zeros(())), leaves)
    for found, *parts in zip(together, *each, strict=True):
        torch.testing.assert_close(found, torch.stack(parts).sum(0))


def clamp(t: Tensor) -> None:
    t.data.clamp_(-0.1, 0.1)


class Constrains(nn.Module):
    """Constrains the weight of the second of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.constrain()
        return self.a(self.b(x))

    def constrain(self) -> None:
        self.b.weight.data.clamp_(-0.1, 0.1)


class ByHelper(Constrains):
    def constrain(self) -> None:
        clamp(self.b.weight)


class ByInnerHelper(Constrains):
    def constrain(self) -> None:
        def bound(t: Tensor) -> None:
            t.data.clamp_(-0.1, 0.1)

        bound(self.b.weight)


class ByVariable(Constrains):
    def constrain(self) -> None:
        layer = self.b
        layer.weight.data.clamp_(-0.1, 0.1)


class OfBoth(Constrains):
    def constrain(self) -> None:
        for layer in (self.b, self.a):
            layer.weight.data.clamp_(-0.1, 0.1)


class OfEither(Constrains):
    def constrain(self) -> None:
        layer = self.a
        if self.b is not None:
            layer = self.b
        layer.weight.data.clamp_(-0.1, 0.1)


class OfOther(Constrains):
    def constrain(self) -> None:
        layer = self.b
        if self.a is not None:
            layer = self.a
        clamp(layer.weight)


class OfTied(Constrains):
    def __init__(self) -> None:
        super().__init__()
        self.a.weight = self.b.weight


@pytest.mark.parametrize("kind", [Constrains, ByHelper, ByInnerHelper, ByVariable])
def test_a_constraint_on_another_weight_is_no_reason_to_refuse(kind: Any) -> None:
    model, x = kind(), torch.randn(3, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delta = fd.LoraModel(model, modified_modules=["a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    found = [delta.apply(fd.take(stack, 0), x), delta.apply_many(stack, x)[0], delta.bind(fd.take(stack, 0))(x)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = delta.merged(fd.take(stack, 0))(x)
    for one in found:
        torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("kind", [OfBoth, OfEither, OfOther, OfTied])
def test_a_constraint_that_may_be_on_the_sites_own_weight_is_one(kind: Any) -> None:
    with raises_saying(fd.MatchError, "may write a.weight", 'exclude_modules=["a"]'):
        fd.LoraModel(kind(), modified_modules=["a"], lora_r=2).apply({}, torch.zeros(3, 4))
