import math

from minillm_jax.reporting import results


def _summary(**reverse_kl):
    return {
        "models": {m: {"reverse_kl": v, "reverse_kl_stderr": 0.01} for m, v in reverse_kl.items()}
    }


def test_findings_name_the_model_that_training_started_from():
    lines = results.findings(_summary(minillm=0.532, sft=0.7, start=1.75, teacher=None))
    assert lines == [
        "The MiniLLM student: reverse KL 0.53, 24 % below the SFT student (0.70)",
        "The SFT student: reverse KL 0.70, 60 % below the student at start (1.75)",
    ]


def test_a_worse_result_is_said_to_be_worse():
    (line, _) = results.findings(_summary(start=1.0, sft=0.5, minillm=0.6))
    assert line == "The MiniLLM student: reverse KL 0.60, 20 % above the SFT student (0.50)"


def test_a_difference_within_noise_is_said_to_be():
    summary = _summary(sft=0.70, minillm=0.68)  # 2 sqrt(2) 0.01 = 0.028
    assert results.findings(summary)[0].endswith("(0.70), within two standard errors")
    assert not results.findings(_summary(sft=0.70, minillm=0.67))[0].endswith("errors")


def test_another_method_is_compared_with_the_sft_student():
    comparisons = results.comparisons(_summary(sft=0.5, minillm=0.4, gkd=0.45))
    assert [(c.model, c.base) for c in comparisons] == [("minillm", "sft"), ("gkd", "sft")]
    (unknown, _) = results.comparisons(_summary(sft=0.5, mine=0.4, start=0.9))
    assert (unknown.model, unknown.base) == ("mine", "sft")


def test_what_is_missing_is_left_out():
    assert results.findings({}) == results.findings(_summary(sft=0.5)) == []
    summary = {"models": {"sft": {"nll": 1.5, "rouge_l": math.nan}, "start": {"nll": None}}}
    assert [c.key for c in results.columns(summary)] == ["nll"]
    assert results.models(summary) == ["start", "sft"]
    assert results.cell(summary, "start", results.columns(summary)[0]) == "–"


def test_rouge_is_shown_times_a_hundred_and_errors_beside_values():
    summary = {"models": {"sft": {"rouge_l": 0.2483, "rouge_l_stderr": 0.011}}}
    assert results.cell(summary, "sft", results.columns(summary)[0]) == "24.8 ± 1.1"


def test_a_deviation_over_seeds_stands_before_the_standard_error_and_is_no_column():
    figures = {"rouge_l": 0.25, "rouge_l_stderr": 0.011, "rouge_l_deviation": 0.02, "ece_sst2": 0.1}
    summary = {"models": {"sft": figures}}
    rouge_l, ece = results.columns(summary)
    assert (rouge_l.label, ece.label) == ("Rouge-L", "ECE, sst2")
    assert results.cell(summary, "sft", rouge_l) == "25.0 ± 2.0" and results.has_seeds(summary)
    del figures["rouge_l_deviation"]
    assert results.cell(summary, "sft", rouge_l) == "25.0 ± 1.1" and not results.has_seeds(summary)
