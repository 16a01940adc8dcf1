"""Transforms that a model's weights absorb: another parametrisation of the same function, easier to quantize."""
