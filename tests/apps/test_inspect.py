"""What is printed and counted: the tree with the delta in it, the figures, graphs of any module, optimisers."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from custom_methods import SharedGainConfig, WrittenConfig
from handmade import MLP, Layers, Tied, raises_saying
from torch import nn
from transformers import BertConfig, BertModel
from zoo import ZOO

import funcdelta as fd
from funcdelta.apps.inspect import folded, tree
from funcdelta.apps.inspect.graph import common_names_of
from funcdelta.apps.inspect.render import console, drawn, legend
from funcdelta.match import find_key
from funcdelta.methods.config import METHODS
from funcdelta.structures import families, resolve

BERT_BASE = 109_482_240
# What the real library counts on BERT-base with its defaults; in a prefix also the numbers 0 to 5, as a parameter.
COUNTED = {
    "lora": 294_912,
    "adapter": 903_744,
    "parallel_adapter": 903_744,
    "bitfit": 101_376,
    "compacter": 61_824,
    "low_rank_adapter": 57_024,
    "prefix": 9_721_350 - 6,
    "soft_prompt": 76_800,
}
OPENDELTA = {method: count for method, count in COUNTED.items() if method in METHODS}

Printed = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def bert_base() -> nn.Module:
    """BERT-base without weights."""
    with torch.device("meta"):
        return BertModel(BertConfig()).eval()


@pytest.fixture
def delta() -> fd.DeltaModel:
    return fd.LoraModel(MLP().eval(), lora_r=2, modified_modules=["a", "b"], unfrozen_modules=["deltas", "head"])


MLP_TREE = """\
MLP
├── a (Linear) weight:[8, 4] bias:[8]
│   └── lora (LoraConfig) lora_A*:[2, 4] lora_B*:[8, 2] scale:[]
├── b (Linear) weight:[8, 8] bias:[8]
│   └── lora (LoraConfig) lora_A*:[2, 8] lora_B*:[8, 2] scale:[]
└── head (Linear) weight*:[3, 8] bias*:[3]
* trained, of the delta   * trained, of the model   frozen   constant of the delta
"""


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", OPENDELTA)
def test_totals_on_bert_base_are_those_of_opendelta(method: str, bert_base: nn.Module) -> None:
    delta = fd.AutoDeltaModel.from_config({"delta_type": method}, backbone_model=bert_base)
    stats = delta.log(visualization=False)
    assert stats.delta_parameters == stats.trainable_parameters == OPENDELTA[method]
    assert stats.total_parameters == BERT_BASE + OPENDELTA[method]
    assert stats.delta_ratio == OPENDELTA[method] / (BERT_BASE + OPENDELTA[method])
    assert stats.backbone_bytes == 4 * BERT_BASE


@pytest.mark.parametrize("name", ZOO)
def test_figures_are_an_independent_sum(name: str) -> None:
    architecture = ZOO[name]
    model = architecture.build()
    delta = fd.LoraModel(
        model, modified_modules=[architecture.default_target], unfrozen_modules=["deltas", architecture.head]
    )
    params = delta.init(0, n=3)
    stats = delta.log(params, visualization=False)
    trained, constants = fd.partition(fd.take(params, 0), delta.trainable)
    own = dict(model.named_parameters())
    trainable = sum(leaf.numel() for leaf in trained.values())
    added = sum(leaf.numel() for name, leaf in trained.items() if name not in own)
    total = sum(parameter.numel() for parameter in own.values()) + added
    assert (stats.trainable_parameters, stats.delta_parameters, stats.total_parameters) == (trainable, added, total)
    assert stats.constant_parameters == len(constants)
    assert stats.params_bytes * 3 == stats.all_params_bytes == sum(leaf.nbytes for leaf in params.values())
    assert stats.all_trainable_parameters == 3 * trainable
    assert stats.all_total_parameters == total + 2 * trainable
    assert (stats.members, stats.all_delta_parameters) == (3, 3 * added)
    assert (fd.inspect.num_trainable_parameters(delta, params), fd.inspect.num_total_parameters(delta)) == (
        trainable,
        total,
    )
    assert fd.inspect.trainable_parameters_names(delta, params) == [name for name in delta.names if name in trained]
    assert fd.inspect.frozen_parameters_names(delta, params) == [name for name in own if name not in trained] + list(
        constants
    )


def test_figures_are_data(delta: fd.DeltaModel) -> None:
    stats = delta.log(visualization=False)
    assert json.loads(json.dumps(stats.to_dict())) == {
        "total_parameters": 195,
        "trainable_parameters": 83,
        "trainable_ratio": 83 / 195,
        "delta_parameters": 56,
        "delta_ratio": 56 / 195,
        "constant_parameters": 2,
        "params_bytes": 4 * 85,
        "backbone_bytes": 4 * 139,
        "members": 1,
        "all_total_parameters": 195,
        "all_trainable_parameters": 83,
        "all_delta_parameters": 56,
        "all_params_bytes": 4 * 85,
        "cudamem": stats.cudamem,
        "maxcudamem": stats.maxcudamem,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.members = 2  # type: ignore[misc]


def test_detached_is_the_backbone_alone(delta: fd.DeltaModel, capsys: Printed) -> None:
    stats = delta.log({})
    assert (stats.trainable_parameters, stats.delta_parameters, stats.total_parameters) == (0, 0, 139)
    assert "lora" not in capsys.readouterr().out
    head = {name: leaf for name, leaf in delta.init(0).items() if name.startswith("head")}
    assert delta.log(head, visualization=False).trainable_parameters == 27
    assert fd.inspect.trainable_parameters_names(delta, head) == ["head.weight", "head.bias"]
    assert fd.inspect.frozen_parameters_names(delta, head) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    full = delta.attach(delta.init(0))
    assert delta.log(full, visualization=False) == delta.log(visualization=False)


def test_a_tied_tensor_that_trains_counts_once(capsys: Printed) -> None:
    delta = fd.LoraModel(Tied(), lora_r=1, modified_modules=["body"], unfrozen_modules=["deltas", "head"])
    stats = delta.log(delta.init(0))
    assert (stats.trainable_parameters, stats.total_parameters) == (44 + 8, 44 + 20 + 8)
    assert "head (Linear) weight*:[11, 4] = embedding.weight" in capsys.readouterr().out


def test_a_shared_leaf_counts_once_and_is_named_where_it_is_used(capsys: Printed) -> None:
    delta = fd.DeltaModel(MLP(), SharedGainConfig(modified_modules=["a", "b"]))
    stats = delta.log(delta.init(0))
    assert stats.delta_parameters == sum(math.prod(shape) for shape in delta.shapes.values())
    printed = capsys.readouterr().out
    assert printed.count("gain*:[] = test_shared.gain") == 2
    assert "└── test_shared (SharedGainConfig) gain*:[]\n" in printed
    written = fd.DeltaModel(MLP(), WrittenConfig(modified_modules=["a", "b"]))
    assert written.log(visualization=False).delta_parameters == sum(map(math.prod, written.shapes.values()))


def test_the_dtype_of_what_trains_is_that_of_params(capsys: Printed) -> None:
    delta = fd.LoraModel(
        Layers().bfloat16(), lora_r=1, modified_modules=["layer.0"], unfrozen_modules=["deltas", "layer.1"]
    )
    stats = delta.log(delta.init(0))
    assert (stats.params_bytes, stats.backbone_bytes) == (4 * (9 + 20), 2 * 12 * 20)
    printed = capsys.readouterr().out
    assert "1 (Linear) weight*:[4, 4] float32 bias*:[4] float32" in printed
    assert "2-11 (Linear) weight:[4, 4] bias:[4]\n" in printed
    assert delta.log(delta.init(0, dtype=torch.float64), visualization=False).params_bytes == 8 * (9 + 20)


# -- what delta.log prints -----------------------------------------------------------------------------------------


def test_the_log_of_one_member(delta: fd.DeltaModel, capsys: Printed) -> None:
    before = snapshot(delta.backbone)
    delta.log(delta.init(0))
    assert capsys.readouterr().out.partition("CUDA")[0] == MLP_TREE + (
        "Trainable ratio: 83/195 = 42.5641 %\n"
        "Delta parameter ratio: 56/195 = 28.7179 %\n"
        "Memory: params 340 B; backbone 556 B; "
    )
    delta.log()
    assert capsys.readouterr().out.startswith(MLP_TREE)
    assert_unchanged(delta.backbone, before)


def test_the_log_of_a_stack(delta: fd.DeltaModel, capsys: Printed) -> None:
    delta.log(delta.init(0, n=1000))
    assert capsys.readouterr().out.partition("CUDA")[0] == MLP_TREE + (
        "A stack of 1000 members; shapes and ratios are those of one.\n"
        "Trainable ratio: 83/195 = 42.5641 % (83,000 in all members)\n"
        "Delta parameter ratio: 56/195 = 28.7179 % (56,000 in all members)\n"
        "Memory: params 340 B a member, 332.0 KiB in all; backbone 556 B; "
    )


@pytest.mark.parametrize(
    ("flag", "piece"),
    [
        ("visualization", "(Linear)"),
        ("trainable_ratio", "Trainable"),
        ("delta_ratio", "Delta"),
        ("cuda_memory", "Memory"),
    ],
)
def test_each_flag_leaves_out_its_part(flag: str, piece: str, delta: fd.DeltaModel, capsys: Printed) -> None:
    delta.log()
    assert piece in capsys.readouterr().out
    stats = delta.log(**{flag: False})
    assert piece not in capsys.readouterr().out
    assert stats == delta.log()


def test_colours_come_from_the_partition_and_not_from_flags(delta: fd.DeltaModel) -> None:
    delta.backbone.requires_grad_(False)
    delta.backbone.a.weight.requires_grad_(True)
    root = folded(tree(delta.backbone, delta.plan))
    screen = console(record=True, width=200, force_terminal=True, color_system="standard", file=io.StringIO())
    screen.print(drawn(root))
    screen.print(legend(root))
    text = screen.export_text(styles=True)
    assert "\x1b[2mweight:[8, 4]\x1b[0m" in text
    assert "\x1b[1;36mweight*:[3, 8]\x1b[0m" in text
    assert "\x1b[1;35mlora_A*:[2, 4]\x1b[0m" in text
    assert "\x1b[33mscale:[]\x1b[0m" in text
    assert "\x1b[1;36m* trained, of the model\x1b[0m" in text


def test_names_are_text_and_never_markup(capsys: Printed) -> None:
    fd.inspect.structure_graph(nn.ModuleDict({"[red]x[/nothing]": nn.Linear(2, 2)}))
    assert "[red]x[/nothing] (Linear) weight:[2, 2] bias:[2]\n" in capsys.readouterr().out


def test_a_missing_rich_is_said_with_the_line_to_run(
    delta: fd.DeltaModel, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    for show in (delta.log, lambda: fd.inspect.structure_graph(delta.backbone)):
        with raises_saying(fd.errors.FuncdeltaError, "rich", "pip install 'funcdelta[demo]'", "visualization=False"):
            show()
    assert not capsys.readouterr().out
    assert delta.log(visualization=False).trainable_parameters == 83
    assert fd.inspect.structure_graph(delta.backbone, print_tree=False).children[0].name == "a"


def test_what_cannot_be_logged_is_said(delta: fd.DeltaModel) -> None:
    with raises_saying(fd.errors.ParamsError, "log", "found MLP", "delta.log(params)"):
        delta.log(delta.backbone)
    with raises_saying(fd.errors.ParamsError, "'a.lora.lora_a'", "a.lora.lora_A"):
        delta.log({"a.lora.lora_a": torch.zeros(2, 4)})
    stack = delta.init(0, n=3)
    with raises_saying(fd.errors.ParamsError, "a.lora.lora_A", "(2, 4)"):
        delta.log(stack | {"a.lora.lora_A": torch.zeros(2, 4)})
    with raises_saying(
        AttributeError, "num_trainable_parameters", "fd.inspect.num_trainable_parameters(delta, params)"
    ):
        delta.num_trainable_parameters()
    with raises_saying(AttributeError, "stats = delta.log(params)"):
        _ = delta.stat


# -- structure_graph -----------------------------------------------------------------------------------------------


def test_the_graph_of_bert(capsys: Printed) -> None:
    model = ZOO["bert"].build().bert
    root = fd.inspect.structure_graph(model, common_structure=True)
    assert (
        capsys.readouterr().out
        == """\
