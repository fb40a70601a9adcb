"""Qwen3 8B into Qwen3 0.6B, with the numbers of the Qwen2.5 pair: the paper is older than both.

python -m minillm_jax.main --config configs/qwen3_8b_to_0_6b.py
"""

from configs.paper import Side, pair

TEACHER = Side("Qwen/Qwen3-8B-Base", 1e-5, 10, 1, "qwen3")
STUDENTS = {"qwen3-0.6b": Side("Qwen/Qwen3-0.6B-Base", 1e-5, 10, 8, "qwen3")}


def get_config(arg: str = ""):
    """The settings; `arg` is `student=NAME`, `method=NAME`, `tiny`, joined by commas."""
    return pair(
        arg, "qwen3_8b_to_0_6b", TEACHER, STUDENTS, schedule="cosine", template="alpaca_qwen"
    )
