"""What the laws on hard models share: one fresh delta a law, and what written copies give, computed once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hard_models import EVERY, Batch, Hard, written
from torch import Tensor, nn

import funcdelta as fd

# What the models themselves make torch warn of: nested tensors, and a router that casts its layer in every call. That
# a call leaves out some sites is said by the library, and is what some of these models are for.
THEIR_WARNINGS = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:This call did not pass through:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
MEMBERS = 3
ROWS = 4
DRAWS = 40  # calls of a model that draws, enough to see each of its few outcomes


def law(test: Callable[..., None]) -> Callable[..., None]:
    """A law whose model may refuse its sites by name, where its flags say so: it is then skipped, with the reason."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            test(*args, **kwargs)
        except fd.errors.MatchError as error:
            if "may_refuse" not in EVERY[kwargs["name"]].flags:
                raise
            pytest.skip(f"refused by name: {str(error)[:160]}")

    return run


def ends(name: str) -> tuple[int, ...]:
    """The first and the last variant of the model's inputs."""
    return tuple(dict.fromkeys((0, EVERY[name].variants - 1)))


class Case:
    """A delta that nothing has called yet, on a model that nothing has called yet, and members of it."""

    def __init__(self, name: str, model: nn.Module | None = None) -> None:
        self.hard: Hard = EVERY[name]
        self.model: nn.Module = self.hard.build() if model is None else model
        self._stacks: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.delta = self.hard.lora(self.model)

    def stack(self, n: int = MEMBERS, seed: int = 0) -> dict[str, Tensor]:
        if (n, seed) not in self._stacks:
            self._stacks[n, seed] = self.hard.members(self.delta, n, seed)
        return self._stacks[n, seed]

    def batch(self, variant: int = 0, rows: int = ROWS, seed: int = 1) -> Batch:
        return self.hard.inputs(rows, seed, variant)

    def params(self, member: int, seed: int = 0) -> dict[str, Tensor]:
        """Member ``member`` of ``stack(seed=seed)``; -1: no delta."""
        return {} if member < 0 else fd.take(self.stack(max(MEMBERS, member + 1), seed), member)

    def written(self, member: int, seed: int = 0) -> nn.Module:
        return written(self.hard, self.delta.sites, self.params(member, seed))

    def right(self, member: int, batch: Batch, seed: int = 0) -> Tensor:
        """What the member's written copy gives for the batch."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self.hard.output(self.written(member, seed)(**batch))

    # -- what many members give ------------------------------------------------------------------------------------

    def many(self, batch: Batch, n: int = MEMBERS, seed: int = 0, **options: Any) -> Tensor:
        dims = self.hard.one_batch_dims(batch)
        return self.hard.output(self.delta.apply_many(self.stack(n, seed), in_dims=dims, **options, **batch))

    def many_own(self, batches: list[Batch], seed: int = 0, **options: Any) -> Tensor:
        joined, dims = self.hard.own_batches(batches)
        return self.hard.output(
            self.delta.apply_many(self.stack(len(batches), seed), in_dims=dims, **options, **joined)
        )

    def rows(self, batch: Batch, index: Sequence[int], n: int = MEMBERS, seed: int = 0) -> Tensor:
        return self.hard.output(self.delta.apply_rows(self.stack(n, seed), list(index), **batch))

    def rows_of_view(self, batch: Batch, index: Sequence[int], n: int = MEMBERS, seed: int = 0) -> Tensor:
        return self.hard.output(self.delta.bind_rows(self.stack(n, seed), list(index))(**batch))

    def right_rows(self, batch: Batch, index: Sequence[int], seed: int = 0) -> list[Tensor]:
        """What rows of several members may give: each row alone; or, where rows mix, each as in its whole batch."""
        found = []
        if self.hard.row is not None:
            alone = [self.right(member, self.hard.row(batch, i), seed) for i, member in enumerate(index)]
            if len({row.shape for row in alone}) == 1:
                found.append(torch.cat(alone))
        if self.hard.row is None or "mixes" in self.hard.flags:
            found.append(torch.stack([self.right(member, batch, seed)[i] for i, member in enumerate(index)]))
        return found


@functools.lru_cache(maxsize=256)
def original(name: str) -> Case:
    """A case whose delta nothing calls: for its members and what is written of them."""
    return Case(name)


@functools.lru_cache(maxsize=1024)
def copy_of(name: str, member: int) -> nn.Module:
    """The written copy of a model that keeps nothing from call to call."""
    return original(name).written(member)


@functools.lru_cache(maxsize=8192)
def right(name: str, member: int, rows: int, seed: int, variant: int) -> Tensor:
    """The output of member ``member`` of the first stack for that batch, by its written copy; computed once."""
    case = original(name)
    batch = case.batch(variant, rows, seed)
    if "keeps" in case.hard.flags:
        return case.right(member, batch)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return case.hard.output(copy_of(name, member)(**batch))


@functools.lru_cache(maxsize=64)
def outcomes(name: str, member: int, rows: int, seed: int, variant: int) -> tuple[Tensor, ...]:
    """The outputs that a model that draws can give."""
    case, copy, found = original(name), copy_of(name, member), []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for draw in range(DRAWS):
            torch.manual_seed(draw)
            output = case.hard.output(copy(**case.batch(variant, rows, seed)))
            if not any(torch.equal(output, other) for other in found):
                found.append(output)
    return tuple(found)


def assert_close(hard: Hard, found: Tensor, expected: Tensor, what: str = "", loosen: float = 1.0) -> None:
    """Equal up to rounding, relative to the largest value."""
    scale = max(1.0, float(expected.detach().abs().max()))
    tolerance = hard.tolerance * loosen
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda text: f"{hard.name} {what}: {text}"
    )


def assert_one_of(hard: Hard, found: Tensor, allowed: Sequence[Tensor], what: str = "") -> None:
    """Equal to one of several outputs, all of it."""
    assert allowed
    gaps = [float((found - each).abs().max()) if found.shape == each.shape else float("inf") for each in allowed]
    scale = max(1.0, *(float(each.abs().max()) for each in allowed))
    shapes = {tuple(each.shape) for each in allowed}
    assert min(gaps) <= hard.tolerance * scale, (
        f"{hard.name} {what}: off by {min(gaps):.1e} from the nearest of {len(allowed)} right outputs "
        f"(shape {tuple(found.shape)}, right {shapes}, scale {scale:.1f})"
    )


def assert_member(case: Case, found: Tensor, member: int, rows: int, seed: int, variant: int, what: str) -> None:
    """One member's output is its written copy's, or, where the model draws, one that it can give."""
    if "random" in case.hard.flags:
        assert_one_of(case.hard, found, outcomes(case.hard.name, member, rows, seed, variant), what)
    else:
        assert_close(case.hard, found, right(case.hard.name, member, rows, seed, variant), what)


def number_or_refusal(
    run: Callable[[], Tensor], must_run: bool, kinds: tuple[type[Exception], ...] = (fd.errors.EngineError,)
) -> Tensor | str:
    """What ``run`` gives, or the message of its refusal by name; anything else that it raises is raised."""
    try:
        return run()
    except kinds as error:
        if must_run:
            raise
        return str(error)


def weighted_sum(output: Tensor) -> Tensor:
    """A loss with a gradient everywhere: Σ cos(i) yᵢ."""
    flat = output.flatten()
    return (flat * torch.arange(flat.numel(), dtype=flat.dtype).cos()).sum()


def with_leaves(delta: fd.DeltaModel, params: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(params, trained)``: the same params, with leaves for autograd where they train."""
    trained = {name: leaf.detach().clone().requires_grad_() for name, leaf in params.items() if delta.trainable(name)}
    return {**params, **trained}, trained
