"""Proof that hidden values have rows first and tokens second, in calls with as many rows as tokens.

Some models compute with tokens first, (tokens, rows, features). With other sizes that shows, and a mask (rows, tokens)
is refused there; with equal sizes it would be laid on the wrong axes. So before the first such call the text model is
run on one of its rows, in which the sizes differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import FuncdeltaError, MatchError
from ..structures.modules.structure import named_tensors
from ..transforms import concrete, is_wrapped, outside_transforms
from .call import Call, Host
from .padding import one_row, run_alone


def check_order(
    skeleton: Host, module: nn.Module, path: str, given: Mapping[str, Any], rows: int, call: Call, notes: dict[str, Any]
) -> None:
    """Run the text model at ``path`` on the first of its ``rows`` rows; sites there raise where tokens come first.

    Args:
        given: what the module will be given, by name.
        call: the call under way, whose params act; ``notes``: what the run on one row knows of it.

    Raises ``MatchError`` where the row cannot be run by itself, too.
    """
    with outside_transforms(), torch.no_grad():
        wrapped = {name: concrete(t) for name, t in named_tensors(skeleton.module) if is_wrapped(t)}
        params = {name: concrete(t) for name, t in call.params.items()}
        with skeleton.swapped(wrapped):
            try:
                run_alone(skeleton, module, one_row(given, 0, rows), Call(params, notes=notes))
            except FuncdeltaError:
                raise
            except Exception as error:  # whatever a model says of inputs that it was not made for
                said = (str(error).splitlines() or [type(error).__name__])[0]
                raise MatchError(
                    f"This call has {rows} rows of {rows} tokens, so whether rows or tokens come first in "
                    f"{path or 'the model'} cannot be told by the sizes, nor by its first row alone ({said}): call it "
                    f"with another number of rows once, or leave the conditions out."
                ) from error
