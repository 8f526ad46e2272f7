"""Blocks for extra runs that the caller must not notice: no transform, no dropout, no global random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..functional.dropout import dropout
from ..randomness import Generators, PrivateRandom
from ..transforms import outside_transforms


class WithoutDropout(TorchFunctionMode):
    """A block in which dropout is off: the probe compares values, and dropout masks depend on the batch size.

    Attributes:
        count: how often dropout would have acted.
    """

    OFF: ClassVar = frozenset(
        {
            *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
            *(F.alpha_dropout, F.feature_alpha_dropout, torch.dropout, dropout),
        }
    )
    CHANGED: ClassVar = frozenset({F.multi_head_attention_forward, F.scaled_dot_product_attention})
    WATCHED: ClassVar = OFF | CHANGED

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.WATCHED:
            return func(*args, **(kwargs or {}))
        kwargs = dict(kwargs or {})
        if func in self.OFF:
            share, training = (*args[1:3], *(None, None))[:2]
            share = kwargs.get("p", 0.5) if share is None else share
            training = kwargs.get("training", kwargs.get("train", True)) if training is None else training
            # A rate may be a tensor, and differ by member.
            self.count += bool(training) and (isinstance(share, Tensor) or share > 0)
            return args[0] if args else kwargs["input"]
        if func is F.multi_head_attention_forward:
            # dropout_p is its eleventh argument.
            share = args[10] if len(args) > 10 else kwargs.get("dropout_p", 0.0)
            self.count += bool(kwargs.get("training", True)) and share > 0
            kwargs["training"] = False
        else:
            self.count += float(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0
            kwargs["dropout_p"] = 0.0
            args = args[:4] + ((0.0, *args[5:]) if len(args) > 4 else ())
            if len(args) > 4:
                del kwargs["dropout_p"]
        return func(*args, **kwargs)


@contextmanager
def beside() -> Iterator[None]:
    """A block outside of all transforms and inference mode; grad mode stays as it is, because models may ask for it."""
    wanted = torch.is_grad_enabled()
    with torch.inference_mode(False), outside_transforms(), torch.set_grad_enabled(wanted):
        yield


@contextmanager
def undisturbed(draws: bool = True) -> Iterator[None]:
    """A block without transforms, dropout and global random numbers.

    Args:
        draws: whether anything in it may draw; if nothing does, the modes that watch for it are saved.
    """
    with beside(), ExitStack() as modes:
        if draws:
            modes.enter_context(WithoutDropout())
            modes.enter_context(PrivateRandom(Generators(0)))
        yield
