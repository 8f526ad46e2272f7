"""Laws of a site's tensors that a forward reads by itself: by any way of reading they have the delta in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import assert_close, raises_saying
from test_acting import ENTRIES, enter
from torch import Tensor, nn

import funcdelta as fd

EYE = torch.eye(4)

READS: dict[str, Callable[[Any], Tensor]] = {
    "an attribute": lambda m: m.a.weight,
    "the first parameter": lambda m: next(m.a.parameters()),
    "the first parameter from above": lambda m: next(m.parameters()),
    "by name from above": lambda m: dict(m.named_parameters())["a.weight"],
    "get_parameter": lambda m: m.a.get_parameter("weight"),
    "get_parameter from above": lambda m: m.get_parameter("a.weight"),
    "the table": lambda m: m.a._parameters["weight"],
    "a state dict": lambda m: m.a.state_dict()["weight"],
    "a state dict from above": lambda m: m.state_dict()["a.weight"],
    "data": lambda m: next(m.a.parameters()).data,
    "a vector": lambda m: nn.utils.parameters_to_vector(m.a.parameters()).view(4, 4),
    "functional_call of another layer": lambda m: torch.func.functional_call(m.b, {"weight": m.a.weight}, (EYE,)).T,
}

DETACHED = {"a state dict", "a state dict from above", "data"}
"""What gives no gradient: not of the model either."""


class Reader(nn.Module):
    """Reads the weight of a layer that it does not call."""

    def __init__(self, read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.read(self).T


def unusable(read: str, entry: str) -> bool:
    """What is refused: by a call of torch's own, or because what is computed has no gradient."""
    if entry == "bind":
        return read in ("the table", "a state dict", "a state dict from above")  # a view holds its leaves alone
    return (entry == "compile" and "get_parameter" in read) or (entry == "value_and_grad" and read in DETACHED)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry != "fold"])
@pytest.mark.parametrize("read", READS)
@pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")
def test_whoever_reads_a_weight_gets_it_with_the_delta(read: str, entry: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Reader(READS[read]), nn.Tanh()), torch.randn(3, 4)
    delta = fd.LoraModel(model, modified_modules=["0.a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    if unusable(read, entry):
        with pytest.raises((KeyError, AttributeError, fd.ParamsError)):
            enter(entry, delta, stack, x)
        return
    expected = torch.tanh(x @ delta.merge(fd.take(stack, 0))["0.a.weight"].T)
    assert_close(enter(entry, delta, stack, x), expected)


class Asks(nn.Module):
    """Asks of all parameters what reads no numbers, and calls one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kinds = {p.dtype for p in self.parameters()} | {t.dtype for t in self.state_dict().values()}
        assert all(p.device == x.device and p.grad is None for p in self.parameters())
        for p in self.parameters():
            p.requires_grad_(False)
        whole = sum(p.numel() for p in self.parameters()) + sum(p.requires_grad for p in self.parameters())
        self.a.to(x.dtype)
        return self.a(x.to(kinds.pop())) * whole


@pytest.mark.parametrize("config", [fd.LoraConfig, fd.AdapterConfig, fd.BitFitConfig])
def test_who_asks_for_facts_alone_reads_no_weight(config: type[fd.BaseDeltaConfig]) -> None:
    model, x = Asks(), torch.randn(3, 4)
    delta = fd.DeltaModel(model, config(modified_modules=["a", "idle"]))
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    with pytest.warns(fd.errors.UnreachedWarning, match="idle"):
        delta.apply(fd.take(stack, 0), x)
    alone = fd.DeltaModel(model, config(modified_modules=["a"]))
    of_a = {name: leaf for name, leaf in stack.items() if name.startswith("a.")}
    expected = torch.stack([alone.apply(fd.take(of_a, i), x) for i in range(2)])
    for engine in ("fold", "loop"):  # torch.vmap refuses requires_grad_
        assert_close(delta.apply_many(stack, x, engine=engine), expected)
    assert_close(delta.bind(fd.take(stack, 0))(x), expected[0])


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda p: p.mul_(0.5),
    ".data": lambda p: p.data.mul_(0.5),
    "detached": lambda p: p.detach().clamp_(min=0),
    "foreach": lambda p: torch._foreach_mul_([p], 0.5),
    "setitem": lambda p: p.__setitem__(0, 1.0),
    "out=": lambda p: torch.ones(4, 4, out=p),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_what_is_read_with_the_delta_is_refused(write: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                WRITES[write](next(iter(self.parameters())))
            return self.a(x)

    model, x = Writes(), torch.randn(3, 4)
    before = model.a.weight.clone()
    delta = fd.LoraModel(model, modified_modules=["a"])
    with raises_saying(fd.StaleBackboneError, "a.weight was written in place", ".clone()"):
        delta.apply(delta.init(0), x)
    assert torch.equal(model.a.weight, before)
