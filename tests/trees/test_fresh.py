"""Stacks of fresh members: drawn side by side, in pieces, and each as it is alone."""

from __future__ import annotations

from typing import Any, ClassVar

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


class CountedConfig(BaseDeltaConfig):
    """``y + c``, whose starts are counted in ``calls``."""

    calls: ClassVar[int] = 0
    default_name: ClassVar[str] = "counted"

    def start(self, rng: torch.Generator) -> torch.Tensor:
        return torch.full((4,), 2.0)

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        type(self).calls += 1
        return {"c": self.start(rng), "mark": fd.Leaf(torch.arange(3), trains=False)}

    def after(self, site: fd.Site, p: Any, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y + p["c"]


class Draws(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        return torch.randn(4, generator=rng)


class DrawsInPlace(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        return nn.init.uniform_(torch.empty(4), generator=rng)


class AsksForTheSeed(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        return torch.randn(4, generator=torch.Generator().manual_seed(rng.initial_seed()))


class ClonesIt(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        return torch.randn(4, generator=rng.clone_state())


class ReadsItsState(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        return rng.get_state()[8:12].float()


class PutsItBack(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        before = rng.get_state()
        drawn = torch.randn(4, generator=rng)
        rng.set_state(before)
        return drawn


class SeedsItAgain(CountedConfig):
    def start(self, rng: torch.Generator) -> torch.Tensor:
        drawn = torch.randn(4, generator=rng)
        rng.manual_seed(0)
        return drawn


USES = (Draws, DrawsInPlace, AsksForTheSeed, ClonesIt, ReadsItsState, PutsItBack, SeedsItAgain)


@pytest.mark.parametrize("method", [CountedConfig, *USES])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_a_start_without_random_numbers_is_computed_once(method: type[CountedConfig], dtype: Any) -> None:
    delta = fd.DeltaModel(MLP().eval(), method(modified_modules=["a", "b"]))
    method.calls = 0
    stack = delta.init(3, n=50, dtype=dtype)
    assert method.calls == (2 if method is CountedConfig else 100)
    alone = [delta.init(seed, dtype=dtype) for seed in fd.seeds(3, 50)]
    for name, leaf in stack.items():
        assert torch.equal(leaf, torch.stack([one[name] for one in alone]))
        assert leaf.is_contiguous()
    stack["a.counted.c"][0] += 1  # rows of their own
    assert torch.equal(stack["a.counted.c"][1], alone[1]["a.counted.c"])


def test_singular_vectors_of_a_weight_are_computed_once_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    from custom_methods import PissaConfig

    counted: list[int] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: (counted.append(1), svd(*args, **kwargs))[1])
    delta = fd.DeltaModel(MLP().eval(), PissaConfig(modified_modules=["a", "b"]), fd.LoraConfig(modified_modules=["a"]))
    counted.clear()
    stack = delta.init(0, n=20)
    assert len(counted) == 2
    for i, seed in enumerate(fd.seeds(0, 20)):
        assert all(torch.equal(stack[name][i], leaf) for name, leaf in delta.init(seed).items())
