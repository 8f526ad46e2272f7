"""The key of an input structure tells what decides where the batch is, and the table that it keys stays small."""

from __future__ import annotations

import copy
import enum
import itertools
import pickle
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from funcdelta.run.input_key import input_key
from funcdelta.run.inputs import Inputs
from funcdelta.run.program import Bounded


class Takes(nn.Module):
    """Has names for its inputs."""

    def forward(self, x: Any, y: Any = None, **others: Any) -> Any:
        return x


def key(*args: Any, in_dims: Any = None, n: int = 3, more: tuple[Any, ...] = (), **kwargs: Any) -> tuple[str, ...]:
    return Inputs(Takes(), n, args, kwargs, in_dims, 0).key(*more)


def filled(*rows: int) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(*rows, 1, 2, 2), torch.zeros(*rows, 1, 2, 2), 0)
    return cache


class Mode(enum.Enum):
    """What an input may choose from."""

    SUM = 1
    MEAN = 2


X = torch.zeros(4, 5)
LAYER = nn.Identity()

ALIKE: dict[str, list[tuple[str, ...]]] = {
    "sizes": [key(X), key(torch.zeros(9, 7)), key(X + 1), key(torch.zeros(1, 5))],
    "members": [key(torch.zeros(3, 4, 5), in_dims=0), key(torch.zeros(2, 7, 5), in_dims=0, n=2)],
    "filled caches": [key(X, filled(4)), key(X, filled(2))],
    "texts of rows": [key(X, ["a", "b", "c", "d"]), key(X, ["a", "b", "c", "d"])],
    "an object": [key(X, LAYER), key(X + 1, LAYER)],
    "objects alike": [key(X, types.SimpleNamespace(k=[1])), key(X, types.SimpleNamespace(k=[1]))],
    "numpy": [key(X.numpy()), key(np.ones((2, 9), np.float32))],
}

UNLIKE: dict[str, list[tuple[str, ...]]] = {
    "dtype": [key(X), key(X.double()), key(X.long()), key(X.numpy())],
    "number of axes": [key(X), key(X[0]), key(X[..., None])],
    "which sizes are 1": [key(torch.zeros(4, 5, 6)), key(torch.zeros(4, 1, 6)), key(torch.zeros(4, 5, 1))],
    "rows": [key(X, torch.zeros(4, 5)), key(X, torch.zeros(1, 5)), key(X, X, in_dims={"y": None})],
    "the axis of rows": [
        key(torch.zeros(2, 5), position_ids=torch.zeros(2, 5, 2)),
        key(torch.zeros(2, 5), position_ids=torch.zeros(3, 2, 5)),
    ],
    "layout": [key(X, X), key(X, X.to_sparse())],
    "numbers": [key(X, value) for value in (0, 1, 2, 1.0, 2.5, 1j, True, False, None)],
    "words": [key(X, value) for value in ("a", "b", b"a", "1", "None", Mode.SUM, Mode.MEAN, torch.float32, range(3))],
    "names": [key(X, y=X), key(X, z=X), key(X, X), key(x=X, y=X)],
    "order of keywords": [key(x=X, y=1), key(y=1, x=X)],
    "nesting": [key((X, X)), key({"a": X, "b": X}), key({"b": X, "a": X}), key(({"a": X}, X))],
    "words that look like others": [key(X, y="1|z=2"), key(X, y="1", z="2"), key(X, y="1|z", z="2")],
    "empty and filled caches": [key(X, DynamicCache()), key(X, filled(4)), key(X, StaticCache(LlamaConfig(), 8))],
    "texts of rows": [key(X, ["a", "b", "c", "d"]), key(X, ["a", "b", "c", "c"])],
    "objects": [key(X, nn.Softmax(0)), key(X, nn.Softmax(1)), key(X, LAYER), key(X, lambda: 0), key(X, lambda: 1)],
    "values in objects": [key(X, types.SimpleNamespace(k=v)) for v in (1, 2, 1.0, [1], {"a": 1}, {"a": 2})],
    "zeros": [key(X, 0.0), key(X, -0.0)],
    "classes": [key(X, nn.Identity()), key(X, nn.Linear(1, 1)), key(X, object())],
    "what decides besides": [
        key(X, more=more) for more in ((), (True,), (None,), (frozenset("ab"),), (frozenset("ac"),), (("a", "b"),))
    ],
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_does_not_decide_is_not_told(name: str) -> None:
    assert len(set(ALIKE[name])) == 1, ALIKE[name]


@pytest.mark.parametrize("name", UNLIKE)
def test_what_decides_is_told(name: str) -> None:
    for one, other in itertools.combinations(UNLIKE[name], 2):
        assert one != other
    assert all(type(word) is str for found in UNLIKE[name] for word in found)


def test_a_set_has_one_word() -> None:
    names = [f"layer.{i}.lora" for i in range(20)]
    assert input_key([], [], {}, [], frozenset(names)) == input_key([], [], {}, [], frozenset(reversed(names)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_are_made_while_tracing(dynamic: bool) -> None:
    """As they are made eagerly: sizes that are symbolic there, and numbers, become plain words."""
    torch._dynamo.reset()
    seen: list[Any] = []
    table: Bounded[Any, float] = Bounded()
    for steps in (2, 3):
        for rows in (4, 1, 6):
            table[key(torch.zeros(rows, 5), steps)] = float(steps)

    @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
    def call(x: torch.Tensor, steps: int) -> Any:
        found = Inputs(model, 3, (x, steps), {}, None, 0).key()
        return x * table[found], found

    model = Takes()
    for rows, steps in ((4, 2), (6, 2), (4, 3), (6, 3), (1, 2), (4, 2)):
        x = torch.ones(rows, 5)
        found, traced = call(x, steps)
        assert torch.equal(found, x * steps)
        assert traced == key(x, steps)
        seen.append(traced)
    assert len(set(seen)) == 2
    assert {type(word) for found in seen for word in found} == {str}


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_entry_goes() -> None:
    table, order = Bounded[int, int](limit=16), list[int]()
    rng = torch.Generator().manual_seed(0)
    for _ in range(2000):
        i = int(torch.randint(40, (), generator=rng))
        if i in order:
            assert table[i] == i * i
        else:
            assert table.get(i) is None
            table[i] = i * i
        order = [*(j for j in order if j != i), i][-16:]
        assert list(table) == order
        assert len(table) == len(order)
    del table[order[0]]
    assert order[0] not in table


def test_a_table_does_not_grow_with_every_new_word() -> None:
    table = Bounded[Any, int]()
    for i in range(1000):
        table[key(X, f"prompt {i}")] = i
    assert len(table) == table.limit == 256


def test_threads_share_a_table() -> None:
    table, failures = Bounded[int, int](limit=8), []

    def work(seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        try:
            for _ in range(3000):
                i = int(torch.randint(30, (), generator=rng))
                assert table.setdefault(i, i * i) == i * i
                assert table.get(i) in (None, i * i)
                table[i] = i * i
                assert len(list(table)) <= 8
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(table) <= 8


def test_one_of_several_decides() -> None:
    table = Bounded[str, object]()
    first = object()
    assert table.setdefault("a", first) is first
    assert table.setdefault("a", object()) is first


def test_a_table_is_copied_with_its_entries() -> None:
    table = Bounded[str, int](limit=2)
    table["a"], table["b"] = 1, 2
    for twin in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        twin["c"] = 3
        assert (list(twin), list(table)) == (["b", "c"], ["a", "b"])
