"""Hard models of a few lines of ``torch.nn``: routes, packed rows, control flow, tables read twice, own layers."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.nn.functional as F
from hard_case import CLASSES, VOCABULARY, Batch, Hard, floats, right_padding, tokens
from torch import Tensor, nn

WIDTH = 6
LENGTH = 6


class Experts(nn.Module):
    """Every token goes to the expert with the highest gate, expert by expert: (b, s) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.gate = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.emb(ids)
        flat = hidden.reshape(-1, WIDTH)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            at = torch.where(chosen == i)[0]
            out = out.index_add(0, at, expert(flat[at]) * weight[at, None])
        return self.head((flat + out).view(hidden.shape).mean(1))


class Capacity(nn.Module):
    """An expert takes the first two rows of the batch that choose it: (b, 5) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.gate, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2), nn.Linear(WIDTH, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inp(x))
        weight, chosen = self.gate(hidden).softmax(-1).max(-1)
        hot = F.one_hot(chosen, 2)
        kept = ((hot.cumsum(0) * hot).sum(-1) <= 2).to(x.dtype)
        parts = [(weight * (chosen == i) * kept)[:, None] * expert(hidden) for i, expert in enumerate(self.experts)]
        return self.head(hidden + sum(parts))


class PaddingFree(nn.Module):
    """Layers run on the tokens that are there, (tokens, width), as in unpadded BERTs."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.layer, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        keep = mask.bool()
        hidden = torch.tanh(self.layer(self.emb(ids)[keep]))
        padded = hidden.new_zeros(*ids.shape, WIDTH).masked_scatter(keep[..., None], hidden)
        return self.head(padded.sum(1))


class Packed(nn.Module):
    """All rows in one row of tokens, which attend within their own row by a mask of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.out, self.head = (
            nn.Embedding(VOCABULARY, WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        row, place = mask.nonzero(as_tuple=True)
        hidden = self.emb(ids[row, place][None])
        q, k, v = self.qkv(hidden).chunk(3, -1)
        same_row = row[:, None] == row[None]
        hidden = hidden + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=same_row[None]))
        sums = hidden.new_zeros(len(ids), WIDTH).index_add(0, row, torch.tanh(hidden[0]))
        return self.head(sums)


class Recurrent(nn.Module):
    """An LSTM between two sites; with ``packed`` it reads a packed sequence of rows sorted by length."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.emb, self.inp = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.lstm, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        hidden = self.inp(self.emb(ids))
        if self.packed:
            hidden = nn.utils.rnn.pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        _, (last, _) = self.lstm(hidden)
        return self.head(last[0])


class BatchNorm(nn.Module):
    """A convolution, batch norm and a head: (b, 3, 6, 6) to (b, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class EarlyExit(nn.Module):
    """Leaves after the first layer when the batch as a whole is confident."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.exit = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.second, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        early = self.exit(hidden)
        if early.softmax(-1).amax(-1).mean() > 0.62:
            return early
        return self.head(torch.tanh(self.second(hidden)))


class Shuffled(nn.Module):
    """Calls its layer on rows in another order and puts them back: ``randperm`` draws it, ``argsort`` reads it."""

    def __init__(self, draws: bool) -> None:
        super().__init__()
        self.draws = draws
        self.inp, self.layer, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inp(x))
        order = torch.randperm(len(x)) if self.draws else hidden[:, 0].argsort()
        return self.head(torch.tanh(self.layer(hidden[order]))[order.argsort()])


class Contrastive(nn.Module):
    """Similarities of all rows with all rows: (b, 5) to (b, b)."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = F.normalize(self.out(torch.tanh(self.inp(x))), dim=-1)
        return z @ z.mT


class Steps(nn.Module):
    """Applies its layer as often as a number says."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.layer, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, steps: int = 2) -> Tensor:
        hidden = self.inp(x)
        for _ in range(steps):
            hidden = torch.tanh(self.layer(hidden))
        return self.head(hidden)


