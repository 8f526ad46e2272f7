"""Resident stacks: members come and go in place, from any thread; what is gone raises; what is compiled stays so."""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import MLP, assert_close, raises_saying, random_params
from test_locks import exit_code
from torch import Tensor
from zoo import ZOO

import funcdelta as fd
from funcdelta.randomness import ThreadMode


@pytest.fixture
def delta() -> fd.DeltaModel:
    return fd.LoraModel(MLP(), modified_modules=["a", "b"], unfrozen_modules=["deltas", "head"])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 4)


def test_members_come_and_go_in_place(delta: fd.DeltaModel, x: Tensor) -> None:
    members = [random_params(delta, seed=i) for i in range(5)]
    resident = fd.Resident(delta, 3)
    where = {name: leaf.data_ptr() for name, leaf in resident.items()}
    first, second, third = (resident.put(member) for member in members[:3])
    assert resident.used == (first, second, third) == (0, 1, 2)
    with torch.no_grad():
        index = [third, -1, first, third]
        expected = delta.apply_rows(fd.stack(members[:3]), index, x)
        assert torch.equal(delta.apply_rows(resident, index, x), expected)
        resident.remove(second)
        assert not any(leaf[second].any() for leaf in resident.values())
        fourth = resident.put(members[3])
        assert fourth == second + 3
        resident.replace(first, members[4])
        resident.remove(third)
        assert resident.used == (first, fourth)
        found = delta.apply_rows(resident, [fourth, first, -1, fourth], x)
        assert torch.equal(found, delta.apply_rows(fd.stack([members[4], members[3]]), [1, 0, -1, 1], x))
    assert where == {name: leaf.data_ptr() for name, leaf in resident.items()}
    assert not any(leaf.requires_grad for leaf in resident.values())
    assert all(torch.equal(resident.member(first)[name], leaf) for name, leaf in members[4].items())
    # The members given are copied, the backbone's own tensors are nowhere in the stack.
    members[4]["a.lora.lora_A"].zero_()
    assert resident.member(first)["a.lora.lora_A"].any()
    own = {t.untyped_storage().data_ptr() for t in (*delta.backbone.parameters(), *delta.backbone.buffers())}
    assert not own & {leaf.untyped_storage().data_ptr() for leaf in resident.values()}


def test_an_empty_slot_raises_wherever_it_is_named(delta: fd.DeltaModel, x: Tensor) -> None:
    resident = fd.Resident.of(delta, random_params(delta, 3), 5)
    view = delta.bind_rows(resident, [0, 1, 2, -1])
    view(x)
    resident.remove(1)
    for refused in (
        lambda: delta.apply_rows(resident, [0, 1, 0, 0], x),
        lambda: delta.bind_rows(resident, torch.tensor([1])),
        lambda: view(x),
        lambda: resident.member(1),
        lambda: resident.remove(1),
        lambda: resident.replace(1, delta.init(0)),
        lambda: resident.check([0, 1]),
        lambda: resident.rows([0, 1]),
        lambda: resident.pick([0, 1]),
    ):
        with raises_saying(fd.errors.StackError, "Slot 1 holds no member: it was removed", "in use are 0, 2", "-1"):
            refused()
    # The row's next member goes by another number; the old one never answers for it.
    assert resident.put(delta.init(0)) == 6
    for refused in (
        lambda: delta.apply_rows(resident, [0, 1, 0, 0], x),
        lambda: view(x),
        lambda: resident.remove(1),
        lambda: resident.pick(torch.tensor([1])),
    ):
        with raises_saying(fd.errors.StackError, "Slot 1 holds no member: it was removed, and slot 6 took its place"):
            refused()
    for slot in (5, 11, -1):
        with raises_saying(
            fd.errors.StackError, f"Slot {slot} holds no member. The slots in use are 0, 2, 6", "put(params)"
        ):
            resident.remove(slot)
    with raises_saying(fd.errors.ParamsError, "-2 to 0", "slots are 0 or more"):
        resident.check([0, -2])
    with raises_saying(fd.errors.ParamsError, "a number that put(params) returned", "'anna'"):
        resident.member("anna")  # type: ignore[arg-type]


