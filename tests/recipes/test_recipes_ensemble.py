"""Entropies and the area under the ROC curve against sums and pairs written out, and against scikit-learn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import funcdelta as fd
from funcdelta.recipes import ensemble


def draw(*shape: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=rng, dtype=torch.float64)).softmax(-1)


def slow_entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def test_disagreement_is_the_mutual_information_of_member_and_answer() -> None:
    probabilities = draw(4, 6, 3)
    found = ensemble.disagreement(probabilities)
    together = ensemble.predictive_entropy(probabilities)
    for row in range(6):
        joint = [[p / 4 for p in probabilities[i, row].tolist()] for i in range(4)]  # p(member, answer)
        answer = [sum(column) for column in zip(*joint, strict=True)]
        information = sum(p * math.log(p / (answer[c] / 4)) for member in joint for c, p in enumerate(member))
        assert found[row].item() == pytest.approx(information, abs=1e-12)
        assert together[row].item() == pytest.approx(slow_entropy(answer), abs=1e-12)


def test_certain_members_disagree_about_everything() -> None:
    certain = torch.eye(3).unsqueeze(1)  # three members, one row
    assert ensemble.entropy(certain).tolist() == [[0.0], [0.0], [0.0]]
    torch.testing.assert_close(ensemble.disagreement(certain), torch.tensor([math.log(3)]))


def test_one_member_does_not_disagree_with_itself() -> None:
    torch.testing.assert_close(ensemble.disagreement(draw(1, 5, 3)), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_auroc_counts_pairs(ties: bool, lead: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(1)
    inside = torch.randn(*lead, 17, generator=rng, dtype=torch.float64)
    outside = torch.randn(*lead, 11, generator=rng, dtype=torch.float64) + 0.5
    if ties:
        inside, outside = inside.round(), outside.round()
    found = ensemble.auroc(inside, outside)
    assert found.shape == lead
    rows = zip(inside.reshape(-1, 17).tolist(), outside.reshape(-1, 11).tolist(), strict=True)
    expected = [sum((o > i) + (o == i) / 2 for i in one for o in other) / (17 * 11) for one, other in rows]
    torch.testing.assert_close(found.reshape(-1), torch.tensor(expected, dtype=torch.float64))


def test_auroc_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = torch.Generator().manual_seed(2)
    inside = torch.randint(8, (40,), generator=rng).double()
    outside = torch.randint(2, 10, (25,), generator=rng).double()
    expected = metrics.roc_auc_score([0] * 40 + [1] * 25, torch.cat([inside, outside]).numpy())
    assert ensemble.auroc(inside, outside).item() == pytest.approx(expected)


def test_auroc_of_nothing_known_is_not_a_number() -> None:
    assert ensemble.auroc(torch.tensor([0.0, math.nan]), torch.tensor([1.0])).isnan()
    assert ensemble.auroc(torch.tensor([0.0, 1.0]), torch.tensor([math.inf])) == 1


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(fd.errors.ParamsError, match=r"auroc compares scores \(\.\.\., a\)"):
        ensemble.auroc(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(fd.errors.ParamsError, match="a and b at least 1"):
        ensemble.auroc(torch.zeros(0), torch.zeros(3))
    with pytest.raises(fd.errors.ParamsError, match="a and b at least 1"):
        ensemble.auroc(torch.tensor(0.0), torch.zeros(3))
    with pytest.raises(fd.errors.ParamsError, match=r"for one member, entropy"):
        ensemble.disagreement(torch.ones(3))


def test_members_of_a_stack_say_what_they_say_alone() -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["0", "2"])
    stack = fd.tree.randn_like(delta.init(0, n=3), [1, 2, 3])
    x = torch.randn(5, 3)
    found = ensemble.disagreement(delta.apply_many(stack, x).softmax(-1))
    alone = [delta.apply(params, x).softmax(-1) for params in fd.unstack(stack)]
    mean = sum(alone) / 3
    expected = [
        slow_entropy(mean[row].tolist()) - sum(slow_entropy(p[row].tolist()) for p in alone) / 3 for row in range(5)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_disagreement_of_late_members_on_a_shared_trunk_and_its_gradients() -> None:
    """A score that couples members, whose deltas are in the last of three layers, beside a trained head."""
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)]
    backbone = torch.nn.Sequential(*layers, torch.nn.Linear(4, 3)).double()
    delta = fd.LoraModel(backbone, lora_r=2, modified_modules=["2.0"], unfrozen_modules=["deltas", "3"])
    stack = fd.tree.randn_like(delta.init(0, n=3), [1, 2, 3])
    x = torch.randn(5, 4, dtype=torch.float64)

    def together(stack: dict[str, Tensor]) -> Tensor:
        return ensemble.disagreement(delta.apply_many(stack, x, engine="trunk").softmax(-1)).sum()

    def alone(stack: dict[str, Tensor]) -> Tensor:
        logits = torch.stack([delta.apply(params, x) for params in fd.unstack(stack)])
        return ensemble.disagreement(logits.softmax(-1)).sum()

    torch.testing.assert_close(together(stack), alone(stack))
    slow = torch.func.grad(alone)(stack)
    assert all(slow[name].abs().sum() > 0 for name in ("2.0.lora.lora_A", "2.0.lora.lora_B", "3.weight"))
    torch.testing.assert_close(torch.func.grad(together)(stack), slow)
