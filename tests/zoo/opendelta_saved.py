"""Deltas that the real OpenDelta saved, with the backbone and the logits that it computed."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

SAVED = ("bert", "t5", "gpt2", "opt")


@functools.cache
def saved_backbone(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The backbone in ``folder`` in evaluation mode, and the inputs that the logits belong to."""
    saved = torch.load(folder / "backbone.pt", weights_only=True)
    kind = getattr(transformers, saved["cls"])
    fields = {
        name: value for name, value in saved["config"].items() if name not in ("torch_dtype", "transformers_version")
    }
    model = kind(kind.config_class(**fields))
    missing, _ = model.load_state_dict(saved["state_dict"], strict=False)
    assert not [name for name in missing if "position_ids" not in name]
    inputs = {name: saved[name] for name in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = saved["decoder_input_ids"]
    return model.eval(), inputs


def saved_delta(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The config, the leaves under this library's names, and OpenDelta's logits; skips where it could not make one."""
    if not folder.is_dir():
        pytest.skip(f"OpenDelta makes no {folder.name} on {folder.parent.name}")
    config = json.loads((folder / "config.json").read_text())
    leaves = torch.load(folder / "pytorch_model.bin", weights_only=True)
    expected = torch.load(folder / "expected.pt", weights_only=True)["logits"]
    return config, {name.replace(".modulelist.", "."): leaf for name, leaf in leaves.items()}, expected
