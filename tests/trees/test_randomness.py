"""Private random numbers: torch's global generator is neither read nor moved, and the numbers are those of the seed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from handmade import assert_close, raises_saying
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from funcdelta import randomness
from funcdelta.errors import ConfigError, ParamsError
from funcdelta.randomness import ATTENTION, DRAWN_BEFORE, Generators, drawn, private_random, refuse_draws

SEED = 11

# -- every operator of torch that is marked as random ------------------------------------------------------------------


def marked() -> Iterator[tuple[str, Any]]:
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("aten::"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if torch.Tag.nondeterministic_seeded in func.tags:
                yield name, func


RANDOM = dict(marked())
DEVICES = {
    *("aten::_cudnn_init_dropout_state", "aten::_cudnn_rnn", "aten::miopen_rnn", "aten::_lstm_mps"),
    *("aten::_scaled_dot_product_attention_math_for_mps", "aten::_triton_scaled_dot_attention"),
    *("aten::_flash_attention_forward", "aten::_efficient_attention_forward", "aten::_cudnn_attention_forward"),
    "aten::_scaled_dot_product_flash_attention.quantized",
    # It has no dropout: on the CPU torch takes the mathematical form.
    "aten::_scaled_dot_product_flash_attention_for_cpu",
}
"""Operators that draw in a kernel of another device and take no generator; a name stands for its overloads too."""

FUSED = sorted(ATTENTION)
ELSEWHERE = {*DEVICES, *FUSED, *DRAWN_BEFORE, "aten::_fused_dropout"}
ON_THE_CPU = [name for name in RANDOM if not {name, name.partition(".")[0]} & ELSEWHERE]

TENSORS: dict[str, Callable[[], Tensor]] = {
    "high": lambda: torch.tensor(9),
    "noise": lambda: torch.zeros(3, 4),
    "count": lambda: torch.full((3, 4), 20.0),
    **dict.fromkeys(("query", "key", "value"), lambda: torch.linspace(-1, 1, 24).view(1, 2, 3, 4)),
}
NUMBERS: dict[str, Any] = {
    **dict.fromkeys(("train", "training"), True),
    **dict.fromkeys(("p", "dropout", "dropout_p", "mean", "std"), 0.4),
    **dict.fromkeys(("high", "to", "n"), 9),
    **dict.fromkeys(("low", "from", "num_samples"), 2),
    "size": [3, 4],
}


def recurrent(name: str, func: Any) -> list[Any]:
    """Arguments of ``aten::lstm.input`` and its kind: two layers, for dropout stands between them."""
    kind = name.removeprefix("aten::").partition(".")[0]
    module = getattr(nn, kind.partition("_")[0].upper())(4, 4, num_layers=2)
    h = torch.zeros(2, 3, 4)
    hx: Any = [h, h] if kind == "lstm" else h
    weights = [weight.detach() for weight in module._flat_weights]
    x = torch.linspace(-1, 1, 60).view(5, 3, 4)
    if name.endswith("data"):
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]))
        return [packed.data, packed.batch_sizes, hx, weights, True, 2, 0.4, True, False]
    return [x, hx, weights, True, 2, 0.4, True, False, False]


def example(name: str, func: Any) -> tuple[list[Any], dict[str, Any]]:
    """Arguments that ``func`` draws with."""
    if name.partition(".")[0] in ("aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"):
        return recurrent(name, func), {}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    named = False  # after an argument that is left out
    for argument in func._schema.arguments:
        if str(argument.type) == "Tensor":
            value = TENSORS.get(argument.name, lambda: torch.linspace(0.1, 0.9, 12).view(3, 4))()
            value = -value if "rrelu" in name else value  # what is positive passes unchanged
            if argument.name in ("out", "out0", "out1"):
                integers = "randint" in name or "randperm" in name or "multinomial" in name
                kind = torch.bool if argument.name == "out1" else torch.int64 if integers else torch.float32
                # torch crashes where rrelu has to resize, and raises in normal.
                value = torch.empty((3, 4) if "rrelu" in name or "normal.T" in name else 0, dtype=kind)
        elif argument.name in NUMBERS and argument.name != "generator":
            value = NUMBERS[argument.name]
        elif argument.has_default_value():
            named = True
            continue
        else:
            value = None  # a generator that has to be named
        if named or argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


def same(found: Any, expected: Any) -> bool:
    ours, theirs = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("without_graph", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_every_random_operator_draws_the_numbers_of_the_seed(name: str, without_graph: Callable[[], Any]) -> None:
    func = RANDOM[name]

    def call() -> Any:
        args, kwargs = example(name, func)
        return func(*args, **kwargs)

    with without_graph():
        torch.manual_seed(SEED)
        state = torch.get_rng_state()
        expected = call()
        assert not torch.equal(state, torch.get_rng_state()), "the example draws nothing"
        torch.manual_seed(5)
        state = torch.get_rng_state()
        with private_random(SEED):
            found, other = call(), call()
        assert torch.equal(state, torch.get_rng_state())
        assert same(found, expected)
        assert not same(other, expected), "the private generator does not move"
        with refuse_draws("What runs here"), raises_saying(ConfigError, "What runs here drew", "generator=rng"):
            call()
        assert torch.equal(state, torch.get_rng_state())


UNMARKED = {"aten::quantized_lstm.input": torch.ops.aten.quantized_lstm.input} | {
    "quantized::dropout": torch.ops.quantized.dropout.default
}
"""Operators that draw and do not say so."""


@pytest.mark.parametrize("name", [*(n for n in RANDOM if {n, n.partition(".")[0]} & DEVICES), *UNMARKED])
def test_a_kernel_that_draws_unseen_is_refused_by_name(name: str) -> None:
    func = RANDOM.get(name) or UNMARKED[name]
    args, kwargs = example(name, func)
    with private_random() as mode, raises_saying(ConfigError, str(func), "dropout"):
        mode.__torch_dispatch__(func, (), tuple(args), kwargs)
    with refuse_draws("It") as mode, raises_saying(ConfigError, "It drew", str(func), "generator=rng"):
        mode.__torch_dispatch__(func, (), tuple(args), kwargs)
    off = {"train": False, "training": False, "dropout": 0.0, "dropout_p": 0.0}
    names = [argument.name for argument in func._schema.arguments]
    quiet = [off.get(argument, value) for argument, value in zip(names, args, strict=False)]
    quiet_named = {argument: off.get(argument, value) for argument, value in kwargs.items()}
    assert drawn(func, tuple(quiet), quiet_named, Generators()) is NotImplemented


@pytest.mark.parametrize("name", sorted(DRAWN_BEFORE - {"rngprims::philox_rand"}))
def test_what_is_given_its_seed_is_left_alone(name: str) -> None:
    assert drawn(RANDOM[name], (), {}, Generators()) is NotImplemented


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_takes_the_mathematical_form(name: str, causal: bool) -> None:
    """Its kernels are elsewhere; what runs in their place is the same anywhere."""
    func, heads = RANDOM[name], torch.randn(3, 2, 4, 5, 8)
    q, k, v = heads
    arguments = {"query": q, "key": k, "value": v, "dropout_p": 0.4, "is_causal": causal, "scale": 0.3}
    bias = None
    for argument in func._schema.arguments:
        if argument.name == "attn_bias":
            bias = arguments["attn_bias"] = None if causal else torch.randn(5, 5)
        elif not argument.has_default_value() and argument.name not in arguments:
            arguments[argument.name] = False
    outs = drawn(func, (), arguments, Generators(SEED))
    keep = torch.empty(2, 4, 5, 5, dtype=torch.bool).bernoulli_(0.6, generator=torch.Generator().manual_seed(SEED))
    scores = q @ k.mT * 0.3 + (0 if bias is None else bias)
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1) > 0, -torch.inf)
    assert_close(outs[0], (scores.softmax(-1) * keep / 0.6) @ v)
    assert len(outs) == len(func._schema.returns)
    assert outs[1].isnan().all()  # what a backward pass would begin from
    q.requires_grad_()
    with raises_saying(ConfigError, str(func), "attn_implementation='eager'"):
        drawn(func, (), arguments, Generators(SEED))


class Generated(TorchDispatchMode):
    """Notes whether operators are given a generator, and computes none of them."""

    given: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawing = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | (kwargs or {})
        self.given = drawing.get("generator")
        return args[0], args[0]


def test_dropout_of_other_devices_is_given_the_generator() -> None:
    rng, x = Generators(), torch.ones(2)
    with Generated() as under:
        drawn(torch.ops.aten._fused_dropout.default, (x, 0.5), {}, rng)
    assert under.given._cdata == rng.on("cpu")._cdata


# -- what it means for code ---------------------------------------------------------------------------------------


def seeded(call: Callable[[], Any]) -> Any:
    """The independent form: torch's own generator, seeded."""
    torch.manual_seed(SEED)
    return call()


