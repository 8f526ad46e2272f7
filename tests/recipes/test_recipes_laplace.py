"""Laplace approximations against Bayesian linear regression, J'HJ written out, and integrals done numerically."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import funcdelta as fd
from funcdelta.recipes import laplace

SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
NOISE, PRIOR = 0.4, 1.7


class Regression:
    """y = X w + noise, with the posterior, predictive and evidence of Bayesian linear regression in closed form."""

    def __init__(self, prior: float = PRIOR, noise: float = NOISE) -> None:
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(9, 4, generator=rng, dtype=torch.float64)
        self.y = self.x @ torch.randn(4, 1, generator=rng, dtype=torch.float64) + 0.3 * torch.randn(
            9, 1, generator=rng, dtype=torch.float64
        )
        self.other = torch.randn(5, 4, generator=rng, dtype=torch.float64)
        precision = self.x.T @ self.x / noise**2 + prior * torch.eye(4, dtype=torch.float64)
        self.covariance = precision.inverse()
        self.best = {"w": self.covariance @ self.x.T @ self.y / noise**2}
        self.likelihood = (
            torch.distributions.Normal(self.x @ self.best["w"], torch.tensor(noise)).log_prob(self.y).sum()
        )
        marginal = noise**2 * torch.eye(9, dtype=torch.float64) + self.x @ self.x.T / prior
        zeros = torch.zeros(9, dtype=torch.float64)
        self.evidence = torch.distributions.MultivariateNormal(zeros, marginal).log_prob(self.y[:, 0])

    @staticmethod
    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ params["w"]

    def posterior(self, noise: float = NOISE) -> laplace.Full:
        return laplace.full_posterior(self.best, self.matrix(noise))

    def matrix(self, noise: float = NOISE) -> Tensor:
        return laplace.ggn(self.model, self.best, self.x, root=lambda outputs: laplace.gaussian(outputs, noise))


def test_full_laplace_of_a_linear_model_is_bayesian_regression() -> None:
    known = Regression()
    posterior = known.posterior()
    mean, covariance = laplace.linearised(known.model, posterior, PRIOR, known.other)
    torch.testing.assert_close(mean, known.other @ known.best["w"])
    expected = torch.stack([row @ known.covariance @ row for row in known.other])
    torch.testing.assert_close(covariance, expected[:, None, None])
    torch.testing.assert_close(laplace.log_evidence(posterior, PRIOR, known.likelihood), known.evidence)


def test_the_covariance_of_the_params_is_that_of_bayesian_regression() -> None:
    """Predicted at the unit vectors, the covariance is Σ's diagonal; back and into are inverse to each other."""
    known = Regression()
    posterior = known.posterior()
    rotated = posterior.basis @ (posterior.curvature + PRIOR).reciprocal().diag() @ posterior.basis.T
    torch.testing.assert_close(rotated, known.covariance)
    torch.testing.assert_close(posterior.back(posterior.into(known.best))["w"], known.best["w"])


def test_draws_have_the_covariance_of_the_posterior() -> None:
    known = Regression()
    draws = laplace.sample(known.posterior(), PRIOR, seed=0, n=20_000)["w"][..., 0]
    torch.testing.assert_close(draws.mean(0), known.best["w"][:, 0], rtol=0, atol=0.02)
    torch.testing.assert_close(draws.T.cov(), known.covariance, rtol=0.05, atol=5e-4)


