"""From a checkpoint to a bundle: PyTorch definition, graphs, compile pipeline, commands."""
