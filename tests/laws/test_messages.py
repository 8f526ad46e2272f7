"""Every error says where, what was expected, what was found, and what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import MLP, Block, raises_saying
from torch import Tensor, nn

import funcdelta as fd


class World:
    """One delta, its params and inputs; every case below is wrong about one of them."""

    def __init__(self) -> None:
        self.model = MLP().eval()
        self.delta = fd.LoraModel(
            self.model, lora_r=2, modified_modules=["a", "b"], unfrozen_modules=["deltas", "head"]
        )
        self.params, self.stack = self.delta.init(0), self.delta.init(0, n=3)
        self.x = torch.randn(5, 4)

    def apply(self, **changes: Tensor | None) -> Any:
        """``apply`` with some leaves (dots written as ``__``) changed, or left out with ``None``."""
        params: dict[str, Any] = dict(self.params)
        for name, leaf in changes.items():
            params.pop(name.replace("__", "."), None)
            if leaf is not None:
                params[name.replace("__", ".")] = leaf
        return self.delta.apply(params, self.x)

    def many(self, *args: Any, **options: Any) -> Any:
        return self.delta.apply_many(self.stack, *(args or (self.x,)), **options)

    def rows(self, index: Any) -> Any:
        return self.delta.apply_rows(self.stack, index, self.x)


Case = tuple[type[Exception], Callable[[World], Any], tuple[str, ...]]

PARAMS: dict[str, Case] = {
    "a misspelt leaf": (
        fd.errors.ParamsError,
        lambda w: w.apply(a__lora__lora_A=None, a__lora__lora_a=torch.zeros(2, 4)),
        ("'a.lora.lora_a'", "not a leaf", "a.lora.lora_A"),
    ),
    "a leaf of another delta": (
        fd.errors.ParamsError,
        lambda w: w.apply(a__adapter__up=torch.zeros(1)),
        ("a.adapter.up",),
    ),
    "a missing leaf": (
        fd.errors.ParamsError,
        lambda w: w.apply(a__lora__lora_A=None),
        ("lacks 1 of the 6", "'a.lora.lora_A'", "all of them, or none"),
    ),
    "a wrong shape": (
        fd.errors.ParamsError,
        lambda w: w.apply(a__lora__lora_A=torch.zeros(3, 4)),
        ("a.lora.lora_A", "(3, 4)", "(2, 4)"),
    ),
    "a wrong shape of a backbone leaf": (
        fd.errors.ParamsError,
        lambda w: w.apply(b__weight=torch.zeros(3, 4)),
        ("b.weight", "(3, 4)", "(8, 8)"),
    ),
    "a number for a tensor": (
        fd.errors.ParamsError,
        lambda w: w.apply(a__lora__scale=2.0),
        ("a.lora.scale", "float", "tensor"),
    ),
    "no dict": (
        fd.errors.ParamsError,
        lambda w: w.delta.apply(list(w.params.values()), w.x),
        ("list", "delta.init(seed)"),
    ),
    "a stack for one member": (
        fd.errors.StackError,
        lambda w: w.delta.apply(w.stack, w.x),
        ("3 members", "(3, 2, 4)", "(2, 4)", "delta.apply_many(stack", "fd.take(stack, 0)"),
    ),
    "one member for a stack": (
        fd.errors.StackError,
        lambda w: w.delta.apply_many(w.params, w.x),
        ("one member", "a.lora.lora_A", "(2, 4)", "delta.apply(params", "fd.stack([params])"),
    ),
    "one member for rows": (
        fd.errors.StackError,
        lambda w: w.delta.apply_rows(w.params, [0] * 5, w.x),
        ("one member",),
    ),
    "a stack to merge": (fd.errors.StackError, lambda w: w.delta.merge(w.stack), ("3 members", "fd.take(stack, 0)")),
    "a stack to bind": (fd.errors.StackError, lambda w: w.delta.bind(w.stack), ("3 members", "fd.take(stack, 0)")),
    "a stack to attach": (fd.errors.StackError, lambda w: w.delta.attach(w.stack), ("3 members", "fd.take(stack, 0)")),
    "an uneven stack": (
        fd.errors.ParamsError,
        lambda w: w.delta.apply_many({**w.stack, "b.lora.scale": torch.ones(2)}, w.x),
        ("b.lora.scale", "(2,)", "(n)"),
    ),
    "an empty stack": (fd.errors.ParamsError, lambda w: w.delta.apply_many({}, w.x), ("stack", "delta.init(seed, n=")),
    "a backbone leaf in a stack": (
        fd.errors.ParamsError,
        lambda w: w.delta.apply_many({**w.stack, "b.weight": torch.zeros(3, 8, 8)}, w.x),
        ("b.weight", "unfrozen_modules"),
    ),
    "no members": (fd.ParamsError, lambda w: w.delta.init(0, n=0), ("n=0", "at least 1")),
    "half a member": (fd.ParamsError, lambda w: w.delta.init(0, n=2.5), ("n=2.5",)),
    "leaves of whole numbers": (fd.ParamsError, lambda w: w.delta.init(0, dtype=torch.int32), ("int32", "floating")),
    "fewer than none": (fd.ParamsError, lambda w: w.delta.init(0, n=-1), ("n=-1",)),
    "seeds and another n": (fd.ParamsError, lambda w: w.delta.init([1, 2], n=3), ("n=3", "2 seeds")),
}
CALLS: dict[str, Case] = {
    "an unknown engine": (
        fd.errors.ParamsError,
        lambda w: w.many(engine="fast"),
        ("'fast'", "fold", "vmap", "loop", "auto"),
    ),
    "in_dims=1": (fd.errors.ParamsError, lambda w: w.many(in_dims=1), ("in_dims=1", "None", "0")),
    "in_dims of no input": (fd.errors.ParamsError, lambda w: w.many(in_dims={"y": 0}), ("'y'", "not an input", "x")),
    "in_dims of 2": (fd.errors.ParamsError, lambda w: w.many(in_dims={"x": 2}), ("in_dims['x']=2", "0", "None")),
    "no member axis": (
        fd.errors.ParamsError,
        lambda w: w.many(in_dims=0),
        ("x", "(5, 4)", "3 members", "in_dims={'x': None}"),
    ),
    "no input": (fd.errors.FoldError, lambda w: w.delta.apply_many(w.stack, engine="fold"), ("rows", "none")),
    "inputs of unlike rows": (
        fd.errors.FoldError,
        lambda w: fd.LoraModel(Sum(), modified_modules=["layer"]).apply_many(
            fd.LoraModel(Sum(), modified_modules=["layer"]).init(0, n=2),
            torch.zeros(5, 4),
            torch.zeros(3, 4),
            engine="fold",
        ),
        ("other", "3", "5", "(3, 4)", "in_dims={'other': None}"),
    ),
    "chunk_size=0": (fd.errors.ParamsError, lambda w: w.many(chunk_size=0), ("chunk_size=0", "at least 1")),
    "half a chunk": (fd.errors.ParamsError, lambda w: w.many(chunk_size=1.5), ("chunk_size=1.5", "whole number")),
    "a member too far": (fd.errors.ParamsError, lambda w: w.rows([0, 0, 0, 0, 3]), ("3", "0 to 2", "-1")),
    "a member too near": (fd.errors.ParamsError, lambda w: w.rows([0, 0, 0, 0, -2]), ("-2", "0 to 2", "-1")),
    "too few rows": (fd.errors.ParamsError, lambda w: w.rows([0, 1]), ("2", "5")),
    "no integers": (fd.errors.ParamsError, lambda w: w.rows([0.0] * 5), ("float32", "integers")),
    "no index": (fd.errors.ParamsError, lambda w: w.rows(None), ("None", "one integer per row")),
    "an index of two axes": (fd.errors.ParamsError, lambda w: w.rows([[0] * 5]), ("(1, 5)", "(b,)")),
    "a member that is not there": (fd.errors.ParamsError, lambda w: fd.take(w.stack, 3), ("3", "0 to 2")),
    "losses with two axes": (
        fd.errors.ParamsError,
        lambda w: fd.value_and_grad(lambda s: w.delta.apply_many(s, w.x).sum(-1))(w.stack),
        ("(3, 5)", "(n,)"),
    ),
    "aux without has_aux": (
        fd.errors.ParamsError,
        lambda w: fd.value_and_grad(lambda s: (w.delta.apply_many(s, w.x).sum((1, 2)), 1))(w.stack),
        ("tuple", "has_aux=True"),
    ),
    "a loss without a gradient": (
        fd.errors.ParamsError,
        lambda w: fd.value_and_grad(lambda s: w.delta.apply_many(s, w.x).detach().sum((1, 2)))(w.stack),
        ("does not depend on the params",),
    ),
    "a chunk of nothing": (
        fd.errors.ParamsError,
        lambda w: fd.value_and_grad(lambda p: w.delta.apply(p, w.x).sum(), chunk_size=0)(w.stack),
        ("chunk_size=0", "at least 1"),
    ),
    "dims of two data": (
        fd.errors.ParamsError,
        lambda w: fd.value_and_grad(lambda p, x: w.delta.apply(p, x).sum(), in_dims=(0, 0))(w.stack, w.x),
        ("in_dims=(0, 0)", "1 data"),
    ),
}
MAKING: dict[str, Case] = {
    "no module": (fd.errors.ConfigError, lambda w: fd.LoraModel("bert", modified_modules=["a"]), ("str", "nn.Module")),
    "config first": (
        fd.errors.ConfigError,
        lambda w: fd.DeltaModel(fd.LoraConfig(), w.model),
        ("LoraConfig", "nn.Module"),
    ),
    "no config": (fd.errors.ConfigError, lambda w: fd.DeltaModel(w.model), ("nothing", "fd.LoraConfig")),
    "a dict for a config": (
        fd.errors.ConfigError,
        lambda w: fd.DeltaModel(w.model, {"delta_type": "lora"}),
        ("dict", "fd.LoraConfig"),
    ),
    "an unknown field": (
        fd.errors.ConfigError,
        lambda w: fd.LoraModel(w.model, modified_modules=["a"], lora_rank=3),
        ("LoraConfig", "'lora_rank'", "lora_r"),
    ),
    "an unknown type": (
        fd.errors.ConfigError,
        lambda w: fd.AutoDeltaConfig.from_dict({"delta_type": "loar"}),
        ("'loar'", "lora"),
    ),
    "no type": (fd.errors.ConfigError, lambda w: fd.AutoDeltaConfig.from_dict({"lora_r": 2}), ("delta_type", "lora")),
    "an unknown activation": (
        fd.errors.ConfigError,
        lambda w: fd.AdapterConfig(non_linearity="geluu"),
        ("'geluu'", "gelu"),
    ),
    "a bottleneck of nothing": (
        fd.errors.ConfigError,
        lambda w: fd.AdapterConfig(bottleneck_dim=0),
        ("bottleneck_dim=0",),
    ),
    "an unknown start": (
        fd.errors.ConfigError,
        lambda w: fd.LoraConfig(unfrozen_init="random"),
        ("'random'", '"copy"', '"fresh"'),
    ),
    "half a rank": (fd.errors.ConfigError, lambda w: fd.LoraConfig(lora_r=2.5), ("lora_r=2.5",)),
    "a rank in letters": (fd.errors.ConfigError, lambda w: fd.LoraConfig(lora_r="8"), ("lora_r='8'",)),
    "names that are numbers": (
        fd.errors.ConfigError,
        lambda w: fd.LoraModel(w.model, modified_modules=[0]),
        ("modified_modules", "0"),
    ),
    "a batch axis from the end": (fd.errors.ConfigError, lambda w: fd.LoraConfig(batch_dim=-1), ("batch_dim=-1",)),
    "parts in letters": (fd.errors.ConfigError, lambda w: fd.LoraConfig(enable_lora="q"), ("enable_lora",)),
    "a name with a dot": (fd.errors.ConfigError, lambda w: fd.LoraConfig(name="a.b"), ("'a.b'", "dot")),
    "two batch axes": (
        fd.errors.ConfigError,
        lambda w: fd.DeltaModel(
            w.model, fd.LoraConfig(modified_modules=["a"]), fd.LoraConfig(modified_modules=["b"], batch_dim=1)
        ),
        ("batch_dim", "[0, 1]"),
    ),
    "a taken method name": (
        fd.errors.ConfigError,
        lambda w: fd.register("lora")(fd.AdapterConfig),
        ("'lora'", "LoraConfig", "AdapterConfig"),
    ),
    "no dataclass": (
        fd.errors.ConfigError,
        lambda w: fd.register("test_messages_plain")(type("Plain", (), {})),
        ("Plain", "@dataclass(frozen=True)"),
    ),
    "no init": (
        fd.errors.ConfigError,
        lambda w: fd.DeltaModel(w.model, NoInit(modified_modules=["a"])),
        ("NoInit", "init(self, site, rng)"),
    ),
    "a container": (
        fd.errors.MatchError,
        lambda w: fd.LoraModel(nn.Sequential(Block()), modified_modules=["0"]),
        ("0", "Block", "inner"),
    ),
    "what is no view": (fd.errors.ParamsError, lambda w: fd.unbind(w.model), ("MLP", "delta.bind(params)")),
}


class NoInit(fd.BaseDeltaConfig):
    """A method that forgot its leaves."""

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y


class Sum(nn.Module):
    """Adds a second input to a layer of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.layer(x) + other