class Axis(nn.Module):
    """Subtracts the mean along the axis that a number names: 1 keeps rows apart, 0 mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, dim: int = 1) -> Tensor:
        hidden = self.layer(x)
        return self.head(hidden - hidden.mean(dim, keepdim=True))


class ReadsTable(nn.Module):
    """Looks tokens up in a table that it also reads for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.mid(self.table(ids))) @ self.table.weight.T


class SometimesReads(nn.Module):
    """Calls its layer, or reads the layer's weight instead when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.layer, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, reads: bool = False) -> Tensor:
        hidden = torch.tanh(self.inp(x))
        hidden = hidden @ self.layer.weight.mT + self.layer.bias if reads else self.layer(hidden)
        return self.head(torch.tanh(hidden))


class NumpySort(nn.Module):
    """Sorts its rows by what numpy says: row i of the output is another one's."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inp(x)
        return self.head(hidden[torch.from_numpy(hidden[:, 0].detach().numpy().argsort().copy())])


class ToList(nn.Module):
    """Turns the sign of rows in Python and subtracts the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inp(x)
        turned = [row if positive else -row for row, positive in zip(hidden, (hidden[:, 0] > 0).tolist(), strict=True)]
        hidden = torch.stack(turned)
        return self.head(hidden - hidden.mean(0))


class TanhBlock(nn.Module):
    """``tanh(lin(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.lin(x))


def patched() -> nn.Module:
    """Two blocks and a head; a closure over the first block's forward stands in its place."""
    model = nn.Sequential(TanhBlock(), TanhBlock(), nn.Linear(5, CLASSES))
    own = model[0].forward
    model[0].forward = lambda x: own(x) * 0.5  # type: ignore[method-assign]
    return model


class TwoNames(nn.Module):
    """One layer under two names, called under both, and a block that stands three times in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.a, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.b = self.a
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())] * 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.b(torch.tanh(self.a(self.inp(x)))))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class SequenceFirst(nn.Module):
    """``nn.TransformerEncoder`` over (s, b, width), torch's default."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, CLASSES)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.emb(ids)).mean(0))


class Nested(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask: in evaluation its fast path runs on nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, CLASSES)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2)

    def forward(self, ids: Tensor, pad: Tensor) -> Tensor:
        return self.head(self.encoder(self.emb(ids), src_key_padding_mask=pad)[:, 0])


class Attends(nn.Module):
    """``nn.MultiheadAttention`` alone: it reads the weight of ``out_proj`` and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.attention, self.head = (
            nn.Embedding(VOCABULARY, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, CLASSES),
        )

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.emb(ids)
        return self.head(torch.tanh(self.attention(hidden, hidden, hidden, need_weights=False)[0]).mean(1))


class Bags(nn.Module):
    """Bags of unlike lengths in one flat list of tokens, with the offsets where each begins."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean"), nn.Linear(WIDTH, CLASSES)

    def forward(self, text: Tensor, offsets: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(text, offsets)))


class Graph(nn.Module):
    """Two rounds of message passing: nodes (v, 5) and an adjacency (v, v), dense or sparse, to (v, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.b(torch.tanh(adjacency @ self.a(x)))


class GraphBatch(nn.Module):
    """Several graphs in one: nodes (v, 5), edges (2, e) and each node's graph (v,) to (graphs, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor, graphs: int) -> Tensor:
        for layer in (self.a, self.b):
            sent = layer(x)
            x = torch.tanh(sent.index_add(0, edges[1], sent[edges[0]]))
        return self.head(x.new_zeros(graphs, WIDTH).index_add(0, graph, x))


class GraphConv(nn.Module):
    """A layer of one's own that looks like a linear one: its weight is (in, out) and it multiplies by ``a`` as well."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = width, out
        self.weight, self.bias = nn.Parameter(torch.zeros(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (x @ self.weight) + self.bias


class OwnLayers(nn.Module):
    """Two layers of a class of its own on graphs of three nodes: (b, 3, 5) and (b, 3, 3) to (b, 3, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = GraphConv(5, 5), GraphConv(5, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(x, adjacency)), adjacency)


