"""Recipes on several deltas against loops and dense sums: federated, soups, steering, routing, hypernetworks."""

from __future__ import annotations

import pytest
import torch
from handmade import random_params
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.recipes import federated, hypernetwork, routing, soups, steering

CLIENTS = 3


class Model(nn.Module):
    """Two layers, float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Case:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.delta = fd.LoraModel(
            Model().double(), lora_r=2, modified_modules=["body"], unfrozen_modules=["deltas", "head"]
        )
        self.stack = random_params(self.delta, n=CLIENTS)
        self.params = fd.take(self.stack, 0)
        self.x = torch.randn(5, 4, dtype=torch.float64)

    def dense(self, delta: fd.DeltaModel, params: dict[str, Tensor]) -> dict[str, Tensor]:
        return fd.algebra.materialise(delta, params)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_exact_averaging_is_the_mean_of_the_dense_changes(case: Case) -> None:
    shares = [0.5, 0.2, 0.3]
    merged, params = federated.exact(case.delta, case.stack, rank=6, weights=shares)
    for name, change in case.dense(case.delta, case.stack).items():
        expected = torch.einsum("n...,n->...", change, torch.tensor(shares, dtype=torch.float64))
        torch.testing.assert_close(case.dense(merged, params)[name], expected)
    torch.testing.assert_close(
        params["head.weight"], torch.einsum("noi,n->oi", case.stack["head.weight"], torch.tensor(shares).double())
    )


def test_naive_averaging_is_exact_only_where_a_factor_is_shared(case: Case) -> None:
    def gap(stack: dict[str, Tensor]) -> float:
        exact = case.dense(*federated.exact(case.delta, stack, rank=6))["body.weight"]
        return float((case.dense(case.delta, federated.naive(stack))["body.weight"] - exact).abs().max())

    a = "body.lora.lora_A"
    frozen = {**case.stack, a: case.stack[a][:1].expand_as(case.stack[a])}
    assert gap(frozen) < 1e-12
    assert gap(case.stack) > 1e-2


def test_clients_train_as_they_would_alone(case: Case) -> None:
    data = torch.randn(CLIENTS, 5, 4, dtype=torch.float64)
    trained, constants = fd.partition(case.params, case.delta.trainable)

    def train(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        for _ in range(2):
            loss = torch.func.grad(lambda p: case.delta.apply(fd.combine(p, constants), x).square().mean())
            params = fd.tree.sub(params, fd.tree.scale(loss(params), 0.1))
        return params

    together = federated.clients(train, trained, data)
    for i in range(CLIENTS):
        for name, leaf in train(trained, data[i]).items():
            torch.testing.assert_close(together[name][i], leaf)


def test_a_greedy_soup_never_scores_lower_than_its_best_member(case: Case) -> None:
    goal = case.dense(*soups.mean(case.delta, case.stack, [0, 2]))["body.weight"]

    def score(delta: fd.DeltaModel, params: dict[str, Tensor]) -> float:
        return -float((case.dense(delta, params)["body.weight"] - goal).norm())

    alone = [score(*soups.mean(case.delta, case.stack, [i])) for i in range(CLIENTS)]
    chosen = soups.greedy(case.delta, case.stack, score)
    assert sorted(chosen) == [0, 2]
    assert score(*soups.mean(case.delta, case.stack, chosen)) > max(alone)


def test_a_dialled_delta_is_its_multiple(case: Case) -> None:
    params = {name: leaf for name, leaf in case.params.items() if "lora" in name}
    delta = fd.LoraModel(case.delta.backbone, lora_r=2, modified_modules=["body"])
    dialled, stack = steering.dial(delta, params, [-1.0, 0.0, 0.5, 1.0])
    outputs = dialled.apply_many(stack, case.x)
    torch.testing.assert_close(outputs[1], delta.backbone(case.x))
    torch.testing.assert_close(outputs[3], delta.apply(params, case.x))
    weight = delta.backbone.body.weight - case.dense(delta, params)["body.weight"]
    opposite = torch.func.functional_call(delta.backbone, {"body.weight": weight}, (case.x,))
    torch.testing.assert_close(outputs[0], opposite)


def test_deltas_add_up_with_signs(case: Case) -> None:
    one, two = (fd.take(case.stack, i) for i in (0, 1))
    pairs = [(case.delta, one), (case.delta, two)]
    mixed = case.dense(*fd.algebra.sum_exact(pairs, weights=[1.0, -0.5]))
    for name, change in mixed.items():
        torch.testing.assert_close(change, case.dense(case.delta, one)[name] - 0.5 * case.dense(case.delta, two)[name])


def test_hard_routing_is_soft_routing_with_one_hot_weights(case: Case) -> None:
    index = torch.tensor([2, 0, 1, 1, 2])
    weights = torch.nn.functional.one_hot(index, CLIENTS).double()
    soft = routing.mixture(case.delta.apply_many(case.stack, case.x), weights)
    torch.testing.assert_close(soft, case.delta.apply_rows(case.stack, index, case.x))
    for i, member in enumerate(index.tolist()):
        torch.testing.assert_close(soft[i], case.delta.apply(fd.take(case.stack, member), case.x[i : i + 1])[0])


def test_a_gate_learns_through_the_mixture(case: Case) -> None:
    gate = torch.randn(5, CLIENTS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda gate: routing.mixture(case.delta.apply_many(case.stack, case.x), gate.softmax(-1)), gate
    )


def test_rows_lie_with_the_centre_of_their_domain() -> None:
    torch.manual_seed(0)
    domains = torch.arange(3).repeat(20)
    embeddings = 4 * torch.eye(3)[domains] + 0.3 * torch.randn(60, 3)
    found = routing.nearest(embeddings[30:], routing.centroids(embeddings[:30], domains[:30], 3))
    assert torch.equal(found, domains[30:])


def test_a_hypernetwork_gets_the_gradients_of_a_loop(case: Case) -> None:
    codes = torch.randn(5, 2, dtype=torch.float64)
    wide = hypernetwork.width(case.delta, case.params)
    network = nn.Linear(2, wide).double()
    with torch.no_grad():
        network.weight.mul_(0.1)

    def in_one_pass() -> Tensor:
        return hypernetwork.apply(case.delta, case.params, network(codes), x=case.x)

    def by_row() -> Tensor:
        written = fd.unstack(hypernetwork.written(case.delta, case.params, network(codes)))
        return torch.cat([case.delta.apply(p, case.x[i : i + 1]) for i, p in enumerate(written)])

    torch.testing.assert_close(in_one_pass(), by_row())
    for found, expected in zip(
        torch.autograd.grad(in_one_pass().square().sum(), list(network.parameters())),
        torch.autograd.grad(by_row().square().sum(), list(network.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    stack = hypernetwork.written(case.delta, case.params, network(codes))
    assert all((stack[name] == case.params[name]).all() for name in case.delta.constants)


def test_a_hypernetwork_learns_tasks_that_one_delta_cannot(case: Case) -> None:
    torch.manual_seed(0)
    codes = torch.linspace(-1, 1, 240, dtype=torch.float64)[:, None]
    x = torch.randn(240, 4, dtype=torch.float64)
    goals = case.delta.backbone(x).detach() + codes * torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)

    def error(network: nn.Module, part: slice) -> Tensor:
        outputs = hypernetwork.apply(
            case.delta, case.delta.init(0, dtype=torch.float64), network(codes[part]), x=x[part]
        )
        return (outputs - goals[part]).square().mean()

    def trained(network: nn.Module) -> float:
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(200):
            optimizer.zero_grad()
            error(network, slice(0, 240, 2)).backward()
            optimizer.step()
        return error(network, slice(1, 240, 2)).item()  # tasks between those that were seen

    class Same(nn.Module):
        """One delta for every code."""

        def __init__(self, wide: int) -> None:
            super().__init__()
            self.shared = nn.Parameter(torch.zeros(wide, dtype=torch.float64))

        def forward(self, codes: Tensor) -> Tensor:
            return self.shared.expand(len(codes), -1)

    wide = hypernetwork.width(case.delta, case.params)
    network = nn.Linear(1, wide).double()
    nn.init.zeros_(network.weight)
    nn.init.zeros_(network.bias)
    assert trained(network) < 0.3 * trained(Same(wide))
