"""Every delta that the real OpenDelta saved: its logits reproduced, its files written again, its configs taken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from opendelta_saved import SAVED, saved_backbone
from torch import Tensor, nn

import funcdelta as fd

KINDS = ("adapter", "bitfit", "compacter", "lora", "low_rank_adapter", "parallel_adapter", "prefix", "prefix_noreparam")
NOT_MADE = {"gpt2/lora", "opt/parallel_adapter", "opt/prefix", "opt/prefix_noreparam"}  # OpenDelta cannot make these
FOLDERS = [path for name in SAVED for kind in (*KINDS, "soft_prompt") if (path := f"{name}/{kind}") not in NOT_MADE]
BIASED = ("t5/prefix", "t5/prefix_noreparam")


@pytest.fixture
def folder(request: pytest.FixtureRequest, opendelta_fixtures: Path) -> Path:
    return opendelta_fixtures / request.param


on_every_folder = pytest.mark.parametrize("folder", FOLDERS, indirect=True, ids=str)


def compat(folder: Path) -> str | None:
    """What gives OpenDelta's own numbers."""
    return "opendelta" if f"{folder.parent.name}/{folder.name}" in BIASED else None


def logits_of(delta: fd.DeltaModel, params: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return delta.apply(params, **inputs).logits


def expected_of(folder: Path) -> Tensor:
    return torch.load(folder / "expected.pt", weights_only=True)["logits"]


@on_every_folder
def test_recorded_logits(folder: Path) -> None:
    backbone, inputs = saved_backbone(folder.parent)
    delta, params = fd.load_opendelta(folder, backbone, compat=compat(folder))
    torch.testing.assert_close(logits_of(delta, params, inputs), expected_of(folder), rtol=0, atol=1e-5)
    assert delta.configs[0].backbone_hash == json.loads((folder / "config.json").read_text())["backbone_hash"]
    with torch.no_grad():
        bare = backbone(**inputs).logits
    same_length = bare.shape == expected_of(folder).shape
    assert not same_length or float((bare - expected_of(folder)).abs().max()) > 1e-4


@pytest.mark.parametrize("folder", BIASED, indirect=True)
def test_by_default_no_layer_loses_its_position_bias(folder: Path) -> None:
    """test_prefix.py computes such a delta by hand; what matters here is which of the two a checkpoint becomes."""
    backbone, inputs = saved_backbone(folder.parent)
    delta, params = fd.load_opendelta(folder, backbone)
    faithful, _ = fd.load_opendelta(folder, backbone, compat="opendelta")
    kept = fd.DeltaModel(backbone, delta.configs[0].replace(position_bias="kept"))
    assert torch.equal(logits_of(delta, params, inputs), logits_of(kept, params, inputs))
    lost = logits_of(faithful, params, inputs)
    assert float((logits_of(delta, params, inputs) - lost).abs().max()) > 1e-2
    torch.testing.assert_close(lost, expected_of(folder), rtol=0, atol=1e-5)


@on_every_folder
def test_saved_again(folder: Path, tmp_path: Path) -> None:
    """The same keys, shapes, values and fields as the original, and loaded from there the same delta."""
    backbone, _ = saved_backbone(folder.parent)
    delta, params = fd.load_opendelta(folder, backbone)
    again = fd.save_opendelta(delta, params, tmp_path / "again", compat="opendelta")
    assert sorted(file.name for file in again.iterdir()) == ["config.json", "pytorch_model.bin"]
    original = torch.load(folder / "pytorch_model.bin", weights_only=True)
    written = torch.load(again / "pytorch_model.bin", weights_only=True)
    assert type(written) is type(original)
    assert list(written) == list(original)
    for key, tensor in original.items():
        # A bias is the backbone's plus an offset in float32: it may differ in its last bit.
        torch.testing.assert_close(written[key], tensor, rtol=0, atol=1e-8 if folder.name == "bitfit" else 0)
    texts = [(path / "config.json").read_text() for path in (folder, again)]
    installed = json.loads(texts[1])["transformers_version"]
    assert texts[0].replace('"transformers_version": "4.22.2"', f'"transformers_version": "{installed}"') == texts[1]

    loaded, reloaded = fd.load_opendelta(again, backbone)
    assert loaded.configs == delta.configs
    assert list(reloaded) == list(params)
    for name in params:
        torch.testing.assert_close(reloaded[name], params[name], rtol=0, atol=1e-8 if folder.name == "bitfit" else 0)


@on_every_folder
def test_its_config_is_taken_as_it_is(folder: Path) -> None:
    backbone, _ = saved_backbone(folder.parent)
    data = json.loads((folder / "config.json").read_text())
    config = fd.AutoDeltaConfig.from_finetuned(folder)
    assert config.delta_type == data["delta_type"]
    delta = fd.AutoDeltaModel.from_config(data, backbone_model=backbone)
    sites = set(fd.load_opendelta(folder, backbone)[0].sites)
    # OpenDelta left out T5's norms, and has no name for OPT's last one.
    assert sites <= set(delta.sites)
    assert sites == set(delta.sites) or folder.name == "bitfit"


# -- a reader of our files that knows OpenDelta's way alone --------------------------------------------------------


class Patched(nn.Module):
    """The children that OpenDelta would register, with parameters by their names there."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            place: nn.Module = self
            *path, own = name.split(".")
            for token in path:
                if not hasattr(place, token):
                    place.add_module(token, nn.Module())
                place = place.get_submodule(token)
            place.register_parameter(own, nn.Parameter(torch.full(shape, torch.nan)))


def act(data: dict[str, Any], x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh") if data["non_linearity"] == "gelu_new" else torch.relu(x)


def add_lora(data: dict[str, Any], module: nn.Module) -> None:
    r, sizes = data["lora_r"], module.get_parameter("weight").shape
    module.add_module("lora", Patched({"lora_A": (r, sizes[1]), "lora_B": (sizes[0], r)}))

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        a, b = module.get_parameter("lora.lora_A"), module.get_parameter("lora.lora_B")
        return y + (args[0] @ a.T @ b.T) * (data["lora_alpha"] / r)

    module.register_forward_hook(hook)


def add_adapter(data: dict[str, Any], module: nn.Module) -> None:
    d, m = module.get_parameter("weight").shape[0], data["bottleneck_dim"]
    shapes = {"down_proj.weight": (m, d), "down_proj.bias": (m,), "up_proj.weight": (d, m), "up_proj.bias": (d,)}
    module.add_module("adapter", Patched({f"modulelist.{name}": shape for name, shape in shapes.items()}))

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        p = dict(module.get_submodule("adapter.modulelist").named_parameters())
        hidden = act(data, y @ p["down_proj.weight"].T + p["down_proj.bias"])
        return y + hidden @ p["up_proj.weight"].T + p["up_proj.bias"]

    module.register_forward_hook(hook)


def add_low_rank_adapter(data: dict[str, Any], module: nn.Module) -> None:
    d = module.get_parameter("weight").shape[0]
    m = d // data["reduction_factor"]
    shapes = {
        "down_sampler.W_left": (d, 1),
        "down_sampler.W_right": (1, m),
        "down_sampler.b": (m,),
        "up_sampler.W_left": (m, 1),
        "up_sampler.W_right": (1, d),
        "up_sampler.b": (d,),
    }
    module.add_module("low_rank_adapter", Patched(shapes))

    def hook(module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        p = dict(module.get_submodule("low_rank_adapter").named_parameters())
        down = y @ (p["down_sampler.W_left"] * p["down_sampler.W_right"]) + p["down_sampler.b"]
        return y + act(data, down) @ (p["up_sampler.W_left"] * p["up_sampler.W_right"]) + p["up_sampler.b"]

    module.register_forward_hook(hook)


def add_bias(data: dict[str, Any], module: nn.Module) -> None:
    if getattr(module, "bias", None) is None:
        module.register_parameter(
            "bias", nn.Parameter(torch.full((module.get_parameter("weight").shape[0],), torch.nan))
        )


PATCHES = {"lora": add_lora, "adapter": add_adapter, "low_rank_adapter": add_low_rank_adapter, "bitfit": add_bias}


def read_as_opendelta(folder: Path, backbone: nn.Module) -> nn.Module:
    """Patch a copy where the config says, by whole-token suffixes, and load the state dict without strictness."""
    data = json.loads((folder / "config.json").read_text())
    assert data["common_structure"] is False
    patched = copy.deepcopy(backbone)
    for path, module in list(patched.named_modules()):
        if any(path == name or path.endswith(f".{name}") for name in data["modified_modules"]):
            PATCHES[data["delta_type"]](data, module)
    missing, unexpected = patched.load_state_dict(torch.load(folder / "pytorch_model.bin"), strict=False)
    assert not unexpected
    assert not set(missing) & {name for name, p in patched.named_parameters() if p.isnan().any()}
    assert not any(p.isnan().any() for p in patched.parameters())
    return patched


@pytest.mark.parametrize("unfrozen", [(), ("classifier",)], ids=["frozen", "head"])
@pytest.mark.parametrize("method", PATCHES)
def test_written_files_are_read_by_opendeltas_way(method: str, unfrozen: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    backbone = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **sizes)).eval()
    fields = {"low_rank_adapter": {"reduction_factor": 4}, "adapter": {"non_linearity": "relu"}}.get(method, {})
    # A path that is the end of another one has to be told apart.
    config = fd.AutoDeltaConfig.for_type(method)(
        modified_modules=["0.attention.self.value", "1.output.dense"], unfrozen_modules=("deltas", *unfrozen), **fields
    )
    delta = fd.DeltaModel(backbone, config)
    fresh = delta.init(0)
    params = fd.tree.randn_like(fresh, seed=1) | {name: fresh[name] for name in delta.constants}
    folder = fd.save_opendelta(delta, params, tmp_path / "saved")
    ids = torch.randint(20, (2, 5))
    with torch.no_grad():
        found = read_as_opendelta(folder, backbone)(ids).logits
    torch.testing.assert_close(found, logits_of(delta, params, {"input_ids": ids}))
    loaded, again = fd.load_opendelta(folder, backbone)
    assert loaded.plan.trained.keys() == delta.plan.trained.keys()
    assert all(torch.allclose(again[name], params[name], atol=1e-6) for name in delta.names)
