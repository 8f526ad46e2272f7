"""torch's default dtype and default device decide nothing: the same leaves, the same draws, whatever they are."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from subjects import PAIRS, UNDER_LAW, subject
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.recipes import evolution, laplace, population, privacy, steering, swag
from funcdelta.trees.drawing import own_defaults

SETTINGS: dict[str, tuple[Callable[[Any], Any], Any, Any]] = {
    "float64": (torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "meta": (torch.set_default_device, "meta", None),
}


@contextlib.contextmanager
def setting(name: str) -> Iterator[None]:
    put, value, before = SETTINGS[name]
    put(value)
    try:
        yield
    finally:
        put(before)


def assert_same(found: Any, expected: Any) -> None:
    """The same leaves to the bit, in dtype and place, too."""
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert (found[name].dtype, found[name].device) == (leaf.dtype, leaf.device), name
        assert torch.equal(found[name], leaf), name


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", UNDER_LAW)
def test_every_method_starts_the_same(method: str, name: str) -> None:
    architecture = next(architecture for one, architecture in PAIRS if one == method)
    delta = subject(method, architecture).delta
    expected, stack = delta.init(3), delta.init(3, n=2)
    with setting(name):
        found, again = delta.init(3), delta.init(3, n=2)
    assert_same(found, expected)
    assert_same(again, stack)


class Drawn(nn.Module):
    """A user's own insert, made of modules, buffers and arithmetic on integers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.norm = nn.Linear(width, 3), nn.BatchNorm1d(3, track_running_stats=False)
        self.up = nn.Linear(3, width)
        self.register_buffer("steps", torch.arange(3) / 7 + torch.tensor(1 / 3) + torch.full((3,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.norm(self.down(x)) * self.steps)


@pytest.mark.parametrize("name", SETTINGS)
def test_inserts_of_modules_and_fresh_heads_start_the_same(name: str) -> None:
    @fd.register_module("drawn_alike")
    def drawn(site: fd.Site) -> nn.Module:
        return Drawn(site.width)

    backbone = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).eval()
    heads = {"unfrozen_modules": ["deltas", "1"], "unfrozen_init": "fresh"}
    delta = fd.DeltaModel(backbone, drawn(modified_modules=["0"], **heads))
    expected = delta.init(0)
    with setting(name):
        found = delta.init(0)
    assert_same(found, expected)


def test_a_scale_has_its_leafs_own_precision() -> None:
    backbone = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    configs = (
        fd.LoraConfig(lora_r=3, lora_alpha=1, modified_modules=["0"]),
        fd.ParallelAdapterConfig(bottleneck_dim=2, scaled=0.3, modified_modules=["1"]),
    )
    wide = fd.DeltaModel(backbone.double(), *configs).init(0)
    assert wide["0.lora.scale"].item() == 1 / 3
    assert wide["1.parallel_adapter.scaled"].item() == 0.3
    narrow = fd.DeltaModel(backbone.float(), *configs).init(0)
    assert narrow["0.lora.scale"].dtype == torch.float32
    assert torch.equal(narrow["0.lora.scale"], torch.tensor(1 / 3))


def draws() -> dict[str, Tensor]:
    """What is drawn elsewhere from a seed."""
    stack = {"w": torch.ones(3, 4, dtype=torch.float32, device="cpu")}
    moments = None
    for i in range(3):
        moments = swag.collect(moments, fd.tree.randn_like(stack, i))
    assert moments is not None
    shape = {"dtype": torch.float32, "device": "cpu"}
    losses = torch.tensor([0.1, 0.2, 0.3], **shape)
    rates = torch.ones(3, **shape)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (params["w"] * x).sum()

    rows, taken = privacy.batches(9, 0.4, seeds=[1, 2, 3])
    private = privacy.gradients(
        loss, stack, [torch.ones(*taken.shape, 4, **shape)], taken, [1, 2, 3], clip=0.3, noise=0.1, expected=2
    )
    return {
        "randn_like": fd.tree.randn_like(stack, 5)["w"],
        "swag": swag.sample(moments, 0)["w"],
        "dare": fd.algebra.dare(stack, 0.5, seed=1)["w"],
        "batch": rows,
        "private": private["w"],
        "rates": population.exploit_and_explore(stack, rates, losses, seed=0)[1],
        "softmax": laplace.softmax_draws(losses, torch.eye(3, **shape), 0, n=2),
        "evolution": evolution.gradient(lambda s: s["w"].sum((1, 2)), stack, 0, n=3, sigma=0.1)["w"],
        "ties": fd.algebra.ties(stack)["w"],
        "task": fd.algebra.task_arithmetic(stack, [0.1, 0.2, 0.3])["w"],
        "take": fd.take(stack, [2, 0])["w"],
        "mask": fd.take(stack, [True, False, True])["w"],
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_and_sums_are_the_same(name: str) -> None:
    expected = draws()
    with setting(name):
        found = draws()
    assert_same(found, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_dialled_deltas_are_the_same(name: str) -> None:
    delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 5)), lora_r=2, modified_modules=["0"])
    params = fd.tree.randn_like(delta.init(0), 0)
    expected = steering.dial(delta, params, [0.1, 0.2])[1]
    with setting(name):
        # The delta that comes out is built where the defaults are torch's own.
        doses = steering.dial(delta, params, [0.1, 0.2])[1] if name != "meta" else expected
    assert_same(doses, expected)