class Causal(nn.Conv1d):
    """A convolution that pads on both sides and cuts what looks ahead."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)[..., : -int(self.padding[0])]


class ScaledLinear(nn.Linear):
    """A subclass of ``nn.Linear`` with a forward of its own: ``3 (W x + b)``."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class OffsetTable(nn.Embedding):
    """A table whose indices are moved by two, as OPT's positions."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 2)


class Subclasses(nn.Module):
    """Layers whose subclass has a forward of its own; a table that pads; one whose indices are moved."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=1)
        self.position = OffsetTable(LENGTH + 4, WIDTH)
        self.conv = Causal(WIDTH, WIDTH, 3, padding=2)
        self.scaled, self.head = ScaledLinear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids) + self.position(torch.arange(ids.shape[1]))
        hidden = torch.tanh(self.conv(hidden.mT).mT)
        return self.head(torch.tanh(self.scaled(hidden)).mean(1))


class Cached(nn.Module):
    """Keeps what it made of a trained table in a plain attribute, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.zeros(4, WIDTH)), nn.Linear(5, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if "made" not in self.cache:
            self.cache["made"] = torch.tanh(self.table).sum(0)
        return self.head(torch.tanh(self.layer(x) + self.cache["made"]) * self.calls)


def vectors(rows: int, seed: int, variant: int) -> Batch:
    """Rows of five numbers; variants are on other scales, which steer branches otherwise."""
    return {"x": floats(rows, seed, 5) * (1.0, 0.2, 3.0)[variant]}


def sequential(rows: int, seed: int, variant: int) -> Batch:
    """The same for an ``nn.Sequential``."""
    return {"input": vectors(rows, seed, variant)["x"]}


def ids(rows: int, seed: int, variant: int) -> Batch:
    """Token ids, of another length in each variant; in the second few tokens occur, so that routes are skewed."""
    return {"ids": tokens(rows, seed, (4, LENGTH, 3)[variant], (VOCABULARY, 12, VOCABULARY)[variant])}


@functools.cache
def by_expert() -> list[list[int]]:
    """The token ids that the gate of ``experts_balanced`` sends to each expert."""
    model = next(hard for hard in PLAIN if hard.name == "experts_balanced").build()
    routes = model.gate(model.emb.weight).argmax(-1)
    return [(routes == expert).nonzero()[:, 0].tolist() for expert in range(3)]


def routed(rows: int, seed: int, variant: int) -> Batch:
    """Two tokens for every expert in each row, which looks like rows in order; then as many as it happens."""
    if variant:
        return {"ids": tokens(rows, seed, 6)}
    rng = random.Random(seed)
    drawn = [[rng.choice(own) for own in by_expert() for _ in range(2)] for _ in range(rows)]
    return {"ids": torch.tensor([rng.sample(row, len(row)) for row in drawn])}


def padded_ids(rows: int, seed: int, variant: int) -> Batch:
    """Token ids, some of them the padding token 1."""
    found = tokens(rows, seed, (4, LENGTH)[variant])
    found[:, -1] = 1
    return {"ids": found}


def masked(rows: int, seed: int, variant: int) -> Batch:
    """Token ids and a mask: the first variant is not padded, the others differ in their lengths."""
    mask = torch.ones(rows, LENGTH, dtype=torch.long) if variant == 0 else right_padding(rows, LENGTH, variant)
    return {"ids": tokens(rows, seed, LENGTH), "mask": mask}


def nested(rows: int, seed: int, variant: int) -> Batch:
    """Token ids and where they are padding."""
    batch = masked(rows, seed, variant)
    return {"ids": batch["ids"], "pad": batch["mask"] == 0}


def lengths(rows: int, seed: int, variant: int) -> Batch:
    """Token ids and the length of each row."""
    batch = masked(rows, seed, variant)
    return {"ids": batch["ids"], "lengths": batch["mask"].sum(1)}


def sequence_first(rows: int, seed: int, variant: int) -> Batch:
    """Token ids (s, b)."""
    return {"ids": tokens(rows, seed, (4, 8, 3)[variant]).T.contiguous()}


def images(rows: int, seed: int, variant: int) -> Batch:
    """Images of 6 × 6, in the second variant of 8 × 8."""
    size = (6, 8)[variant]
    return {"x": floats(rows, seed, 3, size, size)}


def stepped(rows: int, seed: int, variant: int) -> Batch:
    """Rows and how often the layer is applied."""
    return {"x": floats(rows, seed, 5), "steps": (2, 5, 1)[variant]}


def along(rows: int, seed: int, variant: int) -> Batch:
    """Rows and the axis of the mean."""
    return {"x": floats(rows, seed, 5), "dim": (1, 0)[variant]}


def read_or_called(rows: int, seed: int, variant: int) -> Batch:
    """Rows and whether the layer's weight is read."""
    return {"x": floats(rows, seed, 5), "reads": bool(variant)}


