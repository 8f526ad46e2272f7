"""Whatever takes a count says so of what is none: negative, a truth value, a fraction, and more than there can be."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.functional.hypercomplex_widths import fits

DELTA = fd.LoraModel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), lora_r=2, modified_modules=["0"])
PARAMS, STACK, X = DELTA.init(0), DELTA.init(0, n=3), torch.randn(2, 4)


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return DELTA.apply(params, x).square().sum()


def config(kind: str, field: str) -> Callable[[Any], Any]:
    def build(value: Any) -> Any:
        return fd.DeltaModel(DELTA.backbone, getattr(fd, kind)(modified_modules=["0"], **{field: value}))

    return build


COUNTS: dict[str, Callable[[Any], Any]] = {
    "seeds": lambda n: fd.seeds(0, n),
    "init": lambda n: DELTA.init(0, n=n),
    "init of several seeds": lambda n: DELTA.init([1, 2], n=n),
    "random_members": lambda n: DELTA.random_members(n, frozenset(["lora"])),
    "broadcast": lambda n: fd.broadcast(PARAMS, n),
    "chunks of members": lambda n: DELTA.apply_many(STACK, X, chunk_size=n),
    "chunks of gradients": lambda n: fd.value_and_grad(loss, chunk_size=n)(STACK, X),
    "chunks of rows": lambda n: fd.per_sample_grads(loss, chunk_size=n)(PARAMS, X),
    "chunks of outputs": lambda n: fd.jacobian(DELTA.apply, PARAMS, X, chunk_size=n),
    "shard": lambda n: fd.distributed.shard(n),
    "load_shards": lambda n: fd.distributed.load_shards(DELTA, "nowhere", n),
    "adamw": lambda n: fd.optim.adamw(lr=1e-3).init(STACK, n=n),
    "muon": lambda n: fd.optim.muon(lr=1e-3).init(STACK, n=n),
    "cosine": lambda n: fd.optim.cosine(1e-3, n)(torch.tensor(1)),
    "Resident": lambda n: fd.Resident(DELTA, n),
    "truncate": lambda n: fd.algebra.truncate(DELTA, PARAMS, n),
    "unroll": lambda n: fd.unroll(lambda state, i: state, torch.zeros(2), n),
    "conjugate_gradient": lambda n: fd.conjugate_gradient(lambda v: v, PARAMS, n),
    "lora_r": config("LoraConfig", "lora_r"),
    "bottleneck_dim": config("AdapterConfig", "bottleneck_dim"),
    "reduction_factor": config("CompacterConfig", "reduction_factor"),
    "hypercomplex_division": config("CompacterConfig", "hypercomplex_division"),
    "prefix_token_num": config("PrefixConfig", "prefix_token_num"),
    "soft_token_num": config("SoftPromptConfig", "soft_token_num"),
}
BAD: dict[str, Any] = {"negative": -1, "true": True, "a fraction": 1.5, "a float": 3.0, "a word": "3"}
HUGE = {"huge": 2**70, "longer than Python writes": 10**5000}


@contextmanager
def ends_soon() -> Iterator[None]:
    """The block fails where it takes longer than ten seconds."""

    def fail(*_: Any) -> None:
        raise TimeoutError("this does not end")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("value", [*BAD, *HUGE])
@pytest.mark.parametrize("what", COUNTS)
def test_what_is_no_count_is_refused(what: str, value: str) -> None:
    with ends_soon(), pytest.raises(fd.errors.FuncdeltaError) as caught:
        COUNTS[what](BAD.get(value, HUGE.get(value)))
    assert len(str(caught.value)) < 1000


def test_a_seed_longer_than_python_writes_is_refused() -> None:
    with pytest.raises(fd.ParamsError, match="A seed must be an integer"):
        fd.seeds(10**5000, 3)


def test_the_next_width_that_a_compacter_fits() -> None:
    """As trying one width after the other finds it."""
    for division in (2, 3, 4):
        for factor in (1, 2, 5, 16):
            config = fd.CompacterConfig(reduction_factor=factor, hypercomplex_division=division)
            for width in range(1, 40):
                if fits(width, division, factor):
                    continue
                delta = nn.Sequential(nn.Linear(2, width))
                with pytest.raises(fd.errors.FuncdeltaError) as caught:
                    fd.DeltaModel(delta, config.replace(modified_modules=["0"]))
                above = next(one for one in range(width + 1, 1000) if fits(one, division, factor))
                assert f"{above}" in str(caught.value).partition("Widths nearby that work: ")[2]
