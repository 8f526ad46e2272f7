"""Unlike members in one stack: each acts, trains, saves and merges as it would alone."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_close, assert_moved, weighted_sum
from handmade import MLP, raises_saying
from subjects import UNDER_LAW, WITHOUT_TEXT, config_for, subject, targets, with_fewer_sites
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd
from funcdelta.methods.config import METHODS

Pair = tuple[fd.DeltaModel, dict[str, Tensor]]

# Another member of each method: larger or smaller, with other constants.
UNLIKE: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 3, "lora_alpha": 5, "use_rslora": True},
    "adapter": {"bottleneck_dim": 5},
    "parallel_adapter": {"bottleneck_dim": 5, "scaled": 0.5},
    "low_rank_adapter": {"reduction_factor": 2, "low_rank_rank": 3},
    "compacter": {"reduction_factor": 4, "phm_rank": 2},
    "prefix": {"prefix_token_num": 3, "reparameterize": False},
}
MAKES_LONGER = [method for method in UNDER_LAW if METHODS[method]().gives("prompt")]
MIXED = [method for method in UNDER_LAW if method not in MAKES_LONGER]


def away_from_start(delta: fd.DeltaModel, n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Params whose every trained leaf has been moved."""
    return {
        name: leaf + 0.1 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed + i))
        if delta.trainable(name)
        else leaf
        for i, (name, leaf) in enumerate(delta.init(seed, n=n).items())
    }


@functools.lru_cache(maxsize=32)
def zoo_pairs(name: str, methods: tuple[str, ...] = tuple(MIXED)) -> tuple[Pair, ...]:
    """Two unlike members of every method that can act on the architecture, the second a stack of two."""
    architecture, pairs = ZOO[name], []
    model = subject("lora", name).model
    example = architecture.inputs(2)
    able = [one for one in methods if targets(one, architecture) != () and (one, name) not in WITHOUT_TEXT]
    for i, method in enumerate(able):
        first, second = config_for(method, architecture), config_for(method, architecture, **UNLIKE.get(method, {}))
        for n, config in ((None, first), (2, with_fewer_sites(second))):
            delta = fd.DeltaModel(model, config, example=example.get("args", example))
            pairs.append((delta, away_from_start(delta, n, seed=i)))
    return tuple(pairs)


def members_of(pairs: tuple[Pair, ...] | list[Pair]) -> list[Pair]:
    """One pair a member."""
    singles: list[Pair] = []
    for delta, params in pairs:
        name = next(iter(params))
        is_stack = params[name].ndim > len(delta.shapes[name])
        singles += [(delta, one) for one in (fd.unstack(params) if is_stack else [params])]
    return singles


