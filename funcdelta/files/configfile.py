"""Writes and reads the ``config.json`` of a saved delta, and compares it with the file of tensors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..kinds import check_kind
from .atomic import write_file
from .hub import CONFIG, TENSORS, config_text_at, upload
from .resumable import SAYS_WHAT_IT_IS

__all__ = [
    "check_same_save",
    "config_text",
    "data_at",
    "naming_the_file",
    "newer",
    "parse_config",
    "parts",
    "read_config",
    "save_alone",
    "storable",
    "warn_if_newer",
    "write_config",
]

PROVENANCE = ("backbone_class", "backbone_checkpoint_name", "backbone_hash")
"""Fields of a config that say where it was made, not what it does."""

# Versions describe the file, not the delta; every reader, old or new, has to ignore them.
VERSION_FIELDS = ("transformers_version", "funcdelta_version", "opendelta_version")

_ABOUT_THE_FILE = {"members": "int | None", **dict.fromkeys((*VERSION_FIELDS, *PROVENANCE), "str | None")}
_ABOUT_THE_FILE |= dict.fromkeys(SAYS_WHAT_IT_IS, "str | None")
# The digits without trailing zeros; a suffix (rc1, .dev2, +local) is ignored.
_VERSION = re.compile(r"(\d+(?:\.\d+)*?)(?:\.0+)*(?:[-_.+]?[a-z].*)?")


def funcdelta_version() -> str:
    """The installed version of funcdelta, for saved files.

    >>> funcdelta_version()[0].isdigit()
    True
    """
    return importlib.metadata.version("funcdelta")


def storable(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The ``fields`` of a config of the class ``name`` as JSON returns them, without `PROVENANCE`.

    >>> storable("LoraConfig", fd.LoraConfig(modified_modules=["query"]).to_dict())["modified_modules"]
    ['query']
    """
    if not fields["delta_type"]:
        raise ConfigError(f'{name} could never be loaded again: write @fd.register("a_name") above the class.')
    stored = {key: value for key, value in fields.items() if key not in PROVENANCE}
    for key, value in stored.items():
        try:
            stored[key] = json.loads(json.dumps(value))
        except TypeError as error:
            raise ConfigError(f"{name}.{key}={value!r} cannot be saved as JSON ({error}).") from error
    return stored


def save_alone(
    name: str,
    fields: Mapping[str, Any],
    path: str | os.PathLike[str],
    push_to_hub: bool | str,
    creating: Mapping[str, Any],
) -> Path:
    """Write one config as ``config.json`` to the folder ``path``, and upload it if ``push_to_hub`` says so.

    ``name`` and ``fields`` as for :func:`storable`, the rest as for :meth:`BaseDeltaConfig.save_finetuned`.

    >>> import tempfile
    >>> save_alone("BitFitConfig", fd.BitFitConfig().to_dict(), tempfile.mkdtemp() + "/run", False, {}).name
    'run'
    """
    if unknown := sorted(creating.keys() - {"private", "token", "commit_message"}):
        raise ConfigError(
            f"save_finetuned takes no {unknown[0]}: a config is always written whole, as {CONFIG} in the folder."
        )
    text = config_text([{**storable(name, fields), **{key: fields[key] for key in PROVENANCE}}], {})
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG, text)
    if push_to_hub:
        repository = folder.resolve().name if push_to_hub is True else push_to_hub
        upload(folder, repository, so_far=f"{folder} is saved, but ", **creating)
    return folder


def write_config(file: Path, configs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write :func:`config_text` of the configs to ``file``.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "config.json"
    >>> write_config(file, [{"delta_type": "bitfit"}, {"delta_type": "lora"}], {"members": 3})
    >>> read_config(file)
    {'delta_type': 'union', 'deltas': [{'delta_type': 'bitfit'}, {'delta_type': 'lora'}], 'members': 3}
    """
    file.write_text(config_text(configs, about), encoding="utf-8")


def config_text(configs: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """JSON of one config, or of several as a union, with the facts ``about`` the save; keys are sorted.

    >>> config_text([{"delta_type": "lora"}], {"members": 3})
    '{\\n  "delta_type": "lora",\\n  "members": 3\\n}\\n'
    """
    described = configs[0] if len(configs) == 1 else {"delta_type": "union", "deltas": list(configs)}
    return json.dumps({**described, **about}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_config(file: Path) -> dict[str, Any]:
    """The data of ``config.json``, an object with a ``delta_type``.

    Raises `CheckpointError` for anything else, for facts about the file that have a wrong type and for an invalid
    ``funcdelta_version``. A config's own fields are checked when the config is made.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "config.json"
    >>> write_config(file, [{"delta_type": "lora"}], {"members": None})
    >>> read_config(file)
    {'delta_type': 'lora', 'members': None}
    """
    return parse_config(str(file), file.read_text(encoding="utf-8"))


def parse_config(where: str, text: str) -> dict[str, Any]:
    """As :func:`read_config`, for the ``text`` that was found ``where``.

    >>> parse_config("config.json", '{"delta_type": "lora"}')
    {'delta_type': 'lora'}
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"'{where}' is not JSON: {error}.") from error
    if not isinstance(data, dict) or "delta_type" not in data:
        raise CheckpointError(f"'{where}' does not describe a delta: expected an object with a \"delta_type\".")
    if data["delta_type"] == "union":
        parts = data.get("deltas")
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"'{where}': deltas={parts!r}: write a list of configs, each an object.")
    try:
        for key, kind in _ABOUT_THE_FILE.items():
            check_kind(key, data.get(key), kind)
        newer(data)
    except ConfigError as error:
        raise CheckpointError(f"'{where}': {error}") from error
    return data


