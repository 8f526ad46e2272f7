"""Arithmetic of what deltas do, against dense matrices that are added, cut and compared one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from handmade import MLP, Tied, Twice, assert_close, low_rank, raises_saying, random_params, transposed
from torch import Tensor, nn

import funcdelta as fd

N = 3
Params = dict[str, Tensor]

LAYERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "linear": (lambda: nn.Linear(4, 6), 2),
    "transposed": (lambda: transposed(4, 6), 2),
    "embedding": (lambda: nn.Embedding(11, 4), 2),
    "conv2d": (lambda: nn.Conv2d(3, 6, (3, 2)), 2),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2),
    "rank above width": (lambda: nn.Linear(3, 2), 4),
}


@pytest.fixture
def mlp() -> nn.Module:
    return MLP().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64)


def lora(model: nn.Module, r: int, *names: str, **fields: Any) -> fd.DeltaModel:
    return fd.LoraModel(model, lora_r=r, modified_modules=list(names), **fields)


def change(delta: fd.DeltaModel, params: Params) -> Params:
    """Merged minus the backbone's own, by hand."""
    own = delta.backbone.state_dict()
    merged = delta.merge(params)
    return {name: merged[name] - own[name] for name in merged if not torch.equal(merged[name], own[name])}


def assert_same(found: Params, expected: Params) -> None:
    assert expected
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float(tensor.abs().max()) > 1e-3
        assert_close(found[name], tensor)


# -- materialise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_materialised_is_merged_minus_the_backbones_own(layer: str) -> None:
    make, r = LAYERS[layer]
    delta = lora(nn.Sequential(make()).double(), r, "0")
    params = random_params(delta)
    assert_same(fd.algebra.materialise(delta, params), change(delta, params))


def test_methods_without_factors_and_trained_leaves_are_materialised(mlp: nn.Module) -> None:
    delta = fd.DeltaModel(
        mlp,
        fd.LoraConfig(lora_r=2, modified_modules=["a"], unfrozen_modules=["deltas", "a", "head"]),
        fd.BitFitConfig(modified_modules=["b", "head"]),
    )
    params = random_params(delta)
    found = fd.algebra.materialise(delta, params)
    assert_same(found, change(delta, params))
    trained = params["a.weight"] - mlp.get_parameter("a.weight")
    assert torch.equal(found["a.weight"], trained + low_rank(params, "a.lora"))
    stack = random_params(delta, N)
    for i, expected in enumerate(change(delta, fd.take(stack, i)) for i in range(N)):
        assert_same({name: tensor[i] for name, tensor in fd.algebra.materialise(delta, stack).items()}, expected)


def test_half_precision_does_not_round_what_is_materialised() -> None:
    delta = lora(MLP().bfloat16(), 2, "a")
    params = random_params(delta)
    assert torch.equal(fd.algebra.materialise(delta, params)["a.weight"], low_rank(params, "a.lora"))


def test_every_name_of_a_tensor_is_materialised() -> None:
    delta = lora(Twice().double(), 2, "first")
    params = random_params(delta)
    found = fd.algebra.materialise(delta, params)
    assert found.keys() == {"first.weight", "second.weight"}
    assert torch.equal(found["second.weight"], low_rank(params, "first.lora"))
    again = fd.algebra.from_dense(delta, found)
    assert_same(fd.algebra.materialise(*again), found)


# -- sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_a_sum_is_the_sum_of_dense_changes(layer: str) -> None:
    make, r = LAYERS[layer]
    model = nn.Sequential(make()).double()
    pairs = [(lora(model, k, "0", lora_alpha=5), k) for k in (r, r + 1)]
    pairs = [(delta, random_params(delta, seed=k)) for delta, k in pairs]
    weights = [0.7, torch.tensor(-2.0)]
    total, params = fd.algebra.sum_exact(pairs, weights)
    assert total.configs[0].lora_r == 2 * r + 1
    dense = [change(*pair)["0.weight"] for pair in pairs]
    assert_same(change(total, params), {"0.weight": 0.7 * dense[0] - 2 * dense[1]})


