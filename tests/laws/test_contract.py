"""The public contract, called as a user would: construct, init, apply, train."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, assert_acts, assert_close, assert_engines_agree, hugging_face, raises_saying, random_params
from torch import Tensor, nn
from torch.nn import functional as F

import funcdelta as fd
from funcdelta.methods import config as configs

NAMES = """
    BaseDeltaConfig AutoDeltaConfig LoraConfig AdapterConfig BitFitConfig
    DeltaModel LoraModel AdapterModel BitFitModel AutoDeltaModel register
    stack unstack take cat broadcast members partition combine seeds
    value_and_grad unbind find_key find_module higher_order tree optim
"""
METHODS = """
    apply apply_many apply_rows attach bind configs constants delta_type detach freeze_module init merge merged mode
    names refresh save_finetuned shapes sites trainable training
"""


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def lora(model: nn.Module | None = None, *names: str, **fields: Any) -> fd.DeltaModel:
    targets = list(names or ("a", "b"))
    return fd.LoraModel(backbone_model=model or MLP().eval(), lora_r=2, modified_modules=targets, **fields)


# -- construction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES.split())
def test_public_names(name: str) -> None:
    assert hasattr(fd, name)


@pytest.mark.parametrize("name", METHODS.split())
def test_what_a_delta_has(name: str) -> None:
    assert hasattr(lora(), name)


@pytest.mark.parametrize("name", ["add", "sub", "scale", "lerp", "mean", "vdot", "norm", "ravel", "map", "randn_like"])
def test_leafwise_arithmetic(name: str) -> None:
    assert hasattr(fd.tree, name)


def test_all_ways_to_make_a_delta_make_the_same(x: Tensor) -> None:
    model = MLP().eval()
    fields = {"lora_r": 4, "lora_alpha": 8, "modified_modules": ["a", "b"]}
    config = fd.LoraConfig(**fields)
    data = {"delta_type": "lora", **fields}
    made = [
        fd.LoraModel(backbone_model=model, **fields),
        fd.LoraModel(model, **fields),
        fd.DeltaModel(model, config),
        fd.AutoDeltaModel.from_config(data, backbone_model=model),
        fd.AutoDeltaModel.from_config(config, backbone_model=model),
        fd.AutoDeltaModel.from_config({**data, "lora_alpha": 1}, backbone_model=model, lora_alpha=8),
        fd.AutoDeltaModel.from_config(config.replace(lora_alpha=1), backbone_model=model, lora_alpha=8),
    ]
    for delta in made:
        assert delta.configs == (config,)
        assert delta.names == made[0].names
        assert delta.backbone is model
        assert all(torch.equal(leaf, made[0].init(3)[name]) for name, leaf in delta.init(3).items())
        assert not isinstance(delta, nn.Module)


def test_what_a_delta_says_of_itself() -> None:
    delta = lora(unfrozen_modules=["deltas", "head"])
    assert delta.names == (
        "a.lora.lora_A",
        "a.lora.lora_B",
        "a.lora.scale",
        "b.lora.lora_A",
        "b.lora.lora_B",
        "b.lora.scale",
        "head.weight",
        "head.bias",
    )
    assert delta.shapes["a.lora.lora_A"] == (2, 4)
    assert delta.shapes["b.lora.lora_B"] == (8, 2)
    assert delta.shapes["head.weight"] == (3, 8)
    assert delta.constants == ("a.lora.scale", "b.lora.scale")
    assert [name for name in delta.names if not delta.trainable(name)] == list(delta.constants)
    assert list(delta.init(0)) == list(delta.init(0, n=2)) == list(delta.names)
    assert {name: tuple(leaf.shape) for name, leaf in delta.init(0).items()} == delta.shapes
    assert "MLP" in repr(delta)
    assert "lora" in repr(delta)


def test_configs_are_frozen_hashable_data() -> None:
    for config in (
        fd.LoraConfig(modified_modules=["a"], enable_lora=[True, False]),
        fd.AdapterConfig(bottleneck_dim=3),
        fd.BitFitConfig(unfrozen_modules=["deltas", "head"], name="slow", batch_dim=1),
    ):
        assert {config: 1}[config.replace()] == 1
        data = json.loads(json.dumps(config.to_dict()))
        assert data["delta_type"] == config.delta_type
        assert fd.AutoDeltaConfig.from_dict(data) == config
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.name = "other"
    assert fd.LoraConfig().replace(lora_r=3).lora_r == 3
    assert (fd.LoraConfig().lora_r, fd.LoraConfig().lora_alpha, fd.LoraConfig().lora_dropout) == (8, 16, 0.0)
    assert (fd.AdapterConfig().bottleneck_dim, fd.AdapterConfig().non_linearity) == (24, "gelu_new")


# -- init ----------------------------------------------------------------------------------------------------------


def test_seeds_of_members() -> None:
    delta = lora(unfrozen_modules=["deltas", "head"])
    stack = delta.init(0, n=8)
    some = delta.init(fd.seeds(0, 8)[1::3])
    generator = delta.init(torch.Generator().manual_seed(5))
    for name, leaf in stack.items():
        assert torch.equal(delta.init(0, n=2)[name], leaf[:2])
        assert torch.equal(some[name], leaf[1::3])
        assert torch.equal(delta.init(torch.Generator().manual_seed(5))[name], generator[name])
        assert not leaf.requires_grad
    assert not torch.equal(stack["a.lora.lora_A"][0], stack["a.lora.lora_A"][1])
    assert fd.members(delta.init([3, 1, 4])) == 3
    assert torch.equal(delta.init(torch.tensor(3))["a.lora.lora_A"], delta.init(3)["a.lora.lora_A"])


def test_copied_and_fresh_heads() -> None:
    model = MLP().eval()
    before = snapshot(model)
    copied = lora(model, unfrozen_modules=["deltas", "head"]).init(0, n=3)
    assert all(torch.equal(copied["head.weight"][i], model.head.weight) for i in range(3))
    fresh = lora(model, unfrozen_modules=["deltas", "head"], unfrozen_init="fresh").init(0, n=3)
    assert_acts(fresh["head.weight"][0], fresh["head.weight"][1])
    copied["head.weight"].zero_()
    assert_unchanged(model, before)


@pytest.mark.parametrize("seed", ["0", 0.5, None, [0.5], "12"])
def test_what_is_no_seed(seed: Any) -> None:
    with raises_saying(fd.errors.ParamsError, "seed"):
        lora().init(seed)


# -- apply ---------------------------------------------------------------------------------------------------------


def test_the_output_is_of_the_backbones_own_type() -> None:
    delta, inputs = hugging_face("bert")
    output = delta.apply(delta.init(0), **inputs)
    assert type(output) is type(delta.backbone(**inputs))
    assert torch.equal(delta(delta.init(0), **inputs).logits, output.logits)
    assert isinstance(delta.apply(delta.init(0), **inputs, return_dict=False), tuple)
    hidden = delta.apply_many(delta.init(0, n=3), **inputs, output_hidden_states=True)
    assert type(hidden) is type(output)
    assert hidden.hidden_states[1].shape[:2] == (3, 4)


def test_params_may_be_computed_by_another_network(x: Tensor) -> None:
    delta = lora()
    start = random_params(delta)
    maps = {name: torch.randn(3, *leaf.shape) for name, leaf in start.items() if name not in delta.constants}

    def made_of(code: Tensor) -> dict[str, Tensor]:
        return {
            name: torch.einsum("z,z...->...", code, maps[name]) if name in maps else leaf
            for name, leaf in start.items()
        }

    code = (0.1 * torch.randn(3)).requires_grad_()
    delta.apply(made_of(code), x).square().sum().backward()
    assert code.grad is not None
    assert code.grad.all()
    codes = (0.1 * torch.randn(5, 3)).requires_grad_()
    delta.apply_many(torch.vmap(made_of)(codes), x, engine="fold").square().sum().backward()
    assert codes.grad is not None
    assert codes.grad.all()


def test_a_full_dict_is_accepted_and_may_be_changed(x: Tensor) -> None:
    model = MLP().eval()
    delta = lora(model, unfrozen_modules=["deltas", "head"])
    params = random_params(delta)
    full = delta.attach(params)
    assert set(full) == {*params, *dict(model.named_parameters())}
    assert torch.equal(delta.apply(full, x), delta.apply(params, x))
    doubled = {**full, "b.weight": 2 * full["b.weight"]}
    assert_acts(delta.apply(doubled, x), delta.apply(params, x))
    plain = delta.detach(full)
    assert set(plain) == set(dict(model.named_parameters()))
    assert torch.equal(torch.func.functional_call(model, plain, (x,)), model(x))
    assert torch.equal(delta.apply(plain, x), model(x))


def test_freezing_is_a_partition(x: Tensor) -> None:
    delta = lora()
    full = delta.attach(random_params(delta))
    factors = {name for name in delta.names if delta.trainable(name)}
    expectations = {
        ("deltas", "head"): factors | {"head.weight", "head.bias"},
        ("deltas",): factors,
        ("b",): {"b.weight", "b.bias"},
        ("deltas", "bias"): factors | {"a.bias", "b.bias", "head.bias"},
    }
    for exclude, expected in expectations.items():
        trainable, frozen = delta.freeze_module(full, exclude=list(exclude))
        assert set(trainable) == expected
        assert trainable.keys() | frozen.keys() == full.keys()
        assert not trainable.keys() & frozen.keys()
    assert set(delta.freeze_module(full)[0]) == factors
    trainable, frozen = delta.freeze_module(full, exclude=["deltas", "b"])
    grads = torch.func.grad(lambda part: delta.apply({**frozen, **part}, x).square().sum())(trainable)
    assert all(grad.any() for grad in grads.values())


# -- training ------------------------------------------------------------------------------------------------------


def test_ten_lines_train_a_sweep_and_save_it(tmp_path: Any) -> None:
    backbone = MLP().eval()
    before = snapshot(backbone)
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    delta = fd.LoraModel(backbone_model=backbone, modified_modules=["a", "b"], unfrozen_modules=["deltas", "head"])
    stack = delta.init(seed=0, n=6)
    optimiser = fd.optim.adamw(lr=torch.tensor([1e-4, 1e-3, 1e-2, 1e-4, 1e-3, 1e-2]))
    state = optimiser.init(stack)
    step = fd.value_and_grad(lambda p, x, y: F.cross_entropy(delta.apply(p, x), y))
    first, _ = step(stack, x, y)
    for _ in range(30):
        losses, grads = step(stack, x, y)
        updates, state = optimiser.update(grads, state, stack)
        stack = fd.tree.add(stack, updates)
    assert (losses < first).all()
    assert losses[2] < losses[0]
    assert all(torch.equal(stack[name], delta.init(seed=0, n=6)[name]) for name in delta.constants)
    delta.save_finetuned(stack, tmp_path / "sweep")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "sweep", backbone_model=backbone)
    assert torch.equal(again.apply_many(loaded, x), delta.apply_many(stack, x))
    assert_unchanged(backbone, before)


def test_torchs_own_optimiser_on_params_and_on_a_view(x: Tensor) -> None:
    delta = lora(unfrozen_modules=["deltas", "head"])
    before = snapshot(delta.backbone)
    params = {name: leaf.clone().requires_grad_(delta.trainable(name)) for name, leaf in random_params(delta).items()}
    view = delta.bind(random_params(delta))
    optimisers = [
        torch.optim.AdamW([leaf for leaf in params.values() if leaf.requires_grad], lr=0.01),
        torch.optim.AdamW(view.parameters(), lr=0.01),
    ]
    for _ in range(3):
        for optimiser, output in zip(optimisers, (delta.apply(params, x), view(x)), strict=True):
            optimiser.zero_grad()
            output.square().sum().backward()
            optimiser.step()
    for name, leaf in fd.unbind(view).items():
        assert_close(leaf, params[name].detach())
    assert_unchanged(delta.backbone, before)


# -- a method of one's own -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GatedConfig(fd.BaseDeltaConfig):
    """A gated bottleneck after the site, in two pure functions."""

    bottleneck_dim: int = 3

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        down = torch.randn(self.bottleneck_dim, site.width, generator=rng) / site.width
        return {"down": down, "up": torch.zeros(site.width, self.bottleneck_dim), "gate": torch.zeros(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + torch.sigmoid(p["gate"]) * torch.relu(y @ p["down"].mT) @ p["up"].mT


def test_a_method_of_ones_own_is_a_method_like_any_other(
    tmp_path: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Registered for this test alone: it acts on the last axis only, and the laws run on convolutions too.
    monkeypatch.setitem(configs.METHODS, "test_contract_gated", GatedConfig)
    fd.register("test_contract_gated")(GatedConfig)
    model = MLP().eval()
    delta = fd.DeltaModel(model, GatedConfig(modified_modules=["a", "b"]), fd.LoraConfig(modified_modules=["b"]))
    assert_close(delta.apply(delta.init(0), x), model(x))
    stack = random_params(delta, 3)
    assert_acts(assert_engines_agree(delta, stack, x)[0], model(x))
    torch.func.hessian(lambda p: delta.apply(p, x).sum())(fd.take(stack, 0))
    made = fd.AutoDeltaModel.from_config({"delta_type": "test_contract_gated", "modified_modules": ["a"]}, model)
    assert made.shapes["a.test_contract_gated.down"] == (3, 8)
    delta.save_finetuned(stack, tmp_path / "gated")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "gated", backbone_model=model)
    assert torch.equal(again.apply_many(loaded, x), delta.apply_many(stack, x))