BertModel
├── embeddings (BertEmbeddings)
│   ├── word_embeddings (Embedding) embeddings@ weight:[64, 16]
│   ├── position_embeddings (Embedding) weight:[32, 16]
│   ├── token_type_embeddings (Embedding) weight:[2, 16]
│   └── LayerNorm (LayerNorm) weight:[16] bias:[16]
├── encoder (BertEncoder) encoder@
│   └── layer (ModuleList) encoder@.block@
│       └── 0-1 (BertLayer)
│           ├── attention (BertAttention) attn@
│           │   ├── self (BertSelfAttention)
│           │   │   └── query,key,value (Linear) attn@.q@,attn@.k@,attn@.v@ weight:[16, 16] bias:[16]
│           │   └── output (BertSelfOutput)
│           │       ├── dense (Linear) attn@.proj@ weight:[16, 16] bias:[16]
│           │       └── LayerNorm (LayerNorm) attn@.layer_norm@ weight:[16] bias:[16]
│           ├── intermediate (BertIntermediate) ff@
│           │   └── dense (Linear) ff@.w1@ weight:[24, 16] bias:[24]
│           └── output (BertOutput) ff@
│               ├── dense (Linear) ff@.w2@ weight:[16, 24] bias:[16]
│               └── LayerNorm (LayerNorm) ff@.layer_norm@ weight:[16] bias:[16]
└── pooler (BertPooler)
    └── dense (Linear) weight:[16, 16] bias:[16]
