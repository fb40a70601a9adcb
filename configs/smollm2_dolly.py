"""SmolLM2-135M-Instruct into a shallower copy of itself, on dolly: methods side by side on a CPU.

    python -m minillm_jax.compare --config configs/smollm2_dolly.py --methods sft,kd,seqkd,minillm

Models and most settings are those of the quickstart. Students learn first from dolly's own answers,
as the paper's do; SeqKD and the judgement are by the teacher as it is, at its temperature of 0.6.
Prompts of more than 64 tokens, most of those with a passage to read, are left out. The data is
found as that of `configs/gpt2_tiny_dolly.py` is; `:tiny` takes random models.
"""

from configs import quickstart
from configs.paper import dolly, shared


def get_config(arg: str = ""):
    """The settings; `arg` is empty or `tiny`."""
    if arg not in ("", "tiny"):
        raise ValueError(f"configs/smollm2_dolly.py takes no argument or `tiny`, not `{arg}`")
    config = quickstart.get_config(arg)
    config.name = "smollm2_dolly" + (f"-{arg}" if arg else "")
    config.answers.source = "data"
    config.corpus.files, config.corpus.coefficient = (), 1.0
    if arg:
        return config
    config.data.train, config.data.validation, config.data.test = dolly()
    config.data.max_prompt = 64
    config.data.long_prompts = "drop"
    config.answers.limit = 256  # of SeqKD
    config.sft.steps, config.distill.steps = 12, 24
    config.distill.batch_size = config.sft.batch_size
    config.distill.start_temperature = 1.0  # a method shows what it does from the same student
    for stage in (config.sft, config.distill):  # all methods are chosen by the same figure
        stage.evaluate_every = stage.save_every = 12
        stage.keep = "reverse_kl"
    config.evaluate.exposure_samples = 2
    sentences = shared() / "data" / "sst2" / "validation.jsonl.gz"
    labelled = sentences if sentences.is_file() else "hub:stanfordnlp/sst2"
    config.evaluate.calibration = (f"sst2:128={labelled}",)
    return config