def test_what_does_not_fit(delta: fd.DeltaModel) -> None:
    params = delta.init(0)
    resident = fd.Resident(delta, 1)
    with raises_saying(fd.errors.StackError, "no member yet", "put(params)"):
        resident.members()
    with raises_saying(
        fd.errors.ParamsError,
        "a.lora.lora_A: expected (8, 4) in a member of this stack; found (3, 8, 4)",
        "one member at a time",
    ):
        resident.put(delta.init(0, n=3))
    missing = {name: leaf for name, leaf in params.items() if name != "head.bias"}
    with raises_saying(fd.errors.ParamsError, "head.bias: expected (3,) in a member of this stack; found nothing"):
        resident.put(missing)
    with raises_saying(fd.errors.ParamsError, "head.weights: expected no such leaf"):
        resident.put(params | {"head.weights": torch.zeros(1)})
    for leaf, found in (
        ([0.0] * 3, "a list"),
        (torch.zeros(3, device="meta"), "a meta tensor"),
        (torch.zeros(3).to_sparse(), "the layout torch.sparse_coo"),
    ):
        with raises_saying(fd.errors.ParamsError, f"head.bias: expected (3,) in a member of this stack; found {found}"):
            resident.put(params | {"head.bias": leaf})  # type: ignore[dict-item]
    with raises_saying(fd.errors.ParamsError, "a dict of tensors; found int"):
        resident.put(3)  # type: ignore[arg-type]
    assert resident.used == ()
    assert not any(leaf.any() for leaf in resident.values())
    resident.put(params)
    with raises_saying(fd.errors.StackError, "All 1 slots hold a member", "fd.Resident.of(", "capacity=2"):
        resident.put(params)
    with raises_saying(fd.errors.ParamsError, "capacity=0", "at least 1"):
        fd.Resident(delta, 0)
    with raises_saying(fd.errors.ParamsError, "'head.weights' is not a leaf", "delta.names"):
        fd.Resident(delta, 2, names=["head.weights"])
    with raises_saying(fd.errors.ParamsError, "3 members does not fit into capacity=2"):
        fd.Resident.of(delta, delta.init(0, n=3), 2)


def test_a_view_sees_members_come_and_go() -> None:
    architecture = ZOO["llama"]
    delta = fd.LoraModel(architecture.build(), modified_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=64)
    stack, tokens = random_params(delta, 4), architecture.inputs(2)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with torch.inference_mode():
        resident = fd.Resident.of(delta, fd.take(stack, [0, 1]), 3)
    view = delta.bind_rows(resident, [0, 1])
    for slots in ((0, 1), (2, 1)):
        expected = [delta.bind(fd.take(stack, i)).generate(tokens[[r]], **options) for r, i in enumerate(slots)]
        assert torch.equal(view.generate(tokens, **options), torch.cat(expected))
        resident.replace(0, fd.take(stack, 2))
    resident.put(fd.take(stack, 3))
    expected = delta.bind(fd.take(stack, 3)).generate(tokens, **options)
    assert torch.equal(view.route([2, 2]).generate(tokens, **options), expected)  # type: ignore[operator, union-attr]


