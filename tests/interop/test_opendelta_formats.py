"""What OpenDelta's files may look like, of every version and by every accident: read right, or refused with the fix."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

import funcdelta as fd

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
T5_SIZES = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}
HEADER = {
    "backbone_class": "BertForSequenceClassification",
    "exclude_modules": ["lm_head"],
    "opendelta_version": "0.3.0",
}
QUERIES = tuple(f"bert.encoder.layer.{i}.attention.self.query" for i in range(2))
LORA = {"delta_type": "lora", "lora_r": 2, "lora_alpha": 4, "modified_modules": ["attn@.q@"], "common_structure": True}
ADAPTER = {"delta_type": "adapter", "bottleneck_dim": 3, "non_linearity": "relu"}


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **SIZES)).eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **T5_SIZES)).eval()


IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 2]])
INPUTS = {"bert": {"input_ids": IDS}, "t5": {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}}


def write(folder: Path, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**HEADER, **data}))
    torch.save(dict(tensors), folder / "pytorch_model.bin")
    return folder


def random(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {key: torch.randn(shape, generator=rng) for key, shape in shapes.items()}


def loras(sites: tuple[str, ...] = QUERIES, name: str = ".lora") -> dict[str, Tensor]:
    return random({f"{s}{name}.lora_{ab}": shape for s in sites for ab, shape in (("A", (2, 8)), ("B", (8, 2)))})


def adapters(sites: list[str], name: str = "adapter") -> dict[str, Tensor]:
    inner = {"down_proj.weight": (3, 8), "down_proj.bias": (3,), "up_proj.weight": (8, 3), "up_proj.bias": (8,)}
    return random({f"{s}.{name}.modulelist.{leaf}": shape for s in sites for leaf, shape in inner.items()})


def logits(model: Callable[..., Any], kind: str = "bert", *params: Any) -> Tensor:
    with torch.no_grad():
        return model(*params, **INPUTS[kind]).logits


def by_hand(
    model: nn.Module, kind: str, changed: Mapping[str, Tensor], hooks: Mapping[str, Any] | None = None
) -> Tensor:
    """Logits of a copy with changed tensors and hooks."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in changed.items():
            model.get_parameter(name).copy_(tensor)
    for path, hook in (hooks or {}).items():
        model.get_submodule(path).register_forward_hook(hook)
    return logits(model, kind)


def with_loras(model: nn.Module, tensors: Mapping[str, Tensor], scale: float = 2.0) -> dict[str, Tensor]:
    """Weights with ``s B A`` added, by the name of the weight."""
    sites = {key.partition(".lora")[0] for key in tensors if "lora_A" in key}
    found = {}
    for site in sites:
        a, b = (next(t for key, t in tensors.items() if key.startswith(site) and key.endswith(ab)) for ab in "AB")
        found[f"{site}.weight"] = model.get_parameter(f"{site}.weight").detach() + scale * b @ a
    return found


def adapter_hook(tensors: Mapping[str, Tensor], place: str, name: str = "adapter") -> Any:
    p = {leaf: tensors[f"{place}.{name}.modulelist.{leaf}"] for leaf in ("down_proj.weight", "up_proj.weight")}
    b = {leaf: tensors[f"{place}.{name}.modulelist.{leaf}"] for leaf in ("down_proj.bias", "up_proj.bias")}

    def hook(module: nn.Module, args: Any, y: Any) -> Any:
        h = y[0] if isinstance(y, tuple) else y
        hidden = torch.relu(h @ p["down_proj.weight"].T + b["down_proj.bias"])
        h = h + hidden @ p["up_proj.weight"].T + b["up_proj.bias"]
        return (h, *y[1:]) if isinstance(y, tuple) else h

    return hook


