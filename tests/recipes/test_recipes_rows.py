"""Recipes about rows against retraining, loops and closed forms: influence, privacy, implicit meta-gradients."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.recipes import implicit, influence, privacy

DAMPING = 0.1


class Head:
    """Softmax regression on the outputs of a frozen layer, as a delta that trains the head alone; 40 rows, float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.delta = fd.BitFitModel(backbone, modified_modules=["0"], unfrozen_modules=["deltas", "2"])
        params = self.delta.init(0, dtype=torch.float64)
        self.start, self.rest = fd.partition(params, "2")
        self.x, self.y = torch.randn(40, 5, dtype=torch.float64), torch.randint(3, (40,))
        self.test = (torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,)))

    def losses(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.delta.apply(fd.combine(params, self.rest), x), y, reduction="none")

    def fitted(self, weights: Tensor) -> dict[str, Tensor]:
        """argmin Σ wᵢ Lᵢ / 40 + (damping/2) ‖θ‖², by Newton's method on the raveled head."""
        vector, unravel = fd.tree.ravel(self.start)

        def objective(vector: Tensor) -> Tensor:
            fit = (weights * self.losses(unravel(vector), self.x, self.y)).sum() / 40
            return fit + DAMPING / 2 * vector.square().sum()

        for _ in range(12):
            slope, curvature = torch.func.grad(objective)(vector), torch.func.hessian(objective)(vector)
            vector = vector - torch.linalg.solve(curvature, slope)
        return unravel(vector)

    def retrained(self) -> tuple[dict[str, Tensor], Tensor]:
        """The head of all rows, and how the test loss changes without each of them, all retrainings in one run."""
        whole = self.fitted(torch.ones(40, dtype=torch.float64))
        apart = torch.vmap(self.fitted)(1 - torch.eye(40, dtype=torch.float64))
        after = torch.vmap(lambda p: self.losses(p, *self.test).mean())(apart)
        return whole, after - self.losses(whole, *self.test).mean()


@pytest.fixture(scope="module")
def head() -> Head:
    return Head()


