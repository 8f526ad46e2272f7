"""Deltas in the formats of other libraries: one package a library."""
