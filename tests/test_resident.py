"""Resident stacks: members come and go in place; empty slots raise; what is compiled stays compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from handmade import MLP, assert_close, raises_saying, random_params
from torch import Tensor
from zoo import ZOO

import funcdelta as fd


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
        assert resident.put(members[3]) == second
        resident.replace(first, members[4])
        resident.remove(third)
        found = delta.apply_rows(resident, [second, first, -1, second], x)
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
    ):
        with raises_saying(fd.StackError, "Slot 1 holds no member", "in use are 0, 2", "resident.put(params)"):
            refused()
    with raises_saying(fd.ParamsError, "5 to 5", "0 to 4, and -1"):
        resident.remove(5)


def test_what_does_not_fit(delta: fd.DeltaModel) -> None:
    params = delta.init(0)
    resident = fd.Resident(delta, 1)
    with raises_saying(fd.StackError, "no member yet", "put(params)"):
        resident.members()
    with raises_saying(fd.ParamsError, "a.lora.lora_A of (8, 4); found (3, 8, 4)", "one member at a time"):
        resident.put(delta.init(0, n=3))
    missing = {name: leaf for name, leaf in params.items() if name != "head.bias"}
    with raises_saying(fd.ParamsError, "head.bias of (3,); found nothing"):
        resident.put(missing)
    with raises_saying(fd.ParamsError, "head.weights of no shape"):
        resident.put(params | {"head.weights": torch.zeros(1)})
    assert resident.used == ()
    assert not any(leaf.any() for leaf in resident.values())
    resident.put(params)
    with raises_saying(fd.StackError, "All 1 slots hold a member", "fd.Resident.of(", "capacity=2"):
        resident.put(params)
    with raises_saying(fd.ParamsError, "capacity=0", "at least 1"):
        fd.Resident(delta, 0)
    with raises_saying(fd.ParamsError, "'head.weights' is no leaf", "delta.names"):
        fd.Resident(delta, 2, names=["head.weights"])
    with raises_saying(fd.ParamsError, "3 members does not fit into capacity=2"):
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
            resident.put(members[1])
            resident.replace(0, members[2])
            found = [rows(resident.leaves, torch.tensor(index)) for index in ([1, 0, -1, 1], [0, 1, 1, 0])]
        stack = fd.stack([members[2], members[1]])
        for logits, index in zip(found, ([1, 0, -1, 1], [0, 1, 1, 0]), strict=True):
            assert_close(logits, delta.apply_rows(stack, index, **inputs).logits)


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


def test_some_leaves_in_another_precision(delta: fd.DeltaModel, x: Tensor) -> None:
    names = [name for name in delta.names if name.startswith(("a.", "b."))]
    resident = fd.Resident(delta, 2, names=names, dtype=torch.bfloat16)
    assert list(resident) == names
    member = {name: delta.init(0)[name] for name in names}
    slot = resident.put(member)
    assert {leaf.dtype for leaf in resident.values()} == {torch.bfloat16}
    with torch.no_grad():
        assert_close(delta.apply_rows(resident, [slot, slot], x[:2]), delta.apply(member, x[:2]), 2e-2)
