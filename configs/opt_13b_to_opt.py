"""OPT 13B into OPT 1.3B, 2.7B or 6.7B, as in the paper.

    python -m minillm_jax.main --config configs/opt_13b_to_opt.py:student=opt-1.3b

The tiny student is built like OPT 350m, with its norms after and narrow embeddings.
"""

from configs.paper import Side, pair

TEACHER = Side("facebook/opt-13b", 1e-5, 10, 2, "opt")
STUDENTS = {
    "opt-1.3b": Side("facebook/opt-1.3b", 5e-5, 10, 16, "opt_350m"),
    "opt-2.7b": Side("facebook/opt-2.7b", 5e-5, 10, 16, "opt_350m"),
    "opt-6.7b": Side("facebook/opt-6.7b", 1e-5, 10, 4, "opt_350m"),
}


def get_config(arg: str = ""):
    """The settings; `arg` is `student=NAME`, `method=NAME`, `tiny`, joined by commas."""
    return pair(arg, "opt_13b_to_opt", TEACHER, STUDENTS)
