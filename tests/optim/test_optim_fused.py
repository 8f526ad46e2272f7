"""Adam by torch's fused kernel and by plain operators: one step, whoever does it; new params in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import OURS, THEIRS, Tensors, by_us, gradient, start
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from funcdelta import optim, tree
from funcdelta.optim import rules
from funcdelta.trees import stack as params
from funcdelta.trees.constants import is_constant, still

ALL: dict[str, Callable[..., optim.Optimizer]] = {**OURS, "lion": optim.lion, "muon": optim.muon}
EXTRA: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.8}, "adam": {}, "adamw": {}, "lion": {}, "muon": {}}
RATES = torch.tensor([0.01, 0.1, 0.2], dtype=torch.float64)
# name: keywords of the optimiser
CASES: dict[str, dict[str, Any]] = {
    "numbers": {"lr": 0.1, "weight_decay": 0.1},
    "no decay": {"lr": 0.1, "weight_decay": 0.0},
    "no rate": {"lr": 0.0, "weight_decay": 0.1},
    "rates of members": {"lr": RATES, "weight_decay": 0.1},
    "decays of members": {"lr": 0.1, "weight_decay": RATES},
    "members alike": {"lr": torch.full((3,), 0.1), "betas": (torch.full((3,), 0.8), 0.99), "weight_decay": 0.1},
    "schedule": {"lr": optim.cosine(RATES, 20, warmup=2), "weight_decay": 0.1},
    "groups": {"lr": 0.1, "groups": {"lora_B": 16.0, "head": RATES}, "decay_mask": ["q"], "weight_decay": 0.1},
    "no first moment": {"lr": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.1},
}


def stack(dtype: torch.dtype, constant: bool) -> Tensors:
    found = params.stack([start(i, dtype) for i in range(3)])
    return found | (still({"scale": torch.ones(3, dtype=dtype)}, ["scale"]) if constant else {})


def slopes(p: Tensors) -> Tensors:
    return gradient({name: x for name, x in p.items() if name != "scale"})


class Counted(TorchDispatchMode):
    """Sees every operator, and so keeps the fused kernel away."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += "fused" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every step so far: whether the kernel did it."""
    seen: list[bool] = []
    asked = rules.kernel_for

    def watched(*args: Any) -> Any:
        seen.append((found := asked(*args)) is not None)
        return found

    monkeypatch.setattr(rules, "kernel_for", watched)
    return seen


def ulps(found: Any, expected: Any, most: int) -> None:
    """Raise where two trees differ by more than so many units in the last place of a leaf's largest entry or their own.

    An update is a difference that may cancel, so that its small entries are held against a thousandth of the largest.
    """
    for x, y in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        if y.is_floating_point() and y.numel():
            unit = torch.finfo(y.dtype).eps * torch.maximum(y.abs(), y.abs().max() / 1000)
            assert bool(((x - y).abs() <= most * unit).all())
        else:
            assert torch.equal(x, y)


@pytest.mark.parametrize("constant", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_the_kernel_and_plain_operators_give_the_same_numbers(
    kind: str, case: str, dtype: torch.dtype, constant: bool, kernels: list[bool]
) -> None:
    opt, p = OURS[kind](**CASES[case]), stack(dtype, constant)
    state = opt.init(p, n=3)
    for _ in range(4):
        grads = slopes(p)
        updates, new = opt.update(grads, state, p)
        with Counted() as seen:
            plain_updates, plain = opt.update(grads, state, p)
        assert seen.fused == 0
        assert kernels[-2:] == [True, False]
        ulps(new, plain, 2)
        ulps(updates, plain_updates, 8)
        p, state = tree.add(p, updates), new


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_a_step_is_that_of_torch_bit_by_bit(kind: str, dtype: torch.dtype) -> None:
    """Of AdamW; Adam's decay is added to the gradient, where torch's kernel may round once less."""
    hypers: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-6}
    hypers["weight_decay"] = 0.1 if kind == "adamw" else 0.0
    p = start(0, dtype) | still({"scale": torch.ones((), dtype=dtype)}, ["scale"])
    leaves = {name: torch.nn.Parameter(x.clone()) for name, x in p.items() if name != "scale"}
    theirs = THEIRS[kind](leaves.values(), fused=True, **hypers)
    opt = OURS[kind](**hypers)
    state = opt.init(p)
    for _ in range(5):
        grads = slopes(p)
        for name, g in grads.items():
            leaves[name].grad = g.clone()
        theirs.step()
        p, state = opt.step(grads, state, p)
        assert all(torch.equal(p[name], leaf) for name, leaf in leaves.items())


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("case", ["numbers", "rates of members", "groups"])
@pytest.mark.parametrize("kind", ALL)
def test_a_step_is_an_update_that_is_applied(kind: str, case: str, donate: bool) -> None:
    opt, p = ALL[kind](**CASES[case], **EXTRA[kind]), stack(torch.float64, constant=True)
    state, q = opt.init(p, n=3), {name: x.clone() for name, x in p.items()} | {"scale": p["scale"]}
    other = opt.init(q, n=3)
    for _ in range(4):
        updates, state = opt.update(slopes(p), state, p)
        p = optim.apply_updates(p, updates)
        q, other = opt.step(slopes(q), other, q, donate=donate)
        assert list(q) == list(p)
        assert is_constant(q["scale"])
        torch.testing.assert_close((q, other), (p, state), rtol=1e-13, atol=1e-14)


