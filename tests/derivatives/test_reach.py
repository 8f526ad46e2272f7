"""fd.grad.reached: which leaves a function differentiates in, against what is known of the delta."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import funcdelta as fd

Params = dict[str, Tensor]


class Case:
    """LoRA and a parallel adapter; LoRA's B is zero, so that the gradient of its A is zero, too."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
        self.delta = fd.DeltaModel(
            backbone,
            fd.LoraConfig(lora_r=2, modified_modules=["0"]),
            fd.ParallelAdapterConfig(bottleneck_dim=2, modified_modules=["2"]),
        )
        self.params, self.stack = self.delta.init(0), self.delta.init(0, n=2)
        self.x, self.y = torch.randn(5, 4), torch.randint(3, (5,))
        self.trains = frozenset(filter(self.delta.trainable, self.delta.names))


@pytest.fixture(scope="module")
def case() -> Case:
    case = Case()
    assert case.trains < set(case.delta.names)
    assert not torch.func.grad(lambda p: case.delta.apply(p, case.x).sum())(case.params)["0.lora.lora_A"].any()
    return case


@pytest.mark.parametrize("engine", ["fold", "vmap", "loop", "auto"])
def test_constants_are_not_reached_by_any_engine(case: Case, engine: str) -> None:
    assert fd.grad.reached(lambda s: case.delta.apply_many(s, case.x, engine=engine), case.stack) == case.trains
    assert fd.grad.reached(case.delta.apply, case.params, case.x) == case.trains
    assert fd.grad.reached(lambda s: case.delta.apply_rows(s, [0, 1, -1, 1, 0], case.x), case.stack) == case.trains


def accuracy(case: Case, stack: Params) -> Tensor:
    return (case.delta.apply_many(stack, case.x).argmax(-1) == case.y).float().mean(-1)


def without_gradients(case: Case, stack: Params) -> Tensor:
    with torch.no_grad():
        return torch.vmap(F.cross_entropy, in_dims=(0, None))(case.delta.apply_many(stack, case.x), case.y)


def in_numbers(case: Case, stack: Params) -> Tensor:
    logits = case.delta.apply_many(stack, case.x)
    return torch.tensor([float(member.sum()) + member[0, 0].item() + member.numpy().max() for member in logits])


def member_by_member(case: Case, stack: Params) -> Tensor:
    """Constants are cut out of the stack before apply detaches them."""
    return torch.stack([case.delta.apply(fd.take(stack, i), case.x).argmax(-1).sum() for i in range(2)])


def moved(case: Case, stack: Params) -> Tensor:
    return case.delta.apply_many({name: leaf * 1.0 for name, leaf in stack.items()}, case.x).argmax(-1)


def by_a_view(case: Case, stack: Params) -> Any:
    return case.delta.bind_rows(stack, [0, 1, 0, 1, 0])(case.x).detach().argmax(-1).tolist()


@pytest.mark.parametrize("f", [accuracy, without_gradients, in_numbers, member_by_member, moved, by_a_view])
def test_leaves_are_seen_where_the_result_has_no_gradient(case: Case, f: Callable[[Case, Params], Any]) -> None:
    assert fd.grad.reached(lambda stack: f(case, stack), case.stack) == case.trains


def test_it_works_inside_transforms_and_changes_nothing(case: Case) -> None:
    found = []

    def f(params: Params) -> Tensor:
        found.append(fd.grad.reached(case.delta.apply, params, case.x))
        return case.delta.apply(params, case.x).sum()

    plain = [f(case.params), torch.func.grad(lambda p: case.delta.apply(p, case.x).sum())(case.params)]
    with torch.no_grad():
        f(case.params)
    assert torch.equal(torch.vmap(f)(case.stack)[0], case.delta.apply(fd.take(case.stack, 0), case.x).sum())
    gradient = torch.func.grad(f)(case.params)
    torch.vmap(torch.func.grad(f))(case.stack)
    torch.func.jvp(f, (case.params,), (case.params,))
    assert found == [case.trains] * 6
    assert torch.equal(plain[0], f(case.params))
    for name, leaf in gradient.items():
        assert torch.equal(leaf, plain[1][name])
    assert not any(leaf.requires_grad for leaf in case.params.values())


def test_a_compiled_function_is_looked_into(case: Case) -> None:
    compiled = torch.compile(case.delta.apply, backend="eager", fullgraph=True)
    expected = compiled(case.params, case.x)
    assert fd.grad.reached(compiled, case.params, case.x) == case.trains
    counted = torch._dynamo.utils.counters["frames"].copy()
    assert torch.equal(compiled(case.params, case.x), expected)
    assert torch._dynamo.utils.counters["frames"] == counted  # nothing was compiled again


def test_threads_do_not_leave_compiling_switched_off(case: Case) -> None:
    begun, go = threading.Barrier(2), threading.Event()

    def slow(params: Params) -> Tensor:
        begun.wait(10)
        go.wait(10)
        return case.delta.apply(params, case.x)

    threads = [threading.Thread(target=fd.grad.reached, args=(slow, case.params)) for _ in range(2)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_generation_is_followed() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, pad_token_id=0, eos_token_id=None, **sizes)).eval()
    delta = fd.LoraModel(model, lora_r=2)
    prompt = torch.randint(1, 20, (2, 4))

    def score(stack: Params) -> Tensor:
        text = delta.bind_rows(stack, [0, 1]).generate(prompt, max_new_tokens=3, do_sample=False)
        return torch.tensor(text.numpy().sum(-1).astype("float32"))

    found = fd.grad.reached(score, delta.init(0, n=2))
    assert found == set(filter(delta.trainable, delta.names))


def test_sites_that_a_call_passes_by_are_not_reached(case: Case) -> None:
    assert fd.grad.reached(lambda p, x: p["a"] * x + p["b"].detach(), dict.fromkeys("abc", torch.ones(1)), 2.0) == {"a"}
    assert fd.grad.reached(lambda p: p["a"].sum() + p["b"].sum(), {"a": torch.ones(1), "b": torch.tensor(3)}) == {"a"}
    assert fd.grad.reached(lambda p: 0, {"w": torch.ones(1), "steps": torch.tensor(3)}) == {"w"}


def test_where_nothing_is_seen_it_says_what_to_write(case: Case) -> None:
    with pytest.raises(fd.errors.ParamsError, match=r"trainable=delta\.trainable, or some, rest = fd\.partition"):
        fd.grad.reached(lambda params: 3.0, case.params)
    with pytest.raises(fd.errors.ParamsError, match=r"flat dict .* found list"):
        fd.grad.reached(lambda params: 3.0, [torch.ones(2)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(fd.errors.ParamsError, match=r"'w' is torch\.sparse_coo"):
        fd.grad.reached(lambda params: 3.0, {"v": torch.ones(2), "w": torch.eye(2).to_sparse()})

    def wrong(params: Params) -> Tensor:
        raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        fd.grad.reached(wrong, case.params)
