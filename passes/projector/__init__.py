"""Rewrites of the projectors."""
