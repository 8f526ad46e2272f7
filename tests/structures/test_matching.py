"""Names: which modules a key means, which are left out, which backbone leaves are trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import MLP, Block, Layers, Twice, raises_saying
from torch import nn
from zoo import ZOO

import funcdelta as fd
from funcdelta.match import near

LAYER = "bert.encoder.layer"


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    return ZOO["bert"].build()


def sites(model: nn.Module, **fields: Any) -> list[str]:
    return list(fd.LoraModel(backbone_model=model, **fields).sites)


def trained(model: nn.Module, *names: str, **fields: Any) -> list[str]:
    """The backbone leaves that stand in params."""
    delta = fd.LoraModel(model, unfrozen_modules=["deltas", *names], **fields)
    return [name for name in delta.names if ".lora." not in name]


@pytest.mark.parametrize(
    ("key", "target", "expected"),
    [
        ("transformer.layer.0.attention.out_lin", "0.attention.out_lin", True),
        ("transformer.layer.0.attention.out_lin", "attention.out_lin", True),
        ("transformer.layer.0.attention.out_lin", "out_lin", True),
        ("transformer.layer.0.attention.out_lin", "lin", False),
        ("transformer.layer.0.attention.out_lin", "attention", False),
        ("transformer.layer.10.attention", "0.attention", False),
        ("out_lin", "out_lin", True),
        ("transformer.layer.3.attention", r"[r][0-5]\.attention", True),
        ("transformer.layer.13.attention", r"[r][0-5]\.attention", False),
        ("transformer.layer.3.attention.q", r"[r][0-5]\.attention", False),
        ("transformer.layer.13.attention", r"[r]\d+\.attention", True),
        ("attention.self.attention", "[r]attention", False),
        ("layer.0.wi_1", r"[r]wi(_\d)?", True),
        ("", "query", False),
        ("query", "", False),
    ],
)
def test_find_key_takes_whole_tokens_at_the_end(key: str, target: str, expected: bool) -> None:
    assert fd.find_key(key, [target]) is expected
    assert fd.find_key(key, target) is expected
    assert fd.find_key(key, ["no.such.name", target]) is expected


def test_find_key_of_no_targets() -> None:
    assert not fd.find_key("a.b", [])


def test_find_module_gives_parent_name_and_child(bert: nn.Module) -> None:
    parent, name, child = fd.find_module(bert, f"{LAYER}.1.attention.self.query")
    assert parent is bert.get_submodule(f"{LAYER}.1.attention.self")
    assert name == "query"
    assert child is parent.query
    with raises_saying(fd.errors.MatchError, "qurey", "query"):
        fd.find_module(bert, f"{LAYER}.1.attention.self.qurey")


def test_sites_are_a_dry_run_that_prints_the_matched_paths(bert: nn.Module) -> None:
    found = fd.LoraModel(bert, modified_modules=["query", "value"]).sites
    expected = [f"{LAYER}.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
    assert list(found) == expected
    assert len(found) == 4
    assert expected[0] in found
    assert all(path in str(found) for path in expected)


def test_order_of_sites_is_the_backbones(bert: nn.Module) -> None:
    assert sites(bert, modified_modules=["value", "query"]) == sites(bert, modified_modules=["query", "value"])


def test_a_single_name_is_one_name(bert: nn.Module) -> None:
    assert sites(bert, modified_modules="query") == sites(bert, modified_modules=["query"])


def test_regular_expressions_choose_layers() -> None:
    assert sites(Layers(), modified_modules=[r"[r]layer\.[0-5]"]) == [f"layer.{i}" for i in range(6)]
    assert sites(Layers(), modified_modules=[r"[r]1[01]"]) == ["layer.10", "layer.11"]
    assert sites(Layers(), modified_modules=["1"]) == ["layer.1"]


def test_excluded_paths_end_at_a_dot() -> None:
    left = sites(Layers(), modified_modules=[r"[r]layer\.\d+"], exclude_modules=["layer.1"])
    assert left == [f"layer.{i}" for i in range(12) if i != 1]


def test_an_excluded_module_goes_with_everything_below_it(bert: nn.Module) -> None:
    for excluded in ([f"{LAYER}.1"], f"{LAYER}.1"):
        assert sites(bert, modified_modules=["query"], exclude_modules=excluded) == [f"{LAYER}.0.attention.self.query"]


def test_exclude_without_modified_keeps_the_methods_own_sites(bert: nn.Module) -> None:
    """OpenDelta silently made no delta at all of this."""
    expected = [f"{LAYER}.0.attention.self.{name}" for name in ("query", "value")]
    assert sites(bert, exclude_modules=[f"{LAYER}.1"]) == expected


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", {"query", "value"}),
        ("roberta", {"query", "value"}),
        ("deberta_v2", {"query_proj", "value_proj"}),
        ("distilbert", {"q_lin", "v_lin"}),
        ("gpt2", {"c_attn"}),
        ("opt", {"q_proj", "v_proj"}),
        ("llama", {"q_proj", "v_proj"}),
        ("qwen3", {"q_proj", "v_proj"}),
        ("t5", {"q", "v"}),
    ],
)
def test_lora_has_sites_of_its_own_on_known_families(family: str, expected: set[str]) -> None:
    found = sites(ZOO[family].build())
    assert {path.rpartition(".")[2] for path in found} == expected
    assert len(found) >= 2


def test_own_sites_are_found_inside_a_wrapper() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ZOO["bert"].build()

    assert sites(Wrapped())[0] == f"inner.{LAYER}.0.attention.self.query"


def test_common_names_mean_the_same_everywhere(bert: nn.Module) -> None:
    assert sites(bert, modified_modules=["attn@.q@"]) == sites(bert, modified_modules=["query"])
    assert sites(ZOO["t5"].build(), modified_modules=["ff@.w2@"]) == sites(
        ZOO["t5"].build(), modified_modules=["DenseReluDense.wo"]
    )
    assert sites(bert, modified_modules=["attn@.q@", "pooler.dense"])[-1] == "bert.pooler.dense"


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        ({"modified_modules": ["qurey"]}, ["modified_modules", "'qurey'", "query"]),
        ({"modified_modules": ["query", "qurey"]}, ["modified_modules", "'qurey'", "query"]),
        ({"modified_modules": ["uery"]}, ["modified_modules", "'uery'", "query"]),
        ({"modified_modules": ["[r]qurey.*"]}, ["modified_modules", "[r]qurey.*"]),
        ({"modified_modules": ["[r]("]}, ["[r](", "regular expression"]),
        ({"modified_modules": []}, ["modified_modules", "no site"]),
        ({"modified_modules": ["attn@.x@"]}, ["attn@.x@", "attn@.q@"]),
        ({"modified_modules": ["query"], "exclude_modules": ["LayerNrom"]}, ["exclude_modules", "LayerNrom"]),
        ({"modified_modules": ["query"], "exclude_modules": ["bert"]}, ["exclude_modules", "query"]),
        (
            {"modified_modules": ["query"], "unfrozen_modules": ["deltas", "clasifier"]},
            ["unfrozen_modules", "'clasifier'", "classifier"],
        ),
        ({"modified_modules": ["attention"]}, [f"{LAYER}.0.attention", "lora", "BertAttention", "self.query"]),
        ({"modified_modules": ["LayerNorm"]}, ["LayerNorm", "lora", "Linear"]),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_name_that_means_nothing_is_an_error(bert: nn.Module, fields: dict[str, Any], pieces: list[str]) -> None:
    with raises_saying(fd.errors.MatchError, *pieces):
        sites(bert, **fields)


def test_own_sites_on_an_unknown_family_name_the_remedy() -> None:
    with raises_saying(fd.errors.MatchError, "MLP", "modified_modules"):
        sites(MLP())


def test_a_container_names_the_layers_below_it() -> None:
    with raises_saying(fd.errors.MatchError, "0", "Block", "Linear", "inner"):
        sites(nn.Sequential(Block(), Block()), modified_modules=["0"])


def test_a_bare_layer_is_no_site_of_its_own() -> None:
    with raises_saying(fd.errors.MatchError, "Linear"):
        sites(nn.Linear(4, 3), modified_modules=[""])


def test_trained_leaves_by_module_by_suffix_and_by_parameter(bert: nn.Module) -> None:
    query = {"modified_modules": ["query"]}
    assert trained(bert, "classifier", **query) == ["classifier.weight", "classifier.bias"]
    assert trained(bert, "pooler", **query) == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert trained(bert, "query.bias", **query) == [f"{LAYER}.{i}.attention.self.query.bias" for i in (0, 1)]
    norms = trained(bert, "LayerNorm", **query)
    assert len(norms) == 10
    assert all("LayerNorm" in name for name in norms)
    biases = [name for name, _ in bert.named_parameters() if name.endswith("bias")]
    assert trained(bert, "bias", **query) == biases
    assert len(trained(bert, r"[r]layer\.1", **query)) == 16


def test_trained_leaves_end_at_a_dot() -> None:
    assert trained(Layers(), "layer.1", modified_modules=["0"]) == ["layer.1.weight", "layer.1.bias"]


def test_trained_leaves_stand_in_the_backbones_order_once(bert: nn.Module) -> None:
    both = trained(bert, "classifier", "pooler", "classifier.weight", modified_modules=["query"])
    assert both == ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("family", "head"), [("gpt2", "lm_head"), ("opt", "lm_head"), ("llama", "lm_head"), ("roberta", "classifier")]
)
def test_a_head_can_be_trained_by_name(family: str, head: str) -> None:
    """OpenDelta's exclude_modules=["lm_head"] made this impossible."""
    architecture = ZOO[family]
    delta = fd.LoraModel(architecture.build(), unfrozen_modules=["deltas", head])
    leaves = [name for name in delta.names if ".lora." not in name]
    assert leaves

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return architecture.call(lambda **inputs: delta.apply(params, **inputs), architecture.inputs(2)).square().sum()

    grads = torch.func.grad(loss)(delta.init(0))
    assert all(grads[name].any() for name in leaves)


