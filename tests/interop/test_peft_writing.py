"""What is written: the installed PEFT reads it and computes the same; what PEFT cannot hold is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_made import gradients_here, gradients_of, peft_model, quiet, read_by_peft, saved
from safetensors.torch import load_file
from test_peft_reading import IDS, SUBJECTS, Net, Small, loss_of
from torch import Tensor, nn

import funcdelta as fd

peft = pytest.importorskip("peft")


def fields_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def moved(delta: fd.DeltaModel, seed: int = 0) -> dict[str, Tensor]:
    """Params away from their start, scales as they are."""
    start = delta.init(seed)
    noise = fd.tree.randn_like(start, seed=seed + 1)
    return {name: leaf + 0.3 * noise[name] if delta.trainable(name) else leaf for name, leaf in start.items()}


@pytest.mark.parametrize("name", SUBJECTS)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    """What PEFT wrote is written again, tensor for tensor, but for copies of the backbone."""
    make, fields = SUBJECTS[name]
    backbone = make().eval()
    options = {"compat": "peft"} if "attention" in fields["target_modules"] else {}
    model = peft_model(backbone, peft.LoraConfig(r=2, lora_alpha=5, **fields))
    given = saved(model, tmp_path / "given")
    delta, params = fd.load_peft(given, backbone, **options)
    folder = fd.save_peft(delta, params, tmp_path / "again", **options)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (given, folder))
    theirs = {key: tensor for key, tensor in theirs.items() if not key.endswith("base_layer.weight")}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    again, same = fd.load_peft(folder, backbone, **options)
    assert again.configs == delta.configs
    assert all(torch.equal(same[key], leaf) for key, leaf in params.items())
    read = read_by_peft(backbone, folder)
    with torch.no_grad():
        torch.testing.assert_close(read(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def several() -> list[fd.BaseDeltaConfig]:
    """Unlike ranks, scales and sites."""
    return [
        fd.LoraConfig(lora_r=2, lora_alpha=3, modified_modules=["table", "back"], unfrozen_modules=["deltas", "norm"]),
        fd.LoraConfig(lora_r=4, lora_alpha=3.5, modified_modules=["conv1d", "conv2d", "conv3d"]),
        fd.LoraConfig(lora_r=1, lora_alpha=7, modified_modules=["[r]^linear$", "experts.down_proj", "bare.matrix"]),
    ]


WRITTEN: dict[str, Callable[[], list[fd.BaseDeltaConfig]]] = {
    "unlike ranks and scales": several,
    "rank-stabilised": lambda: [fd.LoraConfig(lora_r=3, use_rslora=True, modified_modules=["linear", "head"])],
    "some rank-stabilised": lambda: [
        fd.LoraConfig(lora_r=3, use_rslora=True, modified_modules=["head"]),
        fd.LoraConfig(lora_r=2, modified_modules=["linear", "experts.up_proj", "experts.down_proj"]),
    ],
    "one of two that end alike": lambda: [fd.LoraConfig(lora_r=3, modified_modules=["[r]^linear$"])],
    "both of them, unlike": lambda: [
        fd.LoraConfig(lora_r=3, modified_modules=["[r]^linear$"]),
        fd.LoraConfig(lora_r=2, lora_alpha=1, modified_modules=["inner.linear"]),
    ],
    "a part of a module trained": lambda: [
        fd.LoraConfig(
            modified_modules=["head"], unfrozen_modules=["deltas", "norm.weight", "bare.matrix", "linear.bias"]
        )
    ],
    "biases": lambda: [fd.LoraConfig(modified_modules=["back"], unfrozen_modules=["deltas", "bias"])],
    "the site's own weight": lambda: [fd.LoraConfig(modified_modules=["back"], unfrozen_modules=["deltas", "back"])],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_read_by_peft(name: str, tmp_path: Path) -> None:
    backbone = Net().eval()
    delta = fd.DeltaModel(backbone, *WRITTEN[name]())
    params = moved(delta)
    folder = fd.save_peft(delta, params, tmp_path / "run")
    read = read_by_peft(backbone, folder)
    with torch.no_grad():
        wanted = delta.apply(params, IDS)
        size = float(wanted.abs().max())
        torch.testing.assert_close(read(IDS) / size, wanted / size, rtol=1e-5, atol=1e-5)
    named = {key for key in load_file(folder / "adapter_model.safetensors") if ".lora_" in key}
    theirs, ours = gradients_of(read, loss_of), gradients_here(delta, params, loss_of)
    assert {key for key in theirs if ".lora_" in key} == named
    for key in theirs.keys() & ours.keys():
        scale = float(theirs[key].abs().max())
        torch.testing.assert_close(ours[key] / scale, theirs[key] / scale, rtol=1e-5, atol=1e-5, msg=key)
    again, same = fd.load_peft(folder, backbone)
    assert set(again.sites) == set(delta.sites)
    with torch.no_grad():
        torch.testing.assert_close(again.apply(same, IDS) / size, wanted / size, rtol=1e-5, atol=1e-5)


def test_any_scale_comes_back_bit_for_bit(tmp_path: Path) -> None:
    backbone = Small()
    delta = fd.LoraModel(backbone, lora_r=3, modified_modules=["q", "v"])
    params = moved(delta)
    for i, name in enumerate(name for name in params if name.endswith("scale")):
        params[name] = torch.rand((), generator=torch.Generator().manual_seed(i)) * 10 ** (i - 1)
    again, same = fd.load_peft(fd.save_peft(delta, params, tmp_path / "run"), backbone)
    scales = [float(leaf) for name, leaf in same.items() if name.endswith("scale")]
    assert sorted(scales) == sorted(float(leaf) for name, leaf in params.items() if name.endswith("scale"))
    x = torch.randn(2, 4)
    assert torch.equal(again.apply(same, x), delta.apply(params, x))


def test_parts_of_a_fused_projection(tmp_path: Path) -> None:
    """PEFT knows no parts: they are a LoRA of the whole, as wide as all of them."""
    from transformers import GPT2Config, GPT2LMHeadModel

    backbone = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=16)).eval()
    for names in (["attn@.q@", "attn@.v@"], ["attn@.k@"]):
        delta = fd.LoraModel(backbone, lora_r=2, modified_modules=names)
        params = moved(delta)
        folder = fd.save_peft(delta, params, tmp_path / "run")
        read = read_by_peft(backbone, folder)
        with torch.no_grad(), quiet():
            wanted = delta.apply(params, input_ids=IDS).logits
            torch.testing.assert_close(read(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
        assert fields_of(folder)["fan_in_fan_out"] is True
        again, same = fd.load_peft(folder, backbone)
        torch.testing.assert_close(again.apply(same, input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_fields_do_not_depend_on_order(tmp_path: Path) -> None:
    """Whole paths, escaped; where another path ends alike, nothing may stand before."""
    delta = fd.DeltaModel(Net(), *WRITTEN["both of them, unlike"]())
    fields = fd.interop.to_peft(delta, delta.init(0))[0]
    assert fields["target_modules"] == ["linear", "inner.linear"]
    assert (fields["r"], fields["lora_alpha"]) in {(3, 16), (2, 1)}
    patterns = [*fields["rank_pattern"], *fields["alpha_pattern"]]
    assert set(patterns) <= {r"(?<!\.)linear", r"inner\.linear"}
    one = fd.DeltaModel(Net(), *WRITTEN["one of two that end alike"]())
    assert fd.interop.to_peft(one, one.init(0))[0]["target_modules"] == "linear"  # a regex, of the whole name


def test_older_weights_do_not_stay_beside_the_new_ones(tmp_path: Path) -> None:
    backbone = Small()
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["q"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(b"old")
    fd.save_peft(delta, moved(delta), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_transformers_takes_it(tmp_path: Path) -> None:
    """``load_adapter`` with what ``to_peft`` gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["q_proj", "down_proj"])
    params = moved(delta)
    config, tensors = fd.interop.to_peft(delta, params)
    with torch.no_grad(), quiet():
        wanted = delta.apply(params, input_ids=IDS).logits
        other = LlamaForCausalLM(backbone.config).eval()
        other.load_state_dict(backbone.state_dict())
        other.load_adapter(adapter_state_dict=tensors, peft_config=peft.LoraConfig(**config))
        torch.testing.assert_close(other(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[nn.Module], fd.DeltaModel], str]] = {
    "another method": (
        lambda b: fd.AdapterModel(b, modified_modules=["linear"]),
        "LoRA alone here, and this delta has adapter",
    ),
    "two methods": (
        lambda b: fd.DeltaModel(
            b, fd.LoraConfig(modified_modules=["head"]), fd.BitFitConfig(modified_modules=["back"])
        ),
        "has bitfit",
    ),
    "two at a site": (
        lambda b: fd.DeltaModel(b, *(fd.LoraConfig(modified_modules=["head"]) for _ in range(2))),
        "head has two LoRAs",
    ),
    "groups": (lambda b: fd.LoraModel(b, modified_modules=["grouped"]), "no LoRA on Conv1d at grouped"),
    "attention": (
        lambda b: fd.LoraModel(b, modified_modules=["attention.in_proj_weight", "attention.out_proj"]),
        'twice.*compat="peft"',
    ),
    "a Conv1D beside parameters": (
        lambda b: fd.LoraModel(b, modified_modules=["turned", "bare.matrix"]),
        r"Conv1D \(turned\) beside parameters \(bare.matrix\)",
    ),
    "unlike dropouts": (
        lambda b: fd.DeltaModel(
            b, fd.LoraConfig(modified_modules=["head"]), fd.LoraConfig(modified_modules=["back"], lora_dropout=0.5)
        ),
        r"one lora_dropout for all modules, and this delta has 0\.0, 0\.5",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_peft_cannot_hold(name: str, tmp_path: Path) -> None:
    make, message = REFUSED[name]
    delta = make(Net().eval())
    with pytest.raises(fd.errors.CheckpointError, match=message):
        fd.save_peft(delta, delta.init(0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stacks_and_missing_leaves(tmp_path: Path) -> None:
    delta = fd.LoraModel(Small(), modified_modules=["q"])
    stack = delta.init(0, n=3)
    with pytest.raises(fd.errors.CheckpointError, match=r"a stack.*fd\.take\(stack, 0\).*fd\.unstack\(stack\)"):
        fd.save_peft(delta, stack, tmp_path / "run")
    for i, member in enumerate(fd.unstack(stack)):
        fd.save_peft(delta, member, tmp_path / f"{i}")
    params = fd.take(stack, 1)
    lacking = {name: leaf for name, leaf in params.items() if not name.endswith("0.q.lora.lora_B")}
    with pytest.raises(fd.errors.ParamsError, match="lora_B"):
        fd.save_peft(delta, lacking, tmp_path / "run")
    other = fd.LoraModel(delta.backbone, lora_r=2, modified_modules=["v"])
    packed, members = fd.pack([(delta, params), (other, other.init(0))])
    with pytest.raises(fd.errors.CheckpointError, match=r"fd\.unpack"):
        fd.save_peft(packed, members, tmp_path / "run")


def test_both_projections_of_attention(tmp_path: Path) -> None:
    """PEFT has one rank for both, and adds the change of the output projection twice: half of it is written."""
    backbone = Net().eval()
    names = ["attention.in_proj_weight", "attention.out_proj"]
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=names)
    params = moved(delta)
    read = read_by_peft(backbone, fd.save_peft(delta, params, tmp_path / "run", compat="peft"))
    with torch.no_grad():
        torch.testing.assert_close(read(IDS), delta.apply(params, IDS), rtol=1e-5, atol=1e-5)
    alone = fd.LoraModel(backbone, lora_r=2, modified_modules=names[1:])
    with pytest.raises(fd.errors.CheckpointError, match=r"give attention\.in_proj_weight a LoRA of the rank 2"):
        fd.save_peft(alone, alone.init(0), tmp_path / "run", compat="peft")
