"""Finds a saved delta: in a folder, or in a repository of the Hugging Face hub, which is downloaded into one.

A config alone may also be a local JSON file or one at a url. ``huggingface_hub`` is imported only when needed.
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

# The first belongs to PEFT; it is fetched so that the error can name the right loader.
_FETCHED = ["adapter_config.json", CONFIG, TENSORS]
_URL = re.compile(r"https?://", re.IGNORECASE)
_LARGEST_CONFIG = 1 << 20
_SECONDS = 30


def locate(path: str | os.PathLike[str], *, needed: Sequence[str] = (CONFIG, TENSORS), **fetching: Any) -> Path:
    """The folder of the delta at ``path``: an existing one, or the download of a hub id ``"user/name"``.

    ``fetching`` goes to `huggingface_hub.snapshot_download`: ``revision``, ``cache_dir``, ``local_files_only`` and so
    on. A folder that a killed save had moved aside is put back first. Raises `CheckpointError` if there is nothing at
    ``path`` or the folder lacks a ``needed`` file; for another library's folder it names the right loader.

    >>> locate("no/such/folder")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: There is no folder 'no/such/folder'.
    """
    folder = fetch_folder(path, _FETCHED, **fetching)
    _check_files(folder, str(path), needed)
    return folder


def fetch_folder(path: str | os.PathLike[str], files: list[str], **fetching: Any) -> Path:
    """The folder at ``path``; if ``path`` is a hub id, a download with its ``files`` and ``config.json``.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> fetch_folder(folder, ["pytorch_model.bin"]) == Path(folder)
    True
    """
    if _URL.match(str(path)):
        raise CheckpointError(
            f"{str(path)!r}: only a config can be read from a url, fd.AutoDeltaConfig.from_finetuned(url); params "
            f"need a folder or a hub id."
        )
    folder = Path(path)
    recover(folder)
    if folder.is_file():
        raise CheckpointError(f"'{path}' is a file: give the folder that holds {CONFIG} and {files[-1]}.")
    if not folder.is_dir():
        if not _is_hub_id(str(path)):
            raise CheckpointError(f"There is no folder '{path}'.")
        folder = _fetch(str(path), files, fetching)
    return folder


def config_text_at(path: str | os.PathLike[str], **fetching: Any) -> tuple[str, str]:
    """``(where, text)`` of the config at ``path``: a folder, a JSON file, a url to one, or a hub id.

    A url is read each time, so ``cache_dir`` and ``force_download`` have no effect there. Raises `CheckpointError` for
    anything that cannot be read, and for a url with ``local_files_only``.

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
        raise CheckpointError(f"'{file}' is not a text file: {error}.") from error


def upload(folder: Path, repository: str, *, so_far: str = "", **creating: Any) -> str:
    """Upload the files of ``folder`` to the hub repository ``"user/name"``, which is created if necessary.

    ``creating`` may have ``private``, ``token`` and ``commit_message``. Returns the repository's full name. Raises
    `CheckpointError` if the package is missing or the hub refuses, with ``so_far`` before the reason; the folder
    stays as it is.

    >>> upload(Path("run"), "a/b/c")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'a/b/c' is not the name of a hub repository: write "user/name".
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
        raise CheckpointError(f"{so_far}the hub did not accept it as {repository!r}: {reason}") from error
    return identifier


def check_repository(repository: str) -> None:
    """Raises `CheckpointError` unless ``repository`` can be the name of a hub repository."""
    if not isinstance(repository, str) or not (_is_hub_id(repository) or re.fullmatch(r"[\w.-]+", repository)):
        raise CheckpointError(f'{repository!r} is not the name of a hub repository: write "user/name".')


def _read_url(url: str, local_files_only: bool) -> str:
    if local_files_only:
        raise CheckpointError(f"{url!r} is a url, but local_files_only=True: give a file or a folder.")
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
        message = f"{identifier!r} is not a local folder, and fetching it from the hub failed: {reason}"
        raise CheckpointError(message) from error


def _hub(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        message = f"{name!r}: the hub needs the package huggingface_hub (pip install huggingface_hub)."
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
    missed, wanted = " and no ".join(missing), " and ".join(needed)
    raise CheckpointError(f"'{path}' has no {missed}: expected {wanted}, found {found}.")


def _names_opendelta(config: Path) -> bool:
    return b'"opendelta_version"' in config.read_bytes()
