"""A delta follows its backbone: values written into it are seen, moved tensors are noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import funcdelta as fd


def norm_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()


def test_written_parameters_and_buffers_are_seen() -> None:
    backbone, x = norm_net(), torch.randn(5, 4)
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])
    params = delta.init(0)
    before = delta.apply(params, x)
    with torch.no_grad():
        backbone[0].weight.add_(1.0)
        backbone[1].running_mean.add_(0.5)
    after = delta.apply(params, x)
    assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(after, backbone(x))
        assert torch.equal(delta.apply({}, x), backbone(x))


def test_moved_tensors_are_noticed_and_refreshed() -> None:
    backbone, x = norm_net(), torch.randn(5, 4)
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])
    params = delta.init(0)
    delta.apply(params, x)
    backbone.to(torch.float64)
    with pytest.raises(fd.errors.StaleBackboneError, match=r"delta\.refresh\(\)"):
        delta.apply(params, x.double())
    delta.refresh()
    torch.testing.assert_close(delta.apply(params, x.double()), backbone(x.double()))


def test_a_first_call_in_inference_mode_does_not_spoil_training() -> None:
    backbone, x = norm_net(), torch.randn(5, 4)
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])
    params = delta.init(0)
    with torch.inference_mode():
        delta.apply(params, x)
        delta.apply_many(delta.init(0, n=3), x)
    losses, grads = fd.value_and_grad(lambda p: delta.apply(p, x).square().sum())(delta.init(0, n=3))
    assert losses.shape == (3,)
    assert grads["2.lora.lora_B"].abs().sum() > 0
