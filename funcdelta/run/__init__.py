"""One call of a model: its inputs, the program that runs it, and its outputs."""
