"""The laws, over every registered method and every architecture of the zoo."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from agreement import assert_close, assert_moved, weighted_sum
from backbone_snapshot import assert_unchanged, snapshot
from subjects import MEMBERS, PAIRS, ROWS, Subject, subject, thinned, with_fewer_sites
from torch import Tensor
from zoo import ZOO, DoublePrecision, take_rows

import funcdelta as fd
from funcdelta.methods.config import METHODS

on_every_pair = pytest.mark.parametrize(("method", "name"), PAIRS)
on_some_pairs = pytest.mark.parametrize(("method", "name"), thinned())


@pytest.mark.parametrize("name", ZOO)
def test_law_1_detached_is_the_backbone_bit_for_bit(name: str) -> None:
    s = subject("lora", name)
    inputs = s.inputs()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(s.apply({}, inputs), s.architecture.call(s.model, inputs))


@on_every_pair
def test_law_2_fresh_params_change_nothing(method: str, name: str) -> None:
    s = subject(method, name)
    if not METHODS[method].identity_at_start:
        pytest.skip(f"{method} does not start at the identity")
    with torch.no_grad():
        assert_close(s.apply(s.delta.init(1), s.inputs()), s.architecture.call(s.model, s.inputs()), 1e-6)


@on_every_pair
def test_law_3_the_backbone_stays_what_it_was(method: str, name: str) -> None:
    s = subject(method, name)
    before = snapshot(s.model)
    train = s.delta.mode(train=True)
    params = {key: leaf.clone().requires_grad_() for key, leaf in s.member(0).items()}
    weighted_sum(s.architecture.call(lambda *a, **k: train.apply(params, *a, **k), s.inputs())).backward()
    s.many(s.inputs(), "auto")
    s.delta.bind(s.member(0))
    with pytest.raises(Exception, match=r".+"):
        s.delta.apply(s.member(0), torch.full((2, 2), -(10**6)), nonsense=True)
    assert_unchanged(s.model, before)


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv2d"])
def test_law_3_eight_threads_with_eight_deltas(name: str) -> None:
    s = subject("lora", name)
    stack = s.delta.random_members(8, s.delta.plan.present(s.stack))
    inputs, before = s.inputs(), snapshot(s.model)
    with torch.no_grad():
        alone = [s.apply(fd.take(stack, i), inputs) for i in range(8)]
    problems: list[Any] = []
    start = threading.Barrier(9)

    def work(i: int) -> None:
        start.wait()
        try:
            with torch.no_grad():
                for _ in range(5):
                    assert torch.equal(s.apply(fd.take(stack, i), inputs), alone[i])
        except BaseException as problem:  # carried to the main thread, which raises it
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    start.wait()
    # The backbone is looked at while the calls are under way.
    for _ in range(5):
        assert_unchanged(s.model, before)
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    assert_unchanged(s.model, before)


KNOWN_REFUSALS = {
    "vmap": {"no_vmap", "no_func", "vmap_mask_raises"},
    "fold": {"batch_free_target", "moe"},
}


def many_or_named_refusal(s: Subject, inputs: dict[str, Any], engine: str, **options: Any) -> Tensor | None:
    """The engine's output; ``None`` where it says that another engine is needed, and the zoo knows why."""
    if not KNOWN_REFUSALS[engine] & s.flags:
        return s.many(inputs, engine, **options)
    try:
        return s.many(inputs, engine, **options)
    except fd.errors.EngineError as error:
        message = str(error)
    assert "engine=" in message
    return None


@on_every_pair
@pytest.mark.parametrize("shared", [True, False], ids=["one batch", "own batches"])
def test_law_4_loop_vmap_and_fold_agree(method: str, name: str, shared: bool) -> None:
    s = subject(method, name)
    inputs, in_dims = s.inputs(), None
    if not shared:
        each = [s.inputs(seed=i) for i in range(MEMBERS)]
        inputs = {
            key: tuple(torch.stack(parts) for parts in zip(*values, strict=True))
            if key == "args"
            else torch.stack(values)
            for key, values in ((key, [e[key] for e in each]) for key in inputs)
        }
        in_dims = 0
    with torch.no_grad():
        loop = s.many(inputs, "loop", in_dims=in_dims)
        assert loop.shape[:2] == (MEMBERS, ROWS)
        bare = s.architecture.call(s.model, s.inputs())
        assert_moved(loop[0], bare)
        assert_moved(loop[0], loop[1])
        for engine in ("vmap", "fold"):
            found = many_or_named_refusal(s, inputs, engine, in_dims=in_dims)
            if found is not None:
                assert_close(found, loop)
        assert_close(s.many(inputs, "auto", in_dims=in_dims, chunk_size=2), loop)


