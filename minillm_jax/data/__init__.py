"""From text to padded batches: tokenizer -> templates -> sources -> examples -> loader.

Numpy only. Nothing is imported here, so that reading a tokenizer does not pay for the loader.
"""
