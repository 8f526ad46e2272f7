"""The main job on a tiny backbone: what it writes, that it continues bit for bit, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_text
import torch

import funcdelta as fd
from funcdelta import metrics
from funcdelta.apps.train import InterruptedRunError, Options, Settings, backbones, job, loop, resume, run
from funcdelta.apps.train.errors import JobError
from funcdelta.apps.train.options import parse_fields
from funcdelta.apps.train.plot import plot
from funcdelta.apps.train.report import results
from funcdelta.apps.train.sweep import batches, grid, hyper

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and labelled texts."""
    folder = tmp_path_factory.mktemp("job")
    tiny_text.save_backbone(folder / "bert")
    tiny_text.write_texts(folder / "news.csv")
    return folder


def given(place: Path, **changes: Any) -> dict[str, Any]:
    basis = {
        "backbone": str(place / "bert"),
        "data": str(place / "news.csv"),
        "sweep": ("lr=1e-3,1e-2",),
        "seeds": 2,
        "steps": 12,
        "batch_size": 8,
        "length": 16,
        "threads": 1,
    }
    return basis | changes


def options(place: Path, out: Path, resume: bool = False, save_every: int = 5, **changes: Any) -> Options:
    return Options(given=given(place, **changes), out=out, resume=resume, quiet=True, save_every=save_every)


