"""Every recipe given all params is the recipe given the leaves that train: constants come out bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.recipes import (
    evolution,
    federated,
    hypernetwork,
    implicit,
    influence,
    laplace,
    meta_learning,
    population,
    privacy,
    soups,
    steering,
    swag,
)

Params = dict[str, Tensor]
N = 3


class Case:
    """LoRA of rank 3 and a parallel adapter of scale 0.3: constants whose sums and means are rounded; float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
        self.delta = fd.DeltaModel(
            backbone,
            fd.LoraConfig(lora_r=3, lora_alpha=1, modified_modules=["0"]),
            fd.ParallelAdapterConfig(bottleneck_dim=2, scaled=0.3, modified_modules=["2"]),
        )
        self.fresh = self.delta.init(0)
        noise = fd.tree.scale(fd.tree.randn_like(self.fresh, 1), 0.3)
        self.params = {k: p if k in self.delta.constants else p + noise[k] for k, p in self.fresh.items()}
        self.x, self.y = torch.randn(6, 4, dtype=torch.double), torch.randint(3, (6,))
        self.tasks = (torch.randn(7, 6, 4, dtype=torch.double), torch.randint(3, (7, 6)))

    def parts(self, params: Params) -> tuple[Params, Params]:
        return fd.partition(params, self.delta.trainable)

    def loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.delta.apply(params, x), y)

    def losses(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.delta.apply(params, x), y, reduction="none")

    def closed(self, f: Callable[..., Any]) -> Callable[..., Any]:
        """``f`` of the leaves that train alone."""
        constants = self.parts(self.params)[1]
        return lambda some, *data: f(fd.combine(some, constants, order=self.params), *data)

    def same(self, found: Params, expected: Params, constants: Params | None = None) -> None:
        """The leaves that train are those ``expected``; the constants are ``constants``, bit for bit."""
        trained, rest = self.parts(found)
        assert expected.keys() == trained.keys()
        for name, leaf in expected.items():
            torch.testing.assert_close(trained[name], leaf, rtol=1e-9, atol=1e-12)
        wanted = self.parts(self.params)[1] if constants is None else constants
        assert len(rest) == 2
        for name, leaf in rest.items():
            assert torch.equal(leaf, wanted[name].expand_as(leaf)), name


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def unmarked(params: Params) -> Params:
    return {name: leaf.clone() for name, leaf in params.items()}


def score_of_losses(case: Case, stack: Params) -> Tensor:
    return -torch.vmap(F.cross_entropy, in_dims=(0, None))(case.delta.apply_many(stack, case.x), case.y)


def score_of_answers(case: Case, stack: Params) -> Tensor:
    with torch.no_grad():
        right = (case.delta.apply_many(stack, case.x).argmax(-1) == case.y).double().mean(-1)
    return torch.from_numpy(right.numpy()) + 0.1 * score_of_losses(case, stack).detach()


@pytest.mark.parametrize("score", [score_of_losses, score_of_answers])
@pytest.mark.parametrize("start", ["fresh", "params"])
def test_evolution_strategies(case: Case, score: Callable[[Case, Params], Tensor], start: str) -> None:
    params = unmarked(getattr(case, start))
    some, constants = case.parts(params)
    zeros = fd.tree.map(torch.zeros_like, constants)
    whole = evolution.gradient(lambda s: score(case, s), params, 5, n=8, sigma=0.05)
    alone = evolution.gradient(
        lambda s: score(case, fd.combine(s, fd.broadcast(constants, fd.members(s)))), some, 5, n=8, sigma=0.05
    )
    case.same(whole, alone, zeros)
    assert list(whole) == list(params)
    assert any(leaf.any() for leaf in alone.values())


def test_evolution_strategies_of_the_leaves_that_are_named(case: Case) -> None:
    def score(stack: Params) -> Tensor:
        calls.append(fd.members(stack))
        return score_of_losses(case, stack)

    calls: list[int] = []
    options = {"n": 8, "sigma": 0.05}
    whole = evolution.gradient(score, case.params, 5, **options)
    assert calls == [2, 16]
    told = evolution.gradient(score, case.params, 5, trainable=case.delta.trainable, **options)
    case.same(told, case.parts(whole)[0], fd.tree.map(torch.zeros_like, case.parts(case.params)[1]))
    assert calls[2:] == [16]
    told = evolution.gradient(score, case.params, 5, trainable="lora_A", **options)
    assert {name for name, leaf in told.items() if leaf.any()} == {"0.lora.lora_A"}


