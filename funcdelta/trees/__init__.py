"""Pytrees of tensors: the names of their leaves, seeds, arithmetic, and stacks of members."""
