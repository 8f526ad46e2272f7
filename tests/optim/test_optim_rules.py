"""Which leaves the optimisers move: masks, missing gradients; clipping; errors. Constants: test_constants.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import Tensors, gradient, start

from funcdelta import optim, tree
from funcdelta.errors import ConfigError, MatchError, ParamsError, StackError
from funcdelta.trees import stack as params
from funcdelta.trees.constants import still


def test_trainable_says_which_leaves_move() -> None:
    p = still({"lora_A": torch.ones(2, 3), "scale": torch.tensor([2.0, 3.0])}, ["scale"])
    grads = tree.map(torch.ones_like, p)

    def moved(trainable: Any) -> list[str]:
        opt = optim.adamw(lr=0.1, trainable=trainable)
        updates, state = opt.update(grads, opt.init(p), p)
        assert list(updates) == list(p)
        found = [name for name, x in updates.items() if x.any()]
        assert list(state.mu) == list(state.nu) == found
        return found

    assert moved(None) == moved(["lora_A"]) == moved(r"[r].*") == ["lora_A"]
    assert moved(lambda name: True) == ["lora_A", "scale"]
    assert moved(lambda name, leaf: leaf.ndim == 1) == ["scale"]
    assert moved(lambda name: False) == moved([]) == moved("scale") == []
    with pytest.raises(MatchError, match=r"'loraA'.*Near names: lora_A"):
        moved("loraA")


def test_missing_gradients_leave_leaf_and_moments_alone() -> None:
    p = start(0)
    opt = optim.adamw(lr=0.1, weight_decay=0.5)
    _, state = opt.update(gradient(p), opt.init(p), p)
    some, _ = params.partition(gradient(p), "q")
    for grads in (some, {**dict.fromkeys(p), **some}):
        updates, new = opt.update(grads, state, p)
        assert list(updates) == list(p)
        assert not updates["head.bias"].any()
        assert updates["head.bias"].shape == p["head.bias"].shape
        assert torch.equal(new.mu["head.bias"], state.mu["head.bias"])
        assert updates["layer.0.q.lora_A"].any()


def test_any_pytree_and_leaves_that_are_no_real_tensors() -> None:
    p = {"net": [torch.ones(2), (torch.ones(3),)], "table": torch.tensor([1, 2]), "depth": 3}
    grads = {"net": [torch.ones(2), (torch.ones(3),)], "table": None, "depth": None}
    opt = optim.adam(lr=0.1)
    updates, state = opt.update(grads, opt.init(p), p)
    assert list(state.mu) == ["net.0", "net.1.0"]
    new = optim.apply_updates(p, updates)
    assert new["depth"] == 3
    assert torch.equal(new["table"], p["table"])
    assert new["net"][1][0].max() < 1
    bare = torch.ones(3)
    updates, _ = opt.update(torch.ones(3), opt.init(bare), bare)
    assert updates.shape == (3,)
    assert opt.update({}, opt.init({}), {})[0] == {}


def test_half_precision_leaves_have_float32_moments() -> None:
    p = {"w": torch.ones(3, dtype=torch.bfloat16)}
    opt = optim.adamw(lr=0.1)
    updates, state = opt.update({"w": torch.ones(3, dtype=torch.bfloat16)}, opt.init(p), p)
    assert state.mu["w"].dtype == torch.float32
    assert updates["w"].dtype == torch.bfloat16


def test_clip_by_norm_is_that_of_torch() -> None:
    members = [start(i) for i in range(3)]
    clipped = optim.clip_by_norm(params.stack(members), torch.tensor([0.5, 2.0, 100.0]), per_member=True)
    for i, (p, most) in enumerate(zip(members, [0.5, 2.0, 100.0], strict=True)):
        leaves = [torch.nn.Parameter(x) for x in p.values()]
        for leaf in leaves:
            leaf.grad = leaf.detach().clone()
        torch.nn.utils.clip_grad_norm_(leaves, most)
        expected = {name: leaf.grad for name, leaf in zip(p, leaves, strict=True)}
        torch.testing.assert_close(params.take(clipped, i), expected)
        torch.testing.assert_close(optim.clip_by_norm(p, most), expected)


ONE: Tensors = {"l.w": torch.ones(4, 2), "l.b": torch.ones(4)}
LIST: Any = [0.1, 0.2]
TEXT: Any = "fast"
RATES = torch.tensor([0.1, 0.2])


@pytest.mark.parametrize(
    ("action", "kind", "words"),
    [
        (lambda: optim.sgd(lr=-1.0), ConfigError, r"lr must be in \[0, inf\); found -1\.0"),
        (lambda: optim.adam(0.1, betas=(0.9, 1.0)), ConfigError, r"beta2 must be in \[0, 1\); found 1\.0"),
        (lambda: optim.adamw(0.1, betas=LIST[:1]), ConfigError, r"betas must be a pair .*; found \[0\.1\]"),
        (lambda: optim.adamw(LIST), ConfigError, r"Write lr=torch\.tensor\(\[0\.1, 0\.2\]\)"),
        (lambda: optim.adamw(TEXT), ConfigError, "lr must be a number, .* found 'fast'"),
        (lambda: optim.adamw(torch.ones(2, 1)), ConfigError, r"found shape \(2, 1\)"),
        (
            lambda: optim.adamw(RATES, weight_decay=torch.ones(3)),
            ConfigError,
            "disagree about the number of members: lr has 2, weight_decay has 3",
        ),
        (lambda: optim.sgd(0.1, nesterov=True), ConfigError, r"momentum=0\.9, nesterov=True"),
        (
            lambda: optim.adamw(RATES).init(ONE),
            StackError,
            r"Leaf 'l\.w' has shape \(4, 2\); a stack of 2 members has \(2, .*fd\.broadcast\(params, 2\)",
        ),
        (
            lambda: optim.adamw(RATES).init(ONE, n=4),
            StackError,
            "n=4, but the hyper-parameters have 2 values",
        ),
        (
            lambda: optim.adamw(RATES).update(ONE, optim.adamw(0.1).init(ONE), ONE),
            StackError,
            r"lr has shape .2,. but the state is that of one member\. Write state = opt\.init\(stack, n=2\)",
        ),
        (
            lambda: optim.adamw(0.1).update(ONE, optim.adamw(0.1).init(tree.map(lambda x: x[:3], ONE), 3), ONE),
            StackError,
            r"Leaf 'l\.w' has shape \(4, 2\), but its moment in the state has \(3, 2\).*as to the params",
        ),
        (
            lambda: optim.sgd(0.1).update({"l.v": ONE["l.b"]}, optim.sgd(0.1).init(ONE), ONE),
            ParamsError,
            r"The gradients have a leaf 'l\.v' that params do not have",
        ),
        (
            lambda: optim.sgd(0.1).update({}, optim.sgd(0.1).init({**ONE, "x.w": ONE["l.b"]}), ONE),
            ParamsError,
            r"The state has moments for a leaf 'x\.w' that params do not have",
        ),
        (
            lambda: optim.sgd(0.1).update(ONE, optim.sgd(0.1).init({"l.w": ONE["l.w"]}), ONE),
            ParamsError,
            r"Leaf 'l\.b' has a gradient but no moments in the state.*Write state = opt\.init\(params\)",
        ),
        (
            lambda: optim.adam(0.1).update({"l.b": torch.ones(3)}, optim.adam(0.1).init(ONE), ONE),
            ParamsError,
            r"The gradient of leaf 'l\.b' has shape \(3,\); the leaf has shape \(4,\)",
        ),
        (
            lambda: optim.adam(0.1).update({"l.b": torch.ones(4, device="meta")}, optim.adam(0.1).init(ONE), ONE),
            ParamsError,
            r"The gradient of leaf 'l\.b' is on meta, but the leaf on cpu",
        ),
        (
            lambda: optim.adam(0.1).update({"l.w": torch.eye(4, 2).to_sparse()}, optim.adam(0.1).init(ONE), ONE),
            ParamsError,
            r"'gradient of l\.w' is torch\.sparse_coo.*to_dense",
        ),
        (
            lambda: optim.adam(0.1).update({"l.b": torch.ones(4) * 1j}, optim.adam(0.1).init(ONE), ONE),
            ParamsError,
            r"The gradient of leaf 'l\.b' is torch\.complex64; the leaf is torch\.float32",
        ),
        (lambda: optim.adam(0.1).init({0: torch.ones(1)}), ParamsError, r"found the key 0 \(int\)"),
        (lambda: optim.adam(0.1).init({"w": torch.eye(2).to_sparse()}), ParamsError, r"Leaf 'w' is torch\.sparse_coo"),
        (
            lambda: optim.adam(0.1).init({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}),
            ParamsError,
            r"Two leaves are called 'a\.b'",
        ),
        (
            lambda: optim.adam(0.1).init({"c": torch.ones(1, dtype=torch.complex64)}),
            ParamsError,
            r"Leaf 'c' is torch\.complex64",
        ),
        (
            lambda: params.take(optim.adam(0.1).init(ONE), 0),
            StackError,
            r"Leaf 'step' has shape \(\).*opt\.init\(stack, n=\.\.\.\)",
        ),
    ],
)
def test_errors_say_where_and_what(action: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        action()
