"""`evaluate` on models that are there: every measure, what it writes, and what it refuses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from minillm_jax.evaluate import check_answers
from minillm_jax.evaluation import calibration
from minillm_jax.reporting.writers import read_json, read_rows
from minillm_jax.stages.held_out import pieces
from minillm_jax.types import InputError
from tests.evaluation.judge_server import serving
from tests.toy_run import PROMPTS, command, one_device, write_teacher


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def models(folder):
    write_teacher(folder / "big")
    write_teacher(folder / "small", seed=1, num_hidden_layers=1)
    short = [{"instruction": p, "output": "red sun moon"} for p in PROMPTS[:4]]
    long = {"instruction": "why", "output": ["no " * 7, "red red red red red red"]}
    write(folder / "test.jsonl", *short, long)
    write(folder / "other.jsonl", long)
    # The toys' tokenizer has the words yes and no.
    labelled = [{"question": p, "passage": "red", "answer": i > 2} for i, p in enumerate(PROMPTS)]
    write(folder / "boolq.jsonl", *labelled)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A folder in which everything was measured, two models against a teacher."""
    folder = tmp_path_factory.mktemp("judged")
    models(folder)
    with pytest.MonkeyPatch.context() as patch:
        one_device(patch)
        code = command(
            patch, "evaluate", f"--model=mine={folder / 'small'}", f"--teacher={folder / 'big'}",
            f"--test={folder / 'test.jsonl'}", f"--more_tests=other={folder / 'other.jsonl'}",
            "--template=alpaca", "--max_prompt=100", "--max_response=8", "--batch_size=5",
            "--seeds=2", "--seed=10", "--no_repeat_ngram=2", "--exposure_samples=2", "--overlap=3",
            f"--calibration=boolq={folder / 'boolq.jsonl'}", f"--output={folder / 'out'}",
        )  # fmt: skip
    assert code == 0
    return folder / "out"


def test_every_answer_is_there_with_its_scores(judged):
    rows = read_rows(judged / "evaluate" / "responses.jsonl")
    # Two models, two seeds, with and without the ban, of 5 and 1 prompts.
    assert len(rows) == 2 * 2 * 2 * 6 and {row["seed"] for row in rows} == {10, 20}
    figures = read_json(judged / "evaluate" / "figures.json")
    for model in ("teacher", "mine"):
        per_seed = [
            np.mean([
                row["rouge_l"] for row in rows
                if (row["model"], row["test"], row["seed"], row["ban"]) == (model, "test", seed, 0)
            ]) for seed in (10, 20)
        ]  # fmt: skip
        assert figures[model]["rouge_l"] == pytest.approx(np.mean(per_seed))
        assert figures[model]["rouge_l_deviation"] == pytest.approx(np.std(per_seed, ddof=1))
    assert rows[0]["references"] == ["red sun moon"]
    best = [row for row in rows if row["test"] == "other"]
    assert all(len(row["references"]) == 2 for row in best)


def test_the_ban_is_in_the_answers_that_say_so(judged):
    def twice(row):  # in the toys' tokenizer a word is a token
        words = row["response"].split()
        pairs = list(zip(words, words[1:], strict=False))
        return len(pairs) - len(set(pairs))

    rows = read_rows(judged / "evaluate" / "responses.jsonl")
    assert {row["ban"] for row in rows} == {0, 2}
    assert sum(twice(row) for row in rows if row["ban"]) == 0
    tests = read_json(judged / "evaluate" / "tests.json")
    assert set(tests) == {"test", "other"} and set(tests["other"]["mine"]) == {"plain", "ban"}
    assert tests["test"]["mine"]["ban"]["count"] == 5


def test_buckets_share_out_the_prompts(judged):
    lengths = read_json(judged / "evaluate" / "lengths.json")
    found = lengths["test"]["mine"]
    assert {bucket: one["count"] for bucket, one in found.items()} == {"0-5": 4, "6-10": 1}
    mean = (4 * found["0-5"]["rouge_l"] + found["6-10"]["rouge_l"]) / 5
    figures = read_json(judged / "evaluate" / "figures.json")
    assert figures["mine"]["rouge_l"] == pytest.approx(mean)


def test_comparisons_with_the_teacher(judged):
    figures = read_json(judged / "evaluate" / "figures.json")
    assert figures["mine"]["reverse_kl"] > 0.1 and figures["mine"]["reverse_kl_deviation"] > 0
    assert "reverse_kl" not in figures["teacher"]
    assert 0 < figures["mine"]["top_k_overlap"] < 1 and 0 < figures["mine"]["top_k_mass"] < 1
    curves = read_json(judged / "evaluate" / "exposure_bias.json")
    assert list(curves) == ["mine"] and len(curves["mine"]["excess"]) == 8
    # The first prefix is the prompt, which both read: no excess there.
    assert curves["mine"]["excess"][0] == pytest.approx(0, abs=1e-3)
    assert max(map(abs, curves["mine"]["excess"][:4])) > 1  # percent
    last = curves["mine"]["excess"][curves["mine"]["reach"] - 1]
    assert figures["mine"]["exposure_bias"] == pytest.approx(last / 100)


def test_calibration_is_that_of_its_bins(judged):
    found = read_json(judged / "evaluate" / "calibration.json")["boolq"]
    assert set(found) == {"teacher", "mine"}
    for one in found.values():
        assert one["rows"] == one["given"] == len(PROMPTS)
        assert sum(b["count"] for b in one["bins"]) == len(PROMPTS)
        gaps = [b["count"] * abs(b["accuracy"] - b["confidence"]) for b in one["bins"]]
        assert one["ece"] == pytest.approx(sum(gaps) / len(PROMPTS))
    assert len(found["mine"]["bins"]) <= calibration.BINS


