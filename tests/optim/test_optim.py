"""The optimisers against torch.optim, member by member; schedules and transforms."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from optim_cases import CLOSE, OURS, STEPS, Tensors, by_torch, by_us, gradient, start
from torch.utils import _pytree as pytree

from funcdelta import optim, tree
from funcdelta.trees import stack as params
from funcdelta.trees.constants import still

GRID: list[tuple[str, dict[str, Any]]] = [
    *(
        ("sgd", {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay})
        for lr, momentum, nesterov, decay in itertools.product([0.05, 0.3], [0.0, 0.5, 0.9], [False, True], [0.0, 0.1])
        if momentum or not nesterov
    ),
    *(
        (kind, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay})
        for kind, lr, betas, eps, decay in itertools.product(
            ["adam", "adamw"], [1e-3, 0.1], [(0.9, 0.999), (0.0, 0.5), (0.6, 0.9)], [1e-8, 1e-3], [0.0, 0.1]
        )
    ),
]


def as_tensors(rows: list[dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    """Hyper-parameters of several members: every number a tensor (n,)."""
    together: dict[str, Any] = {}
    for name, first in rows[0].items():
        column = [row[name] for row in rows]
        if name == "betas":
            together[name] = tuple(torch.tensor(one, dtype=dtype) for one in zip(*column, strict=True))
        else:
            together[name] = first if isinstance(first, bool) else torch.tensor(column, dtype=dtype)
    return together


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize(("kind", "hypers"), GRID)
def test_numbers_are_those_of_torch(kind: str, hypers: dict[str, Any], dtype: torch.dtype) -> None:
    p = start(0, dtype)
    ours, state = by_us(OURS[kind](**hypers), p)
    torch.testing.assert_close(ours, by_torch(kind, hypers, p), **CLOSE[dtype])
    assert state.step.item() == STEPS
    assert state.step.shape == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw"])
def test_one_value_a_member(kind: str, dtype: torch.dtype) -> None:
    nesterov = kind == "nesterov"
    kind = "sgd" if nesterov else kind
    rows = [h for k, h in GRID if k == kind and h.get("nesterov", False) == nesterov]
    members = [start(i, dtype) for i in range(len(rows))]
    stack, state = by_us(OURS[kind](**as_tensors(rows, torch.float64)), params.stack(members))
    assert state.step.tolist() == [STEPS] * len(rows)
    for i, (hypers, p) in enumerate(zip(rows, members, strict=True)):
        torch.testing.assert_close(params.take(stack, i), by_torch(kind, hypers, p), **CLOSE[dtype])


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_state_stacks_takes_and_joins_like_params(kind: str) -> None:
    hypers: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "sgd" else {})
    opt = OURS[kind](**hypers)
    early, late = by_us(opt, start(0), 3), by_us(opt, start(1), 7)
    stack, state = params.stack([early[0], late[0]]), params.stack([early[1], late[1]])
    assert state.step.tolist() == [3, 7]
    updates, state = opt.update(gradient(stack), state, stack)
    stack = tree.add(stack, updates)
    for i, (p, steps) in enumerate([(start(0), 4), (start(1), 8)]):
        expected, expected_state = by_us(opt, p, steps)
        torch.testing.assert_close(params.take(stack, i), expected)
        torch.testing.assert_close(params.take(state, i), expected_state)
    wide, wide_state = by_us(opt, params.broadcast(start(2), 3), 2, n=3)
    joined, joined_state = params.cat([stack, wide]), params.cat([state, wide_state])
    assert joined_state.step.tolist() == [4, 8, 2, 2, 2]
    updates, _ = opt.update(gradient(joined), joined_state, joined)
    torch.testing.assert_close(params.take(tree.add(joined, updates), 4), by_us(opt, start(2), 3)[0])


def test_sgd_without_momentum_has_no_velocity_but_a_state_that_takes() -> None:
    opt = optim.sgd(0.1)
    state = opt.init(params.broadcast(start(0), 3), n=3)
    assert all(buffer.shape == (3, 0) for buffer in state.momentum.values())
    assert params.take(state, 1).step.shape == ()


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_vmap_over_members_rates_and_state(kind: str) -> None:
    rates = torch.tensor([0.01, 0.1, 0.2], dtype=torch.float64)
    extra = {"momentum": 0.8} if kind == "sgd" else {}
    stack = params.stack([start(i) for i in range(3)])
    expected, expected_state = by_us(OURS[kind](lr=rates, weight_decay=0.1, **extra), stack, 20)

    def step(lr: torch.Tensor, p: Tensors, state: Any) -> tuple[Tensors, Any]:
        updates, state = OURS[kind](lr=lr, weight_decay=0.1, **extra).update(gradient(p), state, p)
        return optim.apply_updates(p, updates), state

    state = torch.vmap(OURS[kind](lr=0.1, **extra).init)(stack)
    for _ in range(20):
        stack, state = torch.vmap(step)(rates, stack, state)
    torch.testing.assert_close(stack, expected)
    torch.testing.assert_close(state, expected_state)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_compiles_to_one_graph(kind: str) -> None:
    opt = OURS[kind](lr=torch.tensor([0.1, 0.2]), weight_decay=0.1)
    stack = params.stack([start(i, torch.float32) for i in range(2)])
    stack |= still({"scale": torch.ones(2)}, ["scale"])

    def step(p: Tensors, state: Any) -> tuple[Tensors, Any]:
        grads = optim.clip_by_norm(gradient(p), 1.0, per_member=True)
        updates, state = opt.update(grads, state, p)
        return tree.add(p, updates), state

    state = opt.init(stack)
    assert "scale" not in state[1]
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*compiled(stack, state)), step(*step(stack, state)))


def test_schedules_see_the_step() -> None:
    def warm(step: torch.Tensor) -> torch.Tensor:
        return torch.where(step < 5, (step + 1) / 5, 0.9**step) * 0.1

    p = start(0)
    leaves = {name: torch.nn.Parameter(x.clone()) for name, x in p.items()}
    theirs = torch.optim.AdamW(leaves.values(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda k: float(warm(torch.tensor(k))))
    for _ in range(STEPS):
        for name, g in gradient({name: x.detach() for name, x in leaves.items()}).items():
            leaves[name].grad = g
        theirs.step()
        scheduler.step()
    ours, _ = by_us(optim.adamw(lr=warm), p)
    expected = {name: x.detach() for name, x in leaves.items()}
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)

    rates = torch.tensor([1.0, 0.5])
    stack, state = by_us(optim.adamw(lr=lambda step: warm(step) * rates), params.broadcast(p, 2))
    assert state.step.shape == (2,)
    torch.testing.assert_close(params.take(stack, 0), expected, rtol=1e-6, atol=1e-7)
    python_float, _ = by_us(optim.sgd(lr=lambda step: 0.25), p, 2)
    torch.testing.assert_close(python_float, by_us(optim.sgd(lr=0.25), p, 2)[0])


def test_differentiable_through_training_also_where_gradients_begin_at_zero() -> None:
    a = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = torch.zeros(4, 2, dtype=torch.float64)

    def loss(p: Tensors) -> torch.Tensor:
        return ((p["b"] @ p["a"] - 1) ** 2).sum()

    def after(lr: torch.Tensor) -> torch.Tensor:
        p, opt = {"a": a, "b": b}, optim.adamw(lr=lr)
        state = opt.init(p)
        for _ in range(3):
            updates, state = opt.update(torch.func.grad(loss)(p), state, p)
            p = tree.add(p, updates)
        return loss(p)

    lr = torch.tensor(0.05, dtype=torch.float64)
    slope = torch.func.grad(after)(lr)
    numeric = (after(lr + 1e-6) - after(lr - 1e-6)) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-5, atol=1e-6)


def test_nothing_is_changed_in_place() -> None:
    p = params.broadcast(start(0), 2)
    grads = gradient(p)
    for kind in OURS:
        opt = OURS[kind](lr=torch.tensor([0.1, 0.2]))
        state = opt.init(p)
        before = [x.clone() for x in pytree.tree_leaves((p, grads, state))]
        opt.update(grads, state, p)
        after = pytree.tree_leaves((p, grads, state))
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
