"""Rewrites of the decoder."""
