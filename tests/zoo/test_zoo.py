"""The zoo keeps its word: architectures build alike, run, keep rows apart, and have their flags."""

from __future__ import annotations

import pytest
import torch
import zoo_flags
from zoo import ZOO, Architecture, cast, take_rows, with_flag

ROWS = 3


@pytest.fixture(params=ZOO)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ZOO[request.param]


def test_there_are_at_least_sixteen() -> None:
    assert len(ZOO) >= 16


def test_builds_are_alike(architecture: Architecture) -> None:
    random_state = torch.random.get_rng_state()
    first, second = architecture.build(), architecture.build()
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert first is not second
    assert not any(module.training for module in first.modules())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
        assert tensor.dtype == torch.float32 or name.endswith("num_batches_tracked")


def test_parameters_are_off_their_neutral_values(architecture: Architecture) -> None:
    for name, parameter in architecture.build().named_parameters():
        neutral = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
        assert (parameter - neutral).abs().max() > 0.02, name


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
def test_rows_are_independent(architecture: Architecture, mask: bool) -> None:
    model = architecture.build()
    inputs = architecture.inputs(ROWS, mask=mask)
    together = architecture.call(model, inputs)
    assert together.shape[0] == ROWS
    assert together.isfinite().all()
    assert torch.equal(together, architecture.call(model, inputs))
    for row in range(ROWS):
        alone = architecture.call(model, take_rows(inputs, slice(row, row + 1)))
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
    assert (together[0] - together[1]).abs().mean() > 0.03


def test_inputs_of_a_row_depend_on_seed_and_row_alone(architecture: Architecture) -> None:
    few, many = architecture.inputs(2, seed=4), take_rows(architecture.inputs(5, seed=4), slice(0, 2))
    other = architecture.inputs(2, seed=5)
    for name in few:
        small, large, unlike = (torch.as_tensor(each[name][0]) for each in (few, many, other))
        assert torch.equal(small, large), name
        assert name == "attention_mask" or not torch.equal(small, unlike), name


@pytest.mark.parametrize("name", with_flag("mask"))
def test_the_mask_is_read(name: str) -> None:
    architecture = ZOO[name]
    model = architecture.build()
    masked = architecture.call(model, architecture.inputs(ROWS))
    plain = architecture.call(model, architecture.inputs(ROWS, mask=False))
    torch.testing.assert_close(masked[0], plain[0], atol=1e-5, rtol=1e-5)
    for row in range(1, ROWS):
        assert (masked[row] - plain[row]).abs().max() > 1e-3


def test_targets_are_called(architecture: Architecture) -> None:
    model = architecture.build()
    widths: dict[str, set[int]] = {}

    def record(path: str):
        def hook(module: object, args: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                widths.setdefault(path, set()).add(first.shape[-1])

        return hook

    for path, module in model.named_modules():
        module.register_forward_hook(record(path))
    architecture.call(model, architecture.inputs(ROWS))
    for target in (
        *architecture.linears,
        *architecture.blocks,
        architecture.head,
        architecture.default_target,
    ):
        paths = zoo_flags.matched(model, target)
        assert paths, target
        assert widths.keys() >= set(paths), target
    for path in (path for target in architecture.linears for path in zoo_flags.matched(model, target)):
        assert model.get_parameter(f"{path}.weight").ndim >= 2, path
    for path in (path for target in architecture.blocks for path in zoo_flags.matched(model, target)):
        assert widths[path] == {architecture.hidden}, path
    assert architecture.default_target in architecture.linears
    head = zoo_flags.matched(model, architecture.head)
    assert len(head) == 1
    assert list(model.get_submodule(head[0]).parameters())


def test_the_head_reaches_the_output(architecture: Architecture) -> None:
    model = architecture.build()
    inputs = architecture.inputs(ROWS)
    before = architecture.call(model, inputs)
    head = model.get_submodule(zoo_flags.matched(model, architecture.head)[0])
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1)
    assert (architecture.call(model, inputs) - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in ZOO if name not in with_flag("no_float64")])
def test_float64(name: str) -> None:
    architecture = ZOO[name]
    inputs = architecture.inputs(ROWS)
    single = architecture.call(architecture.build(), inputs)
    double = architecture.call(architecture.double(), cast(inputs, torch.float64))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-4)


def test_flags_are_true(architecture: Architecture) -> None:
    assert zoo_flags.measure(architecture) == architecture.flags - {"no_fullgraph"}


@pytest.mark.slow
def test_fullgraph_flags_are_true(architecture: Architecture) -> None:
    assert zoo_flags.measure_compile(architecture) == architecture.flags & {"no_fullgraph"}


def test_unknown_flags_are_refused() -> None:
    with pytest.raises(KeyError, match="no flag of the zoo"):
        with_flag("fast")
    with pytest.raises(ValueError, match=r"bert: unknown flags \['fast'\]"):
        Architecture(**{**vars(ZOO["bert"]), "flags": frozenset({"fast"})})
