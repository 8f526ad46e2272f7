"""The snapshot sees every kind of change that a delta could leave behind, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, differences, snapshot
from torch import nn
from zoo import ZOO


def write_data(model: Any) -> None:
    model.classifier.weight.data[0, 0] += 1e-7


def write_through_alias(model: Any) -> None:
    alias = model.classifier.weight.detach()
    alias.copy_(alias.clone())  # the same bytes: only the version counter tells


def replace_parameter(model: Any) -> None:
    model.classifier.weight = nn.Parameter(model.classifier.weight.detach().clone())


def drop_and_restore_parameter(model: Any) -> None:
    weight = model.classifier.weight
    del model.classifier.weight
    model.classifier.weight = weight  # back, but after the bias now


def add_gradient(model: Any) -> None:
    model.classifier.bias.grad = torch.zeros(3)


def add_child(model: Any) -> None:
    model.classifier.add_module("lora", nn.Identity())


def replace_module(model: Any) -> None:
    model.dropout = nn.Dropout(model.dropout.p)


def replace_forward(model: Any) -> None:
    model.classifier.forward = model.classifier.forward


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "bytes": (write_data, "classifier.weight: bytes changed"),
    "version": (write_through_alias, "classifier.weight: version was"),
    "parameter": (replace_parameter, "classifier.weight: identity changed"),
    "order": (drop_and_restore_parameter, "the order changed"),
    "requires_grad": (
        lambda model: model.classifier.bias.requires_grad_(False),
        "classifier.bias: requires_grad was True, is False",
    ),
    "gradient": (add_gradient, "classifier.bias: grad was None"),
    "training": (
        lambda model: model.bert.encoder.train(),
        "module bert.encoder: training was False, is True",
    ),
    "forward hook": (
        lambda model: model.classifier.register_forward_hook(lambda *_: None),
        "module classifier: hooks: _forward_hooks: ",
    ),
    "keyword hook": (
        lambda model: model.classifier.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
        "_forward_pre_hooks_with_kwargs",
    ),
    "backward hook": (
        lambda model: model.classifier.register_full_backward_hook(lambda *_: None),
        "_backward_hooks",
    ),
    "state dict hook": (
        lambda model: model.register_state_dict_pre_hook(lambda *_: None),
        "_state_dict_pre_hooks",
    ),
    "attribute": (lambda model: setattr(model, "delta", 1), "module (root): attributes: delta is new"),
    "forward": (replace_forward, "module classifier: attributes: forward is new"),
    "child": (add_child, "classifier.lora is new"),
    "module": (replace_module, "dropout"),
    "config": (
        lambda model: setattr(model.config, "hidden_dropout_prob", 0.7),
        "config.hidden_dropout_prob was 0.1, is 0.7",
    ),
    "attention": (lambda model: model.set_attn_implementation("eager"), "_attn_implementation"),
    "class": (lambda model: setattr(model, "__class__", nn.Module), "class was"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(name: str) -> None:
    change, message = CHANGES[name]
    model = ZOO["bert"].build()
    before = snapshot(model)
    change(model)
    with pytest.raises(AssertionError, match=r"^\w+ changed in \d+ ways:") as error:
        assert_unchanged(model, before)
    assert message in str(error.value)


def test_written_buffers_are_named() -> None:
    architecture = ZOO["conv2d"]
    model = architecture.build().train()
    before = snapshot(model)
    architecture.call(model, architecture.inputs(3))
    found = differences(model, before)
    assert "tensors: buffer norm1.running_mean: bytes changed (32 bytes)" in found
    assert not any("parameter" in line for line in found)


def test_many_changes_are_counted() -> None:
    model = ZOO["bert"].build()
    before = snapshot(model)
    model.train()
    with pytest.raises(AssertionError, match=r"changed in \d+ ways(.|\n)*and \d+ more"):
        assert_unchanged(model, before)


@pytest.mark.parametrize("name", ZOO)
def test_calls_and_gradients_change_nothing(name: str) -> None:
    architecture = ZOO[name]
    model = architecture.build().requires_grad_(False)
    before = snapshot(model)
    output = architecture.call(model, architecture.inputs(2))
    with torch.no_grad():
        architecture.call(model, architecture.inputs(2, mask=False))
    assert not output.requires_grad
    assert_unchanged(model, before)
