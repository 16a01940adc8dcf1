"""The checkpoint of a quantized image classifier: written, read back, run in simulated integer arithmetic.

    write_classifier    folded model, codes and activation grids -> a folder
    load_classifier     the folder -> transformers' own model, its blocks computing on grids and codes
    read_classifier     the folder -> codes and grids, for evaluation block by block
    verify_classifier   proof that the folder is what was meant

What is stored where is in lrpq.checkpoint.activations.
"""

from lrpq.classifier.loading import StoredClassifier, load_classifier, read_classifier
from lrpq.classifier.proof import ClassifierProof, verify_classifier
from lrpq.classifier.writing import write_classifier

__all__ = [
    "ClassifierProof",
    "StoredClassifier",
    "load_classifier",
    "read_classifier",
    "verify_classifier",
    "write_classifier",
]