def test_nothing_is_compiled_again() -> None:
    delta = fd.LoraModel(ZOO["llama"].build(), modified_modules=["q_proj", "v_proj"])
    inputs, members = ZOO["llama"].inputs(4), [random_params(delta, seed=i) for i in range(3)]
    resident = fd.Resident(delta, 4)
    torch._dynamo.reset()
    rows = torch.compile(
        lambda leaves, index: delta.apply_rows(leaves, index, **inputs).logits, fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        resident.put(members[0])
        rows(resident.leaves, torch.tensor([0, 0, -1, 0]))
        with torch.compiler.set_stance("fail_on_recompile"):
            resident.remove(0)
            second, first = resident.put(members[1]), resident.put(members[0])
            resident.replace(first, members[2])
            indices = [[second, first, -1, second], [first, second, second, first]]
            with resident.lock:
                found = [rows(resident.leaves, resident.rows(index)) for index in indices]
        assert (second, first) == (4, 1)
        stack = fd.stack([members[2], members[1]])
        for logits, index in zip(found, ([1, 0, -1, 1], [0, 1, 1, 0]), strict=True):
            assert_close(logits, delta.apply_rows(stack, index, **inputs).logits)


def test_compiled_code_finds_the_row_of_a_slot(delta: fd.DeltaModel) -> None:
    resident = fd.Resident.of(delta, random_params(delta, 3), 3)
    resident.remove(1)
    slots = torch.tensor([resident.put(random_params(delta, seed=9)), -1, 2])
    torch._dynamo.reset()
    rows = torch.compile(lambda index: resident.rows(index), fullgraph=True, backend="eager")
    assert rows(slots).tolist() == [1, -1, 2]
    pick = torch.compile(lambda index: resident.pick(index, 2), fullgraph=True, backend="eager")
    assert all(torch.equal(leaf, resident.pick(slots, 2)[name]) for name, leaf in pick(slots).items())


def test_saved_and_loaded_as_a_plain_stack(delta: fd.DeltaModel, x: Tensor, tmp_path: Path) -> None:
    stack = random_params(delta, 4)
    resident = fd.Resident.of(delta, stack, 6)
    resident.remove(1)
    delta.save_finetuned(resident.members(), tmp_path / "resident")
    other, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "resident", backbone_model=delta.backbone)
    assert all(torch.equal(leaf, fd.take(stack, [0, 2, 3])[name]) for name, leaf in loaded.items())
    again = fd.Resident.of(other, loaded, 6)
    with torch.no_grad():
        assert torch.equal(other.apply_rows(again, [2, 1, 0, -1], x), delta.apply_rows(resident, [3, 2, 0, -1], x))


def test_copies_are_stacks_of_their_own(delta: fd.DeltaModel) -> None:
    resident = fd.Resident.of(delta, random_params(delta, 2), 3)
    for other in (copy.copy(resident), copy.deepcopy(resident), pickle.loads(pickle.dumps(resident))):
        assert other.used == (0, 1)
        assert all(torch.equal(leaf, resident[name]) for name, leaf in other.items())
        other.remove(0)
        assert other.put(random_params(delta, seed=5)) == 3
        assert resident.used == (0, 1)
        assert resident["head.bias"][0].any()
        assert not torch.equal(other["head.bias"][0], resident["head.bias"][0])


def test_some_leaves_in_another_precision(delta: fd.DeltaModel, x: Tensor) -> None:
    names = [name for name in delta.names if name.startswith(("a.", "b."))]
    resident = fd.Resident(delta, 2, names=names, dtype=torch.bfloat16)
    assert list(resident) == names
    member = {name: delta.init(0)[name] for name in names}
    slot = resident.put(member)
    assert {leaf.dtype for leaf in resident.values()} == {torch.bfloat16}
    with torch.no_grad():
        assert_close(delta.apply_rows(resident, [slot, slot], x[:2]), delta.apply(member, x[:2]), 2e-2)


# -- many hands ---------------------------------------------------------------------------------------------------


def marked(delta: fd.DeltaModel, number: float) -> dict[str, Tensor]:
    """A member of which every number is ``number``."""
    return {name: torch.full_like(leaf, number) for name, leaf in delta.init(0).items()}


def mark(leaves: dict[str, Tensor], row: int) -> float:
    """The number that all of one row is made of; NaN where it is a mixture."""
    numbers = {number for leaf in leaves.values() for number in leaf[row].flatten().tolist()}
    return numbers.pop() if len(numbers) == 1 else torch.nan


