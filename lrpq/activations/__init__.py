"""Activations as integers: grids, how they are calibrated, and blocks that compute with them.

`grids` has the quantizers and `clipping` chooses their ranges. `folding` makes a grid a channel into one a tensor,
exactly, in the LayerNorm before and the linear layers behind. `calibrate` walks a model with images. `apply` runs a
block with quantized activations, its linear layers in integer arithmetic (`integer`).
"""
