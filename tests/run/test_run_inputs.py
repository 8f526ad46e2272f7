"""Inputs are read, not guessed: folding, picking rows and taking members against plain indexing by hand."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from handmade import raises_saying
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache

import funcdelta as fd
from funcdelta.run.containers import flatten, is_cache
from funcdelta.run.forward import accepts
from funcdelta.run.inputs import Inputs
from funcdelta.run.rows import read_rows

N, B, S = 3, 4, 5


class Takes(nn.Module):
    """Has names for its inputs; what they do is each case's own."""

    main_input_name = "input_ids"

    def forward(self, x: Any, y: Any = None, z: Any = None, **others: Any) -> Any:
        return x


def read(*args: Any, in_dims: Any = None, batch_dim: int = 0, n: int = N, entries: int | None = None, **kwargs: Any):
    return Inputs(Takes(), n, args, kwargs, in_dims, batch_dim, entries)


def csr(dense: Tensor) -> Tensor:
    """In rows; torch warns once that these are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return dense.to_sparse_csr()


def ragged(*rows: Tensor, **options: Any) -> Tensor:
    """A nested tensor; of these it warns, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor(list(rows), **options)


# -- the law: folded = each member alone, picked = indexed -----------------------------------------------------------


@dataclasses.dataclass
class Batch:
    """What people write instead of a dict."""

    x: Tensor
    kind: str = "plain"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    """The same, closed."""

    x: Tensor


