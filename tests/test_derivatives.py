"""Derivatives against loops of autograd, dense Hessians and dense solves, on a BERT with fused attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification

import funcdelta as fd

SIZES = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "initializer_range": 0.5,
}


class Case:
    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **SIZES)).double().eval()
        self.delta = fd.LoraModel(backbone, lora_r=1, modified_modules=["query"])
        self.stack = fd.tree.map(torch.clone, self.delta.init(0, n=2, dtype=torch.float64))
        noise = fd.tree.randn_like(self.stack, [1, 2])
        self.stack = {
            name: leaf if name in self.delta.constants else leaf + noise[name] for name, leaf in self.stack.items()
        }
        self.params = fd.take(self.stack, 0)
        self.tokens, self.labels = torch.randint(20, (5, 4)), torch.tensor([0, 1, 2, 1, 0])

    def loss(self, params, tokens, labels):
        return F.cross_entropy(self.delta.apply(params, input_ids=tokens).logits, labels)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_of_rows_are_those_of_a_loop(case: Case, chunk_size: int | None) -> None:
    found = fd.per_sample_grads(case.loss, chunk_size)(case.params, case.tokens, case.labels)
    for i in range(5):
        alone = torch.func.grad(case.loss)(case.params, case.tokens[i : i + 1], case.labels[i : i + 1])
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name][i], gradient)
    whole = torch.func.grad(case.loss)(case.params, case.tokens, case.labels)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name].mean(0), gradient)
        assert bool(gradient.any()) == (name not in case.delta.constants)


def test_gradients_of_rows_map_over_members(case: Case) -> None:
    each = fd.per_sample_grads(case.loss)
    both = torch.vmap(each, in_dims=(0, None, None))(case.stack, case.tokens, case.labels)
    second = each(fd.take(case.stack, 1), case.tokens, case.labels)
    for name, gradient in second.items():
        torch.testing.assert_close(both[name][1], gradient)


def dense_hessian(case: Case):
    trained, constants = fd.partition(case.params, case.delta.trainable)
    vector, unravel = fd.tree.ravel(trained)

    def loss(vector):
        return case.loss(fd.combine(unravel(vector), constants), case.tokens, case.labels)

    return torch.func.hessian(loss)(vector), unravel, trained


def test_a_hessian_times_a_vector_is_the_dense_product(case: Case) -> None:
    hessian, _, trained = dense_hessian(case)
    direction = fd.tree.randn_like(case.params, 4)
    product = fd.hvp(case.loss, case.params, direction, case.tokens, case.labels)
    expected = hessian @ fd.tree.ravel({name: direction[name] for name in trained})[0]
    torch.testing.assert_close(fd.tree.ravel({name: product[name] for name in trained})[0], expected)
    assert expected.abs().max() > 1e-4


def test_conjugate_gradients_solve_against_the_hessian(case: Case) -> None:
    hessian, unravel, trained = dense_hessian(case)
    damping = float(-torch.linalg.eigvalsh(hessian)[0]) + 0.5
    b = torch.func.grad(case.loss)(case.params, case.tokens, case.labels)
    found = fd.conjugate_gradient(
        lambda v: fd.hvp(case.loss, case.params, v, case.tokens, case.labels), b, steps=40, damping=damping
    )
    flat = fd.tree.ravel({name: b[name] for name in trained})[0]
    expected = torch.linalg.solve(hessian + damping * torch.eye(len(flat), dtype=flat.dtype), flat)
    for name, leaf in unravel(expected).items():
        torch.testing.assert_close(found[name], leaf, rtol=1e-6, atol=1e-10)


def test_conjugate_gradients_map_and_rest_when_done() -> None:
    torch.manual_seed(0)
    root = torch.randn(3, 4, 4, dtype=torch.float64)
    matrices = root @ root.mT + torch.eye(4, dtype=torch.float64)
    b = torch.randn(3, 4, dtype=torch.float64)
    b[2] = 0

    def solve(matrix, b):
        return fd.conjugate_gradient(lambda x: {"w": matrix @ x["w"]}, {"w": b}, steps=12)["w"]

    found = torch.vmap(solve)(matrices, b)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, b))


def test_messages(case: Case) -> None:
    with pytest.raises(fd.ParamsError, match=r"one length, found \[\(5,\), \(3,\)\]"):
        fd.per_sample_grads(case.loss)(case.params, case.tokens, case.labels[:3])
    with pytest.raises(fd.ParamsError, match=r"one loss, \(\).*found shape \(1, 3\)"):
        fd.per_sample_grads(lambda p, t: case.delta.apply(p, input_ids=t).logits)(case.params, case.tokens)
    with pytest.raises(fd.ParamsError, match=r"steps=0.*1 or more"):
        fd.conjugate_gradient(lambda x: x, {"w": torch.ones(1)}, steps=0)