# -- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", [".lora", ".lora_1", ".lora_2", ""])
def test_loras_of_every_version(attribute: str, tmp_path: Path) -> None:
    """With any number, and from before there was an attribute (0.0.1, whose names have no @)."""
    model = t5()
    parts = [("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
    sites = tuple(f"{stack}.block.{i}.layer.0.SelfAttention.q" for stack, i in parts)
    tensors = loras(sites, attribute)
    data = {**LORA, "modified_modules": ["attn@.q@"]}
    if not attribute:
        old = {"modified_modules": ["attn.q"], "opendelta_version": "0.0.1"}
        data |= {**old, "unfrozen_modules": ["deltas", "layer_norm", "final_layer_norm"], "backend": "hf"}
    delta, params = fd.load_opendelta(write(tmp_path / "saved", data, tensors), model)
    assert delta.sites == sites
    assert delta.configs[0].unfrozen_modules == ("deltas",)
    expected = by_hand(model, "t5", with_loras(model, tensors))
    torch.testing.assert_close(logits(delta.apply, "t5", params), expected)


def test_positions_of_before_0_3(tmp_path: Path) -> None:
    """``attn`` and ``ff`` are whole sub-layers of T5, residual connection included."""
    model = t5()
    numbers = {"encoder": (0, 1), "decoder": (0, 2)}
    places = [f"{stack}.block.{i}.layer.{at}" for stack in numbers for i in range(2) for at in numbers[stack]]
    tensors = adapters(places)
    old = {
        "modified_modules": ["attn", "ff"],
        "common_structure": True,
        "opendelta_version": "0.2.4",
        "sequential": True,
    }
    delta, params = fd.load_opendelta(write(tmp_path / "saved", {**ADAPTER, **old}, tensors), model)
    assert delta.sites == tuple(places)
    hooks = {place: adapter_hook(tensors, place) for place in places}
    torch.testing.assert_close(logits(delta.apply, "t5", params), by_hand(model, "t5", {}, hooks))


def test_several_deltas_in_one_file(tmp_path: Path) -> None:
    """OpenDelta saves the leaves of all deltas, and the config of one."""
    model, dense = bert(), [f"bert.encoder.layer.{i}.output.dense" for i in range(2)]
    tensors = loras() | {k.replace(".lora.", ".lora_1."): t * 0.5 for k, t in loras().items()} | adapters(dense)
    folder = write(tmp_path / "saved", LORA, tensors)
    with pytest.raises(
        fd.errors.CheckpointError, match=r"several deltas \(lora, lora_1, adapter\).*others=\{'lora_1': .*'lora'"
    ):
        fd.load_opendelta(folder, model)
    others = {
        "lora_1": fd.LoraConfig(lora_r=2, lora_alpha=8),
        "adapter": fd.AdapterConfig(bottleneck_dim=3, non_linearity="relu"),
    }
    with pytest.raises(fd.errors.CheckpointError, match=r"has no delta called 'lora_2'\. Near names: lora_1"):
        fd.load_opendelta(folder, model, others={"lora_2": others["lora_1"]})
    delta, params = fd.load_opendelta(folder, model, others=others)
    first = with_loras(model, {k: t for k, t in tensors.items() if ".lora." in k})
    second = with_loras(model, {k: t for k, t in tensors.items() if ".lora_1." in k}, 4.0)
    changed = {name: first[name] + second[name] - model.get_parameter(name).detach() for name in first}
    expected = by_hand(model, "bert", changed, {place: adapter_hook(tensors, place) for place in dense})
    torch.testing.assert_close(logits(delta.apply, "bert", params), expected)


def test_a_model_that_was_never_frozen(tmp_path: Path) -> None:
    """All of it is in the file, with buffers of old versions: what nobody trained is dropped."""
    model = bert()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()} | loras()
    whole["bert.embeddings.position_ids"] = torch.arange(512)[None]
    delta, params = fd.load_opendelta(write(tmp_path / "equal", LORA, whole), model)
    assert not delta.plan.trained
    torch.testing.assert_close(logits(delta.apply, "bert", params), by_hand(model, "bert", with_loras(model, loras())))
    whole["classifier.bias"] = whole["classifier.bias"] + 1
    delta, params = fd.load_opendelta(write(tmp_path / "trained", LORA, whole), model)
    assert list(delta.plan.trained) == ["classifier.bias"]
    changed = with_loras(model, loras()) | {"classifier.bias": whole["classifier.bias"]}
    torch.testing.assert_close(logits(delta.apply, "bert", params), by_hand(model, "bert", changed))


def test_tied_tensors_and_second_names_in_a_whole_model(tmp_path: Path) -> None:
    """A state dict has every name: all ends of a tied tensor, and a span's leaves at its end and under ``_1``."""
    model = t5()
    fields = {"bottleneck_dim": 3, "non_linearity": "relu"}
    delta = fd.ParallelAdapterModel(model, **fields)
    leaves = fd.tree.randn_like(delta.init(0), seed=1) | {name: torch.ones(()) for name in delta.constants}
    folder = fd.save_opendelta(delta, leaves, tmp_path / "saved")
    tensors = torch.load(folder / "pytorch_model.bin")
    ends = {a.site.path: a.site.exit for a in delta.plan.all()}
    for key, tensor in list(tensors.items()):
        site, _, leaf = key.partition(".parallel_adapter.")
        second = f"{ends[site]}.parallel_adapter" if ends[site] else f"{site}.parallel_adapter_1"
        tensors[f"{second}.{leaf}"] = tensor.clone()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()} | tensors
    assert {"shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"} <= whole.keys()
    data = json.loads((folder / "config.json").read_text())
    loaded, params = fd.load_opendelta(write(tmp_path / "whole", data, whole), model)
    assert loaded.sites == delta.sites
    assert all(torch.equal(params[name], leaves[name]) for name in delta.names)
    for name in ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        whole[name] = whole[name] + 1
    loaded, params = fd.load_opendelta(write(tmp_path / "trained", data, whole), model)
    assert len(loaded.plan.trained) == 1
    whole["lm_head.weight"] = whole["lm_head.weight"] + 1
    with pytest.raises(fd.errors.CheckpointError, match=r"1 .* same tied tensor but differ: lm_head\.weight"):
        fd.load_opendelta(write(tmp_path / "torn", data, whole), model)