def test_evidence_rates_priors_as_the_marginal_likelihood_does() -> None:
    priors = [0.1, 1.0, 10.0]
    found = [laplace.log_evidence(Regression(p).posterior(), p, Regression(p).likelihood) for p in priors]
    expected = [Regression(p).evidence for p in priors]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_the_slope_of_the_evidence_is_that_of_finite_differences() -> None:
    known = Regression()
    posterior = known.posterior()
    centre = {"w": torch.full((4, 1), 0.1, dtype=torch.float64)}
    prior = torch.tensor(PRIOR, dtype=torch.float64)
    slope = torch.func.grad(lambda p: laplace.log_evidence(posterior, p, known.likelihood, centre=centre))(prior)
    up, down = (laplace.log_evidence(posterior, PRIOR + s, known.likelihood, centre=centre) for s in (1e-5, -1e-5))
    torch.testing.assert_close(slope, (up - down) / 2e-5, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("centre", [None, {"w": torch.full((4, 1), 0.1, dtype=torch.float64)}], ids=["0", "c"])
def test_the_chosen_prior_has_the_most_evidence(centre) -> None:
    posterior = Regression().posterior()
    chosen = laplace.choose_prior(posterior, 1.0, centre=centre)
    grid = chosen * torch.logspace(-1, 1, 41, dtype=torch.float64)
    values = torch.vmap(lambda p: laplace.log_evidence(posterior, p, 0.0, centre=centre))(grid)
    assert int(values.argmax()) == 20  # the middle of the grid, the chosen prior itself
    slope = torch.func.grad(lambda p: laplace.log_evidence(posterior, p, 0.0, centre=centre))(chosen)
    torch.testing.assert_close(slope * chosen, torch.zeros_like(slope), rtol=0, atol=1e-6)


class Few:
    """LoRA and a head on a tiny BERT in float64; what has a posterior is chosen by name."""

    def __init__(self, targets: str | list[str], rows: int = 4) -> None:
        torch.manual_seed(0)
        backbone = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **SIZES)).double().eval()
        self.delta = fd.LoraModel(
            backbone, lora_r=2, modified_modules=["query", "value"], unfrozen_modules=["deltas", "classifier"]
        )
        start = fd.tree.randn_like(self.delta.init(0, dtype=torch.float64), 1)
        self.some, self.rest = fd.partition(start, targets)
        rng = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(20, (rows, 5), generator=rng)
        self.labels = torch.randint(3, (rows,), generator=rng)

    def model(self, some: dict[str, Tensor], tokens: Tensor) -> Tensor:
        return self.delta.apply(fd.combine(some, self.rest), input_ids=tokens).logits

    def jacobian(self, row: int) -> Tensor:
        """∂ logits / ∂ leaves of one row, (3, d), one logit after the other by autograd."""
        leaves = {name: leaf.clone().requires_grad_() for name, leaf in self.some.items()}
        logits = self.model(leaves, self.tokens[row : row + 1])[0]
        gradients = [torch.autograd.grad(logit, list(leaves.values()), retain_graph=True) for logit in logits]
        return torch.stack([torch.cat([part.flatten() for part in one]) for one in gradients])

    def hessian(self, row: int) -> Tensor:
        """∂² cross-entropy / ∂ logits², (3, 3), by autograd."""
        logits = self.model(self.some, self.tokens[row : row + 1])[0].detach()
        return torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, self.labels[row]), logits)

    def matrix(self) -> Tensor:
        parts = [(self.jacobian(row), self.hessian(row)) for row in range(len(self.tokens))]
        return sum((j.T @ h @ j for j, h in parts), torch.zeros((), dtype=torch.float64))


@pytest.fixture(scope="module", params=["classifier", "[r].*layer\\.1\\..*(lora_A|lora_B)"], ids=["head", "lora"])
def few(request) -> Few:
    return Few(request.param)


