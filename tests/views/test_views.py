"""Views: a bound delta as an ordinary module of the backbone's class."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, Fails, Tied, assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

import funcdelta as fd


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4)


@pytest.fixture
def delta() -> fd.DeltaModel:
    """A LoRA, a bias and a trained head on an MLP."""
    return fd.DeltaModel(
        MLP().eval(),
        fd.LoraConfig(lora_r=2, modified_modules=["a"], unfrozen_modules=["deltas", "head"]),
        fd.BitFitConfig(modified_modules=["b"]),
    )


def move(view: nn.Module) -> None:
    """One step of every parameter that trains."""
    with torch.no_grad():
        for parameter in view.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def test_a_view_is_of_the_backbones_class(delta: fd.DeltaModel, x: Tensor) -> None:
    params = random_params(delta)
    view = delta.bind(params)
    assert isinstance(view, MLP)
    assert isinstance(view, nn.Module)
    assert type(view).__name__ == "MLP"
    assert_close(view(x), delta.apply(params, x), 1e-6)
    assert torch.equal(delta.bind({})(x), delta.backbone(x))


def test_only_the_deltas_leaves_train(delta: fd.DeltaModel, x: Tensor) -> None:
    view = delta.bind(delta.init(0))
    trains = {name for name, parameter in view.named_parameters() if parameter.requires_grad}
    assert trains == {name for name in delta.names if delta.trainable(name)}
    view(x).square().sum().backward()
    assert {name for name, parameter in view.named_parameters() if parameter.grad is not None} == trains
    assert all(parameter.grad is None for parameter in delta.backbone.parameters())


def test_leaves_are_copies_both_ways(delta: fd.DeltaModel, x: Tensor) -> None:
    params = random_params(delta)
    kept = {name: leaf.clone() for name, leaf in params.items()}
    before = snapshot(delta.backbone)
    view = delta.bind(params)
    taken = fd.unbind(view)
    move(view)
    assert all(torch.equal(params[name], leaf) for name, leaf in kept.items())
    assert all(torch.equal(taken[name], leaf) for name, leaf in kept.items())
    moved = fd.unbind(view)
    assert list(moved) == list(delta.names)
    for name, leaf in moved.items():
        assert not leaf.requires_grad
        assert torch.equal(leaf, kept[name] if name in delta.constants else kept[name] + 0.1)
    assert_close(view(x), delta.apply(moved, x), 1e-6)
    assert_acts(view(x), delta.apply(params, x))
    assert_unchanged(delta.backbone, before)


def test_the_state_dict_holds_the_delta_alone(delta: fd.DeltaModel, x: Tensor) -> None:
    before = snapshot(delta.backbone)
    params, others = random_params(delta), random_params(delta, seed=1)
    view = delta.bind(params)
    assert set(view.state_dict()) == set(delta.names)
    result = view.load_state_dict(others)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_close(view(x), delta.apply(others, x), 1e-6)
    buffer = io.BytesIO()
    torch.save(view.state_dict(), buffer)
    buffer.seek(0)
    view.load_state_dict(delta.init(0))
    view.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(torch.equal(leaf, others[name]) for name, leaf in fd.unbind(view).items())
    assert_unchanged(delta.backbone, before)


def test_a_backbones_state_dict_is_refused_and_writes_nothing(delta: fd.DeltaModel) -> None:
    before = snapshot(delta.backbone)
    view = delta.bind(delta.init(0))
    with raises_saying(fd.errors.ParamsError, "a.lora.lora_A", "a.weight"):
        view.load_state_dict(MLP().state_dict())
    with raises_saying(fd.errors.ParamsError, "a.lora.lora_A", "(9, 4)", "(2, 4)"):
        view.load_state_dict({**delta.init(0), "a.lora.lora_A": torch.zeros(9, 4)})
    view.load_state_dict(MLP().state_dict(), strict=False)
    assert_unchanged(delta.backbone, before)


def test_a_write_to_what_a_view_shares_does_not_reach_the_backbone(delta: fd.DeltaModel) -> None:
    view, before = delta.bind(delta.init(0)), delta.backbone.b.weight.clone()
    with raises_saying(fd.StaleBackboneError, "b.weight", ".clone()"), torch.no_grad():
        view.b.weight.add_(1)
    assert torch.equal(delta.backbone.b.weight, before)


def test_what_is_no_view(delta: fd.DeltaModel) -> None:
    with raises_saying(fd.errors.ParamsError, "MLP", "delta.bind(params)"):
        fd.unbind(delta.backbone)


@pytest.mark.parametrize("what", ["deepcopy", "deepcopy of a copy"])
def test_a_copy_of_a_view_has_leaves_of_its_own(delta: fd.DeltaModel, x: Tensor, what: str) -> None:
    params = random_params(delta)
    view = delta.bind(params)
    twin = copy.deepcopy(view)
    if what != "deepcopy":
        twin = copy.deepcopy(twin)
    assert_close(twin(x), view(x), 1e-6)
    move(twin)
    assert_close(view(x), delta.apply(params, x), 1e-6)
    assert_acts(twin(x), view(x))
    assert_close(twin(x), delta.apply(fd.unbind(twin), x), 1e-6)
    move(view)
    assert_close(twin(x), view(x), 1e-6)


def test_averaged_models(delta: fd.DeltaModel, x: Tensor) -> None:
    view = delta.bind(random_params(delta))
    start = fd.unbind(view)
    averaged = torch.optim.swa_utils.AveragedModel(view)
    averaged.update_parameters(view)
    move(view)
    averaged.update_parameters(view)
    middle = {name: leaf if name in delta.constants else leaf + 0.05 for name, leaf in start.items()}
    assert_close(averaged(x), delta.apply(middle, x), 1e-5)


def test_views_do_not_know_of_each_other(delta: fd.DeltaModel, x: Tensor) -> None:
    one, two = random_params(delta), random_params(delta, seed=1)
    first, second = delta.bind(one), delta.bind(two)
    move(first)
    assert_close(second(x), delta.apply(two, x), 1e-6)
    assert_close(delta.apply(one, x), delta.bind(one)(x), 1e-6)


def test_moving_and_converting_a_view_leaves_the_backbone(delta: fd.DeltaModel, x: Tensor) -> None:
    before = snapshot(delta.backbone)
    params = random_params(delta)
    view = delta.bind(params).double()
    assert view(x.double()).dtype == torch.float64
    assert_close(view(x.double()).float(), delta.apply(params, x), 1e-5)
    assert all(leaf.dtype == torch.float64 for leaf in fd.unbind(view).values())
    view.train()
    view.requires_grad_(False)
    view.zero_grad()
    assert_unchanged(delta.backbone, before)


def test_modes_of_a_view() -> None:
    delta = fd.LoraModel(ZOO["bert"].build(), modified_modules=["query"], lora_dropout=0.5)
    inputs, params = ZOO["bert"].inputs(2), random_params(delta)
    view = delta.bind(params)
    assert not view.training
    assert torch.equal(view(**inputs).logits, view(**inputs).logits)
    view.train()
    assert not torch.equal(view(**inputs).logits, view(**inputs).logits)
    assert not delta.backbone.training
    view.eval()
    assert_close(view(**inputs).logits, delta.apply(params, **inputs).logits, 1e-6)
    assert delta.mode(train=True).bind(params).training


def test_an_error_leaves_the_view_as_it_was(x: Tensor) -> None:
    delta = fd.BitFitModel(Fails().eval(), modified_modules=["a", "b"])
    params = random_params(delta)
    view = delta.bind(params)
    with pytest.raises(ZeroDivisionError):
        view(x, fail=True)
    assert_close(view(x), delta.apply(params, x), 1e-6)


def test_a_trained_tied_tensor_stays_tied() -> None:
    delta = fd.LoraModel(Tied().eval(), modified_modules=["body"], unfrozen_modules=["deltas", "head"])
    params, tokens = random_params(delta), torch.randint(11, (5, 6))
    view = delta.bind(params)
    assert view.embedding.weight is view.head.weight
    view(tokens).square().sum().backward()
    move(view)
    assert_close(view(tokens), delta.apply(fd.unbind(view), tokens), 1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart"])
def test_generating_with_a_view_is_generating_with_the_merged_model(name: str) -> None:
    architecture = ZOO[name]
    model = architecture.build()
    before = snapshot(model)
    delta = fd.LoraModel(model, modified_modules=[architecture.default_target])
    params, tokens = random_params(delta), architecture.inputs(3)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    view = delta.bind(params)
    expected = delta.merged(params).generate(tokens, **options)
    assert torch.equal(view.generate(tokens, **options), expected)
    assert torch.equal(view.generate(tokens, use_cache=False, **options), expected)
    beams = {**options, "num_beams": 2, "max_new_tokens": 4}
    assert torch.equal(view.generate(tokens, **beams), delta.merged(params).generate(tokens, **beams))
    assert not torch.equal(model.generate(tokens, **options), expected)
    assert_unchanged(model, before)


def test_gradient_checkpointing_of_a_view() -> None:
    delta = fd.LoraModel(ZOO["bert"].build(), modified_modules=["query"], unfrozen_modules=["deltas", "classifier"])
    inputs, params = ZOO["bert"].inputs(3), random_params(delta)
    for module in delta.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        view = delta.bind(params)
        if checkpointed:
            for module in view.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = True
                    module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        view.train()
        view(**inputs).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in view.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert_close(gradients[1][name], grad)


def test_save_pretrained_saves_the_delta(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    delta = fd.LoraModel(ZOO["bert"].build(), modified_modules=["query"])
    params = random_params(delta)
    delta.bind(params).save_pretrained(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert set(found) == set(delta.names)
    assert all(torch.equal(leaf, params[name]) for name, leaf in found.items())


def test_hugging_faces_trainer_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    delta = fd.LoraModel(ZOO["bert"].build(), modified_modules=["query"], unfrozen_modules=["deltas", "classifier"])
    before = snapshot(delta.backbone)
    rows = ZOO["bert"].inputs(8)
    data = [{"labels": i % 3, **{key: value[i] for key, value in rows.items()}} for i in range(8)]

    def trained(steps: int, **options: Any) -> dict[str, Tensor]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=0.05,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        view = delta.bind(delta.init(0))
        Trainer(view, arguments, train_dataset=data).train(**options)
        return fd.unbind(view)

    trained(2)
    resumed = trained(4, resume_from_checkpoint=True)
    assert_acts(resumed["classifier.weight"], delta.init(0)["classifier.weight"])
    assert_unchanged(delta.backbone, before)


def test_pickling_a_view_works_or_says_what_to_write(delta: fd.DeltaModel, x: Tensor) -> None:
    view = delta.bind(random_params(delta))
    try:
        again = pickle.loads(pickle.dumps(view))
    except fd.errors.FuncdeltaError as error:
        assert "unbind" in str(error)  # noqa: PT017  (either outcome is right)
        return
    assert_close(again(x), view(x), 1e-6)


def test_a_delta_travels(delta: fd.DeltaModel, x: Tensor) -> None:
    params = random_params(delta)
    for again in (copy.deepcopy(delta), pickle.loads(pickle.dumps(delta)), copy.copy(delta)):
        assert again.names == delta.names
        assert again.configs == delta.configs
        assert_close(again.apply(params, x), delta.apply(params, x), 1e-6)
    training = pickle.loads(pickle.dumps(delta.mode(train=True)))
    assert training.training


@pytest.mark.parametrize("called", [True, False], ids=["called before", "not called before"])
def test_compiled_views(delta: fd.DeltaModel, x: Tensor, called: bool) -> None:
    params = random_params(delta)
    view = delta.bind(params)
    if called:
        view(x)
    torch._dynamo.reset()
    compiled = torch.compile(view, backend="eager")
    assert_close(compiled(x), delta.apply(params, x), 1e-6)
    move(view)
    assert_close(compiled(x), delta.apply(fd.unbind(view), x), 1e-6)


def test_params_of_another_member_in_a_view(delta: fd.DeltaModel, x: Tensor) -> None:
    one, two = random_params(delta), random_params(delta, seed=1)
    assert_close(torch.func.functional_call(delta.bind(one), two, (x,)), delta.apply(two, x), 1e-6)
