"""Outputs are read, not guessed: whatever a model returns has leaves and names, and is stacked or refused by name."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from handmade import raises_saying
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

import funcdelta as fd
from funcdelta.run.inputs import Inputs
from funcdelta.run.outputs import check_visible, flatten, names, stack_members

Point = namedtuple("Point", ["left", "right"])


@dataclasses.dataclass
class Plain:
    """What torch's pytree does not know."""

    logits: Tensor
    steps: int = 0


class Registered(OrderedDict):
    """Known to torch's pytree, but without a function for its keys: as diffusers does it."""


def registered(values: Any, context: Any) -> Registered:
    return Registered(zip(context, values, strict=True))


pytree.register_pytree_node(
    Registered,
    lambda value: (list(value.values()), list(value)),
    registered,
    serialized_type_name="funcdelta.tests.Registered",
)


class Kind(enum.Enum):
    """A word that is not a string."""

    SHORT = 1
    LONG = 2


def opaque(**fields: Any) -> Any:
    return types.SimpleNamespace(**fields)


OUTPUTS: dict[str, tuple[Any, list[str]]] = {
    "a tensor": (torch.ones(2), ["of the model"]),
    "nothing": (None, ["of the model"]),
    "a number": (3, ["of the model"]),
    "a word": ("text", ["of the model"]),
    "an array": (np.ones(2), ["of the model"]),
    "an object": (opaque(x=1), ["of the model"]),
    "a cache": ((torch.ones(2), DynamicCache()), ["0", "1"]),
    "a tuple": ((torch.ones(2), (1, None)), ["0", "1.0", "1.1"]),
    "no leaves": ({}, []),
    "a dict": ({"a": torch.ones(2), "b": [np.float32(2), {"c": "d"}]}, ["a", "b.0", "b.1.c"]),
    "keys of any kind": ({1: torch.ones(2), None: 3}, ["1", "None"]),
    "names of fields": (Point(torch.ones(2), 1), ["left", "right"]),
    "a model output": (BaseModelOutput(torch.ones(2), (torch.ones(3),)), ["last_hidden_state", "hidden_states.0"]),
    "registered without keys": (Registered(sample=torch.ones(2), n=1), ["sample", "n"]),
    "the same, nested": ({"out": Registered(sample=[torch.ones(2)])}, ["out.sample.0"]),
    "a dataclass": (Plain(torch.ones(2), 4), ["logits", "steps"]),
    "what a tokenizer returns": (UserDict(ids=torch.ones(2)), ["ids"]),
    "a frozen mapping": (types.MappingProxyType({"x": torch.ones(2)}), ["x"]),
    "a shape": (torch.Size([1, 2]), ["of the model"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_has_leaves_and_names_and_is_rebuilt(name: str) -> None:
    output, expected = OUTPUTS[name]
    leaves, rebuild = flatten(output)
    assert names(output) == expected
    assert len(leaves) == len(expected)
    again = rebuild(leaves)
    assert type(again) is type(output)
    others, other = flatten(again)
    assert other == rebuild
    assert all(leaf is its for leaf, its in zip(leaves, others, strict=True))
    marks = [torch.tensor(i) for i in range(len(leaves))]
    assert all(mark is its for mark, its in zip(marks, flatten(rebuild(marks))[0], strict=True))


def test_a_unet_of_diffusers() -> None:
    """Its output classes have no functions for keys, and its timestep is one number for all rows."""
    diffusers = pytest.importorskip("diffusers", reason="needs the package diffusers")
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        attention_head_dim=2,
    ).eval()
    x, time = torch.randn(3, 2, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(7)
    inputs = Inputs(model, 3, (x, time), {}, {"sample": 0}, 0)
    with torch.no_grad():
        outputs = [model(*inputs.member(i)[0]) for i in range(3)]
        args, kwargs = inputs.folded()
        folded = model(*args, **kwargs)
    assert names(folded) == ["sample"]
    leaves, rebuild = flatten(folded)
    check_visible(leaves, names(folded))
    stacked = stack_members(outputs)
    assert type(stacked) is type(rebuild(leaves)) is type(folded)
    torch.testing.assert_close(stacked.sample, torch.stack([model(x[i], 7).sample.detach() for i in range(3)]))
    torch.testing.assert_close(stacked.sample, folded.sample.unflatten(0, (3, 2)), rtol=1e-5, atol=1e-5)


# -- stacking ------------------------------------------------------------------------------------------------------

JOINED: dict[str, tuple[list[Any], Any]] = {
    "tensors": ([torch.full((2,), i) for i in range(3)], torch.tensor([[0, 0], [1, 1], [2, 2]])),
    "scalars": ([torch.tensor(2.5), torch.tensor(1.5)], torch.tensor([2.5, 1.5])),
    "numbers that differ": ([3, 5, 3], torch.tensor([3, 5, 3])),
    "numbers of two kinds": ([1, 2.5], torch.tensor([1, 2.5], dtype=torch.float64)),
    "precise numbers": ([0.1, 0.2], torch.tensor([0.1, 0.2], dtype=torch.float64)),
    "complex numbers": ([1j, 2.0], torch.tensor([1j, 2.0], dtype=torch.complex128)),
    "answers that differ": ([True, False], torch.tensor([True, False])),
    "numbers that agree": ([3, 3], 3),
    "numbers that are not": ([float("nan"), -float("nan")], float("nan")),
    "words": (["a", "a"], "a"),
    "nothing": ([None, None], None),
    "kinds": ([Kind.SHORT, Kind.SHORT], Kind.SHORT),
    "arrays": ([np.array([1, 2]), np.array([3, 4])], np.array([[1, 2], [3, 4]])),
    "numbers of numpy": ([np.float32(1), np.float32(2)], np.array([1, 2], np.float32)),
    "arrays that agree": ([np.array([1, 2])] * 2, np.array([[1, 2], [1, 2]])),
    "objects that agree": ([opaque(x=1), opaque(x=1)], opaque(x=1)),
    "sparse": ([torch.eye(2).to_sparse() * i for i in (1, 2)], torch.stack([torch.eye(2), 2 * torch.eye(2)])),
}


def same(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor):
        return found.dtype == expected.dtype and torch.equal(found.to_dense(), expected)
    if isinstance(found, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    return type(found) is type(expected) and (found == expected or (found != found and expected != expected))


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", JOINED)
def test_what_members_give_is_stacked(name: str, default: torch.dtype) -> None:
    column, expected = JOINED[name]
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)  # decides nothing
    try:
        found = stack_members([{"out": (leaf, 1)} for leaf in column])
    finally:
        torch.set_default_dtype(before)
    assert same(found["out"][0], expected), found
    assert found["out"][1] == 1
    single = stack_members([column[0]])
    assert same(single, column[0][None]) if hasattr(column[0], "shape") and name != "sparse" else True


REFUSED: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "shapes": ([torch.zeros(2, 3), torch.zeros(2, 4)], ("out.0", "(2, 3) and (2, 4)", "delta.apply")),
    "shapes of arrays": ([np.zeros(2), np.zeros(3)], ("out.0", "(2,) and (3,)")),
    "words": (["a", "b"], ("out.0", "differs by member", "str")),
    "something and nothing": ([torch.zeros(2), None], ("out.0", "Tensor and NoneType")),
    "a number and a tensor": ([1, torch.zeros(2)], ("out.0", "int and Tensor")),
    "a number and nothing": ([1, None], ("out.0", "int and NoneType")),
    "kinds": ([Kind.SHORT, Kind.LONG], ("out.0", "Kind")),
    "objects": ([opaque(x=1), opaque(x=2)], ("out.0", "SimpleNamespace")),
    "objects without an equality": ([object(), object()], ("out.0", "object")),
    "numbers beyond 64 bits": ([10**30, 1], ("out.0",)),
    "lengths": ([(1, 2), (1,)], ("member 1", "another structure", "out.0.0", "out.0.1")),
    "keys": ([{"a": 1}, {"b": 1}], ("member 1", "out.0.b", "out.0.a")),
    "classes": ([[1], (1,)], ("member 1", "another structure")),
    "hidden tensors": ([opaque(x=torch.zeros(2))] * 2, ("out.0", "SimpleNamespace", "dataclass")),
    "distributions": (
        [torch.distributions.Normal(torch.zeros(2), torch.ones(2))] * 2,
        ("out.0", "Normal", "tuple"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stacked_is_refused_by_name(name: str) -> None:
    column, said = REFUSED[name]
    with raises_saying(fd.errors.EngineError, *said):
        stack_members([{"out": (leaf, 1)} for leaf in column])


def test_an_equality_that_fails_is_none() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise ZeroDivisionError

        def __hash__(self) -> int:
            return 0

    one = Odd()
    assert stack_members([one, one]) is one
    with raises_saying(fd.errors.EngineError, "of the model", "Odd"):
        stack_members([Odd(), Odd()])


def test_gradients_go_to_every_member() -> None:
    leaves = [torch.full((2,), float(i), requires_grad=True) for i in range(3)]
    stack_members([{"x": leaf * 2} for leaf in leaves])["x"][1].sum().backward()
    assert leaves[1].grad is not None
    assert leaves[1].grad.tolist() == [2, 2]
    assert leaves[0].grad is None or not leaves[0].grad.any()


def test_outputs_are_stacked_while_compiling() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def call(x: Tensor) -> Any:
        return stack_members([BaseModelOutput(last_hidden_state=x * i, hidden_states=(x, x + i)) for i in range(3)])

    x = torch.arange(2.0)
    found = call(x)
    assert type(found) is BaseModelOutput
    assert torch.equal(found.last_hidden_state, torch.stack([x * 0, x, x * 2]))
    assert torch.equal(found.hidden_states[1], torch.stack([x, x + 1, x + 2]))


# -- caches nobody asked for ---------------------------------------------------------------------------------------


def cache() -> DynamicCache:
    found = DynamicCache()
    found.update(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), 0)
    return found


@pytest.mark.parametrize(
    ("given", "said", "unsaid"),
    [
        ({"use_cache": True}, "leave out use_cache=True", "Write"),
        ({}, "Write use_cache=False", "leave out"),
        ({"use_cache": False}, "despite use_cache=False", "Write use_cache"),
        ({"past_key_values": cache(), "use_cache": False}, "past_key_values=", "despite"),
    ],
    ids=["asked for", "said nothing", "said no", "gave one"],
)
def test_a_cache_is_refused_by_what_was_written(given: dict[str, Any], said: str, unsaid: str) -> None:
    output = {"logits": torch.zeros(2), "past_key_values": cache()}
    with pytest.raises(fd.errors.EngineError) as caught:
        check_visible(flatten(output)[0], names(output), given)
    assert all(piece in str(caught.value) for piece in ("past_key_values", "DynamicCache", said))
    assert unsaid not in str(caught.value)


def test_the_advice_about_caches_is_right() -> None:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        with raises_saying(fd.errors.EngineError, "use_cache=False"):
            stack_members([model(ids), model(ids)])
        assert stack_members([model(ids, use_cache=False)] * 2).logits.shape == (2, 1, 3, 30)
        model.config.use_cache = False
        assert stack_members([model(ids)] * 2).logits.shape == (2, 1, 3, 30)
