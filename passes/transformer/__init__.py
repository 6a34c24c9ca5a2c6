"""Rewrites of transformer blocks: of the vision encoder and of the decoder alike."""
