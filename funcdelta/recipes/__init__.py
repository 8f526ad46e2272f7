"""Recipes: uses of many deltas from the literature, each in a few lines on the public functions alone.

They are to be read and copied as much as to be called: no recipe needs what a user cannot write, too.
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
