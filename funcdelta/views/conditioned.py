"""Conditions of calls that ``generate`` makes: given to it once, they go with every call of the view that it makes.

Where it makes k rows of each, for beams or several sequences, the k rows of one prompt stand together and have that
prompt's entries, as the prompts themselves do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import EngineError
from ..run.conditions import check_given


class Conditioned:
    """What a view has where its backbone generates and its methods want conditions; it stands before other classes."""

    _funcdelta: Any

    def generate(self, *args: Any, conditions: Mapping[str, Tensor] | None = None, **kwargs: Any) -> Any:
        """The model's own, with ``conditions`` in all of its calls: ``{name: tensor}``, one entry a prompt."""
        calls = self._funcdelta.calls
        settings = kwargs.get("generation_config") or getattr(self, "generation_config", None)
        if kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None)):
            raise EngineError(
                "With prefill_chunk_size a prompt is read in pieces, each of which would be told of itself alone. "
                "Leave it out where methods want conditions of a call."
            )
        if conditions is not None:
            check_given(self._funcdelta.delta.program.plan.conditions, conditions)
        with calls.given_to_all(conditions):
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        """The model's own; the conditions' entries are repeated as the inputs are."""
        self._funcdelta.calls.repeat(expand_size)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        return expand(expand_size, *args, **kwargs)
