"""Buffers in which models keep what they learn from batches in training: running statistics, by their usual names."""

from __future__ import annotations

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
