"""Qwen2.5 7B into Qwen2.5 1.5B, as in the reference's later scripts.

    python -m minillm_jax.main --config configs/qwen2_5_7b_to_1_5b.py

MiniLLM and the student's SFT have numbers there; the teacher's are those of LLaMA 7B.
"""

from configs.paper import Side, pair

TEACHER = Side("Qwen/Qwen2.5-7B", 1e-5, 10, 1, "qwen2")
STUDENTS = {"qwen2.5-1.5b": Side("Qwen/Qwen2.5-1.5B", 1e-5, 10, 8, "qwen2")}


def get_config(arg: str = ""):
    """The settings; `arg` is `student=NAME`, `method=NAME`, `tiny`, joined by commas."""
    return pair(
        arg, "qwen2_5_7b_to_1_5b", TEACHER, STUDENTS, schedule="cosine", template="alpaca_qwen"
    )