@pytest.fixture(scope="module")
def world() -> World:
    return World()


CASES = PARAMS | CALLS | MAKING


@pytest.mark.parametrize("case", CASES)
def test_message(case: str, world: World) -> None:
    kind, write, pieces = CASES[case]
    with raises_saying(kind, *pieces):
        write(world)


@pytest.mark.parametrize("case", CASES)
def test_messages_are_sentences_of_one_paragraph(case: str, world: World) -> None:
    kind, write, _ = CASES[case]
    with pytest.raises(kind) as caught:
        write(world)
    message = str(caught.value)
    assert isinstance(caught.value, fd.errors.FuncdeltaError)
    assert message.endswith((".", "?", ")", "…"))
    assert message[0] == message[0].upper() or not message[0].isalpha() or " " in message
    assert "  " not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (fd.errors.MatchError, ValueError),
        (fd.errors.ConfigError, ValueError),
        (fd.errors.ParamsError, ValueError),
        (fd.errors.StackError, fd.errors.ParamsError),
        (fd.errors.FoldError, RuntimeError),
        (fd.errors.FoldError, fd.errors.EngineError),
        (fd.errors.MergeError, ValueError),
        (fd.errors.CheckpointError, ValueError),
        (fd.errors.StaleBackboneError, RuntimeError),
    ],
)
def test_errors_are_of_the_usual_kinds_too(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, fd.errors.FuncdeltaError)
    assert issubclass(kind, builtin)


def test_an_error_of_torch_at_a_site_tells_the_site_and_shapes(world: World) -> None:
    with pytest.raises(RuntimeError) as caught:
        world.delta.apply(world.params, torch.randn(5, 7))
    assert "shapes" in str(caught.value)


def test_wrong_params_change_nothing(world: World) -> None:
    expected = world.delta.apply(world.params, world.x)
    for case in PARAMS:
        kind, write, _ = PARAMS[case]
        with pytest.raises(kind):
            write(world)
    assert torch.equal(world.delta.apply(world.params, world.x), expected)
