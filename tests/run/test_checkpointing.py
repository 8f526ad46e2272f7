"""Gradient checkpointing in the backbone: the same gradients to the bit (law 11), for less memory."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import assert_close, raises_saying, random_params
from subjects import MEMBERS, config_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from zoo import ZOO, Architecture

import funcdelta as fd


def weighted_sum(output: Tensor) -> Tensor:
    return (output.flatten() * torch.arange(output.numel()).cos()).sum()


def gradients(delta: fd.DeltaModel, params: dict[str, Tensor], call: Callable[..., Tensor]) -> dict[str, Tensor]:
    """∂/∂p of a sum over everything that ``call(params)`` gives, by plain autograd, dropout seeded."""
    leaves = {name: leaf.clone().requires_grad_(delta.trainable(name)) for name, leaf in params.items()}
    torch.manual_seed(3)
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    weighted_sum(call(leaves)).backward()
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in trained.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(bool(gradient.any()) for gradient in found.values())
    different = [name for name, gradient in found.items() if not torch.equal(gradient, expected[name])]
    assert not different


def engine_call(delta: fd.DeltaModel, architecture: Architecture, engine: str | None, inputs: Any) -> Any:
    def call(params: dict[str, Tensor]) -> Tensor:
        apply = delta.apply if engine is None else functools.partial(delta.apply_many, engine=engine)
        return architecture.call(functools.partial(apply, params), inputs)

    return call


PAIRS = [
    ("lora", "bert"),
    ("lora", "qwen3"),
    ("adapter", "gpt2"),
    ("adapter", "bloom"),
    ("bitfit", "t5"),
    ("bitfit", "distilbert"),
    ("compacter", "bert"),
    ("low_rank_adapter", "vit"),
    ("parallel_adapter", "bart"),
    ("prefix", "llama"),
    ("prefix", "t5"),
    ("soft_prompt", "roberta"),
    ("test_gate", "opt"),
]


@pytest.mark.parametrize(("method", "name"), PAIRS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_law_11_the_same_gradients_to_the_bit(method: str, name: str, reentrant: bool) -> None:
    architecture = ZOO[name]
    model, inputs = architecture.build(), architecture.inputs(2)
    extra: dict[str, Any] = {"lora_dropout": 0.3} if method == "lora" else {}
    delta = fd.DeltaModel(model, config_for(method, architecture, **extra), example=inputs.get("args", inputs))
    delta = delta.mode(train=True)
    stack = delta.random_members(MEMBERS, delta.plan.present(dict.fromkeys(delta.names)))
    if reentrant and name != "vit":
        model.enable_input_require_grads()
    calls = {engine: engine_call(delta, architecture, engine, inputs) for engine in (None, "fold", "loop")}
    given = {engine: fd.take(stack, 0) if engine is None else stack for engine in calls}
    expected = {engine: gradients(delta, given[engine], call) for engine, call in calls.items()}
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    before = snapshot(model)
    for engine, call in calls.items():
        if reentrant and method == "prefix":
            with raises_saying(fd.errors.RecomputeError, "use_reentrant", "delta.bake(params)"):
                gradients(delta, given[engine], call)
            continue
        found = gradients(delta, given[engine], call)
        if reentrant and (architecture.name in ("t5", "bart")):
            # Here autograd adds up what flows back into the encoder in another order.
            for leaf, gradient in found.items():
                assert_close(gradient, expected[engine][leaf], 1e-5)
        else:
            assert_same(found, expected[engine])
    assert_unchanged(model, before)


# -- modules of one's own ------------------------------------------------------------------------------------------


def helper(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


class Checkpointed(nn.Module):
    """Two blocks and a head, the blocks checkpointed in a way that a subclass gives."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh())
        self.two = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh())
        self.head = nn.Linear(6, 2)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.two, self.run(self.one, x)))


class ByHelper(Checkpointed):
    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return helper(block, x)


class ByFullName(Checkpointed):
    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: block[2](block[1](block[0](x))), x, use_reentrant=False)


