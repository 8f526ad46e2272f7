"""What users of OpenDelta write out of habit: it works, or the error has the line to write instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, assert_acts, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

DELTA_LINES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "freeze_module()": (
        lambda d: d.freeze_module(),
        ("freeze_module", "trainable, frozen = delta.freeze_module(", "attach"),
    ),
    "freeze_module(exclude=...)": (
        lambda d: d.freeze_module(exclude=["deltas", "head"]),
        ("trainable, frozen = delta.freeze_module(",),
    ),
    "freeze_module(module)": (
        lambda d: d.freeze_module(d.backbone, exclude=["deltas"], set_state_dict=True),
        ("MLP", "trainable, frozen = delta.freeze_module("),
    ),
    "attach()": (lambda d: d.attach(), ("full = delta.attach(params)",)),
    "detach()": (lambda d: d.detach(), ("plain = delta.detach(full)",)),
    "train()": (lambda d: d.train(), ("delta = delta.mode(train=True)",)),
    "train(False)": (lambda d: d.train(False), ("delta = delta.mode(train=False)",)),
    "eval()": (lambda d: d.eval(), ("delta = delta.mode(train=False)",)),
    "forward(x)": (lambda d: d.forward(torch.zeros(1, 4)), ("delta.apply(params",)),
    "delta(x)": (lambda d: d(torch.zeros(1, 4)), ("Tensor", "delta.apply(params")),
    "save_finetuned(path)": (lambda d: d.save_finetuned("run"), ("delta.save_finetuned(params, path)",)),
    "save_finetuned()": (lambda d: d.save_finetuned(), ("delta.save_finetuned(params, path)",)),
    "backend='bmt'": (
        lambda d: fd.LoraModel(d.backbone, modified_modules=["a"], backend="bmt"),
        ("backend='bmt'", "leave out"),
    ),
    "interactive_modify": (
        lambda d: fd.LoraModel(d.backbone, modified_modules=["a"], interactive_modify=True),
        ("interactive_modify", "modified_modules=['a']", "one of the two"),
    ),
}
ATTRIBUTES = ("state_dict", "load_state_dict", "parameters", "named_parameters", "to", "cuda", "config")


@pytest.fixture
def delta() -> fd.DeltaModel:
    return fd.LoraModel(backbone_model=MLP().eval(), modified_modules=["a", "b"])


@pytest.mark.parametrize("habit", DELTA_LINES)
def test_a_habit_raises_with_the_line_to_write(habit: str, delta: fd.DeltaModel) -> None:
    before = snapshot(delta.backbone)
    write, pieces = DELTA_LINES[habit]
    with raises_saying(fd.errors.FuncdeltaError, *pieces):
        write(delta)
    assert_unchanged(delta.backbone, before)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_a_module_has_and_a_delta_has_not(name: str, delta: fd.DeltaModel) -> None:
    with raises_saying(AttributeError, name, "Write"):
        getattr(delta, name)
    assert not hasattr(delta, name)


def test_a_misspelt_attribute_names_its_neighbours(delta: fd.DeltaModel) -> None:
    with raises_saying(AttributeError, "aply_many", "apply_many"):
        _ = delta.aply_many


def test_names_of_opendelta(delta: fd.DeltaModel) -> None:
    assert delta.delta_type == "lora"
    assert fd.LoraModel.config_class is fd.LoraConfig
    assert fd.AdapterModel.config_class is fd.AdapterConfig
    assert fd.BitFitModel.config_class is fd.BitFitConfig
    assert delta.backbone_model is delta.backbone
    assert fd.LoraConfig.delta_type == "lora"


def test_arguments_of_opendeltas_constructors() -> None:
    delta = fd.LoraModel(
        backbone_model=MLP().eval(),
        lora_r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        modified_modules=["a", "b"],
        exclude_modules="b",
        unfrozen_modules=["deltas", "head"],
        common_structure=False,
        interactive_modify=False,
        backend="hf",
    )
    assert list(delta.sites) == ["a"]
    assert "head.weight" in delta.names
    other = fd.AdapterModel(
        backbone_model=MLP(), bottleneck_dim=24, non_linearity="gelu_new", modified_modules=["a"], backend="hf"
    )
    assert other.shapes["a.adapter.down_proj.weight"] == (24, 8)
    assert fd.BitFitModel(backbone_model=MLP(), modified_modules=["a"]).delta_type == "bitfit"


def test_excluded_and_trained_modules_as_strings() -> None:
    config = fd.LoraConfig(modified_modules="a", exclude_modules="b", unfrozen_modules="deltas")
    assert (config.modified_modules, config.exclude_modules, config.unfrozen_modules) == (("a",), ("b",), ("deltas",))


def test_leaving_out_deltas_from_what_trains() -> None:
    """In OpenDelta this froze the delta itself, silently."""
    with raises_saying(fd.errors.ConfigError, "'deltas'", "unfrozen_modules=['deltas', 'head']", "partition"):
        fd.LoraModel(MLP(), modified_modules=["a"], unfrozen_modules=["head"])


@pytest.mark.parametrize(
    ("field", "ours"),
    [("r", "lora_r"), ("target_modules", "modified_modules"), ("modules_to_save", "unfrozen_modules")],
)
def test_fields_of_peft_name_ours(field: str, ours: str) -> None:
    for write in (
        lambda: fd.LoraConfig(**{field: ["a"]}),
        lambda: fd.LoraModel(MLP(), **{field: ["a"]}),
        lambda: fd.LoraConfig().replace(**{field: ["a"]}),
        lambda: fd.AutoDeltaConfig.from_dict({"delta_type": "lora", field: ["a"]}),
    ):
        with raises_saying(fd.errors.ConfigError, f"'{field}'", ours):
            write()


def test_names_may_come_as_any_collection() -> None:
    for names in (["a", "b"], ("a", "b"), {"a", "b"}, {"a": 1, "b": 2}, (name for name in "ab")):
        config = fd.LoraConfig(modified_modules=names)
        assert set(config.modified_modules) == {"a", "b"}
        assert hash(config) == hash(config.replace())
        assert list(fd.DeltaModel(MLP(), config).sites) == ["a", "b"]


def test_freezing_takes_opendeltas_arguments_and_may_be_done_twice(delta: fd.DeltaModel) -> None:
    full = delta.attach(random_params(delta))
    first = delta.freeze_module(full, ["deltas", "head"], True)
    for again in (
        delta.freeze_module(module=full, exclude=["deltas", "head"], set_state_dict=False),
        delta.freeze_module(full, exclude=("deltas", "head")),
    ):
        assert [part.keys() for part in again] == [part.keys() for part in first]
    assert set(delta.freeze_module(full, exclude="deltas")[0]) == {n for n in delta.names if delta.trainable(n)}
    with raises_saying(fd.errors.MatchError, "haed", "head"):
        delta.freeze_module(full, exclude=["deltas", "haed"])


def test_freezing_by_a_prefix_ends_at_a_dot() -> None:
    from handmade import Layers

    delta = fd.LoraModel(Layers(), modified_modules=["0"])
    trainable, _ = delta.freeze_module(delta.attach(delta.init(0)), exclude=["layer.1"])
    assert set(trainable) == {"layer.1.weight", "layer.1.bias"}


def test_attached_and_detached_again(delta: fd.DeltaModel) -> None:
    """OpenDelta cannot attach after it has detached."""
    x, params = torch.randn(3, 4), random_params(delta)
    full = delta.attach(params)
    plain = delta.detach(full)
    assert torch.equal(delta.apply(plain, x), delta.backbone(x))
    again = {**plain, **params}
    assert torch.equal(delta.apply(again, x), delta.apply(full, x))
    assert_acts(delta.apply(again, x), delta.apply(plain, x))


def test_two_deltas_on_one_backbone_at_once() -> None:
    """In OpenDelta the second delta finds the first one's modules, and both save everything."""
    model, x = MLP().eval(), torch.randn(3, 4)
    first = fd.LoraModel(model, modified_modules=["a"])
    second = fd.LoraModel(model, modified_modules=["a", "b"])
    one, two = random_params(first), random_params(second)
    assert set(first.names) < set(second.names)
    output = first.apply(one, x)
    second.apply(two, x)
    assert torch.equal(first.apply(one, x), output)


