"""Where a saved delta lies: a folder, or a repository of the Hugging Face hub that is fetched into one.

A config alone may also be a JSON file, here or at a url. The package ``huggingface_hub`` is imported when it is needed.
"""

from __future__ import annotations

import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .atomic import recover

__all__ = ["config_text_at", "fetch_folder", "locate", "upload"]

CONFIG = "config.json"
TENSORS = "delta.safetensors"

# The first belongs to another library: it is fetched to tell which loader reads the repository.
_FETCHED = ["adapter_config.json", CONFIG, TENSORS]
_URL = re.compile(r"https?://", re.IGNORECASE)
_LARGEST_CONFIG = 1 << 20
_SECONDS = 30


def locate(path: str | os.PathLike[str], *, needed: Sequence[str] = (CONFIG, TENSORS), **fetching: Any) -> Path:
    """The folder of the delta at ``path``: an existing one, or a hub id ``"user/name"`` that is fetched.

    ``fetching`` goes to `huggingface_hub.snapshot_download`: ``revision``, ``cache_dir``,
    ``local_files_only`` and so on. A folder that a killed save had moved aside is put back first. Raises
    `CheckpointError` when there is nothing at ``path``, or a folder without the files ``needed``; it names the
    loader for one that another library wrote.

    >>> locate("no/such/folder")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'no/such/folder': there is no such folder.
    """
    folder = fetch_folder(path, _FETCHED, **fetching)
    _check_files(folder, str(path), needed)
    return folder


def fetch_folder(path: str | os.PathLike[str], files: list[str], **fetching: Any) -> Path:
    """The folder at ``path``, or one with ``files`` and ``config.json`` of the hub id that ``path`` is.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> fetch_folder(folder, ["pytorch_model.bin"]) == Path(folder)
    True
    """
    if _URL.match(str(path)):
        raise CheckpointError(
            f"{str(path)!r}: a url gives a config alone, fd.AutoDeltaConfig.from_finetuned(url); for the params "
            f"write a folder or a hub id."
        )
    folder = Path(path)
    recover(folder)
    if folder.is_file():
        raise CheckpointError(f"'{path}' is a file: give the folder that holds {CONFIG} and {files[-1]}.")
    if not folder.is_dir():
        if not _is_hub_id(str(path)):
            raise CheckpointError(f"'{path}': there is no such folder.")
        folder = _fetch(str(path), files, fetching)
    return folder


def config_text_at(path: str | os.PathLike[str], **fetching: Any) -> tuple[str, str]:
    """``(where, text)`` of the config at ``path``: a folder, a JSON file, a url to one, or a hub id.

    A url is read anew each time, so that ``cache_dir`` and ``force_download`` change nothing there; with
    ``local_files_only`` it raises `CheckpointError`, as does whatever cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "config.json"
    >>> size = file.write_text("{}")
    >>> config_text_at(file.parent)[1], config_text_at(file)[1]
    ('{}', '{}')
    """
    if _URL.match(str(path)):
        return str(path), _read_url(str(path), bool(fetching.get("local_files_only")))
    file = Path(path) if Path(path).is_file() else locate(path, needed=(CONFIG,), **fetching) / CONFIG
    try:
        return str(file), file.read_text(encoding="utf-8")
    except ValueError as error:
        raise CheckpointError(f"'{file}' is no text: {error}.") from error


def upload(folder: Path, repository: str, *, so_far: str = "", **creating: Any) -> str:
    """Puts the files of ``folder`` into the hub repository ``"user/name"``, which is made if it is not there.

    ``creating`` may have ``private``, ``token`` and ``commit_message``. Returns the repository's full name. Raises
    `CheckpointError` if the package is missing or the hub refuses, with ``so_far`` before the reason; the folder
    stays as it is.

    >>> upload(Path("run"), "a/b/c")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'a/b/c' is no name of a hub repository: write "user/name".
    """
    check_repository(repository)
    hub = _hub(repository)
    message = creating.pop("commit_message", None)
    try:
        made = hub.create_repo(repository, exist_ok=True, **creating)
        identifier = str(getattr(made, "repo_id", repository))
        hub.upload_folder(
            repo_id=identifier,
            folder_path=folder,
            allow_patterns=[CONFIG, TENSORS],
            commit_message=message or "Upload a delta",
            token=creating.get("token"),
        )
    except Exception as error:  # the hub's client raises its own errors, its http library's and OSError
        reason = _first_line(error)
        raise CheckpointError(f"{so_far}the hub did not take it as {repository!r}: {reason}") from error
    return identifier


def check_repository(repository: str) -> None:
    """Raises `CheckpointError` unless ``repository`` may be a hub repository's name.

    >>> check_repository("user/name"), check_repository("name")
    (None, None)
    """
    if not isinstance(repository, str) or not (_is_hub_id(repository) or re.fullmatch(r"[\w.-]+", repository)):
        raise CheckpointError(f'{repository!r} is no name of a hub repository: write "user/name".')


def _read_url(url: str, local_files_only: bool) -> str:
    if local_files_only:
        raise CheckpointError(f"{url!r} is not on this machine, and local_files_only=True: give a file or a folder.")
    request = urllib.request.Request(url, headers={"User-Agent": "funcdelta"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as response:
            data = response.read(_LARGEST_CONFIG + 1)
        if len(data) > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG} bytes")
        return data.decode("utf-8")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        raise CheckpointError(f"{url!r} could not be read as the JSON file of a config: {error}.") from error


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


def _check_files(folder: Path, path: str, needed: Sequence[str]) -> None:
    names = {entry.name for entry in folder.iterdir()}
    missing = [name for name in needed if name not in names]
    if not missing:
        return
    if "adapter_config.json" in names:
        raise CheckpointError(f"'{path}' was written by PEFT: write fd.load_peft({path!r}, backbone_model).")
    if "pytorch_model.bin" in names or (CONFIG in names and _names_opendelta(folder / CONFIG)):
        raise CheckpointError(f"'{path}' was written by OpenDelta: write fd.load_opendelta({path!r}, backbone_model).")
    found = ", ".join(sorted(names)[:5]) or "nothing"
    what = "expected both in it" if len(needed) > 1 else "expected it there"
    raise CheckpointError(f"'{path}' has no {' and no '.join(missing)}: {what}, found {found}.")


def _names_opendelta(config: Path) -> bool:
    return b'"opendelta_version"' in config.read_bytes()