class Sequentially(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        blocks = [*self.one, *self.two]
        return self.head(checkpoint_sequential(blocks, 3, x, use_reentrant=False))


class ReadsTensors(Checkpointed):
    """What runs again calls no module: it reads a weight that the delta has swapped."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint as keep_nothing

        x = keep_nothing(lambda x: torch.tanh(x @ self.one[0].weight.mT).square(), x, use_reentrant=False)
        return self.head(self.two(x))


class Nested(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        def both(x: Tensor) -> Tensor:
            return self.two(checkpoint(self.one, x, use_reentrant=False))

        return self.head(checkpoint(both, x, use_reentrant=False))


PLAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "ReadsTensors": lambda m, x: m.head(m.two(torch.tanh(x @ m.one[0].weight.mT).square())),
}


@pytest.mark.parametrize("kind", [ByHelper, ByFullName, Sequentially, ReadsTensors, Nested])
def test_any_way_of_checkpointing(kind: type[Checkpointed]) -> None:
    model, x = kind().train(), torch.randn(3, 4)
    plain: Any = Checkpointed().train()
    plain.load_state_dict(model.state_dict())
    if kind is ReadsTensors:
        plain.forward = functools.partial(PLAIN["ReadsTensors"], plain)
    sites = ["two.0"] if kind is ReadsTensors else ["one.0", "two.0"]
    config = fd.LoraConfig(lora_r=2, lora_dropout=0.3, modified_modules=sites, unfrozen_modules=["deltas", "one.0"])
    delta, without = fd.DeltaModel(model, config), fd.DeltaModel(plain, config)
    params, stack = random_params(delta), random_params(delta, 3)
    assert_same(
        gradients(delta, params, lambda p: delta.apply(p, x)), gradients(delta, params, lambda p: without.apply(p, x))
    )
    for engine in ("loop",) if kind is ReadsTensors else ("loop", "fold"):
        expected = gradients(delta, stack, lambda p, e=engine: without.apply_many(p, x, engine=e))
        assert_same(gradients(delta, stack, lambda p, e=engine: delta.apply_many(p, x, engine=e)), expected)


class Hidden(Checkpointed):
    """Checkpoints by a function that it is given, so that its code does not show it."""

    around: Any

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return self.around(block, x)


def test_what_the_code_does_not_show_is_known_from_the_second_call_on() -> None:
    model, x = Hidden().eval(), torch.randn(3, 4)
    model.around = functools.partial(checkpoint, use_reentrant=False)
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["one.0", "two.0"])
    params = random_params(delta)
    with raises_saying(fd.errors.RecomputeError, "two.0", "repeat the call"):
        gradients(delta, params, lambda p: delta.apply(p, x))
    found = gradients(delta, params, lambda p: delta.apply(p, x))
    plain = Checkpointed().eval()
    plain.load_state_dict(model.state_dict())
    without = fd.LoraModel(plain, lora_r=2, modified_modules=["one.0", "two.0"])
    assert_same(found, gradients(delta, params, lambda p: without.apply(p, x)))


class Answer:
    """An output that no pytree knows."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


class Answers(ByHelper):
    def forward(self, x: Tensor) -> Any:
        return Answer(super().forward(x))


def test_outputs_of_a_class_of_ones_own() -> None:
    model, x = Answers().eval(), torch.randn(3, 4)
    plain = Checkpointed().eval()
    plain.load_state_dict(model.state_dict())
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["one.0"])
    without = fd.LoraModel(plain, lora_r=2, modified_modules=["one.0"])
    params = random_params(delta)
    expected = gradients(delta, params, lambda p: without.apply(p, x))
    assert_same(gradients(delta, params, lambda p: delta.apply(p, x).value), expected)


def test_an_output_that_is_gone_is_named() -> None:
    model, x, kept = ByHelper().eval(), torch.randn(3, 4), []
    model.two.register_forward_hook(lambda module, args, output: kept.append(output))
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["one.0"])
    params = {name: leaf.requires_grad_(delta.trainable(name)) for name, leaf in delta.init(0).items()}
    delta.apply(params, x)
    with raises_saying(fd.errors.RecomputeError, "one.0", "Keep one"):
        kept[-1].sum().backward()


# -- many calls, one graph -----------------------------------------------------------------------------------------


def test_calls_whose_graphs_live_at_once_do_not_meet() -> None:
    model, x = ByHelper().eval(), torch.randn(3, 4)
    delta = fd.BitFitModel(model, modified_modules=["one.0", "two.0"])
    first, second = random_params(delta), random_params(delta, seed=1)
    together = gradients(delta, first, lambda p: torch.stack([delta.apply(second, x), delta.apply(p, x)]).cos())
    turned = gradients(delta, first, lambda p: torch.stack([delta.apply(second, x), delta.apply(p, x)]).cos())
    assert_same(together, turned)
    plain = Checkpointed().eval()
    plain.load_state_dict(model.state_dict())
    without = fd.BitFitModel(plain, modified_modules=["one.0", "two.0"])
    assert_same(
        together, gradients(delta, first, lambda p: torch.stack([without.apply(second, x), without.apply(p, x)]).cos())
    )


def test_a_graph_that_is_gone_frees_what_its_call_held() -> None:
    model, x = ByHelper().eval(), torch.randn(3, 4)
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["one.0"], unfrozen_modules=["deltas", "head"])
    gc.disable()
    try:
        for _ in range(3):
            params = {name: leaf.requires_grad_() for name, leaf in random_params(delta).items()}
            alive = weakref.ref(params["head.weight"])
            out = delta.apply(params, x)
            out.sum().backward(retain_graph=True)
            out.sum().backward()
            del out, params
            assert alive() is None
    finally:
        gc.enable()
    # One skeleton served all three: what was swapped in it has been put back.
    (skeleton,) = delta.program.skeletons._local.cache["kept", None]
    assert skeleton.module.head.weight.data_ptr() == model.head.weight.data_ptr()


