"""Other quantizers beside lrpq, each in its own environment, on one ruler."""