def test_from_config_with_overriding_fields(delta: fd.DeltaModel) -> None:
    """OpenDelta ignores the fields, and fails on a dict."""
    for config in (delta.configs[0], delta.configs[0].to_dict()):
        made = fd.AutoDeltaModel.from_config(config, backbone_model=delta.backbone, lora_r=2)
        assert made.shapes["a.lora.lora_A"] == (2, 4)
        assert type(made.configs[0]) is fd.LoraConfig
    made = fd.LoraModel.from_config(delta.configs[0], backbone_model=delta.backbone)
    assert made.configs == delta.configs
    with raises_saying(fd.errors.ConfigError, "BitFitConfig", "LoraModel"):
        fd.LoraModel.from_config(fd.BitFitConfig(modified_modules=["a"]), backbone_model=delta.backbone)
    with raises_saying(fd.errors.ConfigError, "lora_rank", "lora_r"):
        fd.AutoDeltaModel.from_config(delta.configs[0], backbone_model=delta.backbone, lora_rank=2)


def test_configs_from_folders_files_and_with_a_backbone(tmp_path: Path) -> None:
    delta = fd.AdapterModel(MLP().eval(), bottleneck_dim=3, modified_modules=["a"])
    delta.save_finetuned(delta.init(0), tmp_path / "run")
    config = fd.AdapterConfig.from_finetuned(tmp_path / "run")
    assert config.bottleneck_dim == 3
    assert config.backbone_class == "MLP"
    assert fd.AdapterConfig.from_finetuned(tmp_path / "run" / "config.json").bottleneck_dim == 3
    assert fd.AdapterConfig.from_finetuned(str(tmp_path / "run"), backbone_model=delta.backbone).bottleneck_dim == 3
    assert fd.AutoDeltaConfig.from_finetuned(tmp_path / "run", bottleneck_dim=5).bottleneck_dim == 5
    with raises_saying(fd.errors.ConfigError, "AdapterConfig", "LoraConfig"):
        fd.LoraConfig.from_finetuned(tmp_path / "run")


