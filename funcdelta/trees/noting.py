"""Whether random numbers were drawn: what did not ask for any is the same for every seed."""

from __future__ import annotations

import torch
from torch import Tensor


class Noting(torch.Generator):
    """A generator that knows whether anything may depend on its seed.

    >>> rng = Noting().manual_seed(3)
    >>> rng.used, torch.rand((), generator=rng).shape, rng.used
    (False, torch.Size([]), True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Note from now on; it may be seeded once without being used."""
        self._times, self._asked, self._state = 0, False, super().get_state()

    @property
    def used(self) -> bool:
        """Whether it was drawn from, was asked for its seed or state, or was given a state or another seed."""
        return self._asked or self._times > 1 or not torch.equal(super().get_state(), self._state)

    def manual_seed(self, seed: int) -> Noting:
        super().manual_seed(seed)
        self._times += 1
        if self._times == 1:
            self._state = super().get_state()
        return self

    def initial_seed(self) -> int:
        self._asked = True
        return super().initial_seed()

    def seed(self) -> int:
        self._asked = True
        return super().seed()

    def get_state(self) -> Tensor:
        self._asked = True
        return super().get_state()

    def set_state(self, new_state: Tensor) -> torch.Generator:
        self._asked = True
        return super().set_state(new_state)

    def clone_state(self) -> torch.Generator:
        self._asked = True
        return super().clone_state()
