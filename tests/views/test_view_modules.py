"""Views are modules that people nest, copy, average and send: they hold what they train, and write nothing else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, Tied, assert_acts, assert_close, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

NAMES = ["bert", "gpt2", "llama", "t5", "vit", "conv2d", "mixtral"]


class Parent(nn.Module):
    """A module that holds a view, as a Lightning module or a wrapper of a library does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(()))


def make(name: str) -> tuple[fd.DeltaModel, dict[str, Tensor], Callable[[Any], Tensor]]:
    """A LoRA and a trained head, a member away from its start, and a call of a model."""
    architecture = ZOO[name]
    delta = fd.LoraModel(
        architecture.build(),
        modified_modules=[architecture.default_target],
        unfrozen_modules=["deltas", architecture.head],
    )
    inputs = architecture.inputs(3)
    return delta, random_params(delta), lambda model: architecture.call(model, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_view_holds_what_it_trains_and_nothing_else(name: str) -> None:
    delta, params, call = make(name)
    view = delta.bind(params)
    assert {key for key, _ in view.named_parameters()} == {key for key in delta.names if delta.trainable(key)}
    assert all(parameter.requires_grad for parameter in view.parameters())
    learned = {key for key in delta.backbone.state_dict() if key.endswith(("running_mean", "_var", "batches_tracked"))}
    assert set(view.state_dict()) == {*delta.names, *learned}
    assert set(Parent(view).state_dict()) == {"scale", *(f"net.{key}" for key in (*delta.names, *learned))}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*view.parameters(), *view.buffers())}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in delta.backbone.parameters()}
    assert_close(call(view), call(lambda *a, **k: delta.apply(params, *a, **k)), 1e-6)


def _through_a_parent(view: nn.Module, fresh: nn.Module) -> nn.Module:
    parent = Parent(fresh)
    parent.load_state_dict(Parent(view).state_dict())
    return parent.net


def _assigned_through_a_parent(view: nn.Module, fresh: nn.Module) -> nn.Module:
    parent = Parent(fresh)
    parent.load_state_dict(Parent(copy.deepcopy(view)).state_dict(), assign=True)
    return parent.net


def _saved(view: nn.Module, fresh: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(view, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "deepcopy": lambda view, fresh: copy.deepcopy(view),
    "copy": lambda view, fresh: copy.copy(view),
    "deepcopy of a parent": lambda view, fresh: copy.deepcopy(Parent(view)).net,
    "pickle": lambda view, fresh: pickle.loads(pickle.dumps(view)),
    "torch.save": _saved,
    "a parent's state dict": _through_a_parent,
    "a parent's state dict, assigned": _assigned_through_a_parent,
    "an average": lambda view, fresh: torch.optim.swa_utils.AveragedModel(view).module,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["bert", "t5", "conv2d"])
def test_a_view_travels(name: str, way: str) -> None:
    delta, params, call = make(name)
    before = snapshot(delta.backbone)
    view = delta.bind(params)
    other = WAYS[way](view, delta.bind(delta.init(0)))
    assert isinstance(other, type(delta.backbone))
    assert_close(call(other), call(view), 1e-6)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert_acts(call(other), call(view))
    assert_close(call(view), call(lambda *a, **k: delta.apply(params, *a, **k)), 1e-6)
    assert_close(call(other), call(lambda *a, **k: delta.apply(fd.unbind(other), *a, **k)), 1e-6)
    assert_unchanged(delta.backbone, before)


# -- nothing reaches the backbone --------------------------------------------------------------------------------------


def _soft_updates(view: nn.Module, other: nn.Module) -> None:
    target = copy.deepcopy(view)
    with torch.no_grad():
        for _ in range(20):
            for mine, its in zip(target.parameters(), other.parameters(), strict=True):
                mine.mul_(0.9).add_(its, alpha=0.1)


def _reference_sync(view: nn.Module, other: nn.Module) -> None:
    for mine, its in zip(view.parameters(), other.parameters(), strict=True):
        mine.data.mul_(0.4).add_(its.data, alpha=0.6)


def _weight_decay(view: nn.Module, other: nn.Module) -> None:
    optimiser = torch.optim.SGD(view.parameters(), lr=0.1, weight_decay=0.9)
    for parameter in view.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()


def _parts(view: nn.Module, other: nn.Module) -> None:
    for module in view.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()
        for buffer in module.buffers(recurse=False):
            buffer.data.zero_()


def _flattened(view: nn.Module, other: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(view.parameters())
    nn.utils.vector_to_parameters(torch.zeros_like(vector), view.parameters())


WRITES: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "soft updates of a deep copy": _soft_updates,
    "a reference model's synchronisation": _reference_sync,
    "weight decay": _weight_decay,
    "every module's own parameters": _parts,
    "a vector of parameters": _flattened,
    "half": lambda view, other: view.half(),
    "to_empty": lambda view, other: view.to_empty(device="cpu"),
    "a backbone's state dict": lambda view, other: Parent(view).load_state_dict(
        {f"net.{key}": torch.zeros_like(value) for key, value in type(view)().state_dict().items()}, strict=False
    ),
}


@pytest.mark.parametrize("what", WRITES)
def test_what_people_write_into_a_view_does_not_reach_the_backbone(what: str) -> None:
    delta = fd.LoraModel(MLP().eval(), modified_modules=["a"], unfrozen_modules=["deltas", "head"])
    before = snapshot(delta.backbone)
    WRITES[what](delta.bind(delta.init(0)), delta.bind(random_params(delta)))
    assert_unchanged(delta.backbone, before)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight)