def test_influence_is_what_retraining_without_the_row_changes(head: Head) -> None:
    whole, change = head.retrained()
    found = influence.without_each(head.losses, whole, (head.x, head.y), head.test, damping=DAMPING, steps=30)
    assert torch.corrcoef(torch.stack([found, change]))[0, 1] > 0.99
    torch.testing.assert_close(found, change, rtol=0.3, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_one_newton_step_is_closer_to_retraining_than_the_influence(head: Head, chunk_size: int | None) -> None:
    whole, change = head.retrained()
    data = (head.x, head.y), head.test
    influences = influence.without_each(head.losses, whole, *data, damping=DAMPING, steps=30)
    found = influence.newton_without_each(head.losses, whole, *data, damping=DAMPING, steps=30, chunk_size=chunk_size)
    assert (found - change).abs().mean() < 0.25 * (influences - change).abs().mean()
    assert abs(found.std() / change.std() - 1) < 0.02


def test_influence_of_lora_with_a_head_is_what_retraining_changes() -> None:
    """No convex training: each retraining goes down from the common minimum, so that it ends in the same valley."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    delta = fd.LoraModel(backbone, lora_r=1, lora_alpha=2, modified_modules=["0"], unfrozen_modules=["deltas", "2"])
    trained, rest = fd.partition(delta.init(0, dtype=torch.float64), delta.trainable)
    start, unravel = fd.tree.ravel(fd.tree.add(trained, fd.tree.scale(fd.tree.randn_like(trained, 1), 0.3)))
    x = torch.randn(40, 5, dtype=torch.float64)
    y = ((x[:, 0] + x[:, 1] > 0).long() + (x[:, 2] + 0.5 * torch.randn(40) > 0)) % 3
    test = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))

    def losses(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(delta.apply(fd.combine(params, rest), x), y, reduction="none")

    def objective(vector: Tensor, weights: Tensor) -> Tensor:
        return (weights * losses(unravel(vector), x, y)).sum() / 40 + 0.03 / 2 * vector.square().sum()

    slope = torch.func.grad(objective)

    def fitted(vector: Tensor, weights: Tensor) -> Tensor:
        speed = torch.zeros_like(vector)
        for _ in range(250):
            speed = 0.95 * speed - 0.05 * slope(vector, weights)
            vector = vector + speed
        return vector

    everyone = torch.ones(40, dtype=torch.float64)
    whole = fitted(fitted(start, everyone), everyone)
    assert slope(whole, everyone).abs().max() < 1e-5
    assert unravel(whole)["0.lora.lora_B"].abs().max() > 0.05  # a delta was learnt
    others = 1 - torch.eye(40, dtype=torch.float64)
    apart = torch.vmap(lambda weights: fitted(whole, weights))(others)
    assert torch.vmap(slope)(apart, others).abs().max() < 5e-3
    after = torch.vmap(lambda v: losses(unravel(v), *test).mean())(apart)
    change = after - losses(unravel(whole), *test).mean()
    options = {"damping": 0.03, "steps": 30}
    by_derivative = influence.without_each(losses, unravel(whole), (x, y), test, **options)
    by_newton = influence.newton_without_each(losses, unravel(whole), (x, y), test, **options)
    assert torch.corrcoef(torch.stack([by_derivative, change]))[0, 1] > 0.9
    assert (by_newton - change).abs().median() < 0.7 * (by_derivative - change).abs().median()
    # Some rows hold up the valley that the others lie in: there a step overshoots, and the mean error is no better.
    assert torch.corrcoef(torch.stack([by_newton, change]))[0, 1] > 0.75


def test_one_newton_step_is_retraining_where_losses_are_quadratic() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    judged = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def losses(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (x @ p["w"] - y).square() / 2

    def ridge(kept: Tensor) -> dict[str, Tensor]:
        curvature = x.T @ (kept[:, None] * x) / 12 + DAMPING * torch.eye(3, dtype=torch.float64)
        return {"w": torch.linalg.solve(curvature, x.T @ (kept * y) / 12)}

    whole = ridge(torch.ones(12, dtype=torch.float64))
    apart = torch.vmap(ridge)(1 - torch.eye(12, dtype=torch.float64))
    expected = torch.vmap(lambda p: losses(p, *judged).mean())(apart) - losses(whole, *judged).mean()
    found = influence.newton_without_each(losses, whole, (x, y), judged, damping=DAMPING, steps=3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_influence_is_the_dense_solve(head: Head) -> None:
    vector, unravel = fd.tree.ravel(head.start)
    hessian = torch.func.hessian(lambda v: head.losses(unravel(v), head.x, head.y).mean())(vector)
    wanted = torch.func.grad(lambda v: head.losses(unravel(v), *head.test).mean())(vector)
    rows = torch.func.jacrev(lambda v: head.losses(unravel(v), head.x, head.y))(vector)
    eye = torch.eye(len(vector), dtype=torch.float64)
    expected = rows @ torch.linalg.solve(hessian + DAMPING * eye, wanted) / 40
    found = influence.without_each(head.losses, head.start, (head.x, head.y), head.test, damping=DAMPING, steps=40)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-10)


def test_self_influence_is_the_squared_norm_of_a_gradient(head: Head) -> None:
    weight, rest = fd.partition(head.start, "2.weight")
    rows = torch.func.jacrev(lambda w: head.losses(fd.combine({"2.weight": w}, rest), head.x, head.y))
    expected = rows(weight["2.weight"]).flatten(1).square().sum(1)
    found = influence.self_influence(lambda p, x, y: head.losses(fd.combine(p, rest), x, y), weight, (head.x, head.y))
    torch.testing.assert_close(found, expected)


def loss_of_row(head: Head):
    return lambda params, x, y: head.losses(params, x, y).sum()


def test_gradients_are_clipped_row_by_row(head: Head) -> None:
    found = privacy.gradient(
        loss_of_row(head), head.start, (head.x, head.y), 0, clip=0.3, noise=0.0, expected=4, chunk_size=5
    )
    total = fd.tree.scale(head.start, 0.0)
    cut = 0
    for i in range(40):
        row = torch.func.grad(loss_of_row(head))(head.start, head.x[i : i + 1], head.y[i : i + 1])
        norm = math.sqrt(sum(float(leaf.square().sum()) for leaf in row.values()))
        cut += norm > 0.3
        total = fd.tree.add(total, fd.tree.scale(row, min(1.0, 0.3 / norm)))
    assert cut > 0
    for name, leaf in total.items():
        torch.testing.assert_close(found[name], leaf / 4)


def test_one_row_more_moves_the_sum_by_at_most_the_clip(head: Head) -> None:
    def summed(rows: int) -> dict[str, Tensor]:
        data = (head.x[:rows], head.y[:rows])
        return privacy.gradient(loss_of_row(head), head.start, data, 0, clip=0.3, noise=0.0, expected=1)

    assert not any(leaf.any() for leaf in summed(0).values())
    for rows in range(0, 40, 3):
        assert fd.tree.norm(fd.tree.sub(summed(rows + 1), summed(rows))) <= 0.3 + 1e-12


def test_a_row_without_a_finite_gradient_counts_as_none(head: Head) -> None:
    def with_a_hole(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return head.losses(params, x, y).sum() / (x[0, 0] != head.x[3, 0])

    options = {"clip": 0.3, "noise": 0.0, "expected": 1}
    found = privacy.gradient(with_a_hole, head.start, (head.x, head.y), 0, **options)
    others = torch.arange(40) != 3
    expected = privacy.gradient(loss_of_row(head), head.start, (head.x[others], head.y[others]), 0, **options)
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf)


def test_the_noise_has_its_deviation_and_its_seed(head: Head) -> None:
    def noise(seed: int) -> Tensor:
        empty = (head.x[:0], head.y[:0])
        found = privacy.gradient(loss_of_row(head), head.start, empty, seed, clip=2.0, noise=1.5, expected=6)
        return fd.tree.ravel(found)[0]

    draws = torch.stack([noise(seed) for seed in range(400)])
    torch.testing.assert_close(draws.std(), torch.tensor(1.5 * 2.0 / 6, dtype=torch.float64), rtol=0.05, atol=0)
    assert torch.equal(noise(3), noise(3))
    assert not torch.equal(noise(3), noise(4))
    # No two numbers share their noise, of one leaf or of two.
    assert (torch.corrcoef(draws.mT) - torch.eye(draws.shape[1])).abs().max() < 0.25


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_private_gradients_of_members_are_those_of_each(head: Head, chunk_size: int | None) -> None:
    stack = fd.tree.add(fd.broadcast(head.start, 3), fd.tree.randn_like(fd.broadcast(head.start, 3), [1, 2, 3]))
    rows, taken = privacy.batches(40, 0.2, seeds=[4, 5, 6])
    sizes = taken.sum(1).tolist()
    assert len(set(sizes)) > 1
    noise, clip = torch.tensor([0.5, 0.0, 2.0]), torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)
    x = torch.where(taken[..., None], head.x[rows], torch.nan)  # what is not taken may be anything
    x[2, 0] = torch.inf  # a row whose gradient is not finite
    found = privacy.gradients(
        loss_of_row(head),
        stack,
        (x, head.y[rows]),
        taken,
        [7, 8, 9],
        clip=clip,
        noise=noise,
        expected=8,
        chunk_size=chunk_size,
    )
    for i, params in enumerate(fd.unstack(stack)):
        alone = rows[i, : sizes[i]]
        assert torch.equal(alone, privacy.batch(40, 0.2, 4 + i))
        options = {"clip": float(clip[i]), "noise": float(noise[i]), "expected": 8}
        expected = privacy.gradient(loss_of_row(head), params, (x[i, : sizes[i]], head.y[alone]), 7 + i, **options)
        torch.testing.assert_close(fd.take(found, i), expected)


def test_batches_have_their_rate() -> None:
    sizes = torch.tensor([float(len(privacy.batch(100, 0.2, seed))) for seed in range(200)])
    assert abs(float(sizes.mean()) - 20) < 1
    torch.testing.assert_close(sizes.std(), torch.tensor(4.0), rtol=0.2, atol=0)


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """δ(ε) of one Gaussian mechanism of sensitivity 1, in closed form (Balle and Wang 2018, theorem 8)."""

    def normal(z: float) -> float:
        return 0.5 * math.erfc(-z / math.sqrt(2))

    first = normal(1 / (2 * sigma) - epsilon * sigma)
    return first - math.exp(epsilon) * normal(-1 / (2 * sigma) - epsilon * sigma)


@pytest.mark.parametrize(("steps", "noise"), [(1, 1.0), (16, 8.0)])
def test_the_accountant_agrees_with_the_closed_form(steps: int, noise: float) -> None:
    # Without sampling k steps are one step with the noise divided by √k.
    found = privacy.epsilon(steps, 1.0, noise, 1e-5)
    assert gaussian_delta(found, noise / math.sqrt(steps)) == pytest.approx(1e-5, rel=0.02)


def test_noise_is_found_for_a_budget() -> None:
    noise = privacy.noise_for(epsilon=3.0, steps=50, rate=0.1, delta=1e-4)
    assert privacy.epsilon(50, 0.1, noise, 1e-4) == pytest.approx(3.0, abs=0.02)
    assert privacy.epsilon(50, 0.1, 2 * noise, 1e-4) < 1.5


def quadratic(params: dict[str, Tensor], curvature: Tensor, goal: Tensor) -> Tensor:
    away = params["w"] - goal
    return away @ curvature @ away / 2


def test_the_implicit_gradient_of_quadratic_tasks_is_exact() -> None:
    torch.manual_seed(0)
    root = torch.randn(3, 4, 4, dtype=torch.float64)
    curvature = root @ root.mT / 4
    support = (curvature, torch.randn(3, 4, dtype=torch.float64))
    query = (curvature.flip(0), torch.randn(3, 4, dtype=torch.float64))
    theta, strength = torch.randn(4, dtype=torch.float64), 2.0
    found = implicit.meta_gradient(
        quadratic, {"w": theta}, support, query, strength=strength, steps=400, lr=0.1, solve=8
    )["w"]
    eye, expected = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for i in range(3):
        system = curvature[i] + strength * eye
        solution = torch.linalg.solve(system, curvature[i] @ support[1][i] + strength * theta)
        slope = query[0][i] @ (solution - query[1][i])
        expected += torch.linalg.solve(system / strength, slope) / 3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_the_implicit_gradient_is_that_of_many_inner_steps(head: Head) -> None:
    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return head.losses(params, x, y).mean()

    support = (head.x.view(2, 20, 5), head.y.view(2, 20))
    query = (head.test[0].view(2, 4, 5), head.test[1].view(2, 4))
    options = {"strength": 0.5, "steps": 120, "lr": 0.5}

    def unrolled(params: dict[str, Tensor]) -> Tensor:
        one = torch.vmap(lambda s, q: loss(implicit.adapt(loss, params, s, **options), *q))
        return one(support, query).mean()

    expected = torch.func.grad(unrolled)(head.start)
    found = implicit.meta_gradient(loss, head.start, support, query, **options, solve=15)
    for name, leaf in expected.items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-5, atol=1e-8)


def test_a_missing_accountant_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "funcdelta\[privacy\]"'):
        privacy.epsilon(1, 1.0, 1.0, 1e-5)
