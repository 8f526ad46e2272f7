"""Populations, SWAG and evolution strategies against loops, closed forms and true gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import funcdelta as fd
from funcdelta.recipes import evolution, swag
from funcdelta.recipes.population import exploit_and_explore, halve


@pytest.fixture(scope="module")
def problem():
    """A tiny regression: the delta, a loss of a stack, (n,), and its data."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])
    x = torch.randn(16, 3)
    y = x.sum(-1, keepdim=True)

    def losses(stack: dict[str, Tensor]) -> Tensor:
        return (delta.apply_many(stack, x) - y).square().mean((1, 2))

    return delta, losses, (x, y)


def train(losses, population, rates: Tensor, steps: int):
    stack, state = population
    step = fd.value_and_grad(losses)
    values = torch.zeros(())
    for _ in range(steps):
        values, grads = step(stack)
        updates, state = fd.optim.adamw(lr=rates).update(grads, state, stack)
        stack = fd.tree.add(stack, updates)
    return (stack, state), values


def test_a_copy_trains_on_as_its_parent_does(problem) -> None:
    delta, losses, _ = problem
    rates = torch.tensor([1e-3, 1e-2, 3e-2, 1e-1])
    stack = delta.init(0, n=4)
    population, values = train(losses, (stack, fd.optim.adamw(lr=rates).init(stack)), rates, 5)
    (copied, state), new_rates, parents = exploit_and_explore(population, rates, -values, seed=1)
    worst, best = int(values.argmax()), int(values.argmin())
    assert parents.tolist() == [best if i == worst else i for i in range(4)]
    assert new_rates[worst] in (rates[best] * torch.tensor([1.2, 1 / 1.2]))
    kept = [i for i in range(4) if i != worst]
    assert torch.equal(new_rates[kept], rates[kept])
    # With the parent's own rate the copy, moments and step count included, is the parent for good.
    (after, _), _ = train(losses, (copied, state), rates[parents], 3)
    for name, leaf in after.items():
        assert torch.equal(leaf[worst], leaf[best]), name
    alone, _ = train(losses, fd.take(population, [best]), rates[[best]], 3)
    for name, leaf in alone[0].items():
        torch.testing.assert_close(after[name][worst], leaf[0])


def test_survivors_of_a_rung_go_on_as_if_the_others_had_never_been(problem) -> None:
    delta, losses, _ = problem
    rates = torch.tensor([1e-3, 1e-2, 3e-2, 1e-1])
    stack = delta.init(0, n=4)
    population, values = train(losses, (stack, fd.optim.adamw(lr=rates).init(stack)), rates, 5)
    rest, survivors = halve(population, -values)
    assert set(survivors.tolist()) == set(values.argsort()[:2].tolist())
    assert survivors.tolist() == sorted(survivors.tolist())
    (after, _), _ = train(losses, rest, rates[survivors], 5)
    (whole, _), _ = train(losses, population, rates, 5)
    for name, leaf in after.items():
        torch.testing.assert_close(leaf, whole[name][survivors])


def test_a_rung_leaves_at_least_one() -> None:
    rest, survivors = halve({"w": torch.arange(3.0)}, torch.tensor([0.0, 2.0, 1.0]), keep=0.1)
    assert survivors.tolist() == [1]
    assert rest["w"].tolist() == [1.0]


def test_moments_are_those_of_the_params_seen() -> None:
    seen = [{"w": torch.randn(3, generator=torch.Generator().manual_seed(i))} for i in range(7)]
    moments = None
    for params in seen:
        moments = swag.collect(moments, params, rank=4)
    assert moments is not None
    stacked = torch.stack([params["w"] for params in seen])
    torch.testing.assert_close(moments.mean["w"], stacked.mean(0))
    torch.testing.assert_close(moments.square["w"], stacked.square().mean(0))
    # A deviation is from the mean of its own time, as in the paper.
    expected = [stacked[k] - stacked[: k + 1].mean(0) for k in range(3, 7)]
    for found, one in zip(moments.deviations, expected, strict=True):
        torch.testing.assert_close(found["w"], one)


def test_samples_have_the_covariance_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = None
    for _ in range(5):
        moments = swag.collect(
            moments, {"a": torch.randn(2, generator=generator), "b": torch.randn((), generator=generator)}
        )
    assert moments is not None
    draws = torch.stack([fd.tree.ravel(swag.sample(moments, seed))[0] for seed in range(6000)])
    mean = fd.tree.ravel(moments.mean)[0]
    variance = fd.tree.ravel(moments.square)[0] - mean**2
    d = torch.stack([fd.tree.ravel(one)[0] for one in moments.deviations])
    covariance = 0.5 * (variance.diag() + d.T @ d / (len(d) - 1))
    torch.testing.assert_close(draws.mean(0), mean, rtol=0, atol=0.05)
    torch.testing.assert_close(draws.T.cov(), covariance, rtol=0.1, atol=0.04)


