"""Analyses a backbone's modules by their code and state, and makes structural copies of a backbone."""
