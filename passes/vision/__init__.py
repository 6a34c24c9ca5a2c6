"""Rewrites of the vision encoder."""
