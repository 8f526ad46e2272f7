"""Writes files and folders so that a killed save leaves the old content intact.

The new content is written beside its final place, flushed to the disk and then swapped in. On Linux the swap of two
folders is one system call (``renameat2`` with ``RENAME_EXCHANGE``). Elsewhere it is two renames with an ``.old``
sibling, which `recover` puts back if the process was killed between them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV}
_NO_LOCKS = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


def replace_folder(path: str | os.PathLike[str], write: Callable[[Path], None], *, carry: bool = False) -> Path:
    """Replace the folder ``path`` by what ``write`` makes in an empty temporary folder beside it.

    Until ``write`` has returned and its files are on the disk, ``path`` stays as it was; then it is the new folder as
    a whole. If ``write`` raises, the old folder remains; if the process is killed, either the old or the new one does.
    The next save removes what killed saves left behind. With ``carry=True``, files and folders of the old folder that
    ``write`` did not make are kept (as hard links, so that open files stay connected).

    Returns the resolved path: a link to a folder stays a link. Raises `OSError` if ``path`` is a file, a mount point,
    or the current folder or one that contains it, because none of them can be swapped.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> def write(folder):
    ...     _ = (folder / "step.txt").write_text("1")
    >>> _ = replace_folder(folder, write)
    >>> [entry.name for entry in folder.iterdir()]
    ['step.txt']
    """
    final = _resolve(path)
    _check_replaceable(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(final, folder=True) as temporary:
        write(temporary)
        with _locked(final.parent):
            _put_back(final)
            if final.exists():
                if carry:
                    _carry_over(final, temporary)
                shutil.copymode(final, temporary)
            _sync_tree(temporary)
            _swap_folders(temporary, final)
            _sync(final.parent)
    return final


def write_file(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write ``data`` (text as UTF-8) beside ``path`` and rename it, so that a kill leaves the old file intact.

    Returns the resolved path.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "report.json"
    >>> write_file(path, "{}").read_text()
    '{}'
    """
    final = _resolve(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(final, folder=False) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        if final.exists():
            shutil.copymode(final, temporary)
        _sync(temporary)
        os.replace(temporary, final)
        _sync(final.parent)
    return final


def recover(path: str | os.PathLike[str]) -> bool:
    """Put a folder that a killed swap had moved aside back at ``path``; returns whether there was one.

    Needed only if folders cannot be exchanged in one step; loaders call it before they look at ``path``.

    >>> import tempfile
    >>> recover(Path(tempfile.mkdtemp()) / "never saved")
    False
    """
    final = _resolve(path)
    if final.exists() or not _old_sibling(final).exists():
        return False
    # Another process may be between the two renames of its swap. It holds the lock until it has finished.
    with _locked(final.parent):
        return _put_back(final)


def _put_back(final: Path) -> bool:
    old = _old_sibling(final)
    if final.exists() or not old.exists():
        return False
    os.rename(old, final)
    _sync(final.parent)
    return True


def _resolve(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


def _check_replaceable(final: Path) -> None:
    if final.exists() and not final.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "expected a folder to write into, but found a file", str(final))
    current = Path(os.path.realpath(os.curdir))
    if final == current or final in current.parents or os.path.ismount(final):
        reason = "a mount point" if os.path.ismount(final) else "the current folder or contains it"
        message = f"cannot be replaced as a whole because it is {reason}; choose a folder inside it"
        raise OSError(errno.EBUSY, message, str(final))


def _old_sibling(final: Path) -> Path:
    return final.parent / f".{final.name}.old"


@contextmanager
def _temporary(final: Path, *, folder: bool) -> Iterator[Path]:
    """A new empty sibling of ``final``, locked while this process works on it and removed at the end."""
    prefix = f".{final.name}.new-"
    with _locked(final.parent):
        _clear_stale(final, prefix)
        temporary = final.parent / f"{prefix}{uuid.uuid4().hex[:12]}"
        if folder:
            temporary.mkdir()
        else:
            temporary.touch()
        descriptor = _try_lock(temporary)
    try:
        yield temporary
    finally:
        # If it cannot be removed, the next save will remove it; failing here would hide the first error.
        _remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def _clear_stale(final: Path, prefix: str) -> None:
    """Remove what killed saves of ``final`` left, but not the sibling of a running save, which is locked."""
    for entry in list(final.parent.iterdir()):
        if entry.name.startswith(prefix):
            try:
                descriptor = _try_lock(entry)
            except FileNotFoundError:  # its save has just finished
                continue
            if descriptor is not None:
                _remove(entry)
                os.close(descriptor)
    if final.exists():
        _remove(_old_sibling(final))


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _carry_over(source: Path, target: Path) -> None:
    for entry in source.iterdir():
        goal = target / entry.name
        if os.path.lexists(goal):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, goal, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, goal)


def _link_or_copy(source: str | Path, goal: str | Path) -> None:
    try:
        os.link(source, goal, follow_symlinks=False)
    except OSError:
        # Not every file system has hard links; if something else is wrong, the copy raises it.
        shutil.copy2(source, goal, follow_symlinks=False)


def _swap_folders(temporary: Path, final: Path) -> None:
    """Move ``temporary`` to ``final``; the old folder is removed or gets the temporary name."""
    if not final.exists():
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        old = _old_sibling(final)
        os.rename(final, old)
        try:
            os.rename(temporary, final)
        except OSError:
            os.rename(old, final)
            raise
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange the two names in one step; returns False if the system cannot do that."""
    function = _renameat2()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _renameat2() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            entry = Path(root, name)
            if entry.is_file() and not entry.is_symlink():
                _sync(entry)
        _sync(Path(root))


def _sync(entry: Path) -> None:
    if os.name != "posix":  # elsewhere folders cannot be opened to flush them
        return
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(entry: Path) -> int | None:
    """An open descriptor that holds the lock of ``entry``; None if another save holds it."""
    descriptor = os.open(entry if os.name == "posix" else os.devnull, os.O_RDONLY)
    try:
        _lock(descriptor, wait=False)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A block during which other processes and threads that write into ``folder`` with these functions wait."""
    descriptor = os.open(folder if os.name == "posix" else os.devnull, os.O_RDONLY)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> None:
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks; there the user must make sure that each path has one writer.
        if error.errno not in _NO_LOCKS:
            raise
