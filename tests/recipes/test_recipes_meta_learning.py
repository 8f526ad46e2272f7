"""Meta-learning recipes against loops over tasks in plain autograd, finite differences and a closed form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import funcdelta as fd
from funcdelta.recipes.meta_learning import adapt, maml_loss, reptile

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
TASKS, ROWS, STEPS, RATE = 3, 4, 2, 0.5


class Few:
    """A tiny BERT in float64 with LoRA and a head of its own, and random tasks."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        backbone = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **SIZES)).double().eval()
        self.delta = fd.LoraModel(
            backbone, lora_r=2, modified_modules=["query"], unfrozen_modules=["deltas", "classifier"]
        )
        start = self.delta.init(0, dtype=torch.float64)
        # Away from B = 0, where the gradient of A vanishes.
        trained, constants = fd.partition(start, self.delta.trainable)
        noise = fd.tree.scale(fd.tree.randn_like(trained, 1), 0.3)
        self.params = fd.combine(fd.tree.add(trained, noise), constants)
        draw = torch.Generator().manual_seed(2)
        self.support = self.data(draw)
        self.query = self.data(draw)

    @staticmethod
    def data(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(20, (TASKS, ROWS, 5), generator=draw)
        return tokens, torch.randint(3, (TASKS, ROWS), generator=draw)

    def loss(self, params: dict[str, Tensor], tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.delta.apply(params, input_ids=tokens).logits, labels)

    def by_loop(self, first_order: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over tasks and its gradient, by autograd in a loop that knows nothing of funcdelta's optimisers."""
        roots = {name: leaf.clone().requires_grad_() for name, leaf in self.params.items()}
        moving = [name for name in roots if name not in self.delta.constants]
        total = torch.zeros((), dtype=torch.float64)
        with fd.grad.higher_order():
            for i in range(TASKS):
                now = dict(roots)
                for _ in range(STEPS):
                    value = self.loss(now, *(t[i] for t in self.support))
                    grads = torch.autograd.grad(value, [now[name] for name in moving], create_graph=not first_order)
                    now |= {name: now[name] - RATE * g for name, g in zip(moving, grads, strict=True)}
                total = total + self.loss(now, *(t[i] for t in self.query)) / TASKS
            found = torch.autograd.grad(total, [roots[name] for name in moving])
        return total.detach(), dict(zip(moving, found, strict=True))


@pytest.fixture(scope="module")
def few() -> Few:
    return Few()


@pytest.mark.parametrize("first_order", [False, True], ids=["MAML", "FOMAML"])
def test_the_meta_gradient_is_that_of_a_loop_over_tasks(few: Few, first_order: bool) -> None:
    def outer(params):
        return maml_loss(few.loss, params, few.support, few.query, steps=STEPS, lr=RATE, first_order=first_order)

    grads, value = torch.func.grad_and_value(outer)(few.params)
    expected, by_name = few.by_loop(first_order)
    torch.testing.assert_close(value, expected)
    assert len(by_name) == 4 + 2
    for name, gradient in by_name.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(grads[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("first_order", [False, True], ids=["MAML", "FOMAML"])
def test_checkpointed_steps_have_the_same_meta_gradient(few: Few, first_order: bool) -> None:
    roots = {name: leaf.clone().requires_grad_(few.delta.trainable(name)) for name, leaf in few.params.items()}
    rate = torch.tensor(RATE, dtype=torch.float64, requires_grad=True)
    options = {"steps": STEPS, "lr": rate, "first_order": first_order, "checkpoint": True}
    loss = maml_loss(few.loss, roots, few.support, few.query, **options)
    expected, by_name = few.by_loop(first_order)
    torch.testing.assert_close(loss.detach(), expected)
    *found, slope = torch.autograd.grad(loss, [*(roots[name] for name in by_name), rate])
    torch.testing.assert_close(found, list(by_name.values()), rtol=1e-9, atol=1e-11)

    def outer(rate: Tensor) -> Tensor:
        return maml_loss(few.loss, few.params, few.support, few.query, steps=STEPS, lr=rate, first_order=first_order)

    torch.testing.assert_close(slope, torch.func.grad(outer)(rate.detach()))


def test_checkpointed_steps_keep_no_activations(few: Few) -> None:
    """Nodes of the graph, each of which may save tensors: fd.grad.unroll's own tests count what a step saves."""

    def nodes(steps: int, checkpoint: bool) -> int:
        roots = {name: leaf.clone().requires_grad_(few.delta.trainable(name)) for name, leaf in few.params.items()}
        loss = maml_loss(few.loss, roots, few.support, few.query, steps=steps, lr=RATE, checkpoint=checkpoint)
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [after for after, _ in node.next_functions]
        return len(seen)

    assert nodes(5, True) - nodes(2, True) == 3 * 1
    assert nodes(5, False) - nodes(2, False) > 3 * 100


def test_the_meta_gradient_is_the_slope_of_the_loss(few: Few) -> None:
    def outer(params):
        return maml_loss(few.loss, params, few.support, few.query, steps=STEPS, lr=RATE)

    trained, constants = fd.partition(few.params, few.delta.trainable)
    direction = fd.tree.randn_like(trained, 5)
    slope = fd.tree.vdot(torch.func.grad(lambda p: outer(fd.combine(p, constants)))(trained), direction)
    step = 1e-5
    up, down = (outer(fd.combine(fd.tree.add(trained, fd.tree.scale(direction, s)), constants)) for s in (step, -step))
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


def test_first_and_second_order_differ(few: Few) -> None:
    _, second = few.by_loop()
    _, first = few.by_loop(first_order=True)
    assert max((second[name] - first[name]).abs().max() for name in first) > 1e-4


def test_the_rate_of_the_inner_loop_can_be_learned(few: Few) -> None:
    def outer(lr):
        return maml_loss(few.loss, few.params, few.support, few.query, steps=STEPS, lr=lr)

    rate = torch.tensor(RATE, dtype=torch.float64)
    found = torch.func.grad(outer)(rate)
    torch.testing.assert_close(found, (outer(rate + 1e-5) - outer(rate - 1e-5)) / 2e-5, rtol=1e-5, atol=1e-9)


def test_anil_adapts_the_head_alone(few: Few) -> None:
    support = [t[0] for t in few.support]
    adapted = adapt(few.loss, few.params, support, steps=STEPS, lr=RATE, trainable=["classifier"])
    moved = {name for name in adapted if not torch.equal(adapted[name], few.params[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert few.loss(adapted, *support) < few.loss(few.params, *support)


def test_reptile_moves_towards_the_mean_of_adapted_params(few: Few) -> None:
    moved = reptile(few.loss, few.params, few.support, steps=STEPS, lr=RATE, rate=0.25)
    each = [adapt(few.loss, few.params, [t[i] for t in few.support], steps=STEPS, lr=RATE) for i in range(TASKS)]
    for name, leaf in few.params.items():
        mean = sum(one[name] for one in each) / TASKS
        torch.testing.assert_close(moved[name], leaf + 0.25 * (mean - leaf))
    assert any(not torch.equal(moved[name], few.params[name]) for name in moved)


def test_meta_training_helps_on_tasks_that_were_never_seen() -> None:
    """Sine-like regression of one family: tasks y = a·x with a around 3; the meta-learned start adapts better."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])

    def loss(params, x, y):
        return F.mse_loss(delta.apply(params, x), y)

    def tasks(seed: int, n: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        slope = 3 + 0.3 * torch.randn(n, 1, 1, generator=draw)
        x, z = torch.randn(2, n, 6, 1, generator=draw)
        return (x, slope * x), (z, slope * z)

    start = params = delta.init(0)
    optimizer = fd.optim.adam(3e-2)
    state = optimizer.init(params)
    for step in range(60):
        support, query = tasks(step, 8)
        grads = torch.func.grad(lambda p, s=support, q=query: maml_loss(loss, p, s, q, steps=2, lr=0.05))(params)
        updates, state = optimizer.update(grads, state, params)
        params = fd.tree.add(params, updates)
    unseen = tasks(10_000, 32)
    before, after = (maml_loss(loss, p, *unseen, steps=2, lr=0.05) for p in (start, params))
    assert after < 0.5 * before
