"""The mathematics of distillation: per-token values, unreduced, and the sums over them.

`token` has losses and divergences of one position, `policy` MiniLLM's estimator, `vocab` the same
scores from hidden states without the [B, N, V] logits, `reduce` the only sums over tokens. Nothing
here knows a model, a config or a mesh.
"""
