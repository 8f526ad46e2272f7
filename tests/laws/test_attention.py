"""Attention under transforms: the mathematical form equals torch's own, in this thread only."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from handmade import Attention, assert_close, raises_saying, random_params
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import ZOO

import funcdelta as fd
from funcdelta.functional.attention import MathematicalAttention, mathematical_attention

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "float mask": {"attn_mask": torch.linspace(-3, 3, 25).reshape(5, 5)},
    "a mask a row": {"attn_mask": torch.arange(5)[None, None, None] < torch.tensor([5, 3])[:, None, None, None]},
    "scale": {"scale": 0.3},
}


def random_heads(heads: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Query (2, 4, 5, 3), key and value (2, heads, 5, 3)."""
    query = torch.randn(2, 4, 5, 3, dtype=dtype)
    return query, torch.randn(2, heads, 5, 3, dtype=dtype), torch.randn(2, heads, 5, 3, dtype=dtype)


def options_in(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in options.items()
    }


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_mathematical_form_is_attention(name: str, dtype: torch.dtype) -> None:
    heads, options = random_heads(dtype=dtype), options_in(dtype, OPTIONS[name])
    expected = F.scaled_dot_product_attention(*heads, **options)
    assert_close(mathematical_attention(*heads, **options), expected, 1e-6)
    with MathematicalAttention():
        assert_close(F.scaled_dot_product_attention(*heads, **options), expected, 1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_its_derivatives_are_attentions(name: str) -> None:
    heads, options = random_heads(), options_in(torch.float64, OPTIONS[name])
    weight = torch.randn_like(heads[0])

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (F.scaled_dot_product_attention(query, key, value, **options) * weight).sum()

    expected = torch.func.grad(loss, argnums=(0, 1, 2))(*heads)
    with sdpa_kernel(SDPBackend.MATH):
        second = torch.func.jvp(torch.func.grad(loss, argnums=(0, 1, 2)), heads, heads)[1]
    with MathematicalAttention():
        found = torch.func.grad(loss, argnums=(0, 1, 2))(*heads)
        curvature = torch.func.jvp(torch.func.grad(loss, argnums=(0, 1, 2)), heads, heads)[1]
    for one, other in zip((*found, *curvature), (*expected, *second), strict=True):
        assert_close(one, other, 1e-8)


def test_grouped_queries_positional_arguments_and_dropout() -> None:
    query, key, value = random_heads(heads=2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    with MathematicalAttention():
        assert_close(F.scaled_dot_product_attention(query, key, value, enable_gqa=True), expected)
        assert_close(
            F.scaled_dot_product_attention(query, query, query, None, 0.0, True),
            (mathematical_attention(query, query, query, is_causal=True)),
        )
        dropped = F.scaled_dot_product_attention(query, query, query, dropout_p=0.5)
    assert not torch.allclose(dropped, mathematical_attention(query, query, query))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    heads = tuple(part.to(dtype) for part in random_heads())
    mask = OPTIONS["boolean mask"]["attn_mask"]
    found = mathematical_attention(*heads, attn_mask=mask)
    assert found.dtype == dtype
    assert_close(found.double(), F.scaled_dot_product_attention(*heads, attn_mask=mask).double(), 2e-2)


def test_only_this_thread_is_touched() -> None:
    heads = random_heads()
    inside, looked = threading.Event(), threading.Event()
    counts: dict[str, int] = {}

    class Counts(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[getattr(func, "__name__", "")] = counts.get(getattr(func, "__name__", ""), 0) + 1
            return func(*args, **(kwargs or {}))

    def work() -> None:
        inside.wait(10)
        with Counts():
            F.scaled_dot_product_attention(*heads)
        looked.set()

    thread = threading.Thread(target=work)
    thread.start()
    with fd.grad.higher_order(), MathematicalAttention():
        inside.set()
        assert looked.wait(10)
    thread.join()
    assert counts.get("scaled_dot_product_attention") == 1


@pytest.mark.parametrize("masked", ["none", "boolean", "causal"])
def test_second_order_of_a_module_with_fused_attention(masked: str) -> None:
    model = Attention().eval().double()
    delta = fd.LoraModel(model, lora_r=1, modified_modules=["q", "v"])
    params, x = random_params(delta), torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked == "boolean" else None
    trained, fixed = fd.partition(params, delta.trainable)
    direction = fd.tree.randn_like(trained, 0)

    def gradient(p: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(
            lambda p: delta.apply({**p, **fixed}, x, mask=mask, causal=masked == "causal").square().sum()
        )(p)

    curvature = torch.func.grad(lambda p: fd.tree.vdot(gradient(p), direction))(trained)
    forward = torch.func.jvp(gradient, (trained,), (direction,))[1]
    step = 1e-5
    ahead = gradient(fd.tree.add(trained, fd.tree.scale(direction, step)))
    behind = gradient(fd.tree.sub(trained, fd.tree.scale(direction, step)))
    for name in trained:
        assert_close(curvature[name], (ahead[name] - behind[name]) / (2 * step), 1e-6)
        assert_close(forward[name], curvature[name], 1e-8)


def test_create_graph_has_to_be_announced() -> None:
    delta = fd.LoraModel(ZOO["bert"].build(), lora_r=1, modified_modules=["query"])
    inputs = ZOO["bert"].inputs(2)
    leaves = {name: leaf.requires_grad_() for name, leaf in random_params(delta).items()}
    roots = [leaf for name, leaf in leaves.items() if delta.trainable(name)]

    def twice() -> list[Tensor]:
        loss = delta.apply(leaves, **inputs).logits.square().sum()
        first = torch.autograd.grad(loss, roots, create_graph=True)
        return list(torch.autograd.grad(sum(part.square().sum() for part in first), roots))

    with pytest.raises(RuntimeError, match=r"derivative|backward"):
        twice()
    with fd.grad.higher_order():
        found = twice()

    def norm(p: dict[str, Tensor]) -> Tensor:
        grads = torch.func.grad(lambda p: delta.apply(p, **inputs).logits.square().sum())(p)
        return sum(part.square().sum() for part in grads.values())

    expected = torch.func.grad(norm)({name: leaf.detach() for name, leaf in leaves.items()})
    for root, name in zip(found, filter(delta.trainable, leaves), strict=True):
        assert_close(root, expected[name], 1e-4)


def test_the_block_ends_with_an_error_too() -> None:
    from funcdelta.functional.attention import needs_mathematical_attention

    with raises_saying(ZeroDivisionError), fd.grad.higher_order():
        _ = 1 / 0
    assert not needs_mathematical_attention()
    with fd.grad.higher_order():
        with fd.grad.higher_order():
            pass
        assert needs_mathematical_attention()


def test_first_order_keeps_the_fused_kernel() -> None:
    """Second order is paid for only where it is asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: set[str] = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    delta = fd.LoraModel(Attention().eval(), lora_r=1, modified_modules=["q"])
    stack, x = random_params(delta, 2), torch.randn(2, 5, 4)
    delta.apply_many(stack, x, engine="fold")
    with Names():
        delta.apply(fd.take(stack, 0), x)
        delta.apply_many(stack, x, engine="fold")
    assert "_scaled_dot_product_flash_attention_for_cpu" in seen


def test_nested_gradients_inside_compiled_code() -> None:
    delta = fd.LoraModel(Attention().eval(), lora_r=1, modified_modules=["q"])
    params, x = random_params(delta), torch.randn(2, 5, 4)

    def norm(p: dict[str, Tensor]) -> Tensor:
        grads = torch.func.grad(lambda p: delta.apply(p, x).square().sum())(p)
        return sum(part.square().sum() for part in grads.values())

    expected = torch.func.grad(norm)(params)
    torch._dynamo.reset()
    found = torch.compile(lambda p: torch.func.grad(norm)(p), backend="eager")(params)
    for name in params:
        assert_close(found[name], expected[name])
