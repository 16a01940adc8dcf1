"""The innermost loops of the quantizer, compiled: what a matrix library has no call for.

Everything around them (products, factorisations, cuts, checks) is PyTorch, as are the same loops in float64 and on
other grids, which the compiled ones are tested against.
"""