def _add(weight: Tensor) -> None:
    weight += 1


REFUSED: dict[str, Callable[[Any], Any]] = {
    "in place": lambda view: view.b.weight.add_(1),
    ".data": lambda view: view.b.weight.data.zero_(),
    "a slice": lambda view: view.b.weight[0].zero_(),
    "setitem": lambda view: view.b.weight.__setitem__(0, 0.0),
    "+=": lambda view: _add(view.b.weight),
    "out=": lambda view: torch.mul(torch.ones(8, 8), 2.0, out=view.b.weight),
    "another .data": lambda view: setattr(view.b.weight, "data", torch.zeros(8, 8)),
    "foreach": lambda view: torch._foreach_mul_([view.b.weight], 2.0),
    "an initialiser": lambda view: view.apply(_initialise),
    "detached": lambda view: view.b.weight.detach().T.mul_(2.0),
    "to train it": lambda view: view.b.weight.requires_grad_(True),
    "an optimiser": lambda view: _stepped(view.b.weight),
}


def _stepped(weight: Tensor) -> None:
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_the_backbones_own_is_not_written_through_an_attribute(what: str) -> None:
    delta = fd.LoraModel(MLP().eval(), modified_modules=["a"])
    before = snapshot(delta.backbone)
    view = delta.bind(delta.init(0))
    with raises_saying(fd.errors.StaleBackboneError, "weight", "unfrozen_modules", ".clone()"), torch.no_grad():
        REFUSED[what](view)
    assert_unchanged(delta.backbone, before)


def test_what_is_shown_of_the_backbones_tensors_computes_as_they_do() -> None:
    model = MLP().eval()
    view: Any = fd.LoraModel(model, modified_modules=["a"]).bind({})
    shown, own = view.b.weight, model.b.weight
    assert shown is view.b.weight
    assert (shown.shape, shown.dtype, shown.device, shown.requires_grad) == (own.shape, own.dtype, own.device, False)
    x = torch.randn(3, 8)
    assert torch.equal(x @ shown.T, x @ own.T)
    assert torch.equal(shown, own)
    assert torch.equal(copy.deepcopy(shown).zero_(), torch.zeros(8, 8))
    assert not shown.numpy().flags.writeable
    assert torch.equal(torch.vmap(lambda v: shown @ v)(x), torch.vmap(lambda v: own @ v)(x))
    numbers = torch.empty(8, 8)
    numbers.copy_(shown)
    assert torch.equal(numbers, own)
    assert torch.equal(view.b(x), model.b(x))  # a part called by itself


# -- what models ask of themselves -------------------------------------------------------------------------------------


