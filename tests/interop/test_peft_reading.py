"""What PEFT trained, read: logits and gradients are PEFT's, and what finds no place is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_made import gradients_here, gradients_of, peft_model, saved
from safetensors.torch import save_file
from torch import Tensor, nn

import funcdelta as fd

peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 5, 2, 7], [3, 3, 0, 9]])


class Scaled(nn.Embedding):
    """A table with a forward of its own, as Gemma's."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Experts(nn.Module):
    """Two tables of experts, (experts, out, in) or, turned, (experts, in, out)."""

    def __init__(self, turned: bool, width: int, inner: int) -> None:
        super().__init__()
        self.is_transposed = turned
        self.up_proj = nn.Parameter(torch.randn(3, *((width, inner) if turned else (inner, width))))
        self.scale = nn.Parameter(torch.ones(3))
        self.down_proj = nn.Parameter(torch.randn(3, *((inner, width) if turned else (width, inner))))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up_proj, self.down_proj) if self.is_transposed else (self.up_proj.mT, self.down_proj.mT)
        return ((x.unsqueeze(1) @ up).relu() @ down * self.scale.view(3, 1, 1)).sum(1)


class Bare(nn.Module):
    """A parameter that no layer wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Net(nn.Module):
    """A layer of every kind, one after the other; the head is tied to the table if asked for."""

    def __init__(self, table: type[nn.Embedding] = nn.Embedding, tied: bool = False, **experts: Any) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.table = table(12, 8)
        self.linear = nn.Linear(8, 8)
        self.turned = Conv1D(6, 8)
        self.conv1d = nn.Conv1d(6, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(6, 6, 2, padding=1, stride=2)
        self.conv3d = nn.Conv3d(6, 6, (1, 2, 2), bias=False)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.back = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.ModuleDict({"linear": nn.Linear(8, 8)})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts(**({"turned": False, "width": 8, "inner": 5} | experts))
        self.bare = Bare()
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.table(ids)).tanh()
        y = self.grouped(self.conv1d(self.turned(x).mT)).tanh()
        y = self.conv3d(self.conv2d(y.unflatten(-1, (2, -1))).unsqueeze(2)).flatten(2).mean(-1)
        x = self.norm((x + self.back(y).unsqueeze(1)).mT).mT
        x = x + self.inner["linear"](x) + self.attention(x, x, x, need_weights=True)[0]
        x = x + self.experts(x) + self.bare(x)
        return self.head(x)


def loss_of(call: Callable[[Tensor], Tensor]) -> Tensor:
    out = call(IDS)
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


LAYERS = ["table", "linear", "turned", "conv1d", "conv2d", "conv3d", "back", "head"]
TABLES = ["experts.up_proj", "experts.down_proj"]
SUBJECTS = {
    "every layer": (Net, {"target_modules": LAYERS}),
    "rank-stabilised": (Net, {"target_modules": LAYERS, "use_rslora": True}),
    "patterns": (
        Net,
        {
            "target_modules": LAYERS,
            "rank_pattern": {"conv1d": 3, "inner.linear": 5},
            "alpha_pattern": {"b.*|head": 2.5},
        },
    ),
    "dropout": (Net, {"target_modules": LAYERS, "lora_dropout": 0.3}),
    "own bias": (Net, {"target_modules": ["linear", "turned", "conv2d"], "bias": "lora_only"}),
    "every bias": (Net, {"target_modules": ["linear", "turned"], "bias": "all"}),
    "saved modules": (Net, {"target_modules": ["linear"], "modules_to_save": ["norm", "head", "attention"]}),
    "a tied table": (lambda: Net(tied=True), {"target_modules": ["table", "linear"]}),
    "a tied head": (lambda: Net(tied=True), {"target_modules": ["head"]}),
    "a table with a forward of its own": (lambda: Net(Scaled), {"target_modules": ["table"]}),
    "the same, tied": (lambda: Net(Scaled, tied=True), {"target_modules": ["table"]}),
    "experts": (Net, {"target_modules": ["linear"], "target_parameters": TABLES}),
    "experts, one table": (Net, {"target_modules": ["linear"], "target_parameters": TABLES[1:]}),
    "experts turned": (lambda: Net(turned=True), {"target_modules": ["linear"], "target_parameters": TABLES}),
    "square experts": (lambda: Net(inner=8), {"target_modules": ["linear"], "target_parameters": TABLES}),
    "square experts turned": (
        lambda: Net(inner=8, turned=True),
        {"target_modules": ["linear"], "target_parameters": TABLES, "alpha_pattern": {"experts.down_proj": 3}},
    ),
    "parameters": (
        Net,
        {
            "target_modules": ["back"],
            "target_parameters": ["bare.matrix", "linear.weight", "turned.weight", "table.weight"],
        },
    ),
    "attention, as PEFT has it": (Net, {"target_modules": ["attention", "linear"]}),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_logits_and_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make, fields = SUBJECTS[name]
    backbone = make().eval()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    options = {"compat": "peft"} if "attention" in fields["target_modules"] else {}
    model = peft_model(backbone, peft.LoraConfig(r=2, lora_alpha=5, **fields))
    delta, params = fd.load_peft(saved(model, tmp_path / "run"), backbone, **options)
    with torch.no_grad():
        torch.testing.assert_close(delta.apply(params, IDS), model(IDS), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(IDS), backbone(IDS), atol=1e-2)
    theirs, ours = gradients_of(model, loss_of), gradients_here(delta, params, loss_of, **options)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        # PEFT adds this change twice, and differentiates as if it had added it once.
        twice = 2 if "out_proj.lora" in key else 1
        theirs[key] *= twice
        scale = float(theirs[key].abs().max())
        torch.testing.assert_close(ours[key] / scale, theirs[key] / scale, rtol=1e-5, atol=1e-5, msg=key)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


def test_the_output_projection_of_attention_counts_once(tmp_path: Path) -> None:
    """PEFT adds its change twice; by default it is the delta that was meant."""
    backbone = Net().eval()
    model = peft_model(backbone, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["attention"]))
    folder = saved(model, tmp_path / "run")
    delta, params = fd.load_peft(folder, backbone)
    doubled = fd.load_peft(folder, backbone, compat="peft")[1]
    scale = "attention.out_proj.lora.scale"
    assert float(params[scale]) == 2
    assert [float(leaf) for name, leaf in doubled.items() if "out_proj" in name and name.endswith("scale")] == [4]
    merged = dict(backbone.named_parameters()) | dict(delta.merge(params))
    weight = backbone.attention.out_proj.weight
    change = 2 * params[scale.replace("scale", "lora_B")] @ params[scale.replace("scale", "lora_A")]
    torch.testing.assert_close(merged["attention.out_proj.weight"], weight + change)
    with pytest.raises(fd.errors.CheckpointError, match='compat="peft", or leave it out'):
        fd.load_peft(folder, backbone, compat="old")


# -- one small file, changed --------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block["v"](block["q"](x).tanh())
        return self.head(x)


FIELDS = {"peft_type": "LORA", "lora_alpha": 4, "target_modules": ["q", "v"], "modules_to_save": ["head"]}
SITES = tuple(f"blocks.{i}.{own}" for i in range(2) for own in "qv")


def small_tensors() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    found = {}
    for site in SITES:
        found[f"base_model.model.{site}.lora_A.weight"] = torch.randn(2, 4, generator=rng)
        found[f"base_model.model.{site}.lora_B.weight"] = torch.randn(4, 2, generator=rng)
    return found | {
        "base_model.model.head.weight": torch.randn(3, 4, generator=rng),
        "base_model.model.head.bias": torch.randn(3, generator=rng),
    }


def written(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


WANTED = fd.interop.from_peft(FIELDS, small_tensors(), Small())[1]

SPELLINGS: dict[str, Callable[[str], str]] = {
    "doubled prefix": lambda key: f"base_model.model.{key}",
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "another adapter's name": lambda key: key.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine."),
    "saved modules of a plain state dict": lambda key: key.replace("head.", "head.modules_to_save.default."),
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "parallel": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "in a wrapper for checkpointing": lambda key: key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_keys_as_others_write_them(name: str) -> None:
    tensors = {SPELLINGS[name](key): tensor for key, tensor in small_tensors().items()}
    delta, params = fd.interop.from_peft(FIELDS, tensors, Small())
    assert delta.sites == SITES
    assert all(torch.equal(params[key], leaf) for key, leaf in WANTED.items())


def test_a_plain_state_dict_repeats_the_backbone() -> None:
    """Trainers that save the whole of a PEFT model: what it keeps of the backbone changes nothing."""
    backbone = Small()
    whole = {f"base_model.model.{key}": tensor for key, tensor in backbone.state_dict().items() if "head" not in key}
    whole = {
        key.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"): whole[key] for key in whole
    }
    whole |= {
        f"base_model.model.head.original_module.{own}": tensor for own, tensor in backbone.head.state_dict().items()
    }
    tensors = {key.replace("head.", "head.modules_to_save.default."): t for key, t in small_tensors().items()}
    _, params = fd.interop.from_peft(FIELDS, whole | tensors, backbone)
    assert params.keys() == WANTED.keys()
    assert all(torch.equal(params[key], leaf) for key, leaf in WANTED.items())


def test_a_pickle_and_a_folder_below(tmp_path: Path) -> None:
    folder = written(tmp_path / "run" / "mine", FIELDS, small_tensors())
    (folder / "adapter_model.safetensors").unlink()
    torch.save(small_tensors(), folder / "adapter_model.bin")
    for path in (tmp_path / "run", folder, folder / "adapter_config.json"):
        _, params = fd.load_peft(path, Small())
        assert all(torch.equal(params[key], leaf) for key, leaf in WANTED.items())
    written(tmp_path / "run" / "other", FIELDS, small_tensors())
    with pytest.raises(fd.errors.CheckpointError, match=r"several adapters \(mine, other\).*load_peft"):
        fd.load_peft(tmp_path / "run", Small())
    torch.save({"a": Small()}, folder / "adapter_model.bin")
    with pytest.raises(fd.errors.CheckpointError, match="could run any code"):
        fd.load_peft(folder, Small())


def test_names_that_the_backbone_calls_otherwise() -> None:
    tensors = {key.replace(".blocks.", ".layers.").replace(".q.", ".query."): t for key, t in small_tensors().items()}
    with pytest.raises(fd.errors.CheckpointError, match=r"8 that find no place.*layers\.0\.query.*key_map="):
        fd.interop.from_peft(FIELDS, tensors, Small())
    rules = {r"^layers\.": "blocks.", r"\.query$": ".q"}
    by_name = lambda name: name.replace("layers.", "blocks.").replace("query", "q")  # noqa: E731
    for key_map in (rules, by_name):
        _, params = fd.interop.from_peft(FIELDS, tensors, Small(), key_map=key_map)
        assert all(torch.equal(params[key], leaf) for key, leaf in WANTED.items())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vit.encoder.layer.0.attention.attention.query", "vit.layers.0.attention.q_proj"),
        ("vit.encoder.layer.0.attention.output.dense", "vit.layers.0.attention.o_proj"),
        ("vit.encoder.layer.0.intermediate.dense", "vit.layers.0.mlp.fc1"),
        ("vit.encoder.layer.0.output.dense", "vit.layers.0.mlp.fc2"),
        ("language_model.model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
        ("language_model.lm_head", "lm_head"),
        ("model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
        (
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
            "model.vision_tower.encoder.layers.0.self_attn.q_proj",
        ),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_names_that_transformers_has_changed(old: str, new: str) -> None:
    from funcdelta.interop.peft.renamed import here

    assert here(old, {new}.__contains__) == new
    assert here(f"{old}_else", {new}.__contains__) is None


def test_overlapping_patterns_are_told() -> None:
    fields = FIELDS | {"alpha_pattern": {"0.q": 2, "q": 40}}
    with pytest.warns(UserWarning, match=r"'0.q', 'q' of alpha_pattern all match blocks.0.q"):
        _, params = fd.interop.from_peft(fields, small_tensors(), Small())
    assert {float(leaf) for name, leaf in params.items() if name.endswith("scale")} == {1, 2, 20}


def test_fields_that_are_not_known_are_told_in_one_line() -> None:
    fields = FIELDS | {"shiny": 1, "new": None, "task_type": "NONSENSE", "base_model_name_or_path": 3, "r": "many"}
    with pytest.warns(UserWarning, match=r"not known and not read: new, shiny\.$") as told:
        fd.interop.from_peft(fields, small_tensors(), Small())
    assert len(told) == 1


def test_missing_fields_have_the_defaults_of_peft() -> None:
    _, params = fd.interop.from_peft({"peft_type": "LORA"}, small_tensors(), Small())
    assert {float(leaf) for name, leaf in params.items() if name.endswith("scale")} == {4}  # alpha 8 by rank 2


def test_peft_config_and_state_dict_in_memory() -> None:
    backbone = Small()
    model = peft_model(backbone, peft.LoraConfig(r=3, target_modules=["q"], modules_to_save=["head"]))
    delta, params = fd.interop.from_peft(model.peft_config["default"], peft.get_peft_model_state_dict(model), backbone)
    x = torch.randn(2, 4)
    torch.testing.assert_close(delta.apply(params, x), model(x))


A0 = "base_model.model.blocks.0.q.lora_A.weight"
B0 = "base_model.model.blocks.0.q.lora_B.weight"
WRONG: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "half a pair": ({}, {B0: None}, r"blocks\.0\.q: the file has .*lora_A.* and no lora_B"),
    "another width": (
        {},
        {A0: torch.ones(2, 5)},
        r"blocks\.0\.q: expected factors of a change of shape \(4, 4\), found A of",
    ),
    "unlike ranks": ({}, {A0: torch.ones(3, 4)}, r"found A of shape \(3, 4\) and B of shape \(4, 2\)"),
    "no factor": (
        {},
        {A0: None, "base_model.model.blocks.0.q.lora_C.weight": torch.ones(1)},
        "lora_C.weight is no factor",
    ),
    "a bias": ({}, {"base_model.model.blocks.0.q.lora_B.bias": torch.ones(4)}, r"a bias in B \(lora_bias=True\)"),
    "magnitudes": ({}, {"base_model.model.blocks.0.q.lora_magnitude_vector": torch.ones(4)}, "magnitudes of DoRA"),
    "a stranger": (
        {},
        {"base_model.model.blocks.7.q.lora_A.weight": torch.ones(2, 4)},
        r"blocks\.7\.q\.lora_A.* There are|Near",
    ),
    "a value of no one": (
        {},
        {"base_model.model.haed.weight": torch.ones(1)},
        r"find no place.*haed.*Near names: .*head",
    ),
    "more labels": (
        {},
        {"base_model.model.head.weight": torch.ones(9, 4)},
        r"head.weight \(expected \(3, 4\), found \(9, 4\)\)",
    ),
    "a container": ({}, {"base_model.model.blocks.0.lora_A.weight": torch.ones(2, 4)}, "blocks.0.*Below it are: q, v"),
    "two adapters": (
        {},
        {A0.replace("lora_A", "lora_A.x"): torch.ones(1), B0.replace("lora_B", "lora_B.y"): torch.ones(1)},
        "x, y",
    ),
    "twice": ({}, {f"base_model.model.{A0}": torch.ones(2, 4)}, "1 tensors mean what another"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, {}, "path_initial_model_for_weight_conversion"),
    "olora": ({"init_lora_weights": "olora"}, {}, "changes the backbone before training"),
    "alora": ({"alora_invocation_tokens": [1]}, {}, "aLoRA"),
    "alpha in words": ({"lora_alpha": "16"}, {}, "lora_alpha is a number; found '16'"),
    "a broken pattern": ({"alpha_pattern": {"(": 1}}, {}, "no regular expression"),
    "another type": ({"peft_type": "XLORA"}, {}, "of the type XLORA"),
    "no type": ({"peft_type": None}, {}, "peft_type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str, tmp_path: Path) -> None:
    fields, changes, message = WRONG[name]
    tensors = {key: tensor for key, tensor in (small_tensors() | changes).items() if tensor is not None}
    with pytest.raises(fd.errors.CheckpointError, match=f"(?s){message}"):
        fd.load_peft(written(tmp_path, FIELDS | fields, tensors), Small())


def test_no_lora_at_all() -> None:
    with pytest.raises(fd.errors.CheckpointError, match="no factor of a LoRA"):
        fd.interop.from_peft(FIELDS, {"head.weight": torch.ones(3, 4)}, Small())


def test_a_convolution_in_groups_is_refused(tmp_path: Path) -> None:
    backbone = Net().eval()
    model = peft_model(backbone, peft.LoraConfig(r=2, target_modules=["grouped"]))
    with pytest.raises(
        fd.errors.CheckpointError, match="grouped: PEFT's LoRA of a convolution in groups is not a change"
    ):
        fd.load_peft(saved(model, tmp_path), backbone)


def test_one_end_of_a_tied_tensor() -> None:
    backbone = Net(tied=True).eval()
    model = peft_model(backbone, peft.LoraConfig(r=2, target_modules=["linear"], modules_to_save=["table"]))
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(fd.errors.CheckpointError, match=r"table.weight \(tied to head.weight\).* Untie"):
        fd.interop.from_peft(model.peft_config["default"], state, backbone)
    backbone.head.weight = nn.Parameter(backbone.head.weight.detach().clone())
    delta, params = fd.interop.from_peft(model.peft_config["default"], state, backbone)
    torch.testing.assert_close(delta.apply(params, IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_pointers_and_damage(tmp_path: Path) -> None:
    folder = written(tmp_path, FIELDS, small_tensors())
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(fd.errors.CheckpointError, match="damaged or truncated"):
        fd.load_peft(folder, Small())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(fd.errors.CheckpointError, match=f"{name}' is a pointer of Git LFS.*git lfs pull"):
            fd.load_peft(folder, Small())
    (folder / "adapter_config.json").write_text("no json")
    with pytest.raises(fd.errors.CheckpointError, match="not JSON"):
        fd.load_peft(folder, Small())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(fd.errors.CheckpointError, match=r"no folder of PEFT: expected adapter_config\.json"):
        fd.load_peft(folder, Small())


def test_half_precision_files_and_backbones() -> None:
    half = {key: tensor.half() for key, tensor in small_tensors().items()}
    _, params = fd.interop.from_peft(FIELDS, half, Small())
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    _, params = fd.interop.from_peft(FIELDS, small_tensors(), Small().bfloat16())
    assert params["blocks.0.q.lora.lora_A"].dtype == torch.float32


def test_what_is_read_folds() -> None:
    """Members of several files on one backbone are one stack."""
    backbone = Small().eval()
    delta, one = fd.interop.from_peft(FIELDS, small_tensors(), backbone)
    other = fd.interop.from_peft(FIELDS, {key: tensor + 1 for key, tensor in small_tensors().items()}, backbone)[1]
    x = torch.randn(5, 4)
    outs = delta.apply_many(fd.stack([one, other]), x, engine="fold")
    torch.testing.assert_close(outs[1], delta.apply(other, x), rtol=1e-4, atol=1e-4)


HOSTILE = {
    "a number that is none": '{"peft_type": "LORA", "lora_alpha": NaN}',
    "an endless number": '{"peft_type": "LORA", "lora_alpha": Infinity}',
    "a huge number": '{"peft_type": "LORA", "lora_alpha": 1' + 400 * "0" + "}",
    "a pattern's number": '{"peft_type": "LORA", "alpha_pattern": {"q": NaN}}',
    "depth": 100_000 * "[" + 100_000 * "]",
    "flags in mid-pattern": '{"peft_type": "LORA", "alpha_pattern": {"(?i)Q": 1}}',
    "a huge repeat": '{"peft_type": "LORA", "alpha_pattern": {"a{99999999999}": 1}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs(name: str, tmp_path: Path) -> None:
    folder = written(tmp_path, FIELDS, small_tensors())
    (folder / "adapter_config.json").write_text(HOSTILE[name])
    with pytest.raises(fd.errors.CheckpointError, match="adapter_config"):
        fd.load_peft(folder, Small())


def test_a_version_of_many_digits(tmp_path: Path) -> None:
    folder = written(tmp_path, {**FIELDS, "peft_version": 5000 * "9" + ".1"}, small_tensors())
    assert fd.load_peft(folder, Small())[0].sites


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    backbone = Small().eval()
    delta, params = fd.interop.from_peft(FIELDS, small_tensors(), backbone)
    (tmp_path / "notes.txt").write_text("precious")
    (tmp_path / "checkpoint-1").mkdir()
    fd.save_peft(delta, params, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "precious"
    assert (tmp_path / "checkpoint-1").is_dir()
    assert fd.load_peft(tmp_path, backbone)[0].sites == delta.sites


def test_rules_that_are_no_expressions() -> None:
    for rule in ({"(": ""}, {".*": r"\9"}):
        with pytest.raises(fd.errors.CheckpointError, match="key_map"):
            fd.interop.from_peft(FIELDS, small_tensors(), Small(), key_map=rule)


def test_scales_that_no_file_may_hold(tmp_path: Path) -> None:
    delta, params = fd.interop.from_peft(FIELDS, small_tensors(), Small().eval())
    key = next(name for name in params if name.endswith("scale"))
    for scale in (torch.nan, torch.inf, 1e38):
        with pytest.raises(fd.errors.CheckpointError, match="no alpha"):
            fd.save_peft(delta, {**params, key: torch.tensor(scale)}, tmp_path / "run")
