"""A fingerprint tells a backbone that changed from one that was used, trained, or moved together with its copies."""

from __future__ import annotations

import copy
import pickle
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from handmade import assert_close, raises_saying, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd
from funcdelta.structures.modules.freshness import Fingerprint
from funcdelta.structures.modules.structure import copy_structure, named_tensors


class Alike(nn.Identity):
    """A module that equals all others of its class."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Alike)

    __hash__ = nn.Module.__hash__


class Net(nn.Module):
    """(b, 4) to (b, 3), with a buffer, tied tensors and a layer that has a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.mid = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)
        self.mid.weight = self.inp.weight
        self.handle = self.mid.register_forward_hook(lambda module, args, output: output)
        self.register_buffer("table", torch.ones(4))
        self.blocks[0].gain = nn.Parameter(torch.ones(1))
        self.blocks[0].beside = Alike()
        old = self.blocks[0].forward
        self.blocks[0].forward = lambda x: old(x)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.mid(torch.tanh(self.inp(x)))) * self.table
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def net() -> Any:
    return Net().eval()


def swap_layers(m: Any) -> None:
    m.blocks[1], m.blocks[2] = m.blocks[2], m.blocks[1]


def order_of_layers(m: Any) -> None:
    m.blocks._modules["0"] = m.blocks._modules.pop("0")


def prune(m: Any) -> None:
    m.blocks = m.blocks[:2]


def delete_layer(m: Any) -> None:
    del m.blocks[2]


def replace_layer(m: Any) -> None:
    m.blocks[1][0] = nn.Linear(4, 4)


def replace_head(m: Any) -> None:
    m.head = nn.Linear(4, 3)


def wrap_layer(m: Any) -> None:
    m.head = nn.Sequential(m.head)


def add_child(m: Any) -> None:
    m.blocks[1][1].extra = nn.Identity()


def new_parameter(m: Any) -> None:
    m.blocks[1][0].weight = nn.Parameter(torch.randn(4, 4))


def equal_number(m: Any) -> None:
    m.blocks[0].gain = nn.Parameter(torch.ones(1))


def equal_module(m: Any) -> None:
    m.blocks[0].beside = Alike()


def untie(m: Any) -> None:
    m.mid.weight = nn.Parameter(m.mid.weight.detach().clone())


def remove_bias(m: Any) -> None:
    m.blocks[1][0].bias = None


def assign(m: Any) -> None:
    m.load_state_dict({name: tensor + 0.5 for name, tensor in m.state_dict().items()}, assign=True)


def data(m: Any) -> None:
    m.blocks[1][0].weight.data = torch.randn(4, 4)


def data_of_a_view(m: Any) -> None:
    m.blocks[1][0].weight.data = m.blocks[1][0].weight.data.T


def data_of_fewer_rows(m: Any) -> None:
    m.blocks[1][0].weight.data = m.blocks[1][0].weight.data[:2]


def inner_to(m: Any) -> None:
    m.blocks[1].double().float()


def whole_to(m: Any) -> None:
    m.double()


def half(m: Any) -> None:
    m.head.half()


def buffer_to(m: Any) -> None:
    m.table = m.table.double()


def hook_added(m: Any) -> None:
    m.head.register_forward_hook(lambda module, args, output: 2 * output)


def hook_before_added(m: Any) -> None:
    m.head.register_forward_pre_hook(lambda module, args: args)


def hook_of_gradients_added(m: Any) -> None:
    m.head.register_full_backward_hook(lambda module, entering, leaving: None)


def hook_removed(m: Any) -> None:
    m.handle.remove()


def hook_exchanged(m: Any) -> None:
    m.handle.remove()
    m.mid.register_forward_hook(lambda module, args, output: -output)


def hooks_taken_away_whole(m: Any) -> None:
    m.mid._forward_hooks = type(m.mid._forward_hooks)()


def hook_in_a_new_dict(m: Any) -> None:
    m.head._forward_hooks = type(m.head._forward_hooks)()
    m.head.register_forward_hook(lambda module, args, output: -output)


def forward_patched(m: Any) -> None:
    m.head.forward = lambda x: x


def forward_patched_again(m: Any) -> None:
    m.blocks[0].forward = lambda x: x


def forward_restored(m: Any) -> None:
    del m.blocks[0].forward


def class_changed(m: Any) -> None:
    m.head.__class__ = type("Other", (nn.Linear,), {})


def parametrised(m: Any) -> None:
    nn.utils.parametrizations.weight_norm(m.head)


