"""The laws on hard models: every way to call a delta gives what the model gives with the weights written in by hand."""

from __future__ import annotations

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from hard_case import FLAGS
from hard_checks import (
    MEMBERS,
    ROWS,
    THEIR_WARNINGS,
    Case,
    assert_close,
    assert_member,
    assert_one_of,
    ends,
    law,
    number_or_refusal,
    original,
    outcomes,
    right,
    weighted_sum,
    with_leaves,
)
from hard_models import HARD, Batch, written_call
from torch import Tensor

import funcdelta as fd

ENGINES = ("auto", "loop", "fold", "vmap")
ALWAYS = ("auto", "loop")  # these have to give the number, whatever the model does
GENERATED = 4

pytestmark = THEIR_WARNINGS

on_every_model = pytest.mark.parametrize("name", HARD)


def test_there_are_all_kinds() -> None:
    flags = {flag for hard in HARD.values() for flag in hard.flags}
    assert flags == FLAGS.keys()
    assert len(HARD) >= 45


def test_the_unet_is_among_them() -> None:
    pytest.importorskip("diffusers", reason="needs the package diffusers: pip install diffusers")
    assert "unet" in HARD


@on_every_model
@law
def test_the_model_keeps_its_word(name: str) -> None:
    """Builds alike, gives one shape for all seeds of a variant, reacts to its members, and says whether rows mix."""
    case = original(name)
    mixes = False
    for variant in range(case.hard.variants):
        batch, other = case.batch(variant), case.batch(variant, seed=2)
        for key, value in batch.items():
            assert not isinstance(value, Tensor) or value.shape == other[key].shape, key
        if "random" in case.hard.flags:
            assert len(outcomes(name, 0, ROWS, 1, variant)) > 1
            continue
        bare, moved, again = (right(name, member, ROWS, 1, variant) for member in (-1, 0, 1))
        # A fresh copy says the same as one that has been called before, and a second time if nothing is kept.
        assert torch.equal(case.right(0, batch), moved)
        assert bare.isfinite().all()
        assert float((moved - bare).abs().max()) > 1e-2
        assert float((moved - again).abs().max()) > 1e-2
        if case.hard.row is None:
            continue
        alone = torch.cat([case.right(0, case.hard.row(batch, i)) for i in range(ROWS)])
        mixes |= alone.shape != moved.shape or float((alone - moved).abs().max()) > 1e-3
    if not {"random", "mixes"} & case.hard.flags:
        assert not mixes


@on_every_model
@law
def test_apply_is_the_written_copy(name: str) -> None:
    for variant in range(HARD[name].variants):
        case = Case(name)
        batch = case.batch(variant)
        with torch.no_grad():
            for member in (0, 1, -1):
                if "draws" not in case.hard.flags:
                    found = case.hard.output(case.delta.apply(case.params(member), **batch))
                    assert_close(case.hard, found, right(name, member, ROWS, 1, variant), f"variant {variant}")
                    continue
                # With the same draws the same output: the first call does not draw more than the model does.
                torch.manual_seed(5)
                expected = case.hard.output(case.written(member)(**batch))
                after = torch.get_rng_state()
                torch.manual_seed(5)
                assert_close(case.hard, case.hard.output(case.delta.apply(case.params(member), **batch)), expected)
                assert torch.equal(torch.get_rng_state(), after)


@on_every_model
@law
def test_gradients_of_apply_are_those_of_the_written_form(name: str) -> None:
    for variant in ends(name):
        case = Case(name)
        batch = case.batch(variant)
        params, trained = with_leaves(case.delta, case.params(0))
        leaves = list(trained.values())
        torch.manual_seed(5)
        value = written_call(case.hard, case.delta.sites, params, batch)
        expected = torch.autograd.grad(weighted_sum(value), leaves, materialize_grads=True)
        assert any(bool(gradient.any()) for gradient in expected)
        torch.manual_seed(5)
        output = case.hard.output(case.delta.apply(params, **batch))
        found = torch.autograd.grad(weighted_sum(output), leaves, materialize_grads=True)
        assert_close(case.hard, output, value, f"variant {variant}")
        for leaf, one, other in zip(trained, found, expected, strict=True):
            assert_close(case.hard, one, other, f"variant {variant}, gradient of {leaf}", loosen=10)


