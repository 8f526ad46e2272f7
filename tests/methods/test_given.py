"""What a method's functions give, and what they write into: a slip is told with the site, before it does harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from custom_methods import DoraConfig
from handmade import raises_saying
from torch import Tensor, nn

import funcdelta as fd

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def delta_of(base: type[fd.BaseDeltaConfig] = fd.BaseDeltaConfig, **functions: Any) -> fd.DeltaModel:
    own: dict[str, Any] = {
        "init": lambda self, site, rng: {"a": torch.ones(()), "all": fd.Leaf(torch.ones(()), of="all")},
        **functions,
    }
    config = dataclass(frozen=True)(type("Mine", (base,), own))
    return fd.DeltaModel(backbone(), config(modified_modules=["0", "2"]))


AFTER: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "nothing": (lambda self, site, p, y, x: None, ["NoneType", "at 0", "tensor"]),
    "a tuple": (lambda self, site, p, y, x: (y,), ["tuple", "at 0"]),
    "another shape": (lambda self, site, p, y, x: y.sum(-1), ["at 0", "shape"]),
    "one row for all": (lambda self, site, p, y, x: y[:1], ["at 0", "(1, 8)"]),
    "one axis more": (lambda self, site, p, y, x: y.unsqueeze(0), ["at 0", "shape"]),
    "whole numbers": (lambda self, site, p, y, x: y.long(), ["at 0", "torch.int64", "torch.float32"]),
    "complex numbers": (lambda self, site, p, y, x: y + 0j, ["at 0", "torch.complex64"]),
    "y in place": (lambda self, site, p, y, x: y.add_(1), ["at 0", "in place", "y = y + change"]),
    "x in place": (lambda self, site, p, y, x: y + 0 * x.mul_(2).sum(), ["at 0", "in place"]),
    "a leaf in place": (lambda self, site, p, y, x: y + p["a"].add_(1), ["at 0", "p['a']", "p['a'] * 2"]),
    "what all have in place": (lambda self, site, p, y, x: y + p["all"].mul_(2), ["at 0", "p['all']"]),
    "draws": (lambda self, site, p, y, x: y + torch.randn_like(y), ["at 0", "drew", "site.training"]),
}


@pytest.mark.parametrize("engine", ["apply", "loop", "vmap", "fold"])
@pytest.mark.parametrize("tokenwise", [False, True])
@pytest.mark.parametrize("name", AFTER)
def test_what_after_may_not_do(name: str, tokenwise: bool, engine: str) -> None:
    after, words = AFTER[name]
    delta = delta_of(after=after, tokenwise=lambda self, site: tokenwise)
    stack = delta.init(0, n=3)
    with raises_saying(fd.ConfigError, *words):
        if engine == "apply":
            delta.apply(fd.take(stack, 0), X)
        else:
            delta.apply_many(stack, X, engine=engine)


def test_a_method_may_draw_in_training() -> None:
    delta = delta_of(after=lambda self, site, p, y, x: nn.functional.dropout(y, 0.5, site.training))
    params = delta.init(0)
    assert torch.equal(delta.apply(params, X), delta.apply(params, X))
    training = delta.mode(train=True)
    assert not torch.equal(training.apply(params, X), training.apply(params, X))


def rewriting(change: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, site, p, w: change(p, w)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (rewriting(lambda p, w: None), ["NoneType", "at 0"]),
        (rewriting(lambda p, w: w["weight"]), ["at 0", 'w["weight"] + change']),
        (rewriting(lambda p, w: {"weight": 1.0}), ["float", "'weight' at 0"]),
        (rewriting(lambda p, w: {"weight": w["weight"][:, :2]}), ["(8, 2)", "(8, 4)"]),
        (rewriting(lambda p, w: {"weight": w["weight"].long()}), ["torch.int64"]),
        (rewriting(lambda p, w: w | {"wieght": w["weight"] * 2}), ["'wieght'", "weight"]),
        (rewriting(lambda p, w: {"weight": w["weight"].mul_(2)}), ["'weight' of 0 in place", "w["]),
        (rewriting(lambda p, w: {"weight": w["weight"] * p["a"].add_(1)}), ["p['a'] in place"]),
    ],
)
def test_what_weights_may_not_do(weights: Callable[..., Any], words: list[str]) -> None:
    with raises_saying(fd.ConfigError, *words):
        delta_of(weights=weights)


@pytest.mark.parametrize(
    ("functions", "words"),
    [
        ({"change": lambda self, site, p: None}, ["NoneType", "(8, 4)"]),
        ({"change": lambda self, site, p: p["a"]}, ["()", "(8, 4)", "matrix_shape"]),
        ({"change": lambda self, site, p: p["a"] + torch.zeros(8, 1)}, ["(8, 1)", "(8, 4)"]),
        ({"low_rank": lambda self, site, p: (p["a"], p["a"])}, ["tuple", "fd.LowRank"]),
        (
            {"low_rank": lambda self, site, p: fd.LowRank(p["a"] + torch.zeros(2, 4), torch.zeros(8, 2), p["a"])},
            ["(2, 4)", "(8, 2)", "b (8, r)", "a (r, 4)"],
        ),
    ],
)
def test_a_change_has_the_shape_of_the_matrix(functions: dict[str, Any], words: list[str]) -> None:
    with raises_saying(fd.ConfigError, *words):
        delta = delta_of(fd.Additive, **functions)
        delta.merge(delta.init(0))


# -- what is read of the site ------------------------------------------------------------------------------------------


def reading(*names: str) -> Any:
    @dataclass(frozen=True)
    class Reads(fd.BaseDeltaConfig):
        reads: ClassVar[Any] = names

        def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
            return {"a": torch.zeros(())}

        def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
            return y + p["a"] * next(leaf for name, leaf in p.items() if name.startswith("own.")).sum()

    return Reads


def test_what_cannot_be_read_is_refused() -> None:
    with raises_saying(fd.MatchError, "'wieght'", "weight"):
        fd.DeltaModel(backbone(), reading("wieght")(modified_modules=["0"]))
    text: Any = reading()
    text.reads = "weight"
    with raises_saying(fd.ConfigError, "('weight',)"):
        fd.DeltaModel(backbone(), text(modified_modules=["0"]))
    with raises_saying(fd.MatchError, "running_mean", "buffer", "exclude_modules=['1']"):
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        fd.DeltaModel(model, reading("running_mean")(modified_modules=["1"]))
    computed = backbone()
    nn.utils.parametrizations.weight_norm(computed[0])
    with raises_saying(fd.MatchError, "weight", "parametrised"):
        fd.DeltaModel(computed, reading("weight")(modified_modules=["0"]))


def test_what_a_call_is_given_for_a_tensor_is_what_the_method_reads() -> None:
    model = backbone()
    delta = fd.DeltaModel(model, DoraConfig(modified_modules=["0", "2"]))
    params = {name: leaf + 0.1 * torch.randn(leaf.shape) for name, leaf in delta.init(0).items()}
    weight = model[0].weight.detach() * torch.rand(8, 1)
    other = backbone()
    with torch.no_grad():
        other[0].weight.copy_(weight)
    expected = fd.DeltaModel(other, DoraConfig(modified_modules=["0", "2"])).apply(params, X)
    for _ in range(2):  # the first call, and a later one
        torch.testing.assert_close(delta.apply(params | {"0.weight": weight}, X), expected)
    torch.testing.assert_close(delta.bind(params | {"0.weight": weight})(X), expected)

    def loss(weight: Tensor, merged: bool) -> Tensor:
        full = params | {"0.weight": weight}
        out = torch.func.functional_call(model, delta.merge(full), (X,)) if merged else delta.apply(full, X)
        return out.square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(weight, False), torch.func.grad(loss)(weight, True))
