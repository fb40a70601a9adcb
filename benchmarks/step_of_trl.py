"""On-policy distillation by TRL's DistillationTrainer, a step whenever it is asked for.

`against_trl` runs this with the interpreter of an environment that has trl and torch; it needs
nothing of ours but `stepwise`. The trainer's own loop runs: it is held before each step.

    PYTHON -m benchmarks.step_of_trl FOLDER      with what `against_trl` has written there
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from benchmarks.stepwise import Asked


class OneAtATime(TrainerCallback):
    """Waits before each step until it is asked for."""

    def __init__(self, asked: Asked):
        """Take the end of the conversation."""
        self.asked, self.turns = asked, iter(asked)

    def on_step_begin(self, args, state, control, **kwargs):
        """Wait; leave when nobody will ask again."""
        if next(self.turns, None) is None:
            raise SystemExit

    def on_step_end(self, args, state, control, **kwargs):
        """Say that the step is done."""
        self.asked.answer()


def main() -> None:
    """Load, and train for as long as steps are asked for."""
    asked = Asked()
    folder = Path(sys.argv[1])
    given = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for name in ("student", "teacher")
    ]
    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(given["prompts"]),
        max_steps=10**6,
        max_completion_length=given["slots"],
        generation_kwargs={"min_new_tokens": given["slots"]},
        learning_rate=given["learning_rate"],
        lr_scheduler_type="constant",
        beta=1.0,
        temperature=1.0,
        gradient_checkpointing=given["checkpointing"],
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DistillationTrainer(
        *models,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": given["prompts"]}),
        processing_class=AutoTokenizer.from_pretrained(folder / "teacher"),
        callbacks=[OneAtATime(asked)],
    )
    versions = {name: version(name) for name in ("trl", "torch", "transformers")}
    asked.answer(versions=versions, threads=torch.get_num_threads())
    trainer.train()


if __name__ == "__main__":
    main()
