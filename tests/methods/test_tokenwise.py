"""Functions of each token alone: batched over members, the same as mapped, and where they have to be mapped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.methods.config import METHODS
from funcdelta.run import fold as lift
from funcdelta.run.fold import all_tokens


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each site took all members at once, in the order of the calls."""
    seen: list[bool] = []

    def noted(*args: object) -> Tensor | None:
        out = all_tokens(*args)  # type: ignore[arg-type]
        seen.append(out is not None)
        return out

    monkeypatch.setattr(lift, "all_tokens", noted)
    return seen


def backbone(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()


def members(delta: fd.DeltaModel, n: int = 3) -> dict[str, Tensor]:
    return delta.random_members(n, delta.plan.present(dict.fromkeys(delta.names)))


METHODS_OF_TOKENS = {
    "lora": fd.LoraConfig(lora_r=2, modified_modules=["linear1", "linear2"]),
    "adapter": fd.AdapterConfig(bottleneck_dim=3, modified_modules=["linear1", "norm1"]),
    "parallel_adapter": fd.ParallelAdapterConfig(bottleneck_dim=3, modified_modules=["linear1", "linear2"]),
    "low_rank_adapter": fd.LowRankAdapterConfig(reduction_factor=2, low_rank_rank=2, modified_modules=["linear1"]),
    "bitfit": fd.BitFitConfig(modified_modules=["linear1", "norm2"]),
}


@pytest.mark.parametrize("name", METHODS_OF_TOKENS)
def test_all_members_in_one_call_give_what_a_map_and_a_loop_give(
    name: str, routes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = fd.DeltaModel(backbone(), METHODS_OF_TOKENS[name])
    stack, x = members(delta), torch.randn(3, 2, 5, 8)

    def loss(stack: dict[str, Tensor], engine: str) -> Tensor:
        return (delta.apply_many(stack, x, in_dims=0, engine=engine) ** 3).sum((1, 2, 3))

    found, grads = fd.value_and_grad(lambda stack: loss(stack, "fold"))(stack)
    assert routes
    assert all(routes)
    monkeypatch.setattr(torch, "vmap", lambda *_, **__: pytest.fail("mapped"))
    torch.testing.assert_close(loss(stack, "fold"), found)
    monkeypatch.undo()
    monkeypatch.setattr(lift, "all_tokens", lambda *_: None)
    for engine in ("fold", "loop"):
        expected, slow = fd.value_and_grad(lambda stack, engine=engine: loss(stack, engine))(stack)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for key in slow:
            torch.testing.assert_close(grads[key], slow[key], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "x", "config"),
    [
        (
            lambda: backbone(batch_first=False),
            torch.randn(5, 2, 8),
            fd.LoraConfig(modified_modules=["linear1"], batch_dim=1),
        ),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 1)), torch.randn(2, 3, 5), fd.LoraConfig(modified_modules=["0"])),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 1)), torch.randn(2, 3, 5), fd.AdapterConfig(modified_modules=["0"])),
        (
            lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)),
            torch.randint(9, (2, 5)),
            fd.LoraConfig(modified_modules=["0"]),
        ),
        (backbone, torch.randn(2, 5, 8), fd.AdapterConfig(modified_modules=["linear1"], axis_order=(0, 1, 2))),
    ],
    ids=["rows second", "convolution", "channels first", "embedding", "axis_order"],
)  # fmt: skip
def test_what_has_to_be_mapped_is_mapped(
    make: Callable[[], nn.Module], x: Tensor, config: fd.BaseDeltaConfig, routes: list[bool]
) -> None:
    delta = fd.DeltaModel(make(), config)
    stack = members(delta)
    expected = delta.apply_many(stack, x, engine="loop")
    torch.testing.assert_close(delta.apply_many(stack, x, engine="fold"), expected, rtol=1e-4, atol=1e-5)
    assert not any(routes)


def test_parts_of_a_fused_projection_in_one_call(routes: list[bool]) -> None:
    delta = fd.DeltaModel(
        nn.Sequential(nn.Linear(4, 12)),
        fd.LoraConfig(lora_r=2, modified_modules=["0"], enable_lora=(True, False, True)),
    )
    stack, x = members(delta), torch.randn(3, 2, 5, 4)
    torch.testing.assert_close(
        delta.apply_many(stack, x, in_dims=0, engine="fold"), delta.apply_many(stack, x, in_dims=0, engine="loop")
    )
    torch.testing.assert_close(
        delta.apply_rows(stack, [2, -1, 0], x[:, 0]),
        torch.cat([delta.apply(fd.take(stack, i) if i >= 0 else {}, x[k, :1]) for k, i in enumerate([2, -1, 0])]),
    )
    assert routes
    assert all(routes)


def test_dropout_is_drawn_for_each_token_of_each_member(routes: list[bool]) -> None:
    config = fd.LoraConfig(lora_r=2, lora_dropout=0.5, modified_modules=["0"])
    delta = fd.DeltaModel(nn.Sequential(nn.Linear(4, 6)), config).mode(train=True)
    stack = fd.stack([fd.take(members(delta), 0)] * 3)
    outs = delta.apply_many(stack, torch.ones(40, 4), engine="fold")
    assert routes
    assert all(routes)
    assert not torch.equal(outs[0], outs[1])
    rows = {tuple(row.tolist()) for row in (outs[0] * 1e4).round().long()}
    assert len(rows) > 4


@pytest.fixture
def method() -> Iterator[Callable[..., fd.DeltaModel]]:
    """Makes a delta whose ``after`` is the function given, said to be tokenwise."""

    def make(after: Callable[[dict[str, Tensor], Tensor], Tensor]) -> fd.DeltaModel:
        @fd.register("test_said_tokenwise")
        @dataclass(frozen=True)
        class SaidConfig(fd.BaseDeltaConfig):
            def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
                return {"gain": torch.ones(site.width)}

            def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
                return after(p, y)

            def tokenwise(self, site: fd.Site) -> bool:
                return True

        return fd.DeltaModel(nn.Sequential(nn.Linear(4, 6)), SaidConfig(modified_modules=["0"]))

    yield make
    METHODS.pop("test_said_tokenwise", None)


def test_a_method_that_is_not_tokenwise_though_it_says_so(method: Callable[..., fd.DeltaModel]) -> None:
    delta = method(lambda p, y: (y * p["gain"]).reshape(-1, 5, 6))
    with pytest.raises(fd.errors.ConfigError) as caught:
        delta.apply_many(delta.init(0, n=3), torch.ones(2, 5, 4), engine="fold")
    for piece in (
        "The method at 0",
        "members' tokens (2, 10, 6) it made (4, 5, 6)",
        "fd.linear",
        "leave tokenwise out",
    ):
        assert piece in str(caught.value)


def test_leaves_arrive_as_they_are_described(method: Callable[..., fd.DeltaModel]) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def after(p: dict[str, Tensor], y: Tensor) -> Tensor:
        shapes.append((tuple(p["gain"].shape), tuple(y.shape)))
        return y * p["gain"]

    delta = method(after)
    delta.apply_many(delta.init(0, n=3), torch.ones(2, 5, 4), engine="fold")
    assert shapes[-1] == ((3, 1, 6), (3, 10, 6))


def test_every_tokenwise_method_of_the_library_is_tested_here() -> None:
    site = dataclasses.replace(fd.DeltaModel(backbone(), METHODS_OF_TOKENS["lora"]).plan.all()[0].site)
    said = {
        name
        for name, config in METHODS.items()
        if config.__module__.startswith("funcdelta.") and config().tokenwise(site)
    }
    assert said == set(METHODS_OF_TOKENS)
