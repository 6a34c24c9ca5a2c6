"""Rewrites of any graph: constants, dead code, clean-up."""
