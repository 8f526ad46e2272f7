"""The calls of a view: one at a time, whoever makes them, however they end, and what they leave behind."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

CALLS = 50


def in_threads(works: list[Callable[[], Any]]) -> list[Any]:
    """What each work gives in a thread of its own; an exception of one is raised."""
    found: list[Any] = [None] * len(works)

    def run(i: int) -> None:
        try:
            found[i] = works[i]()
        except BaseException as error:  # raised below, in the test's own thread
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x)))


SHARED: dict[str, tuple[Callable[[], nn.Module], list[fd.BaseDeltaConfig]]] = {
    "weights": (ZOO["bert"].build, [fd.BitFitConfig(modified_modules=["key", "output"]), fd.LoraConfig()]),
    "a trained head": (ZOO["bert"].build, [fd.LoraConfig(unfrozen_modules=["deltas", "classifier"])]),
    "a span": (ZOO["bert"].build, [fd.ParallelAdapterConfig(bottleneck_dim=4)]),
    "a prompt": (ZOO["bert"].build, [fd.SoftPromptConfig(soft_token_num=2)]),
    "a prefix from a network": (ZOO["gpt2"].build, [fd.PrefixConfig(prefix_token_num=2, embed_dim=3, mid_dim=4)]),
}


@pytest.mark.parametrize("what", SHARED)
def test_threads_share_a_view(what: str) -> None:
    build, configs = SHARED[what]
    model = build()
    name = "bert" if "Bert" in type(model).__name__ else "gpt2"
    batches = [{**ZOO[name].inputs(rows, seed=rows)} for rows in (1, 2, 3, 4)]
    delta = fd.DeltaModel(model, *configs, example=batches[0])
    params, options = random_params(delta), {"use_cache": False} if name == "gpt2" else {}
    view = delta.bind(params)
    with torch.no_grad():
        expected = [delta.apply(params, **batch, **options).logits for batch in batches]

    def work(i: int) -> list[Tensor]:
        with torch.no_grad():
            return [view(**batches[i], **options).logits for _ in range(CALLS)]

    for found, right in zip(in_threads([lambda i=i: work(i) for i in range(4)]), expected, strict=True):
        for one in found:
            assert_close(one, right, 1e-5)


def routed_subject() -> tuple[fd.DeltaModel, dict[str, Tensor], dict[str, Tensor]]:
    """BERT with a trained head, five members, and four rows."""
    architecture = ZOO["bert"]
    delta = fd.LoraModel(architecture.build(), modified_modules=["query"], unfrozen_modules=["deltas", "classifier"])
    return delta, random_params(delta, 5), architecture.inputs(4)


INDICES = [[0, 1, 2, 3], [4, -1, 4, 0], [1, 1, 1, 1], [2, -1, -1, 3]]


def test_threads_share_a_routed_view_each_with_rows_of_its_own() -> None:
    delta, stack, inputs = routed_subject()
    view: Any = delta.bind_rows(stack, INDICES[0])
    with torch.no_grad():
        expected = [delta.apply_rows(stack, index, **inputs).logits for index in INDICES]

    def work(i: int) -> list[Tensor]:
        with torch.no_grad():
            return [view.route(INDICES[i])(**inputs).logits for _ in range(CALLS)]

    for found, right in zip(in_threads([lambda i=i: work(i) for i in range(4)]), expected, strict=True):
        for one in found:
            assert_close(one, right, 1e-5)
    with torch.no_grad():
        assert_close(view(**inputs).logits, expected[0], 1e-5)  # this thread's rows are what they were
        assert_close(in_threads([lambda: view(**inputs).logits.detach()])[0], expected[0], 1e-5)
        view.route(INDICES[1])  # where the view was bound it is said for threads that say nothing
        assert_close(in_threads([lambda: view(**inputs).logits.detach()])[0], expected[1], 1e-5)


def test_a_resident_stack_changes_while_a_view_reads_it() -> None:
    delta, stack, inputs = routed_subject()
    resident = fd.Resident.of(delta, fd.take(stack, [0, 1]), capacity=3)
    view: Any = delta.bind_rows(resident, [0, 1, -1, 0])
    with torch.no_grad():
        expected = delta.apply_rows(stack, [0, 1, -1, 0], **inputs).logits
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            resident.remove(resident.put(fd.take(stack, 4)))

    def read() -> list[Tensor]:
        try:
            with torch.no_grad():
                return [view(**inputs).logits for _ in range(CALLS)]
        finally:
            stop.set()

    for found in in_threads([read, change])[0]:
        assert_close(found, expected, 1e-5)


def test_a_slot_that_another_member_took_does_not_answer_for_the_old_one() -> None:
    delta, stack, inputs = routed_subject()
    resident = fd.Resident.of(delta, fd.take(stack, [0, 1]), capacity=2)
    view: Any = delta.bind_rows(resident, [0, 1, -1, 0])
    with torch.no_grad():
        view(**inputs)
        resident.remove(1)
        slot = resident.put(fd.take(stack, 4))
        with raises_saying(fd.errors.StackError, "Slot 1 holds no member", f"slot {slot} took its place"):
            view(**inputs)
        found = view.route([0, slot, -1, 0])(**inputs).logits
        assert_close(found, delta.apply_rows(stack, [0, 4, -1, 0], **inputs).logits, 1e-5)


# -- however they end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, asyncio.CancelledError, SystemExit, ZeroDivisionError])
@pytest.mark.parametrize(
    "place", ["", "bert.encoder.layer.0", "bert.encoder.layer.0.attention.self.query", "classifier"]
)
@pytest.mark.parametrize("routed", [False, True], ids=["bind", "bind_rows"])
def test_the_call_after_one_that_failed_is_right(routed: bool, place: str, error: type[BaseException]) -> None:
    delta, stack, inputs = routed_subject()
    view: Any = delta.bind_rows(stack, INDICES[0]) if routed else delta.bind(fd.take(stack, 0))

    def fail(*_: Any) -> None:
        raise error("now")

    for register in ("register_forward_pre_hook", "register_forward_hook"):
        handle = getattr(view.get_submodule(place), register)(fail)
        with torch.no_grad(), pytest.raises(error):
            view(**inputs)
        handle.remove()
        with torch.no_grad():
            if routed:
                view.route(INDICES[1])
                expected = delta.apply_rows(stack, INDICES[1], **inputs)
            else:
                expected = delta.apply(fd.take(stack, 0), **inputs)
            assert_close(view(**inputs).logits, expected.logits, 1e-5)
            if routed:
                view.route(INDICES[0])


def test_a_failure_between_the_ends_of_a_span_and_under_a_prompt() -> None:
    for config in (fd.ParallelAdapterConfig(bottleneck_dim=4), fd.SoftPromptConfig(soft_token_num=2)):
        inputs = ZOO["bert"].inputs(3)
        delta = fd.DeltaModel(ZOO["bert"].build(), config, example=inputs)
        params = random_params(delta)
        view: Any = delta.bind(params)

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = view.bert.encoder.layer[0].intermediate.register_forward_hook(fail)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            view(**inputs)
        handle.remove()
        shorter = ZOO["bert"].inputs(2, seed=1)
        with torch.no_grad():
            assert_close(view(**shorter).logits, delta.apply(params, **shorter).logits, 1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_fork_in_the_middle_of_another_threads_call_is_told() -> None:
    """The child has the view as the other thread had left it, which nobody there will put right."""
    delta = fd.BitFitModel(nn.Sequential(Block(), nn.Linear(4, 2)).eval(), modified_modules=["two"])
    view, x = delta.bind(random_params(delta)), torch.randn(3, 4)
    view(x)
    inside, go_on = threading.Event(), threading.Event()
    view.get_submodule("0.two").register_forward_hook(lambda *_: (inside.set(), go_on.wait(60))[:0] or None)
    other = threading.Thread(target=lambda: view(x))
    other.start()
    inside.wait(60)
    child = os.fork()
    if child == 0:
        try:
            view(x)
        except fd.errors.EngineError:
            os._exit(7)
        finally:
            os._exit(1)
    go_on.set()
    other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


# -- parts called by themselves ----------------------------------------------------------------------------------------


def test_a_view_may_be_called_layer_by_layer() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    delta = fd.DeltaModel(
        model, fd.LoraConfig(modified_modules=["one"]), fd.BitFitConfig(modified_modules=["two", "2"]), example=(x,)
    )
    params = random_params(delta)
    view: Any = delta.bind(params)
    hidden = x
    for block in view:
        hidden = block(hidden)
    assert_close(hidden, delta.apply(params, x), 1e-6)


# -- what calls leave behind -------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Keeps what it made of its weights, as LeViT does, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.layer = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.kept: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if "table" not in self.kept:
            self.kept["table"] = torch.tanh(self.bias)
        return self.layer(x) + self.kept["table"]


def test_what_a_module_made_of_leaves_goes_when_they_change() -> None:
    delta = fd.LoraModel(
        nn.Sequential(Table(), nn.Linear(4, 2)).eval(),
        modified_modules=["0.layer"],
        unfrozen_modules=["deltas", "[r]^0.bias$"],
    )
    view, x = delta.bind(random_params(delta)), torch.randn(3, 4)
    optimiser = torch.optim.SGD(view.parameters(), lr=0.1)
    before = snapshot(delta.backbone)
    for _ in range(3):
        with torch.no_grad():
            view(x)  # what is kept without a graph is not for a call that needs one
        optimiser.zero_grad()
        output = view(x)
        assert_close(output, delta.apply(fd.unbind(view), x), 1e-6)
        output.square().sum().backward()
        assert dict(view.named_parameters())["0.bias"].grad.abs().sum() > 0  # type: ignore[union-attr]
        optimiser.step()
        with torch.no_grad():
            assert_close(view(x), delta.apply(fd.unbind(view), x), 1e-6)
    assert_unchanged(delta.backbone, before)


class Reader(nn.Module):
    """Reads token by token, with a state that it keeps: in an attribute, and in a buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(4, 4), None
        self.register_buffer("sums", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor, start: bool = True) -> Tensor:
        if start:
            self.state = torch.zeros_like(x)
            self.sums.zero_()
        self.state = torch.tanh(self.layer(x) + self.state)
        self.sums.add_(self.state.mean(0))
        return self.state + self.sums


