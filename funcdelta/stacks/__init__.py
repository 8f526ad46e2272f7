"""Params with a member axis: made, picked from by rows, and kept resident while members come and go."""
