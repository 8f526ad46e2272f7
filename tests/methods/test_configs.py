"""Configs and auto classes: every field, every place that a config may come from, the hub, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import FakeHub
from handmade import MLP, raises_saying, random_params
from opendelta_saved import SAVED, saved_backbone
from torch import nn

import funcdelta as fd
from funcdelta.methods.config import METHODS

OWN = [(name, kind) for name, kind in METHODS.items() if kind.__module__.startswith("funcdelta.")]
OF_OPENDELTA = (
    "modified_modules",
    "exclude_modules",
    "unfrozen_modules",
    "common_structure",
    "backbone_class",
    "backbone_checkpoint_name",
    "backbone_hash",
)


@pytest.fixture
def delta() -> fd.DeltaModel:
    return fd.LoraModel(MLP().eval(), lora_r=2, modified_modules=["a", "b"], unfrozen_modules=["deltas", "head"])


@pytest.fixture
def saved(delta: fd.DeltaModel, tmp_path: Path) -> Path:
    return delta.save_finetuned(random_params(delta), tmp_path / "run")


# --- fields and dicts ------------------------------------------------------------------------------


@pytest.mark.parametrize(("delta_type", "kind"), OWN)
def test_every_field_goes_to_a_dict_and_back(delta_type: str, kind: type[fd.BaseDeltaConfig]) -> None:
    given: dict[str, Any] = {name: ["x"] for name in OF_OPENDELTA[:2]} | {"unfrozen_modules": ["deltas", "x"]}
    given |= {"common_structure": True, "backbone_class": "A", "backbone_checkpoint_name": "B", "backbone_hash": "C"}
    config = kind(**given)
    data = json.loads(json.dumps(config.to_dict()))
    assert data["delta_type"] == delta_type == config.delta_type
    assert data.keys() == {"delta_type", *(field.name for field in dataclasses.fields(kind))}
    assert {name: data[name] for name in given} == given
    for back in (kind.from_dict(data), fd.AutoDeltaConfig.from_dict(data), config.replace()):
        assert back == config
        assert hash(back) == hash(config)
    assert fd.AutoDeltaConfig.from_dict(data, backbone_class="D") == config.replace(backbone_class="D")
    changed = config.to_diff_dict()
    assert changed.keys() == {"delta_type", *given}
    assert fd.AutoDeltaConfig.from_dict(changed) == config
    assert kind().to_diff_dict() == {"delta_type": delta_type}


def test_two_configs_share_no_default() -> None:
    """OpenDelta's default of unfrozen_modules is one list that all configs share."""
    one, other = fd.LoraConfig(), fd.LoraConfig()
    with pytest.raises(AttributeError):
        one.unfrozen_modules.append("head")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.lora_r = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert other.unfrozen_modules == ("deltas",)


def test_left_over_arguments_are_named() -> None:
    with raises_saying(fd.errors.ConfigError, "return_unused_kwargs", "leave it out"):
        fd.AutoDeltaConfig.from_dict({"delta_type": "lora"}, return_unused_kwargs=True)
    for order in ((0, 1), (0, 1, 1)):
        if order != (0, 1):
            with raises_saying(fd.errors.ConfigError, "axis_order=(0, 1, 1)", "(0, 2, 1)"):
                fd.LoraConfig(axis_order=order)
        else:
            assert fd.LoraConfig(axis_order=list(order)).axis_order == order  # pyright: ignore[reportArgumentType]


# --- where a config may come from ------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The url of a server of the test's folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_config_from_a_folder_a_file_and_a_url(saved: Path, site: str, delta: fd.DeltaModel) -> None:
    (saved.parent / "other.json").write_text((saved / "config.json").read_text())
    for place in (saved, str(saved), saved / "config.json", saved.parent / "other.json", f"{site}/run/config.json"):
        for kind in (fd.AutoDeltaConfig, fd.LoraConfig, fd.BaseDeltaConfig):
            config = kind.from_finetuned(place, lora_alpha=4)
            assert type(config) is fd.LoraConfig
            assert config.backbone_class == "MLP"
            assert config.backbone_hash is not None
            assert config.backbone_hash.startswith("fd1:")
            gone = dict.fromkeys(OF_OPENDELTA[4:])
            assert config.replace(**gone) == delta.configs[0].replace(lora_alpha=4)
        with raises_saying(fd.errors.ConfigError, "AdapterConfig", "LoraConfig"):
            fd.AdapterConfig.from_finetuned(place)
        with raises_saying(fd.errors.ConfigError, "lora_rank", "lora_r"):
            fd.AutoDeltaConfig.from_finetuned(place, lora_rank=4)


