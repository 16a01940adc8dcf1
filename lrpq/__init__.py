"""The numerical core: relevance, bit allocation and GPTQ. It knows nothing of Ray, Prefect or object stores."""

__version__ = "0.1.0"
