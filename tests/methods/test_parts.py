"""Parts of fused projections: LoRA on q alone of q,k,v, against dense weights whose rows are counted by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES
from handmade import ENGINES, assert_close, raises_saying, random_params
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.structures.parts import Part, place

# {family: (fused layer, {part: its rows})}, for width 8 with 2 heads of 4; Phi-3 has 4 heads of 2, and 2 of keys.
SIDE_BY_SIDE = {"q": range(8), "k": range(8, 16), "v": range(16, 24)}
BY_HEAD = {
    "q": [0, 1, 2, 3, 12, 13, 14, 15],
    "k": [4, 5, 6, 7, 16, 17, 18, 19],
    "v": [8, 9, 10, 11, 20, 21, 22, 23],
}
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("transformer.h.1.attn.c_attn", SIDE_BY_SIDE),
    "modernbert": ("model.layers.1.attn.Wqkv", SIDE_BY_SIDE),
    "gpt_neox": ("gpt_neox.layers.1.attention.query_key_value", BY_HEAD),
    "bloom": ("transformer.h.1.self_attention.query_key_value", BY_HEAD),
    "phi3": ("model.layers.1.self_attn.qkv_proj", {"q": range(8), "k": range(8, 12), "v": range(12, 16)}),
}
PAIRS = [(family, names) for family in FUSED for names in (("q",), ("k",), ("q", "v"), ("v", "k", "q"))]


def delta_on(family: str, *parts: str, **fields: Any) -> fd.DeltaModel:
    """LoRA of rank 2 on parts of the fused layer of the second block."""
    names = [f"block@.1.attn@.{part}@" for part in parts]
    return fd.LoraModel(FAMILIES[family].model, lora_r=2, lora_alpha=3, modified_modules=names, **fields)


def dense(path: str, params: dict[str, Tensor], rows: dict[str, Any], parts: tuple[str, ...]) -> Tensor:
    """``s B A`` in the rows of each part: q before k before v, in whatever order they were named."""
    a, b = params[f"{path}.lora.lora_A"], params[f"{path}.lora.lora_B"]
    change = torch.zeros(24, a.shape[1])
    done = 0
    for i, part in enumerate(sorted(parts, key="qkv".index)):
        for row in rows[part]:
            for column in range(a.shape[1]):
                change[row, column] = 1.5 * sum(b[done, r] * a[2 * i + r, column] for r in range(2))
            done += 1
    assert done == len(b)
    return change


def changed(family: str, path: str, change: Tensor) -> nn.Module:
    """The model with ``change`` (out, in) added to the weight at ``path``."""
    model = copy.deepcopy(FAMILIES[family].model)
    weight = model.get_submodule(path).weight
    change = change.mT if type(model.get_submodule(path)).__name__ == "Conv1D" else change[: len(weight)]
    with torch.no_grad():
        weight += change
    return model


@pytest.mark.parametrize(
    ("family", "parts"), PAIRS, ids=lambda value: value if isinstance(value, str) else "".join(value)
)
def test_lora_on_parts_is_its_dense_change_in_their_rows(family: str, parts: tuple[str, ...]) -> None:
    path, rows = FUSED[family]
    delta, inputs = delta_on(family, *parts), FAMILIES[family].example()
    params = random_params(delta)
    assert list(delta.sites) == [path]
    model = changed(family, path, dense(path, params, rows, parts))
    with torch.no_grad():
        expected, found = model(**inputs).logits, delta.apply(params, **inputs).logits
        assert float((expected - FAMILIES[family].model(**inputs).logits).abs().max()) > 1e-4
    assert_close(found, expected)
    assert_close(delta.merge(params)[f"{path}.weight"], model.state_dict()[f"{path}.weight"])
    assert_close(delta.merged(params)(**inputs).logits, expected)


def test_only_the_queries_that_bloom_itself_reads_change() -> None:
    delta = delta_on("bloom", "q")
    params, path = random_params(delta), FUSED["bloom"][0]
    x = torch.randn(2, 3, 8)

    def split(model: nn.Module) -> tuple[Tensor, ...]:
        attention = model.get_submodule(path.rpartition(".")[0])
        return attention._reshape(attention.query_key_value(x))

    before, after = split(delta.backbone), split(delta.merged(params))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]


@pytest.mark.parametrize(
    ("parts", "enabled"),
    [(("q",), (True, False, False)), (("q", "v"), (True, False, True)), (("q", "k", "v"), (True, True, True))],
)
@pytest.mark.parametrize("family", FUSED)
def test_common_names_and_enable_lora_are_the_same(
    family: str, parts: tuple[str, ...], enabled: tuple[bool, ...]
) -> None:
    named = delta_on(family, *parts)
    path = FUSED[family][0]
    told = fd.LoraModel(named.backbone, lora_r=2, lora_alpha=3, enable_lora=enabled, modified_modules=[path])
    assert named.shapes == told.shapes
    params = random_params(named)
    assert all(torch.equal(leaf, told.init(4)[name]) for name, leaf in named.init(4).items())
    inputs = FAMILIES[family].example()
    with torch.no_grad():
        assert torch.equal(named.apply(params, **inputs).logits, told.apply(params, **inputs).logits)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_every_engine_runs_parts(family: str) -> None:
    delta, inputs = delta_on(family, "q", "v"), FAMILIES[family].example(3)
    stack = random_params(delta, 3)
    with torch.no_grad():
        found = [delta.apply_many(stack, **inputs, engine=engine).logits for engine in ENGINES]
        rows = delta.apply_rows(stack, torch.tensor([2, 0, 1]), **inputs).logits
    for other in found[1:]:
        assert_close(other, found[0])
    for row, member in enumerate((2, 0, 1)):
        assert_close(rows[row], found[0][member, row])


def test_parts_differentiate_map_and_compile() -> None:
    delta, inputs = delta_on("phi3", "q", "v"), FAMILIES["phi3"].example()
    params = random_params(delta)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return delta.apply(params, **inputs, use_cache=False).logits.square().sum()

    found = torch.func.grad(loss)(params)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in params.items()}
    loss(leaves).backward()
    for name, leaf in leaves.items():
        if name in delta.constants:
            continue
        assert found[name].any()
        assert_close(found[name], leaf.grad)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_close(compiled(params), loss(params))


@pytest.mark.parametrize("family", FUSED)
def test_own_sites_of_lora_are_query_and_value_of_each_fused_layer(family: str) -> None:
    delta = fd.LoraModel(FAMILIES[family].model, lora_r=2)
    path, rows = FUSED[family]
    sizes = len(rows["q"]), len(rows["v"])
    assert len(delta.sites) == 2
    assert delta.shapes[f"{path}.lora.lora_A"] == (4, 8)
    assert delta.shapes[f"{path}.lora.lora_B"] == (sum(sizes), 2)


def test_keys_and_values_of_gpt2s_cross_attention() -> None:
    delta = fd.LoraModel(FAMILIES["gpt2"].model, lora_r=2, modified_modules=["1.crossattn@.v@", "1.crossattn@.q@"])
    at = "transformer.h.1.crossattention"
    params = random_params(delta)
    assert list(delta.sites) == [f"{at}.c_attn", f"{at}.q_attn"]
    change = delta.merge(params)[f"{at}.c_attn.weight"] - delta.backbone.state_dict()[f"{at}.c_attn.weight"]
    assert not change[:, :8].any()
    assert change[:, 8:].all()


def test_the_gate_alone() -> None:
    for family, path in (("phi3", "model.layers.1.mlp.gate_up_proj"), ("modernbert", "model.layers.1.mlp.Wi")):
        model = FAMILIES[family].model
        delta = fd.LoraModel(model, lora_r=2, modified_modules=["1.ff@.up@"])
        change = delta.merge(random_params(delta))[f"{path}.weight"] - model.state_dict()[f"{path}.weight"]
        assert not change[:12].any()
        assert change[12:].all()
        whole = fd.LoraModel(model, lora_r=2, modified_modules=["1.ff@.w1@"])
        assert whole.shapes[f"{path}.lora.lora_B"] == (24, 2)


def test_a_layer_that_is_named_as_a_whole_is_whole() -> None:
    path = FUSED["gpt2"][0]
    for names in (["1.attn@.q,k,v@"], ["1.attn.c_attn"], ["1.attn@.q@", "1.attn.c_attn"]):
        delta = fd.LoraModel(FAMILIES["gpt2"].model, lora_r=2, modified_modules=names)
        assert delta.shapes == {f"{path}.lora.lora_A": (2, 8), f"{path}.lora.lora_B": (24, 2), f"{path}.lora.scale": ()}


def test_an_excluded_part_leaves_the_others() -> None:
    def parts(*names: str, without: str) -> tuple[str, ...]:
        delta = fd.LoraModel(FAMILIES["gpt2"].model, modified_modules=names, exclude_modules=["block@.0", without])
        (group,) = delta.plan.attachments.values()
        return tuple(part.name for part in group[0].site.parts)

    assert parts("attn@.q@", "attn@.v@", without="attn@.q@") == ("v",)
    assert parts("attn.c_attn", without="attn@.k@") == ("q", "v")
    with raises_saying(fd.errors.MatchError, "exclude_modules", "attn@.q@"):
        parts("attn@.q@", without="attn@.q@")


def test_two_deltas_may_mean_different_parts_of_one_layer() -> None:
    family = FAMILIES["gpt_neox"]
    q, v = (fd.LoraConfig(lora_r=2, modified_modules=[f"1.attn@.{part}@"]) for part in "qv")
    both = fd.DeltaModel(family.model, q, v)
    params = random_params(both)
    path, rows = FUSED["gpt_neox"]
    change = both.merge(params)[f"{path}.weight"] - family.model.state_dict()[f"{path}.weight"]
    assert sorted(change.any(1).nonzero().flatten().tolist()) == sorted([*rows["q"], *rows["v"]])


@pytest.mark.parametrize(
    ("make", "pieces"),
    [
        (
            lambda: fd.AdapterModel(FAMILIES["gpt2"].model, modified_modules=["attn@.q@"]),
            ["adapter", "transformer.h.0.attn.c_attn", "q,k,v@", "whole"],
        ),
        (
            lambda: fd.BitFitModel(FAMILIES["phi3"].model, modified_modules=["attn@.q@", "attn@.v@"]),
            ["bitfit", "q, v", "qkv_proj"],
        ),
        (
            lambda: delta_on("gpt2", "q", enable_lora=(False, False, True)),
            ["enable_lora", "modified_modules", "q"],
        ),
        (
            lambda: fd.LoraModel(FAMILIES["gpt2"].model, enable_lora=(True, False), modified_modules=["c_attn"]),
            ["enable_lora", "2", "3", "q, k, v"],
        ),
    ],
    ids=["adapter", "bitfit", "contradiction", "count"],
)
def test_parts_that_cannot_be(make: Callable[[], Any], pieces: list[str]) -> None:
    with raises_saying(fd.errors.MatchError, *pieces):
        make()


def test_a_method_without_parts_takes_all_of_them_as_the_whole() -> None:
    model = FAMILIES["gpt2"].model
    all_parts = fd.BitFitModel(model, modified_modules=["attn@.q@", "attn@.k@", "attn@.v@"])
    assert all_parts.shapes["transformer.h.0.attn.c_attn.bitfit.bias"] == (24,)


def test_a_layer_that_was_cut_has_no_known_parts() -> None:
    model = FAMILIES["phi3"].build()
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.qkv_proj = nn.Linear(8, 13)
    with raises_saying(fd.errors.MatchError, "model.layers.0.self_attn.qkv_proj", "13", "whole"):
        fd.LoraModel(model)


def test_pieces_are_placed_where_their_indices_say() -> None:
    parts = Part("v", 3, 4, 2), Part("q", 0, 2, 2)
    pieces = torch.randn(5, 2, 3), torch.randn(5, 4, 3)
    expected = torch.zeros(5, 10, 3)
    for part, piece in zip(parts, pieces, strict=True):
        for position, index in enumerate(part.indices(10).tolist()):
            expected[:, index] = piece[:, position]
    assert torch.equal(place(pieces, parts, 10, axis=1), expected)
    assert torch.equal(torch.vmap(lambda a, b: place([a, b], parts, 10, axis=0))(*pieces), expected)
