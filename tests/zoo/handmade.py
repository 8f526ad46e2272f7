"""Small modules written by hand, most with one odd habit, and what the tests of deltas on them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

ENGINES = ("loop", "vmap", "fold")


class MLP(nn.Module):
    """Three linear layers: (b, 4) to (b, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.b = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class Layers(nn.Module):
    """Twelve linear layers in a row, so that ``layer.1`` is a prefix of ``layer.10``: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(4, 4) for _ in range(12)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class Block(nn.Module):
    """A block whose layer has its own name: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class ReadsWeights(nn.Module):
    """Uses its layer's weight without ever calling the layer: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.read.weight.mT


class Dead(nn.Module):
    """Has a layer that nothing uses: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = nn.Linear(4, 4)
        self.dead = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.live(x)


class Twice(nn.Module):
    """One layer under two names, called under both: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """Token numbers (b, s) to logits (b, s, 11); the embedding and the head hold one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embedding(tokens))))


class Attention(nn.Module):
    """One head of ``scaled_dot_product_attention`` with an optional mask: (b, s, 4) to (b, s, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.v = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal).squeeze(1)


class Fails(nn.Module):
    """Raises between its two layers when it is told to: (b, 4) to (b, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        hidden = self.a(x)
        if fail:
            raise ZeroDivisionError("the model's own error")
        return self.b(hidden)


def transposed(width: int, out: int) -> nn.Module:
    """The linear layer of GPT-2, whose weight is (width, out)."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, width)


def hugging_face(name: str, **fields: Any) -> tuple[fd.DeltaModel, dict[str, Any]]:
    """A LoRA on an architecture of the zoo, and inputs for it."""
    architecture = ZOO[name]
    delta = fd.LoraModel(architecture.build(), modified_modules=[architecture.default_target], **fields)
    return delta, architecture.inputs(4)


def logits(output: Any) -> Tensor:
    """The logits of a model of Transformers, or the output itself."""
    return getattr(output, "logits", output)


def random_params(delta: fd.DeltaModel, n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """One member, or a stack of n, with every leaf that trains moved away from its start."""
    rng = torch.Generator().manual_seed(seed + 1)
    return {
        name: leaf if name in delta.constants else leaf + 0.3 * torch.randn(leaf.shape, generator=rng).to(leaf)
        for name, leaf in delta.init(seed, n=n).items()
    }


def low_rank(params: dict[str, Tensor], name: str) -> Tensor:
    """s B A of the leaves that start with ``name``."""
    return params[f"{name}.scale"] * params[f"{name}.lora_B"] @ params[f"{name}.lora_A"]


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, relative to the largest value."""
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def assert_acts(found: Tensor, bare: Tensor) -> None:
    """A comparison means something only where the delta changes the output."""
    assert float((found - bare).detach().abs().max()) > 1e-4


def assert_engines_agree(
    delta: fd.DeltaModel,
    stack: dict[str, Tensor],
    *args: Any,
    engines: tuple[str, ...] = (*ENGINES, "auto"),
    pick: Callable[[Any], Tensor] = lambda output: output,
    **kwargs: Any,
) -> Tensor:
    """Every engine gives what single calls give, member by member; returns those."""
    n = fd.members(stack)
    expected = torch.stack([pick(delta.apply(fd.take(stack, i), *args, **kwargs)) for i in range(n)])
    for engine in engines:
        assert_close(pick(delta.apply_many(stack, *args, engine=engine, **kwargs)), expected)
    return expected


@contextmanager
def raises_saying(kind: type[Exception], *pieces: str) -> Iterator[None]:
    """The block raises ``kind``, and its message has every one of ``pieces``."""
    with pytest.raises(kind) as caught:
        yield
    missing = [piece for piece in pieces if piece not in str(caught.value)]
    assert not missing, f"the message lacks {missing}: {caught.value}"
