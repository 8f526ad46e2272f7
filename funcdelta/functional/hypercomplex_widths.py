"""Finds widths d that fit a hypercomplex adapter: d and its bottleneck d // factor are multiples of n."""

from __future__ import annotations

import math


def fits(width: int, division: int, factor: int) -> bool:
    """Whether ``width`` and its bottleneck can be divided into equal parts.

    >>> fits(64, division=4, factor=16), fits(60, division=4, factor=16)
    (True, False)
    """
    bottleneck = width // factor
    return bottleneck > 0 and width % division == bottleneck % division == 0


def nearby(width: int, division: int, factor: int) -> list[int]:
    """The closest widths that fit, below (if there is one) and above.

    >>> nearby(100, division=4, factor=16)
    [76, 128]
    """
    below = next((smaller for smaller in range(width - 1, 0, -1) if fits(smaller, division, factor)), None)
    # Start from the first width whose bottleneck is a multiple of n, then round up to a multiple of n.
    bottleneck = max(width + 1, division * factor) // factor // division * division
    above = max(width + 1, bottleneck * factor)
    above += -above % division
    above = above if above // factor == bottleneck else (bottleneck + division) * factor
    return [above] if below is None else [below, above]


def remedies(width: int, division: int, factor: int) -> dict[str, list[int]]:
    """Values of either setting, with the other unchanged, for which this width fits; at most four of each.

    >>> remedies(32, division=4, factor=16)
    {'hypercomplex_division': [2], 'reduction_factor': [2, 4, 7, 8]}
    """
    least = math.gcd(width, width // factor) if width // factor else 1
    divisions = [i for i in range(2, width + 1) if least % i == 0][:4]
    factors = [f for f in range(2, width + 1) if width % division == 0 and (width // f) % division == 0]
    closest = sorted(sorted(factors, key=lambda f: abs(f - factor))[:4])
    return {"hypercomplex_division": divisions, "reduction_factor": closest}


def misfit(width: int | None, division: int, factor: int) -> str | None:
    """Why a site of that width cannot be split, with widths and settings that can; ``None`` where it can be.

    >>> print(misfit(100, division=4, factor=16))
    its width 100 and the bottleneck 100 // 16 = 6 must both be multiples of hypercomplex_division=4, at least 4. ...
    """
    if width is None or fits(width, division, factor):
        return None
    widths = ", ".join(map(str, nearby(width, division, factor)))
    found = remedies(width, division, factor).items()
    ways = [f"{field}={' or '.join(map(str, values))}" for field, values in found if values]
    here = f"; for the width {width} write {', or '.join(ways)}" if ways else ""
    return (
        f"its width {width} and the bottleneck {width} // {factor} = {width // factor} must both be multiples of "
        f"hypercomplex_division={division}, at least {division}. Widths nearby that work: {widths}{here}"
    )