def newer(data: Mapping[str, Any]) -> str:
    """A sentence for the end of a message if a newer funcdelta than the installed one wrote ``data``, else ``""``.

    Raises `ConfigError` for an invalid ``funcdelta_version``.

    >>> newer({"funcdelta_version": "999.0"})
    ' It was written by funcdelta 999.0, but ... is installed: pip install --upgrade funcdelta.'
    >>> newer({"funcdelta_version": "0.0.1"}), newer({"delta_type": "lora"})
    ('', '')
    """
    wrote, installed = data.get("funcdelta_version"), funcdelta_version()
    if wrote is None or _release(wrote) <= _release(installed):
        return ""
    return f" It was written by funcdelta {wrote}, but {installed} is installed: pip install --upgrade funcdelta."


def warn_if_newer(where: str, data: Mapping[str, Any]) -> None:
    """Warn if a newer funcdelta than the installed one wrote the ``data`` that were read from ``where``.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn_if_newer("run", {"funcdelta_version": "999.0"})
    >>> print(caught[0].message)
    'run' may have been misread. It was written by funcdelta 999.0, but ... is installed: ...
    """
    if sentence := newer(data):
        warnings.warn(f"'{where}' may have been misread.{sentence}", stacklevel=4)


def data_at(path: str | os.PathLike[str], **fetching: Any) -> tuple[str, dict[str, Any]]:
    """``(where, data)`` of the ``config.json`` at ``path``: a folder, a JSON file, a url to one, or a hub id.

    ``fetching`` as in :func:`funcdelta.files.hub.locate`.

    >>> import tempfile
    >>> data_at(fd.LoraConfig(lora_r=4).save_finetuned(tempfile.mkdtemp()))[1]["lora_r"]
    4
    """
    where, text = config_text_at(path, **fetching)
    return where, parse_config(where, text)


def parts(data: Mapping[str, Any], *, provenance: bool) -> list[dict[str, Any]]:
    """The fields of each config in the data of a ``config.json``, with those of `PROVENANCE` if ``provenance``.

    >>> parts({"delta_type": "lora", "lora_r": 4, "members": 3}, provenance=False)
    [{'delta_type': 'lora', 'lora_r': 4}]
    """
    origin = {key: data.get(key) for key in PROVENANCE} if provenance else {}
    origin |= {key: data[key] for key in ("opendelta_version",) if key in data}
    return [part | origin for part in _described(data)]


@contextlib.contextmanager
def naming_the_file(where: str, data: Mapping[str, Any]) -> Iterator[None]:
    """A block in which an error about the fields in ``data`` becomes a `CheckpointError` that says ``where`` they are.

    >>> with naming_the_file("config.json", {}):
    ...     fd.LoraConfig(lora_r="2")
    Traceback (most recent call last):
    ...
    funcdelta.errors.CheckpointError: 'config.json': lora_r='2': write a whole number. ...
    """
    try:
        yield
    except ConfigError as error:
        hint = "A method of your own must be registered (@fd.register) before its files are loaded."
        raise CheckpointError(f"'{where}': {error} {hint}{newer(data)}") from error


def check_same_save(folder: Path, data: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Raises `CheckpointError` naming the fields in which ``config.json`` and ``delta.safetensors`` disagree."""
    if "configs" not in metadata:  # not written by save, so there is nothing to compare
        return
    here, there = _described(data), json.loads(metadata["configs"])
    lines = [f"{len(here)} configs against {len(there)}"] if len(here) != len(there) else []
    for one, other in zip(here, there, strict=False):
        fields = [key for key in one | other if one.get(key) != other.get(key)]
        lines += [f"{key}: {one.get(key)!r} against {other.get(key)!r}" for key in sorted(fields)]
    members = json.loads(metadata.get("members", "null"))
    if data.get("members") != members:
        lines.append(f"members: {data.get('members')} against {members}")
    if lines:
        raise CheckpointError(
            f"'{folder}': {CONFIG} and {TENSORS} are not from the same save:\n" + "\n".join(lines) + "\nTo change a "
            "field of a saved config, leave the file as it is and pass the field when loading: "
            f"from_finetuned(path, backbone_model=backbone, field=value).{newer(data)}"
        )


def _described(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fields of each config in the data of a ``config.json``, without facts about the file."""
    parts = data.get("deltas", []) if data["delta_type"] == "union" else [data]
    return [{key: value for key, value in part.items() if key not in _ABOUT_THE_FILE} for part in parts]


def _release(version: str) -> list[int]:
    """The numbers of a version, for comparison: ``[0, 1]`` for ``"0.1.0rc1"``."""
    found = _VERSION.fullmatch(version)
    if found is None:
        known = funcdelta_version()
        raise ConfigError(f'funcdelta_version={version!r}: write a version, such as "{known}", or None (null in JSON).')
    return [int(number) for number in found[1].split(".")]
