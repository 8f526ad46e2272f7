"""The first fold of inputs: how often the model runs, what is evidence that members do not mix, and rules of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import Tied, assert_close, raises_saying, random_params
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.run import rules
from funcdelta.run.moved import are_apart, moved_apart
from funcdelta.run.rules import DRAWN, MIXED, Rows
from funcdelta.run.tracking import Tracking

pytestmark = pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")

N = 4


class Between(nn.Module):
    """Two layers, ``between`` them whatever a test is about; it counts its calls."""

    def __init__(self, between: Callable[..., Any] = torch.tanh) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 6), nn.Linear(6, 3)
        self.between, self.sizes = between, list[int]()

    def forward(self, x: Tensor) -> Any:
        self.sizes.append(len(x))
        return self.h(self.between(self.a(x)))


def lora(model: nn.Module, *names: str) -> fd.DeltaModel:
    return fd.LoraModel(model.eval(), lora_r=2, modified_modules=list(names or ("a", "h")))


def one_by_one(delta: fd.DeltaModel, stack: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.stack([delta.apply(fd.take(stack, i), x) for i in range(N)])


STACKS: dict[str, Callable[[fd.DeltaModel], dict[str, Tensor]]] = {
    "apart": lambda delta: random_params(delta, N),
    "fresh": lambda delta: delta.init(0, n=N),
    "one lost": lambda delta: {
        name: leaf if name in delta.constants else torch.cat([leaf[:-1], torch.full_like(leaf[-1:], torch.nan)])
        for name, leaf in random_params(delta, N).items()
    },
}


@pytest.mark.parametrize("kind", STACKS)
def test_the_first_fold_runs_the_model_a_few_times(kind: str) -> None:
    """Watched with two members; folded twice, in two orders; the last one alone. Fresh ones are moved apart for it."""
    sizes: list[int] = []

    def noted(y: Tensor) -> Tensor:
        sizes.append(len(y))
        return torch.tanh(y)

    delta, x = lora(Between(noted)), torch.randn(3, 6)
    stack = STACKS[kind](delta)
    delta.apply(fd.take(stack, 0), x)
    sizes.clear()
    with torch.no_grad():
        found = delta.apply_many(stack, x, engine="fold")
        assert sorted(sizes) == sorted([2 * 2, 3 * N, 3 * N, 3] + ([] if kind == "apart" else [3 * N]))
        torch.testing.assert_close(found, one_by_one(delta, stack, x), equal_nan=True)


def crowded(y: Tensor) -> Tensor:
    """Mixes rows where there are many, which no probe of a few rows sees."""
    return y - y.mean(0) if len(y) > 7 else y


@pytest.mark.parametrize("kind", ["apart", "fresh"])
@pytest.mark.parametrize("way", ["shared", "own"])
def test_what_depends_on_how_many_rows_there_are_is_refused(kind: str, way: str) -> None:
    delta = lora(Between(crowded))
    stack = STACKS[kind](delta)
    x, dims = (torch.randn(3, 6), None) if way == "shared" else (torch.randn(N, 3, 6), 0)
    for _ in range(2):
        with raises_saying(fd.FoldError, "rows", "engine="):
            delta.apply_many(stack, x, in_dims=dims, engine="fold")


@pytest.mark.parametrize("reverse", [False, True])
def test_rows_handed_on_in_either_direction_are_seen(reverse: bool) -> None:
    def handed_on(y: Tensor) -> Tensor:
        if len(y) < 8:
            return y
        return y.flip(0).cumsum(0).flip(0) if reverse else y.cumsum(0)

    delta = lora(Between(handed_on))
    with raises_saying(fd.FoldError, "rows"):
        delta.apply_many(random_params(delta, N), torch.randn(3, 6), engine="fold")


def test_a_layout_that_was_found_wrong_is_forgotten() -> None:
    delta = lora(Between(crowded))
    with raises_saying(fd.FoldError, "rows"):
        delta.apply_many(random_params(delta, N), torch.randn(3, 6), engine="fold")
    assert not len(delta.program.layouts)


def test_a_table_read_elsewhere_runs_there_once_per_member() -> None:
    """Which is known after a member has run alone; the probe begins again with that."""
    delta, tokens = lora(Tied(), "embedding", "body"), torch.randint(0, 11, (3, 5))
    stack = random_params(delta, N)
    assert_close(delta.apply_many(stack, tokens, engine="fold"), one_by_one(delta, stack, tokens))


def test_a_model_that_catches_everything_hides_nothing() -> None:
    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.h = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            try:
                y = self.norm(y)
            except:  # noqa: E722
                y = y + 1
            return self.h(y)

    delta = lora(Catching(), "a", "h").mode(train=True)
    stack, x = random_params(delta, N), torch.randn(3, 6)
    assert_close(delta.apply_many(stack, x, engine="fold"), one_by_one(delta, stack, x))
    assert "norm" in delta.explain(stack, x).once_per_member


class State:
    """An input that is no tensor, and that a call changes."""

    def __init__(self) -> None:
        self.scale = torch.ones(())


def test_an_object_that_the_call_changes_is_changed_once() -> None:
    class Scaled(Between):
        def forward(self, x: Tensor, state: State) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            state.scale = state.scale + 1
            return super().forward(x) * state.scale

    delta, state, x = lora(Scaled()), State(), torch.randn(3, 6)
    stack = random_params(delta, N)
    expected = torch.stack([delta.apply(fd.take(stack, i), x, State()) for i in range(N)])
    assert_close(delta.apply_many(stack, x, state, in_dims={"state": None}, engine="fold"), expected)
    assert float(state.scale) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_call_is_evidence_only_where_rounding_hides_no_mix(dtype: torch.dtype) -> None:
    sizes: list[int] = []

    def noted(y: Tensor) -> Tensor:
        sizes.append(len(y))
        return torch.tanh(y)

    delta, x = lora(Between(noted).to(dtype)), torch.randn(3, 6, dtype=dtype)
    with torch.no_grad():
        delta.apply_many(random_params(delta, N), x, engine="fold")
    assert sizes.count(3 * N) == (3 if dtype == torch.bfloat16 else 2)


def test_a_scalar_output_is_named() -> None:
    class Loss(Between):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"loss": nn.MSELoss()(y, torch.zeros_like(y)), "y": y}

    delta = lora(Loss())
    with raises_saying(fd.FoldError, "The output loss is a scalar"):
        delta.apply_many(random_params(delta, N), torch.randn(3, 6), engine="fold")


@pytest.mark.parametrize("training", [False, True])
def test_dropout_that_acts_is_no_evidence_of_a_mix(training: bool) -> None:
    dropout = nn.Dropout(0.5)
    delta = lora(Between(lambda y: dropout(y))).mode(train=training)
    dropout.train(training)
    stack, x = random_params(delta, N), torch.randn(3, 6)
    torch.manual_seed(3)
    first = delta.apply_many(stack, x, engine="fold")
    after = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(delta.apply_many(stack, x, engine="fold"), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_method_that_drops_at_some_of_its_sites_alone() -> None:
    """LoRA has no dropout at a table, the first of these sites, and at the layer behind it has."""
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    config = fd.LoraConfig(lora_r=2, lora_dropout=0.5, modified_modules=("0", "1"), unfrozen_modules=("deltas", "2"))
    delta, tokens = fd.DeltaModel(model, config).mode(train=True), torch.randint(0, 11, (3, 5))
    stack = random_params(delta, N)
    torch.manual_seed(3)
    first = delta.apply_many(stack, tokens, engine="fold")
    torch.manual_seed(3)
    assert torch.equal(delta.apply_many(stack, tokens, engine="fold"), first)


def test_members_are_moved_each_by_its_own_length() -> None:
    stack = {"a": torch.zeros(3, 4), "scale": torch.ones(3), "b": torch.full((3, 2), torch.inf)}
    moved = moved_apart(stack, ["scale"])
    assert torch.equal(moved["scale"], stack["scale"])
    assert are_apart(moved, ["scale"])
    assert all(leaf.isfinite().all() for leaf in moved.values())
    ends = moved_apart({name: leaf[:1] for name, leaf in stack.items()}, ["scale"], ends=True)
    assert are_apart(ends, ["scale"])
    assert not are_apart(stack, ["scale"])


# -- rules tell what blocks tell ---------------------------------------------------------------------------------------

X, Y = torch.randn(4, 3, 5), torch.randn(4, 5, 2)
Q = torch.randn(4, 2, 3, 5)
INTEGERS = torch.randint(0, 7, (4, 3))

OPERATIONS: dict[str, Callable[[], Tensor | tuple[Tensor, ...]]] = {
    "sum": lambda: X.sum(1),
    "sum, kept": lambda: X.sum((1, -1), keepdim=True),
    "sum of rows": lambda: X.sum(0),
    "sum of all": lambda: X.sum(),
    "mean": lambda: X.mean(-1, keepdim=True),
    "max": lambda: tuple(X.max(1)),
    "argmax": lambda: X.argmax(-1),
    "amax": lambda: X.amax((0, 1)),
    "var": lambda: X.var(1),
    "norm": lambda: torch.linalg.vector_norm(X, dim=-1),
    "all": lambda: (X > 0).all(1),
    "logsumexp": lambda: X.logsumexp(2),
    "softmax": lambda: X.softmax(-1),
    "softmax of rows": lambda: X.softmax(0),
    "log_softmax": lambda: X.log_softmax(1),
    "cumsum": lambda: X.cumsum(1),
    "cumsum of rows": lambda: X.cumsum(0),
    "sort": lambda: tuple(X.sort(1)),
    "topk": lambda: tuple(X.topk(2, 1)),
    "flip": lambda: X.flip(1),
    "flip of rows": lambda: X.flip(0),
    "cat": lambda: torch.cat([X, -X], -1),
    "cat with a constant": lambda: torch.cat([X, torch.ones(4, 3, 1)], -1),
    "embedding": lambda: nn.functional.embedding(INTEGERS, torch.randn(7, 5)),
    "layer_norm": lambda: nn.functional.layer_norm(X, (5,)),
    "layer_norm of rows": lambda: nn.functional.layer_norm(X, (4, 3, 5)),
    "bmm": lambda: X @ Y,
    "linear": lambda: nn.functional.linear(X, torch.randn(2, 5), torch.randn(2)),
    "linear, turned": lambda: nn.functional.linear(X.transpose(0, 2), torch.randn(2, 4)),
    "attention": lambda: nn.functional.scaled_dot_product_attention(Q, Q, Q),
    "attention, masked": lambda: nn.functional.scaled_dot_product_attention(Q, Q, Q, torch.ones(3, 3).tril().bool()),
    "attention, one mask for each": lambda: nn.functional.scaled_dot_product_attention(Q, Q, Q, torch.ones(4, 1, 3, 3)),
    "attention, another mask of rows": lambda: nn.functional.scaled_dot_product_attention(
        Q, Q, Q, torch.randn(4, 1, 1, 3).expand(4, 2, 3, 3)
    ),
    "squares": lambda: (X**2).rsqrt().neg(),
    "parts": lambda: X.transpose(1, 2)[:, 1:].unsqueeze(0).reshape(4, 12),
}


def tags_of(operation: Callable[[], Any]) -> list[Any]:
    with Tracking(2, lambda what: None, lambda what: None, rows=2) as tracking:
        for leaf in (X, Y, Q, INTEGERS):
            tracking.mark(leaf, Rows(0))
        found = operation()
        return [tracking.of(leaf) for leaf in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rule_tells_what_blocks_tell(name: str, monkeypatch) -> None:
    told = tags_of(OPERATIONS[name])
    views = {*rules.SAME, *rules.RESHAPE, *rules.MOVE, *rules.CUT}
    monkeypatch.setattr(rules, "RULES", {key: rule for key, rule in rules.RULES.items() if key in views})
    monkeypatch.setattr(rules, "_known", {})
    assert told == tags_of(OPERATIONS[name])
    assert DRAWN not in told
    assert (MIXED in told) == (name.endswith("of rows") or name in ("sum of all", "amax", "linear, turned"))
