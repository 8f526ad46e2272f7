"""Common names: where every family's parts are, what names mean, and defaults that never come to nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from handmade import MLP, raises_saying
from subjects import SMALL
from torch import nn
from zoo_architecture import builder

import funcdelta as fd
from funcdelta import structures
from funcdelta.methods.config import METHODS
from funcdelta.structures.parts import equal_parts

on_every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
BUILT_IN = [method for method, config in METHODS.items() if config.__module__.startswith("funcdelta.")]


def find(model: nn.Module, name: str, common: bool | None = None) -> list[str]:
    return list(structures.Names(model).find(name, common))


def sites(model: nn.Module, *names: str, **fields: Any) -> list[str]:
    return list(fd.LoraModel(model, modified_modules=list(names), **fields).sites)


def in_order(model: nn.Module, paths: list[str]) -> list[str]:
    order = {path: i for i, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(paths, key=order.__getitem__)


class Holder(nn.Module):
    """Holds modules under names of their own."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


# -- where things are ----------------------------------------------------------------------------------------------


def test_every_table_has_a_model_here() -> None:
    towers = {"clip_text_model", "clip_vision_model"}
    assert set(structures.FAMILIES) - towers == set(FAMILIES) - {"gated t5", "clip"}


@on_every_family
def test_a_common_name_means_what_is_written_by_hand(family: Family) -> None:
    for name in family.names:
        assert find(family.model, name) == in_order(family.model, family.expected(name)), name
        if name != "layer_norm@" and any(name in places for _, places in family.layers):
            numbered = in_order(family.model, family.expected(name, layer=1))
            assert find(family.model, f"block@.1.{name}") == find(family.model, f"1.{name}") == numbered, name
            assert find(family.model, rf"[r]block@\.[1-9]\.{name}") == numbered, name


@on_every_family
def test_every_module_has_one_name(family: Family) -> None:
    names = fd.inspect.common_names(family.model)
    assert list(names) == [path for path, _ in family.model.named_modules(remove_duplicate=False) if path]
    for stack, _ in family.layers:
        assert names[stack].endswith("block@")
        assert names[f"{stack}.1"] == f"{names[stack]}.1"


@pytest.mark.parametrize(
    ("family", "path", "name"),
    [
        ("bert", "bert.encoder.layer.0.attention.self.query", "bert.encoder@.block@.0.attn@.q@"),
        ("bert", "bert.encoder.layer.0.attention.self", "bert.encoder@.block@.0.attn@.self"),
        ("bert", "bert.embeddings.LayerNorm", "bert.embeddings.LayerNorm"),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.o", "decoder@.block@.1.crossattn@.proj@"),
        ("t5", "decoder.block.1.layer.2.DenseReluDense", "decoder@.block@.1.ff@.DenseReluDense"),
        ("gpt2", "transformer.h.0.attn.c_attn", "transformer.decoder@.block@.0.attn@.q,k,v@"),
        ("gpt2", "transformer.ln_f", "transformer.decoder@.layer_norm@"),
        ("opt", "model.decoder.layers.0.fc2", "model.decoder@.block@.0.ff@.w2@"),
        ("opt", "model.decoder.layers.1.final_layer_norm", "model.decoder@.block@.1.layer_norm@"),
    ],
)
def test_translations_that_opendelta_gives_too(family: str, path: str, name: str) -> None:
    assert fd.inspect.common_names(FAMILIES[family].model)[path] == name


def test_older_releases_of_vit() -> None:
    """Transformers 5.0 built it as a BERT."""
    attention = Holder(attention=Holder(query=nn.Linear(4, 4), key=nn.Linear(4, 4), value=nn.Linear(4, 4)))
    attention.add_module("output", Holder(dense=nn.Linear(4, 4)))
    block = Holder(
        attention=attention, intermediate=Holder(dense=nn.Linear(4, 4)), output=Holder(dense=nn.Linear(4, 4))
    )
    model = Holder(vit=Holder(encoder=Holder(layer=nn.ModuleList([block]))))
    model.config = FAMILIES["vit"].model.config  # type: ignore[assignment]
    assert sites(model, "attn@.q@", "attn@.proj@") == [
        f"vit.encoder.layer.0.attention.{name}" for name in ("attention.query", "output.dense")
    ]
    assert find(model, "ff@.w2@") == ["vit.encoder.layer.0.output.dense"]


