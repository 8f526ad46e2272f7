"""How many members run: in turn, mapped, or folded into the batch."""
