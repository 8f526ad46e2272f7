"""The backbone's fingerprint: it sees every byte that matters and nothing else."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
from torch import nn

from funcdelta.errors import CheckpointError
from funcdelta.files.fingerprint import describe, differences, digest, fingerprint, survey

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.classifier = nn.Linear(4, 2)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("absent", None)


def with_tensor(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("tensor", tensor)
    return module


def test_is_what_the_documentation_says():
    module = with_tensor(torch.arange(3, dtype=torch.int16))
    inner = hashlib.sha256(b"\x00\x00\x01\x00\x02\x00").hexdigest()
    expected = hashlib.sha256(f"tensor\0int16\x003\0{inner}\n".encode()).hexdigest()
    assert fingerprint(module) == "fd1:" + expected
    assert describe(module) == {"tensor": [[3], "int16", inner[:8]]}


def test_known_value():
    """A changed fingerprint would refuse every delta saved before: it needs the next prefix, fd2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.fill_(index / 4)
    assert fingerprint(model) == "fd1:bc14f46fd1faf77c74baab46759066aa2eb3b66b9dcfd37bb2c9dca5b275428f"


def test_sees_every_byte():
    model = Model()
    before = fingerprint(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        other = copy.deepcopy(model)
        changed = other.state_dict()[name].view(-1)
        changed[-1:].view(torch.uint8)[-1] ^= 1
        assert fingerprint(other) != before, name
        assert not torch.equal(changed.view(torch.uint8), tensor.detach().view(-1).view(torch.uint8))
    assert fingerprint(model) == before


def test_sees_names_shapes_and_dtypes():
    values = torch.zeros(2, 3)
    prints = {
        fingerprint(with_tensor(values)),
        fingerprint(with_tensor(values.reshape(3, 2))),
        fingerprint(with_tensor(values.reshape(6))),
        fingerprint(with_tensor(values.view(torch.int32))),
        fingerprint(nn.ParameterDict({"other": nn.Parameter(values)})),
    }
    assert len(prints) == 5


def test_does_not_see_what_leaves_the_values_alone():
    model = Model()
    before = fingerprint(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train(False)
    with torch.no_grad():
        model.scratch.fill_(7)
        model.classifier.weight.data = model.classifier.weight.data.t().contiguous().t()
    model.body[0].register_forward_hook(lambda *_: None)
    assert not model.classifier.weight.is_contiguous()
    assert fingerprint(model) == before
    assert fingerprint(copy.deepcopy(model)) == before


def test_order_of_declaration_has_no_part():
    a, b = nn.Linear(2, 2), nn.Linear(3, 3)
    assert fingerprint(nn.ModuleDict({"a": a, "b": b})) == fingerprint(nn.ModuleDict({"b": b, "a": a}))


def test_tied_tensors_count_once_and_are_excluded_under_any_name():
    model = Model()
    assert "embedding.weight" in describe(model)
    assert "head.weight" not in describe(model)
    without = describe(model, exclude=["head.weight"])
    assert "embedding.weight" not in without
    assert without == describe(model, exclude=["embedding.weight"])
    module = nn.Linear(2, 2)
    assert len(describe(nn.ModuleList([module, module]))) == 2


def test_exclude_forgives_a_new_head_and_ignores_other_names():
    model, other = Model(), Model()
    nn.init.normal_(other.classifier.weight)
    assert fingerprint(model) != fingerprint(other)
    names = ["classifier.weight", "classifier.bias", "body.0.lora.lora_A"]
    assert fingerprint(model, names) == fingerprint(other, iter(names))
    assert fingerprint(model, ["body.0.lora.lora_A"]) == fingerprint(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout(dtype):
    content = torch.arange(24, dtype=torch.uint8).reshape(4, 6)
    content = (
        content.to(dtype) if dtype in (torch.bool, torch.complex64, torch.complex128) else content.float().to(dtype)
    )
    once = fingerprint(with_tensor(content))
    wide = torch.empty(4, 12, dtype=torch.uint8).float().to(dtype)
    wide[:, ::2] = content
    assert fingerprint(with_tensor(wide[:, ::2])) == once
    assert fingerprint(with_tensor(content[0].expand(3, 6))) == fingerprint(with_tensor(content[0].repeat(3, 1)))
    assert fingerprint(with_tensor(content[0, 0])) != fingerprint(with_tensor(content[0, :1]))
    assert fingerprint(with_tensor(content[:0])).startswith("fd1:")


def test_lazy_conjugate_and_negative():
    values = torch.randn(3, dtype=torch.complex64)
    assert fingerprint(with_tensor(values.conj())) == fingerprint(with_tensor(values.conj().resolve_conj()))
    assert fingerprint(with_tensor(values.conj())) != fingerprint(with_tensor(values))
    negative = torch._neg_view(values.real.clone())
    assert fingerprint(with_tensor(negative)) == fingerprint(with_tensor(-values.real))


def test_signed_zero_and_nan_bits_count():
    assert fingerprint(with_tensor(torch.tensor([0.0]))) != fingerprint(with_tensor(torch.tensor([-0.0])))
    nan = with_tensor(torch.tensor([float("nan")]))
    assert fingerprint(nan) == fingerprint(copy.deepcopy(nan))


def test_wrapper_subclasses_are_hashed_by_their_parts():
    from torch.testing._internal.two_tensor import TwoTensor

    a, b = torch.zeros(2), torch.ones(2)
    one, other = with_tensor(TwoTensor(a, b)), with_tensor(TwoTensor(a, b + 1))
    assert fingerprint(one) == fingerprint(with_tensor(TwoTensor(a.clone(), b.clone())))
    assert fingerprint(one) != fingerprint(other)
    assert describe(one)["tensor"][1] == "float32:TwoTensor"


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (lambda: torch.empty(2, device="meta"), "is on the meta device and has no values"),
        (lambda: torch.eye(2).to_sparse(), "has the layout torch.sparse_coo, not torch.strided"),
        (lambda: nn.LazyLinear(2).weight, "has no shape yet"),
    ],
)
def test_unreadable_tensors_raise_with_their_name(tensor, reason):
    model = nn.Sequential(nn.Linear(2, 2), with_tensor(tensor()))
    with pytest.raises(CheckpointError, match=rf"the backbone's tensor '1.tensor' {reason}"):
        fingerprint(model)
    assert fingerprint(model, exclude=["1.tensor"]) == fingerprint(nn.ModuleList([model[0]]))


def test_inside_a_transform():
    def inside(values):
        return torch.zeros(()) if fingerprint(with_tensor(values)) else values

    with pytest.raises(CheckpointError, match=r"inside a torch.func transform"):
        torch.vmap(inside)(torch.ones(2, 2))


def test_the_model_is_left_alone():
    model = Model()
    before = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    survey(model)
    assert {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_differences_name_what_differs():
    model = Model()
    saved = describe(model)
    assert differences(saved, describe(Model())) == ""
    with torch.no_grad():
        model.body[0].weight[0, 0] += 1
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(model.body[1], name).add_(1)
    model.classifier = nn.Linear(4, 3, dtype=torch.float64)
    model.extra = nn.Linear(1, 1, bias=False)
    del model.embedding, model.head
    model.body[1].num_batches_tracked = model.body[1].num_batches_tracked.int()
    assert differences(saved, describe(model)).splitlines() == [
        "1 tensor that this backbone lacks: embedding.weight",
        "2 tensors with another shape: "
        + "classifier.bias (saved (2,), found (3,)), classifier.weight (saved (2, 4), found (3, 4))",
        "1 tensor with another dtype: body.1.num_batches_tracked (saved int64, found int32)",
        "5 tensors with other values: body.0.weight, body.1.bias, body.1.running_mean and 2 more",
        "1 tensor that the saved backbone did not have: extra.weight",
    ]


def test_digest_of_params():
    params = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.zeros(0)}
    assert digest(params) == digest(dict(reversed(params.items())))
    assert digest(params) != digest({**params, "b": torch.zeros(2, dtype=torch.bfloat16)})
    assert digest({}) == digest({})