@on_every_pair
def test_law_4_gradients_agree(method: str, name: str) -> None:
    s = subject(method, name)
    inputs = s.inputs()

    def losses(engine: str) -> Any:
        def loss(stack: dict[str, Tensor]) -> Tensor:
            outs = s.architecture.call(lambda *a, **k: s.delta.apply_many(stack, *a, engine=engine, **k), inputs)
            return torch.stack([weighted_sum(out) for out in outs.unbind(0)])

        return loss

    expected, slow = fd.value_and_grad(losses("loop"))(s.stack)
    found, fast = fd.value_and_grad(losses("auto"))(s.stack)
    assert_close(found, expected, 1e-4)
    assert fast.keys() == slow.keys() == s.stack.keys()
    for key in slow:
        assert_close(fast[key], slow[key], 1e-4)
        if key in s.delta.constants:
            assert not fast[key].any()
    if not {"no_vmap", "no_func", "no_vmap_grad"} & s.flags:
        one, grads = fd.value_and_grad(lambda p: weighted_sum(s.apply(p, inputs)), chunk_size=2)(s.stack)
        assert_close(one, expected, 1e-4)
        for key in slow:
            assert_close(grads[key], slow[key], 1e-4)


@on_every_pair
def test_law_4_rows_are_members_picked_row_by_row(method: str, name: str) -> None:
    s = subject(method, name)
    inputs, index = s.inputs(4), [2, -1, 0, 2]

    def routed() -> Tensor:
        return s.architecture.call(lambda *a, **k: s.delta.apply_rows(s.stack, index, *a, **k), inputs)

    prompted = any(a.prompt_rows for a in s.delta.plan.all())
    refusal = ""
    with torch.no_grad():
        try:
            found = routed()
        except fd.errors.EngineError as error:
            refusal = str(error)
        if refusal and not prompted:
            assert s.flags & {"batch_free_target", "moe"}
            return
        if refusal:
            # A prompt makes outputs longer than those of the bare backbone.
            assert "separately: delta.apply({}, ...)" in refusal
            index = [2, 1, 0, 2]
            found = routed()
        expected = torch.cat(
            [s.apply(s.member(i) if i >= 0 else {}, take_rows(inputs, slice(r, r + 1))) for r, i in enumerate(index)]
        )
    assert_close(found, expected)


@on_some_pairs
def test_law_4_gradients_of_rows_go_to_the_members_picked(method: str, name: str) -> None:
    s = subject(method, name)
    inputs, index = s.inputs(4), [2, -1, 0, 2]
    if any(a.prompt_rows for a in s.delta.plan.all()):
        index = [2, 2, 0, 2]
    trained, constants = fd.partition(s.stack, s.delta.trainable)

    def gradients(outputs: Callable[[dict[str, Tensor]], Tensor]) -> list[Tensor]:
        leaves = [leaf.clone().requires_grad_() for leaf in trained.values()]
        stack = fd.combine(dict(zip(trained, leaves, strict=True)), constants)
        return list(torch.autograd.grad(weighted_sum(outputs(stack)), leaves, materialize_grads=True))

    def one_by_one(stack: dict[str, Tensor]) -> Tensor:
        rows = [take_rows(inputs, slice(r, r + 1)) for r in range(4)]
        return torch.cat([s.apply(fd.take(stack, i) if i >= 0 else {}, rows[r]) for r, i in enumerate(index)])

    expected = gradients(one_by_one)
    try:
        found = gradients(
            lambda stack: s.architecture.call(lambda *a, **k: s.delta.apply_rows(stack, index, *a, **k), inputs)
        )
    except fd.errors.EngineError:
        assert s.flags & {"batch_free_target", "moe"}
        return
    for leaf, other in zip(found, expected, strict=True):
        assert_close(leaf, other, 1e-4)
        assert not leaf[1].any()


