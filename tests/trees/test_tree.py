"""Leafwise arithmetic against plain vector arithmetic, its derivatives, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from funcdelta import tree
from funcdelta.errors import ParamsError, StackError
from funcdelta.trees import stack as params

N = 3


def draw(seed: int, n: int | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if n is None else (n,)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn((*lead, *shape), generator=generator, dtype=dtype)

    return {"b.w": leaf(2, 3), "a": {"s": leaf(), "t": (leaf(4), 7)}}


def flat(tree_: Any) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree_) if isinstance(leaf, torch.Tensor)])


def test_arithmetic_is_that_of_vectors() -> None:
    a, b = draw(0), draw(1)
    x, y = flat(a), flat(b)
    torch.testing.assert_close(flat(tree.add(a, b)), x + y)
    torch.testing.assert_close(flat(tree.sub(a, b)), x - y)
    torch.testing.assert_close(flat(tree.scale(a, -2.5)), -2.5 * x)
    torch.testing.assert_close(flat(tree.scale(a, torch.tensor(0.5))), 0.5 * x)
    torch.testing.assert_close(flat(tree.lerp(a, b, 0.3)), x + 0.3 * (y - x))
    torch.testing.assert_close(flat(tree.lerp(a, b, torch.tensor(0.3, dtype=torch.float64))), x + 0.3 * (y - x))
    torch.testing.assert_close(tree.vdot(a, b), x @ y)
    torch.testing.assert_close(tree.norm(a), x.norm())
    torch.testing.assert_close(flat(tree.map(torch.maximum, a, b)), torch.maximum(x, y))
    assert tree.add(a, b)["a"]["t"][1] == 7


def test_per_member_is_the_single_one_member_by_member() -> None:
    each_a, each_b = [draw(i) for i in range(N)], [draw(10 + i) for i in range(N)]
    a, b = params.stack(each_a), params.stack(each_b)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    for i, (p, q) in enumerate(zip(each_a, each_b, strict=True)):
        torch.testing.assert_close(params.take(tree.scale(a, t, per_member=True), i), tree.scale(p, t[i]))
        torch.testing.assert_close(params.take(tree.lerp(a, b, t, per_member=True), i), tree.lerp(p, q, t[i]))
        torch.testing.assert_close(tree.vdot(a, b, per_member=True)[i], tree.vdot(p, q))
        torch.testing.assert_close(tree.norm(a, per_member=True)[i], tree.norm(p))
        torch.testing.assert_close(tree.ravel(a, per_member=True)[0][i], tree.ravel(p)[0])
    total = tree.scale(tree.add(tree.add(*each_a[:2]), each_a[2]), 1 / 3)
    torch.testing.assert_close(tree.mean(a), total)


def test_vmap_is_the_same_as_per_member() -> None:
    a, b = params.stack([draw(0), draw(1)]), params.stack([draw(2), draw(3)])
    a["a"]["t"], b["a"]["t"] = a["a"]["t"][:1], b["a"]["t"][:1]
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(tree.vdot)(a, b), tree.vdot(a, b, per_member=True))
    torch.testing.assert_close(torch.vmap(tree.norm)(a), tree.norm(a, per_member=True))
    torch.testing.assert_close(torch.vmap(tree.scale)(a, t), tree.scale(a, t, per_member=True))
    torch.testing.assert_close(torch.vmap(tree.lerp)(a, b, t), tree.lerp(a, b, t, per_member=True))
    torch.testing.assert_close(torch.vmap(lambda p: tree.ravel(p)[0])(a), tree.ravel(a, per_member=True)[0])
    _, unravel = tree.ravel(params.take(a, 0))
    vectors, _ = tree.ravel(a, per_member=True)
    torch.testing.assert_close(torch.vmap(unravel)(vectors), a)


def test_everything_is_differentiable_twice() -> None:
    a, b = draw(0), draw(1)
    vector, unravel = tree.ravel(a)

    def value(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p = unravel(x)
        mixed = tree.sub(tree.lerp(p, b, t), tree.scale(tree.add(p, b), t))
        return tree.vdot(mixed, p) + tree.norm(mixed) + tree.vdot(tree.mean(params.stack([p, b])), b)

    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x = vector.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(value, (x, t))
    assert torch.autograd.gradgradcheck(value, (x, t))


def test_norm_has_no_nan_gradient_at_zero() -> None:
    zero = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    for per_member in (False, True):
        gradient = torch.func.grad(lambda p, per_member=per_member: tree.norm(p, per_member).sum())(zero)
        assert torch.equal(gradient["a"], zero["a"])
        assert torch.equal(gradient["b"], zero["b"])


def test_compiles_to_one_graph() -> None:
    a, b = params.stack([draw(0), draw(1)]), params.stack([draw(2), draw(3)])
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def work(a: Any, b: Any, t: torch.Tensor) -> Any:
        moved = tree.lerp(tree.add(a, b), tree.scale(b, t, per_member=True), t, per_member=True)
        vector, unravel = tree.ravel(moved, per_member=True)
        return unravel(vector * 2), tree.norm(moved, per_member=True), tree.vdot(a, b), tree.mean(moved)

    torch.testing.assert_close(torch.compile(work, backend="eager", fullgraph=True)(a, b, t), work(a, b, t))


def test_ravel_keeps_insertion_order_dtypes_and_shapes() -> None:
    p = {
        "z": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "a": torch.tensor(3.0),
        "k": 5,
        "e": torch.zeros(0, 2),
    }
    vector, unravel = tree.ravel(p)
    assert vector.tolist() == [1.0, 2.0, 3.0]
    assert vector.dtype == torch.float64
    back = unravel(vector)
    assert list(back) == ["z", "a", "k", "e"]
    assert back["k"] == 5
    assert back["e"].shape == (0, 2)
    assert back["a"].dtype == torch.float32
    assert back["a"].shape == ()
    stack, unravel = tree.ravel({"a": torch.ones(2, 3), "b": torch.zeros(2)}, per_member=True)
    assert stack.shape == (2, 4)
    assert unravel(torch.zeros(5, 4))["a"].shape == (5, 3)


def test_half_precision_is_summed_in_float32() -> None:
    a = {"a": torch.full((70000,), 1.0, dtype=torch.float16)}
    assert tree.vdot(a, a).item() == 70000.0
    assert tree.norm(a).item() == pytest.approx(70000.0**0.5)
    s = torch.tensor(0.5)
    assert tree.scale(a, s)["a"].dtype == torch.float16
    assert tree.scale({"a": torch.ones(())}, s.double())["a"].dtype == torch.float32


def test_randn_like_depends_on_seed_and_name_alone() -> None:
    a = {"x": torch.zeros(50, 20), "y": torch.zeros(50, 20), "h": torch.zeros(3, dtype=torch.bfloat16)}
    drawn = tree.randn_like(a, 4)
    assert torch.equal(drawn["y"], tree.randn_like({"y": a["y"]}, 4)["y"])
    assert not torch.equal(drawn["x"], drawn["y"])
    assert drawn["h"].dtype == torch.bfloat16
    assert not torch.equal(drawn["x"], tree.randn_like(a, 5)["x"])
    assert abs(drawn["x"].mean()) < 0.1
    assert abs(drawn["x"].std() - 1) < 0.1
    stack = tree.randn_like(params.broadcast(a, 3), params.seeds(0, 3))
    for i, seed in enumerate(params.seeds(0, 3)):
        torch.testing.assert_close(params.take(stack, i), tree.randn_like(a, seed), rtol=0, atol=0)


def test_empty_trees() -> None:
    assert tree.norm({}).item() == tree.vdot({}, {}).item() == 0.0
    assert tree.ravel({})[0].shape == (0,)


W = {"l.w": torch.ones(2, 3), "l.b": torch.ones(2)}


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: tree.add(W, {"l.w": W["l.w"]}), "Leaf 'l.b' is in the first tree but not in the second"),
        (
            lambda: tree.map(torch.add, W, {**W, "x": W["l.b"]}),
            "Leaf 'x' is in tree 1 but not in the first tree",
        ),
        (
            lambda: tree.sub(W, {**W, "l.w": torch.ones(3)}),
            r"Leaf 'l\.w' has shape \(2, 3\) in the first tree and shape \(3,\) in the second.*fd\.broadcast",
        ),
        (lambda: tree.vdot(W, {**W, "l.b": 2.0}), r"Leaf 'l\.b' has shape \(2,\) in the first tree and 2\.0"),
        (lambda: tree.scale(W, torch.ones(2)), r"found shape \(2,\).*write per_member=True"),
        (lambda: tree.scale(W, 2.0, per_member=True), r"the factor must be a tensor \(n,\); found 2\.0"),
        (
            lambda: tree.lerp(W, W, torch.ones(3), per_member=True),
            r"3 values, one per member, but leaf 'l\.w' has shape",
        ),
        (
            lambda: tree.norm({"step": torch.tensor(3)}),
            "norm takes real numbers, but leaf 'step' is torch.int64",
        ),
        (lambda: tree.mean({"step": torch.tensor([3])}), "mean takes real numbers, but leaf 'step'"),
        (lambda: tree.ravel(W)[1](torch.ones(7)), r"unravel expects shape \(8,\); found \(7,\)"),
        (lambda: tree.ravel(W)[1](torch.ones(2, 8)), r"torch\.vmap\(unravel\)"),
        (lambda: tree.ravel(W, per_member=True)[1](torch.ones(4)), r"expects shape \(m, 4\); found \(4,\)"),
        (lambda: tree.randn_like(W, [1, 2, 3]), "found 3 for 2 members"),
    ],
)
def test_errors_say_where_and_what(action: Any, words: str) -> None:
    with pytest.raises(ParamsError, match=words):
        action()


def test_one_member_is_no_stack() -> None:
    one = {"w": torch.ones(3), "scale": torch.ones(())}
    for action in (
        tree.mean,
        lambda p: tree.norm(p, per_member=True),
        lambda p: tree.ravel(p, per_member=True),
    ):
        with pytest.raises(StackError, match=r"'scale' has shape \(\)"):
            action(one)


def test_a_stack_of_no_members_has_no_norms() -> None:
    empty = {"w": torch.zeros(0, 2, 3), "v": torch.zeros(0)}
    assert tree.norm(empty, per_member=True).shape == (0,)
    assert tree.vdot(empty, empty, per_member=True).shape == (0,)
    assert tree.ravel(empty, per_member=True)[0].shape == (0, 7)