def test_an_optimiser_of_a_users_own_steps_as_well() -> None:
    def update(grads: Tensors, state: int, p: Tensors) -> tuple[Tensors, int]:
        return tree.scale(grads, -0.5), state + 1

    own = optim.Optimizer(lambda p, n=None: 0, update)
    found, state = own.step({"w": torch.ones(2)}, own.init(None), {"w": torch.zeros(2)})
    assert found["w"].tolist() == [-0.5, -0.5]
    assert state == 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ALL)
def test_what_is_given_stays_as_it_is(kind: str, case: str) -> None:
    hypers = {key: value for key, value in CASES[case].items() if key != "betas"} | EXTRA[kind]
    opt, p = ALL[kind](**hypers), stack(torch.float32, constant=True)
    grads = slopes(p)
    _, state = opt.update(grads, opt.init(p, n=3), p)
    given = pytree.tree_leaves((p, grads, state))
    before, versions = [x.clone() for x in given], [x._version for x in given]
    for results in (opt.update(grads, state, p), opt.step(grads, state, p)):
        assert [x._version for x in given] == versions
        assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))
        owned = {x.untyped_storage().data_ptr() for x in given if not is_constant(x)}
        made = [x for x in pytree.tree_leaves(results) if not is_constant(x)]
        assert owned.isdisjoint(x.untyped_storage().data_ptr() for x in made)


def test_what_is_donated_is_written_into_and_only_that() -> None:
    opt, p = optim.adamw(0.1), stack(torch.float32, constant=True)
    state = opt.init(p, n=3)
    grads = slopes(p)
    kept = [x.clone() for x in grads.values()]
    found, new = opt.step(grads, state, p, donate=True)
    assert all(found[name].data_ptr() == p[name].data_ptr() for name in p)
    assert all(new.mu[name] is state.mu[name] for name in state.mu)
    assert all(torch.equal(x, y) for x, y in zip(grads.values(), kept, strict=True))
    assert state.step.tolist() == [0, 0, 0]


def test_a_donated_leaf_that_shares_memory_with_itself_or_another_is_copied(kernels: list[bool]) -> None:
    one, long = torch.ones(2), torch.ones(5)
    p = still({"scale": torch.ones(())}, ["scale"]) | {"w": one, "tied": one, "wide": torch.ones(1).expand(2)}
    p |= {"left": long[:3], "right": long[2:]}
    grads = {name: torch.ones(x.shape) for name, x in p.items() if name != "scale"}
    opt = optim.adamw(0.1)
    expected, _ = opt.step(grads, opt.init(p), p)
    found, _ = opt.step(grads, opt.init(p), p, donate=True)
    assert kernels == [True, True]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert one.tolist() == [1.0, 1.0]
    assert long.tolist() == [1.0] * 5


# -- who watches, and what the kernel cannot do ------------------------------------------------------------------------


def plain_cases() -> dict[str, Callable[[Tensors, Any, Tensors], Any]]:
    adamw = optim.adamw

    def grown(grads: Tensors, state: Any, p: Tensors) -> Any:
        older = state._replace(step=torch.tensor([1, 2, 3]))
        return adamw(0.1).update(grads, older, p)

    def tangents(grads: Tensors, state: Any, p: Tensors) -> Any:
        with torch.autograd.forward_ad.dual_level():
            dual = {name: torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)) for name, x in grads.items()}
            updates, _ = adamw(0.1).update(dual, state, p)
            assert all(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in updates.values())
            return updates

    return {
        "betas of members": lambda *given: adamw(0.1, betas=(RATES, 0.99)).update(*given),
        "eps of members": lambda *given: adamw(0.1, eps=RATES).update(*given),
        "no eps": lambda *given: adamw(0.1, eps=0.0).update(*given),
        "steps of members": grown,
        "a map": lambda *given: torch.vmap(adamw(0.1).update)(*given),
        "a map of the rate": lambda *given: torch.vmap(lambda lr: adamw(lr).update(*given)[0])(RATES[:2]),
        "tangents": tangents,
        "a graph to the rate": lambda *given: adamw(RATES.clone().requires_grad_()).update(*given),
        "a graph to the params": lambda g, s, p: adamw(0.1).update(
            g, s, {name: x.clone().requires_grad_() for name, x in p.items()}
        ),
        "a derivative": lambda *given: torch.func.jacrev(lambda lr: adamw(lr).update(*given)[0])(torch.tensor(0.1)),
    }