@on_every_pair
def test_law_5_merged_weights_equal_apply(method: str, name: str) -> None:
    s = subject(method, name)
    params, inputs = s.member(1), s.inputs()
    if any(a.acts().unmergeable or a.acts().weights is None for a in s.delta.plan.all()):
        with pytest.raises(fd.errors.MergeError, match="cannot be merged"):
            s.delta.merge(params)
        return
    before = snapshot(s.model)
    untie = "tied" in s.flags
    with torch.no_grad():
        expected = s.apply(params, inputs)
        state = s.delta.merge(params, untie=untie)
        merged = torch.func.functional_call(
            s.model, state, s.inputs().get("args", ()), _keywords(inputs), tie_weights=False
        )
        assert_close(s.architecture.output(merged), expected, 1e-4)
        assert_close(s.architecture.call(s.delta.merged(params, untie=untie), inputs), expected, 1e-4)
    assert_unchanged(s.model, before)


def _keywords(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "args"}


@on_every_pair
def test_law_7_split_and_joined_attached_and_detached(method: str, name: str) -> None:
    s = subject(method, name)
    params, inputs = s.member(0), s.inputs()
    some, rest = fd.partition(params, s.delta.trainable)
    assert set(rest) == set(s.delta.constants)
    joined = fd.combine(some, rest)
    assert joined.keys() == params.keys()
    assert all(joined[key] is params[key] for key in params)
    full = s.delta.attach(params)
    assert full.keys() >= params.keys() | dict(s.model.named_parameters()).keys()
    with torch.no_grad():
        assert torch.equal(s.apply(full, inputs), s.apply(params, inputs))
        plain = s.delta.detach(full)
        assert torch.equal(s.apply(plain, inputs), s.architecture.call(s.model, inputs))
    trainable, frozen = s.delta.freeze_module(full, exclude=["deltas", s.architecture.head])
    assert trainable.keys() == some.keys()
    assert trainable.keys() | frozen.keys() == full.keys()


@on_every_pair
def test_law_8_saved_and_loaded_bit_for_bit(method: str, name: str, tmp_path: Path) -> None:
    s = subject(method, name)
    for params in (s.stack, s.member(0)):
        s.delta.save_finetuned(params, tmp_path / "delta")
        example = s.inputs(2)
        options = {"example": example.get("args", example)}
        delta, found = fd.AutoDeltaModel.from_finetuned(tmp_path / "delta", backbone_model=s.model, **options)
        assert list(found) == list(s.delta.names)
        assert all(torch.equal(found[key], leaf) and found[key].dtype == leaf.dtype for key, leaf in params.items())
        assert delta.names == s.delta.names


@on_some_pairs
def test_law_9_gradients_are_derivatives(method: str, name: str) -> None:
    if "no_float64" in ZOO[name].flags:
        pytest.skip("the architecture raises in float64")
    s = subject(method, name, torch.float64)
    inputs = s.inputs()
    trained, fixed = fd.partition(s.member(0), s.delta.trainable)
    rng = torch.Generator().manual_seed(1)
    direction = {key: torch.randn(leaf.shape, generator=rng, dtype=leaf.dtype) for key, leaf in trained.items()}

    def loss(moving: dict[str, Tensor]) -> Tensor:
        return weighted_sum(s.apply({**moving, **fixed}, inputs))

    def along(gradient: dict[str, Tensor]) -> Tensor:
        return sum((gradient[key] * direction[key]).sum() for key in gradient)  # type: ignore[return-value]

    with DoublePrecision():
        leaves = {key: leaf.clone().requires_grad_() for key, leaf in trained.items()}
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
        plain = dict(zip(leaves, found, strict=True))
        step = 1e-7  # short, for a rectifier bends somewhere
        ahead = loss({key: leaf + step * direction[key] for key, leaf in trained.items()})
        behind = loss({key: leaf - step * direction[key] for key, leaf in trained.items()})
        assert_close(along(plain), (ahead - behind) / (2 * step), 1e-5)
        if "no_func" in s.flags:
            return
        functional = torch.func.grad(loss)(trained)
        for key in plain:
            assert_close(functional[key], plain[key], 1e-8)
        if "no_jvp" not in s.flags:
            _, tangent = torch.func.jvp(loss, (trained,), (direction,))
            assert_close(tangent, along(plain), 1e-8)
        if "no_second_order" in s.flags:
            return

        # d/dθ (∇L·d) = H d, by two Grad levels and by differences of gradients.
        curvature = torch.func.grad(lambda p: along(torch.func.grad(loss)(p)))(trained)
        there = torch.func.grad(loss)({key: leaf + step * direction[key] for key, leaf in trained.items()})
        back = torch.func.grad(loss)({key: leaf - step * direction[key] for key, leaf in trained.items()})
        for key in curvature:
            assert_close(curvature[key], (there[key] - back[key]) / (2 * step), 1e-4)
        with fd.grad.higher_order():
            leaves = {key: leaf.clone().requires_grad_() for key, leaf in trained.items()}
            first = torch.autograd.grad(loss(leaves), list(leaves.values()), create_graph=True, materialize_grads=True)
            second = torch.autograd.grad(
                along(dict(zip(leaves, first, strict=True))), list(leaves.values()), materialize_grads=True
            )
        for key, found in zip(leaves, second, strict=True):
            assert_close(found, curvature[key], 1e-8)


