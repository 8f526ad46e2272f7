"""Laplace approximations: Gaussian posteriors around trained params.

The posterior is N(θ, (H + τ I)⁻¹). H is the generalised Gauss-Newton matrix Σᵢ Jᵢᵀ Λᵢ Jᵢ over the rows i of the data:
Jᵢ = ∂f(θ, xᵢ)/∂θ, and Λᵢ is the Hessian of the negative log-likelihood in the outputs. τ is the precision of a Gaussian
prior; it enters last, so that :func:`log_evidence` can choose it. MacKay 1992, "A Practical Bayesian Framework for
Backpropagation Networks"; Daxberger et al. 2021, "Laplace Redux"; for LoRA, Yang et al. 2023, "Bayesian Low-Rank
Adaptation for Large Language Models".

It is a posterior over leaves (factor space): (B G, G⁻¹ A) is the same LoRA with another posterior, and the prior acts
on A and B, not on their product.

``f(params, *data)`` returns outputs (b, C) of independent rows. Its params are the leaves that get a posterior; others
are fixed inside ``f`` or are constants of the delta. A leaf that ``f`` does not depend on is *known*: it has ∞ on the
diagonal of H, never varies between draws, and no prior acts on it. ::

    some, rest = fd.partition(params, "head")
    f = lambda some, *data: delta.apply(fd.combine(some, rest), *data)
    posterior = full_posterior(some, ggn(f, some, *data))
    logits, covariance = linearised(f, posterior, tau, *others)

Everything except drawing works under ``torch.vmap`` over a stack of members.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]
Model = Callable[..., Tensor]
Root = Callable[[Tensor], Tensor]


class Diagonal(NamedTuple):
    """A posterior with independent entries; ``curvature`` is the diagonal of H, leaf by leaf.

    >>> Diagonal({"w": torch.ones(2)}, {"w": torch.tensor([3.0, 0.0])}).into({"w": torch.ones(2)})
    {'w': tensor([1., 1.])}
    """

    mean: Params
    curvature: Params

    def into(self, direction: Params) -> Params:
        """A direction of params in the eigenbasis of H, in which ``curvature`` is diagonal; 0 for known leaves."""
        return fd.tree.map(lambda h, v: v.masked_fill(h.isinf(), 0.0), self.curvature, direction)

    def back(self, coordinates: Any) -> Params:
        """The inverse of ``into``."""
        return coordinates


class Full(NamedTuple):
    """The joint posterior of all entries: H = ``basis`` diag(``curvature``) ``basis``ᵀ, (d,) and (d, d).

    The basis has rows of zeros for known entries.

    >>> posterior = full_posterior({"w": torch.zeros(2)}, torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> posterior.curvature
    tensor([1., 3.])
    """

    mean: Params
    curvature: Tensor
    basis: Tensor

    def into(self, direction: Params) -> Tensor:
        """A direction of params in the eigenbasis of H, (d,)."""
        return _vector(fd.tree.map(lambda mean, v: v, self.mean, direction)) @ self.basis

    def back(self, coordinates: Any) -> Params:
        """The inverse of ``into``."""
        return fd.tree.ravel(self.mean)[1](self.basis @ coordinates)


class Kronecker(NamedTuple):
    """A posterior with independent leaves and H = N · G ⊗ A for each, held as eigenbases of A (in) and G (out).

    ``outer`` is zero for known leaves.

    >>> posterior = kfac_posterior({"w": torch.zeros(1, 2)}, {"w": (torch.eye(2), torch.ones(1, 1))}, rows=5)
    >>> posterior.curvature
    {'w': tensor([[5., 5.]])}
    """

    mean: Params
    curvature: Params
    inner: Params
    outer: Params

    def into(self, direction: Params) -> Params:
        """A direction of params in the eigenbasis of H: U_Gᵀ V U_A, (out, in), for every leaf V."""
        return fd.tree.map(lambda u, w, v: w.mT @ _matrix(v) @ u, self.inner, self.outer, direction)

    def back(self, coordinates: Any) -> Params:
        """The inverse of ``into``."""
        return fd.tree.map(
            lambda v, u, w, mean: (w @ v @ u.mT).reshape(mean.shape), coordinates, self.inner, self.outer, self.mean
        )


Posterior = Diagonal | Full | Kronecker


def categorical(outputs: Tensor) -> Tensor:
    """L = diag(√p) - p √pᵀ, (C, C), with p = softmax(outputs): L Lᵀ is the Hessian of cross-entropy in logits (C,).

    >>> root = categorical(torch.zeros(2))
    >>> root @ root.mT
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    p = outputs.softmax(-1)
    return p.sqrt().diag() - torch.outer(p, p.sqrt())


def gaussian(outputs: Tensor, noise: float | Tensor = 1.0) -> Tensor:
    """L = I/σ, (C, C): L Lᵀ is the Hessian of ‖y - f‖²/(2σ²) in outputs (C,) with noise of standard deviation σ.

    Pass it as ``root=lambda outputs: gaussian(outputs, noise)``.

    >>> gaussian(torch.zeros(2), 0.5)
    tensor([[2., 0.],
            [0., 2.]])
    """
    return torch.eye(outputs.shape[-1], dtype=outputs.dtype, device=outputs.device) / noise


def jacobians(
    f: Model, params: Params, *data: Tensor, root: Root = gaussian, chunk_size: int | None = None
) -> tuple[Tensor, Params]:
    """f(θ, xᵢ), (b, C), and Lᵢᵀ ∂f(θ, xᵢ)/∂θ, leaves (b, C, ...), with Lᵢ = ``root(outputs)``, by default I.

    Rows run as batches of one, ``chunk_size`` at a time, with C backward passes each.

    >>> jacobians(lambda p, x: x @ p["w"], {"w": torch.ones(2, 1)}, torch.tensor([[1.0, 2.0]]))[1]["w"].shape
    torch.Size([1, 1, 2, 1])
    """

    def one(*row: Tensor) -> tuple[Tensor, Params]:
        batch = [part.unsqueeze(0) for part in row]
        outputs, pull = torch.func.vjp(lambda p: f(p, *batch), params)[:2]
        if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 1:
            found = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"{type(outputs)}"
            raise fd.errors.ParamsError(
                f"f must return outputs (b, C) for b rows, here (1, C) for a batch of one; found {found}."
            )
        weights = root(outputs.squeeze(0)).mT.unsqueeze(1)
        return outputs.squeeze(0), torch.vmap(lambda weight: pull(weight)[0])(weights)

    return torch.vmap(one, chunk_size=chunk_size, randomness="different")(*data)


def ggn(f: Model, params: Params, *data: Tensor, root: Root = categorical, chunk_size: int | None = None) -> Tensor:
    """H = Σᵢ Jᵢᵀ Λᵢ Jᵢ over the rows of ``data``, (d, d), in the order of ``fd.tree.ravel(params)``.

    Λ = L Lᵀ with L = ``root(outputs)``. A call needs memory for C · d numbers per row; the sum over several calls is
    the H of all their rows. The diagonal is ∞ for leaves that ``f`` does not depend on (``fd.grad.reached``).

    >>> ggn(lambda p, x: x * p["w"], {"w": torch.ones(1)}, torch.tensor([[1.0], [3.0]]), root=gaussian)
    tensor([[10.]])
    """
    _, weighted = jacobians(f, params, *data, root=root, chunk_size=chunk_size)
    rows = torch.vmap(torch.vmap(_vector))(weighted).flatten(0, 1)
    return rows.mT @ rows + _vector(_known(f, params, data)).diag()


def ggn_diagonal(
    f: Model, params: Params, *data: Tensor, root: Root = categorical, chunk_size: int | None = None
) -> Params:
    """The diagonal of :func:`ggn`, with leaves as in ``params``, without forming H; calls add up, too.

    >>> ggn_diagonal(lambda p, x: x * p["w"], {"w": torch.ones(1)}, torch.tensor([[1.0], [3.0]]), root=gaussian)
    {'w': tensor([10.])}
    """
    _, weighted = jacobians(f, params, *data, root=root, chunk_size=chunk_size)
    return fd.tree.map(lambda known, leaf: known + leaf.square().sum((0, 1)), _known(f, params, data), weighted)


def kronecker_factors(
    f: Model, params: Params, *data: Tensor, root: Root = categorical, chunk_size: int | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """{leaf: (A, G)} with N · G ⊗ A ≈ H of each leaf, from its partial traces over outputs and over inputs.

    With each row of Lᵢᵀ Jᵢ as a matrix R (out, in): A = Σ Rᵀ R / Σ ‖R‖² and G = Σ R Rᵀ / N. It is exact if the leaf's H
    is a Kronecker product (one row of data through a linear layer; Gaussian noise on one layer's output), and always
    has the right trace. A leaf with one axis has in = 1 and is exact. If ``f`` does not depend on a leaf, G has ∞ on
    its diagonal.

    >>> A, G = kronecker_factors(lambda p, x: x @ p["w"].mT, {"w": torch.ones(2, 3)}, torch.randn(5, 3))["w"]
    >>> A.shape, G.shape
    (torch.Size([3, 3]), torch.Size([2, 2]))
    """
    outputs, weighted = jacobians(f, params, *data, root=root, chunk_size=chunk_size)
    factors, known = {}, _known(f, params, data)
    for name, leaf in weighted.items():
        rows = leaf.flatten(0, 1)
        rows = rows.reshape(len(rows), *_matrix(params[name]).shape)
        inner, outer = (rows.mT @ rows).sum(0), (rows @ rows.mT).sum(0)
        trace = inner.trace()
        # A leaf with no effect has H = 0: G is 0, and A must only not become NaN.
        first = _matrix(known[name])[:, 0]
        factors[name] = (
            inner / torch.where(trace == 0, torch.ones_like(trace), trace),
            outer / len(outputs) + first.diag(),
        )
    return factors


def diagonal_posterior(params: Params, diagonal: Params) -> Diagonal:
    """N(θ, (diag H + τ I)⁻¹), from the result of :func:`ggn_diagonal`.

    >>> diagonal_posterior({"w": torch.zeros(1)}, {"w": torch.tensor([3.0])}).curvature
    {'w': tensor([3.])}
    """
    return Diagonal(params, fd.tree.map(lambda mean, leaf: leaf.clamp(min=0), params, diagonal))


def full_posterior(params: Params, matrix: Tensor) -> Full:
    """N(θ, (H + τ I)⁻¹), from the result of :func:`ggn`; one eigendecomposition, O(d³), serves every τ.

    >>> full_posterior({"w": torch.zeros(2)}, torch.tensor([[3.0, 0.0], [0.0, 1.0]])).curvature
    tensor([1., 3.])
    """
    size = len(_vector(params))
    if matrix.shape != (size, size):
        raise fd.errors.ParamsError(
            f"H of params with {size} entries must be ({size}, {size}); found {tuple(matrix.shape)}."
        )
    matrix, live = _live(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return Full(params, values.clamp(min=0), live[:, None] * vectors)  # rounding may make values slightly negative


def kfac_posterior(params: Params, factors: Mapping[str, tuple[Tensor, Tensor]], rows: int) -> Kronecker:
    """N(θ, (N · G ⊗ A + τ I)⁻¹) for every leaf (out, in) separately, with N = ``rows``; τ is added exactly.

    ``factors`` are {leaf: (A, G)}, (in, in) and (out, out): those of :func:`kronecker_factors`, or A = E[x xᵀ] of a
    layer's inputs and G = E[g gᵀ] of the gradients at its output (Martens and Grosse 2015, "Optimizing Neural Networks
    with Kronecker-factored Approximate Curvature"). The eigenbases cost O(in³ + out³) per leaf.

    >>> posterior = kfac_posterior({"w": torch.zeros(1, 2)}, {"w": (torch.eye(2), torch.ones(1, 1))}, rows=3)
    >>> posterior.curvature
    {'w': tensor([[3., 3.]])}
    """
    if missing := sorted(params.keys() ^ factors.keys()):
        raise fd.errors.ParamsError(f"params and factors must have the same leaves; only one of them has {missing}.")
    curvature, inner, outer = {}, {}, {}
    for name, leaf in params.items():
        outward, live = _live(factors[name][1])
        (a, inner[name]), (g, vectors) = (torch.linalg.eigh(factor) for factor in (factors[name][0], outward))
        outer[name] = live[:, None] * vectors
        curvature[name] = rows * g.clamp(min=0)[:, None] * a.clamp(min=0)
        if curvature[name].shape != _matrix(leaf).shape:
            wanted, found = tuple(_matrix(leaf).shape), tuple(curvature[name].shape)
            raise fd.errors.ParamsError(f"Leaf {name!r} is {wanted} as a matrix (out, in), but its (A, G) fit {found}.")
    return Kronecker(params, curvature, inner, outer)


def sample(posterior: Posterior, prior: float | Tensor, seed: int, *, n: int) -> Params:
    """θ + (H + τ I)^(-½) εᵢ: a stack of n draws. For a stack of posteriors write ``fd.take(posteriors, i)``.

    >>> posterior = diagonal_posterior({"w": torch.ones(2)}, {"w": torch.tensor([3.0, 0.0])})
    >>> sample(posterior, 1e12, seed=0, n=3)["w"].round()[0]
    tensor([1., 1.])
    """
    noise = fd.tree.randn_like(fd.broadcast(posterior.curvature, n), fd.seeds(seed, n))
    spread = fd.tree.map(lambda e, h: e * (h + prior).rsqrt(), noise, posterior.curvature)
    return fd.tree.add(fd.broadcast(posterior.mean, n), torch.vmap(posterior.back)(spread))


def linearised(
    f: Model, posterior: Posterior, prior: float | Tensor, *data: Tensor, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """f(θ, xᵢ), (b, C), and Jᵢ (H + τ I)⁻¹ Jᵢᵀ, (b, C, C): mean and covariance of the model linearised at θ.

    Immer et al. 2021, "Improving predictions of Bayesian neural nets via local linearization". For Gaussian noise on
    outputs add σ² I; pass logits to :func:`probit` or :func:`softmax_draws`.

    >>> posterior = diagonal_posterior({"w": torch.ones(1)}, {"w": torch.tensor([3.0])})
    >>> linearised(lambda p, x: x * p["w"], posterior, 1.0, torch.tensor([[2.0]]))
    (tensor([[2.]]), tensor([[[1.]]]))
    """
    outputs, jacobian = jacobians(f, posterior.mean, *data, chunk_size=chunk_size)
    turned = torch.vmap(torch.vmap(lambda row: _vector(posterior.into(row))))(jacobian)
    scaled = turned * (_vector(posterior.curvature) + prior).rsqrt()
    return outputs, scaled @ scaled.mT


def probit(logits: Tensor, covariance: Tensor) -> Tensor:
    """softmax(f / √(1 + π/8 diag Σ)), (..., C): MacKay's approximation of E[softmax(N(f, Σ))], without draws.

    It uses only the variances of logits and ignores their covariances; :func:`softmax_draws` does not.

    >>> probit(torch.tensor([2.0, 0.0]), torch.zeros(2, 2)), probit(torch.tensor([2.0, 0.0]), 1e6 * torch.eye(2))
    (tensor([0.8808, 0.1192]), tensor([0.5008, 0.4992]))
    """
    return (logits / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()).softmax(-1)


def softmax_draws(logits: Tensor, covariance: Tensor, seed: int, *, n: int) -> Tensor:
    """softmax(f + Σ^½ εᵢ), (n, ..., C): n draws, which act as members; their mean is the predictive distribution.

    >>> softmax_draws(torch.tensor([2.0, 0.0]), torch.zeros(2, 2), seed=0, n=3)[2]
    tensor([0.8808, 0.1192])
    """
    values, vectors = torch.linalg.eigh(covariance)  # not Cholesky: Σ may be singular
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn((n, *logits.shape), generator=rng, dtype=logits.dtype, device="cpu")
    drawn = vectors @ (values.clamp(min=0).sqrt() * noise.to(logits.device)).unsqueeze(-1)
    return (logits + drawn.squeeze(-1)).softmax(-1)


def log_evidence(
    posterior: Posterior, prior: float | Tensor, log_likelihood: float | Tensor, *, centre: Params | None = None
) -> Tensor:
    """ln p(y) ≈ ln p(y | θ) - τ/2 ‖θ - c‖² + d/2 ln τ - ½ ln det(H + τ I), (): how well a prior N(c, I/τ) explains y.

    Differentiable in τ and, through ``log_likelihood`` (the sum over rows, ()), in the noise. Exact if f is linear, its
    noise Gaussian and θ the maximum under that prior. The ``centre`` c is 0 by default; if training started elsewhere,
    pass its starting point.

    >>> posterior = diagonal_posterior({"w": torch.zeros(1)}, {"w": torch.tensor([3.0])})
    >>> log_evidence(posterior, torch.tensor(1.0), 0.0)
    tensor(-0.6931)
    """
    values, away = _spectrum(posterior, centre)
    prior = torch.as_tensor(prior, dtype=values.dtype, device=values.device)
    return log_likelihood - prior / 2 * away @ away - (values / prior).log1p().sum() / 2


def choose_prior(
    posterior: Posterior, prior: float | Tensor, *, steps: int = 100, centre: Params | None = None
) -> Tensor:
    """τ ← γ / ‖θ - c‖² with γ = Σⱼ hⱼ/(hⱼ + τ), ``steps`` times: MacKay's rule for the prior.

    Its fixed points are the stationary points of :func:`log_evidence` in τ with θ held fixed. γ is the number of
    directions that the data determine.

    >>> posterior = diagonal_posterior({"w": torch.ones(1)}, {"w": torch.tensor([3.0])})
    >>> choose_prior(posterior, 1.0, steps=100)  # h/(h + τ) = τ
    tensor(0.7913)
    """
    values, away = _spectrum(posterior, centre)
    prior = torch.as_tensor(prior, dtype=values.dtype, device=values.device)
    for _ in range(steps):  # becomes ∞ if θ = c, because then nothing supports a wider prior
        prior = (values / (values + prior)).sum() / (away @ away)
    return prior


def _known(f: Model, params: Params, data: Sequence[Tensor]) -> Params:
    """∞ for the leaves that ``f`` does not depend on, 0 for the others."""
    names = fd.grad.reached(f, params, *(part[:1] for part in data))
    return {name: torch.full_like(leaf, 0.0 if name in names else torch.inf) for name, leaf in params.items()}


def _live(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` with known rows and columns set to 0, and a mask of the others as numbers, (d,)."""
    known = matrix.diagonal().isinf()
    return matrix.masked_fill(known | known[:, None], 0.0), (~known).to(matrix.dtype)


def _spectrum(posterior: Posterior, centre: Params | None) -> tuple[Tensor, Tensor]:
    """The curvatures, and θ - c in the eigenbasis of H, both (d,) and 0 for known entries."""
    away = posterior.mean if centre is None else fd.tree.sub(posterior.mean, centre)
    values = _vector(posterior.curvature)
    return values.masked_fill(values.isinf(), 0.0), _vector(posterior.into(away))


def _vector(tree: Any) -> Tensor:
    """All entries as one vector (d,)."""
    return fd.tree.ravel(tree)[0]


def _matrix(leaf: Tensor) -> Tensor:
    """A leaf as a matrix (out, in): its first axis, and all others flattened."""
    return leaf.reshape(leaf.shape[0] if leaf.ndim else 1, -1)
