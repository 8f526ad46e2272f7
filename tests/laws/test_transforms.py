"""Calls under torch.func, losses and gradients of members, and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import ENGINES, MLP, assert_close, hugging_face, raises_saying, random_params
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd

CAUSAL = ("gpt2", "opt", "llama", "qwen3", "mixtral")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def lora(model: nn.Module | None = None, *names: str, **fields: Any) -> fd.DeltaModel:
    targets = list(names or ("a", "b"))
    return fd.LoraModel(backbone_model=model or MLP().eval(), lora_r=2, modified_modules=targets, **fields)


# -- torch.func ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CAUSAL, "t5", "bart", "bert", "vit"])
def test_vmap_over_models_that_would_return_a_cache(name: str) -> None:
    delta, inputs = hugging_face(name)
    stack = random_params(delta, 3)
    outs = torch.vmap(lambda p: delta.apply(p, **inputs))(stack)
    assert_close(outs.logits, delta.apply_many(stack, **inputs, engine="loop").logits)


def test_a_cache_that_is_asked_for_is_the_users_own() -> None:
    delta, inputs = hugging_face("gpt2")
    assert delta.apply(delta.init(0), **inputs).past_key_values is not None
    assert delta.apply_many(delta.init(0, n=2), **inputs).past_key_values is None


def test_derivatives_of_every_order(x: Tensor) -> None:
    delta = lora(None, "a")
    trained, fixed = fd.partition(random_params(delta), delta.trainable)

    def output(p: dict[str, Tensor]) -> Tensor:
        return delta.apply({**p, **fixed}, x)

    def loss(p: dict[str, Tensor]) -> Tensor:
        return output(p).square().sum()

    backward, forward = torch.func.jacrev(output)(trained), torch.func.jacfwd(output)(trained)
    hessian = torch.func.hessian(loss)(trained)
    direction = fd.tree.randn_like(trained, 0)
    value, tangent = torch.func.jvp(loss, (trained,), (direction,))
    assert_close(value, loss(trained))
    assert_close(tangent, fd.tree.vdot(torch.func.grad(loss)(trained), direction))
    curvature = torch.func.grad(lambda p: fd.tree.vdot(torch.func.grad(loss)(p), direction))(trained)
    for name, leaf in trained.items():
        assert_close(backward[name], forward[name])
        product = sum(
            torch.tensordot(hessian[name][other], direction[other], direction[other].ndim) for other in trained
        )
        assert_close(product, curvature[name])
        assert hessian[name][name].shape == (*leaf.shape, *leaf.shape)
    whole = torch.func.hessian(lambda p: delta.apply(p, x).square().sum())({**trained, **fixed})
    assert not whole["a.lora.scale"]["a.lora.scale"].any()


@pytest.mark.parametrize("name", ["bert", "llama", "torch_transformer"])
def test_second_order_through_fused_attention_needs_no_knowledge_of_kernels(name: str) -> None:
    delta, inputs = hugging_face(name, lora_r=1)
    call = ZOO[name].call
    params = random_params(delta)
    hessian = torch.func.hessian(lambda p: call(lambda **i: delta.apply(p, **i), inputs).square().sum())(params)
    leaf = delta.names[0]
    assert hessian[leaf][leaf].any()
    stack = random_params(delta, 2)

    def losses(s: dict[str, Tensor]) -> Tensor:
        return call(lambda **i: delta.apply_many(s, **i, engine="fold"), inputs).square().sum()

    def norm(s: dict[str, Tensor]) -> Tensor:
        return fd.tree.norm(torch.func.grad(losses)(s))

    assert torch.func.grad(norm)(stack)[leaf].any()
    _, tangent = torch.func.jvp(losses, (stack,), (stack,))
    assert tangent != 0


def test_gradients_of_each_row(x: Tensor) -> None:
    delta = lora()
    params, y = random_params(delta), torch.randint(3, (5,))

    def loss(p: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(delta.apply(p, row[None]), label[None])

    rows = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, y)
    whole = torch.func.grad(lambda p: F.cross_entropy(delta.apply(p, x), y, reduction="sum"))(params)
    for name in whole:
        assert_close(rows[name].sum(0), whole[name])


def test_stacks_of_stacks(x: Tensor) -> None:
    delta = lora(unfrozen_modules=["deltas", "head"])
    stacks = fd.stack([random_params(delta, 3, seed=i) for i in range(2)])
    each = torch.stack([x, x + 1])
    expected = torch.stack([delta.apply_many(fd.take(stacks, i), each[i], engine="loop") for i in range(2)])
    for engine in ENGINES:
        fresh = lora(delta.backbone, unfrozen_modules=["deltas", "head"])
        found = torch.vmap(lambda s, x: fresh.apply_many(s, x, engine=engine))(stacks, each)  # noqa: B023
        assert_close(found, expected)


def test_learning_to_learn_through_a_fold() -> None:
    delta, tasks = lora(), 4
    params = random_params(delta)
    x, y = torch.randn(tasks, 5, 4), torch.randint(3, (tasks, 5))

    def in_turn(p: dict[str, Tensor]) -> Tensor:
        def adapted(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            grads = torch.func.grad(lambda p: F.cross_entropy(delta.apply(p, x), y))(p)
            return F.cross_entropy(delta.apply(fd.tree.sub(p, fd.tree.scale(grads, 0.1)), x), y)

        return torch.vmap(adapted, in_dims=(None, 0, 0))(p, x, y).mean()

    def folded(p: dict[str, Tensor]) -> Tensor:
        def losses(s: dict[str, Tensor]) -> Tensor:
            return torch.vmap(F.cross_entropy)(delta.apply_many(s, x, in_dims=0, engine="fold"), y)

        stack = fd.broadcast(p, tasks)
        _, grads = fd.value_and_grad(losses)(stack)
        return losses(fd.tree.sub(stack, fd.tree.scale(grads, 0.1))).mean()

    expected, found = torch.func.grad(in_turn)(params), torch.func.grad(folded)(params)
    for name in params:
        assert_close(found[name], expected[name])


# -- value_and_grad ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 9])
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "own batches"])
def test_losses_and_gradients_of_members(chunk_size: int | None, shared: bool) -> None:
    delta, n = lora(unfrozen_modules=["deltas", "head"]), 5
    stack = random_params(delta, n)
    x, y = torch.randn(n, 6, 4), torch.randint(3, (n, 6))
    data = (x[0], y[0]) if shared else (x, y)
    dims = None if shared else 0

    def one(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(delta.apply(p, x), y)

    def each(s: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.vmap(F.cross_entropy, in_dims=(0, dims))(delta.apply_many(s, x, in_dims=dims), y)

    def each_with_logits(s: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = delta.apply_many(s, x, in_dims=dims)
        return torch.vmap(F.cross_entropy, in_dims=(0, dims))(logits, y), {"logits": logits}

    alone = [torch.func.grad_and_value(one)(fd.take(stack, i), *(data if shared else (x[i], y[i]))) for i in range(n)]
    expected = torch.stack([value for _, value in alone])
    results = [fd.value_and_grad(loss, in_dims=dims, chunk_size=chunk_size)(stack, *data) for loss in (one, each)]
    (losses, aux), grads = fd.value_and_grad(each_with_logits, in_dims=dims, chunk_size=chunk_size, has_aux=True)(
        stack, *data
    )
    assert aux["logits"].shape == (n, 6, 3)
    assert not aux["logits"].requires_grad
    for values, found in (*results, (losses, grads)):
        assert_close(values, expected)
        assert found.keys() == stack.keys()
        for name in stack:
            assert_close(found[name], torch.stack([grad[name] for grad, _ in alone]))
        assert not any(found[name].any() for name in delta.constants)


def test_one_members_loss_and_gradient(x: Tensor) -> None:
    delta = lora()
    params = random_params(delta)
    value, grads = fd.value_and_grad(lambda p, x: delta.apply(p, x).square().mean())(params, x)
    assert value.shape == ()
    assert {name: tuple(grad.shape) for name, grad in grads.items()} == delta.shapes


def test_data_may_be_dicts_with_masks_of_members_own() -> None:
    delta, _ = hugging_face("bert")
    stack = random_params(delta, 3)
    batch = {**ZOO["bert"].inputs(4), "labels": torch.tensor([0, 1, 2, 0])}
    each = {name: torch.stack([value, value.flip(0), value]) for name, value in batch.items()}

    def one(p: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        return delta.apply(p, **batch).loss

    losses, _ = fd.value_and_grad(one, chunk_size=2)(stack, batch)
    assert_close(losses, torch.stack([one(fd.take(stack, i), batch) for i in range(3)]))
    expected = [one(fd.take(stack, i), {name: value[i] for name, value in each.items()}) for i in range(3)]

    def folded(s: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = delta.apply_many(s, **inputs, in_dims=0, engine="fold").logits
        return torch.vmap(F.cross_entropy)(logits, batch["labels"])

    for chunk_size in (None, 2):
        losses, _ = fd.value_and_grad(folded, in_dims=0, chunk_size=chunk_size)(stack, each)
        assert_close(losses, torch.stack(expected))
    losses, _ = fd.value_and_grad(one, in_dims=0)(stack, each)
    assert_close(losses, torch.stack(expected))


def test_an_average_over_members_is_no_loss(x: Tensor) -> None:
    delta = lora()
    with raises_saying(fd.errors.ParamsError, "one number", "5 members", "(5,)"):
        fd.value_and_grad(lambda s: delta.apply_many(s, x).square().mean())(random_params(delta, 5))


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_apply_many_takes_new_values_without_compiling_again(engine: str, x: Tensor) -> None:
    delta = lora(unfrozen_modules=["deltas", "head"])
    torch._dynamo.reset()
    run = torch.compile(lambda s, x: delta.apply_many(s, x, engine=engine), fullgraph=True, backend="eager")
    first, second = random_params(delta, 3), random_params(delta, 3, seed=1)
    assert_close(run(first, x), delta.apply_many(first, x))
    delta.apply(fd.take(first, 0), x)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(run(second, x + 1), delta.apply_many(second, x + 1))


def test_compiled_apply_and_rows_take_new_values_without_compiling_again(x: Tensor) -> None:
    delta = lora()
    torch._dynamo.reset()
    single = torch.compile(lambda p, x: delta.apply(p, x), fullgraph=True, backend="eager")
    rows = torch.compile(lambda s, i, x: delta.apply_rows(s, i, x), fullgraph=True, backend="eager")
    params, stack = random_params(delta), random_params(delta, 3)
    index, other = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([-1, 2, 2, -1, 0])
    assert_close(single(params, x), delta.apply(params, x))
    assert_close(rows(stack, index, x), delta.apply_rows(stack, index, x))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_close(single(fd.take(stack, 1), x + 1), delta.apply(fd.take(stack, 1), x + 1))
        assert_close(rows(stack, other, x + 1), delta.apply_rows(stack, other, x + 1))


@pytest.mark.parametrize("call", ["apply", "apply_rows", "value_and_grad", "fold"])
def test_compiled_calls_take_other_batch_sizes(call: str) -> None:
    """The last batch of an epoch is smaller."""
    delta = lora()
    stack = random_params(delta, 3)
    params = fd.take(stack, 0)

    def run(x: Tensor) -> Tensor:
        if call == "apply":
            return delta.apply(params, x)
        if call == "apply_rows":
            return delta.apply_rows(stack, torch.zeros(x.shape[0], dtype=torch.long), x)
        if call == "value_and_grad":
            return fd.value_and_grad(lambda s: delta.apply_many(s, x).square().mean((1, 2)))(stack)[0]
        return delta.apply_many(stack, x, engine=call)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for rows in (4, 5, 7, 1, 6):
        x = torch.randn(rows, 4)
        assert_close(compiled(x), run(x))


def test_a_whole_training_step_compiles(x: Tensor) -> None:
    delta = lora(unfrozen_modules=["deltas", "head"])
    stack, y = random_params(delta, 3), torch.randint(3, (5,))

    def losses(s: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.vmap(F.cross_entropy, in_dims=(0, None))(delta.apply_many(s, x), y)

    step = fd.value_and_grad(losses)
    expected, grads = step(stack, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(lambda s, x, y: step(s, x, y), fullgraph=True, backend="eager")
    found, compiled_grads = compiled(stack, x, y)
    assert_close(found, expected)
    for name in stack:
        assert_close(compiled_grads[name], grads[name])


def test_no_derivative_asks_about_a_constant() -> None:
    backbone, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.randn(3, 4)
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    params = fd.tree.randn_like(delta.init(0), seed=1)
    with forward_ad.dual_level():
        for name, leaf in params.items():
            dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
            tangent = forward_ad.unpack_dual(delta.apply(params | {name: dual}, x)).tangent
            assert (tangent is not None) == delta.trainable(name)
    own = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    delta.apply(own, x).sum().backward()
    assert {name for name, leaf in own.items() if leaf.grad is None} == set(delta.constants)
