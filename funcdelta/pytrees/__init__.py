"""Leaves of pytrees: their names, their selection, and the seeds of their numbers."""