def assert_same(found: list[Pair], expected: tuple[Pair, ...] | list[Pair], tolerance: float = 0.0) -> None:
    assert len(found) == len(expected)
    for (delta, params), (other, given) in zip(found, expected, strict=True):
        assert delta.configs == other.configs
        assert delta.sites == other.sites
        assert list(params) == list(delta.names) == list(other.names)
        for name, leaf in params.items():
            assert leaf.dtype == given[name].dtype
            torch.testing.assert_close(
                leaf, given[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


def random_where_nothing_is(delta: fd.DeltaModel, stack: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stack with other numbers wherever no member has any, found by packing and taking out again."""
    noise = {name: torch.randn_like(leaf) if delta.trainable(name) else leaf for name, leaf in stack.items()}
    back = fd.pack(
        fd.unpack(
            delta,
            {name: torch.full_like(leaf, torch.nan) if delta.trainable(name) else leaf for name, leaf in stack.items()},
        )
    )[1]
    return {name: torch.where(back[name].isnan(), leaf, noise[name]) for name, leaf in stack.items()}


# --- the laws, all methods side by side ------------------------------------------------------------


FEW = ("lora", "bitfit", "prefix")


@pytest.mark.parametrize(
    ("name", "methods"),
    [*((name, tuple(MIXED)) for name in ("mlp", "bert", "conv2d", "torch_transformer")), ("gpt2", FEW), ("t5", FEW)],
)
def test_every_method_in_one_stack_is_what_each_is_alone(name: str, methods: tuple[str, ...]) -> None:
    architecture, pairs = ZOO[name], zoo_pairs(name, methods)
    delta, stack = fd.pack(pairs)
    assert_same(fd.unpack(delta, stack), pairs)
    inputs, singles = architecture.inputs(3), members_of(pairs)
    assert fd.members(stack) == len(singles)

    def many(given: dict[str, Tensor], engine: str) -> Tensor:
        return architecture.call(functools.partial(delta.apply_many, given, engine=engine), inputs)

    with torch.no_grad():
        alone = [architecture.call(functools.partial(one.apply, params), inputs) for one, params in singles]
        bare = architecture.call(delta.backbone, inputs)
        for out in alone:
            assert_moved(out, bare)
        together = many(stack, "auto")
        for found, expected in zip(together, alone, strict=True):
            assert_close(found, expected)
        assert_close(many(stack, "loop"), together)
        # No optimiser can make matter what is not there.
        assert_close(many(random_where_nothing_is(delta, stack), "auto"), together)
        if "batch_free_target" in architecture.flags:
            return
        last = len(singles) - 1
        index = [last, -1, 0]
        rows = architecture.call(functools.partial(delta.apply_rows, stack, index), inputs)
        for i, member in enumerate(index):
            expected = bare[i] if member < 0 else alone[member][i]
            assert_close(rows[i], expected)


@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_gradients_are_those_of_each_alone_and_none_where_nothing_is(name: str) -> None:
    architecture, pairs = ZOO[name], zoo_pairs(name)
    delta, stack = fd.pack(pairs)
    inputs = architecture.inputs(2)

    def losses(stack: dict[str, Tensor]) -> Tensor:
        outs = architecture.call(functools.partial(delta.apply_many, stack), inputs)
        return torch.stack([weighted_sum(out) for out in outs])

    _, grads = fd.value_and_grad(losses)(stack)
    assert not any(grads[name].any() for name in delta.constants)
    # Taken out, they are the gradients of each; put back, nothing has been lost.
    sources = {name: stack[name] for name in delta.constants}
    back = fd.unpack(delta, grads | sources)
    for (one, found), (other, params) in zip(members_of(back), members_of(pairs), strict=True):
        leaves = {name: leaf.clone().requires_grad_(one.trainable(name)) for name, leaf in params.items()}
        weighted_sum(architecture.call(functools.partial(other.apply, leaves), inputs)).backward()
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                assert_close(found[name], leaf.grad, 1e-4)
    again = fd.pack(back)[1]
    absent = fd.pack(fd.unpack(delta, {n: torch.zeros_like(g) for n, g in grads.items()} | sources))[1]
    for leaf in (name for name in delta.names if delta.trainable(name)):
        assert torch.equal(grads[leaf], again[leaf] - absent[leaf])


ON_MLP = [method for method in MIXED if targets(method, ZOO["mlp"]) != () and (method, "mlp") not in WITHOUT_TEXT]


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations_with_replacement(ON_MLP, 2)])
def test_pairs_of_methods(first: str, second: str) -> None:
    pairs = [*zoo_pairs("mlp", (first,)), *zoo_pairs("mlp", (second,))]
    delta, stack = fd.pack(pairs)
    assert_same(fd.unpack(delta, stack), pairs)
    inputs = ZOO["mlp"].inputs(2)
    with torch.no_grad():
        outs = ZOO["mlp"].call(functools.partial(delta.apply_many, stack, engine="vmap"), inputs)
        for out, (one, params) in zip(outs, members_of(pairs), strict=True):
            assert_close(out, ZOO["mlp"].call(functools.partial(one.apply, params), inputs))


# --- training --------------------------------------------------------------------------------------


def small_and_large() -> tuple[nn.Module, list[Pair]]:
    """Members of unlike ranks, sites, methods and heads on one backbone, the last a stack of two."""
    torch.manual_seed(0)
    backbone = MLP().eval()
    trained = {"unfrozen_modules": ["deltas", "head"]}
    deltas = [
        fd.LoraModel(backbone, lora_r=2, modified_modules=["a"], **trained),
        fd.LoraModel(backbone, lora_r=4, lora_alpha=4, modified_modules=["a", "b"], **trained),
        fd.AdapterModel(backbone, bottleneck_dim=3, non_linearity="sigmoid", modified_modules=["b"], **trained),
        fd.AdapterModel(backbone, bottleneck_dim=5, non_linearity="sigmoid", modified_modules=["b"], **trained),
    ]
    sizes = [None, None, None, 2]
    return backbone, [(d, away_from_start(d, n, seed=i)) for i, (d, n) in enumerate(zip(deltas, sizes, strict=True))]


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adamw": (
        fd.optim.adamw(lr=0.05, weight_decay=0.3),
        functools.partial(torch.optim.AdamW, lr=0.05, weight_decay=0.3),
    ),
    "sgd": (fd.optim.sgd(lr=0.1, momentum=0.9), functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dirty", [False, True], ids=["as packed", "other numbers where nothing is"])
def test_a_packed_member_trains_as_it_does_alone(kind: str, dirty: bool) -> None:
    _, pairs = small_and_large()
    delta, stack = fd.pack(pairs)
    if dirty:
        stack = random_where_nothing_is(delta, stack)
    x, labels = torch.randn(6, 4), torch.randint(3, (6,))
    ours, theirs = OPTIMIZERS[kind]
    state = ours.init(stack)
    step = fd.value_and_grad(
        lambda stack: torch.vmap(F.cross_entropy, in_dims=(0, None))(delta.apply_many(stack, x), labels)
    )
    for _ in range(5):
        _, grads = step(stack)
        updates, state = ours.update(grads, state, stack)
        stack = fd.tree.add(stack, updates)
    trained = members_of(fd.unpack(delta, stack))
    with torch.no_grad():
        outs = delta.apply_many(stack, x)
    for out, (_, found), (alone, params) in zip(outs, trained, members_of(pairs), strict=True):
        leaves = {name: leaf.clone().requires_grad_(alone.trainable(name)) for name, leaf in params.items()}
        optimizer = theirs([leaf for leaf in leaves.values() if leaf.requires_grad])
        for _ in range(5):
            optimizer.zero_grad()
            F.cross_entropy(alone.apply(leaves, x), labels).backward()
            optimizer.step()
        assert_close(out, alone.apply(leaves, x))
        for name in alone.names:
            assert_close(found[name], leaves[name])
            assert alone.trainable(name) == (not torch.equal(found[name], params[name])), name


@fd.register("test_unit_rows")
@dataclass(frozen=True)
class UnitRowsConfig(fd.BaseDeltaConfig):
    """A method that no zeros can be put into: its matrix has rows of length 1, and its gain is divided by."""

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"rows": torch.randn(site.width, site.width, generator=rng), "gain": torch.ones(site.width)}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + y @ (p["rows"] / p["rows"].norm(dim=-1, keepdim=True)) / p["gain"]


def poisoned(delta: fd.DeltaModel, stack: dict[str, Tensor], poison: float) -> dict[str, Tensor]:
    """The stack with ``poison`` wherever no member has any numbers: beyond its sizes, and where it has no delta."""
    full = {k: torch.full_like(leaf, torch.nan) if delta.trainable(k) else leaf for k, leaf in stack.items()}
    back = fd.pack(fd.unpack(delta, full))[1]
    return {
        name: torch.where(back[name].isnan() | (not delta.trainable(name)), leaf, poison)
        for name, leaf in stack.items()
    }


@pytest.mark.parametrize("engine", ["fold", "vmap", "loop"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize(("name", "methods"), [("mlp", tuple(MIXED)), ("bert", FEW)])
def test_whatever_lies_where_nothing_is_stays_there(
    name: str, methods: tuple[str, ...], poison: float, engine: str
) -> None:
    """Outputs, and the gradients of every member's own leaves, of heads and of inputs, are as if it were not there."""
    architecture, pairs = ZOO[name], list(zoo_pairs(name, methods))
    model = pairs[0][0].backbone
    if name == "mlp":
        example, blocks = architecture.inputs(2), targets("adapter", architecture)
        config = UnitRowsConfig(modified_modules=blocks, unfrozen_modules=pairs[0][0].configs[0].unfrozen_modules)
        unit = fd.DeltaModel(model, config, example=example.get("args", example))
        pairs.append((unit, away_from_start(unit)))
    delta, stack = fd.pack(pairs)
    dirty = poisoned(delta, stack, poison)
    changed = {k: ~torch.isclose(dirty[k], stack[k], rtol=0, atol=0) for k in stack}
    assert sum(int(where.any()) for where in changed.values()) > 5

    def run(stack: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {k: leaf.clone().requires_grad_(delta.trainable(k)) for k, leaf in stack.items()}
        outs = architecture.call(functools.partial(delta.apply_many, leaves, engine=engine), architecture.inputs(2))
        outs.square().sum().backward()
        return outs.detach(), {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}

    outs, grads = run(stack)
    found, again = run(dirty)
    assert_close(found, outs)
    assert grads.keys() == again.keys()
    for k, gradient in grads.items():
        assert_close(again[k], gradient)
        assert not again[k][changed[k]].any(), k


def test_padding_has_no_gradient_and_no_effect() -> None:
    _, pairs = small_and_large()
    delta, stack = fd.pack(pairs[:2])
    leaves = {name: leaf.clone().requires_grad_(delta.trainable(name)) for name, leaf in stack.items()}
    delta.apply_many(leaves, torch.randn(6, 4)).square().sum().backward()
    assert stack["a.lora.size.rank"].tolist() == [2, 4]
    assert not leaves["a.lora.lora_A"].grad[0, 2:].any()
    assert not leaves["a.lora.lora_B"].grad[0, :, 2:].any()
    assert leaves["a.lora.lora_A"].grad[0, :2].any(-1).all()
    assert stack["b.lora.present"].tolist() == [0, 1]
    assert not leaves["b.lora.lora_A"].grad[0].any()
    assert {"a.lora.size.rank", "b.lora.present", "lora.source", "a.lora.scale"} <= set(delta.constants)


def test_dropout_is_each_members_own() -> None:
    backbone = MLP()
    rates = [0.0, 0.5, 0.9]
    deltas = [fd.LoraModel(backbone, lora_r=2, lora_dropout=rate, modified_modules=["a"]) for rate in rates]
    params = [away_from_start(one, seed=i) for i, one in enumerate(deltas)]
    delta, stack = fd.pack(list(zip(deltas, params, strict=True)))
    assert stack["lora.lora_dropout"].tolist() == pytest.approx(rates)
    assert_same(fd.unpack(delta, stack), list(zip(deltas, params, strict=True)))
    x = torch.randn(1, 4).expand(20_000, 4)
    delta = delta.mode(train=True)
    with torch.no_grad():
        for engine in ("fold", "vmap"):
            outs = delta.apply_many(stack, x, engine=engine)
            assert torch.allclose(outs[0], deltas[0].apply(params[0], x), atol=1e-6)
            for i in (1, 2):
                alone = deltas[i].mode(train=True).apply(params[i], x)
                # What dropout does to the distribution: mean and spread of 20 000 rows.
                torch.testing.assert_close(outs[i].mean(0), alone.mean(0), atol=0.03, rtol=0.03)
                torch.testing.assert_close(outs[i].std(0), alone.std(0), atol=0.02, rtol=0.1)
                assert outs[i].std(0).min() > 0
        assert torch.equal(
            delta.mode(train=False).apply_many(stack, x)[1, 0], delta.mode(False).apply_many(stack, x)[1, 1]
        )


# --- members, files, merging -----------------------------------------------------------------------


def test_members_of_a_packed_stack_are_taken_joined_and_merged() -> None:
    backbone, pairs = small_and_large()
    delta, stack = fd.pack(pairs)
    singles = members_of(pairs)
    x = torch.randn(3, 4)
    picked = fd.unpack(delta, fd.take(stack, [4, 1, 0]))
    assert [members_of([pair])[0][0].configs for pair in picked] == [singles[i][0].configs for i in (4, 1, 0)]
    assert torch.equal(picked[1][1]["b.lora.lora_A"], singles[1][1]["b.lora.lora_A"])
    assert picked[0][1]["b.adapter.up_proj.bias"].shape == (1, 8)
    again = fd.cat([fd.stack([fd.take(stack, 1)]), stack])
    assert_same(fd.unpack(delta, again)[1:], pairs)
    for i in (0, 1):
        one, (alone, params) = fd.take(stack, i), singles[i]
        assert_close(delta.apply(one, x), alone.apply(params, x))
        merged, expected = delta.merge(one), alone.merge(params)
        assert merged.keys() == expected.keys()
        for name in expected:
            assert_close(merged[name], expected[name])
        assert torch.equal(delta.merge(fd.take(stack, 0))["b.weight"], backbone.b.weight)
    with pytest.raises(fd.errors.MergeError, match="adapter at b cannot be merged"):
        delta.merge(fd.take(stack, 2))
    view = delta.bind(fd.take(stack, 2))
    assert_close(view(x), singles[2][0].apply(singles[2][1], x))
    assert [len(p["b.adapter.up_proj.bias"].shape) for d, p in fd.unpack(delta, fd.stack([fd.unbind(view)]))] == [1]


def test_a_packed_stack_is_saved_and_loaded(tmp_path: Path) -> None:
    backbone, pairs = small_and_large()
    delta, stack = fd.pack(pairs)
    folder = delta.save_finetuned(stack, tmp_path / "run")
    loaded, found = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=backbone)
    assert [
        config.replace(backbone_class=None, backbone_checkpoint_name=None, backbone_hash=None)
        for config in loaded.configs
    ] == list(delta.configs)
    assert loaded.names == delta.names
    assert all(torch.equal(found[name], stack[name]) for name in delta.names)
    assert_same(fd.unpack(loaded, found), pairs)


def test_a_packed_delta_can_be_pickled_and_copied() -> None:
    _, pairs = small_and_large()
    delta, stack = fd.pack(pairs)
    for again in (pickle.loads(pickle.dumps(delta)), copy.deepcopy(delta)):
        assert again.configs == delta.configs
        assert_close(again.apply_many(stack, torch.ones(2, 4)), delta.apply_many(stack, torch.ones(2, 4)))


def test_compiled_without_a_break_or_a_new_graph() -> None:
    _, pairs = small_and_large()
    delta, stack = fd.pack(pairs)
    x = torch.randn(6, 4)
    torch._dynamo.reset()
    one = torch.compile(lambda params, x: delta.apply(params, x), fullgraph=True, backend="eager")
    many = torch.compile(lambda s, x: delta.apply_many(s, x, engine="fold"), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_close(one(fd.take(stack, 0), x), delta.apply(fd.take(stack, 0), x))
        assert_close(many(stack, x), delta.apply_many(stack, x))
        with torch.compiler.set_stance("fail_on_recompile"):
            assert_close(one(fd.take(stack, 2), x), delta.apply(fd.take(stack, 2), x))
            turned = fd.take(stack, [4, 3, 2, 1, 0])
            assert_close(many(turned, x), delta.apply_many(turned, x))


# --- slots -----------------------------------------------------------------------------------------


def test_sizes_share_a_slot_or_have_their_own() -> None:
    backbone = MLP()
    pairs = [
        (d, away_from_start(d)) for d in (fd.LoraModel(backbone, lora_r=r, modified_modules=["a"]) for r in (2, 4, 2))
    ]
    for padding, names, numbers in (("auto", ["lora"], 4 * 4), ("group", ["lora", "lora_1"], (2 + 4) * 4)):
        delta, stack = fd.pack(pairs, padding=padding)
        assert list(delta.plan.names) == names
        assert sum(leaf[0].numel() for name, leaf in stack.items() if name.endswith("lora_A")) == numbers
        assert_same(fd.unpack(delta, stack), pairs)
    with raises_saying(fd.errors.ParamsError, "padding='all'", "auto, pad, group"):
        fd.pack(pairs, padding="all")


def test_half_precision_members_keep_their_dtype() -> None:
    _, pairs = small_and_large()
    half: list[Pair] = [
        (d, {name: leaf.bfloat16() if name.endswith(("lora_A", "lora_B")) else leaf for name, leaf in p.items()})
        for d, p in pairs
    ]
    delta, stack = fd.pack(half)
    assert stack["a.lora.lora_A"].dtype == torch.bfloat16
    assert stack["a.lora.size.rank"].dtype == stack["lora.source"].dtype == torch.float32
    assert_same(fd.unpack(delta, stack), half)
    many = [
        (one, one.init(i))
        for i in range(300)
        for one in [fd.LoraModel(delta.backbone, lora_alpha=i, modified_modules=["a"])]
    ]
    delta, stack = fd.pack(many)
    with raises_saying(fd.errors.ParamsError, "lora.source is torch.bfloat16", "cannot count to 300", "float32"):
        fd.unpack(delta, fd.tree.map(lambda leaf: leaf.bfloat16(), stack))


def test_the_order_in_which_configs_act_is_kept() -> None:
    backbone = MLP()
    lora, adapter = fd.LoraConfig(lora_r=2, modified_modules=["b"]), fd.AdapterConfig(modified_modules=["b"])
    slow = fd.LoraConfig(lora_r=3, modified_modules=["b"], name="slow")
    deltas = [
        fd.DeltaModel(backbone, *configs) for configs in ((lora, adapter), (adapter, lora), (lora, slow), (slow,))
    ]
    pairs = [(one, away_from_start(one, seed=i)) for i, one in enumerate(deltas)]
    delta, stack = fd.pack(pairs)
    assert [config.method.delta_type for config in delta.configs] == ["lora", "adapter", "lora"]
    assert_same(fd.unpack(delta, stack), pairs)
    x = torch.randn(3, 4)
    for out, (one, params) in zip(delta.apply_many(stack, x), pairs, strict=True):
        assert_close(out, one.apply(params, x))


def test_sites_are_meant_exactly() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    pairs = [
        (one, away_from_start(one))
        for one in (
            fd.LoraModel(backbone, modified_modules=["0"], exclude_modules=["1.0"]),
            fd.LoraModel(backbone, modified_modules=["1.1"]),
        )
    ]
    delta, stack = fd.pack(pairs)
    assert delta.sites == ("0", "1.1")
    assert_same(fd.unpack(delta, stack), pairs)


def test_parts_of_fused_projections() -> None:
    model = subject("lora", "gpt2").model
    queries, both = ["attn@.q@"], ["attn@.q@", "attn@.v@"]
    deltas = [
        fd.LoraModel(model, lora_r=r, modified_modules=names) for r, names in ((2, both), (3, both), (2, queries))
    ]
    pairs = [(one, away_from_start(one, seed=i)) for i, one in enumerate(deltas)]
    delta, stack = fd.pack(pairs)
    assert delta.plan.names == ("lora", "lora_1")
    assert_same(fd.unpack(delta, stack), pairs)
    inputs = ZOO["gpt2"].inputs(2)
    with torch.no_grad():
        outs = ZOO["gpt2"].call(functools.partial(delta.apply_many, stack), inputs)
        for out, (one, params) in zip(outs, pairs, strict=True):
            assert_close(out, ZOO["gpt2"].call(functools.partial(one.apply, params), inputs))


def test_soft_prompts_of_one_length_share_a_stack_and_others_do_not() -> None:
    model, inputs = subject("lora", "bert").model, ZOO["bert"].inputs(2)
    deltas = [
        fd.SoftPromptModel(model, soft_token_num=2, strip=True, token_init=False, init_range=0.1 * i) for i in (1, 2)
    ]
    pairs = [(one, away_from_start(one, seed=i)) for i, one in enumerate(deltas)]
    delta, stack = fd.pack(pairs)
    assert_same(fd.unpack(delta, stack), pairs)
    with torch.no_grad():
        outs = ZOO["bert"].call(functools.partial(delta.apply_many, stack), inputs)
        for out, (one, params) in zip(outs, pairs, strict=True):
            assert_close(out, ZOO["bert"].call(functools.partial(one.apply, params), inputs))
    longer = fd.SoftPromptModel(model, soft_token_num=3, strip=True)
    for other in (longer, fd.LoraModel(model)):
        with raises_saying(fd.errors.ParamsError, "soft_prompt_layer makes inputs longer", "separately"):
            fd.pack([*pairs, (other, other.init(0))])


def test_written_prefixes_are_baked_packed_as_they_are() -> None:
    model, inputs = subject("lora", "gpt2").model, ZOO["gpt2"].inputs(2)
    deltas = [fd.PrefixModel(model, prefix_token_num=2, embed_dim=3, mid_dim=4), fd.LoraModel(model, lora_r=2)]
    pairs = [(one, away_from_start(one)) for one in deltas]
    delta, stack = fd.pack(pairs)
    baked, plain = delta.bake(stack)
    # Computed in a stack and alone: the kernels of some processors round these differently.
    assert_same(fd.unpack(baked, plain), [deltas[0].bake(pairs[0][1]), pairs[1]], tolerance=2e-6)
    with torch.no_grad():
        for a, b in zip(
            *(
                ZOO["gpt2"].call(functools.partial(d.apply_many, s), inputs)
                for d, s in ((baked, plain), (delta, stack))
            ),
            strict=True,
        ):
            assert_close(a, b)


# --- what cannot be packed -------------------------------------------------------------------------


def test_refusals_say_what_differs_and_what_to_write() -> None:
    backbone, pairs = small_and_large()
    first, params = pairs[0]
    packed = fd.pack(pairs)

    def refused(*words: str, other: fd.DeltaModel | None = None, given: Any = None) -> None:
        with raises_saying(fd.errors.ParamsError, *words):
            other_delta = other or first
            fd.pack([(first, params), (other_delta, other_delta.init(0) if given is None else given)])

    elsewhere = fd.LoraModel(MLP(), modified_modules=["a"], unfrozen_modules=["deltas", "head"])
    refused("Pair 1 cannot", "its backbone is another object", other=elsewhere)
    refused("pair 0 trains head.", "the same unfrozen_modules", other=fd.LoraModel(backbone, modified_modules=["a"]))
    refused("mode", "delta.mode(train=False)", other=first.mode(train=True))
    refused("packed already", "fd.unpack(delta, stack)", other=packed[0])
    refused("leaves are missing", "head.weight", given={n: p for n, p in params.items() if "head" not in n})
    refused("torch.float32", "torch.float64", "leaf.to(", given=first.init(0, dtype=torch.float64))
    with raises_saying(fd.errors.ParamsError, "fd.pack([(delta_a, params_a)"):
        fd.pack([first])
    with raises_saying(fd.errors.StackError, "fd.stack([params])"):
        fd.unpack(packed[0], fd.take(packed[1], 0))
    with raises_saying(fd.errors.ParamsError, "was not made by fd.pack", "fd.unstack(stack)"):
        fd.unpack(first, fd.stack([params]))
    sizes = [fd.PrefixModel(subject("lora", "gpt2").model, prefix_token_num=p, reparameterize=False) for p in (1, 2)]
    with raises_saying(fd.errors.ParamsError, "prefix", "cannot be padded with zeros", 'padding="auto"'):
        fd.pack([(one, one.init(0)) for one in sizes], padding="pad")
