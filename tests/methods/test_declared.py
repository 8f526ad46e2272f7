"""What a method says of its leaves: names, axes and kinds that are wrong are told as the delta is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from handmade import raises_saying
from torch import Tensor, nn

import funcdelta as fd


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def method(make: Callable[..., Any]) -> fd.BaseDeltaConfig:
    @dataclass(frozen=True)
    class Mine(fd.BaseDeltaConfig):
        def leaves(self, site: fd.Site, own: Mapping[str, Tensor], rng: torch.Generator) -> fd.Leaves:
            return make(site, own, rng)

        def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
            return y + sum(leaf.sum() for leaf in p.values())

    return Mine(modified_modules=["0", "2"])


def leaf(value: Tensor, *args: Any, **said: Any) -> Callable[..., Any]:
    return lambda site, own, rng: {"a": fd.Leaf(value, *args, **said)}


def named(*names: Any) -> Callable[..., Any]:
    return lambda site, own, rng: dict.fromkeys(names, torch.zeros(()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (named("own.weight"), ["'own.weight'", "reads"]),
        (named(""), ["''", "empty"]),
        (named("a..b"), ["'a..b'", "empty"]),
        (named("forward"), ["'forward'", "attribute"]),
        (named("a", "a.b"), ["'a.b'", "below"]),
        (named(1), ["called 1", "name"]),
        (leaf(torch.zeros(2, 4), "rank"), ["'rank'", "(2, 4)", "one word an axis"]),
        (leaf(torch.zeros(2, 4), ["rank", "."]), ["['rank', '.']", '"rank ."']),
        (leaf(torch.zeros(2, 2), "rank rank"), ["Two axes of 'a'", "'rank'"]),
        (leaf(torch.zeros(2, 4), "x*rank ."), ["'x*rank'", '"3*name"']),
        (leaf(torch.zeros(2, 4), "0*rank ."), ["'0*rank'"]),
        (leaf(torch.zeros(2, 4), "3*rank ."), ["whole pieces", "'rank'"]),
        (
            lambda site, own, rng: {"a": fd.Leaf(torch.zeros(2), "rank"), "b": fd.Leaf(torch.zeros(3), "rank")},
            ["'rank'", "'a' has 2", "'b' 3", "another name"],
        ),
        (leaf(torch.zeros(2), trains="no"), ["trains='no'", "True or False"]),
        (leaf(torch.zeros(2), of="members"), ["'members'", '"member" or "all"']),
        (leaf(torch.zeros(2).to_sparse()), ["sparse", "dense"]),
        (lambda site, own, rng: {"a": own["wieght"]}, ["0.wieght", "weight, bias", 'own.get("wieght")']),
    ],
)
def test_what_is_refused(make: Callable[..., Any], words: list[str]) -> None:
    with raises_saying(fd.ConfigError, *words):
        fd.DeltaModel(backbone(), method(make))


@pytest.mark.parametrize("name", ["in_features", "forward", "training", "weight"])
def test_a_delta_is_not_called_as_what_its_module_has(name: str) -> None:
    with raises_saying(fd.MatchError, repr(name), f"name='{name}_delta'"):
        fd.LoraModel(backbone(), modified_modules=["0"], name=name)


CONSTANT = torch.zeros(8)


@pytest.mark.parametrize(
    "make",
    [
        lambda site, own, rng: {"a": own["bias"]},
        lambda site, own, rng: {"a": own["bias"].mul_(2), "b": own.get("bias"), "c": own.get("nothing", CONSTANT)},
        lambda site, own, rng: {"a": CONSTANT, "b": CONSTANT},
        lambda site, own, rng: {"a": torch.zeros(1).expand(8), "b": nn.Parameter(torch.zeros(8))},
        lambda site, own, rng: {"a": torch.zeros(8), "b": fd.Leaf(own["bias"], of="all")},
    ],
)
def test_a_members_leaves_are_its_own(make: Callable[..., Any]) -> None:
    """Written in place, as optimisers do, a leaf changes neither the backbone nor another leaf nor the method."""
    model = backbone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delta = fd.DeltaModel(model, method(make))
    params, other = delta.init(0), delta.init(0)
    for name, tensor in params.items():
        assert not tensor.requires_grad
        rest = {key: value.clone() for key, value in params.items() if key != name}
        tensor.add_(1)
        assert all(torch.equal(params[key], value) for key, value in rest.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(delta.init(0)[name], tensor) for name, tensor in other.items())
    assert not CONSTANT.any()
    assert not delta.apply(other, torch.ones(2, 4)).requires_grad


def test_what_all_members_have_is_not_held_while_they_are_drawn() -> None:
    live = peak = 0

    class Counted(Tensor):
        def __del__(self) -> None:
            nonlocal live
            live -= 1

    def make(site: fd.Site, own: Any, rng: torch.Generator) -> fd.Leaves:
        nonlocal live, peak
        live += 1
        peak = max(peak, live)
        return {"a": torch.zeros(2), "basis": fd.Leaf(torch.ones(8).as_subclass(Counted), of="all")}

    delta = fd.DeltaModel(backbone(), method(make))
    built, peak = live, 0
    delta.init(0, n=50)
    assert peak <= built + 2


def test_leaves_that_start_from_a_computed_weight_leave_its_state_alone() -> None:
    model = backbone()
    nn.utils.parametrizations.spectral_norm(model[0])
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    delta = fd.DeltaModel(model, method(lambda site, own, rng: {"a": own["weight"].sum(1)}))
    delta.init(0, n=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(next(iter(delta.init(0).values())), model.eval()[0].weight.sum(1))
