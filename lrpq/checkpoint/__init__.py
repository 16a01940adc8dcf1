"""Writing and proving the mixed-precision checkpoint."""
