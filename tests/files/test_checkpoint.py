"""Saving and loading: what comes back is what went in, bit for bit, or an error says what is wrong."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd
from funcdelta.errors import CheckpointError, ConfigError, ParamsError
from funcdelta.loading import load
from funcdelta.methods.config import load_configs

save = fd.DeltaModel.save_finetuned


def backbone(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def lora(model: nn.Module, **fields) -> fd.DeltaModel:
    fields = {"lora_r": 2, "modified_modules": ["0", "2"], "unfrozen_modules": ["deltas", "4"]} | fields
    return fd.DeltaModel(model, fd.LoraConfig(**fields))


def noisy(params: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: leaf + torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in params.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Equal in names, their order, dtypes, shapes and every bit."""
    if list(first) != list(second):
        return False
    pairs = [(first[name].detach(), second[name].detach()) for name in first]
    return all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous().reshape(-1).view(torch.uint8).equal(other.contiguous().reshape(-1).view(torch.uint8))
        for one, other in pairs
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved stack of three members on ``backbone()``."""
    delta = lora(backbone())
    return save(delta, noisy(delta.init(0, n=3)), tmp_path / "run")


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change, metadata: dict[str, str] | None = None) -> None:
    """Rewrites the tensors without the checksum, as another tool would."""
    tensors = load_file(folder / "delta.safetensors")
    change(tensors)
    save_file(tensors, folder / "delta.safetensors", metadata)


# --- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("members", [None, 1, 3])
def test_round_trip(tmp_path, members):
    model = backbone()
    delta = lora(model)
    params = noisy(delta.init(0, n=members))
    loaded, back = load(save(delta, params, tmp_path / "run"), model)
    assert same(back, params)
    assert loaded.configs == delta.configs
    assert loaded.names == delta.names
    assert loaded.constants == delta.constants
    assert not any(leaf.requires_grad for leaf in back.values())


@pytest.mark.parametrize("name", ZOO)
def test_round_trip_over_the_zoo(tmp_path, name):
    architecture = ZOO[name]
    model = architecture.build()
    config = fd.LoraConfig(
        lora_r=2, modified_modules=architecture.linears, unfrozen_modules=["deltas", architecture.head]
    )
    delta = fd.DeltaModel(model, config)
    params = noisy(delta.init(0))
    folder = save(delta, params, tmp_path / "run")
    other = architecture.build()
    loaded, back = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=other)
    assert same(back, params)
    inputs = architecture.inputs(2)
    with torch.no_grad():
        expected = architecture.call(functools.partial(delta.apply, params), inputs)
        assert torch.equal(architecture.call(functools.partial(loaded.apply, back), inputs), expected)


def test_several_configs(tmp_path):
    model = backbone()
    configs = (
        fd.LoraConfig(lora_r=2, modified_modules=["0"], name="slow"),
        fd.LoraConfig(lora_r=3, modified_modules=["0", "2"], name="fast"),
        fd.AdapterConfig(bottleneck_dim=2, modified_modules=["2"]),
    )
    delta = fd.DeltaModel(model, *configs)
    params = noisy(delta.init(0, n=2))
    folder = save(delta, params, tmp_path / "run")
    data = json.loads((folder / "config.json").read_text())
    assert data["delta_type"] == "union"
    assert [part["delta_type"] for part in data["deltas"]] == ["lora", "lora", "adapter"]
    loaded, back = load(folder, model)
    assert same(back, params)
    assert loaded.configs == configs


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.bool,
        torch.complex64,
        torch.complex128,
    ],
    ids=str,
)
def test_every_dtype_is_kept(tmp_path, dtype):
    model = backbone()
    delta = lora(model)
    params = {name: (10 * leaf).to(dtype) for name, leaf in noisy(delta.init(0, n=2)).items()}
    _, back = load(save(delta, params, tmp_path / "run"), model)
    assert same(back, params)


def test_every_layout_is_kept(tmp_path):
    model = backbone()
    delta = lora(model)
    one = noisy(delta.init(0))
    shared = {name: leaf.requires_grad_() for name, leaf in one.items()}
    for stack in (fd.broadcast(one, 4), fd.broadcast(shared, 4)):
        _, back = load(save(delta, stack, tmp_path / "run"), model)
        assert same(back, stack)
    first, second = fd.unstack(noisy(delta.init(0, n=2)))  # views of one storage
    for member in (first, second):
        _, back = load(save(delta, member, tmp_path / "run"), model)
        assert same(back, member)
    names = [name for name in delta.names if delta.shapes[name] == (4, 4)]
    transposed = {name: leaf.t().contiguous().t() if leaf.ndim == 2 else leaf for name, leaf in one.items()}
    assert all(not transposed[name].is_contiguous() for name in names)
    _, back = load(save(delta, transposed, tmp_path / "run"), model)
    assert same(back, transposed)


def test_one_tensor_under_two_names(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    delta = fd.DeltaModel(model, fd.LoraConfig(lora_r=2, modified_modules=["0", "1"]))
    params = delta.init(0)
    params |= {name.replace("0.", "1.", 1): leaf for name, leaf in params.items() if name.startswith("0.")}
    _, back = load(save(delta, params, tmp_path / "run"), model)
    assert same(back, params)


def test_special_values_are_kept(tmp_path):
    model = backbone()
    delta = lora(model)
    params = delta.init(0)
    name = delta.names[0]
    params[name] = torch.full_like(params[name], float("nan"))
    params[name].view(-1)[:3] = torch.tensor([-0.0, float("inf"), 1e-45])
    _, back = load(save(delta, params, tmp_path / "run"), model)
    assert same(back, params)


def test_order_of_params_does_not_matter(tmp_path):
    model = backbone()
    delta = lora(model)
    params = noisy(delta.init(0))
    _, back = load(save(delta, dict(reversed(params.items())), tmp_path / "run"), model)
    assert same(back, params)


def test_loaded_tensors_do_not_depend_on_the_file(saved):
    _, back = load(saved, backbone())
    before = {name: leaf.clone() for name, leaf in back.items()}
    size = (saved / "delta.safetensors").stat().st_size
    (saved / "delta.safetensors").write_bytes(b"\xff" * size)
    assert same(back, before)


def test_methods_of_the_delta(tmp_path):
    model = backbone()
    delta = lora(model)
    params = noisy(delta.init(0))
    delta.save_finetuned(params, tmp_path / "run")
    _, back = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=model)
    assert same(back, params)


# --- the files -------------------------------------------------------------------------------------


def test_config_file(saved):
    text = (saved / "config.json").read_text()
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
    expected = {
        "backbone_checkpoint_name": "",
        "backbone_class": "Sequential",
        "delta_type": "lora",
        "lora_r": 2,
        "members": 3,
        "modified_modules": ["0", "2"],
        "unfrozen_modules": ["deltas", "4"],
    }
    assert {key: data[key] for key in expected} == expected
    assert data["backbone_hash"].startswith("fd1:")
    assert {"exclude_modules", "common_structure", "batch_dim", "name"} <= set(data)
    assert {"funcdelta_version", "transformers_version"} <= set(data)
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "delta.safetensors"]


def test_tensors_are_plain_safetensors(saved):
    model = backbone()
    delta = lora(model)
    tensors = load_file(saved / "delta.safetensors")
    assert set(tensors) == set(delta.names)
    assert tensors["0.lora.lora_A"].shape == (3, 2, 4)


def test_checkpoint_name_is_no_place_on_this_machine(tmp_path):
    model = backbone()
    for given, written in (
        ("/models/bert-base", "bert-base"),
        ("user/bert-base", "user/bert-base"),
        ("", ""),
    ):
        object.__setattr__(model, "config", type("Config", (), {"_name_or_path": given})())
        folder = save(lora(model), lora(model).init(0), tmp_path / "run")
        assert json.loads((folder / "config.json").read_text())["backbone_checkpoint_name"] == written


def test_configs_alone(saved):
    (config,) = load_configs(saved)
    assert config.backbone_class == "Sequential"
    assert config.backbone_hash is not None
    assert (
        config.replace(backbone_class=None, backbone_hash=None, backbone_checkpoint_name=None)
        == (lora(backbone()).configs[0])
    )


def test_saving_again_keeps_other_files_and_replaces_ours(saved):
    (saved / "README.md").write_text("mine")
    delta = lora(backbone(), lora_r=1)
    params = noisy(delta.init(1))
    save(delta, params, saved)
    loaded, back = load(saved, backbone())
    assert same(back, params)
    assert loaded.configs[0].lora_r == 1
    assert (saved / "README.md").read_text() == "mine"
    assert sorted(file.name for file in saved.parent.iterdir()) == ["run"]


def test_saving_over_the_folder_that_was_loaded(saved):
    delta, params = load(saved, backbone())
    save(delta, params, saved)
    assert same(load(saved, backbone())[1], params)


def test_saving_leaves_the_backbone_alone(tmp_path):
    model = backbone()
    versions = [parameter._version for parameter in model.parameters()]
    delta = lora(model)
    load(save(delta, delta.init(0), tmp_path / "run"), model)
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(parameter.requires_grad for parameter in model.parameters())


KILLED = """
import os, signal, sys
import funcdelta as fd
from funcdelta.files import atomic, checkpoint
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_checkpoint import backbone, lora

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def killed(when, folder):
    swap = atomic._swap_folders
    if when == "before the tensors":
        checkpoint.write_tensors = kill
    if when == "before the config":
        checkpoint.write_config = kill
    if when == "before the swap":
        atomic._swap_folders = kill
    if when == "after the swap":
        atomic._swap_folders = lambda *names: (swap(*names), kill())
    delta = lora(backbone())
    delta.save_finetuned(delta.init(5), folder)

