"""Compacters against OpenDelta's own numbers and against modules made of ``torch.kron``."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MLP, assert_acts, assert_close, assert_engines_agree, logits, raises_saying, random_params
from opendelta_saved import SAVED, saved_backbone, saved_delta
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd
from funcdelta.functional.hypercomplex import times_kronecker_sum

SMALL: dict[str, Any] = {"reduction_factor": 2, "hypercomplex_division": 2}


@pytest.mark.parametrize("name", SAVED)
def test_opendeltas_logits(opendelta_fixtures: Path, name: str) -> None:
    model, inputs = saved_backbone(opendelta_fixtures / name)
    config, params, expected = saved_delta(opendelta_fixtures / name / "compacter")
    assert config.pop("bottleneck_dim") is config.pop("sequential") is None  # nothing read them
    fields = fd.CompacterConfig.from_dict(config)
    assert fields.replace(reduction_factor=16) == fd.CompacterConfig(
        **{key: config[key] for key in ("modified_modules", "exclude_modules", "common_structure")},
        **{key: config[key] for key in ("backbone_class", "backbone_checkpoint_name", "backbone_hash")},
    )
    delta = fd.CompacterModel(model, reduction_factor=config["reduction_factor"])
    assert params.keys() == set(delta.names)
    assert_acts(expected, logits(model(**inputs)))
    assert float((logits(delta.apply(params, **inputs)) - expected).abs().max()) < 1e-5


class ByHand(nn.Module):
    """The site and two layers whose matrices are sums of ``torch.kron``: h + U relu(D h + d) + u."""

    def __init__(self, site: nn.Module, params: dict[str, Tensor], path: str) -> None:
        super().__init__()
        self.site, self.params, self.path = site, params, path

    def leaf(self, layer: str, name: str) -> Tensor | None:
        """The site's own leaf, or the one that all sites share, or the one that both layers share too."""
        names = (f"{self.path}.compactor.{layer}.{name}", f"compactor.{layer}.{name}", f"compactor.{name}")
        return next((self.params[key] for key in names if key in self.params), None)

    def layer(self, x: Tensor, layer: str) -> Tensor:
        rule = self.leaf(layer, "phm_rule")
        if rule is None:
            rule = torch.bmm(self.leaf(layer, "phm_rule_left"), self.leaf(layer, "phm_rule_right"))
        blocks = self.leaf(layer, "W")
        if blocks is None:
            blocks = torch.bmm(self.leaf(layer, "W_left"), self.leaf(layer, "W_right"))
        matrix = sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(rule, blocks, strict=True))
        bias = self.leaf(layer, "b")
        return x @ matrix + (0 if bias is None else bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.site(x)
        return h + self.layer(F.relu(self.layer(h, "down_sampler")), "up_sampler")


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "rank 3": {"phm_rank": 3},
    "division 4": {"hypercomplex_division": 4},
    "division 1": {"hypercomplex_division": 1},
    "full blocks": {"factorized_phm": False},
    "rule in factors": {"factorized_phm_rule": True},
    "shared rule": {"shared_phm_rule": True},
    "shared rule in factors": {"shared_phm_rule": True, "factorized_phm_rule": True},
    "shared weights": {"shared_W_phm": True},
    "all shared": {
        "shared_W_phm": True,
        "shared_phm_rule": True,
        "factorized_phm": False,
        "use_bias_up_sampler": False,
        "use_bias_down_sampler": False,
    },
    "fixed rule": {"learn_phm": False},
    "one bias": {"use_bias_down_sampler": False, "kronecker_prod": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_hand_written_module(name: str) -> None:
    model, x = MLP().eval(), torch.randn(2, 5, 4)
    fields = SMALL | {"non_linearity": "relu", "phm_c_init": "uniform"} | OPTIONS[name]
    delta = fd.CompacterModel(model, modified_modules=["a", "b"], **fields)
    params, by_hand = random_params(delta), copy.deepcopy(model)
    by_hand.a, by_hand.b = ByHand(model.a, params, "a"), ByHand(model.b, params, "b")
    assert_acts(by_hand(x), model(x))
    assert_close(delta.apply(params, x), by_hand(x))
    assert_engines_agree(delta, random_params(delta, 3), x)
    own = {key.partition("compactor.")[2] for key in params if key.startswith("a.")}
    shared = {key.partition("compactor.")[2] for key in params if key.startswith("compactor.")}
    assert ("phm_rule" in shared) == (name in ("shared rule", "all shared"))
    assert ("down_sampler.W_left" in shared) == (name == "shared weights")
    assert ("down_sampler.b" in own, "up_sampler.b" in own) == {
        "all shared": (False, False),
        "one bias": (False, True),
    }.get(name, (True, True))


@pytest.mark.parametrize(("features", "outputs", "rank"), [(48, 6, 1), (6, 48, 1), (8, 8, 1), (6, 6, 3), (4, 60, 2)])
def test_every_way_to_multiply_gives_one_product(features: int, outputs: int, rank: int) -> None:
    n = 2
    x, rule = torch.randn(3, 5, features), torch.randn(n, n, n)
    left, right = torch.randn(n, features // n, rank), torch.randn(n, rank, outputs // n)
    matrix = torch.stack([torch.kron(rule[i], left[i] @ right[i]) for i in range(n)]).sum(0)
    assert_close(times_kronecker_sum(x, rule, left, right), x @ matrix)


def test_the_wide_side_never_meets_a_dense_matrix() -> None:
    """At the size of BERT the matrix (768, 48) is never made, and far fewer numbers are multiplied."""
    from torch.utils.flop_counter import FlopCounterMode

    x, rule = torch.randn(64, 768), torch.randn(4, 4, 4)
    for features, outputs in ((768, 48), (48, 768)):
        left, right = torch.randn(4, features // 4, 1), torch.randn(4, 1, outputs // 4)
        with FlopCounterMode(display=False) as counter:
            times_kronecker_sum(x[:, :features], rule, left, right)
        assert counter.get_total_flops() < 2 * 64 * 768 * 48 / 5


def test_it_starts_as_opendeltas_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 768))

    def start(**fields: Any) -> dict[str, Tensor]:
        params = fd.CompacterModel(model, modified_modules=["0"], **fields).init(0)
        return {name.partition("compactor.")[2]: leaf for name, leaf in params.items()}

    default = start()
    assert sum(leaf.numel() for leaf in default.values()) == 2576
    assert not default["down_sampler.b"].any()
    assert not default["up_sampler.b"].any()
    assert 0.007 < float(default["down_sampler.phm_rule"].std()) < 0.013
    deviation = 2 / (768 / 4 + 1) ** 0.5  # Glorot's with gain sqrt 2, block by block
    assert 0.9 < float(default["down_sampler.W_left"].std()) / deviation < 1.1
    assert float(default["down_sampler.W_left"].abs().max()) <= 3**0.5 * deviation
    normal = start(hypercomplex_nonlinearity="normal", phm_init_range=0.5, phm_c_init="uniform")
    assert 0.45 < float(normal["down_sampler.W_left"].std()) < 0.55
    assert 0.005 < float(normal["down_sampler.phm_rule"].abs().max()) <= 0.01
    assert float(start(hypercomplex_nonlinearity="glorot-normal")["down_sampler.W_left"].abs().max()) > 2 * deviation


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_a_rule_that_does_not_train_is_saved_all_the_same(tmp_path: Path, shared: bool) -> None:
    model, x = MLP().eval(), torch.randn(5, 4)
    delta = fd.CompacterModel(model, modified_modules=["b"], learn_phm=False, shared_phm_rule=shared, **SMALL)
    rules = [name for name in delta.names if "phm_rule" in name]
    assert list(delta.constants) == rules
    assert len(rules) == (1 if shared else 2)
    params = random_params(delta)
    grads = torch.func.grad(lambda p: delta.apply(p, x).sum())(params)
    assert not any(grads[name].any() for name in rules)
    delta.save_finetuned(params, tmp_path / "run")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=model)
    assert torch.equal(loaded[rules[0]], params[rules[0]])
    assert torch.equal(again.apply(loaded, x), delta.apply(params, x))


def test_one_shared_rule_learns_from_every_site() -> None:
    model, inputs = ZOO["bert"].build(), ZOO["bert"].inputs(2)
    delta = fd.CompacterModel(model, shared_phm_rule=True, **SMALL)
    params = random_params(delta)
    assert sum("phm_rule" in name for name in delta.names) == 1
    assert len(delta.sites) == 4
    grad = torch.func.grad(lambda p: logits(delta.apply(p, **inputs)).sum())(params)["compactor.phm_rule"]
    each = fd.CompacterModel(model, **SMALL)
    split = {name: params[name] if name in params else params["compactor.phm_rule"] for name in each.names}
    assert_close(logits(each.apply(split, **inputs)), logits(delta.apply(params, **inputs)))
    parts = torch.func.grad(lambda p: logits(each.apply(p, **inputs)).sum())(split)
    total = sum(leaf for name, leaf in parts.items() if "phm_rule" in name)
    assert_close(grad, total, 1e-4)


def test_it_says_which_widths_work() -> None:
    pieces = ("its width 30", "30 // 16 = 1", "hypercomplex_division=4", "nearby that work: 64.")
    with raises_saying(fd.errors.MatchError, "compacter cannot act at 0", *pieces):
        fd.CompacterModel(nn.Sequential(nn.Linear(4, 30)), modified_modules=["0"])
    with raises_saying(
        fd.errors.MatchError, "nearby that work: 76, 128", "hypercomplex_division=2", "reduction_factor=12 or"
    ):
        fd.CompacterModel(nn.Sequential(nn.Linear(4, 100)), modified_modules=["0"])
    # A width that has to be measured is asked about too.
    block = nn.Sequential(nn.Sequential(nn.Linear(4, 30), nn.Tanh()))
    with raises_saying(fd.errors.MatchError, "compacter cannot act at 0", "width 30", "30 // 16"):
        fd.CompacterModel(block, modified_modules=["[r]^0"], example=(torch.randn(2, 4),))


@pytest.mark.parametrize(
    ("width", "division", "factor"), [(7, 4, 16), (30, 4, 16), (36, 5, 3), (100, 4, 16), (100, 3, 5)]
)
def test_what_it_suggests_works(width: int, division: int, factor: int) -> None:
    def build(size: int, config: fd.BaseDeltaConfig) -> None:
        fd.DeltaModel(nn.Sequential(nn.Linear(4, size)), config)

    config = fd.CompacterConfig(hypercomplex_division=division, reduction_factor=factor, modified_modules=["0"])
    with pytest.raises(fd.errors.MatchError) as caught:
        build(width, config)
    told = str(caught.value)
    sizes = re.findall(r"\d+", told.partition("nearby that work: ")[2].partition(";")[0])
    assert sizes
    for size in sizes:
        build(int(size), config)
    for name, values in re.findall(r"(\w+)=([\d or]+)", told.partition("write ")[2]):
        for value in re.findall(r"\d+", values):
            build(width, config.replace(**{name: int(value)}))


def test_it_says_what_is_wrong() -> None:
    with raises_saying(
        fd.errors.MatchError, "shared_W_phm=True needs sites of one width", "a has 8", "c has 12", "name="
    ):
        model = nn.ModuleDict({"a": nn.Linear(4, 8), "c": nn.Linear(8, 12)})
        fd.CompacterModel(model, modified_modules=["a", "c"], shared_W_phm=True, **SMALL)
    with raises_saying(fd.errors.ConfigError, "hypercomplex_nonlinearity='phm'", "glorot-uniform"):
        fd.CompacterConfig(hypercomplex_nonlinearity="phm")
    with raises_saying(fd.errors.ConfigError, "phm_c_init='zeros'", "normal", "uniform"):
        fd.CompacterConfig(phm_c_init="zeros")
    with raises_saying(fd.errors.ConfigError, "learn_phm='yes'", "True or False"):
        fd.CompacterConfig(learn_phm="yes")
    with raises_saying(fd.errors.ConfigError, "phm_rank=0", "at least 1"):
        fd.CompacterConfig(phm_rank=0)
    delta = fd.CompacterModel(MLP(), modified_modules=["b"], **SMALL)
    with raises_saying(fd.errors.MergeError, "compactor at b cannot be merged", "non-linear"):
        delta.merge(delta.init(0))
