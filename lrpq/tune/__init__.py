"""Tuning a quantized model end to end, block by block, on the divergence from the original."""