def test_urls_that_give_no_config(saved: Path, site: str, delta: fd.DeltaModel) -> None:
    read = fd.AutoDeltaConfig.from_finetuned
    with raises_saying(fd.errors.CheckpointError, f"{site}/nothing.json", "404"):
        read(f"{site}/nothing.json")
    (saved.parent / "page.html").write_text("<html>")
    with raises_saying(fd.errors.CheckpointError, f"{site}/page.html", "not JSON"):
        read(f"{site}/page.html")
    (saved.parent / "long.json").write_bytes(b" " * ((1 << 20) + 1))
    with raises_saying(fd.errors.CheckpointError, f"{site}/long.json", "1048576 bytes"):
        read(f"{site}/long.json")
    with raises_saying(fd.errors.CheckpointError, "local_files_only=True", "give a file"):
        read(f"{site}/run/config.json", local_files_only=True)
    with raises_saying(fd.errors.CheckpointError, "only a config can be read from a url", "hub id"):
        fd.AutoDeltaModel.from_finetuned(f"{site}/run", backbone_model=delta.backbone)


def test_files_that_hold_no_config(tmp_path: Path) -> None:
    for text, piece in (("{", "not JSON"), ("[]", "delta_type"), ('{"lora_r": 2}', "delta_type")):
        (tmp_path / "config.json").write_text(text)
        for place in (tmp_path, tmp_path / "config.json"):
            with raises_saying(fd.errors.CheckpointError, str(tmp_path / "config.json"), piece):
                fd.AutoDeltaConfig.from_finetuned(place)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with raises_saying(fd.errors.CheckpointError, "is not a text file"):
        fd.AutoDeltaConfig.from_finetuned(tmp_path)
    (tmp_path / "config.json").unlink()
    with raises_saying(fd.errors.CheckpointError, "has no config.json", "found nothing"):
        fd.AutoDeltaConfig.from_finetuned(tmp_path)


@pytest.mark.parametrize("name", SAVED)
def test_configs_of_opendelta_mean_the_sites_that_they_meant(name: str, opendelta_fixtures: Path) -> None:
    """The config alone, without its tensors: the delta has the leaves of the one that is loaded with them."""
    backbone, _ = saved_backbone(opendelta_fixtures / name)
    seen = set()
    for folder in sorted((opendelta_fixtures / name).iterdir()):
        if not (folder / "config.json").exists() or folder.name not in METHODS:
            continue
        config = fd.AutoDeltaConfig.from_finetuned(folder)
        assert config.backbone_hash is not None
        assert len(config.backbone_hash) == 32
        delta = fd.AutoDeltaModel.from_config(config, backbone_model=backbone)
        loaded = set(fd.load_opendelta(folder, backbone)[0].sites)
        # OpenDelta's BitFit created the offsets of some norms too late to save them.
        assert set(delta.sites) == loaded or (config.delta_type == "bitfit" and set(delta.sites) > loaded)
        seen.add(config.delta_type)
    assert {"lora", "adapter"} & seen


# --- deltas from configs ---------------------------------------------------------------------------


def test_check_hash_of_a_config(saved: Path, delta: fd.DeltaModel) -> None:
    config = fd.AutoDeltaConfig.from_finetuned(saved)
    assert fd.AutoDeltaModel.from_config(config, backbone_model=delta.backbone).names == delta.names
    torch.manual_seed(1)
    other = MLP().eval()
    for kind in (fd.AutoDeltaModel, fd.LoraModel):
        for given in (config, config.to_dict()):
            with raises_saying(
                fd.errors.CheckpointError, "The config was saved for another backbone", "check_hash=False"
            ):
                kind.from_config(given, backbone_model=other)
            assert kind.from_config(given, backbone_model=other, check_hash=False).names == delta.names
    head = MLP().eval()
    head.load_state_dict(delta.backbone.state_dict() | {"head.weight": torch.zeros(3, 8)})
    fd.AutoDeltaModel.from_config(config, backbone_model=head)  # the head is trained: another start is no matter
    # OpenDelta's hash is of the backbone with the trained delta in it: it cannot be compared with anything.
    fd.AutoDeltaModel.from_config(
        config.replace(backbone_hash="0c070f32701da927a0ba78e01760cc1d"), backbone_model=other
    )


