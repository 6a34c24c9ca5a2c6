"""Image and question samples from the user's own folders."""
