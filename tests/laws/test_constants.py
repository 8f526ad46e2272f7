"""Constants of a delta never train: no optimiser moves or decays them, and no process remembers their names."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optim_cases import EXACT, OURS, STEPS, THEIRS, gradient, start
from torch import Tensor, nn

import funcdelta as fd
from funcdelta import optim
from funcdelta.trees.constants import is_constant, still

Params = dict[str, Tensor]
KINDS: dict[str, Callable[..., optim.Optimizer]] = {**OURS, "lion": optim.lion, "muon": optim.muon}
SCALE = "0.lora.scale"


class Problem:
    """A LoRA with a head, and a parallel adapter whose scale is no power of two, on a tiny model; three members."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
        self.delta = fd.DeltaModel(
            self.backbone,
            fd.LoraConfig(lora_r=3, lora_alpha=1, modified_modules=["0"], unfrozen_modules=["deltas", "2"]),
            fd.ParallelAdapterConfig(bottleneck_dim=2, scaled=0.3, modified_modules=["0"]),
        )
        self.stack = self.delta.init(0, n=3)
        self.x, self.y = torch.randn(8, 4), torch.randint(3, (8,))

    def losses(self, stack: Params) -> Tensor:
        return torch.vmap(F.cross_entropy, in_dims=(0, None))(self.delta.apply_many(stack, self.x), self.y)

    def loss(self, params: Params) -> Tensor:
        return F.cross_entropy(self.delta.apply(params, self.x), self.y)

    def constants_stayed(self, found: Params) -> bool:
        assert len(self.delta.constants) == 2
        return all(torch.equal(found[name], self.stack[name]) for name in self.delta.constants)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


def by_value_and_grad(problem: Problem, stack: Params) -> Params:
    return fd.value_and_grad(problem.losses)(stack)[1]


def by_func(problem: Problem, stack: Params) -> Params:
    return torch.func.grad(lambda s: problem.losses(s).sum())(stack)


def clipped(problem: Problem, stack: Params) -> Params:
    return optim.clip_by_norm(by_func(problem, stack), 0.1, per_member=True)


def unmarked(params: Params) -> Params:
    """As they come out of compiled code, a transform, or ``leaf.to(...)``."""
    return {name: leaf.clone() for name, leaf in params.items()}


