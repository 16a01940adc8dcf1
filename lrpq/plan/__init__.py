"""What a compression costs, from shapes: work of the numerics, a block traced without values, a machine's rates."""