def read(model: Any, tokens: Tensor) -> Tensor:
    """The outputs token after token, as a loop that writes a text makes them."""
    with torch.no_grad():
        return torch.stack([model(token, start=i == 0) for i, token in enumerate(tokens)])


def test_a_state_lasts_from_call_to_call() -> None:
    delta = fd.LoraModel(nn.Sequential(Reader()).eval()[0], modified_modules=["layer"])
    params, tokens = random_params(delta), torch.randn(5, 2, 4)
    view = delta.bind(params)
    expected = read(delta.merged(params), tokens)
    assert_close(read(view, tokens), expected, 1e-5)
    assert_close(read(view, tokens), expected, 1e-5)


def test_threads_read_with_states_of_their_own() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.state = nn.Linear(4, 4), None

        def forward(self, x: Tensor, start: bool = True) -> Tensor:
            self.state = torch.tanh(self.layer(x) + (0.0 if start else self.state))  # type: ignore[operator]
            return self.state

    delta = fd.LoraModel(Plain().eval(), modified_modules=["layer"])
    params, texts = random_params(delta), [torch.randn(CALLS, 2, 4) for _ in range(4)]
    view, merged = delta.bind(params), delta.merged(params)
    expected = [read(merged, text) for text in texts]
    for found, right in zip(in_threads([lambda t=t: read(view, t) for t in texts]), expected, strict=True):
        assert_close(found, right, 1e-5)