def assert_private(call: Callable[[], Any]) -> None:
    """``call`` gives the numbers of the seed and leaves torch's generator alone; the call before changes nothing."""
    expected = seeded(call)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for _ in range(2):
        with private_random(SEED):
            found = call()
        assert same(found, expected)
    assert torch.equal(state, torch.get_rng_state())
    assert not same(call(), expected), "nothing is drawn"


def noisy(x: Tensor) -> Tensor:
    x = F.dropout(x, 0.5) + torch.randn(3) * torch.rand_like(x) + torch.randperm(3)
    return F.alpha_dropout(x, 0.5, training=True) + torch.bernoulli(torch.full((3,), 0.5))


def test_transforms() -> None:
    x = torch.linspace(-1, 1, 6).view(2, 3)
    assert_private(lambda: noisy(x))
    assert_private(lambda: torch.vmap(noisy, randomness="different")(x))
    assert_private(lambda: torch.vmap(lambda row: F.dropout(row, 0.5), randomness="same")(x))
    assert_private(lambda: torch.func.grad(lambda y: noisy(y).square().sum())(x))
    assert_private(lambda: torch.func.jvp(noisy, (x,), (x,)))
    many = torch.vmap(torch.func.grad(lambda y: noisy(y).square().sum()), randomness="different")
    assert_private(lambda: many(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("without_graph", [torch.enable_grad, torch.inference_mode])
def test_recurrent_networks(kind: type[nn.RNNBase], without_graph: Callable[[], Any]) -> None:
    model, x = kind(4, 5, num_layers=3, dropout=0.5), torch.randn(2, 6, 4)
    with without_graph():
        assert_private(lambda: model(x)[0])
        with refuse_draws("It"):
            model.eval()(x)


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes))
    return model, {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}