class Asks(MLP):
    """Asks its own parameters while it runs."""

    def forward(self, x: Tensor) -> Tensor:
        first = next(self.parameters())
        self.seen = [name for name, _ in self.named_parameters()]
        size = sum(parameter.square().sum() for parameter in self.parameters())
        return super().forward(x.to(first.dtype)) * size


def test_a_forward_sees_the_parameters_of_the_model() -> None:
    model = Asks().eval()
    delta = fd.LoraModel(model, modified_modules=["a"], unfrozen_modules=["deltas", "head"])
    params, x = random_params(delta), torch.randn(5, 4)
    view, seen = delta.bind(params), []
    view.register_forward_hook(lambda module, args, output: seen.extend(module.seen))
    assert_close(view(x), delta.apply(params, x), 1e-6)
    assert seen == [name for name, _ in model.named_parameters()]
    assert_close(torch.compile(delta.bind(params), backend="eager")(x), delta.apply(params, x), 1e-6)


def test_a_module_that_calls_all_of_its_children_does_not_call_leaves() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return sum(child(x) for child in self.children())  # type: ignore[return-value]

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), Summed()).eval()
    x = torch.randn(5, 4)
    delta = fd.AdapterModel(model, bottleneck_dim=2, modified_modules=["[r]^[01]$"], example=(x,))
    params = random_params(delta)
    view = delta.bind(params)
    assert_close(view(x), delta.apply(params, x), 1e-6)
    assert set(view.state_dict()) == set(delta.names)


def test_transformers_properties_answer_for_the_whole_model() -> None:
    model: Any = ZOO["bert"].build().to(torch.bfloat16)
    delta = fd.LoraModel(model, modified_modules=["query"])
    view: Any = delta.bind(delta.init(0))
    assert (view.dtype, view.device, view.bert.dtype) == (torch.bfloat16, model.device, torch.bfloat16)
    numbers = sum(leaf.numel() for leaf in delta.init(0).values())
    assert view.num_parameters() == model.num_parameters() + numbers
    trained = sum(leaf.numel() for name, leaf in delta.init(0).items() if delta.trainable(name))
    assert view.num_parameters(only_trainable=True) == trained
    assert view.get_input_embeddings().weight.shape == model.get_input_embeddings().weight.shape
    assert delta.bind({}).dtype == torch.bfloat16
    assert view.half().dtype == torch.float16
    assert view.bert.dtype == torch.float16
    assert model.dtype == torch.bfloat16


def test_the_class_of_a_view_builds_a_model_that_is_no_view() -> None:
    model: Any = ZOO["bert"].build()
    view: Any = fd.LoraModel(model, modified_modules=["query"]).bind({})
    for mine, its in ((view, model), (view.bert, model.bert)):
        assert isinstance(mine, type(its))
        made = type(mine)(model.config)
        assert type(made) is type(its)
        assert [name for name, _ in made.named_parameters()] == [name for name, _ in its.named_parameters()]


# -- what a copy has ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["copy", "pickle"])
def test_a_copy_has_what_was_done_to_the_view(again: Callable[[Any], Any]) -> None:
    delta, params, call = make("bert")
    view: Any = delta.bind(params)
    view.train()
    view.bert.encoder.layer[0].eval()
    view.config.problem_type = "chosen"
    view.classifier.bias.requires_grad_(False)
    view.bert.encoder.layer[0].note = {"a": 1}
    view.score = nn.Linear(2, 2)
    other = again(view)
    assert [module.training for module in other.modules()] == [module.training for module in view.modules()]
    assert other.config.problem_type == "chosen"
    assert other.bert.config is other.config is not view.config
    assert not other.classifier.bias.requires_grad
    assert other.classifier.weight.requires_grad
    assert other.bert.encoder.layer[0].note == {"a": 1}
    assert other.bert.encoder.layer[0].note is not view.bert.encoder.layer[0].note
    assert torch.equal(other.score.weight, view.score.weight)
    assert other.score.weight is not view.score.weight
    assert delta.backbone.config.problem_type != "chosen"
    assert_close(call(other.eval()), call(view.eval()), 1e-6)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["copy", "pickle"])