# -- wrappers and several models -----------------------------------------------------------------------------------


def test_each_model_inside_a_module_keeps_to_its_own_table() -> None:
    both = Holder(encoder=FAMILIES["t5"].model, layer=FAMILIES["bert"].model, wte=nn.Linear(2, 2))
    for name in ("attn@.q@", "ff@.w2@", "embeddings@", "block@.0.attn@"):
        expected = [
            f"{at}.{path}"
            for at, family in (("encoder", "t5"), ("layer", "bert"))
            for path in find(FAMILIES[family].model, name)
        ]
        assert find(both, name) == expected
    names = fd.inspect.common_names(both)
    assert names["wte"] == "wte"
    assert names["layer.bert.encoder.layer.0.output"] == "layer.bert.encoder@.block@.0.ff@"
    assert structures.families(both) == ["t5", "bert"]
    assert len(fd.LoraModel(both).sites) == 2 * 4 + 2 * 2


def test_a_model_of_an_unknown_type_inside_a_known_one_has_no_table() -> None:
    tower = FAMILIES["gemma3"].model
    assert not [path for path in find(tower, "attn@") if "vision" in path]
    assert fd.inspect.common_names(tower)["model.vision_tower.encoder.layers.0.self_attn"].endswith("self_attn")


def test_a_backbone_twice_in_one_module_is_found_twice() -> None:
    a, b = (FAMILIES["bert"].build() for _ in range(2))
    found = sites(Holder(a=a, b=b), "attn@.q@")
    assert found == [f"{at}.bert.encoder.layer.{i}.attention.self.query" for at in "ab" for i in (0, 1)]


def test_a_stack_of_layers_without_its_model_is_translated_too() -> None:
    bert, bart, t5 = (FAMILIES[name].model for name in ("bert", "bart", "t5"))
    assert sites(bert.bert.encoder, "attn@.q@") == [f"layer.{i}.attention.self.query" for i in (0, 1)]
    assert fd.inspect.common_names(bart.model.decoder)["layers.1.encoder_attn.q_proj"] == "block@.1.crossattn@.q@"
    # The second sublayer of a T5 is one thing in the encoder and another in the decoder.
    with raises_saying(fd.errors.MatchError, "attn@.q@", "T5Stack"):
        sites(t5.encoder, "attn@.q@")


# -- what names mean -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "old", "same"),
    [
        ("bert", "attn.q", "attn@.q@"),
        ("bert", "attn", "attn@"),
        ("t5", "ff", "ff@"),
        ("opt", "ff", "ff@"),
        ("gpt2", "block.1.attn.v", "block@.1.attn@.v@"),
        ("t5", "layer_norm", "layer_norm@"),
        ("opt", r"[r]block\.1\.ff\.w\d", "1.ff@.w1@ 1.ff@.w2@"),
        ("gpt2", "final_layer_norm", "decoder@.layer_norm@"),
        ("t5", "final_layer_norm", "encoder@.layer_norm@ decoder@.layer_norm@"),
    ],
)
def test_names_of_opendelta_before_the_at_sign(family: str, old: str, same: str) -> None:
    model = FAMILIES[family].model
    expected = {
        path: parts for name in same.split() for path, parts in structures.Names(model).find(name, None).items()
    }
    assert structures.Names(model).find(old, True) == expected


def test_names_without_the_at_sign_are_the_backbones_own_unless_it_is_said() -> None:
    model = FAMILIES["gpt2"].model
    assert find(model, "q") == []
    assert find(model, "q", True) == find(model, "q@")
    # A name that is no common one is looked for among the backbone's own.
    assert sites(FAMILIES["bert"].model, "query", common_structure=True) == sites(FAMILIES["bert"].model, "query")
    assert sites(FAMILIES["bert"].model, "attn@.q@", "transform.dense")[-1] == "cls.predictions.transform.dense"


