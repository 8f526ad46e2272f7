"""The zoo's architectures that are not from Transformers: each a few lines of plain ``torch.nn``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zoo_architecture import CLASSES, HIDDEN, VOCABULARY, Architecture, builder, numbers, text


class ResidualBlock(nn.Module):
    """``y = x + down(gelu(up(norm(x))))`` over the last axis: (..., HIDDEN) to (..., HIDDEN)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 24)
        self.down = nn.Linear(24, HIDDEN)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden))))


class PlainMLP(nn.Module):
    """Two residual blocks on vectors: (b, 10) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(10, HIDDEN)
        self.blocks = nn.ModuleList([ResidualBlock(), ResidualBlock()])
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.stem(features)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Conv2dNet(nn.Module):
    """Convolutions, one of them depthwise, with BatchNorm: (b, 3, 9, 9) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        # Without a bias: a bias delta has to create one here.
        self.conv2 = nn.Conv2d(8, 12, (3, 1), stride=2, padding=(1, 0), bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.hidden = nn.Linear(12 * 3 * 3, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.silu(self.norm1(self.conv1(images)))
        maps = nn.functional.silu(self.norm2(self.conv2(self.depthwise(maps))))
        return self.head(nn.functional.silu(self.hidden(maps.flatten(1))))


class Conv1dNet(nn.Module):
    """Convolutions over time with BatchNorm, one of them dilated: (b, 4, 12) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm1d(8)
        self.conv2 = nn.Conv1d(8, 12, 3, stride=2, dilation=2, padding=2)
        self.hidden = nn.Linear(12 * 6, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, signal: Tensor) -> Tensor:
        maps = nn.functional.silu(self.norm1(self.conv1(signal)))
        maps = nn.functional.silu(self.conv2(maps))
        return self.head(nn.functional.silu(self.hidden(maps.flatten(1))))


def masked_mean(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean over the tokens whose mask is 1 (all, without a mask): (b, s, d) and (b, s) to (b, d)."""
    if attention_mask is None:
        return hidden.mean(dim=1)
    weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


class TorchTransformer(nn.Module):
    """``nn.TransformerEncoder`` between an embedding and a head: (b, s) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.position = nn.Parameter(torch.zeros(32, HIDDEN))
        layer = nn.TransformerEncoderLayer(HIDDEN, 2, dim_feedforward=24, batch_first=True)
        # A nested tensor would cut the output to the longest row of the batch and warns as a prototype.
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids) + self.position[: input_ids.shape[1]]
        padding = None if attention_mask is None else attention_mask == 0
        hidden = self.encoder(hidden, src_key_padding_mask=padding)
        return self.head(masked_mean(hidden, attention_mask))


class EmbeddingBagModel(nn.Module):
    """Masked mean of token embeddings, then two linear layers: (b, s) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HIDDEN, padding_idx=1)
        self.project = nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.project(masked_mean(self.tokens(input_ids), attention_mask))))


def itself(output: Tensor) -> Tensor:
    """The output, a tensor already."""
    return output


PLAIN = [
    Architecture(
        name="mlp",
        build=builder(PlainMLP),
        inputs=numbers(None, 10),
        linears=("stem", "up", "down"),
        blocks=("blocks.0", "down"),
        head="head",
        default_target="up",
        output=itself,
    ),
    Architecture(
        name="conv2d",
        build=builder(Conv2dNet),
        inputs=numbers(None, 3, 9, 9),
        linears=("conv1", "conv2", "hidden"),
        blocks=("hidden",),
        head="head",
        default_target="conv2",
        output=itself,
        flags=frozenset({"batch_norm"}),
    ),
    Architecture(
        name="conv1d",
        build=builder(Conv1dNet),
        inputs=numbers(None, 4, 12),
        linears=("conv1", "conv2", "hidden"),
        blocks=("hidden",),
        head="head",
        default_target="conv2",
        output=itself,
        flags=frozenset({"batch_norm"}),
    ),
    Architecture(
        name="torch_transformer",
        build=builder(TorchTransformer),
        inputs=text,
        linears=("linear1", "linear2", "embedding"),
        blocks=("self_attn", "linear2"),
        head="head",
        default_target="linear1",
        output=itself,
        flags=frozenset({"mask", "dropout", "needs_math_attention", "fused_no_grad"}),
    ),
    Architecture(
        name="embedding",
        build=builder(EmbeddingBagModel),
        inputs=text,
        linears=("tokens", "project"),
        blocks=("tokens", "project"),
        head="head",
        default_target="tokens",
        output=itself,
        flags=frozenset({"mask"}),
    ),
]
