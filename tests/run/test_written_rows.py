"""Models that write what they are given: each row's state is in the end what its own member, or none, wrote."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import transformers
from handmade import assert_close, random_params
from torch import Tensor, nn

import funcdelta as fd

pytestmark = pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")

INDEX = [2, -1, 0, -1]


class Cell(nn.Module):
    """Adds what it is given to a state (b, 4), in place, and counts the steps that all rows share."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.inner, self.gain, self.mixes = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), mixes

    def forward(self, x: Tensor, state: Tensor, steps: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x) * self.gain + state / steps.clone())
        if self.mixes:  # in one batch, and not a row alone
            y = y - (y - y.mean(0)) / 2
        state.mul_(0.5).add_(y)
        steps.add_(1)
        return y + state


class Recurrent(nn.Module):
    """Two cells that share a state, with a layer behind them."""

    def __init__(self, mixes: bool = False) -> None:
        super().__init__()
        self.cells = nn.ModuleList([Cell(mixes), Cell(mixes)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, state: Tensor, steps: Tensor | None = None) -> Tensor:
        steps = torch.ones(()) if steps is None else steps
        for cell in self.cells:
            x = cell(x, state, steps)
        return self.head(x)


WAYS: dict[str, tuple[bool, dict[str, Any]]] = {
    "folded": (False, {"modified_modules": ["inner"]}),
    "mapped": (False, {"modified_modules": ["inner"], "unfrozen_modules": ["deltas", "cells"]}),
    "in turn": (True, {"modified_modules": ["inner"], "unfrozen_modules": ["deltas", "cells"]}),
}
BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "grad": nullcontext,
}


def recurrent(way: str) -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    mixes, fields = WAYS[way]
    delta = fd.LoraModel(Recurrent(mixes).eval(), lora_r=2, **fields)
    return delta, random_params(delta, 3)


def rows(delta: fd.DeltaModel, stack: dict[str, Tensor], how: str) -> Callable[..., Tensor]:
    if how == "apply_rows":
        return lambda *args: delta.apply_rows(stack, INDEX, *args)
    return delta.bind_rows(stack, INDEX)


def apart(state: Tensor) -> list[Tensor]:
    """A copy of each row."""
    return [state[r : r + 1].clone() for r in range(state.shape[0])]


def one_by_one(delta: fd.DeltaModel, stack: dict[str, Tensor], x: Tensor, states: list[Tensor]) -> Tensor:
    """Each row by itself, with its own state."""
    members = [fd.take(stack, i) if i >= 0 else {} for i in INDEX]
    return torch.cat([delta.apply(members[r], x[r : r + 1], states[r]) for r in range(len(INDEX))])


