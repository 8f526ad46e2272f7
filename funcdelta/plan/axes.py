"""A config's ``axis_order``: where features are under it, and how a method's functions run in that order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import MatchError
from ..methods.config import BaseDeltaConfig
from ..methods.site import Shapes, Site


def check_axes(config: BaseDeltaConfig, site: Site) -> None:
    """Raise `MatchError` if ``axis_order`` would move the features of a layer whose axis of features is known.

    >>> from funcdelta.methods.site import site_of
    >>> check_axes(fd.AdapterConfig(axis_order=(0, 2, 1)), site_of("0", nn.Linear(2, 2)))
    Traceback (most recent call last):
    ...
    funcdelta.errors.MatchError: axis_order=(0, 2, 1) moves the features of 0 (Linear), which are on axis -1. ...
    """
    order = config.axis_order
    if order is not None and site.kind != "other" and (site.channel_axis != -1 or order[-1] != len(order) - 1):
        raise MatchError(
            f"axis_order={order} moves the features of {site.path} ({site.module_type}), which are on axis "
            f"{site.channel_axis}. Name this site in a config without axis_order."
        )


def sized(config: BaseDeltaConfig, site: Site, measured: Mapping[str, Shapes]) -> Site:
    """``site`` with its widths: the sizes of measured shapes on the axis that the method sees last.

    >>> from funcdelta.methods.site import site_of
    >>> sized(fd.AdapterConfig(axis_order=(0, 2, 1)), site_of("0", nn.Identity()), {"0": (None, (5, 3, 7))}).width
    3
    """
    if site.out_features is not None or site.path not in measured:
        return site
    entering, leaving = measured[site.path]
    widths = [shape[_last(config.axis_order, len(shape))] if shape else None for shape in (entering, leaving)]
    return dataclasses.replace(site, in_features=widths[0], out_features=widths[1])


def _last(order: tuple[int, ...] | None, axes: int) -> int:
    return order[-1] if order is not None and len(order) == axes else -1


def in_order(method: Callable[..., Any], order: tuple[int, ...] | None) -> Callable[..., Any]:
    """``method(p, *values)`` on values permuted to ``order``, with its result permuted back.

    Values with another number of axes are not permuted.

    >>> double = in_order(lambda p, y: y * torch.arange(2.0), (0, 2, 1))
    >>> double({}, torch.ones(1, 2, 3))
    tensor([[[0., 0., 0.],
             [1., 1., 1.]]])
    """
    if order is None:
        return method
    axes, back = len(order), tuple(order.index(axis) for axis in range(len(order)))

    def act(p: dict[str, Tensor], *values: Tensor) -> Any:
        result = method(p, *(value.permute(order) if value.ndim == axes else value for value in values))
        if values[0].ndim != axes or not isinstance(result, Tensor):
            return result
        # Contiguous, as the model's own value is: its reader may take a view of it.
        return result.permute(back).contiguous()

    return act
