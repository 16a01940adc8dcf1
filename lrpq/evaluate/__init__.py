"""Perplexity and KL divergence to the original, block by block."""
