"""LLaMA 13B into LLaMA 7B, as in the paper.

    python -m minillm_jax.main --config configs/llama_13b_to_7b.py

Other sizes and generations: --config.teacher.path and --config.student.path.
"""

from configs.paper import Side, pair

TEACHER = Side("huggyllama/llama-13b", 1e-5, 10, 2, "llama")
STUDENTS = {"llama-7b": Side("huggyllama/llama-7b", 1e-5, 10, 8, "llama")}


def get_config(arg: str = ""):
    """The settings; `arg` is `student=NAME`, `method=NAME`, `tiny`, joined by commas."""
    return pair(arg, "llama_13b_to_7b", TEACHER, STUDENTS, schedule="cosine")