def test_checkpointing_saves_the_activations() -> None:
    """Bytes that the graph holds beside the weights, counted by torch's hooks on saved tensors."""
    architecture = ZOO["bert"]
    model, inputs = architecture.build(), architecture.inputs(3)
    delta = fd.LoraModel(model, modified_modules=["query"]).mode(train=True)
    stack = random_params(delta, 3)
    weights = {p.data_ptr() for p in model.parameters()} | {leaf.data_ptr() for leaf in stack.values()}

    def held() -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if tensor.data_ptr() not in weights:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = {name: leaf.clone().requires_grad_() for name, leaf in stack.items()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            delta.apply_many(leaves, **inputs, engine="fold").logits.sum()
        return sum(saved.values())

    before = held()
    model.activation_checkpointing_enable()
    assert held() < before / 3


# -- losses and transforms -----------------------------------------------------------------------------------------


def test_value_and_grad_and_what_torch_refuses() -> None:
    architecture = ZOO["llama"]
    model, inputs = architecture.build(), architecture.inputs(2)
    delta = fd.LoraModel(model, modified_modules=["q_proj"]).mode(train=True)
    stack = random_params(delta, 3)

    def of_one(params: dict[str, Tensor], weight: Tensor) -> Tensor:
        return weight * architecture.call(functools.partial(delta.apply, params), inputs).square().mean()

    def of_all(stack: dict[str, Tensor], weight: Tensor) -> Tensor:
        outs = architecture.call(functools.partial(delta.apply_many, stack), inputs)
        return weight * outs.square().flatten(1).mean(1)

    weights = torch.tensor([1.0, 2.0, 3.0])
    expected = {loss: fd.value_and_grad(loss, in_dims=0)(stack, weights) for loss in (of_one, of_all)}
    model.activation_checkpointing_enable()
    for loss, (value, grads) in expected.items():
        for chunk_size in (None, 2):
            again, found = fd.value_and_grad(loss, in_dims=0, chunk_size=chunk_size)(stack, weights)
            assert_close(again, value, 1e-6)
            for name, gradient in grads.items():
                assert_close(found[name], gradient, 1e-5)
    one = fd.take(stack, 0)
    with raises_saying(
        fd.errors.RecomputeError, "model checkpoints", "fd.value_and_grad(loss)", "checkpointing_disable()"
    ):
        torch.func.grad(of_one)(one, weights[0])
    with raises_saying(fd.errors.RecomputeError, "require grad", "torch.Tensor.detach"):
        fd.value_and_grad(of_one)({name: leaf.clone().requires_grad_() for name, leaf in one.items()}, weights[0])
    with raises_saying(fd.errors.RecomputeError, "fold"):
        delta.apply_many(stack, **inputs, engine="vmap")
    with raises_saying(fd.errors.RecomputeError, "fd.grad.higher_order()"), fd.grad.higher_order():
        of_one(one, weights[0])
    with raises_saying(Exception, "cannot be compiled"):
        torch.compile(of_one, fullgraph=True, backend="eager")(one, weights[0])
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for loss, (_, grads) in expected.items():
        _, found = fd.value_and_grad(loss, in_dims=0)(stack, weights)
        for name, gradient in grads.items():
            assert_close(found[name], gradient, 1e-5)
    # Where nothing is recomputed, everything goes on as ever.
    with torch.no_grad():
        assert delta.apply_many(stack, **inputs, engine="vmap").logits.shape[0] == 3
    evaluating = delta.mode(train=False)
    torch.func.grad(lambda p: evaluating.apply(p, **inputs).logits.sum())(one)


def test_torch_func_on_a_module_of_ones_own_that_checkpoints() -> None:
    model, x = ByHelper().eval(), torch.randn(3, 4)
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["one.0"])
    with raises_saying(fd.errors.RecomputeError, "The backbone checkpoints", "fd.value_and_grad(loss)"):
        torch.func.grad(lambda p: delta.apply(p, x).sum())(delta.init(0))


def test_turning_it_on_and_off_is_followed() -> None:
    architecture = ZOO["bert"]
    model, inputs = architecture.build(), architecture.inputs(2)
    delta = fd.LoraModel(model, modified_modules=["query"]).mode(train=True)
    params = random_params(delta)
    for turned_on in (False, True, False):
        (model.activation_checkpointing_enable if turned_on else model.activation_checkpointing_disable)()
        assert bool(delta.program.skeletons.get(True).recomputing) == turned_on
        assert gradients(delta, params, lambda p: delta.apply(p, **inputs).logits)
    assert copy.deepcopy(model).training is False


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    delta = fd.LoraModel(Checkpointed().eval(), lora_r=2, modified_modules=["one.0"])
    stack, x, labels = random_params(delta, 3), torch.randn(8, 4), torch.randint(2, (8,))

    def loss(stack: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return torch.vmap(nn.functional.cross_entropy, in_dims=(0, None))(delta.apply_many(stack, x), labels)

    step = fd.value_and_grad(loss, chunk_size=2)
    total = fd.tree.scale(stack, 0.0)
    for rows in torch.arange(8).split(2):
        losses, grads = step(stack, x[rows], labels[rows])
        total = fd.tree.add(total, fd.tree.scale(grads, 1 / 4))
    losses, grads = fd.value_and_grad(loss)(stack, x, labels)
    assert losses.shape == (3,)
    for name, gradient in grads.items():
        assert_close(total[name], gradient, 1e-5)
