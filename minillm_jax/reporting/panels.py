"""What the training charts show, as data: the metrics of each panel, their unit and colour."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """One metric of one stage; `points` for the few that evaluations leave."""

    stage: str
    metric: str
    label: str
    colour: str
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart of training: what it shows, its unit and its series."""

    name: str
    title: str
    unit: str
    series: tuple[Series, ...]
    log: bool = False
    limits: tuple[float, float] | None = None


_SFT, _MINILLM = "sft", "minillm"
PANELS = (
    Panel(
        "reverse-kl",
        "Reverse KL while distilling",
        "nats per token",
        (
            Series("distill", "reverse_kl", "on the training samples", _MINILLM),
            Series("distill", "valid_reverse_kl", "held-out prompts", _MINILLM, points=True),
        ),
    ),
    Panel(
        "distill-losses",
        "Losses while distilling",
        "per token",
        (
            Series("distill", "policy_loss", "policy", _MINILLM),
            Series("distill", "single_step_loss", "single step", "other1"),
            Series("distill", "corpus_loss", "corpus", _SFT),
        ),
    ),
    Panel(
        "distill-loss",
        "Loss while distilling",
        "nats per token",
        (
            Series("distill", "loss", "training", _MINILLM),
            Series("distill", "valid_loss", "validation", _MINILLM, points=True),
        ),
    ),
    Panel(
        "teacher-sft-loss",
        "Teacher fine-tuning",
        "cross-entropy, nats per token",
        (
            Series("teacher_sft", "loss", "training", "teacher"),
            Series("teacher_sft", "valid_loss", "validation", "teacher", points=True),
        ),
    ),
    Panel(
        "sft-loss",
        "Student SFT",
        "cross-entropy, nats per token",
        (
            Series("student_sft", "loss", "training", _SFT),
            Series("student_sft", "valid_loss", "validation", _SFT, points=True),
        ),
    ),
    Panel(
        "rouge-l",
        "Rouge-L on the validation set",
        "F1, sampled answers",
        (
            Series("teacher_sft", "valid_rouge_l", "teacher, SFT", "teacher", points=True),
            Series("student_sft", "valid_rouge_l", "student, SFT", _SFT, points=True),
            Series("distill", "valid_rouge_l", "student, distilled", _MINILLM, points=True),
        ),
    ),
    Panel(
        "length",
        "Length of sampled answers",
        "tokens",
        (Series("distill", "response_length", "mean of the batch", _MINILLM),),
    ),
    Panel(
        "ess",
        "Importance weights",
        "fraction",
        (
            Series("distill", "ess", "effective sample size", _MINILLM),
            Series("distill", "clip_fraction", "clipped tokens", "other1"),
        ),
        limits=(0.0, 1.0),
    ),
    Panel(
        "entropy",
        "Entropy of the student",
        "nats per token",
        (Series("distill", "entropy", "on the training samples", _MINILLM),),
    ),
    Panel(
        "grad-norm",
        "Gradient norm",
        "before clipping, log scale",
        (
            Series("student_sft", "grad_norm", "SFT", _SFT),
            Series("distill", "grad_norm", "MiniLLM", _MINILLM),
        ),
        log=True,
    ),
)