@pytest.mark.parametrize("name", plain_cases())
def test_where_the_kernel_cannot_serve_plain_operators_do(name: str, kernels: list[bool]) -> None:
    p = stack(torch.float64, constant=False)
    _, state = optim.adamw(0.1).update(slopes(p), optim.adamw(0.1).init(p, n=3), p)
    kernels.clear()
    found = plain_cases()[name](slopes(p), state, p)
    assert kernels == [False]
    assert all(bool(x.isfinite().all()) for x in pytree.tree_leaves(found) if isinstance(x, Tensor))


def test_a_graph_that_nobody_builds_keeps_the_kernel(kernels: list[bool]) -> None:
    p = {name: x.clone().requires_grad_() for name, x in stack(torch.float32, constant=False).items()}
    opt = optim.adamw(0.1)
    with torch.no_grad():
        found, _ = opt.step(slopes(p), opt.init(p, n=3), p)
    assert kernels == [True]
    assert not any(x.requires_grad for x in found.values())


def test_a_step_is_differentiable_in_the_rate_and_maps_over_members() -> None:
    p = stack(torch.float64, constant=False)
    state = optim.adamw(0.1).init(p, n=3)

    def after(lr: Tensor) -> Tensor:
        found, _ = optim.adamw(lr).step(slopes(p), state, p)
        return tree.vdot(found, found)

    rate = torch.tensor(0.05, dtype=torch.float64)
    numeric = (after(rate + 1e-6) - after(rate - 1e-6)) / 2e-6
    torch.testing.assert_close(torch.func.grad(after)(rate), numeric, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.func.jvp(after, (rate,), (torch.ones_like(rate),))[1], numeric, rtol=1e-6, atol=1e-7
    )
    opt = optim.adamw(0.05)
    one = torch.vmap(lambda g, s, q: opt.step(g, s, q))(slopes(p), state, p)
    torch.testing.assert_close(one, opt.step(slopes(p), state, p), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_a_step_compiles_to_one_graph(kind: str, donate: bool) -> None:
    opt, p = ALL[kind](0.1, weight_decay=0.1), stack(torch.float32, constant=True)
    state = opt.init(p, n=3)
    torch._dynamo.reset()

    def step(q: Tensors, s: Any) -> tuple[Tensors, Any]:
        return opt.step(slopes(q), s, q, donate=donate)

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    found = compiled(*compiled(p, state))
    torch.testing.assert_close(found, step(*opt.step(slopes(p), state, p)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["numbers", "rates of members"])
def test_a_leaf_whose_gradient_is_zero_does_not_decay_where_nothing_says_that_it_trains(case: str) -> None:
    opt = optim.adamw(**CASES[case])
    p = {"w": torch.ones(3, 2), "mask": torch.full((3, 2), -torch.inf), "late": torch.ones(3, 2)}
    grads = {"w": torch.ones(3, 2), "mask": torch.zeros(3, 2), "late": torch.tensor([[0.0, 0], [0, 1], [0, 0]])}
    for run in (opt.step, lambda *given: (optim.apply_updates(given[2], opt.update(*given)[0]), None)):
        found, _ = run(grads, opt.init(p, n=3), p)
        assert torch.equal(found["mask"], p["mask"])
        assert (found["late"] == 1).all(dim=1).tolist() == [True, False, True]
        assert bool((found["w"] < 1).all())


def test_layouts_and_sizes() -> None:
    p = {"turned": torch.randn(4, 3).T, "none": torch.zeros(3, 0), "number": torch.randn(3)}
    p |= {"half": torch.randn(3, 2).half()}
    grads = {name: torch.randn(x.shape).to(x.dtype) for name, x in p.items()}
    opt = optim.adamw(0.1, weight_decay=0.1)
    state = opt.init(p, n=3)
    updates, new = opt.update(grads, state, p)
    with Counted():
        expected, plain = opt.update(grads, state, p)
    ulps((updates, new), (expected, plain), 8)
    assert opt.step(grads, state, p)[0]["half"].dtype == torch.float16
    _, many = by_us(opt, {name: x.float() for name, x in p.items()}, steps=2, n=3)
    assert many.step.tolist() == [2, 2, 2]
