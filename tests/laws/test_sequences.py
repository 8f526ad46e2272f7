"""Law 15: what a call gives depends on its own inputs alone, not on the calls before it, nor on the process around it.

Sequences of calls on one delta, each compared with what a written copy of the model gives.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

import pytest
import torch
from hard_checks import (
    THEIR_WARNINGS,
    Case,
    assert_close,
    assert_member,
    assert_one_of,
    law,
    number_or_refusal,
    original,
    outcomes,
    right,
    weighted_sum,
    with_leaves,
)
from hard_models import EVERY, written_call
from torch import Tensor

import funcdelta as fd

pytestmark = THEIR_WARNINGS


class Step(NamedTuple):
    """One call: in which way, on which variant of the inputs (of those there are), rows, values and members."""

    way: str
    variant: int = 0
    rows: int = 4
    seed: int = 1
    n: int = 3


SEQUENCES = {
    "other values": [
        Step("auto", seed=1),
        Step("auto", seed=2),
        Step("own auto", seed=2),
        Step("rows", seed=2),
        Step("own auto", seed=1),
        Step("apply", seed=2),
    ],
    "padding later": [
        Step("auto", 0),
        Step("rows", 0),
        Step("auto", 1),
        Step("own auto", 1),
        Step("rows", 1),
        Step("own auto", 2),
    ],
    "padding first": [
        Step("own auto", 2),
        Step("rows", 1),
        Step("auto", 1),
        Step("auto", 0),
        Step("own fold", 0),
        Step("rows", 0),
    ],
    "sizes": [
        Step("auto", 0, rows=4),
        Step("auto", 1, rows=2, n=2),
        Step("own auto", 1, rows=2, n=4),
        Step("auto", 0, rows=1, n=4),
        Step("rows", 1, rows=2),
        Step("auto", 1, rows=4, n=1),
    ],
    "engines": [
        Step("fold", 0),
        Step("auto", 1),
        Step("vmap", 0),
        Step("rows", 1),
        Step("loop", 0),
        Step("view", 1),
    ],
    "engines backwards": [
        Step("apply", 1),
        Step("routed", 0),
        Step("loop", 1),
        Step("vmap", 1),
        Step("auto", 0),
        Step("fold", 1),
    ],
}


def take(case: Case, step: Step) -> None:
    """Makes one call and holds it to the written copies: the number, or a refusal by name where one may refuse."""
    name, flags = case.hard.name, case.hard.flags
    variant = step.variant % case.hard.variants
    where = f"{step}"
    batch = case.batch(variant, step.rows, step.seed)
    if step.way in ("apply", "view"):
        params = case.params(1)
        output = case.delta.apply(params, **batch) if step.way == "apply" else case.delta.bind(params)(**batch)
        assert_member(case, case.hard.output(output), 1, step.rows, step.seed, variant, where)
        return
    if step.way in ("rows", "routed"):
        n = max(step.n, step.rows)
        index = list(reversed(range(step.rows))) if "mixes" in flags else [2, -1, 0, 2][: step.rows]
        call = case.rows if step.way == "rows" else case.rows_of_view
        kinds = (fd.errors.EngineError, fd.errors.ParamsError)
        found = number_or_refusal(lambda: call(batch, index, n), "routes" in flags, kinds)
        if isinstance(found, str):
            return
        if "random" in flags:
            for i, member in enumerate(index):
                allowed = [each[i] for each in outcomes(name, member, step.rows, step.seed, variant)]
                assert_one_of(case.hard, found[i], allowed, where)
        else:
            assert_one_of(case.hard, found, case.right_rows(batch, index), where)
        return
    engine, own = step.way.removeprefix("own "), step.way.startswith("own ")
    must = engine in ("auto", "loop") or (engine == "fold" and "folds" in flags)
    seeds = [(step.seed + i) % 3 + 1 for i in range(step.n)] if own else [step.seed] * step.n

    def run() -> Tensor:
        if not own:
            return case.many(batch, step.n, engine=engine)
        return case.many_own([case.batch(variant, step.rows, seed) for seed in seeds], engine=engine)

    found = number_or_refusal(run, must)
    if not isinstance(found, str):
        assert len(found) == step.n
        for member, seed in enumerate(seeds):
            assert_member(case, found[member], member, step.rows, seed, variant, f"{where}, member {member}")


# Each model with some of the sequences and each sequence with some of the models; all pairs by FUNCDELTA_ALL=1.
THINNED = [
    (sequence, name)
    for i, name in enumerate(EVERY)
    for k, sequence in enumerate(SEQUENCES)
    if "FUNCDELTA_ALL" in os.environ or (i + k) % 3 == 0
]


@pytest.mark.parametrize(("sequence", "name"), THINNED)
@law
def test_a_call_does_not_depend_on_the_calls_before(sequence: str, name: str) -> None:
    case = Case(name)
    with torch.no_grad():
        for step in SEQUENCES[sequence]:
            take(case, step)


@pytest.mark.parametrize("name", [name for name, hard in EVERY.items() if "random" not in hard.flags])
@law
def test_gradients_over_own_batches_do_not_depend_on_the_steps_before(name: str) -> None:
    case = Case(name)
    for variant, start in ((0, 1), (case.hard.variants - 1, 2), (0, 2)):
        batches = [case.batch(variant, seed=(start + i) % 3 + 1) for i in range(2)]
        joined, dims = case.hard.own_batches(batches)
        stack = case.stack(2)

        def loss(params: dict[str, Tensor], joined: dict = joined, dims: object = dims) -> Tensor:
            outs = case.hard.output(case.delta.apply_many(params, in_dims=dims, **joined))
            return torch.stack([weighted_sum(out) for out in outs.unbind(0)])

        losses, grads = fd.value_and_grad(loss)(stack)
        for member, batch in enumerate(batches):
            params, trained = with_leaves(case.delta, fd.take(stack, member))
            value = weighted_sum(written_call(case.hard, case.delta.sites, params, batch))
            expected = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
            assert_close(case.hard, losses[member], value.detach(), f"variant {variant}, loss of member {member}", 10)
            for leaf, gradient in zip(trained, expected, strict=True):
                what = f"variant {variant}, gradient of {leaf}, member {member}"
                assert_close(case.hard, grads[leaf][member], gradient, what, 10)


MAPPED = [name for name, hard in EVERY.items() if not {"random", "no_func"} & hard.flags]


@pytest.mark.parametrize("name", MAPPED if "FUNCDELTA_ALL" in os.environ else MAPPED[::2])
@law
def test_one_members_loss_is_mapped_or_refused_by_name(name: str) -> None:
    case = Case(name)
    batch = case.batch(case.hard.variants - 1)
    loss = fd.value_and_grad(lambda params: weighted_sum(case.hard.output(case.delta.apply(params, **batch))))
    try:
        losses, grads = loss(case.stack())
    except fd.errors.EngineError:
        return
    for member in range(3):
        params, trained = with_leaves(case.delta, case.params(member))
        value = weighted_sum(written_call(case.hard, case.delta.sites, params, batch))
        expected = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
        assert_close(case.hard, losses[member], value.detach(), f"loss of member {member}", 10)
        for leaf, gradient in zip(trained, expected, strict=True):
            assert_close(case.hard, grads[leaf][member], gradient, f"gradient of {leaf}, member {member}", 10)


AROUND = ["zoo_bert", "zoo_conv2d", "zoo_t5", "experts", "gemma3", "padding_free", "lstm", "nested_linear"]
ONE_OF_EACH = [Step("apply"), Step("auto", 1), Step("own auto"), Step("fold"), Step("vmap"), Step("rows"), Step("view")]


def compute(name: str) -> None:
    """Has the right outputs of ``ONE_OF_EACH`` ready."""
    for member in (-1, 0, 1, 2):
        for variant in (0, 1 % EVERY[name].variants):
            for seed in (1, 2, 3):
                right(name, member, 4, seed, variant)


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_the_default_dtype_decides_nothing(dtype: torch.dtype, name: str) -> None:
    compute(name)
    before, model = Case(name), EVERY[name].build()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        case = Case(name, model)
        fresh = case.delta.init(3, n=2)
        with torch.no_grad():
            for step in ONE_OF_EACH:
                take(case, step)
    finally:
        torch.set_default_dtype(usual)
    for leaf, value in before.delta.init(3, n=2).items():
        assert value.dtype == fresh[leaf].dtype, leaf
        assert torch.equal(value, fresh[leaf]), leaf


class Draws(threading.Thread):
    """Another thread of the process, which draws from torch's generator all the time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ends = threading.Event()
        self.drawn: list[float] = []

    def run(self) -> None:
        while not self.ends.is_set():
            self.drawn.append(float(torch.rand((), dtype=torch.float64)))

    def __enter__(self) -> Draws:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ends.set()
        self.join()


@pytest.mark.parametrize("name", [name for name in AROUND if name != "zoo_t5"])
def test_first_calls_neither_heed_nor_rewind_another_threads_draws(name: str) -> None:
    compute(name)
    models = [EVERY[name].build() for _ in range(3)]
    index = [2, -1, 0, 2]
    expected = original(name).right_rows(original(name).batch(), index)
    with torch.no_grad(), Draws() as draws:
        for model in models:
            case = Case(name, model)
            for step in ONE_OF_EACH:
                if step.way != "rows":
                    take(case, step)
            found = number_or_refusal(lambda c=case: c.rows(c.batch(), index), "routes" in case.hard.flags)
            if not isinstance(found, str):
                assert_one_of(case.hard, found, expected, "rows")
    assert len(draws.drawn) > 50
    assert len(set(draws.drawn)) == len(draws.drawn), "torch's generator was rewound under another thread"
