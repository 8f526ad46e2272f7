"""Leaves that the sites of one delta share, and those that are computed from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from custom_methods import SharedGainConfig, WrittenConfig
from handmade import MLP, assert_close, hugging_face, raises_saying
from torch import Tensor, nn

import funcdelta as fd


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


def moved(delta: fd.DeltaModel, n: int | None = None) -> dict[str, Tensor]:
    params = delta.init(0, n=n)
    return fd.tree.add(params, fd.tree.randn_like(params, seed=1))


def test_a_shared_leaf_stands_once_and_acts_at_every_site(x: Tensor) -> None:
    model = MLP().eval()
    delta = fd.DeltaModel(model, SharedGainConfig(modified_modules=["a", "b"]))
    assert delta.names == ("test_shared.gain", "a.test_shared.own", "b.test_shared.own")
    params = moved(delta)
    gain, own = params["test_shared.gain"], params["a.test_shared.own"]
    seen: list[Tensor] = []
    model.a.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    expected = seen[0] + own * gain * seen[0].tanh()
    delta.refresh()  # a hook was added
    alone = fd.DeltaModel(nn.Sequential(model.a), SharedGainConfig(modified_modules=["0"]))
    assert_close(alone.apply({"test_shared.gain": gain, "0.test_shared.own": own}, x), expected)
    grads = torch.func.grad(lambda p: delta.apply(p, x).sum())(params)
    assert all(float(grad.abs()) > 0 for grad in grads.values())


def test_a_shared_leaf_depends_on_the_seed_and_the_name_alone() -> None:
    both = fd.DeltaModel(MLP(), SharedGainConfig(modified_modules=["a", "b"]))
    one = fd.DeltaModel(MLP(), SharedGainConfig(modified_modules=["b"]))
    assert torch.equal(both.init(3)["test_shared.gain"], one.init(3)["test_shared.gain"])
    assert torch.equal(both.init(3, n=4)["test_shared.gain"][2], both.init(3, n=9)["test_shared.gain"][2])
    assert not torch.equal(both.init(3)["test_shared.gain"], both.init(4)["test_shared.gain"])


def test_what_is_expanded_acts_as_if_the_sites_owned_it(x: Tensor) -> None:
    model = MLP().eval()
    delta = fd.DeltaModel(model, WrittenConfig(modified_modules=["a", "b"]))
    assert delta.names == ("test_written.code", "test_written.table")
    params = moved(delta)
    gains = params["test_written.table"] @ params["test_written.code"]
    owning = fd.DeltaModel(model, WrittenConfig(modified_modules=["a", "b"], written=False))
    own = {"a.test_written.gain": gains[0], "b.test_written.gain": gains[1]}
    assert_close(delta.apply(params, x), owning.apply(own, x))


@pytest.mark.parametrize("n", [None, 3])
def test_baking_gives_each_site_its_leaves(x: Tensor, n: int | None) -> None:
    delta = fd.DeltaModel(
        MLP().eval(), WrittenConfig(modified_modules=["a", "b"]), fd.LoraConfig(modified_modules=["a"])
    ).mode(train=False)
    params = moved(delta, n)
    baked, found = delta.bake(params)
    assert tuple(found) == baked.names
    assert not any(name.startswith("test_written.") for name in baked.names)
    assert baked.training is False
    if n is None:
        assert_close(baked.apply(found, x), delta.apply(params, x))
    else:
        assert_close(baked.apply_many(found, x), delta.apply_many(params, x))


def test_nothing_to_bake_is_said() -> None:
    delta = fd.LoraModel(MLP(), modified_modules=["a"])
    with raises_saying(fd.errors.ConfigError, "LoraConfig has nothing to bake"):
        delta.bake(delta.init(0))


def test_a_shared_leaf_needs_a_free_name() -> None:
    with raises_saying(fd.errors.MatchError, "already has a module 'b'", "name='b_delta'"):
        fd.DeltaModel(MLP(), SharedGainConfig(modified_modules=["a"], name="b"))


def test_half_of_a_delta_with_shared_leaves_is_refused(x: Tensor) -> None:
    delta = fd.DeltaModel(MLP(), SharedGainConfig(modified_modules=["a", "b"]))
    params = delta.init(0)
    del params["test_shared.gain"]
    with raises_saying(fd.errors.ParamsError, "lacks 1 of the 3 leaves", "test_shared.gain"):
        delta.apply(params, x)


def test_a_view_trains_what_is_shared(x: Tensor) -> None:
    model = MLP().eval()
    before = snapshot(model)
    delta = fd.DeltaModel(model, WrittenConfig(modified_modules=["a", "b"]))
    params = moved(delta)
    view = delta.bind(params)
    assert sorted(view.state_dict()) == sorted(delta.names)
    optimiser = torch.optim.SGD([p for p in view.parameters() if p.requires_grad], lr=0.1)
    expected = params
    for _ in range(3):  # every call has a graph of its own
        loss = view(x).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        grads = torch.func.grad(lambda p: delta.apply(p, x).square().sum())(expected)
        expected = {name: expected[name] - 0.1 * grads[name] for name in expected}
    found = fd.unbind(view)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
    assert_unchanged(model, before)


def test_a_part_of_a_view_called_by_itself_expands_too() -> None:
    lora, batch = hugging_face("bert")
    delta = fd.DeltaModel(lora.backbone, WrittenConfig(modified_modules=["attention.output.dense"]))
    params = moved(delta)
    view: Any = delta.bind(params)
    whole = view(**batch, output_hidden_states=True)
    inner = view.bert(**batch, output_hidden_states=True)
    assert_close(inner.hidden_states[-1], whole.hidden_states[-1])


def test_saved_and_loaded(tmp_path: Any, x: Tensor) -> None:
    model = MLP().eval()
    delta = fd.DeltaModel(model, WrittenConfig(modified_modules=["a", "b"]))
    stack = moved(delta, 3)
    delta.save_finetuned(stack, tmp_path / "run")
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "run", backbone_model=model)
    assert torch.equal(again.apply_many(loaded, x), delta.apply_many(stack, x))