def test_what_its_owner_sets_stays() -> None:
    delta = fd.LoraModel(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval(), modified_modules=["0"])
    view: Any = delta.bind(random_params(delta))
    x = torch.randn(3, 4)
    view(x)
    view[1].p, view.note = 1.0, ["a"]
    view.train()
    assert not view(x).any()
    assert view.training
    assert (view[1].p, view.note) == (1.0, ["a"])
    calls: list[int] = []
    handle = view[0].register_forward_hook(lambda *_: calls.append(1))
    view(x)
    view(x)
    handle.remove()
    view(x)
    assert len(calls) == 2


# -- batch statistics --------------------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """Somebody's own batch norm, which puts other statistics in the places of the old ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3)) if self.training else self.running_mean
        if self.training:
            self.running_mean = 0.5 * self.running_mean + 0.5 * mean.detach()
        return x - mean[:, None, None]


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 9, 4))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda n: OwnNorm()], ids=["torch's", "somebody's own"])
def test_what_a_training_call_teaches_moves_the_views_statistics(
    norm: Callable[[int], nn.Module], tmp_path: Any
) -> None:
    model = net(norm(6))
    before = snapshot(model)
    delta = fd.LoraModel(model, lora_r=2, modified_modules=["0", "4"])
    params, x = random_params(delta), torch.randn(6, 3, 5, 5)
    view, plain = delta.bind(params).train(), delta.merged(params).train()
    for scale in (1.0, 3.0):
        assert_close(view(scale * x), plain(scale * x), 1e-5)
    assert_close(view.eval()(x), plain.eval()(x), 1e-5)
    assert_close(view(x[:1]), view(x)[:1], 1e-5)
    found = fd.unbind(view)
    learned = [name for name in found if name not in delta.names]
    assert "1.running_mean" in learned
    for name in learned:
        assert_close(found[name].double(), plain.state_dict()[name].double(), 1e-5)
    # Everything that takes params takes them along.
    rests = delta.mode(train=False)
    folder = delta.save_finetuned(found, tmp_path / "run")
    loaded, again = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    assert all(torch.equal(again[name], found[name]) for name in found)
    models: list[Callable[[Tensor], Tensor]] = [
        lambda x: rests.apply(found, x),
        lambda x: rests.apply(rests.attach(found), x),
        rests.merged(found).eval(),
        rests.bind(found),
        loaded.bind(again).eval(),
        copy.deepcopy(view),
        pickle.loads(pickle.dumps(view)),
    ]
    for one in models:
        assert_close(one(x), view(x), 1e-5)
    assert all(torch.equal(rests.merge(found)[name], found[name]) for name in learned)
    assert set(fd.unbind(rests.bind(found))) == set(found)
    assert_close(delta.apply(found, x), plain.train()(x), 1e-5)  # in training a batch has statistics of its own
    assert_acts(view(x), delta.bind(params).eval()(x))
    assert_unchanged(model, before)


def test_statistics_that_learned_nothing_are_no_part_of_params() -> None:
    delta = fd.LoraModel(net(nn.BatchNorm2d(6)), lora_r=2, modified_modules=["0"])
    view = delta.bind(delta.init(0)).eval()
    view(torch.randn(6, 3, 5, 5))
    assert list(fd.unbind(view)) == list(delta.names)
    view.load_state_dict(random_params(delta))  # params without them are loaded as well


def test_a_copy_learns_for_itself() -> None:
    delta = fd.LoraModel(net(nn.BatchNorm2d(6)), lora_r=2, modified_modules=["0"])
    view, x = delta.bind(random_params(delta)).train(), torch.randn(6, 3, 5, 5)
    view(x)
    other = copy.deepcopy(view)
    other(3 * x)
    assert_acts(other.eval()(x), view.eval()(x))
    third = delta.bind(delta.init(0)).eval()
    third.load_state_dict(other.state_dict())
    assert_close(third(x), other(x), 1e-6)