@pytest.mark.parametrize("gradients", [by_value_and_grad, by_func, clipped])
@pytest.mark.parametrize("given", [dict, unmarked, copy.deepcopy], ids=["marked", "unmarked", "copied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_leaves_constants_where_they_are(problem: Problem, kind: str, given: Any, gradients: Any) -> None:
    opt = KINDS[kind](lr=0.05, weight_decay=0.5)
    stack = given(problem.stack)
    state = opt.init(stack, n=3)
    for _ in range(4):
        updates, state = opt.update(gradients(problem, stack), state, stack)
        stack = fd.tree.add(stack, updates)
    assert problem.constants_stayed(stack)
    assert all(not torch.equal(stack[k], problem.stack[k]) for k in stack if k not in problem.delta.constants)


@pytest.mark.parametrize("kind", KINDS)
def test_marked_constants_have_no_moments(problem: Problem, kind: str) -> None:
    state = KINDS[kind](lr=0.1).init(problem.stack, n=3)
    names = {name for moments in state[1:] for name in (moments.mu if hasattr(moments, "mu") else moments)}
    assert names == set(problem.stack) - set(problem.delta.constants)


@pytest.mark.parametrize("kind", KINDS)
def test_constants_stay_where_the_whole_training_is_mapped(problem: Problem, kind: str) -> None:
    """The state is made inside of the map, where no mark is seen; a learning rate a member."""

    def trained(params: Params, rate: Tensor) -> Params:
        opt = KINDS[kind](lr=rate, weight_decay=0.5)
        state = opt.init(params)
        for _ in range(3):
            updates, state = opt.update(torch.func.grad(problem.loss)(params), state, params)
            params = fd.tree.add(params, updates)
        return params

    rates = torch.tensor([0.01, 0.05, 0.1])
    found = torch.vmap(trained)(problem.stack, rates)
    assert problem.constants_stayed(found)
    alone = trained(unmarked(fd.take(problem.stack, 1)), rates[1])
    for name, leaf in alone.items():
        torch.testing.assert_close(found[name][1], leaf, rtol=1e-4, atol=1e-5)


def test_constants_stay_in_compiled_steps(problem: Problem) -> None:
    opt = optim.adamw(lr=0.05, weight_decay=0.5)

    @torch.compile(backend="eager")
    def update(grads: Params, state: Any, stack: Params) -> Any:
        updates, state = opt.update(grads, state, stack)
        return fd.tree.add(stack, updates), state

    for given in (dict, unmarked):
        stack = given(problem.stack)
        state = opt.init(stack, n=3)
        for _ in range(3):
            stack, state = update(by_func(problem, stack), state, stack)
        assert problem.constants_stayed(stack)
        # A compiled step gives tensors without marks, and the state goes on with them.
        stack = fd.tree.add(stack, opt.update(by_func(problem, stack), state, stack)[0])
        assert problem.constants_stayed(stack)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("given", [dict, unmarked], ids=["marked", "unmarked"])
def test_what_trains_is_moved_as_torch_moves_it(problem: Problem, kind: str, given: Any) -> None:
    """At B = 0 the first gradient of A is zero; torch decays it all the same, and so do params that say what trains."""
    params = fd.take(problem.stack, 0)
    hypers: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.5}
    chosen = {"trainable": problem.delta.trainable} if given is unmarked else {}
    opt, found = KINDS[kind](**hypers, **chosen), given(params)
    state = opt.init(found)
    leaves = {k: nn.Parameter(p.clone(), requires_grad=k not in problem.delta.constants) for k, p in params.items()}
    theirs = THEIRS[kind]([leaf for leaf in leaves.values() if leaf.requires_grad], **hypers)
    for _ in range(3):
        updates, state = opt.update(torch.func.grad(problem.loss)(found), state, found)
        found = fd.tree.add(found, updates)
        theirs.zero_grad()
        problem.loss(leaves).backward()
        theirs.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.detach(), rtol=1e-4, atol=1e-6)
    assert not torch.equal(found["0.lora.lora_A"], params["0.lora.lora_A"])


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_an_unmarked_leaf_decays_from_its_first_gradient_on(kind: str) -> None:
    """The slow form: torch without weight decay for as long as gradients are zero, then with it."""
    late, hypers = 4, {"lr": 0.05, "weight_decay": 0.3}
    p = start(0)
    leaves = {name: nn.Parameter(x.clone()) for name, x in p.items()}
    theirs = THEIRS[kind](leaves.values(), **hypers)
    opt = OURS[kind](**hypers)
    found, state = p, opt.init(p)
    for step in range(STEPS):
        began = float(step >= late)
        updates, state = opt.update(fd.tree.scale(gradient(found), began), state, found)
        found = fd.tree.add(found, updates)
        for name, g in gradient({name: x.detach() for name, x in leaves.items()}).items():
            leaves[name].grad = began * g
        theirs.param_groups[0]["weight_decay"] = hypers["weight_decay"] * began
        theirs.step()
        if step < late:
            assert all(torch.equal(found[name], p[name]) for name in p)
    torch.testing.assert_close(found, {name: x.detach() for name, x in leaves.items()}, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_members_of_one_stack_begin_to_decay_each_by_itself(kind: str) -> None:
    opt = KINDS[kind](lr=0.1, weight_decay=0.3)
    p = {"w": torch.ones(2, 2, 3)}
    state = opt.init(p, n=2)
    quiet = torch.zeros(2, 2, 3)
    quiet[1, 0, 0] = 1.0
    updates, _ = opt.update({"w": quiet}, state, p)
    assert not updates["w"][0].any()
    assert updates["w"][1].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_infinities_stays(kind: str) -> None:
    p = {"w": torch.ones(2, 3), "mask": torch.tensor([[0.0, -torch.inf], [torch.inf, 0.0]])}
    opt = KINDS[kind](lr=0.1, weight_decay=0.3)
    updates, _ = opt.update(fd.tree.map(torch.zeros_like, p), opt.init(p), p)
    assert torch.equal(fd.tree.add(p, updates)["mask"], p["mask"])


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_constants_are_no_state_of_the_process(kind: str) -> None:
    """A leaf of the same name in a dict that has nothing to do with any delta trains like every other."""
    fd.LoraModel(nn.Sequential(nn.Linear(2, 2)), modified_modules=["0"])
    names = [SCALE, "w"]
    p = {name: torch.ones(2, 3) for name in names}
    opt = KINDS[kind](lr=0.1, weight_decay=0.3)
    updates, _ = opt.update(fd.tree.map(torch.ones_like, p), opt.init(p), p)
    assert torch.equal(updates[names[0]], updates[names[1]])
    assert updates[names[0]].all()


def test_what_funcdelta_makes_of_constants_is_marked(problem: Problem) -> None:
    delta, stack = problem.delta, problem.stack
    one = delta.init(1)
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    other = fd.LoraModel(problem.backbone, lora_r=2, modified_modules=["2"], unfrozen_modules=["deltas", "2"])
    packed = fd.pack([(delta, one), (other, other.init(0))])
    lora = fd.LoraModel(problem.backbone, lora_r=2, modified_modules=["2"])
    cases = {
        "init": (delta, one),
        "a stack": (delta, stack),
        "take": (delta, fd.take(stack, [0, 2])),
        "take one": (delta, fd.take(stack, 0)),
        "unstack": (delta, fd.unstack(stack)[1]),
        "stack": (delta, fd.stack([one, one])),
        "cat": (delta, fd.cat([stack, stack])),
        "broadcast": (delta, fd.broadcast(one, 2)),
        "partition": (delta, fd.combine(*fd.partition(one, "lora"))),
        "add": (delta, fd.tree.add(one, fd.tree.map(torch.zeros_like, one))),
        "lerp": (delta, fd.tree.lerp(one, fd.take(stack, 0), 0.5)),
        "scale": (delta, fd.tree.scale(one, 1.0)),
        "mean": (delta, fd.tree.mean(stack)),
        "copy": (delta, copy.deepcopy(one)),
        "torch.save": (delta, torch.load(file)),
        "pack": packed,
        "unpack": fd.unpack(*packed)[1],
        "algebra": fd.algebra.truncate(lora, fd.tree.randn_like(lora.init(0), 0), 1),
    }
    for name, (made, params) in cases.items():
        assert {key for key, leaf in params.items() if is_constant(leaf)} == set(made.constants), name


def test_the_mark_is_on_no_tensor_of_the_users() -> None:
    base = torch.eye(2)
    marked = still({"base": base}, ["base"])
    assert is_constant(marked["base"])
    assert not is_constant(base)
    assert marked["base"].data_ptr() == base.data_ptr()
    shared = torch.zeros(())
    made = fd.tree.map(lambda leaf: shared, still({"w": base, "scale": base}, ["scale"]))
    assert not any(map(is_constant, made.values()))
