"""Recipes: uses of many deltas from the literature, each in a few lines.

They use only public functions, so you can read and copy them as well as call them.
"""

from . import (
    ensemble,
    evolution,
    federated,
    hypernetwork,
    implicit,
    influence,
    laplace,
    meta_learning,
    population,
    privacy,
    routing,
    soups,
    steering,
    swag,
)

__all__ = [
    "ensemble",
    "evolution",
    "federated",
    "hypernetwork",
    "implicit",
    "influence",
    "laplace",
    "meta_learning",
    "population",
    "privacy",
    "routing",
    "soups",
    "steering",
    "swag",
]
