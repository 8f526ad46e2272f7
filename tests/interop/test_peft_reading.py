"""What PEFT trained, read: logits and gradients are PEFT's, and what finds no place is an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_made import gradients_here, gradients_of, peft_model, saved
from torch import Tensor, nn

import funcdelta as fd

peft = pytest.importorskip("peft")

IDS = torch.tensor([[1, 5, 2, 7], [3, 3, 0, 9]])


class Scaled(nn.Embedding):
    """A table with a forward of its own, as Gemma's."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Experts(nn.Module):
    """Two tables of experts, (experts, out, in) or, turned, (experts, in, out)."""

    def __init__(self, turned: bool, width: int, inner: int) -> None:
        super().__init__()
        self.is_transposed = turned
        self.up_proj = nn.Parameter(torch.randn(3, *((width, inner) if turned else (inner, width))))
        self.scale = nn.Parameter(torch.ones(3))
        self.down_proj = nn.Parameter(torch.randn(3, *((inner, width) if turned else (width, inner))))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up_proj, self.down_proj) if self.is_transposed else (self.up_proj.mT, self.down_proj.mT)
        return ((x.unsqueeze(1) @ up).relu() @ down * self.scale.view(3, 1, 1)).sum(1)


class Net(nn.Module):
    """A layer of every kind, one after the other; the head is tied to the table if asked for."""

    def __init__(self, table: type[nn.Embedding] = nn.Embedding, tied: bool = False, **experts: Any) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        self.table = table(12, 8)
        self.linear = nn.Linear(8, 8)
        self.turned = Conv1D(6, 8)
        self.conv1d = nn.Conv1d(6, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(6, 6, 2, padding=1, stride=2)
        self.conv3d = nn.Conv3d(6, 6, (1, 2, 2), bias=False)
        self.grouped = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.back = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.ModuleDict({"linear": nn.Linear(8, 8)})
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts(**({"turned": False, "width": 8, "inner": 5} | experts))
        self.bare = nn.Module()
        self.bare.matrix = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 12, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.table(ids)).tanh()
        y = self.grouped(self.conv1d(self.turned(x).mT)).tanh()
        y = self.conv3d(self.conv2d(y.unflatten(-1, (2, -1))).unsqueeze(2)).flatten(2).mean(-1)
        x = self.norm((x + self.back(y).unsqueeze(1)).mT).mT
        x = x + self.inner["linear"](x) + self.attention(x, x, x, need_weights=True)[0]
        x = x + self.experts(x) + x @ self.bare.matrix
        return self.head(x)


def loss_of(call: Callable[[Tensor], Tensor]) -> Tensor:
    out = call(IDS)
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


LAYERS = ["table", "linear", "turned", "conv1d", "conv2d", "conv3d", "back", "head"]
TABLES = ["experts.up_proj", "experts.down_proj"]
SUBJECTS = {
    "every layer": (Net, {"target_modules": LAYERS}),
    "rank-stabilised": (Net, {"target_modules": LAYERS, "use_rslora": True}),
    "patterns": (
        Net,
        {
            "target_modules": LAYERS,
            "rank_pattern": {"conv1d": 3, "inner.linear": 5},
            "alpha_pattern": {"b.*|head": 2.5},
        },
    ),
    "dropout": (Net, {"target_modules": LAYERS, "lora_dropout": 0.3}),
    "own bias": (Net, {"target_modules": ["linear", "turned", "conv2d"], "bias": "lora_only"}),
    "every bias": (Net, {"target_modules": ["linear", "turned"], "bias": "all"}),
    "saved modules": (Net, {"target_modules": ["linear"], "modules_to_save": ["norm", "head", "attention"]}),
    "a tied table": (lambda: Net(tied=True), {"target_modules": ["table", "linear"]}),
    "a tied head": (lambda: Net(tied=True), {"target_modules": ["head"]}),
    "a table with a forward of its own": (lambda: Net(Scaled), {"target_modules": ["table"]}),
    "the same, tied": (lambda: Net(Scaled, tied=True), {"target_modules": ["table"]}),
    "experts": (Net, {"target_modules": ["linear"], "target_parameters": TABLES}),
    "experts, one table": (Net, {"target_modules": ["linear"], "target_parameters": TABLES[1:]}),
    "experts turned": (lambda: Net(turned=True), {"target_modules": ["linear"], "target_parameters": TABLES}),
    "square experts": (lambda: Net(inner=8), {"target_modules": ["linear"], "target_parameters": TABLES}),
    "square experts turned": (
        lambda: Net(inner=8, turned=True),
        {"target_modules": ["linear"], "target_parameters": TABLES, "alpha_pattern": {"experts.down_proj": 3}},
    ),
    "parameters": (
        Net,
        {
            "target_modules": ["back"],
            "target_parameters": ["bare.matrix", "linear.weight", "turned.weight", "table.weight"],
        },
    ),
    "attention, as PEFT has it": (Net, {"target_modules": ["attention", "linear"]}),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_logits_and_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    make, fields = SUBJECTS[name]
    backbone = make().eval()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    options = {"compat": "peft"} if "attention" in fields["target_modules"] else {}
    model = peft_model(backbone, peft.LoraConfig(r=2, lora_alpha=5, **fields))
    delta, params = fd.load_peft(saved(model, tmp_path / "run"), backbone, **options)
    with torch.no_grad():
        torch.testing.assert_close(delta.apply(params, IDS), model(IDS), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(IDS), backbone(IDS), atol=1e-2)
    theirs, ours = gradients_of(model, loss_of), gradients_here(delta, params, loss_of, **options)
    assert theirs.keys() == ours.keys()
    for key in theirs:
        scale = float(theirs[key].abs().max())
        torch.testing.assert_close(ours[key] / scale, theirs[key] / scale, rtol=1e-5, atol=1e-5, msg=key)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