def wav2vec2() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    layers = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4}
    # Its masks in time come from numpy.
    config = Wav2Vec2Config(
        **sizes, **layers, num_conv_pos_embedding_groups=2, layerdrop=0.5, mask_time_prob=0.0, classifier_proj_size=8
    )
    return Wav2Vec2ForSequenceClassification(config), {"input_values": torch.randn(2, 400)}


@pytest.mark.parametrize("build", [bert, wav2vec2])
@pytest.mark.parametrize("without_graph", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_models_in_training(build: Callable[[], Any], without_graph: Callable[[], Any]) -> None:
    model, inputs = build()
    model.train()
    with without_graph():
        assert_private(lambda: model(**inputs).logits)
    skipped: set[int] = set()
    for seed in range(5):
        ran: list[int] = []
        handles = [m.register_forward_hook(lambda *_, ran=ran: ran.append(1)) for m in model.modules()]
        with private_random(seed):
            model(**inputs)
        skipped.add(len(ran))
        for handle in handles:
            handle.remove()
    assert (len(skipped) > 1) == (build is wav2vec2)  # layers are dropped by the seed


def test_gradients() -> None:
    model, inputs = bert()
    model.train()
    weights = list(model.parameters())
    assert_private(lambda: torch.autograd.grad(model(**inputs).loss, weights, allow_unused=True))


def test_operators_of_others_written_in_python() -> None:
    with torch.library._scoped_library("funcdelta_tests", "DEF") as library:
        library.define("noise(Tensor x) -> Tensor")
        library.define("nothing(Tensor x) -> Tensor")
        library.impl("noise", lambda x: x + torch.rand_like(x), "CompositeExplicitAutograd")
        library.impl("nothing", lambda x: x + 1, "CompositeExplicitAutograd")
        own = torch.ops.funcdelta_tests
        assert_private(lambda: own.noise(torch.ones(3)))
        with torch.inference_mode():
            assert_private(lambda: own.noise(torch.ones(3)))
        with refuse_draws("It"):
            assert torch.equal(own.nothing(torch.ones(3)), torch.full((3,), 2.0))
            with raises_saying(ConfigError, "It drew", "aten.rand_like"):
                own.noise(torch.ones(3))


def test_a_generator_that_is_passed_is_used() -> None:
    def call() -> list[Tensor]:
        rng = torch.Generator().manual_seed(5)
        return [torch.rand(3, generator=rng), torch.empty(3).normal_(generator=rng), torch.poisson(torch.ones(3), rng)]

    expected = call()
    with private_random(), refuse_draws("It"):
        assert same(call(), expected)
    # torch's own counts as passed by nobody.
    assert_private(lambda: torch.rand(3, generator=torch.default_generator))
    with refuse_draws("It"), raises_saying(ConfigError, "It drew"):
        torch.rand(3, generator=torch.default_generator)


def test_what_draws_nothing_is_not_refused() -> None:
    x = torch.randn(2, 3, 4, 4)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    with refuse_draws("It"):
        F.dropout(x, 0.5, training=False), F.rrelu(x, training=False), F.dropout(x, 0.0)
        F.scaled_dot_product_attention(x, x, x)
        torch.native_dropout(x, 0.5, False)
        torch.empty(3, device="meta").normal_(), torch.rand(3, device="meta")
        layer(x[0])
        with torch.inference_mode():
            F.dropout(x, 0.5, training=False), layer(x[0])
        with private_random(SEED):  # its numbers are given
            numbers = torch.rand(3), F.dropout(x, 0.5)
    with private_random(SEED), refuse_draws("It"), raises_saying(ConfigError, "It drew"):
        torch.rand(3)
    assert same(numbers, seeded(lambda: (torch.rand(3), F.dropout(x, 0.5))))


def test_recomputing_in_a_backward_pass_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), torch.randn(4, 3)
    with private_random() as mode:
        loss = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum()
        with raises_saying(ConfigError, "backward pass", "checkpointing"):
            loss.backward()
        # One that begins in the backward pass may draw there: from where the forward pass began.
        y = torch.randn(4, 3, requires_grad=True)
        before = mode.generators.copy()
        expected = model(y)

        class Again(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor) -> Tensor:
                return y.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                with type(mode)(before):
                    assert torch.equal(model(y), expected)
                return gradient

        Again.apply(y).sum().backward()