def comparable(out: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What must not depend on interruptions: the report without its times, and the members' bytes."""
    from safetensors.torch import load_file

    report = json.loads((out / "report.json").read_text())
    del report["speed"]
    tensors = load_file(out / "members" / "delta.safetensors")
    return report, {name: leaf.numpy().tobytes() for name, leaf in tensors.items()}


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    out = place / "finished"
    run(options(place, out))
    return out


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_members_report_and_plot(finished: Path) -> None:
    assert sorted(entry.name for entry in finished.iterdir()) == ["members", "plot.png", "report.json", "run.json"]
    assert (finished / "plot.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((finished / "report.json").read_text())
    assert [(row["member"], row["lr"], row["seed"]) for row in report["members"]] == [
        (0, 1e-3, 0),
        (1, 1e-3, 1),
        (2, 1e-2, 0),
        (3, 1e-2, 1),
    ]
    assert report["reloaded"] == {"same_accuracy": 4, "largest_difference": 0.0}
    assert report["data"]["classes"] == sorted(tiny_text.WORDS)
    assert len(report["losses"]) == 12
    assert all(len(step) == 4 for step in report["losses"])
    assert report["speed"]["steps_timed"] == 12
    assert report["speed"]["steps_per_second"] > 0


def test_the_default_sites_are_in_the_last_two_layers(finished: Path) -> None:
    sites = json.loads((finished / "report.json").read_text())["sites"]
    assert sites == [f"encoder.encoder.layer.{i}.attention.self.{part}" for i in (1, 2) for part in ("query", "value")]


def test_the_saved_members_have_the_reported_figures(place: Path, finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    work = job.prepare(Settings.from_dict(report["settings"]))
    model = backbones.load_model(work.source, classes=3)
    delta, stack = fd.AutoDeltaModel.from_finetuned(finished / "members", backbone_model=model)
    delta = delta.mode(train=False)
    assert fd.members(stack) == 4
    means = []
    for i, row in enumerate(report["members"]):
        member = fd.take(stack, i)
        with torch.no_grad():
            chances = delta.apply(member, **work.inputs["test"]).double().softmax(-1)
        means.append(chances)
        expected = {name: value.item() for name, value in metrics.summary(chances, work.labels["test"]).items()}
        assert row["test"] == pytest.approx(expected, abs=1e-5)
    mean = torch.stack(means).mean(0)
    assert report["ensemble"]["test"]["accuracy"] == metrics.accuracy(mean, work.labels["test"]).item()
    best = max(report["members"], key=lambda row: (row["validation"]["accuracy"], -row["validation"]["nll"]))
    assert report["best"] == best["member"]


def test_a_member_does_not_depend_on_its_neighbours(place: Path, finished: Path, tmp_path: Path) -> None:
    """Members 0 and 2 differ in learning rate alone; trained without the others they are the same members."""
    run(options(place, tmp_path / "alone", sweep=("lr=1e-2",), seeds=1))
    for out in (finished, tmp_path / "alone"):
        assert (out / "members").is_dir()
    model = backbones.load_model(str(place / "bert"), classes=3)
    _, many = fd.AutoDeltaModel.from_finetuned(finished / "members", backbone_model=model)
    _, alone = fd.AutoDeltaModel.from_finetuned(tmp_path / "alone" / "members", backbone_model=model)
    for name, leaf in fd.take(alone, 0).items():
        torch.testing.assert_close(leaf, fd.take(many, 2)[name], rtol=1e-3, atol=1e-5)
    start = job.prepare(Settings(**given(place))).start().stack
    moved = [(fd.take(many, i)["head.weight"] - fd.take(start, i)["head.weight"]).norm() for i in (0, 2)]
    assert moved[1] > 3 * moved[0]


def test_training_learns(place: Path, tmp_path: Path) -> None:
    report = run(options(place, tmp_path / "run", steps=120, sweep=("lr=1e-2",), seeds=2, save_every=200))
    assert all(row["test"]["accuracy"] > 0.7 for row in report["members"])
    assert report["ensemble"]["test"]["accuracy"] > 0.7


@pytest.mark.parametrize(
    ("delta", "assignments"),
    [("adapter", ("bottleneck_dim=4",)), ("bitfit", ()), ("lora", ("modified_modules=[r]query|key",))],
)
def test_other_deltas(place: Path, tmp_path: Path, delta: str, assignments: tuple[str, ...]) -> None:
    report = run(options(place, tmp_path / "run", delta=delta, set=assignments, steps=2, seeds=1))
    assert report["reloaded"]["same_accuracy"] == 2
    layers = {site.split("layer.")[1][0] for site in report["sites"]}
    assert layers == ({"0", "1", "2"} if assignments and delta == "lora" else {"1", "2"})


@pytest.mark.parametrize(
    ("delta", "assignments", "sites"),
    [
        ("parallel_adapter", (), 4),  # widths that only a call tells
        ("prefix", ("prefix_token_num=2", "reparameterize=false"), 2),
        ("soft_prompt", ("soft_token_num=2",), 1),  # in no layer, and with a longer text inside
    ],
)
def test_deltas_that_have_to_see_the_model_run(
    place: Path, tmp_path: Path, delta: str, assignments: tuple[str, ...], sites: int
) -> None:
    report = run(options(place, tmp_path / "run", delta=delta, set=assignments, steps=1, seeds=1))
    assert report["reloaded"]["same_accuracy"] == 2
    assert len(report["sites"]) == sites


def test_layers_and_test_data(place: Path, tmp_path: Path) -> None:
    test = tiny_text.write_texts(tmp_path / "test.csv", rows=30, seed=9)
    report = run(options(place, tmp_path / "run", layers=1, test_data=str(test), steps=2, seeds=1))
    assert all("layer.2." in site for site in report["sites"])
    assert report["data"]["test"] == 30
    assert report["data"]["train"] + report["data"]["validation"] == 150


def test_a_member_that_diverges_is_named_and_left_out(place: Path, tmp_path: Path) -> None:
    report = run(options(place, tmp_path / "run", sweep=("lr=1e-2,1e30",), seeds=1, steps=4))
    assert report["diverged"] == [1]
    assert report["best"] == 0
    assert report["members"][1]["test"]["nll"] is None
    assert report["ensemble"]["test"] == report["members"][0]["test"]
    json.loads((tmp_path / "run" / "report.json").read_text(), parse_constant=pytest.fail)


def test_all_members_diverged(tmp_path: Path) -> None:
    chances = {part: torch.full((2, 3, 2), torch.nan) for part in ("validation", "test")}
    labels = {part: torch.zeros(3, dtype=torch.long) for part in chances}
    found = results(grid(["lr=1"], seeds=2), chances, labels, torch.full((4, 2), torch.nan))
    assert (found["best"], found["ensemble"], found["diverged"]) == (None, None, [0, 1])
    plot(found, tmp_path / "plot.png")


def test_the_threads_of_the_process_are_given_back(place: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    run(options(place, tmp_path / "run", steps=1, seeds=1, threads=before + 1))
    assert torch.get_num_threads() == before


# -- resuming ----------------------------------------------------------------------------------------------------------


def run_until(step: int, asked: Options) -> None:
    """Run a job that is stopped by Ctrl-C right after ``step``."""
    walk = loop.steps

    def stopping(*arguments: Any) -> Iterator[resume.State]:
        for state in walk(*arguments):
            yield state
            if state.step == step:
                raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps", stopping)
        with pytest.raises(InterruptedRunError, match=f"funcdelta train --out {re.escape(str(asked.out))} --resume"):
            run(asked)


@pytest.mark.parametrize("step", [1, 7, 10])
def test_ctrl_c_leaves_a_run_that_continues_bit_for_bit(place: Path, finished: Path, tmp_path: Path, step: int) -> None:
    out = tmp_path / "run"
    run_until(step, options(place, out))
    assert sorted(entry.name for entry in out.iterdir()) == ["run.json", "state.safetensors"]
    run(Options(out=out, resume=True, quiet=True))
    assert comparable(out) == comparable(finished)


def test_ctrl_c_while_evaluating(place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "probabilities", stop)
        with pytest.raises(InterruptedRunError):
            run(options(place, out))
    report = run(Options(out=out, resume=True, quiet=True))
    assert report["speed"]["steps_timed"] == 0
    assert report["speed"]["steps_per_second"] is None
    assert comparable(out) == comparable(finished)


def test_dropout_continues_bit_for_bit(place: Path, tmp_path: Path) -> None:
    changes = {"dropout": True, "set": ("lora_dropout=0.1",), "seeds": 1, "steps": 6}
    run(options(place, tmp_path / "whole", **changes))
    torch.rand(3)
    run_until(3, options(place, tmp_path / "parts", **changes))
    torch.rand(5)
    run(Options(out=tmp_path / "parts", resume=True, quiet=True))
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")
    run(options(place, tmp_path / "without", **changes | {"dropout": False, "set": ()}))
    assert comparable(tmp_path / "without")[1] != comparable(tmp_path / "whole")[1]


KILLED = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from funcdelta.apps.train import Options, resume, run
save = resume.save
def save_and_die(out, described, state):
    save(out, described, state)
    if state.step == 5:
        # Step 8 is never saved: the process is gone.
        os.kill(os.getpid(), 9)
resume.save = save_and_die
run(Options(given={given!r}, out=Path({out!r}), quiet=True, save_every=5))
"""


def test_a_killed_run_continues_bit_for_bit(place: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    script = KILLED.format(root=str(ROOT), given=given(place), out=str(out))
    ended = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    run(Options(out=out, resume=True, quiet=True))
    assert comparable(out) == comparable(finished)


def test_a_finished_run_gives_its_report_again(place: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = comparable(finished)
    report = run(Options(out=finished, resume=True))
    assert report == json.loads((finished / "report.json").read_text())
    assert comparable(finished) == before
    printed = capsys.readouterr()
    assert "has finished" in printed.err
    assert "ensemble" in printed.out


@pytest.fixture(scope="module")
def begun(place: Path) -> Path:
    """A run that was interrupted after step 1."""
    out = place / "begun"
    run_until(1, options(place, out))
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 13}, r"has --steps 12, not 13; leave --steps out"),
        ({"sweep": ("lr=1",)}, r"has --sweep lr=1e-3,1e-2, not lr=1; leave --sweep out"),
        ({"length": 17}, r"has --length 16, not 17"),
    ],
)
def test_a_run_is_not_continued_with_other_settings(
    place: Path, begun: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        run(options(place, begun, resume=True, **changes))


def test_equal_settings_may_be_given_again(place: Path, begun: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    assert len(run(options(place, out, resume=True))["losses"]) == 12


def test_what_changed_since_is_named(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(place / "bert", folder / "bert")
    shutil.copy(place / "news.csv", folder / "news.csv")
    out = folder / "run"
    run_until(1, options(folder, out))
    state = (out / "state.safetensors").read_bytes()
    tiny_text.write_texts(folder / "news.csv", seed=1)
    with pytest.raises(JobError, match=r"the data is not the one that the run in .* began with"):
        run(Options(out=out, resume=True, quiet=True))
    shutil.copy(place / "news.csv", folder / "news.csv")
    shutil.rmtree(folder / "bert")
    tiny_text.save_backbone(folder / "bert", layers=4)
    with pytest.raises(JobError, match=r"the backbone is not the one that the run in .* began with"):
        run(Options(out=out, resume=True, quiet=True))
    assert (out / "state.safetensors").read_bytes() == state


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.safetensors", b"", r"state\.safetensors cannot be read"),
        ("state.safetensors", None, r"state\.safetensors cannot be read"),
        ("run.json", b"{", r"run\.json cannot be read"),
        ("run.json", b"{}", r"run\.json cannot be read"),
        ("run.json", None, r"there is no run in .*; leave --resume out"),
    ],
)
def test_a_damaged_run_is_named(begun: Path, tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    out = Path(shutil.copytree(begun, tmp_path / "run"))
    if content is None:
        (out / file).unlink()
    else:
        (out / file).write_bytes(content)
    with pytest.raises(JobError, match=message):
        run(Options(out=out, resume=True, quiet=True))


def test_a_state_of_another_shape_is_named(tmp_path: Path) -> None:
    described = resume.Run(Settings(), "data", "backbone", {})
    fresh = resume.State(0, {"w": torch.zeros(2, 3)}, {"count": torch.zeros(2)}, torch.zeros(0, 2))
    for other in ({"w": torch.zeros(2, 4)}, {"v": torch.zeros(2, 3)}, {"w": torch.zeros(2, 3, dtype=torch.half)}):
        resume.save(tmp_path / "run", described, resume.State(0, other, fresh.optimizer, fresh.losses))
        with pytest.raises(JobError, match=r"does not fit this run \(first: stack\.[wv]\)"):
            resume.load_state(tmp_path / "run", fresh)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": "lor"}, r"There is no delta type 'lor'\. Near names: lora"),
        ({"set": ("lora_rank=4",)}, r"LoraConfig has no field 'lora_rank'"),
        ({"set": ("lora_r=four",)}, r"--set lora_r=four: expected a whole number, found 'four'"),
        ({"set": ("lora_r=0",)}, r"lora_r=0: write at least 1"),
        ({"set": ("lora_r",)}, r"--set lora_r: write --set name=value"),
        ({"set": ("lora_r=1", "lora_r=2")}, r"--set lora_r: given twice"),
        ({"set": ("batch_dim=1",)}, r"the job fills in this field itself"),
        ({"set": ("lora_dropout=0.1",)}, r"acts only where dropout does: add --dropout"),
        ({"set": ("modified_modules=qurey",)}, r"qurey"),
        ({"sweep": ("rl=1e-3",)}, r"no hyper-parameter 'rl'"),
        ({"sweep": ("lr=1e-3,x",)}, r"expected positive numbers separated by commas, found '1e-3,x'"),
        ({"sweep": ("lr=0",)}, r"expected positive numbers, found 0"),
        ({"sweep": ("lr=1e-3,0.001",)}, r"0\.001 is given twice"),
        ({"sweep": ("lr=1", "lr=2")}, r"--sweep lr: given twice"),
        ({"sweep": ("lr",)}, r"write --sweep name=value,value"),
        ({"steps": 0}, r"--steps 0: write a whole number of at least 1"),
        ({"text": "body"}, r"no column 'body'"),
        ({"label": "topic"}, r"no column 'topic'"),
        ({"data": "no-such.csv"}, r"no-such\.csv: there is no such file"),
        ({"data": None, "test_data": "x.csv"}, r"--test-data needs --data"),
        ({"backbone": "./no-such"}, r"--backbone \./no-such: no such folder"),
        ({"length": 48}, r"--length 48: the backbone takes at most 32 tokens"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_written(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(fd.errors.FuncdeltaError, match=message):
        run(options(place, tmp_path / "run", **changes))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(JobError, match=r"run exists: give another --out, or continue the run in it with --resume"):
        run(options(place, tmp_path / "run"))
    with pytest.raises(JobError, match=r"there is no run in"):
        run(options(place, tmp_path / "run", resume=True))
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("package", ["rich", "tqdm", "matplotlib", "transformers"])
def test_a_missing_package_is_named(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(JobError, match=rf'Not installed: {package}\. Run: pip install "funcdelta\[demo\]"'):
        run(options(place, tmp_path / "run"))


def test_a_folder_that_is_no_backbone(place: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(JobError, match=r"--backbone .*empty cannot be loaded"):
        run(options(place, tmp_path / "run", backbone=str(empty)))
    torn = Path(shutil.copytree(place / "bert", tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes(b"")
    with pytest.raises(JobError, match=r"--backbone .*torn cannot be loaded") as caught:
        run(options(place, tmp_path / "run", backbone=str(torn)))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_something_else_is_named(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(place / "bert", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1." not in name}
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(JobError, match=r"weights are missing \(first: encoder\.layer\.1\."):
        backbones.load_model(str(other), classes=2)


def test_a_checkpoint_without_pooler_loads_the_same_twice(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(place / "bert", tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if "pooler" not in n}, other / "model.safetensors", {"format": "pt"})
    torch.rand(1)
    first, second = (backbones.load_model(str(other), classes=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_the_mean_does_not_see_padding(place: Path) -> None:
    model = backbones.load_model(str(place / "bert"), classes=3)
    short, long = (backbones.load_tokenizer(str(place / "bert"), length)(["the cat and rain"]) for length in (6, 16))
    assert short["attention_mask"].all()
    assert not long["attention_mask"].all()
    torch.testing.assert_close(model(**short), model(**long))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_default_sites_of_other_families(family: str) -> None:
    from transformers import GPT2Config, GPT2Model, T5Config, T5EncoderModel

    encoder: torch.nn.Module
    if family == "gpt2":
        encoder = GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16))
    else:
        encoder = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2))
    encoder.config.use_cache = False
    model = backbones.TextClassifier(encoder, 16, 2)
    delta = job.build_delta(Settings(length=8), model)
    expected = {
        "gpt2": [f"encoder.h.{i}.attn.c_attn" for i in (1, 2)],
        "t5": [f"encoder.encoder.block.{i}.layer.0.SelfAttention.{p}" for i in (1, 2) for p in ("q", "v")],
    }
    assert list(delta.sites) == expected[family]
    ids = torch.randint(50, (5, 8))
    stack = delta.init(0, n=3)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert loop.probabilities(delta, stack, inputs).shape == (3, 5, 2)


def test_last_layers() -> None:
    sites = ["embeddings.word", "h.2.attn.1.q", "h.10.attn.0.q", "h.10.attn.1.q", "head"]
    assert backbones.last_layers(sites, 1) == ["h.10.attn.0.q", "h.10.attn.1.q"]
    assert backbones.last_layers(sites, 5) == sites[1:4]
    assert backbones.last_layers(["head"], 2) == []


def test_values_are_read_as_the_fields_types() -> None:
    def parse(*pairs: str) -> dict[str, Any]:
        return parse_fields(fd.LoraConfig, pairs)

    assert parse("lora_r=4", "lora_alpha=0.5", "use_rslora=true") == {
        "lora_r": 4,
        "lora_alpha": 0.5,
        "use_rslora": True,
    }
    assert parse("enable_lora=true,false,yes") == {"enable_lora": (True, False, True)}
    assert parse("enable_lora=[true, false]", "name=none") == {"enable_lora": (True, False), "name": None}
    assert parse('modified_modules=["[r]a{1,2}", "b"]') == {"modified_modules": ("[r]a{1,2}", "b")}
    assert parse("modified_modules=[r]layer.[01]", "name=a=b") == {
        "modified_modules": ("[r]layer.[01]",),
        "name": "a=b",
    }
    with pytest.raises(JobError, match="expected true or false, or several with commas, found 'maybe'"):
        parse("enable_lora=maybe")


def test_settings_say_what_they_do_not_know() -> None:
    with pytest.raises(JobError, match=r"Unknown setting 'step'\. Near names: steps"):
        Settings.from_dict({"step": 3})


def test_the_grid_is_every_combination() -> None:
    members = grid(["weight_decay=0,0.1", "lr=1e-3,1e-2"], seeds=3)
    assert [member.index for member in members] == list(range(12))
    assert len({(member.lr, member.weight_decay, member.seed) for member in members}) == 12
    assert hyper(members, "weight_decay").tolist() == pytest.approx(([0.0] * 3 + [0.1] * 3) * 2)


def test_batches_depend_on_the_seed_alone() -> None:
    long, short = batches(10, steps=9, batch_size=4, seed=3), batches(10, steps=4, batch_size=4, seed=3)
    assert torch.equal(long[:4], short)
    assert not torch.equal(long, batches(10, 9, 4, seed=4))
    for epoch in long.flatten()[:30].view(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))


@pytest.mark.parametrize("steps", [1, 2, 10, 61])
def test_the_schedule_rises_and_falls(steps: int) -> None:
    rates = loop.schedule(torch.arange(steps), steps).tolist()
    peak = rates.index(max(rates))
    assert rates[peak] == 1
    assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
    assert min(rates) > 0


@pytest.mark.slow
def test_the_default_job_on_real_weights(minilm_path: Path, bbc_path: Path, tmp_path: Path) -> None:
    assert minilm_path.is_dir()
    assert bbc_path.is_dir()
    report = run(Options(given={"seeds": 1}, out=tmp_path / "run", quiet=True))
    assert len(report["members"]) == 3
    assert report["reloaded"]["same_accuracy"] == 3
    assert max(row["test"]["accuracy"] for row in report["members"]) > 0.88
    assert os.path.getsize(tmp_path / "run" / "plot.png") > 10_000