def bags(rows: int, seed: int, variant: int) -> Batch:
    """Flat tokens and offsets: bags of 3, 1, 5, ... tokens, or of others."""
    sizes = [(3, 1, 5, 2, 4)[(row + variant) % 5] for row in range(rows)]
    offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    return {"text": tokens(1, seed, sum(sizes))[0], "offsets": offsets}


def bag(batch: Batch, row: int) -> Batch:
    """One bag alone."""
    ends = [*batch["offsets"].tolist(), len(batch["text"])]
    return {"text": batch["text"][ends[row] : ends[row + 1]], "offsets": torch.tensor([0])}


def adjacency(size: int, seed: int) -> Tensor:
    """A weighted adjacency with gaps (v, v)."""
    weights = floats(size, seed + 50, size)
    return weights * (weights.abs() > 0.4)


def dense_graph(rows: int, seed: int, variant: int) -> Batch:
    """Nodes and a dense adjacency."""
    return {"x": floats(rows, seed, 5), "adjacency": adjacency(rows, seed + 10 * variant)}


def coo_graph(rows: int, seed: int, variant: int) -> Batch:
    """Nodes and a sparse adjacency, the same one for every seed."""
    return {"x": floats(rows, seed, 5), "adjacency": adjacency(rows, 10 * variant).to_sparse()}


def batched_graph(rows: int, seed: int, variant: int) -> Batch:
    """A batch of signals on one graph with as many nodes as there are rows, so that shapes tell nothing."""
    return {"x": floats(rows, seed, rows, 5), "adjacency": adjacency(rows, 10 * variant)}


def one_graph(batch: Batch, row: int) -> Batch:
    """One row's signal on the same graph."""
    return {"x": batch["x"][row : row + 1], "adjacency": batch["adjacency"]}


def graphs(rows: int, seed: int, variant: int) -> Batch:
    """As many graphs as rows, each a ring of some nodes, in one list of nodes."""
    sizes = [(2, 3, 1, 4)[(row + variant) % 4] for row in range(rows)]
    graph = torch.arange(rows).repeat_interleave(torch.tensor(sizes))
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    source = torch.arange(len(graph))
    target = torch.cat([start + (torch.arange(size) + 1) % size for start, size in zip(starts, sizes, strict=True)])
    return {
        "x": floats(len(graph), seed, 5),
        "edges": torch.stack([source, target]),
        "graph": graph,
        "graphs": rows,
    }


def graph_alone(batch: Batch, row: int) -> Batch:
    """One graph of the list."""
    own = batch["graph"] == row
    edges = batch["edges"][:, own] - int(own.nonzero()[0])
    return {"x": batch["x"][own], "edges": edges, "graph": torch.zeros(int(own.sum())).long(), "graphs": 1}


def own_layers(rows: int, seed: int, variant: int) -> Batch:
    """Small graphs, one a row."""
    return {"x": floats(rows, seed, 3, 5), "adjacency": floats(rows, seed + 50 + variant, 3, 3)}


def column(batch: Batch, row: int) -> Batch:
    """One row of what is (s, b)."""
    return {"ids": batch["ids"][:, row : row + 1]}


def plain(name: str, make: Any, inputs: Any, *targets: str, flags: str = "", **options: Any) -> Hard:
    """A hard model with its flags in one string."""
    return Hard(name, make, inputs, targets, flags=frozenset(flags.split()), **options)


