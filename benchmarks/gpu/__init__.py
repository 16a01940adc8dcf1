"""What one GPU makes of every stage, against what the same card can do in the same run."""
