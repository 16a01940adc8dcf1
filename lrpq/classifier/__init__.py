"""The checkpoint of a quantized image classifier: written, read back, run in simulated integer arithmetic.

    write_classifier    folded model, codes and activation grids -> a folder
    load_classifier     the folder -> transformers' own model, its blocks computing on grids and codes
    verify_classifier   proof that the folder is what was meant

What is stored where is in lrpq.checkpoint.activations.
"""

from lrpq.classifier.writing import write_classifier

__all__ = ["write_classifier"]