def test_a_sum_over_unlike_sites_and_configs(mlp: nn.Module, x: Tensor) -> None:
    one = fd.DeltaModel(
        mlp, fd.LoraConfig(lora_r=2, modified_modules=["a"]), fd.LoraConfig(lora_r=1, modified_modules=["a", "b"])
    )
    two = lora(mlp, 3, "b", "head", use_rslora=True, unfrozen_modules=["deltas", "head.bias"])
    pairs = [(one, random_params(one)), (two, random_params(two, seed=1))]
    before = [{name: leaf.clone() for name, leaf in params.items()} for _, params in pairs]
    total, params = fd.algebra.add(*pairs)
    expected = change(*pairs[0])
    for name, tensor in change(*pairs[1]).items():
        expected[name] = expected[name] + tensor if name in expected else tensor
    assert set(expected) == {"a.weight", "b.weight", "head.weight", "head.bias"}
    assert_same(change(total, params), expected)
    state = {name: tensor + expected.get(name, 0) for name, tensor in mlp.state_dict().items()}
    assert_close(total.apply(params, x), torch.func.functional_call(mlp, state, (x,)))
    assert not set(total.init(0)) ^ set(params)
    for (_, given), was in zip(pairs, before, strict=True):
        assert all(torch.equal(given[name], leaf) for name, leaf in was.items())


def test_members_are_added_up_and_stacks_member_by_member(mlp: nn.Module, x: Tensor) -> None:
    delta = lora(mlp, 2, "a", "b", unfrozen_modules=["deltas", "head"])
    stack, other = random_params(delta, N), random_params(delta, N, seed=9)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    dense, others = fd.algebra.materialise(delta, stack), fd.algebra.materialise(delta, other)
    summed = fd.algebra.sum_exact((delta, stack), weights)
    assert fd.algebra.sum_exact((delta, stack))[0].configs[0].lora_r == 2 * N
    assert_same(change(*summed), {name: sum(weights[i] * d[i] for i in range(N)) for name, d in dense.items()})
    total, params = fd.algebra.sum_exact([(delta, stack), (delta, other)], [weights, 3.0])
    for i in range(N):
        expected = {name: weights[i] * dense[name][i] + 3 * others[name][i] for name in dense}
        assert_same(change(total, fd.take(params, i)), expected)
    assert_close(total.apply_many(params, x)[1], total.apply(fd.take(params, 1), x))
    half, scaled = fd.algebra.scale(delta, stack, weights)
    for i in range(N):
        assert_same(change(half, fd.take(scaled, i)), {name: weights[i] * d[i] for name, d in dense.items()})