@on_some_pairs
def test_law_10_compiled_without_a_break(method: str, name: str) -> None:
    s = subject(method, name)
    if "no_fullgraph" in s.flags:
        pytest.skip("the bare architecture does not compile in one graph")
    torch._dynamo.reset()
    inputs, other = s.inputs(), s.inputs(seed=1)
    compiled = torch.compile(lambda params, inputs: s.apply(params, inputs), fullgraph=True, backend="eager")
    folded = torch.compile(
        lambda stack, inputs: s.architecture.call(
            lambda *a, **k: s.delta.apply_many(stack, *a, engine="fold", **k), inputs
        ),
        fullgraph=True,
        backend="eager",
    )
    with torch.no_grad():
        assert_close(compiled(s.member(0), inputs), s.apply(s.member(0), inputs))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(compiled(s.member(1), other), s.apply(s.member(1), other))
        try:
            expected = s.many(inputs, "fold")
        except fd.errors.EngineError:
            return
        assert_close(folded(s.stack, inputs), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(folded(s.stack, other), s.many(other, "fold"))


@on_every_pair
def test_law_12_a_leaf_depends_on_seed_and_name_alone(method: str, name: str) -> None:
    s = subject(method, name)
    delta = s.delta
    stack = delta.init(7, n=2)
    state = torch.get_rng_state()
    for i, seed in enumerate(fd.seeds(7, 5)[:2]):
        again = delta.init(seed)
        assert all(torch.equal(again[key], stack[key][i]) for key in delta.names)
    assert torch.equal(state, torch.get_rng_state())
    config = s.delta.configs[0]
    if config.modified_modules is not None:
        config = with_fewer_sites(config)
    example = s.inputs(2)
    smaller = fd.DeltaModel(s.model, config, example=example.get("args", example))
    # Only a leaf that all sites share may grow with their number.
    grows = {key for group in smaller.plan.shared for key, shape in group.shapes.items() if shape != delta.shapes[key]}
    fewer = smaller.init(7, n=2)
    assert all(torch.equal(stack[key], leaf) for key, leaf in fewer.items() if key not in grows)


@on_some_pairs
def test_a_view_is_the_delta(method: str, name: str) -> None:
    s = subject(method, name)
    view = s.delta.bind(s.member(2))
    before = snapshot(s.model)
    assert isinstance(view, type(s.model))
    assert {key for key, p in view.named_parameters() if p.requires_grad} >= {
        key for key in s.delta.names if s.delta.trainable(key)
    }
    assert_close(s.architecture.call(view, s.inputs()), s.apply(s.member(2), s.inputs()), 1e-6)
    weighted_sum(s.architecture.call(view, s.inputs())).backward()
    with torch.no_grad():
        for parameter in view.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    moved = fd.unbind(view)
    assert list(moved) == list(s.delta.names)
    assert any(not torch.equal(moved[key], s.member(2)[key]) for key in moved)
    assert_close(s.architecture.call(view, s.inputs()), s.apply(moved, s.inputs()), 1e-6)
    view.load_state_dict(s.member(2))
    assert_close(s.architecture.call(view, s.inputs()), s.apply(s.member(2), s.inputs()), 1e-6)
    assert_unchanged(s.model, before)