def test_ggn_is_its_definition(few: Few) -> None:
    expected = few.matrix()
    found = laplace.ggn(few.model, few.some, few.tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(laplace.ggn(few.model, few.some, few.tokens, chunk_size=3), expected)
    halves = [laplace.ggn(few.model, few.some, part) for part in few.tokens.split(3)]
    torch.testing.assert_close(halves[0] + halves[1], expected)


def test_the_diagonal_is_that_of_the_matrix(few: Few) -> None:
    found = laplace.ggn_diagonal(few.model, few.some, few.tokens)
    assert {name: leaf.shape for name, leaf in found.items()} == {n: leaf.shape for n, leaf in few.some.items()}
    torch.testing.assert_close(fd.tree.ravel(found)[0], few.matrix().diagonal())


def test_ggn_of_a_linear_head_is_the_whole_hessian() -> None:
    """In a head the logits are linear, so that the Gauss-Newton matrix is the Hessian of the loss."""
    few = Few("classifier")
    vector, unravel = fd.tree.ravel(few.some)
    with fd.grad.higher_order():
        hessian = torch.autograd.functional.hessian(
            lambda v: F.cross_entropy(few.model(unravel(v), few.tokens), few.labels, reduction="sum"), vector
        )
    torch.testing.assert_close(laplace.ggn(few.model, few.some, few.tokens), hessian)


def slow_blocks(matrix: Tensor, some: dict[str, Tensor]) -> list[Tensor]:
    """The blocks of single leaves on the diagonal of a matrix over all of them."""
    ends = torch.tensor([leaf.numel() for leaf in some.values()]).cumsum(0).tolist()
    return [
        matrix[end - leaf.numel() : end, end - leaf.numel() : end]
        for end, leaf in zip(ends, some.values(), strict=True)
    ]


STRUCTURES = ["diagonal", "kfac", "full"]


def fit(structure: str, f, params: dict[str, Tensor], *data: Tensor, root=laplace.categorical) -> laplace.Posterior:
    if structure == "diagonal":
        return laplace.diagonal_posterior(params, laplace.ggn_diagonal(f, params, *data, root=root))
    if structure == "full":
        return laplace.full_posterior(params, laplace.ggn(f, params, *data, root=root))
    return laplace.kfac_posterior(params, laplace.kronecker_factors(f, params, *data, root=root), len(data[0]))


def dense(structure: str, few: Few) -> Tensor:
    """H in each structure, as one matrix, from autograd; KFAC's by its definition, with sums over entries."""
    matrix = few.matrix()
    if structure == "full":
        return matrix
    if structure == "diagonal":
        return matrix.diagonal().diag()
    blocks = []
    for block, leaf in zip(slow_blocks(matrix, few.some), few.some.values(), strict=True):
        out, inner = (leaf.shape[0], leaf[0].numel())
        four = block.reshape(out, inner, out, inner)
        g, a = torch.einsum("ikjk->ij", four), torch.einsum("kikj->ij", four)
        blocks.append(torch.kron(g, a) / block.trace())
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_linearised_predictive_is_its_definition(structure: str, few: Few) -> None:
    covariance = (dense(structure, few) + PRIOR * torch.eye(len(few.matrix()), dtype=torch.float64)).inverse()
    posterior = fit(structure, few.model, few.some, few.tokens)
    mean, found = laplace.linearised(few.model, posterior, PRIOR, few.tokens)
    torch.testing.assert_close(mean, few.model(few.some, few.tokens))
    for row in range(len(few.tokens)):
        jacobian = few.jacobian(row)
        torch.testing.assert_close(found[row], jacobian @ covariance @ jacobian.T)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_evidence_is_its_definition(structure: str, few: Few) -> None:
    matrix = dense(structure, few) + PRIOR * torch.eye(len(few.matrix()), dtype=torch.float64)
    vector = fd.tree.ravel(few.some)[0]
    likelihood = -F.cross_entropy(few.model(few.some, few.tokens), few.labels, reduction="sum")
    expected = likelihood - PRIOR / 2 * vector @ vector + len(vector) / 2 * math.log(PRIOR) - matrix.logdet() / 2
    posterior = fit(structure, few.model, few.some, few.tokens)
    torch.testing.assert_close(laplace.log_evidence(posterior, PRIOR, likelihood), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_draws_of_every_structure_have_its_covariance(structure: str) -> None:
    few = Few("classifier.weight")
    prior = 0.02  # wide, so that the structures differ
    expected = (dense(structure, few) + prior * torch.eye(24, dtype=torch.float64)).inverse()
    draws = laplace.sample(fit(structure, few.model, few.some, few.tokens), prior, seed=0, n=20_000)
    flat = draws["classifier.weight"].flatten(1)
    assert flat.shape == (20_000, 24)
    torch.testing.assert_close(flat.mean(0), few.some["classifier.weight"].flatten(), rtol=0, atol=0.2)
    variances = expected.diagonal()
    error = ((variances[:, None] * variances + expected.square()) / len(flat)).sqrt()  # of a sample covariance
    assert ((flat.T.cov() - expected).abs() / error).max() < 5.5


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_stack_of_posteriors_is_that_of_each_member(structure: str) -> None:
    few = Few("classifier")
    stack = fd.tree.add(fd.broadcast(few.some, 3), fd.tree.randn_like(fd.broadcast(few.some, 3), [1, 2, 3]))
    priors = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)

    def member(params: dict[str, Tensor], prior: Tensor) -> tuple[Tensor, Tensor, Tensor, laplace.Posterior]:
        posterior = fit(structure, few.model, params, few.tokens)
        mean, covariance = laplace.linearised(few.model, posterior, prior, few.tokens)
        chosen = laplace.choose_prior(posterior, prior, steps=3)
        return mean, covariance, laplace.log_evidence(posterior, chosen, 0.0), posterior

    *found, posteriors = torch.vmap(member)(stack, priors)
    alone = [member(params, prior)[:3] for params, prior in zip(fd.unstack(stack), priors, strict=True)]
    for one, column in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(column))
    second = fd.take(posteriors, 1)
    assert type(second) is type(fit(structure, few.model, few.some, few.tokens))
    drawn = laplace.sample(second, 1e12, seed=0, n=2)  # so narrow that draws are the mean
    torch.testing.assert_close(drawn["classifier.weight"][1], stack["classifier.weight"][1], rtol=0, atol=1e-4)


def test_kfac_is_exact_for_one_row_of_a_linear_layer() -> None:
    few = Few("classifier.weight", rows=1)
    factors = laplace.kronecker_factors(few.model, few.some, few.tokens)
    a, g = factors["classifier.weight"]
    torch.testing.assert_close(torch.kron(g, a), few.matrix())


