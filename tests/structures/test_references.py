"""A copy of a backbone refers to itself alone: through closures, hooks, partial functions, globals and lists."""

from __future__ import annotations

import copy
import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import ENGINES, assert_acts, assert_close, random_params
from torch import Tensor, nn
from torch.nn import functional as F

import funcdelta as fd
from funcdelta.structures.modules.references import Globals, holders
from funcdelta.structures.modules.structure import copy_module, copy_structure


class Block(nn.Module):
    """(b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


def model() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.Linear(4, 3)).eval()


def closure(m: Any) -> None:
    old = m[0].forward
    m[0].forward = lambda x: old(x) * 3.0


def closure_in_a_closure(m: Any) -> None:
    old = m[0].forward

    def outer(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x) * 3.0

    m[0].forward = outer(outer(lambda x: old(x)))


def closure_that_calls_itself(m: Any) -> None:
    old = m[0].forward

    def forward(x: Tensor, again: int = 1) -> Tensor:
        return forward(old(x), again - 1) * 3.0 if again else old(x)

    m[0].forward = forward


def closure_over_a_list(m: Any) -> None:
    layers = [m[0].lin, torch.tanh, m[1].lin]
    m[0].forward = lambda x: functools.reduce(lambda y, layer: layer(y), layers, x)


def closure_over_a_dict_of_tuples(m: Any) -> None:
    layers = {"one": (m[0].lin, 3.0)}
    m[0].forward = lambda x: layers["one"][0](x) * layers["one"][1]


def closure_over_a_parameter(m: Any) -> None:
    weight = m[0].lin.weight
    m[0].forward = lambda x: x @ weight.T * 3.0


def default(m: Any) -> None:
    def forward(x: Tensor, old: Any = m[0].forward, *, lin: Any = m[0].lin) -> Tensor:
        return old(x) * 3.0 + lin(x)

    m[0].forward = forward


def partial(m: Any) -> None:
    def times(old: Any, factor: float, x: Tensor) -> Tensor:
        return old(x) * factor

    m[0].forward = functools.partial(times, m[0].forward, 3.0)


def partial_of_a_closure(m: Any) -> None:
    old = m[0].forward

    def times(factor: float, x: Tensor) -> Tensor:
        return old(x) * factor

    m[0].forward = functools.partial(times, 3.0)


def method_of_another(m: Any) -> None:
    m[1].forward = m[0].forward


def weak_reference(m: Any) -> None:
    first = weakref.ref(m[0].lin)

    def forward(x: Tensor) -> Tensor:
        layer = first()
        assert layer is not None
        return layer(x) * 3.0

    m[0].forward = forward


class Patch:
    """A callable object that holds what it replaces."""

    def __init__(self, old: Any) -> None:
        self.old = lambda x: old(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.old(x) * 3.0


def callable_object(m: Any) -> None:
    m[0].forward = Patch(m[0].forward)


def hook(m: Any) -> None:
    first = m[0].lin
    m[1].register_forward_hook(lambda module, args, output: output + first(output))


def hook_before(m: Any) -> None:
    first = m[0].lin
    m[1].register_forward_pre_hook(lambda module, args: (args[0] + first(args[0]),))


def hook_with_keywords(m: Any) -> None:
    def add(first: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output + first(output)

    m[1].register_forward_hook(functools.partial(add, m[0].lin), with_kwargs=True)


old_forward: Any = None
patched_lin: Any = None


def through_a_global(x: Tensor) -> Tensor:
    return old_forward(x) * 3.0


def through_a_global_of_a_global(x: Tensor) -> Tensor:
    return through_a_global(x) + patched_lin(x)


def globals_of_the_file(m: Any) -> None:
    global old_forward, patched_lin
    old_forward, patched_lin = m[0].forward, m[0].lin
    m[0].forward = through_a_global_of_a_global


def a_module_in_a_list(m: Any) -> None:
    m[1].others = [m[0].lin]
    m[1].forward = lambda x: torch.tanh(m[1].others[0](x))


def a_parameter_in_a_tuple(m: Any) -> None:
    m[1].others = (m[0].lin.bias,)
    old = m[1].forward
    m[1].forward = lambda x: old(x) + m[1].others[0]


PATCHES = [
    *(closure, closure_in_a_closure, closure_that_calls_itself, closure_over_a_list, closure_over_a_dict_of_tuples),
    *(default, partial, partial_of_a_closure, method_of_another, weak_reference, callable_object),
    *(hook, hook_before, hook_with_keywords, globals_of_the_file, a_module_in_a_list, closure_over_a_parameter),
    a_parameter_in_a_tuple,
]
# A copy's swap of a parameter does not reach what holds the tensor itself; for that there is `holders`.
HOLD_TENSORS = (closure_over_a_parameter, a_parameter_in_a_tuple)
by_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)


def everything(module: nn.Module) -> set[int]:
    return {id(child) for child in module.modules()} | {id(tensor) for tensor in module.parameters()}


@by_patch
def test_a_copy_computes_with_tensors_of_its_own(patch: Callable[[Any], None]) -> None:
    m, x = model(), torch.randn(5, 4)
    patch(m)
    copied = copy_module(m)
    assert torch.equal(copied(x), m(x))
    with torch.no_grad():
        copied[0].lin.weight.mul_(2.0)
        copied[0].lin.bias.add_(1.0)
        found = copied(x)
        assert_acts(found, m(x))
        m[0].lin.weight.mul_(2.0)
        m[0].lin.bias.add_(1.0)
        assert_close(found, m(x))


@by_patch
def test_a_structural_copy_shares_storage_and_nothing_else(patch: Callable[[Any], None]) -> None:
    m, x = model(), torch.randn(5, 4)
    patch(m)
    copied = copy_structure(m)
    assert not everything(copied) & everything(m)
    for mine, own in zip(copied.parameters(), m.parameters(), strict=True):
        assert mine.data_ptr() == own.data_ptr()
    calls: list[nn.Module] = []
    for child in m.modules():
        child.register_forward_pre_hook(lambda module, args: calls.append(module))
    assert copied(x).shape == (5, 3)
    assert calls == []
    again = copy_structure(copied)
    assert not everything(again) & everything(copied)
    assert torch.equal(again(x), copied(x))


@pytest.mark.parametrize(
    "patch", [p for p in PATCHES if p not in HOLD_TENSORS], ids=lambda patch: getattr(patch, "__name__", "")
)
def test_a_trained_leaf_acts_through_whatever_holds_its_layer(patch: Callable[[Any], None]) -> None:
    m, x = model(), torch.randn(5, 4)
    patch(m)
    delta = fd.LoraModel(m, lora_r=2, modified_modules=["2"], unfrozen_modules=["deltas", "0.lin"])
    params = delta.init(0) | {"0.lin.weight": torch.randn(4, 4)}
    kept = m[0].lin.weight.detach().clone()
    with torch.no_grad():
        bare, found = m(x), delta.apply(params, x)
        m[0].lin.weight.copy_(params["0.lin.weight"])
        expected = m(x)
        m[0].lin.weight.copy_(kept)
    assert_acts(expected, bare)
    assert_close(found, expected)
    assert_close(delta.bind(params)(x), expected)
    assert_close(delta.merged(params)(x), expected)
    assert torch.equal(m(x), bare)


def test_what_a_hook_fills_stays_what_it_was() -> None:
    m, x = model(), torch.randn(5, 4)
    seen: list[Tensor] = []
    first = m[0].lin

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(first(output))

    m[1].register_forward_hook(record)
    copy_structure(m)(x)
    assert len(seen) == 1


def test_functions_that_refer_to_nothing_copied_stay_the_same() -> None:
    m, beside = model(), nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        return beside(x)

    m[1].forward = forward
    copied = copy_structure(m)
    assert copied[1].forward is forward
    assert beside.weight.requires_grad


def test_globals_are_read_when_they_are_wanted() -> None:
    known: dict[str, Any] = {"old": 1, "scale": 2}
    own = Globals(known)
    own["old"] = 3
    read = eval("lambda: (old, scale, len([]))", own)
    assert read() == (3, 2, 0)
    known["scale"] = 4
    assert read() == (3, 4, 0)
    assert known["old"] == 1


# -- compiled backbones --------------------------------------------------------------------------------------------


def compiled_module(m: nn.Module) -> nn.Module:
    return torch.compile(m, backend="eager")  # type: ignore[return-value]


def compiled_in_place(m: nn.Module) -> nn.Module:
    m.compile(backend="eager")
    return m


def compiled_forward(m: nn.Module) -> nn.Module:
    m.forward = torch.compile(m.forward, backend="eager")  # type: ignore[method-assign]
    return m


def compiled_block(m: Any) -> nn.Module:
    m[0] = torch.compile(m[0], backend="eager")
    return m


@pytest.mark.parametrize("compiling", [compiled_module, compiled_in_place, compiled_forward, compiled_block])
def test_a_compiled_backbone_runs_eagerly_under_its_own_names(compiling: Callable[[Any], nn.Module]) -> None:
    plain, x = model(), torch.randn(5, 4)
    names = ["lin", "2"]
    reference = fd.LoraModel(plain, lora_r=2, modified_modules=names)
    m = compiling(copy.deepcopy(plain))
    with torch.no_grad():
        m(x)
    delta = fd.LoraModel(m, lora_r=2, modified_modules=names)
    assert set(delta.sites) <= set(dict(m.named_modules()))
    stack = random_params(delta, 3)
    short = {name.replace("_orig_mod.", ""): leaf for name, leaf in stack.items()}
    assert list(short) == list(reference.names)
    expected = torch.stack([reference.apply(fd.take(short, i), x) for i in range(3)])
    torch._dynamo.reset()
    counters = importlib.import_module("torch._dynamo.utils").counters
    frames = counters["frames"]["total"]
    for engine in ENGINES:
        assert_close(delta.apply_many(stack, x, engine=engine), expected)
    assert_close(delta.bind(fd.take(stack, 1))(x), expected[1])
    assert counters["frames"]["total"] == frames
    assert_close(delta.merged(fd.take(stack, 1))(x), expected[1])


# -- what holds a tensor beside its slot ---------------------------------------------------------------------------


class Keeps(nn.Module):
    """Holds its one weight in every way: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("shift", torch.randn(4))
        self.in_list = [self.weight, [self.weight]]
        self.in_dict = {"w": self.weight}
        self.in_tuple = ((self.weight, 1), self.shift)
        self.unregistered = [nn.Linear(4, 4, bias=False)]
        self.unregistered[0].weight = self.weight
        weight = self.weight
        self.function = lambda x: x @ weight
        object.__setattr__(self, "plain", self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight + x @ self.in_list[0] + x @ self.in_list[1][0] + x @ self.in_dict["w"]
        x = x + x @ self.in_tuple[0][0] * self.in_tuple[0][1] + self.in_tuple[1]
        return self.function(self.unregistered[0](x)) + x @ self.plain


def test_holders_are_all_places_and_swapping_them_swaps_the_tensor() -> None:
    m, x = nn.Sequential(Keeps()), torch.randn(3, 4)
    copied = copy_structure(m)
    found = holders(copied)
    assert {name: len(places) for name, places in found.items()} == {"0.weight": 7, "0.shift": 1}
    new, shift = torch.randn(4, 4), torch.randn(4)
    before = copied(x)
    for name, value in (("0.weight", new), ("0.shift", shift)):
        for place, key in found[name]:
            place[key] = value
    copied[0]._parameters["weight"] = new  # type: ignore[assignment]
    y = 4 * (x @ new)
    y = y + y @ new + shift
    assert_close(copied(x), F.linear(y, new) @ new + y @ new)
    own = dict(m.named_parameters())["0.weight"], dict(m.named_buffers())["0.shift"]
    for place, key in found["0.weight"]:
        place[key] = own[0]
    for place, key in found["0.shift"]:
        place[key] = own[1]
    copied[0]._parameters["weight"] = own[0]
    assert torch.equal(copied(x), before)


def test_an_unregistered_parameter_shares_storage_too() -> None:
    m = nn.Sequential(nn.Linear(4, 4))
    m.beside = [nn.Linear(4, 4), nn.Parameter(torch.zeros(3))]
    copied = copy_structure(m)
    assert copied.beside[0] is not m.beside[0]
    assert copied.beside[0].weight.data_ptr() == m.beside[0].weight.data_ptr()
    assert copied.beside[1].data_ptr() == m.beside[1].data_ptr()
    assert not copied.beside[1].requires_grad


class Recurrent(nn.Module):
    """An LSTM and a head: (b, s, 4) to (b, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def test_every_trained_leaf_of_an_lstm_acts() -> None:
    m, x = Recurrent().eval(), torch.randn(2, 3, 4)
    delta = fd.LoraModel(m, lora_r=2, modified_modules=["head"], unfrozen_modules=["deltas", "lstm"])
    params, bare = random_params(delta), m(x)
    trained = {name: leaf for name, leaf in params.items() if name.startswith("lstm.")}
    assert len(trained) == 4
    hand = copy.deepcopy(m)
    hand.load_state_dict(delta.merge(params))
    assert_close(delta.apply(params, x), hand(x))
    found = torch.func.grad(lambda p: delta.apply(p, x).square().sum())(params)
    hand(x).square().sum().backward()
    for name in trained:
        assert_acts(delta.apply(params | {name: trained[name] + 0.5}, x), delta.apply(params, x))
        assert_close(found[name], hand.get_parameter(name).grad)
    assert torch.equal(delta.apply({}, x), bare)


def test_a_table_that_shortens_its_rows_has_no_memory() -> None:
    m = nn.Sequential(nn.Embedding(11, 4, max_norm=0.5), nn.Linear(4, 3)).eval()
    tokens, weight = torch.arange(10).view(2, 5), m[0].weight.detach().clone()
    delta = fd.LoraModel(m, lora_r=2, modified_modules=["0"])
    params = random_params(delta)
    before = delta.apply(params, tokens)
    delta.apply({}, tokens)
    assert torch.equal(delta.apply(params, tokens), before)
    assert torch.equal(m[0].weight, weight)
    with torch.no_grad():
        m[0].weight.mul_(-1.0)
        moved = delta.apply(params, tokens)
    assert_acts(moved, before)
    hand = copy.deepcopy(m)
    hand.load_state_dict(delta.merge(params))
    assert_close(moved, hand(tokens))
