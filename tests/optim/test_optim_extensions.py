"""Lion, schedules, groups of leaves, populations, and loops that are differentiated through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_cases import EXACT, OURS, THEIRS, Tensors, by_us, gradient, start
from torch import Tensor
from torch.utils import _pytree as pytree

import funcdelta as fd
from funcdelta import optim, tree
from funcdelta.errors import ConfigError, MatchError, ParamsError, RecomputeError, StackError
from funcdelta.trees import stack as params

ALL: dict[str, Any] = {**OURS, "lion": optim.lion, "muon": optim.muon}
EXTRA: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.8}, "adam": {}, "adamw": {}, "lion": {}, "muon": {}}


# Lion


def lion_by_hand(p: Tensors, lr: float, beta1: float, beta2: float, decay: float, steps: int) -> Tensors:
    m = {name: torch.zeros_like(x) for name, x in p.items()}
    for _ in range(steps):
        g = gradient(p)
        signs = {name: torch.sign(beta1 * m[name] + (1 - beta1) * g[name]) for name in p}
        m = {name: beta2 * m[name] + (1 - beta2) * g[name] for name in p}
        p = {name: x - lr * (signs[name] + decay * x) for name, x in p.items()}
    return p


ROWS = [(0.03, 0.9, 0.99, 0.0), (0.1, 0.5, 0.9, 0.1), (0.02, 0.0, 0.6, 0.3)]


@pytest.mark.parametrize("row", ROWS)
def test_lion_is_the_loop_of_the_paper(row: tuple[float, float, float, float]) -> None:
    lr, beta1, beta2, decay = row
    opt = optim.lion(lr, (beta1, beta2), decay)
    found, state = by_us(opt, start(3))
    torch.testing.assert_close(found, lion_by_hand(start(3), *row, steps=25), **EXACT)
    assert state.step.item() == 25
    assert fd.inspect.inspect_optimizer(state, verbose=False)[0].options["state"] == "LionState"


def test_lion_with_one_value_a_member() -> None:
    lr, beta1, beta2, decay = (torch.tensor(column, dtype=torch.float64) for column in zip(*ROWS, strict=True))
    stack = params.stack([start(i) for i in range(3)])
    found, state = by_us(optim.lion(lr, (beta1, beta2), decay), stack)
    assert state.step.tolist() == [25] * 3
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(params.take(found, i), lion_by_hand(start(i), *row, steps=25), **EXACT)


# Schedules


@pytest.mark.parametrize("floor", [0.0, 0.02])
def test_cosine_is_that_of_torch(floor: float) -> None:
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=12, eta_min=floor)
    rate = optim.cosine(0.3, 12, floor=floor)
    for k in range(13):
        assert rate(torch.tensor(k)).item() == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        theirs.step()
        scheduler.step()
    assert rate(torch.tensor(100)).item() == pytest.approx(floor)


def test_linear_with_warm_up_is_that_of_torch() -> None:
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        theirs,
        [
            torch.optim.lr_scheduler.LinearLR(theirs, start_factor=1 / 4, total_iters=3),
            torch.optim.lr_scheduler.LinearLR(theirs, start_factor=1.0, end_factor=0.1, total_iters=8),
        ],
        milestones=[4],
    )
    rate = optim.linear(0.3, 12, warmup=4, floor=0.03)
    for k in range(15):
        assert rate(torch.tensor(k)).item() == pytest.approx(theirs.param_groups[0]["lr"], abs=1e-12)
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize("kind", [optim.cosine, optim.linear])
def test_peaks_and_lengths_of_members(kind: Any) -> None:
    peaks, lengths, warm, floor = [0.1, 0.2, 0.3], [5, 9, 20], [0, 3, 5], [0.0, 0.01, 0.05]
    many = kind(
        torch.tensor(peaks, dtype=torch.float64), torch.tensor(lengths), torch.tensor(warm), torch.tensor(floor)
    )
    singles = [kind(*row) for row in zip(peaks, lengths, warm, floor, strict=True)]
    for steps in ([0, 1, 2], [4, 3, 19], [7, 8, 30]):
        each = torch.stack([one(torch.tensor(k)) for one, k in zip(singles, steps, strict=True)])
        torch.testing.assert_close(many(torch.tensor(steps)), each, rtol=1e-7, atol=1e-9)
    stack = params.stack([start(i) for i in range(3)])
    found, _ = by_us(optim.adamw(lr=many), stack, 12)
    for i, one in enumerate(singles):
        torch.testing.assert_close(
            params.take(found, i), by_us(optim.adamw(lr=one), start(i), 12)[0], rtol=1e-6, atol=1e-8
        )


def test_a_schedule_maps_and_differentiates_in_its_peak() -> None:
    def rate(peak: Tensor) -> Tensor:
        return optim.cosine(peak, 10, warmup=2)(torch.tensor(6))

    peaks = torch.tensor([0.1, 0.4], dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(rate)(peaks), torch.stack([rate(peak) for peak in peaks]))
    slope = torch.func.grad(rate)(peaks[0])
    assert slope.item() == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


# Groups


def by_torch_groups(
    kind: str, hypers: dict[str, Any], p: Tensors, rows: list[tuple[list[str], dict[str, Any]]]
) -> Tensors:
    leaves = {name: torch.nn.Parameter(x.clone()) for name, x in p.items()}
    listed = {name for names, _ in rows for name in names}
    grouped = [{"params": [leaves[name] for name in names], **own} for names, own in rows]
    rest = {"params": [leaf for name, leaf in leaves.items() if name not in listed]}
    optimiser = THEIRS[kind]([*grouped, rest], **hypers)
    for _ in range(25):
        for name, g in gradient({name: x.detach() for name, x in leaves.items()}).items():
            leaves[name].grad = g
        optimiser.step()
    return {name: x.detach() for name, x in leaves.items()}


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_groups_are_those_of_torch(kind: str) -> None:
    hypers = {"lr": 0.02, "weight_decay": 0.1, **EXTRA[kind]}
    opt = OURS[kind](
        **hypers,
        groups={"lora_B": 16.0, ("head", "lora_A"): 0.5, lambda name: name.startswith("head"): torch.tensor(4.0)},
        decay_mask=lambda name, leaf: leaf.ndim == 2,
    )
    rows: list[tuple[list[str], dict[str, Any]]] = [
        (["layer.0.q.lora_B"], {"lr": 0.32}),
        (["layer.0.q.lora_A"], {"lr": 0.01}),
        (["head.bias"], {"lr": 0.04, "weight_decay": 0.0}),
        (["temperature"], {"weight_decay": 0.0}),
    ]
    expected = by_torch_groups(kind, hypers, start(0), rows)
    torch.testing.assert_close(by_us(opt, start(0))[0], expected, **EXACT)
    plain, _ = by_us(OURS[kind](**hypers), start(0))
    assert all(not torch.allclose(plain[name], expected[name], rtol=1e-3) for name in expected)


@pytest.mark.parametrize("kind", list(ALL))
def test_factors_of_members(kind: str) -> None:
    rates, factors = [0.01, 0.02, 0.03], [1.0, 4.0, 16.0]
    stack = params.stack([start(i) for i in range(3)])
    hypers = {"weight_decay": 0.1, "decay_mask": iter(["q"]), **EXTRA[kind]}
    opt = ALL[kind](torch.tensor(rates, dtype=torch.float64), groups={"lora_B": torch.tensor(factors)}, **hypers)
    found, _ = by_us(opt, stack, 8)
    for i, (rate, factor) in enumerate(zip(rates, factors, strict=True)):
        hypers["decay_mask"] = ["q"]
        alone, _ = by_us(ALL[kind](rate, groups={"lora_B": factor}, **hypers), start(i), 8)
        torch.testing.assert_close(params.take(found, i), alone, **EXACT)


@pytest.mark.parametrize("kind", list(ALL))
def test_a_step_with_groups_and_a_schedule_compiles_to_one_graph(kind: str) -> None:
    rate = optim.cosine(torch.tensor([0.1, 0.2]), 10, warmup=2)
    opt = ALL[kind](rate, groups={"lora_B": 16.0}, weight_decay=0.1, decay_mask=["q"])
    stack = params.stack([start(i, torch.float32) for i in range(2)])

    def step(p: Tensors, state: Any) -> tuple[Tensors, Any]:
        updates, state = opt.update(gradient(p), state, p)
        return tree.add(p, updates), state

    state = opt.init(stack)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*compiled(stack, state)), step(*step(stack, state)))


# Populations


@pytest.mark.parametrize("kind", list(ALL))
def test_members_copied_by_index_train_on_as_separate_runs(kind: str) -> None:
    """Population-based training: losers take the params and state of winners, and new rates."""
    before, after, index = [0.01, 0.02, 0.05], [0.03, 0.01, 0.02, 0.04], [2, 2, 0, 1]
    rates = torch.tensor(before, dtype=torch.float64)
    stack = params.stack([start(i) for i in range(3)])
    stack, state = by_us(ALL[kind](optim.linear(rates, 20, warmup=2), **EXTRA[kind]), stack, 6)
    stack, state = params.take((stack, state), index)
    opt = ALL[kind](optim.linear(torch.tensor(after, dtype=torch.float64), 20, warmup=2), **EXTRA[kind])
    for _ in range(6):
        updates, state = opt.update(gradient(stack), state, stack)
        stack = tree.add(stack, updates)
    alone = []
    for i, rate in zip(index, after, strict=True):
        p, one = by_us(ALL[kind](optim.linear(before[i], 20, warmup=2), **EXTRA[kind]), start(i), 6)
        opt = ALL[kind](optim.linear(rate, 20, warmup=2), **EXTRA[kind])
        for _ in range(6):
            updates, one = opt.update(gradient(p), one, p)
            p = tree.add(p, updates)
        alone.append((p, one))
    torch.testing.assert_close((stack, state), params.stack(alone), **EXACT)


# fd.grad.unroll

BATCH = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def inner_loss(p: Tensors, x: Tensor) -> Tensor:
    return ((x @ p["a"]).tanh() @ p["b"]).square().mean() + 0.1 * p["a"].square().sum()


def start_pair() -> Tensors:
    g = torch.Generator().manual_seed(2)
    return {
        "a": torch.randn(4, 5, dtype=torch.float64, generator=g, requires_grad=True),
        "b": torch.randn(5, 2, dtype=torch.float64, generator=g, requires_grad=True),
    }


def by_autograd(p: Tensors, i: int, rate: Tensor, x: Tensor) -> Tensors:
    found = torch.autograd.grad(inner_loss(p, x + i), list(p.values()), create_graph=True)
    return {name: w - rate * g for (name, w), g in zip(p.items(), found, strict=True)}


def by_func(p: Tensors, i: int, rate: Tensor, x: Tensor) -> Tensors:
    found = torch.func.grad(inner_loss)(p, x + i)
    return {name: w - rate * found[name] for name, w in p.items()}


def by_optimizer(both: Any, i: int, rate: Tensor, x: Tensor) -> Any:
    p, state = both
    _, found = fd.value_and_grad(inner_loss)(p, x + i)
    updates, state = optim.adamw(lr=rate, groups={"b": 4.0}).update(found, state, p)
    return tree.add(p, updates), state


def meta(step: Any, checkpoint: bool, steps: int = 4) -> tuple[Tensor, Tensors, Tensor, Tensor]:
    p = start_pair()
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    x = BATCH.clone().requires_grad_()
    state: Any = (p, optim.adamw(lr=rate).init(p)) if step is by_optimizer else p
    end = fd.grad.unroll(step, state, steps, rate, x, checkpoint=checkpoint)
    end = end[0] if step is by_optimizer else end
    return inner_loss(end, BATCH), p, rate, x


@pytest.mark.parametrize("step", [by_autograd, by_func, by_optimizer])
def test_unroll_has_the_gradients_of_the_plain_loop(step: Any) -> None:
    loss, p, rate, x = meta(step, checkpoint=True)
    plain, q, plain_rate, y = meta(step, checkpoint=False)
    assert torch.equal(loss, plain)
    found = torch.autograd.grad(loss, [*p.values(), rate, x])
    expected = torch.autograd.grad(plain, [*q.values(), plain_rate, y])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    # What every step shares is a sum over steps and uses, in another order: rounding.
    torch.testing.assert_close(found[2:], expected[2:], rtol=1e-14, atol=1e-14)
    assert all(g.abs().max() > 1e-6 for g in found)


def test_unroll_against_finite_differences() -> None:
    def after(rate: Tensor) -> Tensor:
        return inner_loss(fd.grad.unroll(by_autograd, start_pair(), 4, rate, BATCH), BATCH)

    assert torch.autograd.gradcheck(after, (torch.tensor(0.05, dtype=torch.float64, requires_grad=True),))
    assert torch.autograd.gradgradcheck(after, (torch.tensor(0.05, dtype=torch.float64, requires_grad=True),))


def test_unroll_is_differentiated_twice_as_the_plain_loop() -> None:
    def twice(checkpoint: bool) -> tuple[Tensor, ...]:
        loss, p, rate, x = meta(by_autograd, checkpoint)
        slopes = torch.autograd.grad(loss, [*p.values(), rate], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in slopes), [*p.values(), rate, x])

    for found, expected in zip(twice(True), twice(False), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


class Held:
    """A saved tensor; counts what is held now."""

    live = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.size = tensor.detach(), tensor.numel()
        Held.live += self.size

    def __del__(self) -> None:
        Held.live -= self.size


def held(steps: int, width: int, checkpoint: bool) -> int:
    """Numbers that the graph holds after the loop; ``width`` is that of an activation that no state has."""
    x = torch.ones(width, 4, dtype=torch.float64)
    p = start_pair()
    rate = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    before = Held.live
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda one: one.tensor):
        end = fd.grad.unroll(by_autograd, p, steps, rate, x, checkpoint=checkpoint)
    found = Held.live - before
    torch.autograd.grad(inner_loss(end, BATCH), rate)
    return found


def test_unroll_keeps_one_state_a_step_whatever_its_activations() -> None:
    state = 4 * 5 + 5 * 2 + 1  # and the rate
    for width in (8, 800):
        assert [held(steps, width, True) for steps in (1, 2, 8)] == [state, 2 * state, 8 * state]
    assert held(8, 800, False) > 8 * 800 * 4
    assert held(8, 800, False) > 50 * held(8, 800, True)


def test_unroll_draws_the_same_random_numbers_again() -> None:
    def noisy(w: Tensor, i: int) -> Tensor:
        return w * torch.nn.functional.dropout(w.sin() + torch.rand_like(w), 0.5)

    results = []
    for checkpoint in (True, False):
        torch.manual_seed(0)
        w = torch.ones(40, dtype=torch.float64, requires_grad=True)
        end = fd.grad.unroll(noisy, w, 3, checkpoint=checkpoint)
        torch.rand(3)
        (slope,) = torch.autograd.grad(end.sum(), w)
        results.append((end, slope, torch.rand(3)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][1].any()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_unroll_through_a_backbone_differentiated_outside_the_block_of_higher_order(checkpoint: bool) -> None:
    layers = [torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
    delta = fd.LoraModel(backbone_model=torch.nn.Sequential(*layers), lora_r=2, modified_modules=["0.linear1"])
    x, scaled = torch.randn(2, 5, 8), fd.tree.randn_like(delta.init(0), 1)
    p = {name: scaled[name].requires_grad_() for name in scaled}

    def step(p: Tensors, i: int, rate: Tensor) -> Tensors:
        found = torch.autograd.grad(
            delta.apply(p, x)[:, 0].square().mean(), list(p.values()), create_graph=True, materialize_grads=True
        )
        return {name: w - rate * g for (name, w), g in zip(p.items(), found, strict=True)}

    def after(rate: Tensor) -> Tensor:
        with fd.grad.higher_order():
            end = fd.grad.unroll(step, p, 3, rate, checkpoint=checkpoint)
        return delta.apply(end, x)[:, 0, :3].sum()

    rate = torch.tensor(0.1, requires_grad=True)
    (slope,) = torch.autograd.grad(after(rate), rate)
    numeric = (after(rate + 0.01) - after(rate - 0.01)) / 0.02
    torch.testing.assert_close(slope, numeric.detach(), rtol=2e-2, atol=1e-5)


def test_unroll_gives_leaves_that_step_reads_from_outside_their_gradients() -> None:
    layer = torch.nn.Linear(3, 3).double()
    state = {"w": torch.ones(3, dtype=torch.float64), "count": torch.tensor(0), "name": "run"}

    def step(s: Any, i: int) -> Any:
        return {**s, "w": layer(s["w"]).tanh(), "count": s["count"] + 1}

    def slopes(checkpoint: bool) -> list[Tensor]:
        end = fd.grad.unroll(step, state, 3, checkpoint=checkpoint)
        assert end["count"].item() == 3
        return list(torch.autograd.grad(end["w"].sum(), list(layer.parameters())))

    torch.testing.assert_close(slopes(True), slopes(False), **EXACT)
    end = fd.grad.unroll(step, state, 3)
    with pytest.raises(RecomputeError, match=r"shape \(3, 3\)|shape \(3,\)"):
        torch.autograd.grad(end["w"].sum(), list(layer.parameters()), create_graph=True)


def test_unroll_is_the_loop_also_for_no_steps_and_without_gradients() -> None:
    w = torch.ones(2, requires_grad=True)
    assert fd.grad.unroll(lambda s, i: s * 2, w, 0) is w
    with torch.no_grad():
        assert fd.grad.unroll(lambda s, i: s * (i + 1), w, 3).tolist() == [6.0, 6.0]
        mapped = torch.vmap(lambda s: fd.grad.unroll(lambda s, i: s * (i + 1), s, 3))(w)
    assert mapped.tolist() == [6.0, 6.0]
    same = fd.grad.unroll(lambda s, i: s, {"lr": w}, 2)["lr"]
    assert torch.autograd.grad(same.sum(), w)[0].tolist() == [1.0, 1.0]


def test_unroll_leaves_its_arguments_as_they_are() -> None:
    p, x = start_pair(), BATCH.clone()
    before = [y.clone() for y in pytree.tree_leaves((p, x))]
    fd.grad.unroll(lambda s, i, x: by_autograd(s, i, x.requires_grad_().mean(), x), p, 2, x)
    assert all(torch.equal(a, b) for a, b in zip(before, pytree.tree_leaves((p, x)), strict=True))
    assert not x.requires_grad


def test_unroll_inside_a_transform_without_checkpoint() -> None:
    def after(rate: Tensor) -> Tensor:
        return inner_loss(fd.grad.unroll(by_func, p, 4, rate, BATCH, checkpoint=False), BATCH)

    p = start_pair()
    rates = torch.tensor([0.01, 0.05], dtype=torch.float64)
    found = torch.vmap(torch.func.grad(after))(rates)
    for rate, slope in zip(rates, found, strict=True):
        leaf = rate.clone().requires_grad_()
        end = fd.grad.unroll(by_func, start_pair(), 4, leaf, BATCH)
        torch.testing.assert_close(torch.autograd.grad(inner_loss(end, BATCH), leaf)[0], slope)


# Dynamo's own, at any graph break that a tensor with a graph passes.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_unroll_in_compiled_code() -> None:
    def train(rate: Tensor, p: Tensors) -> Tensors:
        return fd.grad.unroll(by_func, p, 3, rate * 1.0, BATCH)

    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    found, expected = (
        torch.autograd.grad(inner_loss(run(rate, start_pair()), BATCH), rate)
        for run in (torch.compile(train, backend="eager"), train)
    )
    torch.testing.assert_close(found, expected)


ONE = torch.ones(2, requires_grad=True)
WRONG: Any = 3
DOUBLED = ONE * 2
PAIR: Tensors = {"l.w": torch.ones(2, 2), "l.b": torch.ones(2)}


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (lambda: optim.lion(0.1, betas=WRONG), ConfigError, r"betas must be a pair .*; found 3"),
        (lambda: optim.lion(0.1, betas=(0.9, 1.0)), ConfigError, r"beta2 must be in \[0, 1\)"),
        (
            lambda: optim.muon(0.1, iterations=0),
            ConfigError,
            "iterations must be a whole number of at least 1; found 0",
        ),
        (
            lambda: optim.muon(0.1).init({"a": torch.ones(4, 2, 3)}),
            StackError,
            r"Leaf 'a' has shape \(4, 2, 3\). For a stack write opt\.init\(stack, n=4\)",
        ),
        (
            lambda: optim.muon(0.1, matrices="b").init({"a.b": torch.ones(4, 2)}, n=4),
            StackError,
            r"matrices: leaf 'a\.b' has shape \(4, 2\) of 4 members, which is not one matrix",
        ),
        (lambda: optim.muon(0.1, matrices="x").init(PAIR), MatchError, "No leaf is called 'x'"),
        (lambda: optim.sgd(0.1, groups=WRONG), ConfigError, r"groups must be a dict .*; found 3"),
        (lambda: optim.sgd(0.1, groups={"b": -1.0}), ConfigError, r"groups\['b'\] must be in \[0, inf\); found -1\.0"),
        (
            lambda: optim.sgd(0.1, decay_mask=WRONG),
            ConfigError,
            r"decay_mask must select .* found 3\. .*weight_decay=0\.0",
        ),
        (lambda: optim.sgd(0.1, groups={"bb": 2.0}).init(PAIR), MatchError, r"groups\['bb'\]: No leaf is called 'bb'"),
        (lambda: optim.sgd(0.1, decay_mask="x").init(PAIR), MatchError, "decay_mask: No leaf is called 'x'"),
        (
            lambda: optim.adam(torch.ones(2), groups={"b": torch.ones(3)}),
            ConfigError,
            r"disagree .*: lr has 2, groups\['b'\] has 3",
        ),
        (lambda: optim.cosine(0.1, steps=3, warmup=3), ConfigError, "warmup < steps; found steps=3, warmup=3"),
        (lambda: optim.linear(0.1, steps=0), ConfigError, "found steps=0"),
        (lambda: optim.cosine(0.1, steps=torch.tensor(3.0)), ConfigError, "steps counts updates"),
        (lambda: optim.cosine(-0.1, steps=3), ConfigError, r"peak must be in \[0, inf\)"),
        (lambda: optim.cosine(optim.linear(1.0, 3), steps=3), ConfigError, "peak of a schedule must be a number"),  # type: ignore[arg-type]
        (
            lambda: optim.cosine(torch.ones(3), steps=3)(torch.zeros(2)),
            StackError,
            r"peak of the schedule has 3 values.*has 2 members.*peak=peak\[index\]",
        ),
        (lambda: fd.unroll(lambda s, i: s, ONE, -1), ParamsError, "steps=-1: write how many times fd.grad.unroll"),
        (lambda: fd.unroll(lambda s, i: {"x": s["w"]}, {"w": ONE}, 2), ParamsError, "output of step at i=0"),
        (
            lambda: fd.grad.unroll(lambda s, i: {"w": s["w"].add_(1)}, {"w": torch.ones(2)}, 2),
            ParamsError,
            r"At i=0 .* writes into its argument '0\.w'.*Return new tensors",
        ),
        (
            lambda: fd.grad.unroll(lambda s, i: s * DOUBLED, ONE, 2),
            RecomputeError,
            "i=0 .* a tensor that requires grad but is neither .*MulBackward0.*checkpoint=False",
        ),
        (
            lambda: torch.func.grad(lambda w: fd.grad.unroll(lambda s, i: s * w, w, 2).sum())(torch.ones(2)),
            RecomputeError,
            r"inside a torch\.func transform.*Write fd\.grad\.unroll\(\.\.\., checkpoint=False\)",
        ),
    ],
)
def test_errors_say_where_and_what(action: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        action()
