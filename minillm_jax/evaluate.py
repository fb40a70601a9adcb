"""`python -m minillm_jax.evaluate --model DIR`: measure models that are there already.

`--model` is a work directory (its newest student), a stage's `model`, a Hugging Face folder, a GGUF
file, a model of the Hub or `pip:NAME==VERSION`; several as `NAME=DIR`, each with a `--model` of its
own. Of a work directory its settings hold: teacher, test set, template, lengths; any other model
needs `--test` with answers, and `--teacher` to be compared with one. The flags override. What is
measured is what the stage `evaluate` measures, and how: see `configs/common.py`, `evaluate`.
Without `--output` it goes to `evaluation` in the work directory, else to runs/evaluation.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from minillm_jax import program
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
MODELS = flags.DEFINE_multi_string("model", None, "[NAME=]MODEL.", flag_values=FLAGS)
TEACHER = flags.DEFINE_string("teacher", None, "The teacher to compare with.", flag_values=FLAGS)
OUTPUT = flags.DEFINE_string("output", None, "Folder for what comes out.", flag_values=FLAGS)
# Those below are settings of the config: their names there, and what they are.
SETTINGS = {
    "test": ("data.test", "JSONL file, or hub:OWNER/NAME, of instruction, input and output."),
    "more_tests": ("data.more_tests", "Further ones, NAME=FILE,NAME=FILE."),
    "template": ("data.template", "chat, alpaca or alpaca_qwen."),
    "max_prompt": ("data.max_prompt", "Tokens of a prompt; rows with longer ones are left out."),
    "max_response": ("data.max_response", "Most tokens of an answer."),
    "prompts": ("evaluate.prompts", "Use that many rows of each set; 0: all."),
    "batch_size": ("evaluate.batch_size", "Prompts at a time."),
    "seeds": ("evaluate.seeds", "Sampled answers per prompt."),
    "no_repeat_ngram": ("evaluate.no_repeat_ngram", "Once more with this ban (paper: 6)."),
    "exposure_samples": ("evaluate.exposure_samples", "Of ExAccErr (paper: 10)."),
    "overlap": ("evaluate.overlap", "With so many of the teacher's likeliest tokens."),
    "calibration": ("evaluate.calibration", "sst2=FILE,boolq=FILE, or sst2:ROWS=FILE."),
    "dtype": ("student.dtype", "Arithmetic: float32, bfloat16 or float16."),
    "seed": ("seed", "Of the first sampled answers."),
}
_LISTS = ("more_tests", "calibration")
_TEXTS = ("test", "template", "dtype")
for _name, (_key, _what) in SETTINGS.items():
    if _name in _LISTS:
        flags.DEFINE_list(_name, None, _what, flag_values=FLAGS)
    elif _name in _TEXTS:
        flags.DEFINE_string(_name, None, _what, flag_values=FLAGS)
    else:
        flags.DEFINE_integer(_name, None, _what, flag_values=FLAGS)


def main(argv: list[str]) -> None:
    """Measure the models that the flags name."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --flag=value")
    if not MODELS.value:
        raise InputError("no model given: add --model DIR")
    import jax

    from minillm_jax import hosts, pipeline
    from minillm_jax.modelfiles import model_path
    from minillm_jax.reporting.writers import MetricsWriter, write_json
    from minillm_jax.stages import Run
    from minillm_jax.stages.evaluation import judge_models

    hosts.connect()
    specs = named(MODELS.value)
    paths = {name: model_path(spec) for name, spec in specs.items()}
    workdir = next((Path(spec) for spec in specs.values() if is_run(Path(spec))), None)
    config, teacher = settings(workdir, next(iter(paths.values())))
    output = Path(OUTPUT.value or ((workdir or Path("runs")) / "evaluation"))
    build = builder(config, workdir, paths)
    makers: dict[str, Any] = {"teacher": lambda: build.teacher} if teacher else {}
    for name, path in paths.items():
        makers[name] = lambda path=path: build.student(path)
    with MetricsWriter(output) as metrics, jax.set_mesh(build.mesh):
        run = Run(build, workdir or output, metrics)
        write_json(output / "config.json", config.to_dict())
        judge_models(run, makers, output / "evaluate", compare=teacher)
    pipeline.summarise(build, output)
    if hosts.is_main():
        print(f"report: {output / 'report.html'}", file=sys.stderr)