def test_arguments_of_loading_a_delta(saved: Path, delta: fd.DeltaModel, tmp_path: Path) -> None:
    load = functools.partial(fd.AutoDeltaModel.from_finetuned, backbone_model=delta.backbone)
    params = load(saved)[1]
    changed, same = load(saved, delta_config=delta.configs[0].replace(lora_alpha=4))
    assert changed.configs[0].lora_alpha == 4
    assert torch.equal(same["a.lora.lora_A"], params["a.lora.lora_A"])
    assert float(same["a.lora.scale"]) == 2.0
    assert load(saved, lora_alpha=4)[0].configs == changed.configs
    # The tensors may come from elsewhere; then the folder needs only a config.
    others = fd.tree.map(lambda leaf: leaf + 1, params)
    fd.AutoDeltaConfig.from_finetuned(saved).save_finetuned(tmp_path / "config")
    for place in (saved, tmp_path / "config", tmp_path / "config" / "config.json"):
        found = load(place, state_dict=others)[1]
        assert list(found) == list(delta.names)
        assert all(torch.equal(found[name], others[name]) for name in others)
    with raises_saying(
        fd.errors.CheckpointError, "1 missing: a.lora.lora_A", "1 not known to the delta: a.lora.lora_a"
    ):
        load(saved, state_dict={name.replace("a.lora.lora_A", "a.lora.lora_a"): leaf for name, leaf in others.items()})
    torch.manual_seed(1)
    with raises_saying(fd.errors.CheckpointError, "another backbone", "check_hash=False"):
        fd.AutoDeltaModel.from_finetuned(saved, MLP().eval(), state_dict=others)
    assert fd.LoraModel.from_finetuned(saved, delta.backbone)[0].names == delta.names
    with raises_saying(fd.errors.ConfigError, "LoraConfig", "fd.AutoDeltaModel.from_finetuned"):
        fd.AdapterModel.from_finetuned(saved, delta.backbone)


# --- the hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub", importlib.import_module("huggingface_hub"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)  # pyright: ignore[reportArgumentType]
    return fake


def test_saving_to_the_hub_and_loading_from_it(delta: fd.DeltaModel, hub: FakeHub, tmp_path: Path) -> None:
    params = random_params(delta)
    delta.save_finetuned(
        params, tmp_path / "run", push_to_hub="me/lora", private=True, token="t", commit_message="first", temp_dir=True
    )
    created, uploaded = hub.calls
    assert created == ("create_repo", {"repo_id": "me/lora", "exist_ok": True, "private": True, "token": "t"})
    assert uploaded[1]["commit_message"] == "first"
    assert (tmp_path / "run" / "delta.safetensors").exists()
    for place in ("me/lora", tmp_path / "run"):
        again, found = fd.AutoDeltaModel.from_finetuned(place, backbone_model=delta.backbone)
        assert again.configs == delta.configs
        assert all(torch.equal(found[name], params[name]) for name in params)
    assert fd.AutoDeltaConfig.from_finetuned("me/lora", lora_alpha=3).to_dict()["lora_alpha"] == 3
    delta.save_finetuned(params, tmp_path / "mine", push_to_hub=True)
    assert fd.LoraModel.from_finetuned("me/mine", delta.backbone)[0].names == delta.names


