"""The sizes of an experiment's batches, for people: what follows from settings and devices."""

from collections.abc import Iterable
from typing import Any

from minillm_jax.axes import kept_whole
from minillm_jax.build import Builder
from minillm_jax.dataset import SPLITS
from minillm_jax.models import DecoderConfig


def geometry(build: Builder, names: Iterable[str]) -> dict[str, Any]:
    """Sizes of the batches, for `--dry_run`: known without reading or fetching a model."""
    c = build.config.data
    rows = {split: build.data.count(split) for split in SPLITS}
    found: dict[str, Any] = {
        "prompts": rows,
        "prompt_slots": c.max_prompt,
        "response_slots": c.max_response,
    }
    if c.max_answer > c.max_response and (
        build.outline.answers == "data" or build.outline.tunes_teacher
    ):
        found["answer_slots"] = min(c.max_answer, build.data.max_tokens)
    for name in names:
        section, known = build.section(name), rows["train"]
        known = known if isinstance(known, int) else 0
        s = build.schedule(name, known)
        portions = {"batch": s.batch_size, "micro_batches": build.micro_batches(name)}
        if section["epochs"]:
            portions["epochs"] = section["epochs"]
        updates = s.steps if known or not section["epochs"] else None
        if s.rollouts:
            found[name] = {
                "rollouts": s.rollouts,
                **portions,
                "inner_epochs": s.inner_epochs,
                "updates_per_collection": s.updates_per_round,
                "collections": -(-s.steps // s.updates_per_round),
                "updates": updates,
            }
        else:
            found[name] = portions | {"updates": updates}
    return found


def in_words(build: Builder, name: str, model: DecoderConfig) -> str:
    """The batches of one stage, and what of its model the mesh does not split, for its start."""
    s, parts = build.schedule(name), build.micro_batches(name)
    rows = s.batch_size // build.ways // parts
    line = f"{s.steps} updates of {s.batch_size} rows = {build.ways} x {rows} x {parts} "
    line += "(devices x rows at once x micro-batches)"
    if s.rollouts:
        line += f", {s.updates_per_round} per collection of {s.rollouts}"
    said = [line, *kept_whole(model.axis_sizes, build.mesh)]
    if name == "distill" and build.outline.needs_teacher:
        copied = kept_whole(build.teacher_config.axis_sizes, build.mesh)
        said += [f"of the teacher, {line}" for line in copied]
    return "; ".join(said)