def test_sampled_answers_have_a_ratio_per_token(judged):
    rows = read_rows(judged / "evaluate" / "answers.jsonl")
    responses = read_rows(judged / "evaluate" / "responses.jsonl")
    first = [
        r
        for r in responses
        if (r["model"], r["test"], r["seed"], r["ban"]) == ("mine", "test", 10, 0)
    ]
    for row, response in zip(rows, first, strict=True):
        mine = row["samples"]["mine"]
        assert "".join(mine["pieces"]).strip() == response["response"]
        assert len(mine["log_ratio"]) == len(mine["pieces"]) == response["tokens"]
        assert "log_ratio" not in row["samples"]["teacher"]


def test_the_report_shows_it_and_the_charts_are_files(judged):
    page = (judged / "report.html").read_text()
    for part in (
        "Test sets",
        "n-gram ban",
        "Exposure bias",
        "Reliability, boolq",
        "deviation over seeds",
        'class="q',
    ):
        assert part in page
    plots = {file.name for file in (judged / "evaluate" / "plots").iterdir()}
    assert plots == {"lengths-test.svg", "exposure-bias.svg", "reliability-boolq.svg"}


def test_a_judge_scores_the_answers_and_is_asked_once(judged, monkeypatch, capsys):
    pytest.importorskip("openai")
    with serving() as server:
        words = [
            f"--responses={judged}",
            "--judge=judge",
            f"--base_url={server.url}",
            "--tests=test",
        ]
        assert command(monkeypatch, "judge", *words, "--dry_run", "--price=1,1") == 0
        assert not server.asked and "about 0.0" in capsys.readouterr().err
        assert command(monkeypatch, "judge", *words, "--price=1,1", "--max_cost=0.0001") == 2
        assert not server.asked
        assert command(monkeypatch, "judge", *words) == 0
        asked = len(server.asked)
        assert command(monkeypatch, "judge", *words, "--offline") == 0
        assert len(server.asked) == asked > 0
    found = read_json(judged / "evaluate" / "judge_reference.json")
    # Always 8 for the first and 6 for the second: no answer is better.
    mine = found["tests"]["test"]["mine"]
    assert (mine["ratio"], mine["ties"], mine["first"], mine["judged"]) == (1.0, 1.0, 2.0, 5)
    assert "score ratio, 5 answers" in (judged / "report.html").read_text()
    assert command(monkeypatch, "judge", *words, "--mode=pairwise", "--baseline=her") == 2
    assert "choose from mine, teacher" in capsys.readouterr().err


def test_a_model_alone_is_compared_with_nothing(tmp_path, monkeypatch):
    one_device(monkeypatch)
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = command(
        monkeypatch, "evaluate", f"--model={tmp_path / 'small'}", "--test=test.jsonl",
        "--template=alpaca", "--max_prompt=80", "--max_response=4", "--output=out",
    )  # fmt: skip
    assert code == 0
    found = read_json(tmp_path / "out" / "evaluate" / "figures.json")
    assert list(found) == ["small"] and "rouge_l" in found["small"]
    assert not {"reverse_kl", "rouge_l_deviation"} & set(found["small"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no model given: add --model DIR"),
        (["--model=big"], "no test set: add --test FILE.jsonl"),
        (["--model=nowhere", "--test=test.jsonl"], "nowhere: no such file or folder"),
        (["--model=big", "--model=big"], "'big' is taken: give NAME=big"),
        (["--model=big", "--test=test.jsonl", "--seeds=0"], "config.evaluate.seeds=0: give"),
        (["--model=big", "--test=test.jsonl", "--calibration=mnli=x"], "no calibration data"),
        (["--model=big", "--test=test.jsonl", "--more_tests=test=x"], "choose another name"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line(tmp_path, monkeypatch, capsys, words, says):
    one_device(monkeypatch)
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "evaluate", "--template=alpaca", *words) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_answers_to_other_prompts_are_refused(tmp_path):
    folder = tmp_path / "stages" / "teacher_answers"
    folder.mkdir(parents=True)
    rows = [SimpleNamespace(instruction=text) for text in ("long", "short", "other")]
    write(
        folder / "answers.jsonl",
        {"split": "train", "instruction": "x"},
        *({"split": "test", "instruction": row.instruction} for row in rows),
    )

    def asking(*which):
        data = SimpleNamespace(
            rows=lambda split: rows, prompts=lambda split: [SimpleNamespace(row=i) for i in which]
        )
        return SimpleNamespace(data=data)

    check_answers(asking(0, 1), tmp_path)
    with pytest.raises(InputError, match="answers to other prompts: leave --max_prompt"):
        check_answers(asking(1, 2), tmp_path)


class Bytes:
    """Each id is a byte of UTF-8."""

    def decode_batch(self, rows):
        return [bytes(row).decode("utf-8", "replace") for row in rows]


def test_pieces_keep_a_character_of_several_tokens_whole():
    text = "a é 語."
    found = pieces(Bytes(), list(text.encode()))  # type: ignore[reportArgumentType]
    assert "".join(found) == text and len(found) == len(text.encode())
    assert found[2:5] == ["", "é", " "] and found[5:8] == ["", "", "語"]