CHANGES: dict[str, Callable[[fd.Resident, int, dict[str, Tensor]], object]] = {
    "put": lambda resident, slot, member: resident.put(member),
    "replace": lambda resident, slot, member: resident.replace(slot, member),
    "remove": lambda resident, slot, member: resident.remove(slot),
}


class At(ThreadMode):
    """Calls ``then`` at the k-th write into a leaf in this thread."""

    def __init__(self, k: int, then: Callable[[], object]) -> None:
        super().__init__()
        self.k, self.then = k, then

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.copy_.default, torch.ops.aten.zero_.default):
            self.k -= 1
            if self.k == 0:
                self.then()
        return func(*args, **(kwargs or {}))


def test_any_sequence_of_changes_is_that_of_a_dict(delta: fd.DeltaModel) -> None:
    choose = random.Random(0)
    resident, expected, ever = fd.Resident(delta, 4), dict[int, float](), set[int]()
    for step in range(1, 300):
        what = choose.choice(["put", "put", "replace", "remove"])
        if what == "put" and len(expected) < 4:
            slot = resident.put(marked(delta, step))
            assert slot not in ever
            ever.add(slot)
            expected[slot] = step
        elif what == "replace" and expected:
            slot = choose.choice(sorted(expected))
            resident.replace(slot, marked(delta, step))
            expected[slot] = step
        elif what == "remove" and expected:
            slot = choose.choice(sorted(expected))
            resident.remove(slot)
            del expected[slot]
        assert resident.used == tuple(sorted(expected))
        if expected:
            picked = resident.pick(list(expected))
            assert [mark(picked, i) for i in range(len(expected))] == list(expected.values())
            stack = resident.members()
            assert [mark(stack, i) for i in range(len(expected))] == [expected[slot] for slot in sorted(expected)]
        for slot in choose.sample(range(max(ever, default=0) + 5), 5):
            if slot not in expected:
                with pytest.raises(fd.errors.StackError):
                    resident.check([slot])
    assert len(ever) > 50


