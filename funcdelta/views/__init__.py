"""Bound deltas as modules of the backbone's class."""
