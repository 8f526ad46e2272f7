"""What is known of a backbone's modules from their code and their state, and the structural copy of a backbone."""
