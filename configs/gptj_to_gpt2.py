"""GPT-J (6B) into GPT-2 large, GPT-2 XL or GPT-Neo 2.7B, as in the paper's appendix.

    python -m minillm_jax.main --config configs/gptj_to_gpt2.py
    python -m minillm_jax.main --config configs/gptj_to_gpt2.py:student=gpt-neo-2.7B

The paper has results of these pairs but no scripts: rates and epochs are those of the models of
the same size, GPT-J's those of OPT 6.7B, GPT-Neo's those of OPT 2.7B.
"""

from configs.paper import Side, pair

TEACHER = Side("EleutherAI/gpt-j-6b", 1e-5, 10, 4, "gptj")
STUDENTS = {
    "gpt2-large": Side("openai-community/gpt2-large", 1e-4, 10, 2, "gpt2"),
    "gpt2-xl": Side("openai-community/gpt2-xl", 5e-5, 10, 2, "gpt2"),
    "gpt-neo-2.7B": Side("EleutherAI/gpt-neo-2.7B", 5e-5, 10, 2, "gpt_neo"),
}


def get_config(arg: str = ""):
    """The settings; `arg` is `student=NAME`, `method=NAME`, `tiny`, joined by commas."""
    return pair(arg, "gptj_to_gpt2", TEACHER, STUDENTS)