def test_pushing_keeps_nothing_here(
    delta: fd.DeltaModel, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    stack = random_params(delta, 3)
    assert delta.push_to_hub(stack, "members", private=False, commit_message="three") == "me/members"
    assert not list((tmp_path / "here").iterdir())
    folder = Path(hub.calls[1][1]["folder_path"])
    assert not folder.exists()
    assert sorted(file.name for file in (hub.root / "me/members").iterdir()) == ["config.json", "delta.safetensors"]
    found = fd.AutoDeltaModel.from_finetuned("me/members", delta.backbone)[1]
    assert all(torch.equal(found[name], stack[name]) for name in stack)
    calls = len(hub.calls)
    with raises_saying(
        fd.errors.CheckpointError, "Nothing is saved here, and the hub did not accept it as 'forbidden/x': not"
    ):
        delta.push_to_hub(stack, "forbidden/x")
    with raises_saying(fd.errors.CheckpointError, "'a/b/c' is not the name of a hub repository"):
        delta.push_to_hub(stack, "a/b/c")
    with raises_saying(fd.errors.ParamsError, 'delta.push_to_hub(params, "user/name")'):
        delta.push_to_hub("me/members")  # pyright: ignore[reportArgumentType]
    with raises_saying(fd.errors.ParamsError, "a.lora.lora_A"):
        delta.push_to_hub({}, "me/members")
    assert len(hub.calls) == calls + 1


def test_a_config_alone_to_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    config = fd.AdapterConfig(bottleneck_dim=3)
    config.save_finetuned(tmp_path / "sketch", push_to_hub=True, private=True)
    assert [file.name for file in (hub.root / "me/sketch").iterdir()] == ["config.json"]
    assert fd.AutoDeltaConfig.from_finetuned("me/sketch") == config
    with raises_saying(fd.errors.CheckpointError, "has no delta.safetensors"):
        fd.AutoDeltaModel.from_finetuned("me/sketch", MLP())
    with raises_saying(fd.errors.ConfigError, "takes no push_to_dc"):
        config.save_finetuned(tmp_path / "sketch", push_to_dc=True)


def test_options_of_fetching_reach_the_hub(delta: fd.DeltaModel, hub: FakeHub, tmp_path: Path) -> None:
    delta.push_to_hub(random_params(delta), "me/lora")
    cache = tmp_path / "own cache"
    options: dict[str, Any] = {"cache_dir": cache, "revision": "v1", "token": "t"}

    def load(**more: Any) -> dict[str, torch.Tensor]:
        return fd.AutoDeltaModel.from_finetuned("me/lora", delta.backbone, **options, **more)[1]

    with raises_saying(fd.errors.CheckpointError, "'me/lora' is not a local folder", "not in the cache"):
        load(local_files_only=True)
    first = load()
    assert cache.is_dir()
    delta.push_to_hub(random_params(delta, seed=5), "me/lora")
    assert all(torch.equal(leaf, first[name]) for name, leaf in load(local_files_only=True).items())
    assert any(not torch.equal(leaf, first[name]) for name, leaf in load(force_download=True).items())
    name, given = hub.calls[-1]
    assert name == "snapshot_download"
    assert set(given["allow_patterns"]) >= {"config.json", "delta.safetensors"}
    assert {key: given[key] for key in options} == options
    assert (given["force_download"], given["local_files_only"]) == (True, False)
    fd.AutoDeltaConfig.from_finetuned("me/lora", force_download=True, **options)
    assert hub.calls[-1] == (name, given)


def test_without_the_hubs_package(delta: fd.DeltaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    params = random_params(delta)
    for use in (
        lambda: delta.push_to_hub(params, "me/lora"),
        lambda: delta.save_finetuned(params, tmp_path / "run", push_to_hub="me/lora"),
        lambda: fd.AutoDeltaModel.from_finetuned("me/lora", delta.backbone),
        lambda: fd.AutoDeltaConfig.from_finetuned("me/lora"),
    ):
        with raises_saying(fd.errors.CheckpointError, "me/lora", "pip install huggingface_hub"):
            use()
    assert (tmp_path / "run" / "config.json").exists()


# --- what saving no longer takes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pieces"),
    [
        ({"state_dict": {}}, ("state_dict", "first argument")),
        ({"save_function": torch.save}, ("save_function", "safetensors")),
        ({"save_config": False}, ("save_config", "always written")),
        ({"push_to_dc": True}, ("push_to_dc", 'push_to_hub="user/name"')),
        ({"center_args": {"name": "x"}}, ("center_args", "README.md")),
        ({"center_args_pool": {"name": "x"}}, ("center_args_pool", "README.md")),
        ({"list_tags": ["x"]}, ("list_tags", "README.md")),
        ({"dict_tags": {"x": 1}}, ("dict_tags", "README.md")),
        ({"delay_push": True}, ("delay_push", "delta.push_to_hub(params, repo_id)")),
        ({"test_result": {}}, ("test_result", "README.md")),
        ({"usage": "x"}, ("usage", "README.md")),
    ],
    ids=lambda value: next(iter(value)),
)
def test_an_argument_of_opendelta_is_answered(
    options: dict[str, Any], pieces: tuple[str, ...], delta: fd.DeltaModel, tmp_path: Path
) -> None:
    with raises_saying(fd.errors.ConfigError, *pieces):
        delta.save_finetuned(random_params(delta), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_defaults_of_opendeltas_saving_change_nothing(delta: fd.DeltaModel, tmp_path: Path) -> None:
    dead: dict[str, Any] = {"save_config": True, "state_dict": None, "push_to_dc": False, "center_args": {}}
    dead |= {"center_args_pool": {}, "list_tags": [], "dict_tags": {}, "delay_push": False, "test_result": None}
    delta.save_finetuned(random_params(delta), tmp_path / "run", usage="", push_to_hub=False, temp_dir=False, **dead)
    assert fd.AutoDeltaConfig.from_finetuned(tmp_path / "run").delta_type == "lora"
    with pytest.raises(TypeError, match="nonsense"):
        delta.save_finetuned(random_params(delta), tmp_path / "run", nonsense=1)


# --- verbs -----------------------------------------------------------------------------------------

VERBS = {
    "update_module": ("modified_modules", "@fd.register("),
    "replace_module": ("@fd.register_module(", 'insert="replace"'),
    "modify_module": ("weights(self, site, p, w)",),
    "insert_module": ("@fd.register_module(", 'insert="before"'),
    "insert_sequential_module": ("@fd.register_module(", 'insert="sequential"'),
    "insert_parallel_module": ("@fd.register_module(", 'insert="parallel"'),
    "add_all_delta_to_backbone": ("delta.apply(params",),
    "set_active_state_dict": ("delta.save_finetuned(params, path)",),
    "find_key": ("fd.find_key(key, targets)",),
    "find_module": ("fd.find_module(backbone, key)",),
    "save_checkpoint": ("delta.save_finetuned(params, path)",),
    "load_checkpoint": ("from_finetuned(path",),
    "mark_as_delta": ("delta.names",),
    "create_config_from_model": ("delta.configs",),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_of_opendelta_names_what_says_the_same(verb: str, delta: fd.DeltaModel) -> None:
    with raises_saying(AttributeError, f"has no {verb}", "Write ", *VERBS[verb]):
        getattr(delta, verb)
    assert not hasattr(delta, verb)


def test_counting_lines_that_are_offered_run(delta: fd.DeltaModel) -> None:
    from funcdelta.habits import INSTEAD

    params = delta.init(0)
    names = {"delta": delta, "params": params, "fd": fd, "full": delta.attach(params)}
    trained = eval(INSTEAD["trainable_parameters_names"], dict(names))
    assert set(trained) == {name for name in delta.names if not name.endswith("scale")}
    assert "b.weight" in eval(INSTEAD["frozen_parameters_names"], dict(names))
    count = sum(leaf.numel() for name, leaf in params.items() if name in trained)
    assert eval(INSTEAD["num_trainable_parameters"], dict(names)) == count
    total = sum(p.numel() for p in delta.backbone.parameters()) + count - (8 * 3 + 3)
    assert eval(INSTEAD["num_total_parameters"], dict(names)) == total


def test_what_was_set_for_the_whole_process() -> None:
    with raises_saying(AttributeError, "set_axis_order", "axis_order=(...) in the config"):
        fd.set_axis_order([0, 2, 1])  # pyright: ignore[reportAttributeAccessIssue]
    with raises_saying(AttributeError, "'nonsense'"):
        fd.nonsense  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(fd, "nonsense")


def test_find_key_and_find_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert fd.find_key("layer.0.attention.out_lin", ["0.attention.out_lin"])
    assert not fd.find_key("layer.10.attention.out_lin", ["0.attention.out_lin"])
    parent, name, child = fd.find_module(model, "0.0")
    assert parent is model[0]
    assert (name, child) == ("0", model[0][0])
    with raises_saying(fd.errors.MatchError, "'0.1'", "Sequential"):
        fd.find_module(model, "0.1")