def test_excluded_modules_by_common_names() -> None:
    model = FAMILIES["bert"].model
    assert sites(model, "q@", "v@", exclude_modules=["v@"]) == sites(model, "q@")
    assert sites(model, "q@", exclude_modules=["block@.0"]) == ["bert.encoder.layer.1.attention.self.query"]
    assert sites(model, "q@", exclude_modules=["block.0"], common_structure=True) == sites(model, "1.attn@.q@")
    assert list(fd.LoraModel(model, exclude_modules=["1.attn@.v@"]).sites) == sites(model, "q@", "0.attn@.v@")


def test_trained_leaves_by_common_names() -> None:
    def trained(family: str, *names: str, **fields: Any) -> list[str]:
        delta = fd.LoraModel(FAMILIES[family].model, unfrozen_modules=["deltas", *names], **fields)
        return [name for name in delta.names if ".lora." not in name]

    norms = ["self_attn_layer_norm", "final_layer_norm"]
    layers = [
        f"model.decoder.layers.{i}.{norm}.{leaf}" for i in (0, 1) for norm in norms for leaf in ("weight", "bias")
    ]
    final = [f"model.decoder.final_layer_norm.{leaf}" for leaf in ("weight", "bias")]
    assert sorted(trained("opt", "layer_norm@")) == sorted(final + layers)
    assert trained("opt", "1.ff@.w2@.bias") == ["model.decoder.layers.1.fc2.bias"]
    assert sorted(trained("opt", "layer_norm", "final_layer_norm", common_structure=True)) == sorted(final + layers)
    # Tied: the head is trained under the first name of its tensors.
    assert trained("bert", "lm_head@.proj@") == ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"]
    assert trained("gpt2", "0.attn@.q,k,v@") == [f"transformer.h.0.attn.c_attn.{leaf}" for leaf in ("weight", "bias")]
    with raises_saying(fd.errors.MatchError, "unfrozen_modules", "attn@.q@", "c_attn", "q,k,v@"):
        trained("gpt2", "attn@.q@")


def test_targets_in_the_backbones_own_names() -> None:
    bert = FAMILIES["bert"].model
    assert structures.resolve(bert, ("query",)) == ("query",)
    targets = structures.resolve(bert, ("attn@.q@", "pooler"))
    assert sites(bert, *targets[:-1]) == sites(bert, "attn@.q@")
    # Where one path ends another, the target still means one module.
    twice = Holder(inner=Holder(bert=bert.bert), bert=bert.bert.encoder)
    assert [
        p
        for p, _ in twice.named_modules(remove_duplicate=False)
        if fd.find_key(p, structures.resolve(twice, ("0.attn@",)))
    ] == find(twice, "0.attn@")


