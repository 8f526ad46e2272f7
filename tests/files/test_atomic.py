"""Atomic writes: whatever happens in the middle, a reader finds the old content or the new, whole."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from funcdelta.files import atomic

OLD = {"config.json": "old config", "delta.bin": "old delta"}
NEW = {"config.json": "new config", "delta.bin": "new delta"}


def writer(content: dict[str, str]):
    def write(folder: Path) -> None:
        for name, text in content.items():
            (folder / name).write_text(text)

    return write


def read(folder: Path) -> dict[str, str]:
    return {entry.name: entry.read_text() for entry in sorted(folder.iterdir()) if entry.is_file()}


def siblings(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.parent.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def swap(request, monkeypatch):
    """Both ways to swap: in one step, and as on systems that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    elif atomic._renameat2() is None:
        pytest.skip("this system cannot exchange two names in one step")
    return request.param


def test_new_folder_with_parents(tmp_path, swap):
    folder = tmp_path / "deep" / "er" / "run"
    assert atomic.replace_folder(folder, writer(NEW)) == folder.resolve()
    assert read(folder) == NEW
    assert siblings(folder) == ["run"]


def test_replaces_the_whole_folder(tmp_path, swap):
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD | {"extra.txt": "x"}))
    atomic.replace_folder(folder, writer(NEW))
    assert read(folder) == NEW
    assert siblings(folder) == ["run"]


def test_exchange_is_used_where_the_system_has_it(tmp_path, monkeypatch):
    if atomic._renameat2() is None:
        pytest.skip("this system cannot exchange two names in one step")
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("renamed although an exchange is possible"))
    atomic.replace_folder(folder, writer(NEW))
    assert read(folder) == NEW


@pytest.mark.parametrize("error", [RuntimeError("writer"), KeyboardInterrupt()])
def test_exception_of_the_writer_leaves_the_old_folder(tmp_path, swap, error):
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))

    def write(temporary: Path) -> None:
        (temporary / "config.json").write_text("half")
        raise error

    with pytest.raises(type(error)):
        atomic.replace_folder(folder, write)
    assert read(folder) == OLD
    assert siblings(folder) == ["run"]


def test_failed_second_rename_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    rename = os.rename

    def failing(source, goal):
        if ".new-" in str(source):
            raise OSError(errno.EIO, "broken disk", str(goal))
        rename(source, goal)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="broken disk"):
        atomic.replace_folder(folder, writer(NEW))
    assert read(folder) == OLD
    assert siblings(folder) == ["run"]


def test_error_of_the_exchange_that_is_not_a_lack_of_it_is_raised(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))
    monkeypatch.setattr(atomic, "_renameat2", lambda: lambda *_: -1)
    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: errno.EACCES)
    with pytest.raises(PermissionError):
        atomic.replace_folder(folder, writer(NEW))
    assert read(folder) == OLD
    monkeypatch.setattr(atomic.ctypes, "get_errno", lambda: errno.EINVAL)
    atomic.replace_folder(folder, writer(NEW))
    assert read(folder) == NEW


# --- kills -----------------------------------------------------------------------------------------

KILLED = """
import importlib.util, os, signal, sys
from pathlib import Path
source, folder, step, exchange = sys.argv[1:]
spec = importlib.util.spec_from_file_location("atomic", source)
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
if exchange == "two renames":
    atomic._renameat2 = lambda: None
left = int(step)

def counted(function):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return function(*args, **kwargs)
    return call

for name in ("rename", "fsync", "rmdir", "unlink", "mkdir", "replace"):
    setattr(os, name, counted(getattr(os, name)))
atomic._exchange = counted(atomic._exchange)

def write(temporary):
    for name in ("config.json", "delta.bin"):
        counted(lambda: None)()
        with open(temporary / name, "w") as file:
            file.write("new ")
            file.flush()
            counted(lambda: None)()
            file.write("config" if name == "config.json" else "delta")

if folder.endswith(".txt"):
    atomic.write_file(folder, "new")
else:
    atomic.replace_folder(folder, write)
print("finished after", int(step) - left)
"""


def run_killed(path: Path, step: int, swap: str) -> bool:
    """Whether the save was killed at its ``step``-th system call (False: it needed fewer)."""
    process = subprocess.run(
        [sys.executable, "-S", "-c", KILLED, atomic.__file__, str(path), str(step), swap],
        check=False,
        capture_output=True,
        text=True,
    )
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    return process.returncode != 0


def test_killed_at_every_step(tmp_path, swap):
    kept_old = took_new = moved_aside = 0
    for step in range(100):
        folder = tmp_path / str(step) / "run"
        atomic.replace_folder(folder, writer(OLD))
        killed = run_killed(folder, step, swap)
        folder_stood = folder.exists()
        moved_aside += not folder_stood
        assert atomic.recover(folder) != folder_stood
        content = read(folder)
        assert content in (OLD, NEW), f"killed at step {step}: {content}"
        kept_old += content == OLD
        took_new += content == NEW
        # The next save works, and clears what the killed one left.
        atomic.replace_folder(folder, writer(NEW | {"step": str(step)}))
        assert read(folder) == NEW | {"step": str(step)}
        assert siblings(folder) == ["run"]
        if not killed:
            break
    else:
        pytest.fail("the save never finished")
    assert kept_old >= 5
    assert took_new >= 2
    assert moved_aside == (0 if swap == "exchange" else 1)


def test_first_save_killed_leaves_nothing_under_the_final_name(tmp_path):
    for step in range(6):
        folder = tmp_path / str(step) / "run"
        assert run_killed(folder, step, "exchange")
        assert not folder.exists()
        assert not atomic.recover(folder)


