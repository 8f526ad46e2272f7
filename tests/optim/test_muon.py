"""Muon against the iteration on singular values and against torch; its members: test_optim_extensions.py."""

from __future__ import annotations

import pytest
import torch
from optim_cases import EXACT, by_us, gradient, start
from torch import Tensor

import funcdelta as fd
from funcdelta import optim
from funcdelta.optim.muon import orthogonalise


def quintic(matrix: Tensor, steps: int) -> Tensor:
    """The iteration on the singular values themselves."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4), (1, 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalise_acts_on_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    matrices = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrices[1, :, 1:] = 0.0  # of rank 1: what is absent is not made up
    found = orthogonalise(matrices, steps)
    torch.testing.assert_close(found, torch.stack([quintic(one, steps) for one in matrices]), **EXACT)
    assert orthogonalise(torch.zeros(shape)).count_nonzero() == 0


@pytest.mark.parametrize(("nesterov", "momentum", "decay"), [(True, 0.95, 0.0), (False, 0.8, 0.1)])
def test_muon_is_that_of_torch_on_matrices_and_adamw_elsewhere(nesterov: bool, momentum: float, decay: float) -> None:
    """torch's iterates in bfloat16, so that the first steps agree to its digits."""
    opt = optim.muon(0.02, momentum, decay, nesterov=nesterov)
    found, state = by_us(opt, start(0), 4)
    leaves = {name: torch.nn.Parameter(x.clone()) for name, x in start(0).items()}
    kinds = {True: torch.optim.Muon, False: torch.optim.AdamW}
    extra = {
        True: {"momentum": momentum, "nesterov": nesterov, "adjust_lr_fn": "match_rms_adamw"},
        False: {"betas": (0.9, 0.999)},
    }
    theirs = [
        kinds[two]([x for x in leaves.values() if (x.ndim == 2) == two], lr=0.02, weight_decay=decay, **extra[two])
        for two in (True, False)
    ]
    for _ in range(4):
        for name, g in gradient({name: x.detach() for name, x in leaves.items()}).items():
            leaves[name].grad = g
        for one in theirs:
            one.step()
    for name, leaf in leaves.items():
        moved, expected = found[name] - start(0)[name], leaf.detach() - start(0)[name]
        torch.testing.assert_close(moved, expected, **({"rtol": 0.02, "atol": 4e-4} if leaf.ndim == 2 else EXACT))
    assert fd.inspect.inspect_optimizer(state, verbose=False)[0].trainable_parameters == 30


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_the_loop_by_singular_values(nesterov: bool) -> None:
    opt = optim.muon(0.02, 0.9, 0.1, nesterov=nesterov, iterations=3)
    found, _ = by_us(opt, start(1))
    p = start(1)
    moved = [name for name, x in p.items() if x.ndim == 2]
    m = {name: torch.zeros_like(p[name]) for name in moved}
    for _ in range(25):
        g = gradient(p)
        for name in moved:
            m[name] = 0.9 * m[name] + 0.1 * g[name]
            step = quintic(0.9 * m[name] + 0.1 * g[name] if nesterov else m[name], 3)
            p[name] = p[name] - 0.02 * (0.2 * 2.0 * step + 0.1 * p[name])
    for name in moved:
        torch.testing.assert_close(found[name], p[name], rtol=1e-7, atol=1e-8)


def test_muon_moves_the_matrices_that_are_named() -> None:
    opt = optim.muon(0.1, matrices=["lora_A"])
    state = opt.init(start(0))
    assert list(state.mu) == ["layer.0.q.lora_A"]
    assert list(state.adam.mu) == ["layer.0.q.lora_B", "head.bias", "temperature"]
    found, _ = by_us(opt, start(0), 3)
    by_adam, _ = by_us(optim.adamw(0.1), start(0), 3)
    by_muon, _ = by_us(optim.muon(0.1), start(0), 3)
    for name in found:
        assert torch.equal(found[name], (by_muon if "lora_A" in name else by_adam)[name])
    assert not torch.allclose(by_muon["layer.0.q.lora_B"], by_adam["layer.0.q.lora_B"], rtol=1e-2)