def named(specs: list[str]) -> dict[str, str]:
    """Models by name: the one before `=`, else the last part of the path that says something.

    Raises:
        InputError: two of one name, or one called teacher.
    """
    found: dict[str, str] = {}
    for spec in specs:
        name, has_name, path = spec.partition("=")
        if not has_name or path.startswith("=") or "/" in name:  # pip:NAME==VERSION, or a path
            parts = [p for p in Path(spec).parts if p not in ("model", "stages", "/", ".")]
            name, path = (parts[-1] if parts else "model"), spec
        if name in found or name == "teacher":
            raise InputError(f"--model: {name!r} is taken: give NAME={path}")
        found[name] = path
    return found


def is_run(path: Path) -> bool:
    """Whether a folder is a work directory with its settings."""
    return (path / "config.json").is_file() and (path / "stages").is_dir()


def settings(workdir: Path | None, model: Path) -> tuple[Any, bool]:
    """The config of the measurement, and whether there is a teacher to compare with.

    Raises:
        InputError: no settings to start from, or no test set with answers.
    """
    import ml_collections

    from minillm_jax.reporting.writers import read_json

    try:
        from configs.common import base
    except ModuleNotFoundError as error:
        raise InputError("start in the root of the checkout, which has configs/") from error
    config: Any = base()
    teacher = bool(workdir or TEACHER.value)
    if workdir:
        config.update(ml_collections.ConfigDict(read_json(workdir / "config.json")))
    else:
        config.name = "evaluation"
        config.student.path = str(model)
        # Builder wants a teacher: without one, the model is in its place and nothing is compared.
        config.teacher.path = TEACHER.value or str(model)
        config.data.max_prompt, config.data.max_response = 256, 256
        if not FLAGS["test"].value:
            raise InputError("no test set: add --test FILE.jsonl of instruction, input and output")
    if workdir and TEACHER.value:
        config.teacher.path, config.teacher.fine_tuned = TEACHER.value, ""
        config.teacher.sha256 = ""
    if FLAGS["test"].value:
        config.answers.source = "data"
    config.data.long_prompts = "drop"
    for name, (key, _) in SETTINGS.items():
        value = FLAGS[name].value
        if value is not None:
            *section, last = key.split(".")
            place = config[section[0]] if section else config
            place[last] = tuple(value) if name in _LISTS else value
    return config, teacher


def builder(config: Any, workdir: Path | None, paths: dict[str, Path]) -> Any:
    """The Builder, after a look at all that will be read.

    Raises:
        InputError: data, vocabularies or positions that do not fit.
    """
    from minillm_jax.build import Builder
    from minillm_jax.check import check_ids, check_slots
    from minillm_jax.data.tokenizer import compare_vocabularies, load_tokenizer

    build = Builder(config, workdir or Path("."))
    tuned = (workdir or Path()) / "stages" / "teacher_sft" / "model"
    if workdir and tuned.is_dir() and not TEACHER.value:
        build.follow(tuned)
    if build.outline.answers == "data":
        build.data.gold("test")
    else:
        check_answers(build, workdir or Path("."))
    build.data.more_tests()
    build.data.labelled()
    largest = max(build.tokenizer.eos_id, *(max(e.prompt) for e in build.data.prompts("test")))
    models = {name: build.open(path) for name, path in paths.items()}
    for name, model in {"teacher": build.teacher_checkpoint, **models}.items():
        check_slots(config, name, model.config.max_positions)
        check_ids(name, model.path, model.config.vocab_size, largest)
    for path in list(paths.values())[1:]:
        compare_vocabularies(build.tokenizer, load_tokenizer(path))
    return build


def check_answers(build: Any, workdir: Path) -> None:
    """See that the teacher's answers in a work directory are to the prompts that will be asked.

    Raises:
        InputError: other limits have left out other prompts.
    """
    from minillm_jax.reporting.writers import read_rows

    rows = build.data.rows("test")
    asked = [rows[example.row].instruction for example in build.data.prompts("test")]
    found = read_rows(workdir / "stages" / "teacher_answers" / "answers.jsonl")
    answered = [row["instruction"] for row in found if row["split"] == "test"]
    if answered[: len(asked)] != asked:
        raise InputError(
            f"{workdir} has the teacher's answers to other prompts: leave --max_prompt and "
            "--template as they were, or give --test with answers"
        )


if __name__ == "__main__":
    program.run(main, FLAGS)
