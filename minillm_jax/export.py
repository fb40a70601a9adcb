"""`python -m minillm_jax.export --model WORKDIR --output DIR`: a student for transformers.

Writes config.json, model.safetensors and the tokenizer, in the type asked for. `--model` is a work
directory (its newest student, or that of `--stage`), a Hugging Face folder, or a GGUF file.
"""

import shutil
from pathlib import Path

from absl import flags

from minillm_jax import program
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
MODEL = flags.DEFINE_string(
    "model", None, "Work directory, folder, GGUF, or pip:NAME==VERSION.", flag_values=FLAGS
)
STAGE = flags.DEFINE_enum(
    "stage",
    None,
    ["teacher_sft", "student_sft", "distill"],
    "Which model of a run.",
    flag_values=FLAGS,
)
OUTPUT = flags.DEFINE_string("output", None, "New folder.", flag_values=FLAGS)
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of the weights.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    """Load, convert, and write to the new folder."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --model=... --output=...")
    model, folder = MODEL.value, OUTPUT.value
    if not model or not folder:
        missing = "output" if model else "model"
        raise InputError(f"--{missing} is missing: give --model and --output")
    output = Path(folder).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output} is there already and not empty: remove it or choose another")
    from minillm_jax.data.tokenizer import load_tokenizer
    from minillm_jax.modelfiles import model_path
    from minillm_jax.models import hf

    if STAGE.value:
        path = Path(model) / "stages" / STAGE.value / "model"
        if not path.is_dir():
            raise InputError(f"{path} is not there: run that stage first, or leave out --stage")
    else:
        path = model_path(model)
    checkpoint = hf.load(path, dtype=_dtype(DTYPE.value))
    tokenizer = load_tokenizer(path)
    hf.save(output, checkpoint.config, checkpoint.params, checkpoint.hf_config)
    try:
        tokenizer.save(output)
    except OSError:
        shutil.rmtree(output)  # a model without its tokenizer is of no use
        raise
    print(output)


def _dtype(name: str):
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


if __name__ == "__main__":
    program.run(main, FLAGS)
