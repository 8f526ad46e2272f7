"""What is saved and loaded: atomically, with checksums, checked against the backbone."""
