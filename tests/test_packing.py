"""Unlike members in one stack: each acts, trains, saves and merges as it would alone."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from handmade import MLP, raises_saying
from subjects import UNDER_LAW, config_for, subject, targets, with_fewer_sites
from test_laws import assert_close, assert_moved, weighted_sum
from torch import Tensor, nn
from zoo import ZOO, take_rows

import funcdelta as fd
from funcdelta.config import METHODS

Pair = tuple[fd.DeltaModel, dict[str, Tensor]]

# Another member of each method: larger or smaller, with other constants.
UNLIKE: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 3, "lora_alpha": 5, "use_rslora": True},
    "adapter": {"bottleneck_dim": 5},
    "parallel_adapter": {"bottleneck_dim": 5, "scaled": 0.5},
    "low_rank_adapter": {"reduction_factor": 2, "low_rank_rank": 3},
    "compacter": {"reduction_factor": 4, "phm_rank": 2},
    "prefix": {"prefix_token_num": 3, "reparameterize": False},
}
MAKES_LONGER = [method for method in UNDER_LAW if METHODS[method].gives("prompt")]
MIXED = [method for method in UNDER_LAW if method not in MAKES_LONGER]


def away_from_start(delta: fd.DeltaModel, n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Params whose every trained leaf has been moved."""
    moved = {
        name: leaf + 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed + i))
        if delta.trainable(name)
        else leaf
        for i, (name, leaf) in enumerate(delta.init(seed, n=n).items())
    }
    return moved


@functools.lru_cache(maxsize=32)
def zoo_pairs(name: str, methods: tuple[str, ...] = tuple(MIXED)) -> tuple[Pair, ...]:
    """Two unlike members of every method that can act on the architecture, the second a stack of two."""
    architecture, pairs = ZOO[name], []
    model = subject("lora", name).model
    example = architecture.inputs(2)
    for i, method in enumerate(method for method in methods if targets(method, architecture) != ()):
        first, second = config_for(method, architecture), config_for(method, architecture, **UNLIKE.get(method, {}))
        for n, config in ((None, first), (2, with_fewer_sites(second))):
            delta = fd.DeltaModel(model, config, example=example.get("args", example))
            pairs.append((delta, away_from_start(delta, n, seed=i)))
    return tuple(pairs)


def members_of(pairs: tuple[Pair, ...] | list[Pair]) -> list[Pair]:
    """One pair a member."""
    singles: list[Pair] = []
    for delta, params in pairs:
        name = next(iter(params))
        is_stack = params[name].ndim > len(delta.shapes[name])
        singles += [(delta, one) for one in (fd.unstack(params) if is_stack else [params])]
    return singles


def assert_same(found: list[Pair], expected: tuple[Pair, ...] | list[Pair]) -> None:
    assert len(found) == len(expected)
    for (delta, params), (other, given) in zip(found, expected, strict=True):
        assert delta.configs == other.configs
        assert delta.sites == other.sites
        assert list(params) == list(delta.names) == list(other.names)
        for name, leaf in params.items():
            assert leaf.dtype == given[name].dtype
            assert torch.equal(leaf, given[name]), name


def random_where_nothing_is(delta: fd.DeltaModel, stack: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stack with other numbers wherever no member has any, found by packing and taking out again."""
    noise = {name: torch.randn_like(leaf) if delta.trainable(name) else leaf for name, leaf in stack.items()}
    back = fd.pack(
        fd.unpack(
            delta,
            {name: torch.full_like(leaf, torch.nan) if delta.trainable(name) else leaf for name, leaf in stack.items()},
        )
    )[1]
    return {name: torch.where(back[name].isnan(), leaf, noise[name]) for name, leaf in stack.items()}


# --- the laws, all methods side by side ------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "bert", "gpt2", "llama", "t5", "conv2d", "torch_transformer"])
def test_every_method_in_one_stack_is_what_each_is_alone(name: str) -> None:
    architecture, pairs = ZOO[name], zoo_pairs(name)
    delta, stack = fd.pack(pairs)
    assert_same(fd.unpack(delta, stack), pairs)
    inputs, singles = architecture.inputs(3), members_of(pairs)
    assert fd.members(stack) == len(singles)

    def many(given: dict[str, Tensor], engine: str) -> Tensor:
        return architecture.call(lambda *a, **k: delta.apply_many(given, *a, engine=engine, **k), inputs)

    with torch.no_grad():
        alone = [architecture.call(functools.partial(one.apply, params), inputs) for one, params in singles]
        bare = architecture.call(delta.backbone, inputs)
        for out in alone:
            assert_moved(out, bare)
        together = many(stack, "auto")
        for found, expected in zip(together, alone, strict=True):
            assert_close(found, expected)
        assert_close(many(stack, "loop"), together)
        # No optimiser can make matter what is not there.
        assert_close(many(random_where_nothing_is(delta, stack), "auto"), together)
        if "batch_free_target" in architecture.flags:
            return
        last = len(singles) - 1
        index = [last, -1, 0] if name != "bert" else [last, 4, 0]
        rows = architecture.call(lambda *a, **k: delta.apply_rows(stack, index, *a, **k), inputs)
        for i, member in enumerate(index):
            expected = bare[i] if member < 0 else alone[member][i]
            assert_close(rows[i], expected)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_gradients_are_those_of_each_alone_and_none_where_nothing_is(name: str) -> None:
    architecture, pairs = ZOO[name], zoo_pairs(name)
    delta, stack = fd.pack(pairs)
    inputs = architecture.inputs(2)

    def losses(stack: dict[str, Tensor]) -> Tensor:
        outs = architecture.call(lambda *a, **k: delta.apply_many(stack, *a, **k), inputs)
        return torch.stack([weighted_sum(out) for out in outs])

    _, grads = fd.value_and_grad(losses)(stack)
    assert not any(grads[name].any() for name in delta.constants)
    # Taken out, they are the gradients of each; put back, nothing has been lost.
    sources = {name: stack[name] for name in delta.constants}
    back = fd.unpack(delta, grads | sources)
    for (one, found), (other, params) in zip(members_of(back), members_of(pairs), strict=True):
        alone = torch.func.grad(
            lambda p: weighted_sum(architecture.call(lambda *a, **k: other.apply(p, *a, **k), inputs))
        )
        for leaf, expected in alone(params).items():
            if one.trainable(leaf):
                assert_close(found[leaf], expected, 1e-4)
    again = fd.pack(back)[1]
    absent = fd.pack(fd.unpack(delta, {n: torch.zeros_like(g) for n, g in grads.items()} | sources))[1]
    for leaf in (name for name in delta.names if delta.trainable(name)):
        assert torch.equal(grads[leaf], again[leaf] - absent[leaf])


@pytest.mark.parametrize("first", MIXED)
@pytest.mark.parametrize("second", MIXED)
def test_pairs_of_methods(first: str, second: str) -> None:
    if first > second or any(targets(method, ZOO["mlp"]) == () for method in (first, second)):
        pytest.skip("the other way round, or nothing to act on")
    pairs = [*zoo_pairs("mlp", (first,)), *zoo_pairs("mlp", (second,))]
    delta, stack = fd.pack(pairs)
    assert_same(fd.unpack(delta, stack), pairs)
    inputs = ZOO["mlp"].inputs(2)
    with torch.no_grad():
        outs = ZOO["mlp"].call(lambda *a, **k: delta.apply_many(stack, *a, engine="vmap", **k), inputs)
        for out, (one, params) in zip(outs, members_of(pairs), strict=True):
            assert_close(out, ZOO["mlp"].call(functools.partial(one.apply, params), inputs))