@on_every_model
@law
def test_merged_is_apply_where_it_can_be_merged(name: str) -> None:
    case = Case(name)
    try:
        merged, state = case.delta.merged(case.params(0)), case.delta.merge(case.params(0))
    except fd.errors.MergeError as error:
        pytest.skip(f"refused by name: {str(error)[:120]}")
    loaded = case.hard.build()
    loaded.load_state_dict(state)
    with torch.no_grad():
        for model in (merged.train(case.model.training), loaded):
            found = case.hard.output(model(**case.batch()))
            assert_member(case, found, 0, ROWS, 1, 0, "merged")


@on_every_model
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "own batches"])
@law
def test_many_are_the_written_copies(name: str, engine: str, shared: bool) -> None:
    for variant in ends(name) if engine == "auto" else ends(name)[-1:]:
        case = Case(name)
        must = engine in ALWAYS or (engine == "fold" and "folds" in case.hard.flags)
        seeds = [1] * MEMBERS if shared else [1, 2, 3]
        batches = [case.batch(variant, seed=seed) for seed in seeds]

        def run(engine: str, case: Case = case, batches: list[Batch] = batches) -> Tensor:
            call = case.many(batches[0], engine=engine) if shared else case.many_own(batches, engine=engine)
            return call.detach()

        with torch.no_grad():
            found = number_or_refusal(lambda run=run: run(engine), must)
        if isinstance(found, str):
            advised = {other for other in ENGINES if f'"{other}"' in found} - {engine}
            assert advised, f"the refusal does not say which engine to use: {found}"
            for other in advised:
                with torch.no_grad():
                    run(other)
            continue
        assert len(found) == MEMBERS
        for member, seed in enumerate(seeds):
            assert_member(case, found[member], member, ROWS, seed, variant, f"variant {variant}, member {member}")


def index_for(case: Case) -> list[int]:
    """The member of each row; where rows mix no member has two, for it is not said whether these would mix."""
    return [2, -1, 0, 1] if "mixes" in case.hard.flags else [2, -1, 0, 2]


@on_every_model
@pytest.mark.parametrize("way", ["rows", "rows_of_view"])
@law
def test_rows_are_the_written_copies(name: str, way: str) -> None:
    for variant in ends(name) if way == "rows" else ends(name)[-1:]:
        case = Case(name)
        batch, index = case.batch(variant), index_for(case)
        with torch.no_grad():
            found = number_or_refusal(
                lambda c=case, b=batch, i=index: getattr(c, way)(b, i),
                "routes" in case.hard.flags,
                (fd.errors.EngineError, fd.errors.ParamsError),
            )
        if isinstance(found, str):
            assert "engine=" not in found, "the advice is for apply_many, and nothing here takes engine="
        elif "random" in case.hard.flags:
            for i, member in enumerate(index):
                allowed = [each[i] for each in outcomes(name, member, ROWS, 1, variant)]
                assert_one_of(case.hard, found[i], allowed, f"variant {variant}, row {i}")
        else:
            assert_one_of(case.hard, found, case.right_rows(batch, index), f"variant {variant}")


@pytest.mark.parametrize("name", [name for name, hard in HARD.items() if not {"mixes", "random"} & hard.flags])
@law
def test_gradients_of_rows_are_those_of_the_written_form(name: str) -> None:
    case = Case(name)
    batch, index = case.batch(HARD[name].variants - 1), index_for(case)
    params, trained = with_leaves(case.delta, case.stack())
    leaves = list(trained.values())
    output = number_or_refusal(
        lambda: case.hard.output(case.delta.apply_rows(params, index, **batch)),
        "routes" in case.hard.flags,
        (fd.errors.EngineError, fd.errors.ParamsError),
    )
    if isinstance(output, str):
        return
    found = torch.autograd.grad(weighted_sum(output), leaves, materialize_grads=True)
    assert case.hard.row is not None
    rows = [
        written_call(
            case.hard, case.delta.sites, fd.take(params, member) if member >= 0 else {}, case.hard.row(batch, i)
        )
        for i, member in enumerate(index)
    ]
    expected = torch.autograd.grad(weighted_sum(torch.cat(rows)), leaves, materialize_grads=True)
    for leaf, one, other in zip(trained, found, expected, strict=True):
        assert_close(case.hard, one, other, f"gradient of {leaf}", loosen=10)


