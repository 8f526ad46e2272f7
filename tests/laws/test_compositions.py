"""Compositions: what parts do together, against the same parts as configs of their own, or computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from custom_methods import DoraConfig, GateConfig, RowScaleConfig, VeraConfig
from handmade import raises_saying
from torch import Tensor, nn

import funcdelta as fd

HERE = {"modified_modules": ["0", "2"]}
LORA, OTHER = fd.LoraConfig(lora_r=2), fd.LoraConfig(lora_r=3, lora_alpha=4)
ADAPTER, BIAS = fd.AdapterConfig(bottleneck_dim=3), fd.BitFitConfig()
COMPOSITIONS: dict[str, Callable[[], fd.BaseDeltaConfig]] = {
    "chain": lambda: fd.chain(LORA, ADAPTER, **HERE),
    "chain that merges": lambda: fd.chain(OTHER, BIAS, **HERE),
    "parallel": lambda: fd.parallel(LORA, ADAPTER, OTHER, **HERE),
    "average": lambda: fd.average(LORA, BIAS, shares=(0.7, 0.5), **HERE),
    "mixture by token": lambda: fd.mixture(LORA, BIAS, ADAPTER, **HERE),
    "acts before": lambda: fd.mixture(LORA, GateConfig(), **HERE),
    "mixture by call": lambda: fd.mixture(LORA, OTHER, gate="call", **HERE),
    "bases of all members": lambda: fd.parallel(LORA, VeraConfig(), **HERE),
    "nested": lambda: fd.mixture(fd.chain(LORA, fd.average(BIAS, OTHER)), fd.parallel(OTHER, ADAPTER), **HERE),
    "shared leaves": lambda: fd.chain(
        fd.CompacterConfig(shared_phm_rule=True, reduction_factor=2, hypercomplex_division=2), LORA, **HERE
    ),
}
every = pytest.mark.parametrize("name", COMPOSITIONS)


def backbone() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)).eval()


def moved(params: dict[str, Tensor], delta: fd.DeltaModel, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(leaf.shape, generator=rng) * 0.3 for name, leaf in params.items()}
    return {name: leaf if name in delta.constants else leaf + noise[name] for name, leaf in params.items()}


def subject(name: str) -> tuple[fd.DeltaModel, dict[str, Tensor], Tensor]:
    delta = fd.DeltaModel(backbone(), COMPOSITIONS[name]())
    return delta, moved(delta.init(0, n=3), delta), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5 * max(1.0, float(expected.detach().abs().max())))


def by_hand(config: Any, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
    """What a composition gives at one site, written out; parts of other configs by their own functions."""
    if not isinstance(config, fd.methods.composition.Composition):
        return config.after(site, p, y, x) if config.gives("after") else y
    parts = [
        (part, {leaf.removeprefix(f"{name}."): t for leaf, t in p.items() if leaf.startswith(f"{name}.")})
        for name, part in config.named.items()
    ]
    if config.delta_type == "chain":
        for part, own in parts:
            y = by_hand(part, site, own, y, x)
        return y
    shares: Any = [1.0] * len(parts)
    if config.delta_type == "average":
        shares = p["shares"]
    if config.delta_type == "mixture":
        logits = p["gate.bias"] if "gate.weight" not in p else y @ p["gate.weight"].T + p["gate.bias"]
        shares = logits.softmax(-1).split(1, -1)
    return y + sum(s * (by_hand(part, site, own, y, x) - y) for s, (part, own) in zip(shares, parts, strict=True))


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name not in ("shared leaves", "acts before")])
def test_what_it_computes(name: str) -> None:
    delta, stack, x = subject(name)
    params, value = fd.take(stack, 1), x
    for path, module in backbone().named_children():
        y = module(value)
        here = [a for a in delta.plan.all() if a.site.path == path]
        for a in here:
            y = by_hand(a.config, a.site, {**a.fixed, **a.of(params)}, y, value)
        value = y
    close(delta.apply(params, x), value)


@every
def test_engines_rows_views_and_merging_agree(name: str) -> None:
    delta, stack, x = subject(name)
    loop = delta.apply_many(stack, x, engine="loop")
    for engine in ("vmap", "fold", "auto"):
        close(delta.apply_many(stack, x, engine=engine), loop)
    index = [2, 0, -1, 1, 1]
    rows = delta.apply_rows(stack, index, x)
    bare = delta.apply({}, x)
    close(rows, torch.stack([bare[i] if m < 0 else loop[m][i] for i, m in enumerate(index)]))
    close(delta.bind(fd.take(stack, 1))(x), loop[1])
    refusals = [a.acts().unmergeable for a in delta.plan.all()]
    if any(refusals):
        with raises_saying(fd.MergeError, "its"):
            delta.merge(fd.take(stack, 0))
    else:
        close(delta.merged(fd.take(stack, 0))(x), loop[0])
        assert name in ("chain that merges", "average", "mixture by call", "bases of all members")


@every
def test_gradients_of_a_fold_are_those_of_each_alone(name: str) -> None:
    delta, stack, x = subject(name)
    losses, grads = fd.value_and_grad(lambda p: delta.apply_many(p, x).square().sum((1, 2)))(stack)
    for i in range(3):
        alone = {key: leaf.clone().requires_grad_() for key, leaf in fd.take(stack, i).items()}
        delta.apply(alone, x).square().sum().backward()
        for key, leaf in alone.items():
            if key not in delta.constants:
                close(grads[key][i], leaf.grad if leaf.grad is not None else torch.zeros_like(leaf))
    assert losses.shape == (3,)


@every
def test_saving_and_packing(name: str, tmp_path: Path) -> None:
    delta, stack, x = subject(name)
    folder = delta.save_finetuned(stack, tmp_path / "run")
    loaded, again = fd.AutoDeltaModel.from_finetuned(folder, backbone_model=delta.backbone)
    assert loaded.configs[0].replace(backbone_class=None) == delta.configs[0]
    assert all(torch.equal(again[key], leaf) for key, leaf in stack.items())
    other = fd.LoraModel(delta.backbone, lora_r=1, modified_modules=["2"])
    pairs = [(delta, fd.take(stack, 0)), (other, moved(other.init(3), other)), (delta, fd.take(stack, 2))]
    packed, both = fd.pack(pairs)
    outputs = packed.apply_many(both, x)
    for out, (one, params) in zip(outputs, pairs, strict=True):
        close(out, one.apply(params, x))
    for (_, back), (_, params) in zip(fd.unpack(packed, both), pairs, strict=True):
        assert all(torch.equal(back[key], leaf) for key, leaf in params.items())


def test_unlike_ranks_share_one_packed_config() -> None:
    model, x = backbone(), torch.randn(5, 4)
    deltas = [fd.DeltaModel(model, fd.parallel(LORA.replace(lora_r=r), OTHER, **HERE)) for r in (1, 4)]
    pairs = [(delta, moved(delta.init(i), delta, i)) for i, delta in enumerate(deltas)]
    packed, stack = fd.pack(pairs)
    assert len(packed.configs) == 1
    assert stack["0.parallel.lora.lora_A"].shape == (2, 4, 4)
    for out, (delta, params) in zip(packed.apply_many(stack, x), pairs, strict=True):
        close(out, delta.apply(params, x))


def test_parts_that_differ_in_dropout_do_not_share_a_packed_config() -> None:
    model = backbone()
    configs = [fd.chain(LORA.replace(lora_dropout=p), ADAPTER, **HERE) for p in (0.0, 0.5)]
    pairs = [(delta, delta.init(0)) for delta in (fd.DeltaModel(model, config) for config in configs)]
    assert len(fd.pack(pairs)[0].configs) == 2


def test_what_a_part_draws_depends_on_no_other() -> None:
    first = [fd.DeltaModel(backbone(), fd.chain(part, OTHER, **HERE)).init(7) for part in (LORA, ADAPTER)]
    keys = [key for key in first[0] if key in first[1]]
    assert any(key.endswith("lora_A") for key in keys) or keys == []
    one, two = (fd.DeltaModel(backbone(), fd.chain(p, ADAPTER, **HERE)).init(7) for p in (LORA, OTHER))
    assert all(torch.equal(one[key], two[key]) for key in one if ".adapter." in key)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: fd.chain(), ["fd.chain takes configs"]),
        (lambda: fd.chain(LORA, fd.SoftPromptConfig()), ["soft_prompt", "longer", "beside it"]),
        (lambda: fd.parallel(LORA, fd.PrefixConfig()), ["prefix", "attention"]),
        (lambda: fd.mixture(LORA, fd.ParallelAdapterConfig()), ["parallel_adapter", "another"]),
        (lambda: fd.mixture(LORA, gate="row"), ["gate='row'", "call"]),
        (lambda: fd.average(LORA, OTHER, shares=(1.0,)), ["shares", "2 parts"]),
        (lambda: fd.average(LORA, OTHER, shares=0.5), ["shares=0.5", "2 parts"]),
        (lambda: fd.DeltaModel(backbone(), fd.average(LORA.replace(name="shares"), **HERE)), ["'shares", "below"]),
        (lambda: fd.chain(LORA.replace(batch_dim=1)), ["batch_dim", "fd.chain(..., batch_dim=...)"]),
        (
            lambda: fd.chain(LORA.replace(modified_modules=["0"]), OTHER.replace(modified_modules=["2"])),
            ["['0']", "['2']", "modified_modules=[...]"],
        ),
    ],
)
def test_what_is_refused(make: Callable[[], Any], words: list[str]) -> None:
    with raises_saying(fd.ConfigError, *words):
        make()


def test_a_part_without_weights_form_cannot_stand_beside_one_that_has_no_other() -> None:
    with raises_saying(fd.MatchError, "test_rows", "weights", "adapter"):
        fd.DeltaModel(backbone(), fd.chain(RowScaleConfig(), ADAPTER, **HERE))

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with raises_saying(fd.MatchError, "lora", "Doubled", "adapter"):
        fd.DeltaModel(nn.Sequential(Doubled(4, 4)), fd.chain(LORA, ADAPTER, modified_modules=["0"]))
    delta = fd.DeltaModel(nn.Sequential(Doubled(4, 4)), fd.chain(LORA, RowScaleConfig(), modified_modules=["0"]))
    params, x = moved(delta.init(0), delta), torch.randn(3, 4)
    close(delta.apply(params, x), delta.merged(params)(x))


def test_what_reads_the_weight_stands_first_in_a_chain() -> None:
    with raises_saying(fd.MatchError, "test_dora", "put it first"):
        fd.DeltaModel(backbone(), fd.chain(LORA, DoraConfig(), **HERE))
    with raises_saying(fd.ConfigError, '"own"'):
        fd.chain(LORA.replace(name="own"), ADAPTER)
    for config in (fd.chain(DoraConfig(), LORA, **HERE), fd.parallel(LORA, DoraConfig(), **HERE)):
        delta = fd.DeltaModel(backbone(), config)
        params, x = moved(delta.init(0), delta), torch.randn(5, 4)
        close(delta.apply(params, x), delta.merged(params)(x))


def test_gates_train() -> None:
    """Members whose gates start equal learn which part a task needs."""
    model, x = backbone(), torch.randn(64, 4)
    delta = fd.DeltaModel(model, fd.mixture(LORA, OTHER, gate="call", modified_modules=["0"]))
    params = moved(delta.init(0), delta)
    target = delta.apply(params | {"0.mixture.gate.bias": torch.tensor([4.0, -4.0])}, x).detach()
    gate = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([gate], lr=0.1)
    for _ in range(100):
        loss = (delta.apply(params | {"0.mixture.gate.bias": gate}, x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert gate[0] - gate[1] > 2


def test_parts_with_other_sites_of_their_own_are_not_put_at_those_of_the_first() -> None:
    with raises_saying(fd.MatchError, "fd.chain", "lora at", "adapter at", "modified_modules=[...]"):
        fd.DeltaModel(backbone(), fd.chain(LORA, ADAPTER))


def test_gates_of_tokens_find_the_features_of_a_convolution_together_and_apart() -> None:
    """In a fold all members share one call only where features come last."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(3, 4, 1)).eval(), torch.randn(4, 3, 4)
    delta = fd.DeltaModel(model, fd.mixture(GateConfig(), GateConfig(), modified_modules=["0"]))
    assert not delta.plan.all()[0].acts().tokenwise
    stack = moved(delta.init(0, n=3), delta)
    loop = delta.apply_many(stack, x, engine="loop")
    close(delta.apply_many(stack, x, engine="fold"), loop)
    assert delta.explain(stack, x)


@pytest.mark.parametrize("config", [LORA, RowScaleConfig(), fd.parallel(LORA, OTHER)])
def test_merging_a_coarse_member_rounds_no_weight_of_the_backbone(config: fd.BaseDeltaConfig) -> None:
    model = backbone()
    delta = fd.DeltaModel(model, config.replace(**HERE))
    assert torch.equal(delta.merge(delta.init(0, dtype=torch.bfloat16))["0.weight"], model[0].weight)