def test_write_file_killed_at_every_step(tmp_path):
    seen = set()
    for step in range(20):
        path = tmp_path / str(step) / "report.txt"
        atomic.write_file(path, "old")
        killed = run_killed(path, step, "exchange")
        assert path.read_text() in ("old", "new")
        seen.add(path.read_text())
        atomic.write_file(path, "later")
        assert siblings(path) == ["report.txt"]
        if not killed:
            break
    assert seen == {"old", "new"}


# --- the neighbourhood -----------------------------------------------------------------------------


def test_siblings_of_a_live_save_and_of_other_paths_are_left_alone(tmp_path):
    folder = tmp_path / "run"
    other = tmp_path / ".run2.new-0123"
    other.mkdir()
    stale = tmp_path / ".run.new-0123"
    stale.mkdir()
    (stale / "half").write_text("half")

    def slow(temporary: Path) -> None:
        (temporary / "slow.txt").write_text("slow")
        atomic.replace_folder(folder, writer(OLD))
        assert (temporary / "slow.txt").exists()

    atomic.replace_folder(folder, slow)
    assert read(folder) == {"slow.txt": "slow"}
    assert siblings(folder) == [".run2.new-0123", "run"]


def test_many_threads_at_once(tmp_path, swap):
    folder = tmp_path / "run"
    failures: list[BaseException] = []
    started, done = threading.Event(), threading.Event()

    def save(index: int) -> None:
        try:
            for _ in range(5):
                atomic.replace_folder(folder, writer({"a": str(index), "b": str(index)}), carry=True)
                started.set()
        except OSError as error:
            failures.append(error)

    def watch() -> None:
        while not done.is_set():
            # In one step the name is never missing; in two renames a reader may look in between.
            if swap == "exchange" and started.is_set() and not folder.exists():
                failures.append(AssertionError("the folder was missing for a moment"))
            time.sleep(0)

    threads = [threading.Thread(target=save, args=(index,)) for index in range(6)]
    watcher = threading.Thread(target=watch)
    for thread in [watcher, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    watcher.join()
    assert not failures
    content = read(folder)
    assert content["a"] == content["b"]
    assert siblings(folder) == ["run"]


def test_recover_waits_for_a_live_swap(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_renameat2", lambda: None)
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))
    between, recovered = threading.Event(), []
    rename = os.rename

    def slow(source, goal):
        if ".new-" in str(source):
            between.set()
            time.sleep(0.2)
        rename(source, goal)

    def load() -> None:
        between.wait()
        recovered.append(atomic.recover(folder))

    monkeypatch.setattr(os, "rename", slow)
    thread = threading.Thread(target=load)
    thread.start()
    atomic.replace_folder(folder, writer(NEW))
    thread.join()
    assert recovered == [False]
    assert read(folder) == NEW


def test_carry_keeps_what_the_writer_did_not_make(tmp_path, swap):
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD | {"README.md": "mine"}))
    (folder / "logs").mkdir()
    (folder / "logs" / "today").write_text("log")
    (folder / "link").symlink_to("README.md")
    (folder / "lost").symlink_to("nowhere")
    with (folder / "open.log").open("a") as log:
        atomic.replace_folder(folder, writer(NEW), carry=True)
        log.write("still connected")
    assert read(folder) == NEW | {"README.md": "mine", "link": "mine", "open.log": "still connected"}
    assert (folder / "logs" / "today").read_text() == "log"
    assert (folder / "link").is_symlink()
    assert (folder / "lost").is_symlink()


def test_carry_copies_where_hard_links_are_missing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no hard links")

    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD | {"README.md": "mine"}))
    monkeypatch.setattr(os, "link", refuse)
    atomic.replace_folder(folder, writer(NEW), carry=True)
    assert read(folder) == NEW | {"README.md": "mine"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    real, link = tmp_path / "real", tmp_path / "latest"
    atomic.replace_folder(real, writer(OLD))
    link.symlink_to(real)
    atomic.replace_folder(link, writer(NEW))
    assert link.is_symlink()
    assert read(real) == NEW


def test_permissions_are_kept(tmp_path):
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))
    plain = tmp_path / "plain"
    plain.mkdir()
    assert folder.stat().st_mode == plain.stat().st_mode
    folder.chmod(0o750)
    atomic.replace_folder(folder, writer(NEW))
    assert folder.stat().st_mode & 0o777 == 0o750
    path = atomic.write_file(tmp_path / "report.json", "a")
    path.chmod(0o640)
    atomic.write_file(path, "b")
    assert path.stat().st_mode & 0o777 == 0o640


def test_paths_that_cannot_be_swapped(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(NotADirectoryError, match=r"expected a folder.*found a file.*file"):
        atomic.replace_folder(path, writer(NEW))
    inside = tmp_path / "current" / "inside"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for folder in (".", "..", inside, inside.parent):
        with pytest.raises(OSError, match=r"is the current folder or contains it; choose a folder inside it"):
            atomic.replace_folder(folder, writer(NEW))
    with pytest.raises(OSError, match="mount point"):
        atomic.replace_folder("/", writer(NEW))
    atomic.replace_folder("here", writer(NEW))
    assert read(inside / "here") == NEW


def test_file_system_without_locks(tmp_path, monkeypatch, swap):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    folder = tmp_path / "run"
    atomic.replace_folder(folder, writer(OLD))
    atomic.replace_folder(folder, writer(NEW))
    assert read(folder) == NEW
    assert siblings(folder) == ["run"]


def test_write_file_bytes_and_text(tmp_path):
    path = tmp_path / "new" / "file"
    atomic.write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    atomic.write_file(path, "été\n")
    assert path.read_bytes() == "été\n".encode()
    with pytest.raises(IsADirectoryError):
        atomic.write_file(tmp_path / "new", "x")
    assert siblings(path) == ["file"]
