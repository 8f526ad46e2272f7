"""Where a saved delta lies: a folder, or a repository of the Hugging Face hub that is fetched into one."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .atomic import recover
from .errors import CheckpointError

__all__ = ["fetch_folder", "locate", "upload"]

CONFIG = "config.json"
TENSORS = "delta.safetensors"

# The first belongs to another library: it is fetched to tell which loader reads the repository.
_FETCHED = ["adapter_config.json", CONFIG, TENSORS]


def locate(path: str | os.PathLike[str], **fetching: Any) -> Path:
    """The folder of the delta at ``path``: an existing one, or a hub id ``"user/name"`` that is fetched.

    ``fetching`` goes to `huggingface_hub.snapshot_download`: ``revision``, ``cache_dir``,
    ``local_files_only`` and so on. A folder that a killed save had moved aside is put back first. Raises
    `CheckpointError` when there is nothing at ``path``, or a folder that another library wrote; it names the
    loader for that.

    >>> locate("no/such/folder")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'no/such/folder': there is no such folder.
    """
    folder = fetch_folder(path, _FETCHED, **fetching)
    _check_files(folder, str(path))
    return folder


def fetch_folder(path: str | os.PathLike[str], files: list[str], **fetching: Any) -> Path:
    """The folder at ``path``, or one with ``files`` and ``config.json`` of the hub id that ``path`` is.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> fetch_folder(folder, ["pytorch_model.bin"]) == Path(folder)
    True
    """
    folder = Path(path)
    recover(folder)
    if folder.is_file():
        raise CheckpointError(f"'{path}' is a file: give the folder that holds {CONFIG} and {files[-1]}.")
    if not folder.is_dir():
        if not _is_hub_id(str(path)):
            raise CheckpointError(f"'{path}': there is no such folder.")
        folder = _fetch(str(path), files, fetching)
    return folder


def upload(folder: Path, repository: str, **creating: Any) -> None:
    """Puts the files of ``folder`` into the hub repository ``"user/name"``, which is made if it is not there.

    ``creating`` may have ``private``, ``token`` and ``commit_message``. Raises `CheckpointError` if the
    package is missing or the hub refuses; the folder stays as it is.

    >>> upload(Path("run"), "a/b/c")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'a/b/c' is no name of a hub repository: write "user/name".
    """
    if not _is_hub_id(repository) and not re.fullmatch(r"[\w.-]+", repository):
        raise CheckpointError(f'{repository!r} is no name of a hub repository: write "user/name".')
    hub = _hub(repository)
    message = creating.pop("commit_message", None)
    try:
        made = hub.create_repo(repository, exist_ok=True, **creating)
        hub.upload_folder(
            repo_id=getattr(made, "repo_id", repository),
            folder_path=folder,
            allow_patterns=[CONFIG, TENSORS],
            commit_message=message or "Upload a delta",
            token=creating.get("token"),
        )
    except Exception as error:  # the hub's client raises its own errors, its http library's and OSError
        reason = _first_line(error)
        raise CheckpointError(f"{folder} is saved, but the hub did not take it as {repository!r}: {reason}") from error


def _is_hub_id(path: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) is not None


def _fetch(identifier: str, files: list[str], fetching: dict[str, Any]) -> Path:
    hub = _hub(identifier)
    try:
        return Path(hub.snapshot_download(identifier, allow_patterns=sorted({CONFIG, *files}), **fetching))
    except Exception as error:  # the hub's client raises its own errors, its http library's and OSError
        reason = _first_line(error)
        message = f"{identifier!r} is no folder here, and fetching it from the hub failed: {reason}"
        raise CheckpointError(message) from error


def _hub(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        message = f"{name!r}: using the hub needs the package huggingface_hub (pip install huggingface_hub)."
        raise CheckpointError(message) from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _check_files(folder: Path, path: str) -> None:
    names = {entry.name for entry in folder.iterdir()}
    missing = [name for name in (CONFIG, TENSORS) if name not in names]
    if not missing:
        return
    if "adapter_config.json" in names:
        raise CheckpointError(f"'{path}' was written by PEFT: write fd.load_peft({path!r}, backbone_model).")
    if "pytorch_model.bin" in names or (CONFIG in names and _names_opendelta(folder / CONFIG)):
        raise CheckpointError(f"'{path}' was written by OpenDelta: write fd.load_opendelta({path!r}, backbone_model).")
    found = ", ".join(sorted(names)[:5]) or "nothing"
    raise CheckpointError(f"'{path}' has no {' and no '.join(missing)}: expected both in it, found {found}.")


def _names_opendelta(config: Path) -> bool:
    return b'"opendelta_version"' in config.read_bytes()
