"""MiniLLM in JAX: distil a large language model into a small one by reverse KL."""

__version__ = "0.1.0"
