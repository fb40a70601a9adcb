"""`python -m minillm_jax.judge --responses DIR --judge MODEL`: a language model scores the answers.

`--responses` is what `evaluate` has written: a work directory or its `responses.jsonl`. The judge
is any OpenAI-compatible server (`--base_url`), its key is in the environment (`OPENAI_API_KEY`, or
`--key_variable`). Before it starts it says what will be asked and about costs; `--dry_run` stops
there. Replies are kept, so a second start asks nothing twice and `--offline` asks nothing at all.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from minillm_jax import program
from minillm_jax.types import InputError

FLAGS = flags.FlagValues()
RESPONSES = flags.DEFINE_string("responses", None, "Folder or JSONL file.", flag_values=FLAGS)
JUDGE = flags.DEFINE_string("judge", None, "Name of the judging model.", flag_values=FLAGS)
BASE_URL = flags.DEFINE_string(
    "base_url", "", "Of the server, such as http://localhost:8000/v1; empty: OpenAI's.",
    flag_values=FLAGS,
)  # fmt: skip
KEY_VARIABLE = flags.DEFINE_string(
    "key_variable", "OPENAI_API_KEY", "Environment variable that has the key.", flag_values=FLAGS
)
MODE = flags.DEFINE_enum(
    "mode", "reference", ["reference", "pairwise", "single"],
    "Against the reference answer, against --baseline, or alone.", flag_values=FLAGS,
)  # fmt: skip
BASELINE = flags.DEFINE_string("baseline", "", "The other model of pairwise.", flag_values=FLAGS)
TESTS = flags.DEFINE_list("tests", None, "These test sets alone.", flag_values=FLAGS)
LIMIT = flags.DEFINE_integer("limit", 0, "First rows of each test set; 0: all.", flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 1, "First seeds of the answers.", 1, flag_values=FLAGS)
BAN = flags.DEFINE_bool("ban", False, "Judge the answers with the n-gram ban.", flag_values=FLAGS)
TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Of the judge; below 0: the server's own.", flag_values=FLAGS
)
MAX_TOKENS = flags.DEFINE_integer("max_tokens", 512, "Longest reply.", 1, flag_values=FLAGS)
PER_MINUTE = flags.DEFINE_float("per_minute", 0.0, "Most requests; 0: any.", 0, flag_values=FLAGS)
PARALLEL = flags.DEFINE_integer("parallel", 4, "Requests at a time.", 1, flag_values=FLAGS)
PRICE = flags.DEFINE_list(
    "price", None, "USD per million tokens in and out, such as 2.5,10.", flag_values=FLAGS
)
MAX_COST = flags.DEFINE_float("max_cost", None, "Refuse to start above.", flag_values=FLAGS)
OFFLINE = flags.DEFINE_bool("offline", False, "From kept replies alone.", flag_values=FLAGS)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Say what it takes, and end.", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    """Judge the responses that the flags describe."""
    if len(argv) > 1:
        raise InputError(f"{argv[1]!r} is no flag: write --flag=value")
    responses, judge = RESPONSES.value, JUDGE.value
    if not (responses and judge):
        missing = "judge" if responses else "responses"
        raise InputError(f"--{missing} is missing: give --responses DIR --judge MODEL")
    from minillm_jax.evaluation.endpoint import Endpoint, Settings
    from minillm_jax.evaluation.judging import figures, items, scores, verdict
    from minillm_jax.reporting.progress import Progress
    from minillm_jax.reporting.report import write_report
    from minillm_jax.reporting.writers import write_json, write_rows

    file = responses_file(Path(responses))
    found = items(chosen(file), MODE.value, BASELINE.value)
    if not found:
        raise InputError(f"{file}: no responses of these --tests and --baseline to judge")
    settings = Settings(
        model=judge,
        base_url=BASE_URL.value,
        key_variable=KEY_VARIABLE.value,
        temperature=TEMPERATURE.value,
        max_tokens=MAX_TOKENS.value,
        per_minute=PER_MINUTE.value,
        parallel=PARALLEL.value,
        offline=OFFLINE.value,
    )
    endpoint = Endpoint(settings, file.parent / "judge_cache.jsonl")
    questions = [question for item in found for question in item.questions]
    announce(endpoint.estimate(questions))
    if DRY_RUN.value:
        return
    count = 1 if MODE.value == "single" else 2
    with Progress("judge", len(set(questions))) as bar:
        said = endpoint.ask(questions, lambda r: scores(r, count) is not None, bar.update)
    if refused := said.count(""):
        line = f"judge: {refused} questions were refused, and count as without scores"
        print(line, file=sys.stderr)
    replies = iter(said)
    judged = []
    for item in found:
        texts = [next(replies) for _ in item.questions]
        judged.append((item, texts, verdict(item, texts)))
    place = ("test", "model", "seed", "row")
    write_rows(
        file.parent / f"judge_{MODE.value}.jsonl",
        (
            {key: getattr(item, key) for key in place} | {"replies": texts} | (said or {})
            for item, texts, said in judged
        ),
    )
    tests = figures((item, said) for item, _, said in judged)
    about = {"judge": judge, "mode": MODE.value, "baseline": BASELINE.value}
    write_json(file.parent / f"judge_{MODE.value}.json", about | {"tests": tests})
    show(tests)
    if (file.parent.parent / "summary.json").exists():
        print(f"report: {write_report(file.parent.parent)}", file=sys.stderr)


def responses_file(path: Path) -> Path:
    """The file of responses that a folder has.

    Raises:
        InputError: there is none.
    """
    for file in (path, path / "responses.jsonl", path / "evaluate" / "responses.jsonl"):
        if file.is_file():
            return file
    raise InputError(f"{path}: no responses.jsonl; run `evaluate` first, or correct the path")


def chosen(file: Path) -> list[dict[str, Any]]:
    """The rows that the flags ask for.

    Raises:
        InputError: a row that `evaluate` has not written, or no such test set or model.
    """
    from minillm_jax.reporting.writers import read_rows

    rows = read_rows(file)
    needed = {"test", "model", "seed", "row", "ban", "instruction", "input", "references"}
    for number, row in enumerate(rows, 1):
        if missing := (needed | {"response"}) - set(row):
            raise InputError(f"{file}:{number}: no {min(missing)}: give the file of `evaluate`")
    if MODE.value == "pairwise" and BASELINE.value not in {row["model"] for row in rows}:
        models = ", ".join(sorted({row["model"] for row in rows}))
        raise InputError(f"--baseline={BASELINE.value}: choose from {models}")
    seeds = sorted({row["seed"] for row in rows})[: SEEDS.value]
    rows = [
        row
        for row in rows
        if bool(row["ban"]) == BAN.value
        and row["seed"] in seeds
        and (not TESTS.value or row["test"] in TESTS.value)
    ]
    if not LIMIT.value:
        return rows
    first = {
        test: sorted({row["row"] for row in rows if row["test"] == test})[: LIMIT.value]
        for test in {row["test"] for row in rows}
    }
    return [row for row in rows if row["row"] in first[row["test"]]]


def announce(estimate: Any) -> None:
    """Say what will be asked and about costs, if every reply has scores and none is asked twice.

    Raises:
        InputError: more than --max_cost, or a price that is not two numbers.
    """
    words = (
        f"judge: {estimate.questions} questions to ask, {estimate.cached} answered already; about "
        f"{estimate.tokens_in:,} tokens in, at most {estimate.tokens_out:,} out"
    )
    if PRICE.value:
        try:
            price_in, price_out = map(float, PRICE.value)
        except ValueError as error:
            raise InputError("--price: give two numbers, of a million tokens in and out") from error
        cost = estimate.cost(price_in, price_out)
        words += f", about {cost:.2f} USD"
        if MAX_COST.value is not None and cost > MAX_COST.value:
            raise InputError(f"{words}, more than --max_cost={MAX_COST.value}: lower --limit")
    elif MAX_COST.value is not None:
        raise InputError("--max_cost needs --price, such as --price=2.5,10")
    print(words, file=sys.stderr)


def show(tests: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a line per test set and model."""
    for test, models in tests.items():
        for model, found in models.items():
            if not found["judged"]:
                line = "no reply with scores"
            elif "ratio" in found:
                line = f"{100 * found['ratio']:.1f} % of the other's score, {found['wins']:.0%} won"
            else:
                line = f"{found['score']:.2f} of 10"
            unparsed = f", {found['unparsed']} without scores" if found["unparsed"] else ""
            print(f"{test}, {model}: {line}{unparsed}")


if __name__ == "__main__":
    program.run(main, FLAGS)
