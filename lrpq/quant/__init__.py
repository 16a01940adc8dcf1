"""Grids, Hessians, GPTQ, round-to-nearest and bit packing."""
