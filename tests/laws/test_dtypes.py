"""The rule of precision, for every method: leaves float32, hidden values in the backbone's dtype, in and out.

A method computes in its leaves' dtype; the backbone in its own. Half-precision and quantised backbones get float32
leaves (float64 ones float64), and so do tensors of theirs that are trained; ``init(dtype=)`` chooses another.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from handmade import raises_saying
from subjects import MEMBERS, Subject, config_for, subject, thinned
from torch import Tensor, nn
from zoo import ZOO, cast

import funcdelta as fd

# Kept bits of bfloat16: 8. Rounding adds up over a few layers; random tiny models amplify it.
TOLERANCE = 0.06


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def half(method: str, name: str) -> Subject:
    """The subject in bfloat16."""
    architecture = ZOO[name]
    model = architecture.build().bfloat16()
    example = cast(architecture.inputs(2), torch.bfloat16)
    delta = fd.DeltaModel(model, config_for(method, architecture), example=example.get("args", example))
    stack = delta.random_members(MEMBERS, delta.plan.present(dict.fromkeys(delta.names)))
    return Subject(method, architecture, model, delta, stack, torch.bfloat16)


def losses(s: Subject, inputs: dict[str, Any], **options: Any) -> Any:
    def loss(stack: dict[str, Tensor]) -> Tensor:
        outs = s.architecture.call(functools.partial(s.delta.apply_many, stack, **options), inputs)
        return outs.float().flatten(1).cos().mean(1)

    return loss


@pytest.mark.parametrize(("method", "name"), thinned(1))
def test_bfloat16_backbones_have_float32_leaves(method: str, name: str) -> None:
    s = half(method, name)
    inputs = s.inputs()
    assert {leaf.dtype for leaf in s.delta.init(0).values()} == {torch.float32}
    # Near a tie a router of bfloat16 sends a token elsewhere; torch.vmap rounds in other places than a loop.
    engines = ("fold",) if "moe" in s.flags else ("fold", "vmap")
    with torch.no_grad():
        bare = s.architecture.call(s.model, inputs)
        loop = s.many(inputs, "loop")
        assert s.apply(s.member(0), inputs).dtype == loop.dtype == bare.dtype == torch.bfloat16
        for engine in engines:
            try:
                found = s.many(inputs, engine)
            except fd.errors.EngineError:
                assert s.flags & {"no_vmap", "no_func", "vmap_mask_raises", "batch_free_target", "moe"}
                continue
            assert found.dtype == torch.bfloat16
            assert apart(found, loop) < TOLERANCE
    values, grads = fd.value_and_grad(losses(s, inputs))(s.stack)
    assert values.shape == (MEMBERS,)
    assert {gradient.dtype for gradient in grads.values()} == {torch.float32}
    assert any(bool(gradient.any()) for gradient in grads.values())


AUTOCAST = [
    ("lora", "bert"),
    ("adapter", "gpt2"),
    ("prefix", "llama"),
    ("bitfit", "t5"),
    ("compacter", "bert"),
    ("soft_prompt", "bert"),
    ("parallel_adapter", "bart"),
    ("low_rank_adapter", "distilbert"),
    ("test_rows", "bert"),
    ("test_written", "bert"),
    ("lora", "conv2d"),
]


@pytest.mark.parametrize(("method", "name"), AUTOCAST)
def test_autocast_is_the_same_by_every_engine(method: str, name: str) -> None:
    s = subject(method, name)
    inputs = s.inputs()
    exact = s.many(inputs, "loop")
    with torch.autocast("cpu", torch.bfloat16):
        bare = s.architecture.call(s.model, inputs)
        with torch.no_grad():
            loop = s.many(inputs, "loop")
            assert loop.dtype == bare.dtype
            for engine in ("fold", "vmap"):
                if engine == "vmap" and name == "conv2d":
                    with raises_saying(fd.errors.EngineError, "out of autocast", 'engine="auto"'):
                        s.many(inputs, engine)
                    continue
                found = s.many(inputs, engine)
                # torch.vmap leaves a linear layer with a mapped weight and a bias out of autocast: it stays float32.
                assert found.dtype == loop.dtype or engine == "vmap"
                assert apart(found, loop) < TOLERANCE
        _, grads = fd.value_and_grad(losses(s, inputs, engine="fold"))(s.stack)
    assert apart(loop, exact) < TOLERANCE
    _, exact_grads = fd.value_and_grad(losses(s, inputs, engine="fold"))(s.stack)
    for leaf, gradient in grads.items():
        assert gradient.dtype == torch.float32
        assert apart(gradient, exact_grads[leaf]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_leaves_in_a_chosen_dtype_keep_the_outputs(dtype: torch.dtype) -> None:
    s = subject("lora", "bert")
    inputs = s.inputs()
    stack = {name: leaf.to(dtype) for name, leaf in s.stack.items()}
    assert {leaf.dtype for leaf in s.delta.init(0, n=2, dtype=dtype).values()} == {dtype}
    with torch.no_grad():
        for engine in ("loop", "fold", "vmap"):
            found = s.architecture.call(functools.partial(s.delta.apply_many, stack, engine=engine), inputs)
            assert found.dtype == torch.float32
            assert apart(found, s.many(inputs, "loop")) < TOLERANCE
    _, grads = fd.value_and_grad(losses(s, inputs, engine="fold"))(stack)
    assert {gradient.dtype for gradient in grads.values()} == {dtype}


def test_leaves_are_on_their_sites_device() -> None:
    """As with ``device_map``: parts of the backbone are elsewhere; here the one device that needs no hardware."""
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4))
    delta = fd.LoraModel(
        backbone, lora_r=2, modified_modules=["0", "1", "2"], unfrozen_modules=["deltas", "1.bias", "2.bias"]
    )
    assert [a.site.device.type for a in delta.plan.all()] == ["cpu", "meta", "cpu"]
    for params in (delta.init(0), delta.init(0, n=3)):
        for name, leaf in params.items():
            assert leaf.device.type == ("meta" if name.startswith("1.") else "cpu")
    assert {leaf.device.type for leaf in delta.init(0, device="meta").values()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_leaves_at_a_site_without_tensors_follow_the_model(dtype: torch.dtype) -> None:
    other = nn.Linear(4, 4)
    block = nn.Sequential(nn.Linear(4, 4).to(dtype), nn.Sequential(nn.Tanh(), nn.Dropout()))
    model = nn.ModuleDict({"other": other, "block": block})
    model.forward = lambda x: block(x)  # type: ignore[method-assign]
    delta = fd.AdapterModel(model.eval(), modified_modules=["block.1.0"], example=(torch.ones(2, 4, dtype=dtype),))
    assert {leaf.dtype for leaf in delta.init(0).values()} == {
        torch.float64 if dtype == torch.float64 else torch.float32
    }
    assert delta.plan.all()[0].site.dtype == dtype