def test_leaves_averaged_are_not_changes_averaged(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a")
    stack = random_params(delta, N)
    expected = fd.algebra.materialise(delta, stack)["a.weight"].mean(0)
    assert_close(fd.algebra.materialise(*fd.algebra.sum_exact((delta, stack), [1 / N] * N))["a.weight"], expected)
    assert float((fd.algebra.materialise(delta, fd.tree.mean(stack))["a.weight"] - expected).abs().max()) > 1e-2


def test_a_delta_of_its_rank_and_scale_is_given_back(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a", lora_alpha=2).mode(train=True)
    assert fd.algebra.scale(delta, random_params(delta), 2.0)[0] is delta
    other = lora(mlp, 2, "a", lora_alpha=7, lora_dropout=0.5).mode(train=True)
    scaled, params = fd.algebra.scale(other, random_params(other), 2.0)
    assert scaled.training
    assert scaled.configs[0].to_dict()["lora_dropout"] == 0.5
    assert scaled.sites == other.sites
    assert all(torch.equal(scaled.init(0)[name], leaf) for name, leaf in params.items() if name.endswith("scale"))


# -- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncated_is_the_dense_decomposition_cut(layer: str, rank: int) -> None:
    make, r = LAYERS[layer]
    delta = lora(nn.Sequential(make()).double(), r + 1, "0")
    stack = random_params(delta, N)
    small, params = fd.algebra.truncate(delta, stack, rank)
    assert small.configs[0].lora_r == rank
    for i in range(N):
        dense = change(delta, fd.take(stack, i))["0.weight"]
        u, s, vh = torch.linalg.svd(dense.flatten(1), full_matrices=False)
        cut = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(dense.shape)
        assert_same(change(small, fd.take(params, i)), {"0.weight": cut})
        alone = fd.algebra.truncate(delta, fd.take(stack, i), rank)[1]
        for name in params:
            assert_close(params[name][i], alone[name])


def test_a_sum_truncated_to_its_rank_is_itself(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a")
    params = random_params(delta)
    twice = fd.algebra.add((delta, params), (delta, params))
    assert_same(change(*fd.algebra.truncate(*twice, rank=2)), {"a.weight": 2 * change(delta, params)["a.weight"]})


@pytest.mark.parametrize("n", [None, N])
def test_the_canonical_form_is_balanced_and_the_same_in_every_gauge(mlp: nn.Module, n: int | None) -> None:
    delta = lora(mlp, 3, "a", "b")
    params = random_params(delta, n)
    rng = torch.Generator().manual_seed(3)
    other = dict(params)
    for path in ("a", "b"):
        g = torch.randn(3, 3, generator=rng, dtype=torch.float64)
        other[f"{path}.lora.lora_B"] = params[f"{path}.lora.lora_B"] @ g
        other[f"{path}.lora.lora_A"] = torch.linalg.inv(g) @ params[f"{path}.lora.lora_A"]
    here, found = fd.algebra.canonical(delta, params)
    _, again = fd.algebra.canonical(delta, other)
    assert float((other["a.lora.lora_A"] - params["a.lora.lora_A"]).abs().max()) > 1e-2
    for name, leaf in found.items():
        assert_close(again[name], leaf)
    dense = fd.algebra.materialise(delta, params)
    assert_same(fd.algebra.materialise(here, found), dense)
    for path in ("a", "b"):
        sigma = torch.diag_embed(torch.linalg.svdvals(dense[f"{path}.weight"])[..., :3])
        a, b = found[f"{path}.lora.lora_A"], found[f"{path}.lora.lora_B"]
        assert_close(a @ a.mT, sigma)
        assert_close(b.mT @ b, sigma)
        assert bool((b.gather(-2, b.abs().argmax(-2, keepdim=True)) > 0).all())
    assert_close(fd.algebra.canonical(here, found)[1]["a.lora.lora_B"], found["a.lora.lora_B"])


# -- from dense ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("n", [None, N])
def test_from_dense_undoes_materialise(layer: str, n: int | None) -> None:
    make, r = LAYERS[layer]
    delta = lora(nn.Sequential(make()).double(), r, "0", lora_alpha=3)
    params = random_params(delta, n)
    dense = fd.algebra.materialise(delta, params)
    found = fd.algebra.from_dense(delta, dense)
    assert found[1]["0.lora.lora_A"].shape == params["0.lora.lora_A"].shape
    assert_same(fd.algebra.materialise(*found), dense)
    canonical = fd.algebra.canonical(delta, params)[1]
    for name, leaf in canonical.items():
        if layer != "rank above width":
            assert_close(found[1][name], leaf)


def test_from_dense_gives_the_nearest_and_trained_leaves_exactly(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a", unfrozen_modules=["deltas", "head"])
    rng = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (8, 4), "head.weight": (3, 8), "head.bias": (3,)}
    dense = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    found = change(*fd.algebra.from_dense(delta, dense))
    u, s, vh = torch.linalg.svd(dense["a.weight"], full_matrices=False)
    assert_same(found, dense | {"a.weight": (u[:, :2] * s[:2]) @ vh[:2]})


# -- dense changes made one ----------------------------------------------------------------------------------------


def tasks() -> list[Params]:
    rng = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (3, 4), "b.bias": (5,)}
    return [{name: torch.randn(shape, generator=rng) for name, shape in shapes.items()} for _ in range(N)]


def test_task_arithmetic_is_a_loop_and_the_exact_sum(mlp: nn.Module) -> None:
    changes, weights = tasks(), [1.0, -0.5, 0.25]
    expected = {name: sum(w * one[name] for w, one in zip(weights, changes, strict=True)) for name in changes[0]}
    assert_same(fd.algebra.task_arithmetic(changes, weights), expected)
    assert_same(fd.algebra.task_arithmetic(fd.stack(changes), torch.tensor(weights)), expected)
    delta = lora(mlp, 2, "a", "b")
    stack = random_params(delta, N)
    dense = fd.algebra.task_arithmetic(fd.algebra.materialise(delta, stack), weights)
    assert_same(fd.algebra.materialise(*fd.algebra.sum_exact((delta, stack), weights)), dense)


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
def test_ties_is_a_loop_over_entries(density: float) -> None:
    changes = tasks()
    rows = [torch.cat([t.flatten() for t in one.values()]).tolist() for one in changes]
    for row in rows:
        largest = sorted(range(len(row)), key=lambda i, row=row: -abs(row[i]))
        for i in largest[max(1, round(density * len(row))) :]:
            row[i] = 0.0
    expected = []
    for column in zip(*rows, strict=True):
        positive = sum(column) > 0
        kept = [v for v in column if v != 0 and (v > 0) == positive]
        expected.append(1.5 * sum(kept) / len(kept) if kept else 0.0)
    for given in (changes, fd.stack(changes)):
        found = fd.algebra.ties(given, density, weight=1.5)
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in changes[0].items()}
        assert_close(torch.cat([t.flatten() for t in found.values()]), torch.tensor(expected))


def test_dare_drops_and_rescales_without_bias() -> None:
    change = {"w": torch.full((200, 300), 2.0), "v": torch.full((200, 300), 2.0)}
    found = fd.algebra.dare(change, drop=0.75, seed=3)
    assert set(found["w"].unique().tolist()) == {0.0, 8.0}
    assert abs(float(found["w"].mean()) - 2) < 0.1
    assert not torch.equal(found["w"], found["v"])
    again, other = (fd.algebra.dare({"w": change["w"]}, drop=0.75, seed=seed)["w"] for seed in (3, 4))
    assert torch.equal(again, found["w"])
    assert not torch.equal(other, found["w"])
    assert torch.equal(fd.algebra.dare(change, drop=0.0, seed=3)["w"], change["w"])


def test_dense_changes_that_do_not_fit_are_refused() -> None:
    changes = tasks()
    with raises_saying(fd.errors.ParamsError, "one weight per change", "(3,)", "(2,)"):
        fd.algebra.task_arithmetic(changes, [1.0, 2.0])
    with raises_saying(fd.errors.ParamsError, "density=0"):
        fd.algebra.ties(changes, 0)
    with raises_saying(fd.errors.ParamsError, "drop=1"):
        fd.algebra.dare(changes[0], 1, seed=0)
    with raises_saying(fd.errors.ParamsError, "b.bias", "member 0"):
        fd.algebra.ties([changes[0], {"a.weight": changes[1]["a.weight"]}])


# -- derivatives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [None, 2])
@pytest.mark.parametrize("name", ["sum_exact", "scale", "truncate", "canonical", "from_dense", "materialise"])
def test_derivatives_are_finite_differences(name: str, n: int | None) -> None:
    delta = lora(nn.Sequential(nn.Linear(4, 5)).double(), 3, "0")
    params = random_params(delta, n)
    keys = ["0.lora.lora_A", "0.lora.lora_B"]
    functions: dict[str, Callable[[Params], Params]] = {
        "sum_exact": lambda p: fd.algebra.sum_exact([(delta, p), (delta, params)], [2.0, p[keys[0]].mean()])[1],
        "scale": lambda p: fd.algebra.scale(delta, p, p[keys[0]].mean())[1],
        "truncate": lambda p: fd.algebra.truncate(delta, p, 2)[1],
        "canonical": lambda p: fd.algebra.canonical(delta, p)[1],
        "from_dense": lambda p: fd.algebra.from_dense(
            lora(delta.backbone, 2, "0"), {"0.weight": p[keys[1]] @ torch.ones_like(p[keys[0]]).tril() + 1.5}
        )[1],
        "materialise": lambda p: fd.algebra.materialise(delta, p),
    }

    def flat(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        found = functions[name](params | dict(zip(keys, (a, b), strict=True)))
        return tuple(leaf for leaf in found.values() if leaf.requires_grad)

    inputs = [params[key].clone().requires_grad_() for key in keys]
    assert flat(*inputs)
    assert torch.autograd.gradcheck(flat, inputs)


def test_the_functions_map_over_members(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a")
    stack = random_params(delta, N)
    mapped = torch.vmap(lambda p: fd.algebra.truncate(delta, p, 1)[1])(stack)
    for name, leaf in fd.algebra.truncate(delta, stack, 1)[1].items():
        assert_close(mapped[name], leaf)
    scaled = fd.algebra.scale(delta, stack, 2.0)[1]
    for leaf in scaled.values():
        leaf.mul_(1)  # an expanded leaf could not be written


# -- methods of one's own ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OuterConfig(fd.BaseDeltaConfig):
    """``W - U V``, with columns of U as rows of a leaf."""

    columns: int = 1

    def init(self, site: fd.Site, rng: torch.Generator) -> Params:
        return {"u": torch.zeros(self.columns, site.width), "v": torch.zeros(self.columns, site.input_width)}

    def weights(self, site: fd.Site, p: Params, w: Params) -> Params:
        return w | {"weight": w["weight"] - p["u"].mT @ p["v"]}

    def factors(self, site: fd.Site, p: Params) -> dict[str, tuple[Tensor, Tensor]]:
        return {"weight": (-p["u"].mT, p["v"])}

    def from_factors(self, site: fd.Site, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Params:
        return {"u": -factors["weight"][0].mT, "v": factors["weight"][1]}

    def with_rank(self, rank: int) -> OuterConfig:
        return self.replace(columns=rank)


def test_a_method_that_gives_its_factors_has_the_algebra(mlp: nn.Module) -> None:
    one = fd.DeltaModel(mlp, OuterConfig(columns=2, modified_modules=("a",), name="outer"))
    two = lora(mlp, 3, "a", "b")
    pairs = [(one, random_params(one)), (two, random_params(two))]
    total, params = fd.algebra.sum_exact(pairs)
    assert {name: tuple(leaf.shape) for name, leaf in params.items() if name.startswith("a.")} == {
        "a.outer.u": (5, 8),
        "a.outer.v": (5, 4),
    }
    dense = [change(*pair) for pair in pairs]
    expected = {"a.weight": dense[0]["a.weight"] + dense[1]["a.weight"], "b.weight": dense[1]["b.weight"]}
    assert_same(change(total, params), expected)
    assert_same(change(*fd.algebra.canonical(total, params)), expected)
    assert_same(change(*fd.algebra.add(*reversed(pairs))), expected)


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_method_without_factors_is_refused_by_name(mlp: nn.Module) -> None:
    for config, reason in (
        (fd.AdapterConfig(modified_modules=["b"]), "adapter has no weights form"),
        (fd.BitFitConfig(modified_modules=["b"]), "not by a product of low-rank factors"),
        (fd.LoraConfig(modified_modules=["b"], enable_lora=(True, False)), "parts (0)"),
    ):
        delta = fd.DeltaModel(mlp, config)
        params = delta.init(0)
        for call in (
            lambda d=delta, p=params: fd.algebra.sum_exact([(d, p)]),
            lambda d=delta, p=params: fd.algebra.truncate(d, p, 1),
            lambda d=delta: fd.algebra.from_dense(d, {}),
        ):
            with raises_saying(fd.errors.MergeError, delta.plan.names[0], "at b", reason, "fd.tree", "apply_many"):
                call()
    adapter = fd.AdapterModel(mlp, modified_modules=["b"])
    with raises_saying(fd.errors.MergeError, "adapter", "b", "weights form"):
        fd.algebra.materialise(adapter, adapter.init(0))


def test_one_end_of_a_tied_pair_is_materialised_only_when_asked() -> None:
    delta = lora(Tied().double(), 2, "head")
    params = random_params(delta)
    with raises_saying(fd.errors.MergeError, "tied", "untie=True"):
        fd.algebra.materialise(delta, params)
    found = fd.algebra.materialise(delta, params, untie=True)
    assert_same(found, {"head.weight": low_rank(params, "head.lora")})


def test_packed_members_are_taken_apart_first(mlp: nn.Module) -> None:
    pairs = [(delta, random_params(delta)) for delta in (lora(mlp, 2, "a"), lora(mlp, 1, "a", "b"))]
    delta, stack = fd.pack(pairs)
    with raises_saying(fd.errors.MergeError, "fd.pack", "fd.unpack"):
        fd.algebra.canonical(delta, stack)
    expected = fd.algebra.materialise(*fd.algebra.sum_exact(pairs))
    assert_same(fd.algebra.materialise(*fd.algebra.sum_exact(fd.unpack(delta, stack))), expected)
    dense = fd.algebra.materialise(delta, stack)
    assert_close(dense["a.weight"].sum(0), expected["a.weight"])
    assert_close(dense["b.weight"].sum(0), expected["b.weight"])


def test_what_cannot_be_added_is_refused(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a")
    params, stack = random_params(delta), random_params(delta, N)
    elsewhere = lora(MLP().double(), 2, "a")
    cases: list[tuple[Callable[[], Any], tuple[str, ...]]] = [
        (lambda: fd.algebra.sum_exact([]), ("pairs, one or more",)),
        (lambda: fd.algebra.sum_exact({"a": 1}), ("pairs, one or more",)),  # pyright: ignore
        (lambda: fd.algebra.sum_exact((delta, params)), ("one member", "sum_exact([(delta, params), ...])")),
        (lambda: fd.algebra.sum_exact((delta, stack), [1.0]), ("1 weights", "3 summands")),
        (lambda: fd.algebra.add((delta, params), (delta, stack)), ("stack of 3", "fd.broadcast")),
        (lambda: fd.algebra.add((delta, params), (elsewhere, params)), ("Pair 1", "another backbone")),
        (lambda: fd.algebra.scale(delta, params, torch.ones(2)), ("tensor ()", "(2,)")),
        (lambda: fd.algebra.scale(delta, stack, torch.ones(2)), ("(3,)", "(2,)")),
        (lambda: fd.algebra.truncate(delta, params, 0), ("rank=0",)),
        (lambda: fd.algebra.truncate(delta, {}, 1), ("params lack 3 leaves", "a.lora.lora_A")),
        (lambda: fd.algebra.canonical(delta, {"a.lora.lora_C": params["a.lora.lora_A"]}), ("a.lora.lora_C",)),
        (lambda: fd.algebra.canonical(params, delta), ("delta and its params", "dict")),  # pyright: ignore
    ]
    for call, pieces in cases:
        with raises_saying(fd.errors.ParamsError, *pieces):
            call()


def test_what_is_no_change_of_the_delta_is_refused(mlp: nn.Module) -> None:
    delta = lora(mlp, 2, "a", "b")
    dense = {"a.weight": torch.ones(8, 4), "b.weight": torch.ones(8, 8)}
    both = lora(mlp, 2, "a", unfrozen_modules=["deltas", "a.weight"])
    twice = fd.DeltaModel(mlp, *[fd.LoraConfig(modified_modules=["a"])] * 2)
    cases: list[tuple[fd.DeltaModel, Params, tuple[str, ...]]] = [
        (delta, {"a.weight": dense["a.weight"]}, ("b.weight", "missing", "zeros")),
        (delta, dense | {"head.weight": torch.ones(3, 8)}, ("head.weight",)),
        (delta, dense | {"b.weight": torch.ones(8, 4)}, ("b.weight", "(8, 4)", "(8, 8)")),
        (delta, dense | {"a.weight": torch.ones(2, 8, 4)}, ("b.weight", "(2, 8, 8)")),
        (both, {"a.weight": dense["a.weight"]}, ("a.weight", "unfrozen_modules")),
        (twice, {"a.weight": dense["a.weight"]}, ("lora", "lora_1", "one config")),
    ]
    for one, given, pieces in cases:
        with raises_saying(fd.errors.ParamsError, *pieces):
            fd.algebra.from_dense(one, given)


# -- pruning, alignment, soups ---------------------------------------------------------------------------------------


def test_pruning_keeps_the_largest_entries_of_all_weights_together() -> None:
    torch.manual_seed(0)
    change = {"v": torch.randn(5, 4), "w": 3 * torch.randn(6, 3)}
    found = fd.algebra.prune(change, density=0.25)
    every = torch.cat([leaf.flatten() for leaf in change.values()])
    least = every.abs().sort(descending=True).values[round(0.25 * len(every)) - 1]
    for name, leaf in change.items():
        assert torch.equal(found[name], torch.where(leaf.abs() >= least, leaf, torch.zeros_like(leaf)))
    both = torch.vmap(lambda change: fd.algebra.prune(change, 0.25))(fd.stack([change, found]))
    assert torch.equal(both["w"][0], found["w"])
    with pytest.raises(fd.errors.ParamsError, match=r"density=0; write the fraction"):
        fd.algebra.prune(change, density=0)


def three(mlp: nn.Module, *names: str) -> tuple[fd.DeltaModel, Params]:
    delta = lora(mlp, 2, *names)
    return delta, random_params(delta, n=N)


def test_aligned_changes_are_those_of_a_dense_decomposition(mlp: nn.Module) -> None:
    delta, stack = three(mlp, "a", "b")
    seen: dict[str, Tensor] = {}

    def merge(aligned: Params) -> Params:
        seen.update(aligned)
        return fd.algebra.ties(aligned, density=0.5)

    found = fd.algebra.materialise(*fd.algebra.knots((delta, stack), merge))
    dense = fd.algebra.materialise(delta, stack)
    assert dense.keys() == found.keys()
    for name, changes in dense.items():
        u, s, vh = torch.linalg.svd(torch.cat(list(changes), 1), full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        assert seen[name].shape == (N, rank, changes.shape[2])
        # Bases are the same up to signs, and what is elected and trimmed does not depend on those.
        own = torch.stack((vh[:rank]).split(changes.shape[2], 1))
        assert_close(seen[name].abs(), own.abs())
        signs = (seen[name] * own).sum((0, 2)).sign()
        elected = fd.algebra.ties(seen, density=0.5)[name] * signs[:, None]
        assert_close(found[name], u[:, :rank] * s[:rank] @ elected)


def test_the_aligned_mean_is_the_exact_mean_also_of_unlike_sites_and_ranks(mlp: nn.Module) -> None:
    pairs = [(lora(mlp, 1, "a"), 0), (lora(mlp, 3, "a", "b"), 1)]
    pairs = [(delta, random_params(delta, seed=seed)) for delta, seed in pairs]
    merged = fd.algebra.knots(pairs, lambda aligned: {name: leaf.mean(0) for name, leaf in aligned.items()})
    expected = fd.algebra.materialise(*fd.algebra.sum_exact(pairs, weights=[0.5, 0.5]))
    assert_same(fd.algebra.materialise(*merged), expected)
    stacks = [(delta, fd.stack([params, params])) for delta, params in pairs]
    with pytest.raises(fd.errors.ParamsError, match="knots merges single members"):
        fd.algebra.knots(stacks)


def test_a_soup_of_like_members_is_their_mean_and_of_unlike_ones_a_warning(mlp: nn.Module) -> None:
    delta, stack = three(mlp, "a")
    start = fd.take(stack, 0)
    near = fd.stack([fd.tree.lerp(start, fd.take(stack, i), 0.02) for i in range(N)])
    found = fd.algebra.soup(delta, near, weights=[0.5, 0.25, 0.25])
    for name, leaf in near.items():
        assert_close(found[name], 0.5 * leaf[0] + 0.25 * leaf[1] + 0.25 * leaf[2])
    with pytest.warns(fd.errors.FactorMeanWarning, match=r"by \d+%.*fd.algebra.sum_exact") as caught:
        mean = fd.algebra.soup(delta, stack)
    dense = fd.algebra.materialise(delta, stack)["a.weight"].mean(0)
    off = (fd.algebra.materialise(delta, mean)["a.weight"] - dense).norm() / dense.norm()
    assert f"{float(off):.0%}" in str(caught[0].message)
    with pytest.raises(fd.errors.ParamsError, match="these params are one member"):
        fd.algebra.soup(delta, start)
    with pytest.raises(fd.errors.ParamsError, match=r"one weight per member, \(3,\)"):
        fd.algebra.soup(delta, stack, weights=[1.0])
