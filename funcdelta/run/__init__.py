"""What happens in one call: the skeleton, a delta's functions at its sites, and what is checked before."""
