"""Stacks of fresh members: drawn side by side, in pieces, and each as it is alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from handmade import MLP
from torch import nn

import funcdelta as fd
from funcdelta import fresh
from funcdelta.errors import ConfigError
from funcdelta.methods.config import BaseDeltaConfig

WIDE: dict[torch.dtype | None, str] = {None: "own", torch.float64: "f64", torch.bfloat16: "bf16"}
WAYS: dict[str, dict[str, Any]] = {
    "deltas": {},
    "copied": {"unfrozen_modules": ["deltas", "head"]},
    "redrawn": {"unfrozen_modules": ["deltas", "head"], "unfrozen_init": "fresh"},
}


CONFIGS: dict[str, BaseDeltaConfig] = {
    "lora": fd.LoraConfig(),
    "adapter": fd.AdapterConfig(),
    "compacter": fd.CompacterConfig(reduction_factor=2),
    "bitfit": fd.BitFitConfig(),
}


def made(config: BaseDeltaConfig, backbone: torch.dtype, **more: Any) -> fd.DeltaModel:
    return fd.DeltaModel(MLP().to(backbone).eval(), config.replace(modified_modules=["a", "b"], **more))


@pytest.mark.parametrize("dtype", WIDE, ids=WIDE.values())
@pytest.mark.parametrize("backbone", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_row_of_a_stack_is_the_member_alone_wherever_a_piece_ends(
    method: str, way: str, backbone: torch.dtype, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = made(CONFIGS[method], backbone, **WAYS[way])
    seeds = fd.seeds(3, 7)
    alone = [delta.init(seed, dtype=dtype) for seed in seeds]
    for entries in (1, 60, fresh.CACHED):
        monkeypatch.setattr(fresh, "CACHED", entries)
        stack = delta.init(3, n=7, dtype=dtype)
        assert list(stack) == list(alone[0]) == list(delta.names)
        for name, leaf in stack.items():
            assert leaf.is_contiguous()
            assert not leaf.requires_grad
            assert leaf.dtype == alone[0][name].dtype
            assert torch.equal(leaf, torch.stack([one[name] for one in alone]))


def test_rows_are_of_their_own_and_know_constants() -> None:
    delta = made(fd.LoraConfig(), torch.float32)
    stack = delta.init(0, n=2)
    before = {name: leaf.clone() for name, leaf in delta.init(0, n=2).items()}
    stack["a.lora.lora_A"][0].zero_()
    assert torch.equal(stack["a.lora.lora_A"][1], before["a.lora.lora_A"][1])
    assert all(torch.equal(leaf, before[name]) for name, leaf in delta.init(0, n=2).items())
    assert sorted(fd.optim.adamw(0.1).init(stack, n=2).mu) == sorted(set(stack) - set(delta.constants))


class Growing(fd.LoraConfig):
    """A LoRA whose B is wider at every draw after the first: what ``init`` may not do."""

    drawn = 0

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        Growing.drawn += 1
        leaves = super().init(site, rng)
        b = leaves["lora_B"]
        assert isinstance(b, fd.Leaf)
        return {**leaves, "lora_B": nn.functional.pad(b.value, (0, Growing.drawn // 4))}


@pytest.mark.parametrize("n", [None, 3])
def test_other_shapes_than_at_the_start_are_refused(n: int | None) -> None:
    Growing.drawn = 0
    delta = fd.DeltaModel(MLP().eval(), Growing(lora_r=2, modified_modules=("a",)))
    with pytest.raises(ConfigError, match=r"Growing\.init at a returned other leaves.*expected \(\d, 2\) for lora_B"):
        [delta.init(0, n=n) for _ in range(4)]
