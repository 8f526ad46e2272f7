"""What decides over rows where no shape shows it: values of shared inputs, backward passes, aliases, hooks, threads."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from handmade import assert_close, raises_saying, random_params
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.run.layout import LayoutMismatchError
from funcdelta.run.tracking import MIXED, Rows, Tracking
from funcdelta.run.values import MANY

pytestmark = pytest.mark.filterwarnings("ignore::funcdelta.errors.EngineWarning")

N = 3


class Between(nn.Module):
    """Two layers, and ``between`` them whatever a test is about."""

    def __init__(self, between: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.h = nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: Tensor, *more: Any, **others: Any) -> Any:
        return self.h(self.between(torch.tanh(self.a(x)), *more, **others))


def lora(model: nn.Module, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(model.eval(), lora_r=2, modified_modules=list(names or ("a", "h")), **fields)


def one_by_one(delta: fd.DeltaModel, stack: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return torch.stack([delta.apply(fd.take(stack, i), *args, **kwargs) for i in range(N)])


# -- values of inputs without rows ---------------------------------------------------------------------------------


def centred(y: Tensor, flag: Any) -> Tensor:
    value = flag.on if isinstance(flag, types.SimpleNamespace) else flag
    return y - y.mean(0) if value else y


FLAGS = {
    "0-dim": torch.tensor,
    "one entry": lambda value: torch.tensor([value]),
    "numpy": np.array,
    "in an object": lambda value: types.SimpleNamespace(on=torch.tensor(value)),
    "plain, in an object": lambda value: types.SimpleNamespace(on=value),
}


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)])
def test_a_layout_is_for_the_values_that_python_reads(kind: str, order: tuple[bool, ...]) -> None:
    delta, x = lora(Between(centred)), torch.randn(4, 6)
    stack = random_params(delta, N)
    for value in order:
        flag = FLAGS[kind](value)
        expected = one_by_one(delta, stack, x, flag)
        assert_close(delta.apply_many(stack, x, flag, in_dims={"1": None}), expected)
        assert delta.explain(stack, x, flag, in_dims={"1": None}).engine == ("vmap" if value else "fold")


def test_what_is_computed_of_a_value_decides_as_well() -> None:
    delta, x = lora(Between(lambda y, scale: y.flip(0) if (scale * 2 + 1).sum() > 3 else y * scale)), torch.randn(4, 6)
    stack = random_params(delta, N)
    for value in (1.0, 5.0, 1.0):
        scale = torch.full((2, 1, 1), value)[0]
        assert_close(delta.apply_many(stack, x, scale, in_dims={"1": None}), one_by_one(delta, stack, x, scale))


def test_values_that_nobody_reads_need_no_layout_of_their_own() -> None:
    delta, x = lora(Between(lambda y, scale: y * scale)), torch.randn(4, 6)
    stack = random_params(delta, N)
    for value in (1.0, 2.0, 3.0):
        scale = torch.tensor(value)
        found = delta.apply_many(stack, x, scale, in_dims={"1": None}, engine="fold")
        assert_close(found, one_by_one(delta, stack, x, scale))
    assert len(delta.program.layouts) == 1


def test_a_value_that_changes_with_every_call_ends_the_learning() -> None:
    delta, x = lora(Between(lambda y, step: y * int(step))), torch.randn(4, 6)
    stack = random_params(delta, N)
    for step in range(MANY + 3):
        found = delta.apply_many(stack, x, torch.tensor(step), in_dims={"1": None})
        assert_close(found, one_by_one(delta, stack, x, torch.tensor(step)))
    with raises_saying(fd.errors.FoldError, "reads the values of 1 in Python", f"{MANY} of them"):
        delta.apply_many(stack, x, torch.tensor(-1), in_dims={"1": None}, engine="fold")


def test_a_value_read_where_members_run_in_turn() -> None:
    """The module in the middle mixes rows and runs once per member; a value tells it where its rows go."""

    class Turned(nn.Module):
        def forward(self, y: Tensor, flag: Tensor) -> Tensor:
            y = y - 0 * y.mean(0)
            return y.unsqueeze(0) if flag else y.unsqueeze(1)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.turned, self.h = nn.Linear(6, 6), Turned(), nn.Linear(6, 3)

        def forward(self, x: Tensor, flag: Tensor) -> Tensor:
            return self.h(self.turned(self.a(x), flag)).flatten(0, 1)

    delta, x = lora(Model()), torch.randn(4, 6)
    stack = random_params(delta, N)
    for value in (0, 1, 0):
        flag = torch.tensor(value)
        found = delta.apply_many(stack, x, flag, in_dims={"flag": None}, engine="fold")
        assert_close(found, one_by_one(delta, stack, x, flag))


# -- the backward pass ---------------------------------------------------------------------------------------------


class Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g / g.norm()


class Doubled(Normed):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * g


def hooked(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda g: g / g.norm())
    return y


def hooked_node(y: Tensor) -> Tensor:
    if y.grad_fn is not None:
        y.grad_fn.register_prehook(lambda gs: tuple(g / g.norm() for g in gs))
    return y


BACKWARDS = {"function": Normed.apply, "tensor hook": hooked, "node hook": hooked_node, "own rows": Doubled.apply}


@pytest.mark.parametrize("kind", BACKWARDS)
def test_a_backward_pass_that_mixes_rows_is_seen(kind: str) -> None:
    delta, x = lora(Between(BACKWARDS[kind])), torch.randn(4, 6)
    stack = random_params(delta, N)
    key = "a.lora.lora_B"

    def gradient(run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        given = stack | {key: stack[key].clone().requires_grad_()}
        return torch.autograd.grad(run(given).pow(2).sum(), given[key])[0]

    expected = torch.stack([gradient(lambda p, i=i: delta.apply(fd.take(p, i), x))[i] for i in range(N)])
    assert_close(gradient(lambda p: delta.apply_many(p, x)), expected)
    if kind == "own rows":
        assert_close(gradient(lambda p: delta.apply_many(p, x, engine="fold")), expected)
        return
    with raises_saying(fd.errors.FoldError, "in the backward pass"):
        gradient(lambda p: delta.apply_many(p, x, engine="fold"))
    rows = gradient(lambda p: delta.apply_rows(p, [0, 1, 2, 0], x))
    each = [gradient(lambda p, r=r, i=i: delta.apply(fd.take(p, i), x[r : r + 1])) for r, i in enumerate([0, 1, 2, 0])]
    assert_close(rows, torch.stack(each).sum(0))
    # Without gradients nothing is mixed.
    assert_close(delta.apply_many(stack, x, engine="fold"), one_by_one(delta, stack, x))


# -- tensors of the same numbers -----------------------------------------------------------------------------------


class Subclass(Tensor):
    pass


ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda y: y,
    "data": lambda y: y.data,
    "as_subclass": lambda y: y.as_subclass(Subclass),
    "deepcopy": copy.deepcopy,
    "dlpack": torch.from_dlpack,
    "numpy": lambda y: torch.from_numpy(y.numpy()),
    "set_": lambda y: torch.empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride()),
}


@pytest.mark.parametrize("kind", ALIASES)
def test_no_alias_hides_what_python_reads(kind: str) -> None:
    def limited(y: Tensor) -> Tensor:
        return y / y.abs().sum() if float(ALIASES[kind](y.detach()).abs().max()) > 0.9 else y

    delta, x = lora(Between(limited)), 0.01 * torch.randn(5, 6)
    with torch.no_grad():
        delta.backbone.get_parameter("a.bias").zero_()
        stack = random_params(delta, N)
        for factor in (1, 1000):  # numbers that show nothing are seen first
            assert_close(delta.apply_many(stack, factor * x), one_by_one(delta, stack, factor * x))


def test_a_view_made_before_its_memory_is_written() -> None:
    reads: list[str] = []
    with Tracking(2, reads.append, reads.append) as tracking:
        memory = torch.zeros(2, 5, 4)
        before = memory[:, 1:3]
        x = torch.randn(2, 5, 2)
        tracking.mark(x, Rows(0))
        memory[..., :2] = x
        assert tracking.of(memory) == Rows(0)
        assert tracking.of(before) == Rows(0)
        memory[:] = x.mean(0).repeat(1, 2)
        assert tracking.of(before) is MIXED


def test_memory_written_in_parts_keeps_its_rows_where_sizes_agree() -> None:
    """As long as there are rows, as the sequences are long: strides tell which axis is which."""

    def parts(y: Tensor) -> Tensor:
        joined = y.new_empty(*y.shape[:-1], 6)
        joined[..., :4], joined[..., 4:] = y[..., :4], y[..., 4:]
        return joined

    delta, x = lora(Between(parts)), torch.randn(4, 4, 6)
    stack = random_params(delta, N)
    assert_close(delta.apply_many(stack, x, engine="fold"), one_by_one(delta, stack, x))


@pytest.mark.parametrize("twice", [lambda y: y.repeat(2, 1, 1), lambda y: torch.cat([y, -y])], ids=["repeat", "cat"])
def test_rows_that_are_repeated_fold(twice: Callable[[Tensor], Tensor]) -> None:
    def there_and_back(y: Tensor) -> Tensor:
        one, two = twice(y).view(2, *y.shape).unbind()
        return one + two.sin()

    delta, x = lora(Between(there_and_back)), torch.randn(4, 5, 6)
    stack = random_params(delta, N)
    assert_close(delta.apply_many(stack, x, engine="fold"), one_by_one(delta, stack, x))


# -- modules -------------------------------------------------------------------------------------------------------


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 6)

    def forward(self, tokens: Tensor | None = None, x: Tensor | None = None) -> Tensor:
        found = self.embed(tokens) if x is None else x
        return self.out(found + found.mean(0).flip(0))


class Outer(nn.Module):
    def __init__(self, hook: bool, after: bool) -> None:
        super().__init__()
        self.inner, self.after = Inner(), after
        if hook:
            self.inner.register_forward_pre_hook(
                lambda module, args, kwargs: ((), {"x": self.inner.embed(kwargs["tokens"])}), with_kwargs=True
            )

    def forward(self, tokens: Tensor) -> Tensor:
        y = self.inner(tokens=tokens)
        return y + self.inner.embed(tokens) if self.after else y


@pytest.mark.parametrize(("hook", "after"), [(False, False), (True, False), (False, True), (True, True)])
def test_parts_of_a_module_that_runs_in_turn_act_outside_of_it_too(hook: bool, after: bool) -> None:
    """The table differs by member; it is used within the module, by a hook of it, and after it."""
    model = Outer(hook, after)
    delta = lora(model, "inner.out", unfrozen_modules=["deltas", "inner.embed"])
    stack, tokens = random_params(delta, N), torch.randint(0, 9, (4, 3))
    expected = one_by_one(delta, stack, tokens)
    assert_close(delta.apply_many(stack, tokens, engine="fold"), expected)
    assert "inner" in delta.explain(stack, tokens).once_per_member


def test_a_module_that_acts_by_weights_never_runs_without_them() -> None:
    """The first rows do not lead past the inner module; others do, and then nothing is known of the table."""
    model = Outer(hook=False, after=False)
    delta = lora(model, "inner.out", unfrozen_modules=["deltas", "inner.embed"])
    stack, tokens = random_params(delta, N), torch.randint(0, 9, (4, 3))
    delta.apply_many(stack, tokens, engine="fold")
    layouts = [layout for layout in delta.program.layouts.values() if hasattr(layout, "unused")]
    assert all("inner.embed" in layout.unused for layout in layouts)
    assert issubclass(LayoutMismatchError, fd.errors.FoldError)


def test_parts_in_threads_run_alone() -> None:
    class Threads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.h = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(2) as pool:
                one, two = pool.map(lambda layer: layer(x), (self.a, self.h))
            return one + two

    delta, x = lora(Threads()), torch.randn(2, 6)
    stack = random_params(delta, N)
    expected = one_by_one(delta, stack, x)
    with raises_saying(fd.errors.FoldError, "a runs in another thread"):
        delta.apply_many(stack, x, engine="fold")
    assert_close(delta.apply_many(stack, x), expected)
    assert_close(delta.apply_rows(stack, [1, 2], x), torch.stack([expected[1, 0], expected[2, 1]]))


# -- rows without a member, and chunks -----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_rows_of_the_bare_backbone_do_not_see_a_broken_member(bad: float) -> None:
    delta = lora(Between(torch.sin))
    stack, x = random_params(delta, N), torch.randn(3, 6, requires_grad=True)
    for name, leaf in stack.items():
        if name not in delta.constants:
            leaf[0] = bad
            leaf.requires_grad_()
    found = delta.apply_rows(stack, [1, -1, 2], x)
    trained = [leaf for leaf in stack.values() if leaf.requires_grad]
    own, *others = torch.autograd.grad(found.pow(2).sum(), [x, *trained])
    assert_close(found[1], delta.backbone(x)[1])
    assert_close(own[1], torch.autograd.grad(delta.backbone(x)[1].pow(2).sum(), x)[0][1])
    assert all(leaf.isfinite().all() for leaf in (own, *others))


@dataclasses.dataclass
class Output:
    y: Tensor
    total: float
    array: Any
    kind: str


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_join_numbers_and_arrays(chunk: int) -> None:
    class Told(Between):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return Output(y, float(y.sum()), y.detach().sum(0).numpy(), "told")

    delta, x = lora(Told(torch.sin)), torch.randn(4, 6)
    stack = random_params(delta, N)
    whole, parts = delta.apply_many(stack, x, engine="loop"), delta.apply_many(stack, x, chunk_size=chunk)
    assert_close(parts.y, whole.y)
    assert_close(parts.total, whole.total)
    np.testing.assert_allclose(parts.array, whole.array, rtol=1e-5, atol=1e-5)
    assert parts.kind == "told"


@pytest.mark.parametrize("lazy", [lambda h, y: (h(part) for part in (y, y)), lambda h, y: map(h, (y, y))])
def test_what_computes_after_the_call_is_refused(lazy: Callable[..., Any]) -> None:
    class Yields(Between):
        def forward(self, x: Tensor) -> Any:
            return lazy(self.h, self.a(x))

    delta, x = lora(Yields(torch.sin)), torch.randn(4, 6)
    stack = random_params(delta, N)
    calls = {
        "apply": lambda: delta.apply(fd.take(stack, 0), x),
        "apply_many": lambda: delta.apply_many(stack, x),
        "vmap": lambda: delta.apply_many(stack, x, engine="vmap"),
        "apply_rows": lambda: delta.apply_rows(stack, [0, 1, 2, 0], x),
        "chunks": lambda: delta.apply_many(stack, x, chunk_size=2),
    }
    for call in calls.values():
        with raises_saying(fd.errors.EngineError, "computes after the call has ended", "Return a list"):
            call()