def test_lora_on_a_head_that_is_named() -> None:
    assert sites(ZOO["llama"].build(), modified_modules=["lm_head"]) == ["lm_head"]


def test_a_module_under_two_names_is_one_site() -> None:
    assert sites(Twice(), modified_modules=["first"]) == ["first"]
    assert sites(Twice(), modified_modules=["second"]) == ["first"]
    assert sites(Twice(), modified_modules=["first", "second"]) == ["first"]


def test_bitfit_spreads_to_the_layers_below_a_container(bert: nn.Module) -> None:
    found = list(fd.BitFitModel(bert, modified_modules=["0.attention"]).sites)
    assert found == [
        f"{LAYER}.0.attention.{name}"
        for name in ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    ]
    kept = list(
        fd.BitFitModel(bert, modified_modules=["0.attention"], exclude_modules=[f"{LAYER}.0.attention.self"]).sites
    )
    assert kept == found[3:]


def test_weight_normed_layers_are_sites_not_their_parametrisation() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 3)).eval()
    delta = fd.LoraModel(model, modified_modules=["0", "1"])
    assert list(delta.sites) == ["0", "1"]
    x = torch.randn(2, 4)
    assert torch.equal(delta.apply({}, x), model(x))
    torch.testing.assert_close(delta.apply(delta.init(0), x), model(x))
    assert list(fd.BitFitModel(model, modified_modules=["0"]).sites) == ["0"]


def test_five_near_tokens_leave_no_room_for_whole_names() -> None:
    names = [f"layer.self_attn.{token}" for token in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")]
    assert near("self_atn.q_proj", names).startswith(" Near names: q_proj")
