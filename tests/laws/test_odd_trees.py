"""Small and wrong: odd indices, keys, dtypes and layouts end in errors of this library that say what to write."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import funcdelta as fd
from funcdelta import metrics, tree

STACK = {"a.w": torch.arange(6.0).reshape(3, 2), "b": torch.arange(3.0)}
GOOD: list[tuple[Any, list[int]]] = [
    (torch.tensor([2, -3]), [2, 0]),
    (torch.tensor([2, 0], dtype=torch.uint8), [2, 0]),
    (torch.tensor([], dtype=torch.long), []),
    (torch.zeros(3, dtype=torch.bool), []),
    (np.array([2, 0]), [2, 0]),
    (np.array([True, False, True]), [0, 2]),
    ((i for i in (1, 1)), [1, 1]),
    ({"x": 0}.values(), [0]),
    (slice(None, None, -1), [2, 1, 0]),
    (slice(2, None, -2), [2, 0]),
    (slice(5, 9), []),
    (slice(torch.tensor(1), None), [1, 2]),
    (np.int64(1), [1]),
    (np.array(1), [1]),
    (torch.tensor(-1, dtype=torch.int32), [2]),
]
BAD: list[tuple[Any, str]] = [
    (3, "no member 3: the stack has 3 members, 0 to 2"),
    (-4, "no member -4"),
    (torch.tensor(5), "no member 5: the stack has 3 members"),
    (torch.tensor([0, 7]), "no member 7"),
    (torch.tensor([1, -9]), "no member -9"),
    ([0, 5], "no member 5"),
    (range(9), "no member 3"),
    (np.array([0, 9]), "no member 9"),
    (np.array([True]), r"A mask over 3 members must have shape \(3,\); found \(1,\)"),
    ([True, False], r"A mask over 3 members must have shape \(3,\); found \(2,\)"),
    (torch.tensor([True, False]), r"A mask over 3 members must have shape \(3,\); found \(2,\)"),
    (torch.tensor(True), r"A mask over 3 members must have shape \(3,\)"),
    (True, "no member True"),
    ([0, True], "no member True"),
    (2.0, "selected by an int, a list .* found 2.0"),
    ([0.5], "found 0.5"),
    (np.float64(1), "found 1.0"),
    (None, "found None"),
    ("a", "found 'a'"),
    ([[0]], r"found \[0\]"),
    (torch.tensor([0.5]), r"integers or booleans; found shape \(1,\), torch.float32"),
    (torch.tensor([[0]]), r"shape \(\) or \(k,\) .* found shape \(1, 1\)"),
    (torch.tensor([0], device="meta"), "on the meta device has no values"),
    (slice(0, 1.5), r"slice\(0, 1.5, None\) cannot select members"),
    (slice(None, None, 0), "cannot select members: slice step cannot be zero"),
]


@pytest.mark.parametrize(("index", "rows"), GOOD, ids=range(len(GOOD)))
def test_what_take_reads_is_that_of_a_list(index: Any, rows: list[int]) -> None:
    taken = fd.take(STACK, index)
    for name, leaf in STACK.items():
        expected = leaf[torch.tensor(rows, dtype=torch.long)]
        assert torch.equal(taken[name], expected[0] if taken[name].ndim < leaf.ndim else expected)


@pytest.mark.parametrize(("index", "words"), BAD, ids=range(len(BAD)))
def test_a_member_that_is_not_there_is_named(index: Any, words: str) -> None:
    with pytest.raises(fd.errors.ParamsError, match=words):
        fd.take(STACK, index)


def test_indices_that_a_transform_hides() -> None:
    def pick(i: Tensor) -> Tensor:
        return fd.take(STACK, i)["b"]

    assert torch.vmap(pick)(torch.tensor([2, -1, 0])).tolist() == [2.0, 2.0, 0.0]
    with pytest.raises(fd.errors.ParamsError, match=r"no such member.*has 3 members"):
        torch.vmap(pick)(torch.tensor([2, 3]))


def test_stacks_of_no_members() -> None:
    empty = fd.take(STACK, [])
    assert fd.members(empty) == 0
    assert fd.unstack(empty) == []
    assert fd.members(fd.cat([empty, STACK, empty])) == 3
    assert fd.tree.norm(empty, per_member=True).shape == (0,)
    assert fd.tree.randn_like(empty, [])["a.w"].shape == (0, 2)
    assert fd.tree.ravel(empty, per_member=True)[0].shape == (0, 3)
    for call, words in (
        (lambda: fd.take(empty, 0), "no member 0: the stack has no members"),
        (lambda: fd.take(empty, torch.tensor([0])), "no member 0: the stack has no members"),
        (lambda: fd.tree.mean(empty), "mean averages over the members of a stack, but this stack has none"),
        (lambda: fd.members({}), r"without tensor leaves .* delta\.init\(seed, n=\.\.\.\)"),
        (lambda: fd.unstack({}), "without tensor leaves"),
        (lambda: fd.stack([]), "at least one member; found an empty list"),
        (lambda: fd.cat([]), "at least one stack; found an empty list"),
        (lambda: fd.broadcast(STACK, 0), "n=0: write how many members the stack has"),
        (lambda: fd.stack(None), "takes a list of pytrees; found NoneType"),  # pyright: ignore[reportArgumentType]
        (lambda: fd.broadcast(STACK, 2.5), "n=2.5: write how many"),  # pyright: ignore[reportArgumentType]
        (lambda: fd.seeds(0, "3"), "n='3': write how many seeds"),  # pyright: ignore[reportArgumentType]
        (lambda: fd.seeds(0, 2.5), "n=2.5: write how many seeds"),  # pyright: ignore[reportArgumentType]
    ):
        with pytest.raises(fd.errors.ParamsError, match=words):
            call()


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "stack": lambda t: fd.stack([t, t]),
    "unstack": fd.unstack,
    "cat": lambda t: fd.cat([t, t]),
    "take": lambda t: fd.take(t, 0),
    "take several": lambda t: fd.take(t, [0]),
    "members": fd.members,
    "broadcast": lambda t: fd.broadcast(t, 2),
    "partition": lambda t: fd.partition(t, lambda name: True),
    "combine": lambda t: fd.combine(t, {"z": torch.ones(1)}),
    "map": lambda t: tree.map(torch.neg, t),
    "add": lambda t: tree.add(t, t),
    "sub": lambda t: tree.sub(t, t),
    "scale": lambda t: tree.scale(t, 2.0),
    "lerp": lambda t: tree.lerp(t, t, 0.5),
    "mean": tree.mean,
    "vdot": lambda t: tree.vdot(t, t),
    "norm": tree.norm,
    "norm of members": lambda t: tree.norm(t, per_member=True),
    "ravel": tree.ravel,
    "randn_like": lambda t: tree.randn_like(t, 0),
    "init": lambda t: fd.optim.adamw(0.1).init(t),
    "update": lambda t: fd.optim.sgd(0.1).update({}, fd.optim.sgd(0.1).init({}), t),
    "reached": lambda t: fd.grad.reached(lambda p: torch.ones(()), t),
}
KEYS = {
    "an int": {0: torch.ones(3)},
    "a tuple": {("a", 1): torch.ones(3)},
    "both": {0: torch.ones(3), "0": torch.ones(3)},
}
INNER = {"below": {"a": {1: torch.ones(3)}}, "in a list": {"a": [torch.ones(3), {None: torch.ones(3)}]}}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("keys", [*KEYS, *INNER])
def test_keys_that_are_not_strings_are_named(name: str, keys: str) -> None:
    with pytest.raises(fd.errors.ParamsError, match=r"Names of leaves are strings; found the key .*\{str\(key\): leaf"):
        FUNCTIONS[name]((KEYS | INNER)[keys])


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"partition", "combine", "map", "reached"}))
@pytest.mark.parametrize("layout", ["sparse", "csr", "nested"])
def test_leaves_that_are_not_dense_are_named(name: str, layout: str) -> None:
    leaf = {
        "sparse": lambda: torch.eye(3, 2).to_sparse(),
        "csr": lambda: _csr(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    }[layout]()
    with pytest.raises(
        fd.errors.ParamsError, match=r"'x'.*(dense|torch\.(sparse|jagged|strided)|nested).*Write leaf\.to_"
    ):
        FUNCTIONS[name]({**STACK, "x": leaf})


def _csr() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.eye(3, 2).to_sparse_csr()


@pytest.mark.parametrize("name", ["stack", "members", "add", "norm", "init", "partition", "broadcast"])
def test_arrays_are_no_leaves(name: str) -> None:
    with pytest.raises(
        fd.errors.ParamsError, match=r"Leaves are tensors; ('x' is|found) a ndarray\. Write torch\.as_tensor"
    ):
        FUNCTIONS[name]({**STACK, "x": np.ones((3, 2))})


def test_integers_and_booleans_keep_their_dtype() -> None:
    whole = {**STACK, "count": torch.tensor([1, 2, 3]), "mask": torch.tensor([True, False, True])}
    for name in ("stack", "unstack", "cat", "take", "take several", "broadcast"):
        made = FUNCTIONS[name](whole)
        made = made[0] if isinstance(made, list) else made
        assert (made["count"].dtype, made["mask"].dtype) == (torch.int64, torch.bool)
    assert torch.equal(tree.add(whole, whole)["count"], torch.tensor([2, 4, 6]))
    counts = {"count": whole["count"]}
    assert tree.scale(counts, 2)["count"].tolist() == [2, 4, 6]
    assert tree.sub(counts, counts)["count"].dtype == torch.int64
    for call, words in (
        (lambda: tree.scale(whole, 0.5), r"'count' is torch\.int64, and its product with 0\.5 is not.*fd\.partition"),
        (lambda: tree.scale(counts, torch.tensor(0.5)), r"product with torch\.float32 is not"),
        (lambda: tree.scale(counts, torch.tensor([0.5, 1, 1]), per_member=True), "'count' is torch.int64"),
        (lambda: tree.scale(STACK, 1j), r"'a\.w' is torch\.float32, and its product with 1j is not"),
        (lambda: tree.scale({"m": whole["mask"]}, 2), r"'m' is torch\.bool"),
        (lambda: tree.lerp(counts, counts, 0.5), r"lerp takes real numbers, but leaf 'count' is torch\.int64"),
        (lambda: tree.sub(whole, whole), r"Leaf 'mask' is torch\.bool, which cannot be subtracted"),
        (lambda: tree.norm(whole), "norm takes real numbers, but leaf 'count'"),
        (lambda: tree.randn_like(whole, 0), "randn_like takes real numbers, but leaf 'count'"),
    ):
        with pytest.raises(fd.errors.ParamsError, match=words):
            call()


def test_leaves_of_other_dtypes_and_devices_are_named() -> None:
    single, double = {"w": torch.ones(2)}, {"w": torch.ones(2, dtype=torch.float64)}
    half, meta = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.ones(2, device="meta")}
    for function in (tree.add, tree.sub, lambda a, b: tree.lerp(a, b, 0.5)):
        assert function(single, single)["w"].dtype == torch.float32
        for a, b in ((single, double), (half, single)):
            with pytest.raises(
                fd.errors.ParamsError, match=r"Leaf 'w' is .* in the first tree and .* would make it .*Convert"
            ):
                function(a, b)
        with pytest.raises(
            fd.errors.ParamsError, match=r"'w' is on cpu in the first tree and on meta in the second\. Move one"
        ):
            function(single, meta)
    assert tree.add(single, half)["w"].dtype == torch.float32
    with pytest.raises(fd.errors.ParamsError, match=r"torch\.bfloat16 in the second"):
        tree.lerp(single, half, 0.5)
    mixed = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0], dtype=torch.float64)}
    assert tree.norm(mixed).item() == 5.0
    assert tree.vdot(mixed, mixed).item() == 25.0
    assert tree.vdot(single, double).item() == 2.0
    vector, unravel = tree.ravel(mixed)
    assert {name: leaf.dtype for name, leaf in unravel(vector).items()} == {"a": torch.float32, "b": torch.float64}
    for function in (tree.norm, tree.ravel):
        with pytest.raises(fd.errors.ParamsError, match=r"Leaf 'w' is on cpu, but 'v' on meta\. Move one"):
            function({**single, "v": meta["w"]})
    assert fd.stack([meta, meta])["w"].shape == (2, 2)
    assert tree.norm(meta).device.type == "meta"
    assert tree.scale(STACK, torch.ones(3, dtype=torch.float64), per_member=True)["b"].dtype == torch.float32


def test_labels_that_are_no_classes_are_named() -> None:
    p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    for metric in (metrics.accuracy, metrics.negative_log_likelihood, metrics.calibration_error):
        assert torch.equal(metric(p, torch.tensor([0, 1], dtype=torch.int32)), metric(p, torch.tensor([0, 1])))
        for labels, words in (
            (torch.tensor([0, -100]), r"With 2 classes, labels go from 0 to 1; found -100\. Leave such rows out"),
            (torch.tensor([2, 0]), "found 2"),
            (torch.tensor([0.0, 1.0]), r"found torch\.float32\. Write labels\.long\(\)"),
            (torch.tensor([True, False]), r"found torch\.bool"),
            (torch.zeros(2, dtype=torch.long, device="meta"), "Labels are on meta, but probabilities on cpu"),
        ):
            with pytest.raises(fd.errors.FuncdeltaError, match=words):
                metric(p, labels)
        mapped = torch.vmap(metric, in_dims=(None, 0))(p, torch.tensor([[0, 1], [1, 1]]))
        assert torch.equal(mapped[1], metric(p, torch.tensor([1, 1])))


def test_changes_that_are_none_are_named() -> None:
    algebra, change = fd.algebra, {"w": torch.ones(2)}
    for call, words in (
        (lambda: algebra.ties("abc"), "list of dicts .* found str"),
        (lambda: algebra.ties([torch.ones(2)]), "A change must be a dict .* found Tensor"),
        (lambda: algebra.prune(None, 0.5), "A change must be a dict .* found NoneType"),
        (lambda: algebra.dare({"w": torch.tensor([1])}, 0.5, 0), r"The change of 'w' is torch\.int64"),
        (lambda: algebra.dare({"w": 3}, 0.5, 0), "The change of 'w' is int"),
        (
            lambda: algebra.task_arithmetic([change, change], ["a", "b"]),
            r"one weight per change, 2 numbers; found \['a'",
        ),
    ):
        with pytest.raises(fd.errors.ParamsError, match=words):
            call()
    assert algebra.prune({}, 0.5) == {}
    backbone = torch.nn.Sequential(torch.nn.Linear(2, 2))
    pair = (fd.LoraModel(backbone, lora_r=1, modified_modules=["0"]),)
    pair = (*pair, pair[0].init(0, n=2))
    for call, words in (
        (lambda: algebra.sum_exact(pair, weights=["a", "b"]), "a number or a tensor; found 'a'"),
        (lambda: algebra.sum_exact(pair, weights=3), "one weight per summand, a list of 2; found 3"),
        (lambda: algebra.soup(*pair, weights=["a", "b"]), "soup needs one weight per member, 2 numbers"),
        (lambda: algebra.knots(pair, merge=lambda aligned: {}), r"must return a dict with the names .* no '0\.weight'"),
        (lambda: algebra.knots(pair, merge=lambda aligned: None), "found NoneType"),
    ):
        with pytest.raises(fd.errors.ParamsError, match=words):
            call()