def test_a_converted_view_is_copied_as_it_is(again: Callable[[Any], Any]) -> None:
    delta, params, x = *_head_of_an_mlp(), torch.randn(5, 4)
    view = delta.bind(params).double()
    other = again(view)
    assert torch.equal(other(x.double()), view(x.double()))
    assert other(x.double()).dtype == torch.float64
    if again is copy.deepcopy:  # what is frozen is shared
        assert vars(other.b)["weight"] is vars(view.b)["weight"]


def _head_of_an_mlp() -> tuple[fd.DeltaModel, dict[str, Tensor]]:
    delta = fd.LoraModel(MLP().eval(), modified_modules=["a"], unfrozen_modules=["deltas", "head"])
    return delta, random_params(delta)


def test_a_part_of_a_view_is_copied_as_an_ordinary_module() -> None:
    delta, params = _head_of_an_mlp()
    view: Any = delta.bind(params)
    part = copy.deepcopy(view.b)
    assert type(part) is nn.Linear
    assert torch.equal(part.weight, delta.backbone.b.weight)
    assert part.weight.data_ptr() != delta.backbone.b.weight.data_ptr()
    for acting in (view.a, view.head):
        with raises_saying(fd.errors.ParamsError, "a delta acts", "Copy the whole view"):
            copy.deepcopy(acting)


class Delegates(nn.Module):
    """Hands on whatever it does not have to the model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.model(x)


@pytest.mark.parametrize("kind", ["view", "routed view", "part"])
def test_what_hands_on_to_a_view_is_copied_as_what_it_is(kind: str) -> None:
    delta, params = _head_of_an_mlp()
    routed = delta.bind_rows(fd.broadcast(params, 2), [0, 1, 0])
    view: Any = routed if kind == "routed view" else delta.bind(params)
    outer, x = Delegates(view.b if kind == "part" else view), torch.randn(3, 8 if kind == "part" else 4)
    for way in (copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        other = way(outer)
        assert type(other) is Delegates
        assert other.model is not outer.model or way is copy.copy
        assert_close(other(x), outer(x), 1e-6)
        assert_close(way(outer.model)(x), outer.model(x), 1e-6)


def test_a_delta_on_a_view_is_refused() -> None:
    delta, params = _head_of_an_mlp()
    view = delta.bind(params)
    for model in (view, Parent(view)):
        with raises_saying(fd.errors.ConfigError, "is a view of a delta", "delta.configs", "delta.merged"):
            fd.LoraModel(model, modified_modules=["b"])


# -- tied, listed and read tensors -------------------------------------------------------------------------------------


def test_all_names_of_a_trained_tied_tensor_are_one_through_loads_and_copies() -> None:
    delta = fd.LoraModel(Tied().eval(), modified_modules=["body"], unfrozen_modules=["deltas", "head"])
    params, tokens = random_params(delta), torch.randint(11, (5, 6))
    view = delta.bind(params)
    assert set(view.state_dict()) == set(delta.names)
    for way in WAYS.values():
        other: Any = way(view, delta.bind(delta.init(0)))
        assert other.embedding.weight is other.head.weight
        assert_close(other(tokens), view(tokens), 1e-6)
        assert_close(other.double()(tokens).float(), view(tokens), 1e-5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize("trained", [[], ["lstm"]], ids=["frozen", "trained"])
def test_weights_that_a_module_also_keeps_in_a_list(trained: list[str]) -> None:
    delta = fd.LoraModel(Recurrent().eval(), modified_modules=["head"], unfrozen_modules=["deltas", *trained])
    params, x = random_params(delta), torch.randn(2, 6, 4)
    view: Any = delta.bind(params)
    assert_close(view(x), delta.apply(params, x), 1e-6)
    assert_close(view.lstm(x)[0], delta.merged(params).lstm(x)[0], 1e-6)  # type: ignore[operator, union-attr]
    with torch.no_grad():
        for parameter in view.parameters():
            parameter.add_(0.1)
    assert_close(view(x), delta.apply(fd.unbind(view), x), 1e-6)
    assert_close(copy.deepcopy(view).double()(x.double()).float(), view(x), 1e-5)


class Reads(nn.Module):
    """Reads the tensors of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x), self.out.weight, self.out.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        fd.LoraConfig(modified_modules=["out"]),
        fd.BitFitConfig(modified_modules=["out"]),
        fd.LoraConfig(modified_modules=["first"], unfrozen_modules=["deltas", "out"]),
    ],
    ids=["lora", "bitfit", "trained"],
)
def test_tensors_that_another_module_reads(config: fd.BaseDeltaConfig, dtype: torch.dtype) -> None:
    delta = fd.DeltaModel(Reads().to(dtype).eval(), config)
    params, x = random_params(delta), torch.randn(3, 4).to(dtype)
    view = delta.bind(params)
    assert_close(view(x).float(), delta.apply(params, x).float(), 1e-6)
    assert_acts(view(x).float(), delta.backbone(x).float())


