"""Reading a model one decoder block at a time, and what in it can be quantized."""