"""
    )
    assert root == fd.inspect.structure_graph(model, print_tree=False)
    capsys.readouterr()
    assert [child.name for child in fd.inspect.structure_graph(model, only_common=True).children] == [
        "embeddings",
        "encoder",
    ]
    printed = capsys.readouterr().out
    assert "encoder@" in printed
    assert "position_embeddings" not in printed
    assert "pooler" not in printed


@pytest.mark.parametrize("name", [name for name in ZOO if families(ZOO[name].build())])
def test_a_common_name_that_is_shown_means_the_module_that_it_stands_at(name: str) -> None:
    model = ZOO[name].build()
    shown = common_names_of(model)
    assert shown
    for path, names in shown.items():
        assert find_key(path, resolve(model, names))


def test_tensors_on_their_own_lines_and_what_has_no_parameters(capsys: Printed) -> None:
    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2, bias=False), nn.ReLU())
    model[1].weight.requires_grad_(False)
    fd.inspect.structure_graph(model, expand_params=True)
    assert capsys.readouterr().out == "Sequential\n└── 1 (Linear)\n    └── weight:[2, 4]\n"
    fd.inspect.structure_graph(model, keep_non_params=True)
    assert capsys.readouterr().out == (
        "Sequential\n"
        "├── 0 (BatchNorm1d) running_mean:[4] running_var:[4] num_batches_tracked:[] int64\n"
        "├── 1 (Linear) weight:[2, 4]\n"
        "└── 2 (ReLU)\n"
        "frozen   buffer\n"
    )


def test_the_graph_of_a_view_shows_what_trains_in_it(delta: fd.DeltaModel, capsys: Printed) -> None:
    fd.inspect.structure_graph(delta.bind(delta.init(0)))
    printed = capsys.readouterr().out
    # A view holds what trains in it, and nothing else.
    assert "lora (Leaves) lora_A:[2, 4] lora_B:[8, 2]" in printed
    assert "head (Linear) weight:[3, 8] bias:[3]" in printed


def test_what_has_no_graph_is_said(delta: fd.DeltaModel) -> None:
    with raises_saying(
        fd.errors.ConfigError, "found LoraModel", "fd.inspect.structure_graph(model)", "delta.log(params)"
    ):
        fd.inspect.structure_graph(delta)
    with raises_saying(fd.errors.MatchError, "MLP", "bert"):
        fd.inspect.structure_graph(delta.backbone, common_structure=True)


# -- optimisers ----------------------------------------------------------------------------------------------------


def test_groups_of_torchs_optimisers(capsys: Printed) -> None:
    model = MLP()
    model.a.requires_grad_(False)
    groups = [
        {"params": [*model.a.parameters(), *model.b.parameters()], "lr": 0.5},
        {"params": model.head.parameters()},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.25, momentum=0.9)
    first, second = fd.inspect.inspect_optimizer(optimizer)
    assert (first.total_parameters, first.trainable_parameters, first.trainable_ratio) == (112, 72, 72 / 112)
    assert (second.total_parameters, second.trainable_parameters) == (27, 27)
    assert first.options == {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert second.to_dict()["options"]["lr"] == 0.25
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("group 0: trainable 72/112 = 64.2857 %; lr 0.5, momentum 0.9")
    fd.inspect.inspect_optimizer(optimizer, verbose=False)
    assert not capsys.readouterr().out


def test_the_state_of_our_optimisers(delta: fd.DeltaModel) -> None:
    stack = delta.init(0, n=3)
    for optimizer in (fd.optim.adamw(lr=1e-3), fd.optim.sgd(lr=1e-3, momentum=0.9), fd.optim.sgd(lr=1e-3)):
        state = optimizer.init(stack, n=3)
        _, state = optimizer.update(fd.tree.map(torch.ones_like, stack), state, stack)
        (group,) = fd.inspect.inspect_optimizer(state, stack, verbose=False)
        assert (group.total_parameters, group.trainable_parameters) == (3 * 85, 3 * 83)
        assert group.options == {"state": type(state).__name__, "step": 1, "members": 3}
    (group,) = fd.inspect.inspect_optimizer(fd.optim.adam(lr=1e-3).init(fd.take(stack, 0)), verbose=False)
    assert (group.total_parameters, group.trainable_parameters) == (83, 83)


def test_what_is_no_optimiser_is_said(delta: fd.DeltaModel) -> None:
    params = delta.init(0)
    state = fd.optim.sgd(lr=0.1).init(params)
    with raises_saying(fd.errors.ConfigError, "found Optimizer", "state = opt.init(params)"):
        fd.inspect.inspect_optimizer(fd.optim.sgd(lr=0.1))
    with raises_saying(fd.errors.ConfigError, "keeps no sizes", "fd.inspect.inspect_optimizer(state, params)"):
        fd.inspect.inspect_optimizer(state)
    with raises_saying(fd.errors.ConfigError, "'a.lora.lora_A'", "not a leaf of params"):
        fd.inspect.inspect_optimizer(state, {"other": torch.zeros(1)})
    with raises_saying(fd.errors.ConfigError, "hold their own"):
        fd.inspect.inspect_optimizer(torch.optim.SGD(delta.backbone.parameters(), lr=0.1), params)
