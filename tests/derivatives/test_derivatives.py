"""Derivatives against loops of autograd, dense Hessians and dense solves, on a BERT with fused attention."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from handmade import random_params
from transformers import BertConfig, BertForSequenceClassification
from zoo import DoublePrecision

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
    found = fd.grad.per_sample_grads(case.loss, chunk_size)(case.params, case.tokens, case.labels)
    for i in range(5):
        alone = torch.func.grad(case.loss)(case.params, case.tokens[i : i + 1], case.labels[i : i + 1])
        for name, gradient in alone.items():
            torch.testing.assert_close(found[name][i], gradient)
    whole = torch.func.grad(case.loss)(case.params, case.tokens, case.labels)
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name].mean(0), gradient)
        assert bool(gradient.any()) == (name not in case.delta.constants)


def test_gradients_of_rows_map_over_members(case: Case) -> None:
    each = fd.grad.per_sample_grads(case.loss)
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
    product = fd.grad.hvp(case.loss, case.params, direction, case.tokens, case.labels)
    expected = hessian @ fd.tree.ravel({name: direction[name] for name in trained})[0]
    torch.testing.assert_close(fd.tree.ravel({name: product[name] for name in trained})[0], expected)
    assert expected.abs().max() > 1e-4


def test_conjugate_gradients_solve_against_the_hessian(case: Case) -> None:
    hessian, unravel, trained = dense_hessian(case)
    damping = float(-torch.linalg.eigvalsh(hessian)[0]) + 0.5
    b = torch.func.grad(case.loss)(case.params, case.tokens, case.labels)
    found = fd.grad.conjugate_gradient(
        lambda v: fd.grad.hvp(case.loss, case.params, v, case.tokens, case.labels), b, steps=40, damping=damping
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
        return fd.grad.conjugate_gradient(lambda x: {"w": matrix @ x["w"]}, {"w": b}, steps=12)["w"]

    found = torch.vmap(solve)(matrices, b)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, b))


def test_messages(case: Case) -> None:
    with pytest.raises(fd.ParamsError, match=r"the same length for all, found \[\(5,\), \(3,\)\]"):
        fd.per_sample_grads(case.loss)(case.params, case.tokens, case.labels[:3])
    with pytest.raises(fd.ParamsError, match=r"one loss, \(\).*found shape \(1, 3\)"):
        fd.per_sample_grads(lambda p, t: case.delta.apply(p, input_ids=t).logits)(case.params, case.tokens)
    with pytest.raises(fd.ParamsError, match=r"steps=0.*at least 1"):
        fd.conjugate_gradient(lambda x: x, {"w": torch.ones(1)}, steps=0)


def finite_difference(f, params, direction, step: float = 1e-5):
    """(f(p + h d) - f(p - h d)) / 2h."""
    ahead = f(fd.tree.add(params, fd.tree.scale(direction, step)))
    behind = f(fd.tree.sub(params, fd.tree.scale(direction, step)))
    return (ahead - behind) / (2 * step)


class Plain:
    """LoRA on a plain module, float64."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        backbone = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
        self.delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])
        self.stack = random_params(self.delta, n=2)
        self.data = (torch.randn(5, 4, dtype=torch.float64),)

    def outputs(self, params, x):
        return self.delta.apply(params, x)


class Attentive(Plain):
    """LoRA on a Llama, whose attention is fused, float64."""

    def __init__(self) -> None:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(1)
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        backbone = LlamaModel(LlamaConfig(vocab_size=20, initializer_range=0.5, **sizes)).double().eval()
        self.delta = fd.LoraModel(backbone, lora_r=1)
        self.stack = random_params(self.delta, n=2)
        self.data = (torch.randint(20, (3, 4)),)

    def outputs(self, params, tokens):
        return self.delta.apply(params, input_ids=tokens).last_hidden_state.mean(1)


@pytest.fixture(params=[Plain, Attentive])
def smooth(request: pytest.FixtureRequest) -> Iterator[Plain]:
    with DoublePrecision():  # a Llama's norms compute in float32
        yield request.param()


