"""Saves that were damaged by hand, or written by a newer funcdelta: loud, with file, key, value and what to write."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from handmade import raises_saying
from safetensors.torch import load_file, save_file
from test_checkpoint import backbone, edit_config, lora

import funcdelta as fd
from funcdelta.files.configfile import PROVENANCE, VERSION_FIELDS, funcdelta_version
from funcdelta.loading import load
from funcdelta.methods.config import load_configs

INSTALLED = funcdelta_version()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    delta = lora(backbone())
    return delta.save_finetuned(delta.init(0, n=3), tmp_path / "run")


def load_config_alone(folder: Path) -> None:
    load_configs(folder)


def load_all(folder: Path) -> None:
    load(folder, backbone())


def load_without_metadata(folder: Path) -> None:
    """The tensors as another tool writes them, so that the config has nothing to be compared with."""
    file = folder / "delta.safetensors"
    save_file(load_file(file), file)
    load(folder, backbone())


@contextmanager
def warns_of_version(version: str) -> Iterator[None]:
    words = f"written by funcdelta {version}, but {INSTALLED} is installed: pip install --upgrade"
    with pytest.warns(UserWarning, match=rf"run.*{re.escape(words)}") as caught:
        yield
    assert len(caught) == 1


LOADERS = pytest.mark.parametrize("loader", [load_all, load_without_metadata, load_config_alone])


# --- values of a wrong type ------------------------------------------------------------------------


@LOADERS
@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": 1}], ids=repr)
@pytest.mark.parametrize("key", [*PROVENANCE, *VERSION_FIELDS])
def test_facts_that_are_no_text(saved: Path, loader: Any, key: str, value: Any) -> None:
    edit_config(saved, **{key: value})
    with raises_saying(
        fd.errors.CheckpointError, "config.json'", f"{key}={value!r}: write a string or None (null in JSON)"
    ):
        loader(saved)


@LOADERS
@pytest.mark.parametrize("value", ["3", 3.0, True, [3]], ids=repr)
def test_members_that_are_no_number(saved: Path, loader: Any, value: Any) -> None:
    edit_config(saved, members=value)
    with raises_saying(fd.errors.CheckpointError, "config.json'", f"members={value!r}: write a whole number or None"):
        loader(saved)


FIELDS = {
    "name": (5, "name=5: write a string or None"),
    "common_structure": ("yes", "common_structure='yes': write True, False or None"),
    "use_rslora": ("no", "use_rslora='no': write True or False"),
    "lora_r": ("2", "lora_r='2': write a whole number"),
    "unfrozen_init": (5, 'unfrozen_init=5: write "copy" or "fresh"'),
    "exclude_modules": ([1], "exclude_modules holds 1; expected names of modules"),
    "delta_type": (5, "There is no delta type 5. There are: "),
}


@pytest.mark.parametrize("loader", [load_without_metadata, load_config_alone])
@pytest.mark.parametrize("key", FIELDS)
def test_fields_of_a_wrong_type(saved: Path, loader: Any, key: str) -> None:
    value, message = FIELDS[key]
    edit_config(saved, **{key: value})
    with raises_saying(fd.errors.CheckpointError, "config.json'", message):
        loader(saved)


@pytest.mark.parametrize("key", FIELDS)
def test_fields_of_a_wrong_type_beside_their_tensors(saved: Path, key: str) -> None:
    edit_config(saved, **{key: FIELDS[key][0]})
    with raises_saying(fd.errors.CheckpointError, "not from the same save", f"{key}: {FIELDS[key][0]!r} against"):
        load_all(saved)


@LOADERS
@pytest.mark.parametrize("parts", [None, 5, "ab", {}, [], [5]], ids=repr)
def test_a_union_of_no_configs(saved: Path, loader: Any, parts: Any) -> None:
    edit_config(saved, delta_type="union", deltas=parts)
    with raises_saying(fd.errors.CheckpointError, "config.json'", f"deltas={parts!r}: write a list of configs"):
        loader(saved)


def test_data_and_fields_from_code() -> None:
    with raises_saying(fd.errors.ConfigError, "LoraConfig has no field 5"):
        fd.AutoDeltaConfig.from_dict({"delta_type": "lora", 5: 1})  # pyright: ignore[reportArgumentType]
    with raises_saying(fd.errors.ConfigError, "There is no delta type ['lora']"):
        fd.AutoDeltaConfig.from_dict({"delta_type": ["lora"]})
    with raises_saying(fd.errors.ConfigError, "backbone_hash=5: write a string or None"):
        fd.LoraConfig(backbone_hash=5)  # pyright: ignore[reportArgumentType]


# --- hashes of an unknown scheme -------------------------------------------------------------------


@pytest.mark.parametrize("value", ["fd9:" + "a" * 64, "fd1", "sha256:ab", "a" * 31, "A" * 32, "a" * 64, ""])
def test_a_hash_that_cannot_be_compared(saved: Path, value: str) -> None:
    edit_config(saved, backbone_hash=value)
    with raises_saying(
        fd.errors.CheckpointError, "run' has", f"backbone_hash={value!r}", "begins with 'fd1:'", "check_hash=False"
    ):
        load_all(saved)
    load(saved, backbone(), check_hash=False)
    config = fd.AutoDeltaConfig.from_finetuned(saved)
    with raises_saying(fd.errors.CheckpointError, "The config has", f"backbone_hash={value!r}", "check_hash=False"):
        fd.AutoDeltaModel.from_config(config, backbone())
    fd.AutoDeltaModel.from_config(config, backbone(), check_hash=False)


@pytest.mark.parametrize("value", [None, "0c070f32701da927a0ba78e01760cc1d"], ids=["none", "OpenDelta's"])
def test_no_hash_and_that_of_opendelta_are_passed_over(saved: Path, value: str | None) -> None:
    edit_config(saved, backbone_hash=value)
    load_all(saved)


# --- a newer funcdelta -----------------------------------------------------------------------------


@LOADERS
@pytest.mark.parametrize("version", ["999", "999.0.0", "999.1rc1", "999.0.dev3+local"])
def test_a_newer_version_warns(saved: Path, loader: Any, version: str) -> None:
    edit_config(saved, funcdelta_version=version)
    with warns_of_version(version):
        loader(saved)


@LOADERS
@pytest.mark.parametrize("version", [None, INSTALLED, INSTALLED + ".0", INSTALLED + "+local", "0", "0.0.99"])
def test_other_versions_are_silent(saved: Path, loader: Any, version: str | None) -> None:
    edit_config(saved, funcdelta_version=version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader(saved)


@pytest.mark.parametrize(
    ("installed", "wrote", "warns"),
    [("0.9.0", "0.10.0", True), ("0.10.0", "0.9", False), ("1.0", "1", False), ("1.0", "1.0.1", True)],
)
def test_versions_compare_by_number(saved: Path, monkeypatch: Any, installed: str, wrote: str, warns: bool) -> None:
    monkeypatch.setattr("funcdelta.files.configfile.funcdelta_version", lambda: installed)
    edit_config(saved, funcdelta_version=wrote)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_all(saved)
    assert bool(caught) == warns


@LOADERS
@pytest.mark.parametrize("version", ["", "x", "newest", "1..2", "0.1 "])
def test_a_version_that_is_none(saved: Path, loader: Any, version: str) -> None:
    edit_config(saved, funcdelta_version=version)
    with raises_saying(
        fd.errors.CheckpointError, "config.json'", f"funcdelta_version={version!r}: write a version, such as"
    ):
        loader(saved)


NEWER = {
    "a field": ({"of_tomorrow": 1}, "of_tomorrow"),
    "a delta type": ({"delta_type": "of_tomorrow"}, "of_tomorrow"),
    "a value": ({"unfrozen_init": "of_tomorrow"}, "of_tomorrow"),
    "members": ({"members": 4}, "members"),
    "a hash": ({"backbone_hash": "fd9:ab"}, "fd9:ab"),
}


@pytest.mark.parametrize("loader", [load_all, load_without_metadata])
@pytest.mark.parametrize("what", NEWER)
def test_errors_of_a_newer_version_say_so_and_do_not_warn(saved: Path, loader: Any, what: str) -> None:
    changes, named = NEWER[what]
    edit_config(saved, funcdelta_version="999.0", **changes)
    with raises_saying(fd.errors.CheckpointError, named, "written by funcdelta 999.0", f"but {INSTALLED} is installed"):
        loader(saved)


def test_errors_of_this_version_do_not_speak_of_versions(saved: Path) -> None:
    edit_config(saved, of_tomorrow=1)
    with pytest.raises(fd.errors.CheckpointError, match="of_tomorrow") as caught:
        load_config_alone(saved)
    assert "pip install" not in str(caught.value)
    assert json.loads((saved / "config.json").read_text())["funcdelta_version"] == INSTALLED
