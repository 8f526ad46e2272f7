"""Laws of what ``torch.vmap`` would do otherwise than a loop: ``engine="vmap"`` refuses it, and ``auto`` goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from handmade import assert_close, raises_saying
from torch import Tensor, nn

import funcdelta as fd


class Layer(nn.Module):
    """A layer, and something with its output that mixes rows, so that no fold is tried for long."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.rng = nn.Linear(4, 4), torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Any:
        return self.then(self.a(x)) if isinstance(x, Tensor) else None

    def then(self, h: Tensor) -> Any:
        return h


class Held(Layer):
    def then(self, h: Tensor) -> Any:
        return h + torch.rand(4, generator=self.rng)


class Fresh(Layer):
    def then(self, h: Tensor) -> Any:
        return h + torch.poisson(torch.ones(4), torch.Generator())


class Seeding(Layer):
    def then(self, h: Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return h + torch.rand(4)


class Hooked(Layer):
    def then(self, h: Tensor) -> Any:
        if h.requires_grad:
            h.register_hook(lambda gradient: 2 * gradient)
        return h


def members(model: nn.Module) -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    delta = fd.LoraModel(model, modified_modules=["a"], lora_r=2)
    stack = fd.tree.randn_like(delta.init(0, n=3), seed=1)
    return delta, {name: leaf.requires_grad_() for name, leaf in stack.items()}


def values(delta: fd.DeltaModel, stack: dict[str, Tensor], engine: str) -> list[Tensor]:
    torch.manual_seed(5)
    output = delta.apply_many(stack, torch.linspace(-1, 1, 12).view(3, 4), engine=engine)
    return [output, *torch.autograd.grad(output.square().sum(), [stack["a.lora.lora_A"], stack["a.lora.lora_B"]])]


@pytest.mark.parametrize("kind", [Held, Fresh, Seeding, Hooked])
@pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")
def test_what_a_map_would_do_otherwise_is_refused(kind: Callable[[], nn.Module]) -> None:
    delta, stack = members(kind())
    expected = values(delta, stack, "loop")
    for _ in range(2):
        with raises_saying(fd.EngineError, "torch.vmap", 'engine="auto"'):
            values(delta, stack, "vmap")
    for found, one in zip(values(delta, stack, "auto"), expected, strict=True):
        assert_close(found, one)


def test_torchs_own_generator_may_be_named_and_hooks_are_for_gradients() -> None:
    class Named(Layer):
        def then(self, h: Tensor) -> Any:
            return h + 0 * torch.rand(4, generator=torch.default_generator)

    for kind in (Named, Hooked):
        delta, stack = members(kind())
        with torch.no_grad():
            x = torch.randn(3, 4)
            assert_close(delta.apply_many(stack, x, engine="vmap"), delta.apply_many(stack, x, engine="loop"))


@pytest.mark.parametrize("given", [np.arange(4), np.float32(4), np.array("a")], ids=["array", "number", "word"])
def test_arrays_have_a_member_axis_by_every_engine(given: Any) -> None:
    class Numpy(Layer):
        def then(self, h: Tensor) -> Any:
            return {"hidden": h, "given": given}

    delta, stack = members(Numpy())
    for engine in ("loop", "vmap", "auto", *(() if np.size(given) > 1 else ("fold",))):
        for chunk_size in (None, 2):
            found = delta.apply_many(stack, torch.randn(3, 4), engine=engine, chunk_size=chunk_size)["given"]
            assert np.array_equal(found, np.stack([given] * 3)), engine
