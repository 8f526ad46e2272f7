"""The command line: one clear line and exit code 2 for a mistake, light imports, commands that reach their place."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_text

from funcdelta.apps import bench, cli
from funcdelta.apps import train as job
from funcdelta.apps.train import Options, loop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and labelled texts."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_text.save_backbone(folder / "bert")
    tiny_text.write_texts(folder / "news.csv", rows=60, header=("body", "topic"))
    return folder


def command(place: Path, *more: str) -> list[str]:
    basis = {"--backbone": place / "bert", "--data": place / "news.csv", "--text": "body", "--label": "topic"}
    words = [str(word) for pair in basis.items() for word in pair]
    few = [
        "--seeds",
        "1",
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--length",
        "12",
        "--threads",
        "1",
        "--sweep",
        "lr=1e-2",
    ]
    return ["train", *words, *few, *more]


def test_a_run_prints_its_table(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "run"
    sweep = ["--sweep", "weight_decay=0,0.1", "--set", "lora_r=2", "--set", "lora_alpha=4"]
    assert cli.main(command(place, "--out", str(out), *sweep)) == 0
    printed = capsys.readouterr()
    for word in ("learning rate", "weight decay", "validation", "test", "NLL", "ECE", "ensemble", "best", "steps/s"):
        assert word in printed.out
    assert "the same validation accuracy for 2 of 2 members" in printed.out
    assert "training 2 members" in printed.err
    assert "4/4" in printed.err
    settings = json.loads((out / "report.json").read_text())["settings"]
    assert settings["set"] == ["lora_r=2", "lora_alpha=4"]
    assert settings["batch_size"] == 4


def test_quiet_prints_nothing(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(place, "--quiet", "--out", str(tmp_path / "run"))) == 0
    assert capfd.readouterr() == ("", "")


def test_the_default_out_folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(place, "--quiet")) == 0
    assert (tmp_path / "funcdelta-run" / "report.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "txt"], "no column 'txt'"),
        (["--delta", "lorra"], "There is no delta type 'lorra'"),
        (["--set", "rank=4"], "LoraConfig has no field 'rank'"),
        (["--set", "modified_modules=qurey"], "qurey"),
        (["--sweep", "lr=fast"], "--sweep lr: given twice"),
        (
            ["--steps", "0"],
            "argument --steps: write a whole number of at least 1, not '0' (see funcdelta train --help)",
        ),
        (["--seeds", "-1"], "write a whole number of at least 1, not '-1'"),
        (["--step-count", "4"], "unrecognized arguments: --step-count 4"),
        (["--data", "none.csv"], "there is no such file"),
        (["--test-data", "none.csv"], "none.csv: there is no such file"),
        (["--backbone", "./none"], "--backbone ./none: no such folder"),
        (["--resume"], "--resume: there is no run in"),
    ],
)
def test_a_mistake_is_one_line(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(command(place, "--out", str(tmp_path / "run"), *words)) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("funcdelta")
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_label_that_was_never_trained(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    test = tmp_path / "test.csv"
    test.write_text("body,topic\nthe cat,animalz\n")
    assert cli.main(command(place, "--out", str(tmp_path / "run"), "--test-data", str(test))) == 2
    error = capfd.readouterr().err
    assert "Unknown label 'animalz' of the test text 'the cat'" in error
    assert "animals" in error
    assert not (tmp_path / "run").exists()


def test_an_existing_folder(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(place, "--out", str(tmp_path))) == 2
    assert "exists: give another --out" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(command(place, "--quiet", "--out", str(tmp_path / "file" / "run"))) == 2
    assert capfd.readouterr().err.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "probabilities", stop)
        assert cli.main(command(place, "--quiet", "--out", str(out))) == 130
    line = capsys.readouterr().err
    assert line == f"funcdelta train: Stopped. Continue with: funcdelta train --out {out} --resume\n"
    assert cli.main(["train", "--quiet", "--out", str(out), "--resume"]) == 0
    assert (out / "report.json").is_file()


def test_ctrl_c_before_anything_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(options: Options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "run", stop)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "funcdelta: stopped.\n"


def test_what_is_left_out_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    monkeypatch.setattr(job, "run", seen.append)
    assert cli.main(["train"]) == 0
    assert cli.main(["train", "--dropout", "--seeds", "2", "--out", "x"]) == 0
    assert seen == [Options(), Options(given={"dropout": True, "seeds": 2}, out=Path("x"))]


def test_bench_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    monkeypatch.setattr(bench, "main", main)
    assert cli.main(["bench", "--quick", "--json", "x"]) == 7
    assert seen == [["--quick", "--json", "x"]]


@pytest.mark.parametrize("words", [[], ["trian"], ["train", "extra"]])
def test_unknown_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_and_light_imports() -> None:
    script = (
        "import sys; from funcdelta.apps import cli; import funcdelta.apps.train; cli.build_parser(); "
        "heavy = {'transformers', 'rich', 'matplotlib', 'peft'} & set(sys.modules); "
        "assert not heavy, heavy; sys.argv[0] = 'funcdelta'; sys.exit(cli.main(['train', '--help']))"
    )
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    for option in ("--backbone", "--data", "--delta", "--set", "--sweep", "--seeds", "--steps", "--out", "--resume"):
        assert option in ended.stdout


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"funcdelta {importlib.metadata.version('funcdelta')}\n"


def test_the_module_is_the_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "funcdelta", "trian"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "invalid choice: 'trian'" in ended.stderr
