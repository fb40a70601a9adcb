"""GPT-2 XL (1.5B) into GPT-2 base, medium or large, as in the paper.

python -m minillm_jax.main --config configs/gpt2_xl_to_gpt2.py:student=gpt2
"""

from configs.paper import Side, pair

TEACHER = Side("openai-community/gpt2-xl", 5e-5, 10, 2, "gpt2")
STUDENTS = {
    "gpt2": Side("openai-community/gpt2", 5e-4, 20, 4, "gpt2"),
    "gpt2-medium": Side("openai-community/gpt2-medium", 1e-4, 20, 2, "gpt2"),
    "gpt2-large": Side("openai-community/gpt2-large", 1e-4, 10, 2, "gpt2"),
}


def get_config(arg: str = ""):
    """The settings; `arg` is `student=NAME`, `method=NAME`, `tiny`, joined by commas."""
    return pair(arg, "gpt2_xl_to_gpt2", TEACHER, STUDENTS, sharded=False, remat="dots")