def test_trained_leaves_beside_the_delta(tmp_path: Path) -> None:
    model = bert()
    head = random({"classifier.weight": (3, 8), "classifier.bias": (3,)})
    folder = write(tmp_path / "saved", {**LORA, "unfrozen_modules": ["deltas", "classifier"]}, loras() | head)
    delta, params = fd.load_opendelta(folder, model)
    assert delta.configs[0].unfrozen_modules == ("deltas", "classifier")
    assert all(torch.equal(params[name], tensor) for name, tensor in head.items())
    expected = by_hand(model, "bert", with_loras(model, loras()) | head)
    torch.testing.assert_close(logits(delta.apply, "bert", params), expected)


def test_biases_of_three_kinds(tmp_path: Path) -> None:
    """New values, values where there was none, and offsets of a layer that was added after a norm."""
    model, norm = t5(), "encoder.block.0.layer.0.layer_norm"
    fresh = "encoder.block.1.layer.0.SelfAttention.q"
    tensors = random({f"{norm}.bitfit.bias": (8,), f"{fresh}.bias": (8,)})
    data = {"delta_type": "bitfit", "modified_modules": [norm, fresh], "common_structure": False}
    delta, params = fd.load_opendelta(write(tmp_path / "saved", data, tensors), model)
    hooks = {
        path: lambda m, a, y, b=tensors[key]: y + b
        for path, key in ((norm, f"{norm}.bitfit.bias"), (fresh, f"{fresh}.bias"))
    }
    torch.testing.assert_close(logits(delta.apply, "t5", params), by_hand(model, "t5", {}, hooks))

    model, site = bert(), "bert.encoder.layer.0.output.dense"
    tensors = random({f"{site}.bias": (8,)})
    folder = write(tmp_path / "bert", {"delta_type": "bitfit", "modified_modules": ["0.output.dense"]}, tensors)
    delta, params = fd.load_opendelta(folder, model)
    torch.testing.assert_close(logits(delta.apply, "bert", params), by_hand(model, "bert", tensors))