def test_setting_the_defaults_aside_is_of_one_thread_and_of_one_block() -> None:
    inside, done = threading.Event(), threading.Event()
    seen: list[Any] = []

    def elsewhere() -> None:
        inside.wait(10)
        seen.append((torch.ones(1).dtype, torch.get_default_dtype()))
        done.set()

    thread = threading.Thread(target=elsewhere)
    with setting("float64"):
        thread.start()
        with own_defaults():
            inside.set()
            done.wait(10)
            assert torch.ones(1).dtype == torch.float32
            assert torch.get_default_dtype() == torch.float64
        assert torch.ones(1).dtype == torch.float64
    thread.join(10)
    assert seen == [(torch.float64, torch.float64)]


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_made_in_the_block_is_what_torchs_own_defaults_make(name: str) -> None:
    """All ways of making a tensor; a dtype or a device that is given is taken."""

    def made() -> list[Tensor]:
        rng = torch.Generator().manual_seed(0)
        return [
            torch.randn(2, generator=rng),
            torch.rand(2, generator=rng),
            torch.normal(0.0, 1.0, (2,), generator=rng),
            torch.empty(3).uniform_(-1, 1, generator=rng),
            nn.init.normal_(torch.empty(2, 2), generator=rng),
            torch.zeros(2),
            torch.ones(2, dtype=None),
            torch.full((2,), 0.3),
            torch.full((2,), 3),
            torch.arange(3),
            torch.arange(0.0, 1.0, 0.25),
            torch.arange(3) / 7,
            torch.tensor([1, 2]).sqrt(),
            torch.tensor([0.1, 0.2]),
            torch.tensor(0.1).to(torch.float32),  # of one number more digits are kept
            torch.scalar_tensor(0.1).to(torch.float32),
            torch.tensor([True, False]),
            torch.as_tensor([0.1]),
            torch.linspace(0, 1, 5),
            torch.eye(2),
            torch.hann_window(4),
            torch.where(torch.tensor([True, False]), 0.5, 0.25),
            torch.full((2,), 1j),
            torch.zeros(2, dtype=torch.float64) + 0.1,
            torch.ones(2, dtype=torch.int64),
            torch.randint(5, (3,), generator=rng),
            torch.zeros(1, dtype=torch.float16).exp(),
        ]

    expected = made()
    with setting(name), own_defaults():
        found = made()
    assert_same(dict(enumerate(found)), dict(enumerate(expected)))