@pytest.mark.parametrize("how", ["apply_rows", "bind_rows"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("way", WAYS)
def test_a_state_is_written_by_each_rows_own_member(way: str, block: str, how: str) -> None:
    delta, stack = recurrent(way)
    with BLOCKS[block]():
        x, state = torch.randn(4, 4), torch.randn(4, 4)
        own, found = apart(state), state.clone()
        run = rows(delta, stack, how)
        for _ in range(2):  # what was written is what the next call reads
            assert_close(run(x, found), one_by_one(delta, stack, x, own))
            assert_close(found, torch.cat(own))


def test_what_all_rows_share_is_written_once() -> None:
    delta, stack = recurrent("in turn")
    x, steps = torch.randn(4, 4), torch.tensor(1.0)
    with torch.no_grad():
        found = delta.apply_rows(stack, INDEX, x, torch.zeros(4, 4), steps)
        for r, i in enumerate(INDEX):
            own = torch.tensor(1.0)
            params = fd.take(stack, i) if i >= 0 else {}
            assert_close(found[r : r + 1], delta.apply(params, x[r : r + 1], torch.zeros(1, 4), own))
            assert_close(steps, own)


def test_gradients_go_through_what_was_written() -> None:
    delta, stack = recurrent("mapped")
    x, state = torch.randn(4, 4), torch.randn(4, 4)
    key = "cells.0.inner.lora.lora_B"

    def gradient(run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        given = stack | {key: stack[key].clone().requires_grad_()}
        return torch.autograd.grad(run(given).pow(2).sum(), given[key])[0]

    found = gradient(lambda p: delta.apply_rows(p, INDEX, x, state.clone()))
    assert_close(found, gradient(lambda p: one_by_one(delta, p, x, apart(state))))


@pytest.mark.parametrize("way", ["folded", "mapped"])
def test_compiled_rows_write_the_same(way: str) -> None:
    torch._dynamo.reset()
    delta, stack = recurrent(way)
    index, x, state = torch.tensor(INDEX), torch.randn(4, 4), torch.randn(4, 4)
    found, expected = state.clone(), state.clone()
    compiled = torch.compile(delta.apply_rows, backend="eager")
    with torch.no_grad():
        assert_close(compiled(stack, index, x, found), delta.apply_rows(stack, INDEX, x, expected))
        assert_close(found, expected)


class Reads(Recurrent):
    """Python reads values of its rows after the state was written, so that neither a fold nor vmap can run it."""

    def forward(self, x: Tensor, state: Tensor, steps: Tensor | None = None) -> Tensor:
        y = super().forward(x, state, steps)
        return 2 * y if y.sum() > 0 else y


def test_an_engine_begins_where_the_one_before_it_began() -> None:
    torch.manual_seed(0)
    delta = fd.LoraModel(Reads().eval(), lora_r=2, modified_modules=["inner"])
    stack, x, state = random_params(delta, 3), torch.randn(3, 4, 4), torch.randn(3, 4, 4)
    with torch.no_grad():
        for _ in range(2):  # what was refused is known by now
            own, found = state.clone(), state.clone()
            alone = [delta.apply(fd.take(stack, i), x[i], own[i]) for i in range(3)]
            assert_close(delta.apply_many(stack, x, found, in_dims=0), torch.stack(alone))
            assert_close(found, own)


@pytest.mark.parametrize("how", ["apply_rows", "bind_rows"])
def test_rows_that_run_in_turn_write_their_part(how: str) -> None:
    torch.manual_seed(0)
    delta = fd.LoraModel(Reads().eval(), lora_r=2, modified_modules=["inner"])
    stack, x, state = random_params(delta, 3), torch.randn(4, 4), torch.randn(4, 4)
    own, found = apart(state), state.clone()
    with torch.no_grad():
        assert_close(rows(delta, stack, how)(x, found), one_by_one(delta, stack, x, own))
        assert_close(found, torch.cat(own))


class Branches(Recurrent):
    """Nobody sees what decides whether its last layer runs, and it is asked when the state has been written."""

    runs = False

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(3, 3)

    def forward(self, x: Tensor, state: Tensor, steps: Tensor | None = None) -> Tensor:
        y = super().forward(x, state, steps)
        return self.more(y) if Branches.runs else y


@pytest.mark.parametrize("how", ["apply_rows", "bind_rows"])
def test_a_layout_learned_anew_begins_anew(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    delta = fd.LoraModel(Branches().eval(), lora_r=2, modified_modules=["inner", "more"])
    stack, x, state = random_params(delta, 3), torch.randn(4, 4), torch.randn(4, 4)
    run = rows(delta, stack, how)
    with torch.no_grad(), pytest.warns(fd.UnreachedWarning, match="did not pass through more"):
        run(x, state.clone())
    monkeypatch.setattr(Branches, "runs", True)
    own, found = apart(state), state.clone()
    with torch.no_grad():
        assert_close(run(x, found), one_by_one(delta, stack, x, own))
        assert_close(found, torch.cat(own))


def test_rows_of_the_bare_backbone_do_not_meet_in_a_module_that_mixes() -> None:
    """A normalisation with weights of each member's own, in training: every row has statistics of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1)).train()
    delta = fd.LoraModel(model, modified_modules=["2"], unfrozen_modules=["deltas", "1"])
    stack, x = random_params(delta, 3), torch.randn(4, 4, 5)
    expected = torch.cat([delta.apply(fd.take(stack, i) if i >= 0 else {}, x[r : r + 1]) for r, i in enumerate(INDEX)])
    assert_close(delta.apply_rows(stack, INDEX, x), expected)
    assert_close(delta.bind_rows(stack, INDEX)(x), expected)


RWKV = {"vocab_size": 64, "context_length": 32, "hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2}


@pytest.mark.parametrize("trained", [[], ["attention"], ["feed_forward"]], ids=["", "attention", "feed_forward"])
def test_a_recurrent_model_of_transformers(trained: list[str]) -> None:
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**RWKV, intermediate_size=32)).eval()
    delta = fd.LoraModel(model, modified_modules=["key"], unfrozen_modules=["deltas", *trained])
    stack, tokens = random_params(delta, 3), torch.randint(3, 64, (4, 6))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    found = delta.bind_rows(stack, INDEX).generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    for r, i in enumerate(INDEX):
        view = delta.bind(fd.take(stack, i) if i >= 0 else {})
        own = view.generate(tokens[r : r + 1], attention_mask=torch.ones(1, 6, dtype=torch.long), **options)
        assert_close(torch.stack(found.logits)[:, r], torch.stack(own.logits)[:, 0])