@pytest.mark.parametrize("change", CHANGES)
def test_a_reader_waits_for_a_change_that_is_half_done(delta: fd.DeltaModel, change: str) -> None:
    resident = fd.Resident(delta, 3)
    slots = [resident.put(marked(delta, number)) for number in (1.0, 2.0)]
    halfway, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with At(3, lambda: (halfway.set(), go_on.wait(3))):
            CHANGES[change](resident, slots[1], marked(delta, 3.0))

    found: list[object] = []

    def read() -> None:
        try:
            picked = resident.pick([slots[1], slots[0]])
            found.append([mark(picked, 0), mark(picked, 1)])
        except fd.errors.StackError:
            found.append("gone")

    writer, reader = threading.Thread(target=write), threading.Thread(target=read)
    writer.start()
    assert halfway.wait(2)
    reader.start()
    reader.join(0.1)  # old and new are both in the leaves now
    assert found == []
    go_on.set()
    writer.join(2)
    reader.join(2)
    assert found == [{"put": [2.0, 1.0], "replace": [3.0, 1.0], "remove": "gone"}[change]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_interrupted_leaves_the_members_as_they_were(
    delta: fd.DeltaModel, change: str, error: type[BaseException]
) -> None:
    def interrupt() -> None:
        raise error

    for k in range(1, len(delta.names) + 1):
        resident = fd.Resident(delta, 3)
        first, second = resident.put(marked(delta, 1.0)), resident.put(marked(delta, 2.0))
        with pytest.raises(error), At(k, interrupt):
            CHANGES[change](resident, first, marked(delta, 3.0))
        kept = {second: 2.0} if change == "remove" else {first: 1.0, second: 2.0}
        assert resident.used == tuple(kept)
        picked = resident.pick(list(kept))
        assert [mark(picked, i) for i in range(len(kept))] == list(kept.values())
        # And the lock is free, for any thread.
        got: list[int] = []
        thread = threading.Thread(
            target=lambda resident=resident, got=got: got.append(resident.put(marked(delta, 4.0)))
        )
        thread.start()
        thread.join(2)
        assert mark(resident.pick(got), 0) == 4.0


def test_a_member_that_cannot_be_brought_back_is_gone(delta: fd.DeltaModel) -> None:
    """Where the write and the way back both fail."""

    class Failing(At):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    resident = fd.Resident(delta, 1)
    slot = resident.put(marked(delta, 1.0))
    with pytest.raises(KeyboardInterrupt), Failing(0, lambda: None):  # at every write
        resident.replace(slot, marked(delta, 2.0))
    with raises_saying(fd.errors.StackError, "Slot 0 holds no member"):
        resident.pick([slot])
    assert resident.put(marked(delta, 3.0)) == 1


def test_threads_that_put_replace_remove_and_read(delta: fd.DeltaModel) -> None:
    resident = fd.Resident(delta, 6)
    members = [marked(delta, number) for number in range(1, 41)]
    held: dict[int, list[float]] = {}  # what each slot has ever held
    given: list[int] = []
    removed: set[int] = set()
    wrong: list[str] = []
    ended = threading.Event()
    counts = [0, 0]  # picks that were refused, and that were not
    until = time.monotonic() + 3

    def change(seed: int) -> None:
        choose, own, changes = random.Random(seed), list[int](), 0
        while time.monotonic() < until and (changes < 150 or min(counts) < 20):
            changes += 1
            number = choose.randrange(40)
            what = choose.choice(["put", "replace", "remove"])
            if what == "put" and len(own) < 3:
                slot = resident.put(members[number])
                given.append(slot)
                held.setdefault(slot, []).append(number + 1.0)
                own.append(slot)
            elif what == "replace" and own:
                slot = choose.choice(own)
                held[slot].append(number + 1.0)
                resident.replace(slot, members[number])
            elif what == "remove" and own:
                slot = own.pop(choose.randrange(len(own)))
                resident.remove(slot)
                removed.add(slot)

    def read(seed: int) -> None:
        choose = random.Random(seed)
        while not ended.is_set():
            gone, known = set(removed), list(held)[-8:]
            if not known:
                continue
            index = [choose.choice(known) for _ in range(2)]
            try:
                picked = resident.pick(index)
            except fd.errors.StackError:
                counts[0] += 1
                continue
            counts[1] += 1
            for i, slot in enumerate(index):
                if slot in gone:
                    wrong.append(f"slot {slot} answered after it was removed")
                if mark(picked, i) not in held[slot]:
                    wrong.append(f"slot {slot} held {held[slot]}, found {mark(picked, i)}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        writers = [threading.Thread(target=change, args=(seed,)) for seed in range(2)]
        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
        for thread in (*writers, *readers):
            thread.start()
        for thread in writers:
            thread.join(4)
        ended.set()
        for thread in readers:
            thread.join(1)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert len(given) == len(set(given)) > 20
    assert min(counts) >= 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")
def test_a_child_forked_during_a_change(delta: fd.DeltaModel) -> None:
    resident = fd.Resident(delta, 3)
    first, second = resident.put(marked(delta, 1.0)), resident.put(marked(delta, 2.0))
    halfway, go_on = threading.Event(), threading.Event()

    def write() -> None:
        with At(3, lambda: (halfway.set(), go_on.wait(3))):
            resident.replace(second, marked(delta, 3.0))

    def child() -> bool:
        try:
            resident.pick([second])
        except fd.errors.StackError:  # half the one and half the other
            return mark(resident.pick([first]), 0) == 1.0 and resident.put(marked(delta, 4.0)) == 4
        return False

    writer = threading.Thread(target=write)
    writer.start()
    assert halfway.wait(2)
    code = exit_code(child)
    go_on.set()
    writer.join(2)
    assert code == 0
    assert mark(resident.pick([second]), 0) == 3.0
