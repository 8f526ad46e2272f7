"""What a delta may know of the modules that it acts on, and the structural copy of their backbone."""
