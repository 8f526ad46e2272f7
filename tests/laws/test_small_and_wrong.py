"""Odd params, stacks, indices and inputs: whatever takes them computes, or raises an error of the library's own.

Such an error names the leaf, says what it is and what to write; it never is one of Python's or torch's from inside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import funcdelta as fd

Params = dict[str, Any]
MOST = 900
"""Letters that a message may have, however long a key is."""


class World:
    """A delta with two sites and a trained head, and everything that takes its params or a stack of them."""

    def __init__(self) -> None:
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.delta = fd.LoraModel(self.backbone, lora_r=2, modified_modules=["0"], unfrozen_modules=["deltas", "2"])
        self.x, self.folder = torch.randn(2, 4), tempfile.mkdtemp()
        self.params = fd.tree.randn_like(self.delta.init(0), seed=1)
        self.stack = fd.tree.randn_like(self.delta.init(0, n=3), seed=1)
        self.resident = fd.Resident.of(self.delta, self.stack, capacity=4)
        self.view = self.delta.bind(self.params)
        self.saved = self.delta.save_finetuned(self.params, self.folder + "/saved")

    def put(self, params: Any) -> None:
        self.resident.remove(self.resident.put(params))


ONE: dict[str, Callable[[World, Any], Any]] = {
    "apply": lambda w, p: w.delta.apply(p, w.x),
    "bind": lambda w, p: w.delta.bind(p)(w.x),
    "merge": lambda w, p: w.delta.merge(p),
    "merged": lambda w, p: w.delta.merged(p)(w.x),
    "attach": lambda w, p: w.delta.attach(p),
    "detach": lambda w, p: w.delta.detach(p),
    "freeze_module": lambda w, p: w.delta.freeze_module(p),
    "bake": lambda w, p: w.delta.bake(p),
    "save_finetuned": lambda w, p: w.delta.save_finetuned(p, w.folder + "/one"),
    "from_finetuned": lambda w, p: fd.AutoDeltaModel.from_finetuned(
        w.saved, backbone_model=w.backbone, state_dict=p, check_hash=False
    ),
    "Resident.put": lambda w, p: w.put(p),
    "Resident.replace": lambda w, p: w.resident.replace(0, p),
    "load_state_dict": lambda w, p: w.view.load_state_dict(p),
    "log": lambda w, p: w.delta.log(p, False, False, False, False),
    "fd.stack": lambda w, p: fd.stack([w.params, p]),
    "fd.broadcast": lambda w, p: fd.broadcast(p, 2),
    "fd.partition": lambda w, p: fd.partition(p, w.delta.trainable),
    "fd.combine": lambda w, p: fd.combine(p, {}),
    "fd.tree.add": lambda w, p: fd.tree.add(w.params, p),
    "fd.pack": lambda w, p: fd.pack([(w.delta, p), (w.delta, w.params)]),
    "fd.optim": lambda w, p: fd.optim.adamw(lr=0.1).init(p),
    "fd.algebra": lambda w, p: fd.algebra.materialise(w.delta, p),
    "fd.save_opendelta": lambda w, p: fd.save_opendelta(w.delta, p, w.folder + "/opendelta"),
    "value_and_grad of apply": lambda w, p: fd.value_and_grad(lambda q: w.delta.apply(q, w.x).sum())(p),
}
MANY: dict[str, Callable[[World, Any], Any]] = {
    **{
        f"apply_many {engine}": lambda w, s, engine=engine: w.delta.apply_many(s, w.x, engine=engine)
        for engine in ("auto", "fold", "vmap", "loop", "trunk")
    },
    "apply_rows": lambda w, s: w.delta.apply_rows(s, [0, 2], w.x),
    "bind_rows": lambda w, s: w.delta.bind_rows(s, [0, 2])(w.x),
    "explain": lambda w, s: w.delta.explain(s, w.x),
    "value_and_grad": lambda w, s: fd.value_and_grad(lambda q: w.delta.apply_many(q, w.x).sum((1, 2)))(s),
    "fd.take one": lambda w, s: fd.take(s, 1),
    "fd.take several": lambda w, s: fd.take(s, [0, 1]),
    "fd.unstack": lambda w, s: fd.unstack(s),
    "fd.cat": lambda w, s: fd.cat([w.stack, s]),
    "fd.members": lambda w, s: fd.members(s),
    "Resident.of": lambda w, s: fd.Resident.of(w.delta, s, capacity=5),
    "save_finetuned of a stack": lambda w, s: w.delta.save_finetuned(s, w.folder + "/many"),
    "fd.optim of a stack": lambda w, s: fd.optim.adamw(lr=0.1).init(s, n=3),
}

LEAVES: dict[str, Callable[[Tensor], Any]] = {
    "integers": lambda leaf: leaf.long(),
    "booleans": lambda leaf: leaf > 0,
    "complex": lambda leaf: leaf.to(torch.complex64),
    "float64": lambda leaf: leaf.double(),
    "half": lambda leaf: leaf.half(),
    "quantised": lambda leaf: torch.quantize_per_tensor(leaf, 0.1, 0, torch.qint8),
    "meta": lambda leaf: leaf.to("meta"),
    "sparse": lambda leaf: leaf.to_sparse(),
    "nested": lambda leaf: torch.nested.nested_tensor([leaf, leaf]),
    "an array": lambda leaf: leaf.numpy(),
    "a list": lambda leaf: leaf.tolist(),
    "a number": lambda leaf: 1.0,
    "text": lambda leaf: "x",
    "None": lambda leaf: None,
    "an axis more": lambda leaf: leaf[..., None],
    "no axis": lambda leaf: torch.tensor(1.0),
    "fewer members": lambda leaf: leaf[:1],
    "no members": lambda leaf: leaf[:0],
}
WHOLE: dict[str, Callable[[Params], Any]] = {
    "None": lambda params: None,
    "a list": lambda params: [params],
    "items": lambda params: list(params.items()),
    "a tensor": lambda params: torch.ones(3),
    "text": lambda params: "abc",
    "a number": lambda params: 3,
    "a set": lambda params: set(params),
    "a module": lambda params: nn.Linear(2, 2),
    "empty": lambda params: {},
    "another level": lambda params: {"a": dict(params)},
    "an integer key": lambda params: {**params, 3: torch.ones(3)},
    "None as a key": lambda params: {**params, None: torch.ones(3)},
    "a tuple as a key": lambda params: {**params, ("a",): torch.ones(3)},
    "bytes as a key": lambda params: {**params, b"a": torch.ones(3)},
    "an integer key alone": lambda params: {3: torch.ones(3)},
    "an unknown key": lambda params: {**params, "zz": torch.ones(3)},
    "a long key": lambda params: {**params, "z" * 10**5: torch.ones(3)},
    "many keys": lambda params: {**params, **{f"k{i}": torch.ones(3) for i in range(2000)}},
    "a key less": lambda params: dict(list(params.items())[1:]),
}


@pytest.fixture(scope="module")
def world() -> World:
    torch.manual_seed(0)
    return World()


def odd(params: Params) -> Iterator[tuple[str, str, Any]]:
    """``(what, the leaf that is odd or "", params)``."""
    for what, change in LEAVES.items():
        for name, leaf in params.items():
            if not (what in ("fewer members", "no members") and leaf.ndim == 0):
                yield what, name, {**params, name: change(leaf)}
    for what, change in WHOLE.items():
        yield what, "", change(params)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_odd_params_are_told(world: World, name: str) -> None:
    function = ONE[name] if name in ONE else MANY[name]
    for what, leaf, params in odd(world.params if name in ONE else world.stack):
        try:
            function(world, params)
        except fd.errors.FuncdeltaError as error:
            said = str(error)
            assert len(said) < MOST, (what, len(said))
            # Where a leaf has a shape that may be a stack's, the others are the odd ones.
            words = (leaf, "member", "expected (n", "engine=", "nothing to bake")
            assert any(word in said for word in words), (what, leaf, said)
        except Exception as error:
            raise AssertionError(f"{what} {leaf}: {type(error).__name__}: {error}") from error


def test_what_is_as_it_should_be_passes(world: World) -> None:
    for name, function in ONE.items():
        if name not in ("bake", "fd.algebra"):
            function(world, world.params)
    for name, function in MANY.items():
        if name != "apply_many trunk":
            function(world, world.stack)


# -- dtypes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda leaf: leaf.long(), ("0.lora.lora_A", "torch.int64", "floating-point", "leaf.to(torch.float32)")),
        (lambda leaf: leaf * 1j, ("0.lora.lora_A", "torch.complex64", "real", "leaf.real")),
        (lambda leaf: leaf.to(torch.float8_e4m3fn), ("0.lora.lora_A", "float8", "computes", "leaf.to(torch.float32)")),
        (lambda leaf: leaf.double(), ("0.lora.lora_A", "0.lora.lora_B", "one dtype", "leaf.to(torch.float64)")),
        (lambda leaf: leaf.to("meta"), ("0.lora.lora_A", "meta")),
    ],
    ids=["integers", "complex", "float8", "mixed", "meta"],
)
def test_numbers_of_another_kind(world: World, change: Any, words: tuple[str, ...]) -> None:
    for function, params in ((ONE["apply"], world.params), (MANY["apply_many auto"], world.stack)):
        with pytest.raises(fd.errors.ParamsError) as caught:
            function(world, {**params, "0.lora.lora_A": change(params["0.lora.lora_A"])})
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_autocast_converts_what_differs(world: World) -> None:
    params = {**world.params, "0.lora.lora_A": world.params["0.lora.lora_A"].bfloat16()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = world.delta.apply(params, world.x)
        expected = world.delta.apply(world.params, world.x)
    assert torch.allclose(found.float(), expected.float(), atol=0.1)
    with pytest.raises(fd.errors.ParamsError, match="one dtype"):  # and nothing that autocast lets pass is remembered
        world.delta.apply(params, world.x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_constants_follow_what_trains_beside_them(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    delta = fd.LoraModel(nn.Sequential(layer), lora_r=2, lora_alpha=3, modified_modules=["0"])
    stack = fd.tree.randn_like(delta.init(0, n=3), seed=1) | {"0.lora.scale": torch.full((3,), 1.5)}
    given = {name: leaf.to(dtype) if delta.trainable(name) else leaf for name, leaf in stack.items()}
    a, b = (given[f"0.lora.lora_{which}"].double() for which in "AB")
    change = 1.5 * torch.einsum("bi,nri,nor->nbo", x.double(), a, b)
    expected = F.linear(x, layer.weight, layer.bias).double() + change
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    for engine in ("fold", "vmap", "loop", "auto"):
        found = delta.apply_many(given, x, engine=engine)
        assert torch.allclose(found.double(), expected, atol=tolerance, rtol=tolerance), engine
    rows = expected[torch.tensor([2, 0]), torch.tensor([0, 1])]
    for found in (delta.apply_rows(given, [2, 0], x), delta.bind_rows(given, [2, 0])(x)):
        assert torch.allclose(found.double(), rows, atol=tolerance, rtol=tolerance)
    assert given["0.lora.scale"].dtype == torch.float32


# -- indices, axes, numbers ---------------------------------------------------------------------------------------

INDICES: dict[str, Any] = {
    "a member too many": [3, 0],
    "-2": [-2, 0],
    "floats": [0.0, 1.0],
    "booleans": [True, False],
    "a row too many": [0, 1, 2],
    "empty": [],
    "meta": torch.zeros(2, dtype=torch.long, device="meta"),
    "two axes": [[0], [1]],
    "None": None,
    "text": "01",
    "no axis": torch.tensor(1),
    "a number": 1,
    "huge": [2**70, 0],
    "bytes": torch.tensor([255, 0], dtype=torch.uint8),
    "texts": ["0", "1"],
    "ragged": [[0], [1, 2]],
    "None in a list": [None, 0],
    "a dict": {0: 1},
    "complex": torch.zeros(2, dtype=torch.complex64),
    "sparse": torch.zeros(2, dtype=torch.long).to_sparse(),
    "an object": object(),
    "NaN": [float("nan"), 0],
}
TAKING: dict[str, Callable[[World, Any], Any]] = {
    "apply_rows": lambda w, i: w.delta.apply_rows(w.stack, i, w.x),
    "bind_rows": lambda w, i: w.delta.bind_rows(w.stack, i)(w.x),
    "route": lambda w, i: getattr(w.delta.bind_rows(w.stack, [0, 1]), "route")(i)(w.x),  # noqa: B009
    "fd.take": lambda w, i: fd.take(w.stack, i),
    "apply_rows of a Resident": lambda w, i: w.delta.apply_rows(w.resident, i, w.x),
    "Resident.member": lambda w, i: w.resident.member(i),
    "Resident.replace": lambda w, i: w.resident.replace(i, w.params),
    "Resident.pick": lambda w, i: w.resident.pick(i),
    "Resident": lambda w, i: fd.Resident(w.delta, i),
    "chunk_size": lambda w, i: w.delta.apply_many(w.stack, w.x, chunk_size=i),
    "in_dims": lambda w, i: w.delta.apply_many(w.stack, w.x, in_dims=i),
    "engine": lambda w, i: w.delta.apply_many(w.stack, w.x, engine=i),
    "in_dims of value_and_grad": lambda w, i: fd.value_and_grad(
        lambda params, x: w.delta.apply(params, x).sum(), in_dims=i
    )(w.stack, w.x),
    "init(n=)": lambda w, i: w.delta.init(0, n=i),
    "init(dtype=)": lambda w, i: w.delta.init(0, dtype=i),
    "broadcast": lambda w, i: fd.broadcast(w.params, i),
    "seeds": lambda w, i: fd.seeds(0, i),
    "partition": lambda w, i: fd.partition(w.params, i),
    "save_finetuned": lambda w, i: w.delta.save_finetuned(w.params, None if isinstance(i, str) else i),
    "from_finetuned": lambda w, i: fd.AutoDeltaModel.from_finetuned(i, backbone_model=w.backbone),
    "unbind": lambda w, i: fd.unbind(i),
    "stack": lambda w, i: fd.stack(i),
    "backbone_model": lambda w, i: fd.LoraModel(i, modified_modules=["0"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TAKING)
def test_odd_indices_and_arguments_are_told(world: World, name: str) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2, dtype=torch.long)])
    quantised = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    for what, index in {**INDICES, "nested": nested, "quantised": quantised}.items():
        try:
            TAKING[name](world, index)
        except fd.errors.FuncdeltaError as error:
            said = str(error)
            if len(said) >= MOST:
                raise AssertionError(f"{what}: {len(said)} letters") from error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("n", [0, -1])
def test_no_members(world: World, n: int) -> None:
    for function in (TAKING["init(n=)"], TAKING["broadcast"]):
        with pytest.raises(fd.errors.FuncdeltaError, match=r"member|negative"):
            function(world, n)
    empty = {name: leaf[:0] for name, leaf in world.stack.items()}
    for call in (MANY["apply_many auto"], MANY["apply_rows"], MANY["bind_rows"], MANY["value_and_grad"]):
        with pytest.raises(fd.errors.StackError, match=r"no members .* at least one"):
            call(world, empty)


def test_devices_that_are_none(world: World) -> None:
    for device in ("nowhere", 5.0, object()):
        with pytest.raises(fd.errors.ParamsError, match="names no device"):
            world.delta.init(0, device=device)  # pyright: ignore[reportArgumentType]


# -- backbones and modes ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyBatchNorm1d()], ids=["LazyLinear", "LazyBatchNorm1d"])
def test_lazy_modules_have_to_run_first(lazy: nn.Module) -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), lazy)
    with pytest.raises(fd.errors.MatchError, match=r"1\.weight has no shape yet .*backbone\(inputs\)"):
        fd.LoraModel(backbone, modified_modules=["0"])
    backbone(torch.randn(3, 4))
    assert fd.LoraModel(backbone, modified_modules=["0"]).sites == ("0",)


def test_what_is_made_in_inference_mode_computes_and_trains() -> None:
    backbone, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    with torch.inference_mode():
        delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
        params, stack = delta.init(0), fd.tree.randn_like(delta.init(0, n=2), seed=1)
    expected = fd.LoraModel(backbone, lora_r=2, modified_modules=["0"])
    assert torch.equal(delta.apply(params, x), expected.apply(expected.init(0), x))
    assert all(torch.equal(leaf, expected.init(0)[name]) for name, leaf in params.items())
    leaf = params["0.lora.lora_B"].requires_grad_()
    delta.apply(params, x).sum().backward()
    a = params["0.lora.lora_A"]
    scale = float(params["0.lora.scale"])
    assert leaf.grad is not None
    assert torch.allclose(leaf.grad, scale * (x @ a.T).sum(0).expand(4, 2))
    losses, grads = fd.value_and_grad(lambda s: delta.apply_many(s, x).sum((1, 2)))(stack)
    plain = {name: leaf.clone() for name, leaf in stack.items()}
    wanted, gradients = fd.value_and_grad(lambda s: delta.apply_many(s, x).sum((1, 2)))(plain)
    assert torch.equal(losses, wanted)
    assert all(torch.equal(grads[name], gradients[name]) for name in plain)