@on_every_model
@law
def test_a_view_is_the_written_copy(name: str) -> None:
    for variant in ends(name):
        case = Case(name)
        view, batch = case.delta.bind(case.params(0)), case.batch(variant)
        assert isinstance(view, type(case.model))
        with torch.no_grad():
            assert_member(case, case.hard.output(view(**batch)), 0, ROWS, 1, variant, f"variant {variant}")
        params, trained = with_leaves(case.delta, case.params(0))
        torch.manual_seed(5)
        value = weighted_sum(written_call(case.hard, case.delta.sites, params, batch))
        expected = torch.autograd.grad(value, list(trained.values()), materialize_grads=True)
        torch.manual_seed(5)
        weighted_sum(case.hard.output(view(**batch))).backward()
        own = dict(view.named_parameters(remove_duplicate=False))
        for (leaf, _), other in zip(trained.items(), expected, strict=True):
            gradient = own[leaf].grad
            found = torch.zeros_like(other) if gradient is None else gradient
            assert_close(case.hard, found, other, f"variant {variant}, gradient of {leaf}", loosen=10)


@pytest.mark.parametrize("name", [name for name, hard in HARD.items() if "generates" in hard.flags])
@pytest.mark.parametrize("routed", [False, True], ids=["bind", "bind_rows"])
@law
def test_decoding_is_that_of_the_written_copy(name: str, routed: bool) -> None:
    case = Case(name)
    batch = case.batch(0, rows=2)
    options = {
        "max_new_tokens": GENERATED,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    index = [1, 0] if routed else [0, 0]
    assert case.hard.row is not None
    try:
        view = case.delta.bind_rows(case.stack(), index) if routed else case.delta.bind(case.params(0))
        found = view.generate(**batch, **options)
    except fd.errors.EngineError:
        assert routed
        return
    for i, member in enumerate(index):
        expected = case.written(member).generate(**case.hard.row(batch, i), **options)
        for step, (one, other) in enumerate(zip(found.logits, expected.logits, strict=True)):
            assert_close(case.hard, one[i], other[0], f"row {i}, step {step}", loosen=10)


@on_every_model
@law
def test_the_backbone_and_torchs_generator_stay_what_they_were(name: str) -> None:
    """Through a build, first calls, later calls, views, gradients and merging, whatever comes of them."""
    hard = HARD[name]
    model = hard.build()
    before = snapshot(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    try:
        case = Case(name, model)
    except fd.errors.MatchError:
        assert "may_refuse" in hard.flags
        assert_unchanged(model, before)
        return
    params, _ = with_leaves(case.delta, case.params(0))
    last = hard.variants - 1
    works = {
        "apply": lambda v: weighted_sum(hard.output(case.delta.apply(params, **case.batch(v)))).backward(),
        "bare": lambda v: case.delta.apply({}, **case.batch(v)),
        "auto": lambda v: case.many(case.batch(v)),
        "own batches": lambda v: case.many_own([case.batch(v, seed=s) for s in (1, 2, 3)]),
        "rows": lambda v: case.rows(case.batch(v), index_for(case)),
        "bind": lambda v: case.delta.bind(case.params(0))(**case.batch(v)),
        "bind_rows": lambda v: case.rows_of_view(case.batch(v), index_for(case)),
        "merged": lambda v: case.delta.merged(case.params(0)),
    }
    for i, (what, work) in enumerate(works.items()):
        try:
            work(last if i % 2 else 0)
        except Exception as error:  # other laws say whether it may raise; nothing may be left behind
            del error
        if not {"training", "draws"} & hard.flags:
            assert torch.equal(torch.get_rng_state(), state), f"{what} touched torch's generator"
        assert_unchanged(model, before)