# -- wrappers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/rendezvous")
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel_trains_a_view() -> None:
    delta, params, call = make("bert")
    before = snapshot(delta.backbone)
    view = delta.bind(params)
    wrapped = nn.parallel.DistributedDataParallel(view)
    optimiser = torch.optim.AdamW(wrapped.parameters(), lr=0.1, weight_decay=0.1)
    expected = delta.bind(params)
    other = torch.optim.AdamW(expected.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for model, own in ((wrapped, optimiser), (expected, other)):
            own.zero_grad()
            call(model).square().sum().backward()
            own.step()
    found = fd.unbind(wrapped)
    assert list(found) == list(delta.names)
    for name, leaf in fd.unbind(expected).items():
        assert_close(found[name], leaf, 1e-5)
    assert_acts(call(wrapped), call(lambda *a, **k: delta.apply(params, *a, **k)))
    assert_unchanged(delta.backbone, before)


def test_unbind_looks_into_wrappers() -> None:
    delta, params = _head_of_an_mlp()
    view = delta.bind(params)
    for wrapped in (torch.compile(view, backend="eager"), nn.DataParallel(view), torch.compile(nn.DataParallel(view))):
        assert all(torch.equal(leaf, params[name]) for name, leaf in fd.unbind(wrapped).items())
    with raises_saying(fd.errors.ParamsError, "but got Parent"):
        fd.unbind(Parent(view))


def test_a_load_that_would_load_nothing_raises() -> None:
    delta, params = _head_of_an_mlp()
    view, nothing = delta.bind(params), {"model.a.lora.lora_A": torch.zeros(8, 4)}
    with raises_saying(fd.errors.ParamsError, "This state dict has nothing", "model.a.lora.lora_A", "a.lora.lora_A"):
        view.load_state_dict(nothing, strict=False)
    with pytest.raises(RuntimeError, match="This state dict has nothing"):
        Parent(view).load_state_dict({f"net.{key}": value for key, value in nothing.items()}, strict=False)
    Parent(view).load_state_dict({"scale": torch.zeros(())}, strict=False)  # nothing is meant for the view
    with raises_saying(fd.errors.ParamsError, "Missing: ['a.lora.lora_B'"):
        view.load_state_dict({"a.lora.lora_A": params["a.lora.lora_A"]})
    assert all(torch.equal(leaf, params[name]) for name, leaf in fd.unbind(view).items())


def test_other_tensors_of_the_backbone_among_params_are_bound_too() -> None:
    delta = fd.LoraModel(MLP().eval(), modified_modules=["a"])
    params, x = random_params(delta) | {"b.weight": torch.randn(8, 8)}, torch.randn(5, 4)
    view = delta.bind(params)
    assert_close(view(x), delta.apply(params, x), 1e-6)
    assert torch.equal(fd.unbind(view)["b.weight"], params["b.weight"])
    assert not dict(view.named_parameters())["b.weight"].requires_grad
    assert_close(copy.deepcopy(view)(x), view(x), 1e-6)


def test_functional_call_with_the_backbones_names() -> None:
    delta = fd.LoraModel(MLP().eval(), modified_modules=["a"])
    params, x = random_params(delta), torch.randn(5, 4)
    view, names = delta.bind(params), set(delta.names)
    others = {"a.weight": torch.randn(8, 4), "b.weight": torch.randn(8, 8)}
    expected = delta.apply(params | others, x)
    assert_close(torch.func.functional_call(view, dict(others), (x,)), expected, 1e-6)
    assert set(view.state_dict()) == names
    assert_close(view(x), delta.apply(params, x), 1e-6)
