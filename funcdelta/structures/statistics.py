"""The usual names of running statistics, the buffers that models update in training."""

from __future__ import annotations

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