class Inside(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


def test_models_inside_wrappers_and_out_of_them(tmp_path: Path) -> None:
    """A key may lack, or have too much of, one beginning; a number of a layer is no beginning."""
    model = bert()
    plain = write(tmp_path / "plain", LORA, loras())
    inside = write(tmp_path / "inside", LORA, {f"model.{key}": tensor for key, tensor in loras().items()})
    expected = by_hand(model, "bert", with_loras(model, loras()))
    for folder in (plain, inside):
        for backbone in (model, Inside(model)):
            delta, params = fd.load_opendelta(folder, backbone)
            torch.testing.assert_close(logits(delta.apply, "bert", params), expected)
    assert fd.load_opendelta(plain, model.bert)[0].sites == tuple(site.removeprefix("bert.") for site in QUERIES)
    # What has to be measured is measured on the model inside, whose own inputs are known.
    for made in (fd.ParallelAdapterModel(model, bottleneck_dim=3), fd.PrefixModel(model, prefix_token_num=2)):
        leaves = fd.tree.randn_like(made.init(0), seed=1) | {name: torch.ones(()) for name in made.constants}
        folder = fd.save_opendelta(made, leaves, tmp_path / "measured")
        delta, params = fd.load_opendelta(folder, Inside(model))
        torch.testing.assert_close(logits(delta.apply, "bert", params), logits(made.apply, "bert", leaves))
    deeper = write(tmp_path / "deeper", LORA, loras((QUERIES[0].replace(".0.", ".7."),)))
    with pytest.raises(
        fd.errors.CheckpointError,
        match=r"no tensor of a delta, .* known to BertForS.*: .*layer\.7\..*Near names: bert\.encoder\.layer",
    ):
        fd.load_opendelta(deeper, model)
    two = nn.ModuleDict({"a": BertModel(BertConfig(vocab_size=20, **SIZES)), "b": model.bert})
    with pytest.raises(fd.errors.CheckpointError, match=r"Not known to ModuleDict: encoder\.layer\.0"):
        fd.load_opendelta(write(tmp_path / "bare", LORA, {k.removeprefix("bert."): t for k, t in loras().items()}), two)


def test_safetensors_are_read_and_other_files_are_not(tmp_path: Path) -> None:
    folder = write(tmp_path / "saved", LORA, loras())
    expected = fd.load_opendelta(folder, bert())[1]
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(
        fd.errors.CheckpointError, match=r"expected config\.json and pytorch_model\.bin, found config\.json"
    ):
        fd.load_opendelta(folder, bert())
    save_file(loras(), folder / "model.safetensors")
    found = fd.load_opendelta(folder / "config.json", bert())[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_file_of_half_precision_is_computed_with_as_opendelta_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """It copies the values into leaves of the backbone's precision."""
    model, head = bert(), random({"classifier.bias": (3,)})
    tensors = {key: tensor.to(dtype) for key, tensor in (loras() | head).items()}
    delta, params = fd.load_opendelta(write(tmp_path / "lora", LORA, tensors), model)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    exact = {key: tensor.float() for key, tensor in tensors.items()}
    expected = by_hand(model, "bert", with_loras(model, exact) | {"classifier.bias": exact["classifier.bias"]})
    torch.testing.assert_close(logits(delta.apply, "bert", params), expected)
    bias = {f"{QUERIES[0]}.bias": random({"b": (8,)})["b"].to(dtype)}
    data = {"delta_type": "bitfit", "modified_modules": ["0.attention.self.query"], "common_structure": False}
    delta, params = fd.load_opendelta(write(tmp_path / "bitfit", data, bias), model)
    torch.testing.assert_close(logits(delta.apply, "bert", params), by_hand(model, "bert", bias))


class Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "saved", LORA, loras())
    for content in (Hostile(), {"a": Hostile()}):
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
        with pytest.raises(
            fd.errors.CheckpointError, match=r"holds more than tensors, .* refused.*torch\.save\(model\.state_dict"
        ):
            fd.load_opendelta(folder, bert())
        torch.save(content, folder / "pytorch_model.bin")
        with pytest.raises(fd.errors.CheckpointError, match="holds more than tensors"):
            fd.load_opendelta(folder, bert())
    assert not (tmp_path / "ran").exists()
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    with pytest.raises(fd.errors.CheckpointError, match="expected tensors by key, found a list"):
        fd.load_opendelta(folder, bert())
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(fd.errors.CheckpointError, match="found a int as 'epoch'"):
        fd.load_opendelta(folder, bert())
    write(folder, LORA, loras())
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(fd.errors.CheckpointError, match=r"is damaged or truncated \(\d+ bytes\)"):
        fd.load_opendelta(folder, bert())


# -- what does not fit ---------------------------------------------------------------------------------------------


def first_site(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if QUERIES[0] in key}


@pytest.mark.parametrize(
    ("data", "tensors", "message"),
    [
        (
            {},
            first_site(loras()),
            r"1 named by config\.json but not in the file: .*layer\.1\..*modified_modules=\[\.\.\.\]",
        ),
        ({"modified_modules": ["attn@.k@"]}, loras(), r"2 named by config.json.*key.*\n2 in the file but not named"),
        (
            {},
            {k: t for k, t in loras().items() if not k.endswith("1.attention.self.query.lora.lora_B")},
            "1 missing: .*B",
        ),
        (
            {"lora_r": 3},
            loras(),
            r"4 of another shape than config.json says: .*lora_A \(expected \(3, 8\), found \(2, 8\)\)",
        ),
        ({}, loras(("bert.encoder.layer.0.attention.self.qurey",)), r"no tensor of a delta.*Near names: query"),
        (
            {},
            loras() | {"bert.qurey.weight": torch.ones(1)},
            r"1 not known .*: bert\.qurey\.weight\. Near names: query",
        ),
        ({}, loras() | {f"{QUERIES[0]}.adapter.modulelist.down_proj.lora.lora_A": torch.ones(1)}, "1 not known"),
        (
            {},
            loras() | {"bert.encoder.bias": torch.ones(1)},
            "1 not known to the delta or the backbone: bert.encoder.bias",
        ),
        ({}, loras() | {f"{QUERIES[0]}.lora.lora_C": torch.ones(1)}, "1 not a leaf of the delta: .*lora_C"),
        (
            {},
            loras() | {"classifier.weight": torch.ones(4, 8)},
            r"of another shape than the backbone's: classifier.weight",
        ),
        (
            {},
            adapters(list(QUERIES)),
            r"has the tensors of adapter, but config\.json describes lora \('lora' in keys\)",
        ),
        ({"lora_rank": 2}, loras(), r"has a field 'lora_rank'.*Near names: lora_r.*backbone_model, lora_rank=None\)"),
        ({"delta_type": "lorra"}, loras(), r"OpenDelta has no delta_type='lorra'\. Near names: lora"),
        (
            {"delta_type": None},
            loras() | adapters([QUERIES[0]]),
            r"has no delta_type\. It is one of lora, adapter.*delta_type=\.\.\.",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    data: dict[str, Any], tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(fd.errors.CheckpointError, match=f"(?s){message}"):
        fd.load_opendelta(write(tmp_path / "saved", {**LORA, **data}, tensors), bert())


def test_the_fixes_that_errors_name_work(tmp_path: Path) -> None:
    data = {**LORA, "lora_r": 3, "lora_rank": 2, "delta_type": None}  # one kind of leaves says it
    folder = write(tmp_path / "saved", data, first_site(loras()))
    given: dict[str, Any] = {"modified_modules": ["0.attention.self.query"], "lora_r": 2, "lora_rank": None}
    delta, params = fd.load_opendelta(folder, bert(), **given)
    assert delta.sites == QUERIES[:1]
    assert float(params[f"{QUERIES[0]}.lora.scale"]) == 2.0
    with pytest.raises(fd.errors.CheckpointError, match="compat='exact': write compat=\"opendelta\""):
        fd.load_opendelta(folder, bert(), compat="exact")


def test_a_rule_that_was_not_saved_is_missing(tmp_path: Path) -> None:
    """OpenDelta drew another one when it loaded such a file."""
    model, fields = bert(), {"reduction_factor": 2, "hypercomplex_division": 2}
    delta = fd.CompacterModel(model, modified_modules=["0.output.dense"], **fields)
    folder = fd.save_opendelta(delta, delta.init(0), tmp_path / "saved")
    data = json.loads((folder / "config.json").read_text())
    tensors = torch.load(folder / "pytorch_model.bin")
    write(folder, {**data, "learn_phm": False}, {key: t for key, t in tensors.items() if "phm_rule" not in key})
    with pytest.raises(fd.errors.CheckpointError, match=r"2 missing: .*phm_rule.*does not save constants"):
        fd.load_opendelta(folder, model)


def test_fields_that_never_had_an_effect(tmp_path: Path) -> None:
    """The scale of a parallel adapter could not be set, LoRA ignored exclusions, exclusions knew no dots."""
    model, place = bert(), "bert.encoder.layer.0.attention.self"
    data = {**ADAPTER, "delta_type": "parallel_adapter", "modified_modules": [place, place], "scaled": 4.0}
    _, params = fd.load_opendelta(write(tmp_path / "a", data, adapters([place], "parallel_adapter")), model)
    assert float(params[f"{place}.parallel_adapter.scaled"]) == 1.0
    data = {**LORA, "exclude_modules": ["bert.encoder.layer.1"]}
    assert fd.load_opendelta(write(tmp_path / "b", data, loras()), model)[0].sites == QUERIES
    data = {**ADAPTER, "modified_modules": ["output.dense"], "exclude_modules": ["bert.encoder.l"], "scaled": None}
    with pytest.raises(fd.errors.CheckpointError, match="has no tensor of a delta"):
        fd.load_opendelta(write(tmp_path / "c", {**data, "scaled": None}, {}), model, scaled=None)


# -- what OpenDelta cannot hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            fd.LoraConfig(modified_modules=["embeddings.word_embeddings"]),
            r"lora at .*: its LoRA acts on nn\.Linear only",
        ),
        (
            fd.LoraConfig(modified_modules=["query"], enable_lora=(True, False)),
            r"enable_lora=\(True, False\) has no count",
        ),
        (
            fd.LowRankAdapterConfig(modified_modules=["query"], reduction_factor=2, low_rank_rank=2),
            "correct for rank 1 only",
        ),
        (
            fd.CompacterConfig(
                modified_modules=["query"], reduction_factor=2, hypercomplex_division=2, shared_phm_rule=True
            ),
            "shared_phm_rule is not implemented there",
        ),
        (fd.AdapterConfig(modified_modules=["query"], batch_dim=1), "batch_dim=1 has no counterpart"),
        (fd.SoftPromptConfig(soft_token_num=2, strip=True), "strip=True has no counterpart"),
    ],
)
def test_what_opendelta_cannot_hold(config: fd.BaseDeltaConfig, message: str, tmp_path: Path) -> None:
    delta = fd.DeltaModel(bert(), config)
    with pytest.raises(fd.errors.CheckpointError, match=f"{message}.*Save it in .* format: delta.save_finetuned"):
        fd.save_opendelta(delta, delta.init(0), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_stacks_unions_and_other_methods_are_refused(tmp_path: Path) -> None:
    model = bert()
    delta = fd.LoraModel(model, modified_modules=["query"])
    with pytest.raises(fd.errors.StackError, match=r"fd\.take\(stack, 0\)"):
        fd.save_opendelta(delta, delta.init(0, n=3), tmp_path / "saved")
    params = delta.init(0)
    with pytest.raises(fd.errors.ParamsError, match=r"params lack 6 leaves of the delta, first .*lora_A"):
        fd.save_opendelta(delta, {}, tmp_path / "saved")
    both = fd.DeltaModel(model, delta.configs[0], fd.AdapterConfig(modified_modules=["query"]))
    with pytest.raises(fd.errors.CheckpointError, match=r"config per folder, but this delta has 2 \(lora, adapter\)"):
        fd.save_opendelta(both, both.init(0), tmp_path / "saved")
    with pytest.raises(fd.errors.CheckpointError, match=r"written by OpenDelta: write fd\.load_opendelta\("):
        fd.AutoDeltaModel.from_finetuned(fd.save_opendelta(delta, params, tmp_path / "saved"), model)


def test_scales_that_opendelta_cannot_be_told(tmp_path: Path) -> None:
    """One scale for all sites becomes lora_alpha, bit for bit; unlike ones are multiplied into B."""
    model = bert()
    delta = fd.LoraModel(model, lora_r=3, modified_modules=["query"], use_rslora=True)
    scales = {name: delta.init(0)[name] for name in delta.constants}
    params = fd.tree.randn_like(delta.init(0), seed=1) | scales
    loaded, again = fd.load_opendelta(fd.save_opendelta(delta, params, tmp_path / "one"), model)
    assert all(torch.equal(again[name], params[name]) for name in delta.names)
    scales = {name: torch.tensor(1.0 + i) for i, name in enumerate(delta.constants)}
    loaded, again = fd.load_opendelta(fd.save_opendelta(delta, params | scales, tmp_path / "two"), model)
    torch.testing.assert_close(logits(loaded.apply, "bert", again), logits(delta.apply, "bert", params | scales))
    delta = fd.ParallelAdapterModel(model, bottleneck_dim=3, scaled=4.0, modified_modules=["query", "query"])
    params = fd.tree.randn_like(delta.init(0), seed=1) | {name: torch.tensor(4.0) for name in delta.constants}
    loaded, again = fd.load_opendelta(fd.save_opendelta(delta, params, tmp_path / "three"), model)
    torch.testing.assert_close(logits(loaded.apply, "bert", again), logits(delta.apply, "bert", params))


def test_t5_prefixes_are_written_only_as_what_they_become(tmp_path: Path) -> None:
    delta = fd.PrefixModel(t5(), prefix_token_num=2, embed_dim=3, mid_dim=4)
    with pytest.raises(fd.errors.CheckpointError, match=r'position bias in the first layer only.*compat="opendelta"'):
        fd.save_opendelta(delta, delta.init(0), tmp_path / "saved")
    folder = fd.save_opendelta(delta, delta.init(0), tmp_path / "saved", compat="opendelta")
    assert next(iter(torch.load(folder / "pytorch_model.bin"))) == "encoder.block.0.layer.0.reparams.wte.weight"


@pytest.mark.parametrize("name", ["mt5", "xlm-roberta"])
def test_prefixes_of_models_that_were_built_from_others(name: str, tmp_path: Path) -> None:
    """Once mT5 had T5's modules and XLM-R RoBERTa's, so OpenDelta knows them."""
    family = FAMILIES[name]
    delta = fd.PrefixModel(family.model, prefix_token_num=2, reparameterize=False)
    params = fd.tree.randn_like(delta.init(0), seed=1)
    if name == "mt5":
        with pytest.raises(fd.errors.CheckpointError, match="position bias in the first layer only"):
            fd.save_opendelta(delta, params, tmp_path / "saved")
    folder = fd.save_opendelta(delta, params, tmp_path / "saved", compat="opendelta")
    loaded, again = fd.load_opendelta(folder, family.model)
    found = [d.apply(p, **family.example()).logits for d, p in ((delta, params), (loaded, again))]
    torch.testing.assert_close(found[1], found[0])


def test_a_bias_where_opendelta_makes_one_too_late(tmp_path: Path) -> None:
    delta = fd.BitFitModel(t5())
    params = delta.init(0)
    folder = fd.save_opendelta(delta, params, tmp_path / "saved")
    assert not any("layer_norm" in key for key in torch.load(folder / "pytorch_model.bin"))
    name = next(name for name in delta.names if "layer_norm" in name)
    with pytest.raises(
        fd.errors.CheckpointError, match=r"cannot hold .*layer_norm\.bias: T5LayerNorm has none.*exclude_modules"
    ):
        fd.save_opendelta(delta, params | {name: params[name] + 1}, tmp_path / "other")


def test_a_stack_of_unlike_members_is_sent_to_unpack(tmp_path):
    backbone = bert()
    small, large = (fd.LoraModel(backbone, lora_r=rank, modified_modules=["query"]) for rank in (2, 4))
    packed, stack = fd.pack([(small, small.init(0)), (large, large.init(1))])
    with pytest.raises(fd.errors.CheckpointError, match=r"different members.*fd\.unpack\(delta, stack\)"):
        fd.save_opendelta(packed, fd.take(stack, 0), tmp_path / "run")
    for number, (delta, params) in enumerate(fd.unpack(packed, stack)):
        fd.save_opendelta(delta, params, tmp_path / str(number))
