"""From the portable form to what a target runs best: dtypes, cache forms, fused operators."""
