"""Derivatives with respect to params."""
