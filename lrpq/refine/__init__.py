"""Sequential refinement: every block is quantized for the inputs it will really get."""