for when in sys.argv[3:]:
    child = os.fork()
    if not child:
        killed(when, os.path.join(sys.argv[2], when))
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, when
"""


def test_a_killed_save_leaves_the_old_one_whole(tmp_path):
    delta = lora(backbone())
    old, new = noisy(delta.init(0, n=3)), delta.init(5)
    moments = ["before the tensors", "before the config", "before the swap", "after the swap"]
    for when in moments:
        save(delta, old, tmp_path / when)
    here = Path(__file__).parent
    places = f"{here}{os.pathsep}{here.parent / 'zoo'}"
    command = [sys.executable, "-c", KILLED, places, str(tmp_path), *moments]
    subprocess.run(command, check=True)
    assert len(list(tmp_path.iterdir())) == 8  # each kill left its temporary folder beside the final one
    for when in moments:
        assert same(load(tmp_path / when, backbone())[1], new if when == "after the swap" else old)
        save(delta, new, tmp_path / when)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(moments)


# --- what cannot be saved --------------------------------------------------------------------------


def test_params_that_are_not_the_deltas(tmp_path):
    delta = lora(backbone())
    params = delta.init(0)
    lacking = {name: leaf for name, leaf in params.items() if not name.startswith("0.")}
    with pytest.raises(ParamsError, match=r"3 missing: 0\.lora\.lora_A, 0\.lora\.lora_B, 0\.lora\.scale"):
        save(delta, lacking, tmp_path / "run")
    with pytest.raises(ParamsError, match=r"(?s)1 not known to the delta: other.*delta.names"):
        save(delta, params | {"other": torch.ones(1)}, tmp_path / "run")
    bad = params | {"0.lora.lora_A": torch.ones(5, 4)}
    with pytest.raises(ParamsError, match=r"0\.lora\.lora_A \(expected \(2, 4\) or \(n, 2, 4\), found \(5, 4\)\)"):
        save(delta, bad, tmp_path / "run")
    mixed = delta.init(0, n=3) | {"4.bias": params["4.bias"]}
    with pytest.raises(ParamsError, match=r"0\.lora\.lora_A has 3 members, 4\.bias has no member axis"):
        save(delta, mixed, tmp_path / "run")
    with pytest.raises(ParamsError, match=r"delta\.save_finetuned\(params, path\).*found str"):
        save(delta, str(tmp_path), tmp_path / "run")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


def test_leaves_without_values(tmp_path):
    delta = lora(backbone())
    params = delta.init(0)
    name = delta.names[0]
    with pytest.raises(ParamsError, match=rf"'{name}' is on the meta device"):
        save(delta, params | {name: params[name].to("meta")}, tmp_path / "run")

    def inside(leaf: Tensor) -> Tensor:
        save(delta, params | {name: leaf}, tmp_path / "run")
        return leaf

    with pytest.raises(ParamsError, match=rf"The leaf '{name}' is inside a torch\.func transform"):
        torch.vmap(inside)(params[name].expand(2, *params[name].shape))
    assert not list(tmp_path.iterdir())


def test_config_that_json_cannot_hold(tmp_path):
    delta = lora(backbone(), lora_alpha=numpy.float32(3))
    with pytest.raises(ConfigError, match=r"LoraConfig\.lora_alpha=.*3\.0.* cannot be saved as JSON"):
        save(delta, delta.init(0), tmp_path / "run")
    assert not list(tmp_path.iterdir())


# --- what cannot be loaded -------------------------------------------------------------------------


def test_paths_without_a_delta(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"There is no folder"):
        load(tmp_path / "nothing", backbone())
    with pytest.raises(CheckpointError, match=r"is a file: give the folder"):
        load(saved / "config.json", backbone())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json and no delta\.safetensors: .* found nothing"):
        load(tmp_path / "empty", backbone())
    (saved / "config.json").unlink()
    with pytest.raises(
        CheckpointError,
        match=r"has no config\.json: expected .* and delta\.safetensors, found delta\.safetensors",
    ):
        load(saved, backbone())


def test_folders_of_other_libraries(tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"was written by PEFT: write fd\.load_peft\('.*other', backbone_model\)"):
        load(folder, backbone())
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").write_text('{"opendelta_version": "0.3.0"}')
    with pytest.raises(CheckpointError, match=r"was written by OpenDelta: write fd\.load_opendelta\('.*other'"):
        load(folder, backbone())
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"was written by OpenDelta"):
        load(folder, backbone())


def test_opendelta_fixture(opendelta_fixtures):
    with pytest.raises(CheckpointError, match=r"fd\.load_opendelta"):
        load(opendelta_fixtures / "bert" / "lora", backbone())


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_cut_off_tensors(saved, keep):
    file = saved / "delta.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"delta\.safetensors' is damaged or truncated \(\d+ bytes\)"):
        load(saved, backbone())


def test_a_flipped_bit(saved):
    file = saved / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its tensors differ from the checksum"):
        load(saved, backbone())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"delta_type": "lo', r"config\.json' is not JSON"),
        ("[]", r"does not describe a delta: expected an object with a \"delta_type\""),
        ("{}", r"does not describe a delta"),
        ("\ufffd", r"is not JSON"),
    ],
)
def test_damaged_config(saved, text, message):
    (saved / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(saved, backbone())


def test_unknown_method_or_field(saved):
    file = saved / "delta.safetensors"
    edit_tensors(saved, lambda tensors: None)
    content = file.read_bytes()
    edit_config(saved, delta_type="lorra")
    with pytest.raises(CheckpointError, match=r"config\.json.*lorra.*registered"):
        load(saved, backbone())
    edit_config(saved, delta_type="lora", lora_rank=3)
    with pytest.raises(CheckpointError, match=r"config\.json.*lora_rank"):
        load(saved, backbone())
    assert file.read_bytes() == content


def test_newer_format(saved):
    edit_tensors(saved, lambda tensors: None, {"funcdelta_format": "2"})
    with pytest.raises(CheckpointError, match=r"has format 2 of a newer funcdelta; this one reads format 1"):
        load(saved, backbone())


def test_files_of_two_saves(saved):
    edit_config(saved, lora_alpha=32)
    with pytest.raises(CheckpointError, match=r"(?s)not from the same save:\nlora_alpha: 32 against 16\n.* loading"):
        load(saved, backbone())
    edit_config(saved, lora_alpha=16, members=4)
    with pytest.raises(CheckpointError, match=r"members: 4 against 3"):
        load(saved, backbone())
    edit_config(saved, members=3, backbone_checkpoint_name="renamed")
    load(saved, backbone())


def test_tensors_that_do_not_fit_the_config(saved):
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["0.lora.lora_A"], tensors["2.lora.scale"]
        tensors |= {f"extra{i}": torch.ones(1) for i in range(7)}
        tensors["2.lora.lora_A"] = torch.ones(3, 5, 6)

    edit_tensors(saved, change)
    with pytest.raises(CheckpointError) as caught:
        load(saved, backbone())
    assert str(caught.value).splitlines()[1:] == [
        "2 missing: 0.lora.lora_A, 2.lora.scale",
        "7 not known to the delta: extra0, extra1, extra2, extra3, extra4 and 2 more",
        "1 of another shape: 2.lora.lora_A (expected (2, 6) or (n, 2, 6), found (3, 5, 6))",
    ]


def test_members_that_disagree_with_the_config(saved):
    def take_two(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor[:2].clone()

    edit_tensors(saved, take_two)
    with pytest.raises(CheckpointError, match=r"members: config\.json says 3, but the leaves have 2"):
        load(saved, backbone())


# --- the backbone ----------------------------------------------------------------------------------


def test_another_backbone(saved):
    with pytest.raises(CheckpointError) as caught:
        load(saved, backbone(seed=1))
    lines = str(caught.value).splitlines()
    assert "was saved for another backbone" in lines[0]
    assert lines[1].startswith("expected fd1:")
    assert lines[2].startswith("found    fd1:")
    assert lines[3] == "4 tensors with other values: 0.bias, 0.weight, 2.bias and 1 more"
    assert "check_hash=False" in lines[4]
    load(saved, backbone(seed=1), check_hash=False)


def test_a_drawn_anew_head_is_the_same_backbone(saved):
    model = backbone()
    nn.init.normal_(model[4].weight)
    load(saved, model)


def test_another_dtype_and_class(saved):
    with pytest.raises(
        CheckpointError, match=r"4 tensors with another dtype: 0\.bias \(saved float32, found float64\)"
    ):
        load(saved, backbone().double())

    class Net(nn.Sequential):
        pass

    load(saved, Net(*backbone()))
    with pytest.raises(CheckpointError, match=r"its class was Sequential, but this one is a Net"):
        load(saved, Net(*backbone(seed=1)))


def test_saving_without_a_fingerprint(tmp_path):
    delta = lora(backbone())
    folder = save(delta, delta.init(0), tmp_path / "run", hash_backbone=False)
    assert json.loads((folder / "config.json").read_text())["backbone_hash"] is None
    load(folder, backbone(seed=1))


# --- changes on loading ----------------------------------------------------------------------------


def test_overrides(saved):
    plain = load(saved, backbone())[1]
    delta, params = load(saved, backbone(), lora_dropout=0.5)
    assert delta.configs[0].lora_dropout == 0.5
    assert same(params, plain)


def test_an_overridden_alpha_changes_the_scale(saved):
    plain = load(saved, backbone())[1]
    delta, params = load(saved, backbone(), lora_alpha=4)
    assert delta.configs[0].lora_alpha == 4
    for name in delta.names:
        if name in delta.constants:
            assert params[name].tolist() == [2.0, 2.0, 2.0]
        else:
            assert torch.equal(params[name], plain[name])


def test_overrides_that_do_not_fit(saved):
    with pytest.raises(CheckpointError, match=r"0\.lora\.lora_A \(expected \(3, 4\)"):
        load(saved, backbone(), lora_r=3)
    with pytest.raises(ConfigError, match=r"lora_rank"):
        load(saved, backbone(), lora_rank=3)


def test_overrides_of_several_configs(tmp_path):
    model = backbone()
    configs = (
        fd.LoraConfig(lora_r=2, modified_modules=["0"]),
        fd.LoraConfig(lora_r=2, modified_modules=["2"], name="b"),
    )
    delta = fd.DeltaModel(model, *configs)
    folder = save(delta, noisy(delta.init(0)), tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"2 configs, so it is unclear which .* should get the new lora_alpha"):
        load(folder, model, lora_alpha=4)
    loaded, params = load(folder, model, delta_config=[configs[0].replace(lora_alpha=4), configs[1]])
    assert loaded.configs[0].lora_alpha == 4
    assert params["0.lora.scale"].item() == 2
    assert params["2.b.scale"].item() != 2


def test_device(saved):
    _, params = load(saved, backbone(), device="meta")
    assert all(leaf.is_meta for leaf in params.values())


# --- the hub ---------------------------------------------------------------------------------------


class Hub:
    """A stand-in for the package huggingface_hub: one folder of repositories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: dict[str, object] = {}

    def snapshot_download(self, identifier: str, **options) -> str:
        self.asked = options
        if not (self.root / identifier).is_dir():
            raise FileNotFoundError(f"no repository {identifier}\nand more lines")
        return str(self.root / identifier)

    def create_repo(self, identifier: str, **options) -> object:
        self.asked = options
        if identifier.startswith("forbidden/"):
            raise PermissionError("not yours")
        owner = "" if "/" in identifier else "me/"
        (self.root / (owner + identifier)).mkdir(parents=True)
        return type("Made", (), {"repo_id": owner + identifier})()

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], **options) -> None:
        self.asked |= options
        for name in allow_patterns:
            os.link(folder_path / name, self.root / repo_id / name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_to_the_hub_and_back(tmp_path, hub):
    model = backbone()
    delta = lora(model)
    params = noisy(delta.init(0))
    save(
        delta,
        params,
        tmp_path / "run",
        push_to_hub="me/deltas",
        private=True,
        commit_message="first",
        token="secret",
    )
    assert hub.asked == {"exist_ok": True, "private": True, "token": "secret", "commit_message": "first"}
    assert same(load("me/deltas", model)[1], params)
    assert "config.json" in hub.asked["allow_patterns"]  # pyright: ignore[reportOperatorIssue]
    load("me/deltas", model, revision="v1", local_files_only=True)
    assert (hub.asked["revision"], hub.asked["local_files_only"]) == ("v1", True)
    save(delta, params, tmp_path / "run", push_to_hub=True)
    assert same(load("me/run", model)[1], params)


def test_hub_failures(tmp_path, hub):
    model = backbone()
    delta = lora(model)
    with pytest.raises(CheckpointError, match=r"'me/no' is not a local folder, .* failed: no repository me/no$"):
        load("me/no", model)
    with pytest.raises(CheckpointError, match=r"is saved, but the hub did not accept it as 'forbidden/x': not yours"):
        save(delta, delta.init(0), tmp_path / "run", push_to_hub="forbidden/x")
    load(tmp_path / "run", model)
    with pytest.raises(CheckpointError, match=r'is not the name of a hub repository: write "user/name"'):
        save(delta, delta.init(0), tmp_path / "run", push_to_hub="a/b/c")


def test_a_folder_comes_before_the_hub(tmp_path, hub, monkeypatch):
    model = backbone()
    delta = lora(model)
    monkeypatch.chdir(tmp_path)
    save(delta, delta.init(0), "me/deltas")
    load("me/deltas", model)
    assert hub.asked == {}


def test_missing_hub_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs the package huggingface_hub \(pip install huggingface_hub\)"):
        load("me/deltas", backbone())


def test_the_real_hub_package_when_nothing_is_there(tmp_path):
    pytest.importorskip("huggingface_hub")
    with pytest.raises(
        CheckpointError, match=r"'nobody/nothing' is not a local folder, and fetching it from the hub failed"
    ):
        load("nobody/nothing", backbone(), local_files_only=True, cache_dir=tmp_path)