@dataclasses.dataclass
class Case:
    """One structure of inputs.

    Attributes:
        call: a function of each row alone, (b, …) for b rows, which uses every input.
        alone: the inputs of member i, indexed by hand.
        pick: the inputs ``which`` of them, indexed by hand.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_dims: Any
    call: Callable[..., Tensor]
    alone: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    pick: Callable[[tuple[Any, ...], dict[str, Any], list[int]], tuple[tuple[Any, ...], dict[str, Any]]]
    batch_dim: int = 0


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.double)


def of_all(*args: Any, pick: Any, **kwargs: Any) -> Any:
    """A case whose inputs all members share."""
    return lambda call, **more: Case(args, kwargs, None, call, lambda _: (args, kwargs), pick, **more)


X, OWN = drawn(B, S), drawn(N, B, S)
ONE, OWN_ONE = drawn(1, S), drawn(N, 1, S)
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
MROPE = torch.arange(3 * B * S).reshape(3, B, S)
SQUARE, OWN_MROPE = torch.arange(4 * 4 * S).reshape(4, 4, S), torch.arange(N * 3 * B * S).reshape(N, 3, B, S)
TEXTS, IMAGES = ["a", "bbb", "cc", "d"], [drawn(3, 2 + i) for i in range(B)]
STARTS = torch.tensor([3, 0, 2, 2])
ENCODING = transformers.BatchEncoding({"x": X, "mask": MASK})


def total(batch: Any) -> Tensor:
    """Read as people read it, by attribute and by key."""
    return batch.x.sum(-1) * batch["mask"].sum(-1) + len(batch)


CASES: dict[str, Case] = {
    "one tensor": of_all(X, pick=lambda a, k, w: ((a[0][w],), k))(lambda x: x.sum(-1)),
    "each member's own": Case(
        (OWN,), {}, 0, lambda x: x.sum(-1), lambda i: ((OWN[i],), {}), lambda a, k, w: ((a[0][w],), k)
    ),
    "a mask of each member's own": Case(
        (X,),
        {"mask": torch.stack([MASK, MASK.flip(0), MASK * 0 + 1])},
        {"mask": 0},
        lambda x, mask: (x * mask).sum(-1),
        lambda i: ((X,), {"mask": [MASK, MASK.flip(0), MASK * 0 + 1][i]}),
        lambda a, k, w: ((a[0][w],), {"mask": k["mask"][w]}),
    ),
    "one shared batch besides": Case(
        (OWN, X),
        {},
        {"x": 0},
        lambda x, y: (x * y).sum(-1),
        lambda i: ((OWN[i], X), {}),
        lambda a, k, w: ((a[0][w], a[1][w]), k),
    ),
    "a single row, a number, a scalar and nothing": of_all(
        ONE, X, 2.0, scale=torch.tensor(3.0), nothing=None, pick=lambda a, k, w: ((a[0], a[1][w], a[2]), k)
    )(lambda one, x, two, scale, nothing: (x + one).sum(-1) * two * scale),
    "a single row of each member's own": Case(
        (X,),
        {"y": OWN_ONE},
        {"y": 0},
        lambda x, y: (x * y).sum(-1),
        lambda i: ((X,), {"y": OWN_ONE[i]}),
        lambda a, k, w: ((a[0][w],), k),
    ),
    "shared whole, though it has as many rows": Case(
        (OWN,),
        {"table": drawn(B, 2)},
        {"x": 0, "table": None},
        lambda x, table: x.sum(-1) * table.sum() + table.shape[0],
        lambda i: ((OWN[i],), {"table": drawn(B, 2)}),
        lambda a, k, w: ((a[0][w],), k),
    ),
    "dicts in dicts": of_all(
        {"in": {"x": X, "also": (MASK, "text")}, "flag": True},
        pick=lambda a, k, w: (({"in": {"x": X[w], "also": (MASK[w], "text")}, "flag": True},), k),
    )(lambda batch: (batch["in"]["x"] * batch["in"]["also"][0]).sum(-1) + batch["flag"]),
    "what a tokenizer returns, by position": of_all(
        ENCODING, pick=lambda a, k, w: ((transformers.BatchEncoding({"x": X[w], "mask": MASK[w]}),), k)
    )(total),
    "what a tokenizer returns, of each member's own, in a dict": Case(
        ({"batch": transformers.BatchEncoding({"x": OWN, "mask": MASK.expand(N, B, S)})},),
        {},
        0,
        lambda inputs: total(inputs["batch"]),
        lambda i: (({"batch": transformers.BatchEncoding({"x": OWN[i], "mask": MASK})},), {}),
        lambda a, k, w: (
            ({"batch": transformers.BatchEncoding({"x": a[0]["batch"].x[w], "mask": MASK[w]})},),
            k,
        ),
    ),
    "a dataclass": of_all(
        Batch(X, "odd"), y=Frozen(X * 2), pick=lambda a, k, w: ((Batch(X[w], "odd"),), {"y": Frozen(X[w] * 2)})
    )(lambda batch, y: batch.x.sum(-1) * y.x.sum(-1) + len(batch.kind)),
    "a dataclass of each member's own": Case(
        (Batch(OWN),),
        {},
        0,
        lambda batch: batch.x.sum(-1),
        lambda i: ((Batch(OWN[i]),), {}),
        lambda a, k, w: ((Batch(a[0].x[w]),), k),
    ),
    "a model output": of_all(
        transformers.modeling_outputs.BaseModelOutput(last_hidden_state=X, hidden_states=(X, X + 1)),
        pick=lambda a, k, w: (
            (transformers.modeling_outputs.BaseModelOutput(last_hidden_state=X[w], hidden_states=(X[w], X[w] + 1)),),
            k,
        ),
    )(lambda out: out.last_hidden_state.sum(-1) + out.hidden_states[1].sum(-1)),
    "numpy": of_all(X.numpy(), y=ONE.numpy(), pick=lambda a, k, w: ((a[0][w],), k))(
        lambda x, y: torch.from_numpy((x + y).sum(-1))
    ),
    "numpy of each member's own": Case(
        (OWN.numpy(),),
        {"y": OWN_ONE.numpy()},
        0,
        lambda x, y: torch.from_numpy((x * y).sum(-1)),
        lambda i: ((OWN[i].numpy(),), {"y": OWN_ONE[i].numpy()}),
        lambda a, k, w: ((a[0][w],), k),
    ),
    "time, height and width": of_all(
        X, position_ids=MROPE, pick=lambda a, k, w: ((X[w],), {"position_ids": MROPE[:, w]})
    )(lambda x, position_ids: (x * position_ids[0] - position_ids[2]).sum(-1)),
    "text, time, height and width, of as many rows": of_all(
        X, position_ids=SQUARE, pick=lambda a, k, w: ((X[w],), {"position_ids": SQUARE[:, w]})
    )(lambda x, position_ids: (x * position_ids[0] - position_ids[3]).sum(-1)),
    "time, height and width, of each member's own": Case(
        (X,),
        {"position_ids": OWN_MROPE},
        {"position_ids": 0},
        lambda x, position_ids: (x * position_ids[0] - position_ids[2]).sum(-1),
        lambda i: ((X,), {"position_ids": OWN_MROPE[i]}),
        lambda a, k, w: ((a[0][w],), {"position_ids": k["position_ids"][:, w]}),
    ),
    "places in a picture": of_all(
        X, pixel_position_ids=drawn(B, 3, 2), pick=lambda a, k, w: ((X[w],), {"pixel_position_ids": drawn(B, 3, 2)[w]})
    )(lambda x, pixel_position_ids: x.sum(-1) + pixel_position_ids.sum((1, 2))),
    "positions of all tokens": of_all(X, cache_position=torch.arange(S) + 7, pick=lambda a, k, w: ((X[w],), k))(
        lambda x, cache_position: (x * cache_position).sum(-1)
    ),
    "which positions are wanted, as many as rows": of_all(
        drawn(B, B), logits_to_keep=torch.arange(B).flip(0), pick=lambda a, k, w: ((a[0][w],), k)
    )(lambda x, logits_to_keep: x[:, logits_to_keep]),
    "as many tokens as rows": of_all(
        drawn(B, B), my_positions=torch.arange(B) + 7, pick=lambda a, k, w: ((a[0][w],), k)
    )(lambda x, my_positions: (x * my_positions).sum(-1)),
    "where answers start": of_all(
        X, start_positions=STARTS, pick=lambda a, k, w: ((X[w],), {"start_positions": STARTS[w]})
    )(lambda x, start_positions: x.gather(1, start_positions[:, None])[:, 0]),
    "where answers start, one after the other": of_all(
        X, start_positions=torch.arange(B), pick=lambda a, k, w: ((X[w],), {"start_positions": torch.arange(B)[w]})
    )(lambda x, start_positions: x.gather(1, start_positions[:, None])[:, 0]),
    "a text a row": of_all(X, texts=TEXTS, pick=lambda a, k, w: ((X[w],), {"texts": [TEXTS[i] for i in w]}))(
        lambda x, texts: x.sum(-1) + torch.tensor([len(text) for text in texts])
    ),
    "nothing but a text a row": of_all(TEXTS, pick=lambda a, k, w: (([TEXTS[i] for i in w],), k))(
        lambda texts: torch.tensor([float(len(text)) for text in texts])
    ),
    "an image of its own size a row": of_all(
        X, y=IMAGES, pick=lambda a, k, w: ((X[w],), {"y": [IMAGES[i] for i in w]})
    )(lambda x, y: x.sum(-1) + torch.stack([image.sum() for image in y])),
    "boxes of each row, in a list of dicts": of_all(
        X,
        labels=[{"boxes": image} for image in IMAGES],
        pick=lambda a, k, w: ((X[w],), {"labels": [{"boxes": IMAGES[i]} for i in w]}),
    )(lambda x, labels: x.sum(-1) + torch.stack([label["boxes"].sum() for label in labels])),
    "as many layers as rows": of_all([X + i for i in range(B)], pick=lambda a, k, w: (([x[w] for x in a[0]],), k))(
        lambda layers: sum(x.sum(-1) for x in layers)
    ),
    "as many layers as rows, besides": of_all(
        X,
        states=[X + i for i in range(B)],
        pick=lambda a, k, w: ((X[w],), {"states": [X[w] + i for i in range(B)]}),
    )(lambda x, states: sum((x * state).sum(-1) for state in states)),
    "a size in a tuple, as long as there are rows": of_all(X, y=(1, 2, 3, 4), pick=lambda a, k, w: ((X[w],), k))(
        lambda x, y: x.sum(-1) * sum(y)
    ),
    "sequences first": of_all(drawn(S, B, 2), y=drawn(S, 1, 2), pick=lambda a, k, w: ((a[0][:, w],), k))(
        lambda x, y: (x * y).sum((0, 2)), batch_dim=1
    ),
}


def given(case: Case) -> Inputs:
    return Inputs(Takes(), N, case.args, case.kwargs, case.in_dims, case.batch_dim)


def assert_same_inputs(found: Any, expected: Any) -> None:
    """Equal leaves in equal containers."""
    leaves, tree = flatten(found)
    others, other = flatten(expected)
    assert tree == other
    for leaf, its in zip(leaves, others, strict=True):
        assert type(leaf) is type(its)
        assert np.array_equal(leaf, its)


@pytest.mark.parametrize("name", CASES)
def test_members_are_indexed(name: str) -> None:
    case = CASES[name]
    inputs = given(case)
    for i in range(N):
        assert_same_inputs(inputs.member(i), case.alone(i))
    for i, inner in enumerate((inputs.chunk(1, 3).member(0), inputs.chunk(1, 3).member(1)), start=1):
        assert_same_inputs(inner, case.alone(i))


@pytest.mark.parametrize("name", CASES)
def test_folded_members_give_what_each_gives_alone(name: str) -> None:
    case = CASES[name]
    inputs = given(case)
    assert inputs.b == B
    args, kwargs = inputs.folded()
    expected = [case.call(*case.alone(i)[0], **case.alone(i)[1]) for i in range(N)]
    torch.testing.assert_close(case.call(*args, **kwargs), torch.cat(expected))
    args, kwargs = inputs.chunk(1, 3).folded()
    torch.testing.assert_close(case.call(*args, **kwargs), torch.cat(expected[1:]))


@pytest.mark.parametrize("which", [[0], [B - 1, 0], [1, 1, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_picked_rows_are_those_rows(name: str, which: list[int]) -> None:
    case = CASES[name]
    some = given(case).rows(which)
    assert some.b == len(which)
    wanted = []
    for i in range(N):
        args, kwargs = case.alone(i)
        wanted.append(case.call(*args, **kwargs)[which])
        assert_same_inputs(some.member(i), case.pick(args, kwargs, which))
    args, kwargs = some.folded()
    torch.testing.assert_close(case.call(*args, **kwargs), torch.cat(wanted))


@pytest.mark.parametrize("name", CASES)
def test_reading_leaves_the_inputs_alone(name: str) -> None:
    case = CASES[name]
    copy = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (case.args, case.kwargs))
    inputs = given(case)
    args, kwargs = inputs.folded()
    for container in [*args, *kwargs.values()]:
        if isinstance(container, dict):
            container.clear()  # a model may do so; what it was given is not the caller's own
    inputs.rows([1]).member(0)
    assert_same_inputs((case.args, case.kwargs), copy)
    assert_same_inputs(inputs.member(0), case.alone(0))


@pytest.mark.parametrize("name", CASES)
def test_mapped_tensors_are_those_with_a_member_axis(name: str) -> None:
    case = CASES[name]
    inputs = given(case)
    if "numpy of each" in name:
        with raises_saying(fd.errors.EngineError, "x", "numpy array", 'engine="loop"'):
            inputs.mapped()
        return
    for i in range(N):
        assert_same_inputs(inputs.fill_mapped([leaf[i] for leaf in inputs.mapped()]), case.alone(i))


# -- caches --------------------------------------------------------------------------------------------------------


def language_model() -> tuple[Any, Any, Tensor]:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(30, (B, S), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = next(value for value in model(ids[:, :3], use_cache=True).values() if is_cache(value))
    return model, cache, ids


def test_a_cache_has_the_rows_of_the_tensors() -> None:
    model, cache, ids = language_model()
    name = next(name for name in ("cache", "past_key_values") if accepts(model, name))
    inputs = Inputs(model, N, (ids[:, 3:],), {name: cache}, None, 0)
    with torch.no_grad():
        expected = model(ids).logits[:, 3:]
        args, kwargs = inputs.folded()
        torch.testing.assert_close(model(*args, **kwargs).logits, expected.repeat(N, 1, 1))
        args, kwargs = inputs.rows([3, 1, 1]).shared()
        torch.testing.assert_close(model(*args, **kwargs).logits, expected[[3, 1, 1]])
    assert cache.get_seq_length() == 3, "the caller's cache is as it was"
    assert cache.layers[0].keys.shape[0] == B
    whole = Inputs(model, N, (ids[:, 3:],), {name: cache}, {name: None}, 0)
    assert whole.folded()[1][name] is cache


def test_a_cache_with_a_history_is_copied_with_it() -> None:
    keys = drawn(B, 1, 2, 2).requires_grad_()
    cache = DynamicCache()
    cache.update(keys * 2, keys * 3, 0)
    copy = read(X, cache).rows([2]).shared()[0][1]
    copy.layers[0].keys.sum().backward()
    expected = torch.zeros_like(keys)
    expected[2] = 2
    assert torch.equal(keys.grad, expected)


# -- what the fold alone cannot do ---------------------------------------------------------------------------------

UNCLEAR: dict[str, tuple[tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = {
    "tokens in one list, and where bags begin": (
        (torch.arange(9), torch.tensor([0, 3, 4])),
        {},
        ("y", "(3,)", "x has 9", "in_dims={'y': None}", 'engine="auto"'),
    ),
    "fewer images than rows": (
        (X,),
        {"pixel_values": drawn(2, 3, 8, 8)},
        ("pixel_values", "2 rows", "x has 4", "in_dims={'pixel_values': None}"),
    ),
    "a table": ((X, drawn(3, 2)), {}, ("y", "(3, 2)", "in_dims={'y': None}")),
    "a table in a dict": (({"x": X, "table": drawn(3, 2)},), {}, ("x.table", "x.x", "in_dims={'x': None}")),
    "packed sequences": ((drawn(1, 9), torch.tensor([0, 4, 9])), {}, ("y", "3 rows", "x has 1")),
    "no tensors": ((7,), {"flag": True}, ("No input", "axis 0", "x, flag")),
    "nothing": ((), {}, ("No input", "none")),
    "scalars": ((torch.tensor(1.0),), {}, ("No input", "x")),
    "rows of their own lengths": (
        (ragged(torch.ones(2, 3), torch.ones(4, 3), layout=torch.jagged),),
        {},
        ("x", "nested", "Pad"),
    ),
    "a number a row, or a size": ((X,), {"lengths": [5, 1, 2, 3]}, ("lengths", "list of 4 numbers", "tuple", "(4,)")),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_only_the_fold_needs_to_know_the_rows(name: str) -> None:
    args, kwargs, said = UNCLEAR[name]
    inputs = read(*args, **kwargs)
    for call in (inputs.folded, lambda: inputs.b, inputs.check_rows, lambda: inputs.rows([0])):
        with raises_saying(fd.errors.FoldError, *said):
            call()
    for found in (inputs.member(1), inputs.chunk(0, 2).member(0), inputs.fill_mapped(inputs.mapped()), inputs.shared()):
        leaves, expected = flatten(found)[0], flatten((args, kwargs))[0]
        assert all(leaf is other for leaf, other in zip(leaves, expected, strict=True))


def test_the_advice_is_right() -> None:
    for in_dims in ({"y": None}, {"x": 0, "y": None}):
        inputs = read(OWN if "x" in in_dims else X, drawn(3, 2), in_dims=in_dims)
        assert inputs.folded()[0][0].shape == (N * B, S)
        assert torch.equal(inputs.folded()[0][1], drawn(3, 2))
    assert read(X, lengths=torch.tensor([5, 1, 2, 3])).folded()[1]["lengths"].tolist() == [5, 1, 2, 3] * N
    assert read(X, lengths=(5, 1, 2, 3)).folded()[1]["lengths"] == (5, 1, 2, 3)
    for x in (X, X[:1]):
        assert read(x, layers=[-2]).folded()[1]["layers"] == [-2]
        assert read(x, layers=[-2]).key() != read(x, layers=[-1]).key()


def test_a_value_of_each_members_own_has_no_place_in_one_batch() -> None:
    inputs = read(X, scale=torch.tensor([1.0, 2.0, 3.0]), in_dims={"scale": 0})
    with raises_saying(fd.errors.FoldError, "scale", 'engine="auto"'):
        inputs.folded()
    assert [inputs.member(i)[1]["scale"].item() for i in range(N)] == [1, 2, 3]
    assert inputs.mapped()[0].tolist() == [1, 2, 3]


# -- an explicit None ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shared",
    [X, ONE, drawn(B), drawn(3, 2), X.numpy(), X.to_sparse(), MROPE, TEXTS, [X, X], {"x": X}, DynamicCache()],
    ids=lambda value: type(value).__name__,
)
def test_an_explicit_none_is_never_taken_for_rows(shared: Any) -> None:
    inputs = read(OWN, shared, in_dims={"x": 0, "y": None})
    kept = flatten(shared)[0]
    for found in (inputs.folded(), inputs.rows([1, 0]).folded(), inputs.member(2), inputs.chunk(0, 1).member(0)):
        assert all(leaf is other for leaf, other in zip(flatten(found[0][1])[0], kept, strict=True))
    # Left out of the dict it is one batch seen by all, of which the rows are read: that is another thing.
    if shared is X:
        assert read(OWN, shared, in_dims={"x": 0}).folded()[0][1].shape == (N * B, S)


def test_nothing_but_shared_inputs_has_no_rows() -> None:
    with raises_saying(fd.errors.FoldError, "No input"):
        read(X, X, in_dims={"x": None, "y": None}).folded()


def test_what_in_dims_may_be() -> None:
    with raises_saying(fd.errors.ParamsError, "'mask'", "not an input"):
        read(X, in_dims={"mask": None})
    with raises_saying(fd.errors.ParamsError, "in_dims['x']=1", "0", "None"):
        read(X, in_dims={"x": 1})
    with raises_saying(fd.errors.ParamsError, "in_dims=1", "None"):
        read(X, in_dims=1)
    with raises_saying(fd.errors.ParamsError, "x", "(4, 5)", "3 members", "in_dims={'x': None}"):
        read(X, in_dims=0)
    with raises_saying(fd.errors.ParamsError, "y.scale", "()", "in_dims={'y': None}"):
        read(OWN, y={"scale": torch.tensor(1.0)}, in_dims=0)
    hidden = types.SimpleNamespace(x=OWN)
    with raises_saying(fd.errors.EngineError, "y", "SimpleNamespace", "tuple", "in_dims={'y': None}"):
        read(OWN, hidden, in_dims=0)
    assert read(OWN, hidden, in_dims={"x": 0}).folded()[0][1] is hidden


# -- sparse tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Tensor.to_sparse, csr], ids=["coo", "csr"])
def test_a_sparse_tensor_is_shared(make: Callable[[Tensor], Tensor]) -> None:
    adjacency = make((drawn(B, B) > 0).double())
    for in_dims in (None, {"y": None}, {"x": None}):
        inputs = read(X, adjacency, in_dims=in_dims)
        assert inputs.member(1)[0][1] is adjacency
        assert inputs.fill_mapped(inputs.mapped())[0][1] is adjacency
        if in_dims != {"x": None}:
            assert inputs.folded()[0][1] is adjacency
            assert inputs.rows([1]).shared()[0][1] is adjacency


def test_sparse_tensors_of_each_members_own_run_one_by_one() -> None:
    dense = (drawn(N, B, B) > 0).double()
    inputs = read(X, dense.to_sparse(), in_dims={"y": 0})
    for i in range(N):
        assert torch.equal(inputs.member(i)[0][1].to_dense(), dense[i])
    assert torch.equal(inputs.chunk(1, 3).member(1)[0][1].to_dense(), dense[2])
    with raises_saying(fd.errors.FoldError, "y", 'engine="auto" or "loop"'):
        inputs.folded()
    with raises_saying(fd.errors.EngineError, "y", "torch.sparse_coo", 'engine="loop"'):
        inputs.mapped()
    same = csr(torch.eye(B).expand(N, B, B))
    rows = read(X, same, in_dims={"y": 0})
    assert torch.equal(rows.member(2)[0][1].to_dense(), torch.eye(B))
    with raises_saying(fd.errors.EngineError, "y", "chunk_size"):
        rows.chunk(0, 2)


# -- one member a row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "entries", "rows", "axes"),
    [
        ({"input_ids": (4, 7)}, 4, 4, {0: 0}),
        ({"pixel_values": (9, 3), "input_ids": (4, 7)}, 4, 4, {1: 0}),  # patches in one flat list
        ({"pixel_values": (8, 3), "input_ids": (4, 7)}, 4, 4, {1: 0}),  # which are twice as many by chance
        ({"input_ids": (8, 1), "mask": (8, 7), "grid": (3, 3)}, 4, 8, {0: 0, 1: 0}),  # two beams each
        ({"grid": (4, 3), "input_ids": (8, 1)}, 4, 8, {1: 0}),  # of as many images as there are members
        ({"pixel_values": (8, 3), "inputs_embeds": (4, 7, 2)}, 4, 4, {1: 0}),
        ({"input_ids": (1, 7), "pixel_values": (9, 3)}, 1, 1, {0: 0}),
        ({"input_ids": (5, 7), "grid": (1, 3)}, 1, 5, {0: 0}),
        ({"position_ids": (1, 7), "input_ids": (4, 7)}, 4, 4, {1: 0}),
        ({"position_ids": (3, 4, 7), "input_ids": (4, 7)}, 4, 4, {0: 1, 1: 0}),
        ({"position_ids": (3, 3, 7), "input_ids": (3, 7)}, 3, 3, {0: 1, 1: 0}),
        ({"input_ids": (5, 7)}, 4, 5, {0: 0}),  # the caller says that this does not fit
    ],
)
def test_an_index_says_how_many_rows_there_are(
    inputs: dict[str, tuple[int, ...]], entries: int, rows: int, axes: dict[int, int]
) -> None:
    found = read(n=1, entries=entries, **{name: torch.zeros(shape) for name, shape in inputs.items()})
    assert (found.b, found.row_axis) == (rows, axes)


def test_no_rows_for_an_index() -> None:
    with raises_saying(fd.errors.FoldError, "No input", "3 entries"):
        read(torch.tensor(1.0), entries=3).check_rows()
    assert read(TEXTS, entries=4).rows([3, 0]).shared()[0] == (["d", "a"],)


def test_positions_of_qwen2_vl_are_picked_with_their_rows() -> None:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    size = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    text = {**size, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_id=59
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).double().eval()
    for b in (2, 3, 4):
        ids = torch.randint(3, 50, (b, 6), generator=torch.Generator().manual_seed(b))
        positions = torch.arange(6).repeat(3, b, 1) + torch.arange(b)[:, None]
        positions[2] *= 2
        inputs = Inputs(model, 2, (), {"input_ids": ids, "position_ids": positions, "use_cache": False}, None, 0)
        with torch.no_grad():
            args, kwargs = inputs.folded()
            folded = model(*args, **kwargs).logits.unflatten(0, (2, b))
            for i in range(b):
                alone = model(ids[i : i + 1], position_ids=positions[:, i : i + 1], use_cache=False).logits[0]
                args, kwargs = inputs.rows([i]).shared()
                torch.testing.assert_close(model(*args, **kwargs).logits[0], alone)
                torch.testing.assert_close(folded[1, i], alone)


# -- no foreign exception ------------------------------------------------------------------------------------------

ODD: list[Any] = [
    *(None, True, 3, 2.5, 1j, "text", b"bytes", torch.float32, slice(1), range(3), {1, 2}, object(), nn.Linear(1, 1)),
    *(torch.tensor(1), torch.zeros(0), torch.zeros(0, 3), torch.zeros(2, 0), torch.zeros(B, device="meta")),
    *(torch.eye(3).to_sparse(), csr(torch.eye(3)), ragged(torch.ones(1), torch.ones(2))),
    *(np.zeros(3), np.float32(1), np.array(["a", "b"]), np.array(None)),
    *([], [[]], [[1, 2], [3]], (), {}, {"a": {}}, {3: X, None: X}, [X, 1, "a"], [None] * B, [X] * B, [TEXTS] * B),
    *(types.MappingProxyType({"x": X}), types.SimpleNamespace(x=X), DynamicCache(), Batch(X), ENCODING),
    *(torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)]), torch.Size([2]), torch.arange(B)),
]


@pytest.mark.parametrize("in_dims", [None, 0, {"y": 0}, {"y": None}], ids=str)
@pytest.mark.parametrize("odd", ODD, ids=lambda value: type(value).__name__)
def test_whatever_comes_in_is_read_or_refused_by_name(odd: Any, in_dims: Any) -> None:
    for args in ((X, odd), (odd, odd), (torch.zeros(0, 2), odd)):
        for entries in (None, 1, B):
            for name in ("z", "position_ids", "cache_position"):
                try:
                    inputs = read(*args, **{name: odd}, in_dims=in_dims, entries=entries)
                except fd.errors.FuncdeltaError:
                    continue
                for use in (
                    *(inputs.folded, inputs.mapped, lambda inputs=inputs: inputs.rows([0, -1]).folded()),
                    *(lambda inputs=inputs: inputs.chunk(0, 1), lambda inputs=inputs: inputs.member(0), inputs.key),
                ):
                    try:
                        use()
                    except fd.errors.FuncdeltaError as error:
                        assert str(error)  # noqa: PT017


# -- while compiling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one tensor", "each member's own", "one shared batch besides", "dicts in dicts"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_folding_is_traced(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    case, model = CASES[name], Takes()

    @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
    def fold(args: Any, kwargs: Any) -> Any:
        inputs = Inputs(model, N, args, kwargs, case.in_dims, 0)
        table = {inputs.key("mode"): 1}
        folded = inputs.folded()
        return case.call(*folded[0], **folded[1]), inputs.b, len(table)

    expected = torch.cat([case.call(*case.alone(i)[0], **case.alone(i)[1]) for i in range(N)])
    found, b, _ = fold(case.args, case.kwargs)
    torch.testing.assert_close(found, expected)
    assert b == B


def test_reading_takes_no_values_where_there_are_none() -> None:
    x, positions, places = drawn(B, B), torch.arange(B), ["x", "my_positions"]
    assert read_rows([x, positions], places, [False] * 2).axes == {0: 0}
    assert read_rows([x, positions.to("meta")], places, [False] * 2).axes == {0: 0, 1: 0}
    count = torch.vmap(lambda p: p * 0 + len(read_rows([x, p], places, [False] * 2).axes))
    assert count(positions.expand(2, B)).unique().tolist() == [1]