def trained_direction(smooth: Plain, seed: int = 3):
    params = fd.take(smooth.stack, 0)
    noise = fd.tree.randn_like(params, seed)
    return params, {k: torch.zeros_like(v) if k in smooth.delta.constants else noise[k] for k, v in params.items()}


def test_products_with_the_jacobian_are_finite_differences(smooth: Plain) -> None:
    params, direction = trained_direction(smooth)
    expected = finite_difference(lambda p: smooth.outputs(p, *smooth.data), params, direction)
    found = fd.grad.jvp(smooth.outputs, params, direction, *smooth.data)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    cotangent = torch.randn_like(found)
    pulled = fd.grad.vjp(smooth.outputs, params, cotangent, *smooth.data)
    torch.testing.assert_close(fd.tree.vdot(pulled, direction), (cotangent * expected).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_jacobian_is_that_of_finite_differences(smooth: Plain, chunk_size: int | None) -> None:
    params, direction = trained_direction(smooth)
    found = fd.grad.jacobian(smooth.outputs, params, *smooth.data, chunk_size=chunk_size)
    assert list(found) == list(params)
    shape = smooth.outputs(params, *smooth.data).shape
    moved = sum((leaf * direction[name]).reshape(*shape, -1).sum(-1) for name, leaf in found.items())
    expected = finite_difference(lambda p: smooth.outputs(p, *smooth.data), params, direction)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_of_rows_are_finite_differences(smooth: Plain, chunk_size: int | None) -> None:
    params, direction = trained_direction(smooth)

    def each(p):
        return smooth.outputs(p, *smooth.data).flatten(1).sin().sum(1)

    found = fd.grad.per_sample_grads(lambda p, x: smooth.outputs(p, x).sin().sum(), chunk_size)(params, *smooth.data)
    moved = sum((leaf * direction[name]).reshape(len(leaf), -1).sum(1) for name, leaf in found.items())
    torch.testing.assert_close(moved, finite_difference(each, params, direction), rtol=1e-6, atol=1e-8)


def test_derivatives_map_over_members(smooth: Plain) -> None:
    every = torch.vmap(lambda p: fd.grad.jacobian(smooth.outputs, p, *smooth.data))(smooth.stack)
    second = fd.grad.jacobian(smooth.outputs, fd.take(smooth.stack, 1), *smooth.data)
    for name, leaf in second.items():
        torch.testing.assert_close(every[name][1], leaf)


def test_the_hessian_product_is_a_finite_difference_of_gradients(smooth: Plain) -> None:
    params, direction = trained_direction(smooth)

    def loss(p, *data):
        return smooth.outputs(p, *data).square().sum()

    gradient = torch.func.grad(loss)
    found = fd.grad.hvp(loss, params, direction, *smooth.data)
    for name in smooth.delta.constants:
        assert not found[name].any()
    for name in set(params) - set(smooth.delta.constants):
        expected = finite_difference(lambda p, name=name: gradient(p, *smooth.data)[name], params, direction)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


def test_conjugate_gradients_do_not_hide_a_direction_without_curvature() -> None:
    signs = torch.tensor([1.0, -1.0])
    found = fd.grad.conjugate_gradient(lambda x: {"w": signs * x["w"]}, {"w": torch.ones(2)}, steps=3)
    assert not found["w"].isfinite().all()


def test_no_rows_have_no_gradients(case: Case) -> None:
    found = fd.grad.per_sample_grads(case.loss)(case.params, case.tokens[:0], case.labels[:0])
    assert {name: leaf.shape for name, leaf in found.items()} == {n: (0, *p.shape) for n, p in case.params.items()}


def test_more_messages(case: Case) -> None:
    for chunk_size in (0, 1.5):
        with pytest.raises(fd.errors.ParamsError, match=f"chunk_size={chunk_size}.*whole number"):
            fd.grad.per_sample_grads(case.loss, chunk_size)(case.params, case.tokens, case.labels)
        with pytest.raises(fd.errors.ParamsError, match=f"chunk_size={chunk_size}.*whole number"):
            fd.grad.jacobian(case.loss, case.params, case.tokens, case.labels, chunk_size=chunk_size)
    with pytest.raises(fd.errors.ParamsError, match=r"hvp needs a loss that is one number, \(\); found shape \(5, 3\)"):
        fd.grad.hvp(lambda p: case.delta.apply(p, input_ids=case.tokens).logits, case.params, case.params)
    with pytest.raises(fd.errors.ParamsError, match=r"conjugate_gradient.s matvec"):
        fd.grad.conjugate_gradient(lambda x: {"v": x["w"]}, {"w": torch.ones(2)}, steps=1)
    with pytest.raises(fd.errors.ParamsError, match="the tangent of jvp"):
        fd.grad.jvp(case.loss, case.params, {}, case.tokens, case.labels)
    with pytest.raises(
        fd.errors.StackError, match=r"fd.grad.hvp\(loss, ...\) takes one member's params; map .* torch.vmap"
    ):
        fd.grad.hvp(case.loss, case.stack, case.stack, case.tokens, case.labels)
    with pytest.raises(fd.errors.StackError, match=r"per_sample_grads\(loss\) takes one member's params"):
        fd.grad.per_sample_grads(case.loss)(case.stack, case.tokens, case.labels)


def test_conjugate_gradients_stay_where_they_have_arrived() -> None:
    # Long after the residual is rounding: its squares would underflow.
    for scale in (1.0, 1e-2, 1e-3):
        values = scale * torch.linspace(1, 2, 20)
        b = torch.randn(20, generator=torch.Generator().manual_seed(0))
        found = fd.grad.conjugate_gradient(lambda x, a=values: {"w": a * x["w"]}, {"w": b}, steps=100)
        torch.testing.assert_close(found["w"], b / values, rtol=1e-4, atol=1e-4)


def shuffled(tree_: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The same dict with its keys in another order."""
    names = list(tree_)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    assert order != sorted(order)
    return {names[i]: tree_[names[i]] for i in order}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_of_keys_decides_nothing(smooth: Plain, seed: int) -> None:
    """Params, directions and cotangents are matched by name; what comes out goes by the names of params."""
    params, direction = trained_direction(smooth)
    other = shuffled(direction, seed)
    many = fd.tree.randn_like(fd.broadcast(params, 2), [1, 2])

    def loss(p, *data):
        return smooth.outputs(p, *data).square().sum()

    def both(p, *data):
        out = smooth.outputs(p, *data)
        return {"a": out, "b": {"c": out.square(), "d": out.sum()}}

    value = both(params, *smooth.data)
    cotangent = {"b": {"d": value["b"]["d"] * 2, "c": value["b"]["c"] * 3}, "a": value["a"]}
    in_order = {"a": value["a"], "b": {"c": value["b"]["c"] * 3, "d": value["b"]["d"] * 2}}
    calls = {
        "jvp": lambda p, t: fd.grad.jvp(smooth.outputs, p, t, *smooth.data),
        "hvp": lambda p, t: fd.grad.hvp(loss, p, t, *smooth.data),
        "mapped": lambda p, t: torch.vmap(lambda t: fd.grad.jvp(smooth.outputs, p, t, *smooth.data))(
            {k: many[k] for k in t}
        ),
        "solve": lambda p, t: fd.grad.conjugate_gradient(
            lambda v: fd.tree.add(shuffled(fd.grad.hvp(loss, p, v, *smooth.data), 1), v), t, steps=2, damping=3.0
        ),
    }
    for name, call in calls.items():
        expected = call(params, direction)
        for p, t in ((params, other), (shuffled(params, seed + 1), other), (shuffled(params, seed + 1), direction)):
            found = call(p, t)
            if isinstance(found, dict):
                assert found.keys() == expected.keys()
                found = {k: found[k] for k in expected}
            torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")
    pulled = fd.grad.vjp(both, params, in_order, *smooth.data)
    torch.testing.assert_close(fd.grad.vjp(both, params, cotangent, *smooth.data), pulled)
    rows = fd.grad.per_sample_grads(lambda p, x: loss(p, x))(params, *smooth.data)
    again = fd.grad.per_sample_grads(lambda p, x: loss(p, x))(shuffled(params, seed), *smooth.data)
    torch.testing.assert_close({k: again[k] for k in rows}, rows)


def test_leaves_without_derivatives_get_zeros() -> None:
    """Integers and masks stand in params as constants: everything is what it is without them."""
    w, x = torch.tensor([1.0, 2.0, 3.0]), torch.randn(4, 3)
    whole = {"steps": torch.tensor([2, 3]), "w": w, "mask": torch.tensor([True, False, True])}

    def f(p, x):
        return {"y": (p["w"] * p["mask"]) ** p["steps"][0] + x, "z": (p["w"] ** 3).sum()}

    def alone(p, x):
        return f(whole | p, x)

    row = x[0]
    t = {"w": torch.tensor([1.0, 10.0, 100.0])}
    zeros = fd.tree.map(torch.zeros_like, whole)
    torch.testing.assert_close(fd.grad.jvp(f, whole, zeros | t, row), fd.grad.jvp(alone, {"w": w}, t, row))
    cotangent = {"y": torch.ones(3), "z": torch.tensor(2.0)}
    torch.testing.assert_close(
        fd.grad.vjp(f, whole, cotangent, row), zeros | fd.grad.vjp(alone, {"w": w}, cotangent, row)
    )
    found, expected = fd.grad.jacobian(f, whole, row), fd.grad.jacobian(alone, {"w": w}, row)
    for name, shape in (("y", (3,)), ("z", ())):
        torch.testing.assert_close(found[name]["w"], expected[name]["w"])
        assert found[name]["steps"].shape == (*shape, 2)
        assert not found[name]["steps"].any()
        assert not found[name]["mask"].any()

    def loss(p, x):
        return f(p, x)["y"].square().sum() + f(p, x)["z"]

    def loss_alone(p, x):
        return loss(whole | p, x)

    torch.testing.assert_close(
        fd.grad.hvp(loss, whole, zeros | t, row), zeros | fd.grad.hvp(loss_alone, {"w": w}, t, row)
    )
    rows = fd.grad.per_sample_grads(loss)(whole, x)
    torch.testing.assert_close(rows["w"], fd.grad.per_sample_grads(loss_alone)({"w": w}, x)["w"])
    assert rows["steps"].shape == (4, 2)
    assert not rows["steps"].any()


def test_what_cannot_be_a_direction_is_named() -> None:
    p = {"w": torch.ones(2), "b": torch.ones(1)}

    def f(params):
        return params["w"].sum()

    for t, words in (
        ({"w": torch.ones(2)}, "Leaf 'b' is in params but not in the tangent of jvp"),
        (
            {"w": torch.ones(3), "b": torch.ones(1)},
            r"Leaf 'w' of the tangent of jvp is \(3,\), torch.float32; expected",
        ),
        ({"w": torch.ones(2).double(), "b": torch.ones(1)}, r"'w' of the tangent of jvp is \(2,\), torch.float64"),
        ({"w": None, "b": torch.ones(1)}, "'w' of the tangent of jvp is None"),
    ):
        with pytest.raises(fd.errors.ParamsError, match=words):
            fd.grad.jvp(f, p, t)
        with pytest.raises(fd.errors.ParamsError, match=words.replace("tangent of jvp", "vector of hvp")):
            fd.grad.hvp(f, p, t)
    with pytest.raises(fd.errors.ParamsError, match=r"found the key 0 \(int\)"):
        fd.grad.jvp(lambda params: params[0], {0: torch.ones(1)}, {0: torch.ones(1)})
    with pytest.raises(fd.errors.ParamsError, match="nothing to differentiate: no leaf"):
        fd.grad.jacobian(lambda params: params["n"], {"n": torch.tensor(3)})
    with pytest.raises(fd.errors.ParamsError, match=r"'w' is torch\.sparse_coo"):
        fd.grad.vjp(f, {"w": torch.eye(2).to_sparse()}, torch.ones(()))
    with pytest.raises(fd.errors.ParamsError, match=r"jacobian takes real leaves, but leaf 'w' is torch\.complex64"):
        fd.grad.jacobian(f, {"w": torch.ones(2) * 1j})
