"""Trees and their folding: every real module once, equal ones together, told apart by nothing but what they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from handmade import Layers, Tied, Twice, raises_saying
from torch import nn
from zoo import ZOO

import funcdelta as fd
from funcdelta.apps.inspect import Node, folded, label, pruned, tree, unfold


def find(root: Node, *names: str) -> Node:
    """The node whose names from below the root are ``names``."""
    for name in names:
        root = next(child for child in root.children if child.name == name)
    return root


def names(root: Node) -> list[str]:
    return [child.name for child in root.children]


def taken_apart(node: Node) -> Iterator[str]:
    """Every real path that clicking through all folded nodes shows, parents first."""
    for part in unfold(node):
        assert len(part.paths) == 1
        yield part.paths[0]
        for child in part.children:
            yield from taken_apart(child)


@pytest.mark.parametrize("name", ZOO)
def test_a_folded_tree_has_every_real_module_once_and_unfolds_to_all(name: str) -> None:
    model = ZOO[name].build()
    modules = dict(model.named_modules(remove_duplicate=False))
    root = folded(model)
    paths = [path for node in root.walk() for path in node.paths]
    assert sorted(paths) == sorted(modules)
    assert sorted(taken_apart(root)) == sorted(modules)
    assert root.numel() == sum(parameter.numel() for parameter in model.parameters())
    assert root.nbytes() == sum(p.numel() * p.element_size() for p in model.parameters())
    for node in root.walk():
        for path in node.paths:
            module = modules[path]
            assert type(module).__name__ == node.class_name
            own = [
                *module.named_parameters(recurse=False, remove_duplicate=False),
                *module.named_buffers(recurse=False),
            ]
            assert {leaf.name: (leaf.shape, leaf.dtype) for leaf in node.leaves} == {
                name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own
            }


def test_bert_is_one_layer_and_two_kinds_of_projections() -> None:
    root = folded(ZOO["bert"].build())
    attention = find(root, "bert", "encoder", "layer", "0-1", "attention", "self")
    assert names(attention)[0] == "query,key,value"
    assert attention.children[0].paths == tuple(
        f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "key", "value")
    )


def test_a_delta_on_layer_three_alone_leaves_a_fold_with_a_gap() -> None:
    """OpenDelta's page read ``0-2`` and ``4-11`` back from the label, and offered modules that do not exist."""
    model = Layers()
    delta = fd.LoraModel(model, modified_modules=["layer.3"])
    layers = find(folded(tree(model, delta.plan)), "layer")
    assert names(layers) == ["0-2,4-11", "3"]
    assert layers.children[0].paths == tuple(f"layer.{i}" for i in range(12) if i != 3)
    assert [part.paths for part in unfold(layers.children[0])] == [(f"layer.{i}",) for i in range(12) if i != 3]
    # A choice made in the tree is a list of real sites.
    assert fd.LoraModel(model, modified_modules=list(layers.children[0].paths)).sites == layers.children[0].paths
    again = folded(tree(model, delta.plan, {}))
    assert names(find(again, "layer")) == ["0-11"]


def test_equal_is_what_modules_are_and_not_what_was_set_on_them() -> None:
    model = Layers()
    delta = fd.LoraModel(model, modified_modules=[f"layer.{i}" for i in range(12)])
    model.layer[3]._delta_infos = [{"state": "on"}]
    model.layer[4].weight._is_delta = True
    model.layer[5].register_forward_hook(lambda *_: None)
    model.layer[6].requires_grad_(False)
    model.layer[7].eval()
    assert names(find(folded(tree(model, delta.plan)), "layer")) == ["0-11"]


def namesake(kind: type) -> type:
    """Another class of the same name."""
    return type(kind.__name__, (kind,), {"__module__": "elsewhere"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda layers: layers.__setitem__(1, nn.Linear(4, 4, bias=False)), ["0,2", "1"]),
        (lambda layers: layers.__setitem__(1, nn.Linear(4, 5)), ["0,2", "1"]),
        (lambda layers: layers[1].double(), ["0,2", "1"]),
        (
            lambda layers: layers.__setitem__(1, type("Linear", (nn.Linear,), {"__module__": "mine"})(4, 4)),
            ["0,2", "1"],
        ),
        (lambda layers: layers[1].register_buffer("mean", torch.zeros(4)), ["0,2", "1"]),
        (lambda layers: layers[1].add_module("extra", nn.ReLU()), ["0,2", "1"]),
        (lambda layers: layers[1].register_parameter("bias", layers[0].bias), ["0,2", "1"]),
        (lambda layers: None, ["0-2"]),
    ],
    ids=["no bias", "shape", "dtype", "class", "buffer", "child", "tie", "none"],
)
def test_what_sets_siblings_apart(change, expected: list[str]) -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    change(layers)
    assert names(folded(layers)) == expected