def test_seeds() -> None:
    for seed in ("a", 1.5, 2**70):
        with raises_saying(ParamsError, "seed", repr(seed)):
            private_random(seed)  # type: ignore[arg-type]


# -- threads ------------------------------------------------------------------------------------------------------


def test_another_thread_draws_the_numbers_it_draws_alone() -> None:
    model, inputs = bert()
    model.train()
    alone = seeded(lambda: [torch.rand(()).item() for _ in range(1000)])
    with private_random(SEED):
        expected = model(**inputs).logits
    started, ended = threading.Barrier(3, timeout=5), threading.Event()
    agrees: list[bool] = []

    def calls() -> None:
        started.wait()
        while not ended.is_set() and len(agrees) < 2000:
            with private_random(SEED):
                agrees.append(torch.equal(model(**inputs).logits, expected))

    threads = [threading.Thread(target=calls) for _ in range(2)]
    torch.manual_seed(SEED)
    for thread in threads:
        thread.start()
    started.wait()
    meanwhile = []
    for i in range(1000):
        meanwhile.append(torch.rand(()).item())
        if i % 25 == 0:
            time.sleep(0.005)  # the others take their turn
    ended.set()
    for thread in threads:
        thread.join(5)
    assert meanwhile == alone
    assert len(agrees) > 5
    assert all(agrees)


@pytest.mark.parametrize("block", [private_random, lambda: refuse_draws("It")])
def test_threads_that_take_turns_leave_no_mark_on_the_process(block: Callable[[], Any]) -> None:
    """Where the first to enter leaves before the second."""
    entered, first_left = threading.Event(), threading.Event()

    def second() -> None:
        with block():
            entered.set()
            first_left.wait(3)

    thread = threading.Thread(target=second)
    with block():
        thread.start()
        assert entered.wait(3)
    first_left.set()
    thread.join(3)
    assert not _python_dispatch.is_in_torch_dispatch_mode()
    assert not _python_dispatch.is_in_any_mode_without_ignore_compile_internals()


def test_torchs_operators_stay_the_same_objects() -> None:
    """Torch's tables are by operator: one that was made again would be in none of them."""
    before = {name: getattr(torch.ops.aten.rand, name) for name in torch.ops.aten.rand.overloads()}
    randomness._find(before["default"])
    assert all(getattr(torch.ops.aten.rand, name) is overload for name, overload in before.items())
