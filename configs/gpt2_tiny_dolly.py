"""A GPT-2 of four layers learns dolly from nothing, and is distilled into one of two layers.

    python -m minillm_jax.main --config configs/gpt2_tiny_dolly.py

Real text and a real tokenizer at sizes for two CPU cores: it shows that learning works in a family
whose weights no package index carries (figures: README, "Your own prompts"). It says nothing about
models of a useful size: after it the loss is 7 nats per token. `:method=kd,tiny` may follow the
file's name. The data is dolly from the Hub, divided as the paper's, or local:
`data/dolly/{train.jsonl.gz,dev.jsonl}`, `data/eval/dolly.jsonl` and `tokenizers/gpt2` in
`$MINILLM_SHARED`, or in `shared` beside the checkout. Without that tokenizer it makes a small one.
"""

from configs.common import base
from configs.paper import arguments, dolly, tiny
from minillm_jax.methods import registry

TEACHER, STUDENT = "gpt2-4x128", "gpt2-2x64"


def get_config(arg: str = ""):
    """The settings; `arg` is `method=NAME`, `tiny`, joined by commas."""
    _, method, small = arguments(arg, (STUDENT,))
    config = base()
    config.name = "gpt2_tiny_dolly" + ("" if method == "minillm" else f"-{method}")
    config.method = method
    config.teacher.path, config.student.path = f"scratch:{TEACHER}", f"scratch:{STUDENT}"
    config.data.train, config.data.validation, config.data.test = dolly()
    config.data.template = "alpaca"
    config.data.max_prompt, config.data.max_response = 64, 32  # the template takes 35
    config.data.long_prompts = "drop"
    config.answers.source = "data"
    config.answers.limit = 1024  # of seqkd
    config.answers.batch_size = config.evaluate.batch_size = 64
    config.evaluate.prompts = config.evaluate.validation_prompts = 64

    for stage in (config.teacher_sft, config.sft):
        stage.steps, stage.batch_size, stage.evaluate_every = 300, 16, 100
        stage.learning_rate, stage.keep = 3e-3, "loss"
    config.sft.steps, config.sft.evaluate_every = 200, 100
    config.sft.warmup, config.sft.schedule = 10, "cosine"
    config.sft.weight_decay, config.sft.b2 = 1e-2, 0.999

    if registry.find(method).kind == "minillm":
        config.distill.steps, config.distill.evaluate_every = 64, 16
        config.distill.batch_size, config.distill.rollouts = 16, 64
        config.distill.inner_epochs = 1
        # As in the quickstart: one pass over fresh responses needs no clip and no discount.
        config.distill.gamma, config.distill.cliprange, config.distill.whiten = 1.0, 0.0, "center"
        config.distill.learning_rate = 1e-3
        config.distill.warmup = 4
    else:
        config.distill.steps, config.distill.evaluate_every = 200, 50
        config.distill.batch_size, config.distill.learning_rate = 16, 3e-3
        config.distill.warmup, config.distill.keep = 10, "loss"
        config.distill.weight_decay, config.distill.b2 = 1e-2, 0.999
    config.distill.schedule = "cosine"
    if small:
        tiny(config, "gpt2", "gpt2")
    return config
