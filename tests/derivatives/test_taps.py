"""Taps against gradients of single rows by autograd, on every method and several architectures, and what they serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from handmade import random_params
from subjects import ROWS, Subject, subject, thinned
from torch import Tensor, nn
from zoo import take_rows

import funcdelta as fd

WITH_TAPS = {"lora", "adapter", "parallel_adapter", "test_module"}


def each_row(s: Subject, params: dict[str, Tensor], inputs) -> Tensor:
    """One number a row, with a gradient everywhere."""
    output = s.apply(params, inputs)
    flat = output.reshape(len(output), -1)
    return (flat * torch.arange(flat.shape[1], dtype=flat.dtype).cos()).sum(1)


def gradient_of_row(s: Subject, params: dict[str, Tensor], inputs, row: int, names: list[str]) -> list[Tensor]:
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items() if name in names}
    loss = each_row(s, {**params, **leaves}, take_rows(inputs, [row])).sum()
    return list(torch.autograd.grad(loss, [leaves[name] for name in names]))


@pytest.mark.parametrize(("method", "name"), thinned())
def test_taps_are_the_gradients_of_every_row(method: str, name: str) -> None:
    s = subject(method, name)
    params, inputs = s.member(0), s.inputs()
    if s.apply(params, inputs).shape[0] != ROWS:
        pytest.skip("the output's first axis is not that of rows")
    found = fd.grad.taps(lambda p: each_row(s, p, inputs), params)
    assert set(found) <= set(params)
    names = list(found)
    assert names or method not in WITH_TAPS
    for row in range(ROWS if names else 0):
        for tap, expected in zip(found.values(), gradient_of_row(s, params, inputs, row, names), strict=True):
            made = tap.grads[row].mT @ tap.inputs[row]
            torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
@pytest.mark.parametrize("method", ["lora", "adapter", "parallel_adapter"])
def test_every_matrix_of_a_product_has_a_tap(method: str, name: str) -> None:
    s = subject(method, name)
    params = s.member(0)
    found = fd.grad.taps(lambda p: each_row(s, p, s.inputs()), params)
    # Tables of embeddings and patches are no products with a matrix.
    assert set(found) == {key for key, leaf in params.items() if leaf.ndim == 2 and "embed" not in key}


class Case:
    """A plain module of two layers, LoRA on the first and a trained head, inputs (6, 4, 5)."""

    def __init__(self) -> None:
        torch.manual_seed(0)

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.body(x).tanh().mean(1))

        self.delta = fd.LoraModel(
            Model().double(), lora_r=2, modified_modules=["body"], unfrozen_modules=["deltas", "head"]
        )
        self.params = random_params(self.delta)
        self.x, self.y = torch.randn(6, 4, 5, dtype=torch.float64), torch.randint(3, (6,))

    def losses(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.delta.apply(params, x), y, reduction="none")

    def loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.losses(params, x, y).sum()


@pytest.fixture
def case() -> Case:
    return Case()


def test_a_trained_head_has_a_tap_and_ghost_norms_are_norms(case: Case) -> None:
    found = fd.grad.taps(case.losses, case.params, case.x, case.y)
    assert set(found) == {"body.lora.lora_A", "body.lora.lora_B", "head.weight"}
    assert found["head.weight"].inputs.shape == (6, 1, 7)
    assert found["body.lora.lora_A"].inputs.shape == (6, 4, 5)
    rows = fd.grad.per_sample_grads(case.loss)(case.params, case.x, case.y)
    expected = fd.tree.norm({name: rows[name] for name in found}, per_member=True)
    torch.testing.assert_close(fd.grad.ghost_norms(found), expected)


@pytest.mark.parametrize("t", [1, 40])
def test_ghost_norms_by_either_way(t: int) -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, t, 9, dtype=torch.float64), torch.randn(3, t, 8, dtype=torch.float64)
    expected = torch.einsum("bto,bti->boi", g, x).flatten(1).norm(dim=1)
    torch.testing.assert_close(fd.grad.ghost_norms({"w": fd.grad.Tap(x, g)}), expected)


def test_kronecker_factors_are_the_mean_of_outer_products_where_x_and_g_are_independent() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    pairs = [(a, b) for a in x for b in g]  # every input with every gradient
    tap = fd.grad.Tap(torch.stack([a for a, _ in pairs])[:, None], torch.stack([b for _, b in pairs])[:, None])
    a, g_factor = fd.grad.kronecker_factors({"w": tap})["w"]
    gradients = torch.einsum("bto,bti->boi", tap.grads, tap.inputs).flatten(1)
    torch.testing.assert_close(torch.kron(g_factor, a), gradients.mT @ gradients / len(pairs))


def test_a_leaf_that_acts_twice_adds_up(case: Case) -> None:
    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(F.linear(x, params["w"]).tanh(), params["w"]).square().sum(1)

    w, x = torch.randn(3, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    tap = fd.grad.taps(losses, {"w": w}, x)["w"]
    assert tap.inputs.shape == (4, 2, 3)
    expected = fd.grad.per_sample_grads(lambda p, x: losses(p, x).sum())({"w": w}, x)["w"]
    torch.testing.assert_close(torch.einsum("bto,bti->boi", tap.grads, tap.inputs), expected)


def test_a_leaf_that_acts_otherwise_too_has_no_tap() -> None:
    def losses(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(x, params["w"]).sum(1) + params["w"].square().sum()

    assert fd.grad.taps(losses, {"w": torch.ones(3, 3)}, torch.ones(2, 3)) == {}


def test_messages(case: Case) -> None:
    with pytest.raises(fd.errors.ParamsError, match=r"one loss per row, \(6,\); found shape \(\).*reduction="):
        fd.grad.taps(case.loss, case.params, case.x, case.y)
    with pytest.raises(fd.errors.StackError, match=r"fd.grad.taps takes one member's params"):
        fd.grad.taps(case.losses, fd.stack([case.params] * 2), case.x, case.y)

    def mixed(params: dict[str, Tensor], x: Tensor) -> Tensor:
        logits = case.delta.apply(params, x)
        return (logits - logits.mean(0)).square().sum(1)

    with pytest.raises(fd.errors.ParamsError, match=r"loss of one row depends on the output of .* in other rows"):
        fd.grad.taps(mixed, case.params, case.x)
    assert fd.grad.taps(mixed, case.params, case.x, check=False)

    def before(params: dict[str, Tensor], x: Tensor) -> Tensor:
        logits = case.delta.apply(params, x)
        return (logits - logits.roll(1, 0)).square().sum(1)

    with pytest.raises(fd.errors.ParamsError, match=r"loss of one row depends on"):
        fd.grad.taps(before, case.params, case.x)
    with pytest.raises(fd.errors.ParamsError, match="at least one tap"):
        fd.grad.ghost_norms({})
