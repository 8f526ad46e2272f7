"""Several processes give what one gives: members over them, the backbone over them, both; and one of them killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from torch import Tensor

import funcdelta as fd

SCRIPT = Path(worker.__file__)

pytestmark = pytest.mark.slow


def start(*words: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all cases but torchrun's wrote: one process imports everything, and forks."""
    folder = tmp_path_factory.mktemp("processes")
    codes = start(str(SCRIPT), str(folder), "backbone:2", "both:4", "killed:2", "resumed:2")
    (folder / "codes.json").write_text(codes)
    return folder


def results(case: str, world: int, folder: Path) -> list[dict[str, Any]]:
    if (folder / "codes.json").exists():
        codes = json.loads((folder / "codes.json").read_text())[case]
        assert not any(codes), (folder / f"{case}.log").read_text()
    return [torch.load(folder / f"{case}-{rank}.pt", weights_only=False) for rank in range(world)]


def one_process(n: int) -> tuple[dict[str, Tensor], Tensor]:
    return worker.train(fd.DeltaModel(worker.Tiny(), worker.LORA), n, slice(0, n))


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_members_over_two_processes_started_by_torchrun(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    start(*torchrun, str(SCRIPT), str(tmp_path), "members")
    found = results("members", 2, tmp_path)
    stack, losses = one_process(5)
    assert [one["mine"] for one in found] == [slice(0, 3), slice(3, 5)]
    for one in found:
        assert_close(one["stack"], stack)
        assert_close(one["losses"], losses)
        assert one["odd"]["half"].tolist() == [0, 1, 2, 3, 4]
        assert one["odd"]["half"].dtype == torch.bfloat16
        assert one["odd"]["flags"][0].tolist() == [True, False, True, False, True]
        assert one["odd"]["flags"][1] == 7
        assert one["odd"]["pairs"][:, 2].tolist() == [0, 1, 2, 3, 4]
        assert one["odd"]["nothing"].shape == (5, 0)
        assert one["mean"]["w"].tolist() == [0.5, 0.5]
        assert "the leaves of process 1 differ from those of process 0" in one["unlike"]
        assert "start at most 1 processes" in one["few"]


def test_a_backbone_over_two_processes(folder: Path) -> None:
    for one in results("backbone", 2, folder):
        assert one["found"].keys() == one["expected"].keys()
        for key, expected in one["expected"].items():
            torch.testing.assert_close(one["found"][key], expected, rtol=1e-4, atol=1e-6, msg=str(key))
        assert one["unchanged"]
        assert one["shared"]
        own, whole = one["part"]
        assert own < 0.6 * whole
        assert "is a trained leaf of a backbone that is sharded" in one["bind"]
        assert "attention has to run with the member's own tensors, but blocks.0.attention.out_proj" in one["below"]
        assert "Pass the plain backbone" in one["already"]


def test_members_and_backbone_over_four_processes(folder: Path) -> None:
    found = results("both", 4, folder)
    stack, losses = one_process(6)
    assert [(one["mine"].start, one["mine"].stop) for one in found] == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert [one["group"] for one in found] == [slice(0, 3), slice(0, 3), slice(3, 6), slice(3, 6)]
    for one in found:
        assert_close(one["stack"], stack)
        assert_close(one["losses"], losses)


def test_a_killed_process_is_resumed(folder: Path) -> None:
    assert json.loads((folder / "codes.json").read_text())["killed"] == [0, -9]
    delta, run = fd.DeltaModel(worker.Tiny(), worker.LORA), folder / "run"
    stack, _ = one_process(5)
    found = results("resumed", 2, folder)
    assert [one["began"] for one in found] == [4, 2]  # steps that were saved before
    for one in found:
        assert_close(one["stack"], stack)
    joined = fd.distributed.load_shards(delta, run, 5)
    assert_close(joined, stack)
    # One folder is a checkpoint like any other.
    _, part = fd.AutoDeltaModel.from_finetuned(run / "members-3-4", backbone_model=delta.backbone)
    assert all(torch.equal(leaf, joined[name][3:]) for name, leaf in part.items())


def test_parts_are_joined_cut_and_missed(tmp_path: Path) -> None:
    delta = fd.DeltaModel(worker.Tiny(), worker.LORA)
    stack = delta.init(0, n=10)
    for first, stop in ((0, 2), (4, 7)):
        mine = slice(first, stop)
        state = {"step": torch.arange(first, stop)}
        fd.distributed.save_shard(delta, fd.take(stack, mine), tmp_path, mine, state, hash_backbone=False)
    with pytest.raises(fd.errors.CheckpointError, match=r"lacks the members 2 to 3, 7 to 9 of 0 to 9 .*members-4-6"):
        fd.distributed.load_shards(delta, tmp_path, 10)
    part, state = fd.distributed.load_shards(delta, tmp_path, slice(5, 7), like={"step": torch.zeros(1)})
    assert state["step"].tolist() == [5, 6]
    assert all(torch.equal(leaf, stack[name][5:7]) for name, leaf in part.items())
    with pytest.raises(fd.errors.CheckpointError, match="overlaps members-1-4"):
        fd.distributed.save_shard(delta, fd.take(stack, slice(1, 5)), tmp_path, slice(1, 5))
    with pytest.raises(fd.errors.ParamsError, match="has 10 members, but mine"):
        fd.distributed.save_shard(delta, stack, tmp_path, slice(0, 3))
    with pytest.raises(fd.errors.CheckpointError, match="does not fit like="):
        fd.distributed.load_shards(delta, tmp_path, slice(0, 2), like={"count": torch.zeros(1)})
    other = fd.DeltaModel(worker.Tiny(), worker.LORA.replace(lora_r=3))
    with pytest.raises(fd.errors.CheckpointError, match="holds another delta"):
        fd.distributed.load_shards(other, tmp_path, slice(0, 2))


def test_one_process_has_all_members() -> None:
    assert fd.distributed.shard(3) == slice(0, 3)
    tree = {"a": torch.ones(3, 2)}
    assert fd.distributed.gather(tree)["a"] is tree["a"]
    with pytest.raises(fd.errors.StackError):
        fd.distributed.gather({"a": torch.ones(())})