@pytest.mark.parametrize(
    ("family", "fields", "pieces"),
    [
        ("bert", {"modified_modules": ["attn@.x@"]}, ["modified_modules", "attn@.x@", "attn@.q@"]),
        ("mixtral", {"modified_modules": ["ff@.w3@"]}, ["ff@.w3@", "ff@.w1@"]),
        ("bert", {"modified_modules": ["attn@.q@"], "common_structure": False}, ["common_structure", "attn@.q@"]),
        ("bert", {"modified_modules": ["attn.x"], "common_structure": True}, ["attn.x", "attn.q"]),
        ("bert", {"exclude_modules": ["block@.7"]}, ["exclude_modules", "block@.7"]),
        ("bert", {"unfrozen_modules": ["deltas", "layer_nrom@"]}, ["unfrozen_modules", "layer_nrom@", "layer_norm@"]),
        ("mixtral", {"modified_modules": ["ff@.w2@"]}, ["model.layers.0.mlp", "lora", "MixtralSparseMoeBlock"]),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_common_name_that_means_nothing_is_an_error(family: str, fields: dict[str, Any], pieces: list[str]) -> None:
    with raises_saying(fd.errors.MatchError, *pieces):
        fd.LoraModel(FAMILIES[family].model, **fields)


@pytest.mark.parametrize("use", [fd.inspect.common_names, lambda model: sites(model, "attn@.q@"), fd.LoraModel])
def test_a_module_without_a_table_says_which_families_exist(use: Any) -> None:
    with raises_saying(fd.errors.MatchError, "MLP", "bert", "whisper", "clip_vision_model"):
        use(MLP())


# -- one's own family ----------------------------------------------------------------------------------------------


@contextmanager
def known_family(kind: str, table: structures.Table) -> Iterator[None]:
    structures.FAMILIES[kind] = table
    try:
        yield
    finally:
        del structures.FAMILIES[kind]


def test_a_new_family_is_one_table() -> None:
    class Config:
        model_type = "pair_of_layers"

    model = builder(
        lambda: Holder(h=nn.ModuleList([Holder(qv=nn.Linear(3, 8), up=nn.Linear(3, 4)) for _ in range(2)]))
    )()
    model.config = Config()  # type: ignore[assignment]
    fused = structures.Fused("attn@", ("q", "v"), lambda config, names, width: equal_parts(names, width))
    table = {"h": "block@", "h.*": {"qv": fused, "up": ("ff@.w1@", "ff@.w2@", "attn@.proj@")}}
    with known_family("pair_of_layers", table):
        assert fd.inspect.common_names(Holder(inner=model))["inner.h.1.qv"] == "inner.block@.1.attn@.q,v@"
        delta = fd.LoraModel(model, lora_r=1, modified_modules=["1.attn@.v@"])
        assert delta.shapes["h.1.qv.lora.lora_B"] == (4, 1)
        assert list(fd.AdapterModel(model).sites) == ["h.0.up", "h.1.up"]
    with raises_saying(fd.errors.MatchError, "no family"):
        fd.inspect.common_names(model)


# -- defaults ------------------------------------------------------------------------------------------------------


@on_every_family
def test_own_sites_of_lora_and_adapters_are_those_written_by_hand(family: Family) -> None:
    model = family.model
    expected = {"lora": ("attn@.q@", "attn@.v@"), "adapter": ("attn@.proj@", "ff@.w2@")}
    for method, names in expected.items():
        paths = in_order(model, list(dict.fromkeys(path for name in names for path in family.expected(name))))
        delta = fd.DeltaModel(model, METHODS[method](), example=family.example())
        assert list(delta.sites) == paths


@on_every_family
def test_own_sites_of_bitfit_are_the_layers_below_those_written_by_hand(family: Family) -> None:
    delta = fd.BitFitModel(family.model)
    above = [path for name in ("attn@", "ff@", "layer_norm@") for path in family.expected(name)]
    modules = dict(family.model.named_modules())
    kinds = ("Linear", "Conv1D", "LayerNorm", "RMSNorm")
    expected = [
        path
        for path, module in modules.items()
        if type(module).__name__.endswith(kinds) and any(path == one or path.startswith(one + ".") for one in above)
    ]
    assert list(delta.sites) == expected


# Where a method's own sites are refused, and what the refusal says.
REFUSED = {
    ("prefix", "deberta-v2"): ("deberta.encoder.layer.0.attention", "attention interface"),
    ("prefix", "bloom"): ("transformer.h.0.self_attention", "attention interface"),
    # What sees prepares the mask outside the language model.
    **{
        ("soft_prompt", name): ("does not embed its input by a table of tokens",) for name in ("whisper", "vit", "clip")
    },
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", BUILT_IN)
def test_every_method_has_own_sites_that_act_or_says_why_not(method: str, name: str) -> None:
    family = FAMILIES[name]
    inputs = family.example()

    def outputs() -> list[torch.Tensor]:
        delta = fd.DeltaModel(family.model, METHODS[method](**SMALL.get(method, {})), example=inputs)
        params = {name: leaf + 0.1 for name, leaf in delta.init(0).items()}
        assert sum(leaf.numel() for leaf in params.values()) > 0
        with torch.no_grad():
            found = [delta.apply({}, **inputs), delta.apply(params, **inputs)]
        return [next(value for value in output.values() if isinstance(value, torch.Tensor)) for output in found]

    if (method, name) in REFUSED:
        with raises_saying(fd.errors.FuncdeltaError, *REFUSED[method, name]):
            outputs()
        return
    bare, found = outputs()
    assert found.shape != bare.shape or float((found - bare).abs().max()) > 1e-5