@pytest.mark.parametrize("name", ["config.json", "anything"])
def test_a_url_is_read_or_named(name: str) -> None:
    with raises_saying(fd.errors.FuncdeltaError, f"https://localhost:1/{name}"):
        fd.AutoDeltaConfig.from_finetuned(f"https://localhost:1/{name}")


def test_arguments_of_loading(tmp_path: Path, delta: fd.DeltaModel) -> None:
    params = random_params(delta)
    delta.save_finetuned(params, tmp_path / "run")
    options: dict[str, Any] = {"check_hash": True, "cache_dir": None, "force_download": False, "local_files_only": True}
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=delta.backbone, **options)
    assert again.names == delta.names
    assert all(torch.equal(loaded[name], leaf) for name, leaf in params.items())
    with raises_saying(fd.errors.CheckpointError, "no/such"):
        fd.AutoDeltaModel.from_finetuned("no/such/folder", backbone_model=delta.backbone)


def test_the_drawn_head_is_saved_when_it_is_trained(tmp_path: Path) -> None:
    """OpenDelta issue 73: after loading, accuracy collapsed, because the random classifier was not saved."""
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs(3)
    delta = fd.LoraModel(model, unfrozen_modules=["deltas", "classifier"], unfrozen_init="fresh")
    params = random_params(delta)
    delta.save_finetuned(params, tmp_path / "run")
    fresh = ZOO["bert"].build()
    with torch.no_grad():
        fresh.classifier.weight.normal_()
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=fresh)
    assert torch.equal(again.apply(loaded, **inputs).logits, delta.apply(params, **inputs).logits)


@pytest.mark.parametrize(
    ("build", "given"),
    [
        (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.Linear(6, 3)), lambda: (torch.zeros(2, 4),)),
        (lambda: ZOO["bert"].build(), lambda: ZOO["bert"].inputs(2)),
    ],
    ids=["positional", "keywords"],
)
def test_example_stands_for_pseudo_inputs(build: Callable[[], nn.Module], given: Callable[[], Any]) -> None:
    model = build().eval()
    before, state = snapshot(model), torch.get_rng_state()
    target = "[r]^0" if isinstance(model, nn.Sequential) else "attention"
    delta = fd.AdapterModel(model, modified_modules=[target], example=given())
    assert all(len(shape) in (1, 2) for shape in delta.shapes.values())
    assert_unchanged(model, before)
    assert torch.equal(state, torch.get_rng_state())


def test_a_delta_is_no_module_for_a_trainer(delta: fd.DeltaModel) -> None:
    """OpenDelta issue 25: users pass the delta where the model belongs."""
    assert not isinstance(delta, nn.Module)
    with raises_saying(AttributeError, "parameters", "params"):
        torch.optim.AdamW(delta.parameters())


def test_saving_twice_saves_the_delta_alone(tmp_path: Path, delta: fd.DeltaModel) -> None:
    """Without freezing first, OpenDelta saved the whole model."""
    from safetensors.torch import load_file

    params: dict[str, Tensor] = random_params(delta)
    for _ in range(2):
        delta.save_finetuned(params, tmp_path / "run")
    assert set(load_file(tmp_path / "run" / "delta.safetensors")) == set(delta.names)
    with raises_saying(fd.errors.FuncdeltaError, "b.weight"):
        delta.save_finetuned(delta.attach(params), tmp_path / "run")
