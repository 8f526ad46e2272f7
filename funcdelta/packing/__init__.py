"""Unlike members in one stack."""