def test_a_strategy_finds_the_gradient(problem) -> None:
    delta, losses, (x, y) = problem
    params = delta.init(0)
    trained, constants = fd.partition(params, delta.trainable)
    trained = fd.tree.add(trained, fd.tree.scale(fd.tree.randn_like(trained, 1), 0.3))

    def score(stack):
        return losses(fd.combine(stack, fd.broadcast(constants, fd.members(stack))))

    estimate = evolution.gradient(score, trained, seed=0, n=2000, sigma=1e-2)
    true = torch.func.grad(lambda p: F.mse_loss(delta.apply(fd.combine(p, constants), x), y))(trained)
    cosine = fd.tree.vdot(estimate, true) / (fd.tree.norm(estimate) * fd.tree.norm(true))
    assert cosine > 0.97
    torch.testing.assert_close(fd.tree.norm(estimate), fd.tree.norm(true), rtol=0.1, atol=0)


def test_a_strategy_is_its_own_sum(problem) -> None:
    """One pair after the other, with the noise drawn member by member, gives the same."""
    weights = torch.tensor([1.0, -2.0, 0.5])

    def score(stack):
        return (stack["w"] * weights).sum(-1) + (stack["w"] ** 3).sum(-1)

    params = {"w": torch.tensor([0.1, 0.2, -0.3])}
    found = evolution.gradient(score, params, seed=3, n=5, sigma=0.2)
    total = torch.zeros(3)
    for seed in fd.seeds(3, 5):
        noise = fd.tree.randn_like(params, seed)["w"]
        up, down = (score({"w": params["w"] + s * noise}) for s in (0.2, -0.2))
        total += (up - down) / 0.4 * noise / 5
    torch.testing.assert_close(found["w"], total)


def test_scores_of_rank_one_perturbations_are_summed_exactly() -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 4)).double()
    low, thin = (fd.LoraModel(backbone, lora_r=r, lora_alpha=r, modified_modules=["0"]) for r in (2, 1))
    start = fd.tree.map(torch.clone, low.init(0, dtype=torch.float64))
    goal = torch.randn(4, 3, dtype=torch.float64)

    def score(delta, stack):
        return -(fd.algebra.materialise(delta, stack)["0.weight"] - goal).square().sum((1, 2))

    n, sigma = 5, 0.1
    found = fd.algebra.materialise(*evolution.rank_one(score, (low, start), thin, 3, n=n, sigma=sigma))["0.weight"]
    change = fd.algebra.materialise(low, start)["0.weight"]
    expected = torch.zeros_like(goal)
    for seed in fd.seeds(3, n):  # a member's perturbation is drawn from its seed alone
        one = fd.tree.randn_like({k: v for k, v in thin.init(0).items() if k not in thin.constants}, seed)
        e = (one["0.lora.lora_B"] @ one["0.lora.lora_A"]).double()
        up, down = (-(change + s * e - goal).square().sum() for s in (sigma, -sigma))
        expected += (up - down) / (2 * n * sigma) * e
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rank_one_perturbations_estimate_the_gradient() -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 4))
    thin = fd.LoraModel(backbone, lora_r=1, lora_alpha=1, modified_modules=["0"])
    slope = torch.randn(4, 3)

    def score(delta, stack):
        return (fd.algebra.materialise(delta, stack)["0.weight"] * slope).sum((1, 2))

    found = evolution.rank_one(score, (thin, thin.init(0)), thin, 0, n=3000, sigma=0.1)
    estimate = fd.algebra.materialise(*found)["0.weight"]
    assert torch.nn.functional.cosine_similarity(estimate.flatten(), slope.flatten(), dim=0) > 0.98
    assert abs(float(estimate.norm() / slope.norm()) - 1) < 0.1


def test_a_member_that_diverged_is_the_worst() -> None:
    scores = torch.tensor([0.1, float("nan"), 0.3, 0.2])
    assert 1 not in halve({"w": torch.arange(4.0)}, scores, keep=0.75)[1]
    _, _, parents = exploit_and_explore({"w": torch.arange(4.0)}, torch.ones(4), scores, seed=0)
    assert parents.tolist() == [0, 2, 2, 3]