PLAIN = [
    plain("experts", Experts, ids, r"[r]experts\.\d+", "gate", variants=3),
    plain("experts_balanced", Experts, routed, r"[r]experts\.\d+", "head", variants=2),
    plain("experts_capacity", Capacity, vectors, "inp", r"[r]experts\.\d+", "head", flags="mixes", variants=3),
    plain("padding_free", PaddingFree, masked, "layer", "head", variants=3),
    plain("packed", Packed, masked, "qkv", "out", "head", variants=3),
    plain("lstm", lambda: Recurrent(False), lengths, "inp", "head", variants=2, flags="folds routes"),
    plain("lstm_packed", lambda: Recurrent(True), lengths, "inp", "head", variants=3),
    plain("batch_norm_training", BatchNorm, images, "conv", "head", flags="mixes training keeps", variants=2),
    plain("batch_norm", BatchNorm, images, "conv", "head", trained=("norm",), variants=2, flags="folds routes"),
    plain("early_exit", EarlyExit, vectors, "first", "exit", "head", flags="mixes", variants=3),
    plain("shuffle_randperm", lambda: Shuffled(True), vectors, "inp", "layer", "head", flags="draws", variants=2),
    plain("shuffle_argsort", lambda: Shuffled(False), vectors, "inp", "layer", "head", variants=2),
    plain("contrastive", Contrastive, vectors, "inp", "out", flags="mixes", variants=2),
    plain("integer_steps", Steps, stepped, "layer", "head", variants=3, flags="folds routes"),
    plain("integer_axis", Axis, along, "layer", "head", variants=2, flags="mixes"),
    plain("table_for_logits", ReadsTable, ids, "table", "mid", variants=2),
    plain("sometimes_reads", SometimesReads, read_or_called, "inp", "layer", variants=2),
    plain("numpy_sort", NumpySort, vectors, "inp", "head", flags="mixes", variants=2),
    plain("to_list", ToList, vectors, "inp", "head", flags="mixes", variants=2),
    plain("closure_outside", patched, sequential, "2", trained=("0",), variants=2, copies=False),
    plain("closure_inside", patched, sequential, "0.lin", "2", flags="may_refuse", variants=2, copies=False),
    plain("two_names_trained", TwoNames, vectors, "inp", trained=("a", "blocks.0"), variants=2),
    plain("two_names_sites", TwoNames, vectors, "a", "head", variants=2),
    plain("sequence_first", SequenceFirst, sequence_first, "linear1", "head", batch_dim=1, row=column, variants=3),
    plain("nested_linear", Nested, nested, "linear1", "head", variants=3, flags="routes"),
    plain("nested_out_proj", Nested, nested, "out_proj", variants=3, flags="routes"),
    plain("out_proj", Attends, ids, "out_proj", "head", variants=3),
    plain("bag_offsets", Bags, bags, "head", without_rows=("offsets",), row=bag, variants=2),
    plain(
        "graph_dense", Graph, dense_graph, "a", "b", flags="mixes", without_rows=("adjacency",), row=None, variants=2
    ),
    plain(
        "graph_sparse",
        Graph,
        coo_graph,
        *("a", "b"),
        flags="mixes",
        without_rows=("adjacency",),
        same_for_all=("adjacency",),
        row=None,
        variants=2,
    ),
    plain(
        "graph_signals",
        Graph,
        batched_graph,
        *("a", "b"),
        without_rows=("adjacency",),
        same_for_all=("adjacency",),
        row=one_graph,
        variants=2,
    ),
    plain("graph_batch", GraphBatch, graphs, "a", "head", without_rows=("edges", "graph"), row=graph_alone, variants=2),
    plain("own_layers", OwnLayers, own_layers, "c", "d", flags="may_refuse", turned=GraphConv, variants=2),
    plain("subclasses", Subclasses, padded_ids, "table", "position", "conv", "scaled", variants=2),
    plain("cached", Cached, vectors, "layer", trained=("table",), flags="keeps", variants=2),
]