CHANGES: dict[Callable[[Any], None], tuple[str, ...]] = {
    swap_layers: ("blocks.1", "Sequential"),
    order_of_layers: ("blocks.0 is another Sequential",),
    prune: ("blocks has 2 modules, it had 3",),
    delete_layer: ("blocks.2 is gone",),
    replace_layer: ("blocks.1.0 is another Linear",),
    replace_head: ("head is another Linear",),
    wrap_layer: ("head is another Sequential",),
    add_child: ("blocks.1.1.extra is new",),
    new_parameter: ("blocks.1.0.weight is another tensor",),
    equal_number: ("blocks.0.gain is another tensor",),
    equal_module: ("blocks.0.beside is another Alike",),
    untie: ("mid.weight is another tensor",),
    remove_bias: ("blocks.1.0.bias is gone",),
    assign: ("inp.weight is another tensor", "more changes"),
    data: ("blocks.1.0.weight has other storage",),
    data_of_a_view: ("blocks.1.0.weight has other storage",),
    data_of_fewer_rows: ("blocks.1.0.weight has other storage (it was (4, 4)", "is (2, 4)"),
    inner_to: ("blocks.1.0.weight has other storage",),
    whole_to: ("inp.weight has other storage (it was (4, 4) float32 on cpu, is (4, 4) float64 on cpu)",),
    half: ("head.weight has other storage", "float16"),
    buffer_to: ("table is another tensor", "float64"),
    hook_added: ("a forward hook was added to head",),
    hook_before_added: ("a forward pre-hook was added to head",),
    hook_of_gradients_added: ("a backward hook was added to head",),
    hook_removed: ("a forward hook was removed from mid",),
    hook_exchanged: ("a forward hook was removed from mid", "a forward hook was added to mid"),
    hooks_taken_away_whole: ("a forward hook was removed from mid",),
    hook_in_a_new_dict: ("a forward hook was added to head",),
    forward_patched: ("head.forward was patched on the instance",),
    forward_patched_again: ("blocks.0.forward was patched on the instance",),
    forward_restored: ("blocks.0.forward was patched on the instance",),
    class_changed: ("head became a Other",),
    parametrised: ("head",),
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("with_aliases", [False, True], ids=["alone", "with a copy"])
def test_every_change_is_seen_and_named(change: Callable[[Any], None], with_aliases: bool) -> None:
    m = net()
    aliases = dict(copy_structure(m).named_parameters()) if with_aliases else None
    fingerprint = Fingerprint(m, aliases)
    assert fingerprint.check() is False
    change(m)
    for _ in range(2):
        with raises_saying(fd.errors.StaleBackboneError, *CHANGES[change], "delta.refresh()"):
            fingerprint.check()
    assert Fingerprint(m).check() is False


def test_a_forward_that_is_replaced_in_its_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = Fingerprint(net())
    monkeypatch.setattr(nn.Tanh, "forward", lambda self, x: x)
    with raises_saying(fd.errors.StaleBackboneError, "Tanh.forward"):
        fingerprint.check()


def train(m: Any) -> None:
    m.train()
    optimiser = torch.optim.SGD(m.parameters(), lr=0.1)
    m(torch.randn(5, 4)).square().sum().backward()
    optimiser.step()


def load(m: Any) -> None:
    m.load_state_dict({name: tensor + 1 for name, tensor in m.state_dict().items()})


def write(m: Any) -> None:
    with torch.no_grad():
        m.head.weight.add_(1.0)
    m.head.weight.data.mul_(2.0)
    m.table.add_(1.0)


def remember(m: Any) -> None:
    m.head.seen = torch.ones(3)
    m.seen = [1, 2]


def freeze(m: Any) -> None:
    m.requires_grad_(False)
    m.train()


def same_device(m: Any) -> None:
    m.to("cpu")
    m.float()


def share(m: Any) -> None:
    m.share_memory()


def nothing_new(m: Any) -> None:
    handle = m.head.register_forward_hook(lambda module, args, output: output)
    handle.remove()
    m.head = m.head
    m.head.weight = m.head.weight


HARMLESS = [train, load, write, remember, freeze, same_device, share, nothing_new]


@pytest.mark.parametrize("use", HARMLESS, ids=lambda use: use.__name__)
@pytest.mark.parametrize("with_aliases", [False, True], ids=["alone", "with a copy"])
def test_what_copies_see_or_need_not_see_is_no_change(use: Callable[[Any], None], with_aliases: bool) -> None:
    m = net()
    copied = copy_structure(m)
    fingerprint = Fingerprint(m, dict(copied.named_parameters()) if with_aliases else None)
    use(m)
    fingerprint.check()
    assert fingerprint.check() is False
    for (name, own), (_, alias) in zip(m.named_parameters(), copied.named_parameters(), strict=True):
        assert own.data_ptr() == alias.data_ptr(), name


def test_a_changed_value_beside_shared_memory_is_still_a_change() -> None:
    m = net()
    fingerprint = Fingerprint(m)
    m.share_memory()
    m.head.weight.data = torch.randn(3, 4)
    with raises_saying(fd.errors.StaleBackboneError, "head.weight has other storage"):
        fingerprint.check()


class Plain(nn.Module):
    """A forward that reads attributes of every kind, and writes some of them."""

    kind = "sum"
    cache: dict[str, int] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1)
        self.scale, self.act, self.twice, self.note = 1.0, torch.tanh, False, "read by nobody"
        self.config = types.SimpleNamespace(k=1.0, dtype=None, widths=[4, 4], architectures=None)
        self.table, self.tables, self.calls = torch.ones(4), [torch.ones(4)], 0
        self.register_buffer("mask", torch.ones(4))

    def shifted(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        if not getattr(self, "hooked", False):
            self.hooked = True

            def looks_on(module: Any, args: Any, output: Any) -> None: ...

            self.a.register_forward_hook(looks_on)
        x = self.shifted(self.act(self.drop(self.norm(self.a(x)))).to(x.dtype))
        x = x * self.scale * self.config.k * self.mask * self.table * self.tables[0]
        return 2 * x if self.twice or self.kind == "double" else x[:, : self.config.widths[0]]


def an_attribute(m: Any) -> None:
    m.twice = True


def a_function(m: Any) -> None:
    m.act = torch.relu


def one_before_its_classs(m: Any) -> None:
    m.kind = "double"


def a_method(m: Any) -> None:
    m.shifted = lambda x: x + 1


def a_config(m: Any) -> None:
    m.config.k = 2.0


def a_list_in_a_config(m: Any) -> None:
    m.config.widths[0] = 3


def another_config(m: Any) -> None:
    m.config = types.SimpleNamespace(k=2.0, widths=[4, 4])


ATTRIBUTES: dict[Callable[[Any], None], str] = {
    an_attribute: "twice was False, is True",
    a_function: "act was tanh, is relu",
    one_before_its_classs: "kind is 'double', and was its class's",
    a_method: "shifted is",
    another_config: "config was another SimpleNamespace, is another SimpleNamespace",
}


@pytest.mark.parametrize("change", ATTRIBUTES, ids=lambda change: change.__name__)
def test_attributes_that_forwards_read_are_seen(change: Callable[[Any], None]) -> None:
    m, x = Plain().eval(), torch.randn(2, 4)
    delta = fd.LoraModel(m, modified_modules=["a"])
    delta.apply(delta.init(0), x)
    change(m)
    for _ in range(2):
        with raises_saying(fd.errors.StaleBackboneError, ATTRIBUTES[change], "delta.refresh()"):
            delta.apply(delta.init(0), x)
    assert torch.equal(delta.refresh().apply(delta.init(0), x), m(x))


def a_factor(m: Any) -> None:
    m.scale = 2.0


def an_epsilon(m: Any) -> None:
    m.norm.eps = 9.0


def another_table(m: Any) -> None:
    m.table = torch.zeros(4)


def another_table_in_a_list(m: Any) -> None:
    m.tables[0] = torch.zeros(4)


def a_table_in_a_list(m: Any) -> None:
    m.tables[0].zero_()


def data_of_a_buffer(m: Any) -> None:
    m.mask.data.copy_(torch.zeros(4))


def an_average_of_data(m: Any) -> None:
    m.norm.running_mean.data.lerp_(torch.ones(4), 0.5)


def a_buffer_by_numpy(m: Any) -> None:
    m.mask.numpy().fill(3)


FOLLOWED = [
    a_config,
    a_list_in_a_config,
    a_factor,
    an_epsilon,
    another_table,
    another_table_in_a_list,
    a_table_in_a_list,
]
FOLLOWED += [data_of_a_buffer, an_average_of_data, a_buffer_by_numpy]


@pytest.mark.parametrize("change", FOLLOWED, ids=lambda change: change.__name__)
def test_numbers_are_followed(change: Callable[[Any], None]) -> None:
    m, x = Plain().eval(), torch.randn(2, 4)
    delta = fd.LoraModel(m, modified_modules=["a"])
    params = delta.init(0)
    before = delta.apply(params, x)
    change(m)
    after = delta.apply(params, x)
    assert torch.equal(after, m(x))
    assert not torch.equal(before, after)
    # In a batch of another size a processor may round otherwise.
    torch.testing.assert_close(delta.apply_many(delta.init(0, n=2), x)[1], m(x))


def nothing_read(m: Any) -> None:
    m.note = "another"
    m.config.architectures, m.config.dtype = ["Plain"], "float32"
    m.found = {"anything": 1}


def a_call(m: Any) -> None:
    m(torch.ones(2, 4))


def its_mode(m: Any) -> None:
    m.train()


@pytest.mark.parametrize("change", [nothing_read, a_call, its_mode], ids=lambda change: change.__name__)
def test_what_no_forward_reads_or_what_forwards_write_is_no_change(change: Callable[[Any], None]) -> None:
    m, x = Plain().eval(), torch.randn(2, 4)
    delta = fd.LoraModel(m, modified_modules=["a"])
    before = delta.apply(delta.init(0), x)
    change(m)
    assert torch.equal(delta.apply(delta.init(0), x), before)


def test_checkpointing_that_is_turned_on_in_one_layer_is_followed() -> None:
    m = ZOO["bert"].build()
    fingerprint = Fingerprint(m)
    layers = [module for module in m.modules() if hasattr(module, "gradient_checkpointing")]
    layers[-1].gradient_checkpointing = True
    fingerprint.check()
    assert fingerprint.check() is False


def test_buffers_that_a_forward_replaces_are_to_be_looked_up_again() -> None:
    m = net()
    fingerprint = Fingerprint(m)
    m.table = torch.zeros(4)
    assert fingerprint.check() is True
    assert fingerprint.check() is False
    m.table.data = torch.ones(4)
    assert fingerprint.check() is True
    m.table = torch.zeros(5)
    with raises_saying(fd.errors.StaleBackboneError, "table is another tensor", "(5,)"):
        fingerprint.check()


def test_a_copy_is_of_the_copied_backbone() -> None:
    m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fingerprint = Fingerprint(m)
    for other in (copy.deepcopy(fingerprint), pickle.loads(pickle.dumps(fingerprint))):
        assert other.backbone is not m
        assert other.check() is False
        other.backbone[1] = nn.Linear(2, 2)
        with raises_saying(fd.errors.StaleBackboneError, "1 is another Linear"):
            other.check()
    assert fingerprint.check() is False


def test_tensors_without_storage_are_compared_by_kind() -> None:
    with torch.device("meta"):
        m = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fingerprint = Fingerprint(m)
    assert fingerprint.check() is False
    m[1].half()
    with raises_saying(fd.errors.StaleBackboneError, "1.weight", "float16 on meta"):
        fingerprint.check()


@pytest.mark.parametrize("name", ZOO)
def test_calls_and_gradients_of_a_backbone_are_no_change(name: str) -> None:
    architecture = ZOO[name]
    m = architecture.build()
    fingerprint = Fingerprint(m)
    architecture.call(m, architecture.inputs(2)).sum().backward()
    fingerprint.check()
    assert fingerprint.check() is False
    assert len(named_tensors(m)) > 0


def test_a_check_is_a_fraction_of_a_call() -> None:
    architecture = ZOO["bert"]
    m, inputs = architecture.build(), architecture.inputs(2)
    fingerprint = Fingerprint(m)

    def least(function: Callable[[], Any]) -> float:
        times = []
        for _ in range(30):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        assert least(fingerprint.check) < 0.1 * least(lambda: architecture.call(m, inputs))


class Tables(nn.Module):
    """Makes its table anew where it is too short, in a precision of its own, and keeps the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > self.table.shape[0]:
            self.register_buffer("before", self.table, persistent=False)
            self.register_buffer("table", torch.arange(1.0, 1.0 + x.shape[1]), persistent=False)
        return self.a(x) * self.table[: x.shape[1], None].to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tables_that_the_backbone_made_anew_are_followed(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    m = Tables().to(dtype)
    delta = fd.LoraModel(m, modified_modules=["a"])
    params, stack = random_params(delta), random_params(delta, 2)
    short, long = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)
    for x in (short, long, short, long):
        with torch.no_grad():
            expected = copy.deepcopy(delta.merged(params))(x)
            assert_close(delta.apply(params, x), expected, 1e-2 if dtype == torch.bfloat16 else 1e-5)
            many = delta.apply_many(stack, x)
            assert_close(delta.apply_rows(stack, [1, 0], x), torch.stack([many[1, 0], many[0, 1]]))
            m(x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_frequencies_that_grow_with_the_text(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    m = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=8, rope_parameters=rope, **sizes)).to(dtype)
    delta = fd.LoraModel(m.eval(), modified_modules=["q_proj"])
    params = random_params(delta)
    view, merged = delta.bind(params), delta.merged(params)
    for length in (6, 12, 6, 16, 4):
        tokens = torch.randint(32, (2, length))
        with torch.no_grad():
            expected = copy.deepcopy(merged)(tokens).logits
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
            assert_close(delta.apply(params, tokens).logits, expected, tolerance)
            assert_close(view(tokens).logits, expected, tolerance)
            m(tokens)