def test_kfac_is_exact_for_gaussian_noise_on_a_linear_layer() -> None:
    """H = X'X ⊗ I/σ² whatever the number of rows, and with A and G given from their definitions it is the same."""
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = {"w": torch.ones(2, 3, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}

    def layer(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ p["w"].mT + p["b"]

    def root(outputs: Tensor) -> Tensor:
        return laplace.gaussian(outputs, NOISE)

    identity = torch.eye(2, dtype=torch.float64) / NOISE**2
    weight, bias = slow_blocks(laplace.ggn(layer, params, x, root=root), params)
    torch.testing.assert_close(weight, torch.kron(identity, x.T @ x))
    (a, g), (one, g_bias) = laplace.kronecker_factors(layer, params, x, root=root).values()
    torch.testing.assert_close(6 * torch.kron(g, a), weight)
    torch.testing.assert_close(6 * torch.kron(g_bias, one), bias)
    given = {"w": (x.T @ x / 6, identity), "b": (torch.ones(1, 1, dtype=torch.float64), identity)}
    ours = laplace.kfac_posterior(params, laplace.kronecker_factors(layer, params, x, root=root), 6)
    theirs = laplace.kfac_posterior(params, given, 6)
    covariances = [laplace.linearised(layer, one, PRIOR, x)[1] for one in (ours, theirs)]
    torch.testing.assert_close(covariances[0], covariances[1])
    exact = torch.block_diag(weight, bias) + PRIOR * torch.eye(8, dtype=torch.float64)
    rows = torch.stack([torch.cat([torch.kron(torch.eye(2).double(), r), torch.eye(2).double()], 1) for r in x])
    torch.testing.assert_close(covariances[0], rows @ exact.inverse() @ rows.mT)


def test_a_leaf_that_moves_nothing_keeps_its_prior() -> None:
    """At B = 0 the gradient of A vanishes: H is 0 there, in every structure."""
    few = Few("[r].*layer\\.1\\..*value.*(lora_A|lora_B)")
    name = next(name for name in few.some if name.endswith("lora_B"))
    few.some[name] = torch.zeros_like(few.some[name])
    for structure in STRUCTURES:
        posterior = fit(structure, few.model, few.some, few.tokens)
        drawn = laplace.sample(posterior, 1.0, seed=0, n=4000)
        other = next(name for name in few.some if name.endswith("lora_A"))
        spread = (drawn[other] - few.some[other]).std(0)
        torch.testing.assert_close(spread, torch.ones_like(spread), rtol=0, atol=0.06)


def test_probit_and_draws_of_two_classes_are_the_integral() -> None:
    """E[softmax(N(f, s I))] of two classes is E[sigmoid(N(f₀ - f₁, 2 s))], a sum on a fine grid."""
    logits, s = torch.tensor([1.0, -0.5], dtype=torch.float64), 2.0
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    weights = torch.exp(-(grid**2) / 2)
    exact = ((1.5 + math.sqrt(2 * s) * grid).sigmoid() * weights).sum() / weights.sum()
    covariance = s * torch.eye(2, dtype=torch.float64)
    draws = laplace.softmax_draws(logits, covariance, seed=0, n=40_000)
    assert draws.shape == (40_000, 2)
    torch.testing.assert_close(draws.mean(0)[0], exact, rtol=0, atol=0.005)
    # The approximation scales every logit by its own variance, s where the difference has 2 s: it is a little too sure.
    found = laplace.probit(logits, covariance)
    assert exact < found[0] < logits.softmax(-1)[0]
    assert found[0].item() == pytest.approx(1 / (1 + math.exp(-1.5 / math.sqrt(1 + math.pi * s / 8))))


def test_draws_follow_a_singular_covariance() -> None:
    """A covariance along (1, 1, 1) moves all logits alike: no answer changes."""
    logits = torch.tensor([[0.3, 0.1, -1.0], [2.0, 0.0, 0.0]])
    draws = laplace.softmax_draws(logits, torch.ones(2, 3, 3), seed=0, n=5)
    torch.testing.assert_close(draws, logits.softmax(-1).expand(5, 2, 3), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    params = {"w": torch.ones(2, 3)}
    with pytest.raises(fd.errors.ParamsError, match=r"f must return outputs \(b, C\)"):
        laplace.ggn(lambda p, x: (x @ p["w"].mT).sum(), params, torch.ones(4, 3))
    with pytest.raises(fd.errors.ParamsError, match=r"f must return outputs \(b, C\)"):
        laplace.ggn(lambda p, x: {"logits": x @ p["w"].mT}, params, torch.ones(4, 3))
    with pytest.raises(fd.errors.ParamsError, match=r"6 entries must be \(6, 6\); found \(5, 5\)"):
        laplace.full_posterior(params, torch.eye(5))
    with pytest.raises(fd.errors.ParamsError, match=r"only one of them has \['v'\]"):
        laplace.kfac_posterior(params, {"w": (torch.eye(3), torch.eye(2)), "v": (torch.eye(1), torch.eye(1))}, 4)
    with pytest.raises(fd.errors.ParamsError, match=r"'w' is \(2, 3\) as a matrix .* fit \(3, 2\)"):
        laplace.kfac_posterior(params, {"w": (torch.eye(2), torch.eye(3))}, 4)
