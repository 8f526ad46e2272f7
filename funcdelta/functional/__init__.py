"""Functions of tensors that several methods share."""