def test_two_deltas_and_a_trained_head_set_modules_apart() -> None:
    model = Layers()
    delta = fd.DeltaModel(
        model,
        fd.LoraConfig(modified_modules=["layer.0", "layer.1", "layer.2"]),
        fd.AdapterConfig(modified_modules=["layer.2"], unfrozen_modules=["deltas", "layer.5", "layer.7.bias"]),
    )
    layers = find(folded(tree(model, delta.plan)), "layer")
    assert names(layers) == ["0-1", "2", "3-4,6,8-11", "5", "7"]
    assert names(layers.children[1]) == ["lora", "adapter"]
    assert [leaf.kind for leaf in layers.children[4].leaves] == ["frozen", "trainable"]


def test_a_tied_tensor_is_listed_twice_and_counted_once() -> None:
    root = tree(Tied())
    head = find(root, "head").leaves[0]
    assert head.tied_to == ("embedding.weight",)
    assert root.numel() == 11 * 4 + 4 * 4 + 4


def test_blocks_with_a_tie_inside_fold_and_count_right() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    model = nn.ModuleList(Block() for _ in range(3))
    root = folded(model)
    assert names(root) == ["0-2"]
    assert names(root.children[0]) == ["one", "two"]
    assert root.children[0].children[1].leaves[0].tied_to == ("0.one.weight", "1.one.weight", "2.one.weight")
    assert root.numel() == sum(parameter.numel() for parameter in model.parameters())


def test_a_delta_on_a_module_under_two_names_is_counted_once() -> None:
    model = Twice()
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["first"])
    root = tree(model, delta.plan)
    assert [find(root, name, "lora").leaves[0].tied_to for name in ("first", "second")] == [(), ("first.lora.lora_A",)]
    assert (root.numel("delta"), root.numel("constant"), root.numel("frozen")) == (16, 1, 20)


def test_a_label_says_which_numbers_it_has() -> None:
    """Against reading the label back: a range is its numbers, whatever the choice."""

    def read(text: str) -> list[int]:
        spans = [part.split("-") for part in text.split(",")]
        return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]

    for size in range(1, 7):
        for chosen in itertools.combinations(range(6), size):
            assert read(label(map(str, chosen))) == list(chosen)
    assert label(["10", "9", "query", "8", "01"]) == "8-10,query,01"


def test_names_that_look_like_labels_keep_their_paths() -> None:
    model = nn.ModuleDict({"0-2": nn.Linear(2, 2), "a,b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    group = folded(model).children[0]
    assert group.paths == ("0-2", "a,b", "c")
    assert [part.paths for part in unfold(group)] == [("0-2",), ("a,b",), ("c",)]


def test_unfolding_goes_one_level_and_keeps_what_is_folded_above() -> None:
    root = folded(ZOO["bert"].build())
    layer = find(root, "bert", "encoder", "layer", "0-1")
    projections = find(layer, "attention", "self", "query,key,value")
    assert [(part.name, len(part.paths)) for part in unfold(projections)] == [("query", 2), ("key", 2), ("value", 2)]
    first, _ = unfold(layer)
    assert find(first, "attention", "self", "query,key,value").paths == tuple(
        f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")
    )
    assert unfold(first) == [first]
    assert folded(layer) == layer


def test_pruning_leaves_what_has_parameters_and_what_has_a_delta() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.BatchNorm1d(4), nn.Linear(4, 4))
    root = pruned(tree(model))
    assert names(root) == ["1", "2"]
    assert [leaf.name for leaf in find(root, "1").leaves] == ["weight", "bias"]
    assert [leaf.name for leaf in find(tree(model), "1").leaves][2:] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    assert pruned(tree(nn.ReLU())).class_name == "ReLU"


def test_what_has_no_tree_is_said() -> None:
    with raises_saying(fd.errors.ConfigError, "LoraModel", "tree(delta.backbone, delta.plan)"):
        tree(fd.LoraModel(Layers(), modified_modules=["layer.0"]))
    with raises_saying(fd.errors.ConfigError, "0.weight has no shape yet", "run the model once"):
        tree(nn.Sequential(nn.LazyLinear(3)))
