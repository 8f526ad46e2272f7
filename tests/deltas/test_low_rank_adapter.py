"""The low-rank adapter against OpenDelta's own numbers and against modules written by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from handmade import MLP, assert_acts, assert_close, assert_engines_agree, logits, raises_saying, random_params
from opendelta_saved import SAVED, saved_backbone, saved_delta
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import ZOO

import funcdelta as fd


@pytest.mark.parametrize("name", SAVED)
def test_opendeltas_logits(opendelta_fixtures: Path, name: str) -> None:
    model, inputs = saved_backbone(opendelta_fixtures / name)
    config, params, expected = saved_delta(opendelta_fixtures / name / "low_rank_adapter")
    delta = fd.LowRankAdapterModel(model, reduction_factor=config["reduction_factor"])
    assert params.keys() == set(delta.names)  # its own sites are OpenDelta's
    assert_acts(expected, logits(model(**inputs)))
    assert float((logits(delta.apply(params, **inputs)) - expected).abs().max()) < 1e-5


class ByHand(nn.Module):
    """The site and two linear layers whose matrices are written out: h + U act(D h + d) + u."""

    def __init__(self, site: nn.Module, p: dict[str, Tensor]) -> None:
        super().__init__()
        self.site, self.p = site, {key.partition("low_rank_adapter.")[2]: leaf for key, leaf in p.items()}

    def forward(self, x: Tensor) -> Tensor:
        h, p = self.site(x), self.p
        # Written as the sum of outer products, so that a rank above 1 means something.
        down, up = (
            sum(torch.outer(p[f"{n}.W_left"][:, k], p[f"{n}.W_right"][k]) for k in range(p[f"{n}.W_left"].shape[1]))
            for n in ("down_sampler", "up_sampler")
        )
        hidden = F.relu(h @ down + p["down_sampler.b"])
        return h + hidden @ up + p["up_sampler.b"]


@pytest.mark.parametrize("rank", [1, 2, 7], ids=["rank 1", "rank 2", "more than the widths"])
def test_it_is_the_hand_written_module(rank: int) -> None:
    model, x = MLP().eval(), torch.randn(2, 5, 4)
    delta = fd.LowRankAdapterModel(
        model, modified_modules=["b"], reduction_factor=2, low_rank_rank=rank, non_linearity="relu"
    )
    assert delta.shapes == {
        "b.low_rank_adapter.down_sampler.W_left": (8, rank),
        "b.low_rank_adapter.down_sampler.W_right": (rank, 4),
        "b.low_rank_adapter.down_sampler.b": (4,),
        "b.low_rank_adapter.up_sampler.W_left": (4, rank),
        "b.low_rank_adapter.up_sampler.W_right": (rank, 8),
        "b.low_rank_adapter.up_sampler.b": (8,),
    }
    params, by_hand = random_params(delta), copy.deepcopy(model)
    by_hand.b = ByHand(model.b, params)
    assert_acts(by_hand(x), model(x))
    assert_close(delta.apply(params, x), by_hand(x))
    assert_engines_agree(delta, random_params(delta, 3), x)


@pytest.mark.parametrize(("kind", "largest"), [("glorot-uniform", 3**0.5), ("glorot-normal", 6.0)])
def test_it_starts_as_opendeltas_layers(kind: str, largest: float) -> None:
    model = nn.Sequential(nn.Linear(4, 768))
    params = fd.LowRankAdapterModel(model, modified_modules=["0"], low_rank_w_init=kind).init(0)
    assert sum(leaf.numel() for leaf in params.values()) == 2376
    for name, leaf in params.items():
        if name.endswith(".b"):
            assert not leaf.any()
        elif leaf.numel() > 100:
            deviation = 2 / sum(leaf.shape) ** 0.5  # Glorot's with gain sqrt 2
            assert 0.9 < float(leaf.std()) / deviation < 1.1
            assert float(leaf.abs().max()) <= largest * deviation * 1.0001
            assert (float(leaf.abs().max()) > 3**0.5 * deviation) == (kind == "glorot-normal")


def test_it_says_what_is_wrong() -> None:
    with raises_saying(fd.errors.MatchError, "b has 8 outputs", "reduction_factor=32", "at most 8"):
        fd.LowRankAdapterModel(MLP(), modified_modules=["b"])
    with raises_saying(fd.errors.ConfigError, "low_rank_rank=0", "at least 1"):
        fd.LowRankAdapterConfig(low_rank_rank=0)
    with raises_saying(fd.errors.ConfigError, "low_rank_w_init='glorot'", "glorot-uniform"):
        fd.LowRankAdapterConfig(low_rank_w_init="glorot")
    delta = fd.LowRankAdapterModel(MLP(), modified_modules=["b"], reduction_factor=2)
    with raises_saying(fd.errors.MergeError, "low_rank_adapter at b cannot be merged", "non-linear"):
        delta.merge(delta.init(0))


def test_half_precision_is_computed_in_the_leaves_own() -> None:
    model, inputs = ZOO["llama"].build().bfloat16(), ZOO["llama"].inputs(2)
    delta = fd.LowRankAdapterModel(model, reduction_factor=4)
    params = delta.init(0)
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}
    assert logits(delta.apply(params, **inputs)).dtype == torch.bfloat16
