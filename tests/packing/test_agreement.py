"""A method that says something untrue of its leaves is found out when members of unlike size are packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from custom_methods import DoraConfig, HadamardConfig
from handmade import raises_saying
from torch import Tensor, nn

import funcdelta as fd

HERE = {"modified_modules": ["0", "2"]}


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def sized(names: str, function: Callable[..., Any], kind: str = "after", leaf: str = "a") -> Any:
    """A config with a leaf ``(k, 8)`` whose axes it calls ``names``."""
    own: dict[str, Any] = {
        "__annotations__": {"k": int},
        "k": 2,
        "in_leaves": ("k",),
        "init": lambda self, site, rng: {leaf: fd.Leaf(torch.zeros(self.k, 8), names)},
        kind: function,
    }
    return dataclass(frozen=True)(type("Sized", (fd.BaseDeltaConfig,), own))


def pairs_of(make: Callable[[int], fd.BaseDeltaConfig]) -> list[tuple[fd.DeltaModel, dict[str, Tensor]]]:
    model = backbone()
    deltas = [fd.DeltaModel(model, make(k)) for k in (1, 3)]
    return [
        (delta, {n: t if n in delta.constants else t + torch.rand_like(t) for n, t in delta.init(i).items()})
        for i, delta in enumerate(deltas)
    ]


UNTRUE: dict[str, tuple[str, Callable[..., Any]]] = {
    "a mean": ("after", lambda self, site, p, y, x: y + p["a"].mean(0)),
    "a softmax": ("after", lambda self, site, p, y, x: y + (p["a"].softmax(0) * p["a"]).sum(0)),
    "a field": ("after", lambda self, site, p, y, x: y + p["a"].sum(0) * self.k),
    "before": ("before", lambda self, site, p, x: x + p["a"].mean()),
    "weights": ("weights", lambda self, site, p, w: w | {"bias": w["bias"] + p["a"].mean(0)}),
}


@pytest.mark.parametrize("name", UNTRUE)
def test_what_is_untrue_is_refused(name: str) -> None:
    config = sized("rank .", UNTRUE[name][1], UNTRUE[name][0])
    with raises_saying(fd.ConfigError, "Sized", "at 0", "'rank'", 'write "."', "in_leaves"):
        fd.pack(pairs_of(lambda k: config(k=k, **HERE)))


@pytest.mark.parametrize(
    "make",
    [
        lambda k: sized("rank .", lambda self, site, p, y, x: y + p["a"].sum(0))(k=k, **HERE),
        lambda k: sized(". .", lambda self, site, p, y, x: y + p["a"].mean(0))(k=k, **HERE),
        lambda k: HadamardConfig(rank=k, **HERE),
        lambda k: fd.parallel(DoraConfig(rank=k), fd.average(fd.LoraConfig(lora_r=k), fd.LoraConfig()), **HERE),
        lambda k: fd.LoraConfig(lora_r=k, lora_alpha=k + 1, modified_modules=["0.weight"]),
    ],
)
def test_what_is_true_is_packed(make: Callable[[int], fd.BaseDeltaConfig]) -> None:
    pairs, x = pairs_of(make), torch.randn(5, 4)
    packed, stack = fd.pack(pairs)
    for out, (delta, params) in zip(packed.apply_many(stack, x), pairs, strict=True):
        torch.testing.assert_close(out, delta.apply(params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leaf", ["present", "source", "size.rank"])
def test_names_that_packing_keeps_for_itself(leaf: str) -> None:
    config = sized("rank .", lambda self, site, p, y, x: y + p[leaf].sum(), leaf=leaf)
    with raises_saying(fd.ConfigError, repr(leaf), "Rename"):
        fd.pack(pairs_of(lambda k: config(k=k, **HERE)))
    with raises_saying(fd.ConfigError, "'size.lora_A'", "composition"):
        fd.pack(pairs_of(lambda k: fd.parallel(fd.LoraConfig(lora_r=k, name="size"), **HERE)))


def test_a_field_that_is_said_to_be_a_leaf_and_is_not() -> None:
    @dataclass(frozen=True)
    class Claims(fd.BaseDeltaConfig):
        as_leaves: ClassVar[tuple[str, ...]] = ("gain",)
        gain: float = 1.0

        def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
            return {"a": torch.zeros(site.width)}

        def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
            return y + self.gain * p["a"]

    with raises_saying(fd.ConfigError, "Claims", "as_leaves"):
        fd.pack(pairs_of(lambda k: Claims(gain=float(k), **HERE)))