@pytest.mark.parametrize("structure", ["full", "diagonal", "kfac"])
@pytest.mark.parametrize("start", ["fresh", "params"])
def test_laplace(case: Case, structure: str, start: str) -> None:
    params = getattr(case, start)
    some, constants = case.parts(params)

    def fit(f: Any, params: Params, x: Tensor) -> laplace.Posterior:
        halves = x.split(4)
        if structure == "full":
            return laplace.full_posterior(params, sum(laplace.ggn(f, params, half) for half in halves))
        if structure == "diagonal":
            first, second = (laplace.ggn_diagonal(f, params, half) for half in halves)
            return laplace.diagonal_posterior(params, fd.tree.add(first, second))
        return laplace.kfac_posterior(params, laplace.kronecker_factors(f, params, x), len(x))

    whole, alone = fit(case.delta.apply, params, case.x), fit(case.closed(case.delta.apply), some, case.x)
    prior = laplace.choose_prior(alone, 1.0)
    torch.testing.assert_close(laplace.choose_prior(whole, 1.0), prior)
    torch.testing.assert_close(laplace.log_evidence(whole, prior, -1.0), laplace.log_evidence(alone, prior, -1.0))
    centre = fd.tree.scale(params, 0.5)
    torch.testing.assert_close(
        laplace.log_evidence(whole, 2.0, 0.0, centre=centre),
        laplace.log_evidence(alone, 2.0, 0.0, centre=case.parts(centre)[0]),
    )
    for found, expected in zip(
        laplace.linearised(case.delta.apply, whole, 2.0, case.x),
        laplace.linearised(case.closed(case.delta.apply), alone, 2.0, case.x),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    draws, expected = laplace.sample(whole, 2.0, 0, n=2000), laplace.sample(alone, 2.0, 0, n=2000)
    for name, leaf in draws.items():
        if name in constants:
            assert torch.equal(leaf, constants[name].expand_as(leaf))
        else:  # other draws of the same Gaussian, where entries are drawn together
            torch.testing.assert_close(leaf.std(0), expected[name].std(0), rtol=0.12, atol=1e-3)
            torch.testing.assert_close(leaf.mean(0), params[name], rtol=0, atol=0.1)


def test_laplace_of_a_stack(case: Case) -> None:
    """Mapped over members, where no leaf is marked and no value can be read."""
    stack = fd.stack([case.params, case.fresh])

    def posterior(params: Params) -> laplace.Full:
        return laplace.full_posterior(params, laplace.ggn(case.delta.apply, params, case.x))

    posteriors = torch.vmap(posterior)(stack)
    for i, params in enumerate((case.params, case.fresh)):
        drawn = laplace.sample(fd.take(posteriors, i), 1.0, 0, n=4)
        for name in case.delta.constants:
            assert torch.equal(drawn[name], params[name].expand(4))


def test_swag(case: Case) -> None:
    moments = alone = None
    for seed in range(5):
        step = fd.tree.scale(fd.tree.randn_like(case.params, seed), 0.1)
        params = {k: p if k in case.delta.constants else p + step[k] for k, p in case.params.items()}
        moments, alone = swag.collect(moments, params), swag.collect(alone, case.parts(params)[0])
    assert moments is not None
    assert alone is not None
    for seed in range(4):
        case.same(swag.sample(moments, seed), swag.sample(alone, seed))


def test_meta_learning(case: Case) -> None:
    some, constants = case.parts(case.params)
    inner = {"steps": 3, "lr": 0.1}
    closed = case.closed(case.loss)
    one = [part[0] for part in case.tasks]
    case.same(
        meta_learning.adapt(case.loss, case.params, one, **inner), meta_learning.adapt(closed, some, one, **inner)
    )
    moved, expected = case.params, some
    for _ in range(5):
        moved = meta_learning.reptile(case.loss, moved, case.tasks, rate=0.7, **inner)
        expected = meta_learning.reptile(closed, expected, case.tasks, rate=0.7, **inner)
    case.same(moved, expected)
    gradient = torch.func.grad(lambda p: meta_learning.maml_loss(case.loss, p, case.tasks, case.tasks, **inner))
    zeros = fd.tree.map(torch.zeros_like, constants)
    alone = torch.func.grad(lambda p: meta_learning.maml_loss(closed, p, case.tasks, case.tasks, **inner))(some)
    case.same(gradient(case.params), alone, zeros)


def test_implicit_gradients(case: Case) -> None:
    some, constants = case.parts(case.params)
    inner = {"strength": 2.0, "steps": 3, "lr": 0.1}
    one = [part[0] for part in case.tasks]
    closed = case.closed(case.loss)
    case.same(implicit.adapt(case.loss, case.params, one, **inner), implicit.adapt(closed, some, one, **inner))
    case.same(
        implicit.meta_gradient(case.loss, case.params, case.tasks, case.tasks, **inner),
        implicit.meta_gradient(closed, some, case.tasks, case.tasks, **inner),
        fd.tree.map(torch.zeros_like, constants),
    )


def test_influence(case: Case) -> None:
    some, data = case.parts(case.params)[0], (case.x, case.y)
    closed = case.closed(case.losses)
    for recipe in (influence.without_each, influence.newton_without_each):
        found = recipe(case.losses, case.params, data, data, damping=2.0, steps=10)
        torch.testing.assert_close(
            found, recipe(closed, some, data, data, damping=2.0, steps=10), rtol=1e-8, atol=1e-12
        )
    whole = influence.self_influence(case.losses, case.params, data)
    torch.testing.assert_close(whole, influence.self_influence(closed, some, data))


@pytest.mark.parametrize("rows", [6, 0])
@pytest.mark.parametrize("start", ["fresh", "params"])
def test_privacy(case: Case, rows: int, start: str) -> None:
    """Also where the batch is empty: noise does not tell it, and A has its noise at B = 0, where its gradient is 0."""
    params = getattr(case, start)
    some, constants = case.parts(params)
    data = (case.x[:rows], case.y[:rows])
    options = {"clip": 0.1, "noise": 1.3, "expected": 4}
    zeros = fd.tree.map(torch.zeros_like, constants)
    found = privacy.gradient(case.loss, params, data, 3, **options)
    case.same(found, privacy.gradient(case.closed(case.loss), some, data, 3, **options), zeros)
    assert found["0.lora.lora_A"].any()
    taken = torch.ones(N, 6, dtype=torch.bool)
    taken[1] = False
    stack, many = fd.broadcast(params, N), [part.expand(N, *part.shape) for part in (case.x, case.y)]
    together = privacy.gradients(case.loss, stack, many, taken, [3, 4, 5], **options)
    for i in range(N):
        own = (case.x, case.y) if taken[i].any() else (case.x[:0], case.y[:0])
        alone = privacy.gradient(case.closed(case.loss), some, own, 3 + i, **options)
        case.same(fd.take(together, i), alone, zeros)


def test_averages(case: Case) -> None:
    stack = fd.broadcast(case.params, N)
    noise = fd.tree.scale(fd.tree.randn_like(stack, [1, 2, 3]), 1e-3)
    stack = {k: p if k in case.delta.constants else p + noise[k] for k, p in stack.items()}
    shares = [0.7, 0.2, 0.1]
    some = case.parts(stack)[0]
    expected = {k: sum(w * leaf[i] for i, w in enumerate(shares)) for k, leaf in some.items()}
    case.same(federated.naive(stack, shares), expected)
    case.same(federated.naive(unmarked(stack), shares), expected)
    lora = fd.LoraModel(case.delta.backbone, lora_r=3, lora_alpha=1, modified_modules=["0"])
    factors = fd.broadcast(fd.tree.randn_like(lora.init(0), 0), N)
    factors["0.lora.scale"] = lora.init(0)["0.lora.scale"].expand(N)
    soup = fd.algebra.soup(lora, factors, shares)
    assert torch.equal(soup["0.lora.scale"], factors["0.lora.scale"][0])
    torch.testing.assert_close(soup["0.lora.lora_A"], factors["0.lora.lora_A"][0])
    for made, params in (soups.mean(lora, factors, [0, 2]), federated.exact(lora, factors, rank=3)):
        found = fd.algebra.materialise(made, params)["0.weight"]
        torch.testing.assert_close(found, fd.algebra.materialise(lora, fd.take(factors, 0))["0.weight"])


def test_clients_and_populations_take_constants_along(case: Case) -> None:
    data = (torch.randn(N, 6, 4, dtype=torch.double), torch.randint(3, (N, 6)))

    def train(params: Params, x: Tensor, y: Tensor) -> Params:
        opt = fd.optim.adamw(lr=0.1, weight_decay=0.3)
        state = opt.init(params)
        for _ in range(2):
            updates, state = opt.update(torch.func.grad(case.loss)(params, x, y), state, params)
            params = fd.tree.add(params, updates)
        return params

    stack = federated.clients(train, case.params, *data)
    for i in range(N):
        case.same(fd.take(stack, i), case.parts(train(case.params, *(part[i] for part in data)))[0])
    stack["0.lora.scale"] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.double)  # what one has, its copies have
    copied, _, parents = population.exploit_and_explore(stack, torch.ones(N), torch.tensor([0.3, 0.1, 0.2]), seed=0)
    assert parents.tolist() == [0, 0, 2]
    assert copied["0.lora.scale"].tolist() == [0.1, 0.1, 0.3]
    assert population.halve(stack, torch.tensor([0.3, 0.1, 0.2]), keep=0.7)[0]["0.lora.scale"].tolist() == [0.1, 0.3]


def test_written_and_dialled_deltas(case: Case) -> None:
    codes = torch.randn(2, hypernetwork.width(case.delta, case.params), dtype=torch.double)
    written = hypernetwork.written(case.delta, case.params, codes)
    vector, unravel = fd.tree.ravel(case.parts(case.params)[0])
    for i in range(2):
        case.same(fd.take(written, i), unravel(vector + codes[i]))
    lora = fd.LoraModel(case.delta.backbone, lora_r=3, lora_alpha=1, modified_modules=["0"])
    params = {k: p if k in lora.constants else p + 1 for k, p in lora.init(0).items()}
    dialled = steering.dial(lora, params, [0.0, 1.0, 3.0])
    change = fd.algebra.materialise(lora, params)["0.weight"]
    for dose, found in zip((0.0, 1.0, 3.0), fd.algebra.materialise(*dialled)["0.weight"], strict=True):
        torch.testing.assert_close(found, dose * change)
