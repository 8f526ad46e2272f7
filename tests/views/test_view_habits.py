"""Views where people put them: forwards that set buffers anew, parents that save and load, and what messages advise."""

from __future__ import annotations

import copy
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcdelta as fd
from funcdelta.errors import UnreachedWarning


class Positions(nn.Module):
    """A forward that sets a buffer anew at each call, as CTRL's does with its positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        table = torch.arange(4.0)
        if kind == "nn.Buffer":
            self.table: Tensor = nn.Buffer(table)
        else:
            self.register_buffer("table", table)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        table = self.table.to(dtype=x.dtype)
        self.table = nn.Buffer(table) if self.kind == "nn.Buffer" else table
        return self.layer(x) + self.table


@pytest.mark.parametrize("kind", ["nn.Buffer", "register_buffer"])
def test_a_forward_may_set_a_buffer_anew(kind: str) -> None:
    backbone, x = Positions(kind), torch.randn(2, 4)
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["layer"])
    params = fd.tree.randn_like(delta.init(0), seed=1)
    a, b, scale = (params[f"layer.lora.{leaf}"] for leaf in ("lora_A", "lora_B", "scale"))
    change = scale * (x @ a.T @ b.T)
    expected = F.linear(x, backbone.layer.weight, backbone.layer.bias) + change + torch.arange(4.0)
    before = backbone.table
    view, routed = delta.bind(params), delta.bind_rows(fd.stack([params]), [0, 0])
    for made in (view, routed, copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        for _ in range(2):
            assert torch.allclose(made(x), expected, atol=1e-5)
    assert backbone.table is before
    assert [name for name, _ in view.named_buffers()] == ["layer.lora.scale"]


class Parent(nn.Module):
    """As a LightningModule holds a model, with a head of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def test_a_parent_saves_and_loads_its_view() -> None:
    backbone, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(8, 4)
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"]).mode(train=True)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    one, two = (Parent(delta.bind(fd.tree.randn_like(delta.init(0), seed=seed))) for seed in (1, 2))
    one(x)
    assert not torch.equal(one(x), two(x))
    missing, unexpected = two.load_state_dict(one.state_dict())
    assert not missing
    assert not unexpected
    assert torch.equal(one.eval()(x), two.eval()(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    optimiser = torch.optim.SGD(two.parameters(), lr=0.1)
    trained = [p.numel() for group in optimiser.param_groups for p in group["params"]]
    assert sorted(trained) == [2, 8, 8, 8]  # the head's bias and weight, A and B
    for made in (copy.deepcopy(two), pickle.loads(pickle.dumps(two))):
        assert torch.equal(made(x), two(x))


class Mixes(nn.Module):
    """A model whose rows depend on each other."""

    def __init__(self, how: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor, extra: Any = None) -> Tensor:
        return self.how(self.layer(x), extra)


CASES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any]] = {
    "a scalar": (lambda y, extra: y.mean(), None),
    "rows subtracted": (lambda y, extra: y - y.mean(0), None),
    "flattened": (lambda y, extra: y.flatten()[:1], None),
    "an object with rows": (lambda y, extra: y + extra.hidden, types.SimpleNamespace(hidden=torch.ones(2, 4))),
    "a number read": (lambda y, extra: y * (1.0 if y.sum().item() > 0 else 2.0), None),
    "a list of numbers": (lambda y, extra: y + torch.tensor(extra)[:, None], [1.0, 2.0]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_view_advises_no_engine(name: str) -> None:
    how, extra = CASES[name]
    delta = fd.LoraModel(Mixes(how), lora_r=2, modified_modules=["layer"])
    stack = fd.tree.randn_like(delta.init(0, n=3), seed=1)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            try:
                delta.bind_rows(stack, [2, 0])(torch.randn(2, 4), extra)
            except fd.errors.FuncdeltaError as error:
                said.append(str(error))
    said += [str(one.message) for one in told]
    assert said
    assert not [one for one in said if "engine=" in one]


class Skips(nn.Module):
    """A model whose second layer runs with an image only."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.vision = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        y = self.text(x)
        return y if image is None else y + self.vision(image)


@pytest.mark.parametrize("routed", [False, True])
def test_a_view_whose_first_call_does_not_reach_a_site_warns_as_apply_does(routed: bool) -> None:
    x = torch.randn(2, 4)
    delta = fd.LoraModel(Skips(), lora_r=2, modified_modules=["text", "vision"])
    stack = fd.tree.randn_like(delta.init(0, n=2), seed=1)
    view = delta.bind_rows(stack, [0, 0]) if routed else delta.bind(fd.take(stack, 0))
    with pytest.warns(UnreachedWarning, match="vision"):
        found = view(x)
    expected = delta.apply(fd.take(stack, 0), x)
    assert torch.allclose(found, expected, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = view(x, x)
    assert torch.allclose(found, delta.apply(fd.take(stack, 0), x, x), atol=1e-6)
