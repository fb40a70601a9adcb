"""MiniLLM: policy gradient of the reverse KL on teacher-mixed responses (arXiv 2306.08543).

1. `collect` samples from p~ = (1 - alpha) q + alpha p, and keeps log q, log p, log p~ of the drawn
   tokens and the teacher's hidden states.
2. `update` makes rewards, weights and advantages of its whole batch once (`objectives.policy`),
   then one forward pass of the student per micro-batch: the exact KL over the vocabulary comes
   from the stored teacher states and the teacher's head, so no teacher trunk runs here.
3. With a corpus, `update` also reads blocks of text and adds their loss (`methods.corpus`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from minillm_jax.methods import Method, compiled
from minillm_jax.methods import corpus as corpus_lib
from minillm_jax.methods.accumulate import gradients, lengths
from minillm_jax.methods.corpus import CorpusLoss
from minillm_jax.models import DecoderConfig, head
from minillm_jax.models.ragged import PROMPTS, UPDATES, room
from minillm_jax.objectives import policy as policy_lib
from minillm_jax.objectives import reduce, vocab
from minillm_jax.objectives.policy import Policy
from minillm_jax.rollout import Mixing, collect, most_tokens, response_states
from minillm_jax.train_state import TrainState
from minillm_jax.types import Params, Sequences


def method(
    student: DecoderConfig,
    teacher: DecoderConfig,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    *,
    policy: Policy,
    mixing: Mixing,
    micro_batches: int = 1,
    dtype: str = "float32",
    shardings: Any = None,
    remat: str = "none",
    corpus: CorpusLoss | None = None,
    collect_batch: int = 0,
    windows: Sequence[int] = (),
    ragged: bool = False,
) -> Method:
    """MiniLLM with `frozen` the teacher's parameters.

    A collection is written `collect_batch` responses at a time (0: all), which bounds the memory of
    the two caches; it must divide their number.

    With `corpus`, the batch of an update is (rollout, tokens [B', T]), B' a multiple of
    `micro_batches`; it needs not be that of the rollout. With several `windows` a micro-batch is
    read no further than its longest row: `accumulate.gradients`. With `ragged` each distinct token
    of prompts, and with no more than one window of what an update reads, is read once:
    `models.ragged`.
    """
    short = len(windows) > 1

    def loss(score: vocab.Scores, targets: Any, mask: jax.Array) -> jax.Array:
        return policy_lib.losses(policy, score["log_q"], score["reverse_kl"], targets, mask)["loss"]

    def loss_sums(
        params: Params, frozen: Params, batch: Any, share: Any, most: Any, window: int | None
    ):
        rollout, targets, text = batch
        mask = rollout.response_mask
        own = {"dtype": dtype, "remat": remat, "max_tokens": window, "most": most[0]}
        hidden = response_states(student, params, rollout, **own)
        q_head = head(student, params, hidden.dtype)
        p_head = head(teacher, frozen, rollout.teacher_hidden.dtype)
        with jax.named_scope("vocabulary"):
            summed, score = vocab.loss_sum(
                loss,
                hidden,
                q_head.weight,
                q_head.bias,
                rollout.teacher_hidden,
                p_head.weight,
                p_head.bias,
                rollout.response,
                mask,
                targets,
                vocab_size=mixing.vocab,
                short=short,
            )
        # The same values again, a few numbers per token, for the log.
        values = policy_lib.losses(policy, score["log_q"], score["reverse_kl"], targets, mask)
        values["entropy"] = score["entropy"]
        pairs = {
            name: reduce.total(values[key], mask)
            for name, key in (
                ("policy_loss", "policy"),
                ("single_step_loss", "single_step"),
                ("reverse_kl", "reverse_kl"),
                ("clip_fraction", "clipped"),
                ("entropy", "entropy"),
            )
        }
        counted = reduce.total(values["loss"], mask, policy.reduction)
        pairs["loss"] = reduce.Pair(summed, counted.count)
        if corpus:
            with jax.named_scope("corpus"):
                models = student, teacher, params, frozen
                size = mixing.vocab
                options = {"size": size, "dtype": dtype, "remat": remat, "most": most[1]}
                found = corpus_lib.sums(corpus, *models, text, **options)
            summed += corpus.coefficient * share * found.sum
            pairs |= {"loss": reduce.Pair(summed, counted.count), "corpus_loss": found}
        return pairs

    def update(state: TrainState, frozen: Params, batch: Any, most: Any = (None, None)):
        rollout, text = batch if corpus else (batch, None)
        mask = rollout.response_mask
        count = reduce.total(rollout.log_q, mask, policy.reduction).count
        share = corpus_lib.share(text, count) if corpus else None
        targets = policy_lib.prepare(policy, rollout.log_p, rollout.log_q, rollout.log_mix, mask)
        grads, metrics = gradients(
            lambda params, micro, window: loss_sums(params, frozen, micro, share, most, window),
            state.params,
            (rollout, targets, text),
            micro_batches,
            windows=windows,
            tokens=lengths(rollout),
        )
        metrics |= {
            "reward": reduce.mean(reduce.total(targets.reward, mask)),
            "response_length": reduce.mean(
                reduce.Pair(mask.sum(dtype="float32"), mask.any(axis=1).sum(dtype="float32"))
            ),
            "ess": reduce.effective_sample_size(targets.weight, mask),
            "learning_rate": learning_rate(state.step - state.skipped),
        }
        state, more = state.apply_gradients(optimizer, grads, metrics["loss"])
        return state, metrics | more

    def collect_rollout(params: Params, frozen: Params, prompts: Sequences, key: jax.Array):
        rows = prompts.prompt.shape[0]
        size = min(collect_batch or rows, rows)
        slices = [slice(first, first + size) for first in range(0, rows, size)]
        keys = [key] if len(slices) == 1 else jax.random.split(key, len(slices))
        parts = [
            collect(
                student,
                teacher,
                params,
                frozen,
                prompts.prompt[here],
                prompts.prompt_mask[here],
                its_key,
                mixing,
                room(prompts.prompt[here], prompts.prompt_mask[here], PROMPTS) if ragged else None,
            )
            for here, its_key in zip(slices, keys, strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    def told(batch: Any):
        rollout, text = batch if corpus else (batch, None)

        def at(shares: Sequence[float]) -> tuple[int | None, int | None]:
            of_text = None if text is None else room(text, text >= 0, shares, micro_batches)
            return most_tokens(rollout, shares, micro_batches), of_text

        # At one share of what can be read so, and not at one each, so that there are few programs.
        rows, blocks = at(UPDATES)
        for share in UPDATES:
            found = at((share,))
            if (found[0] or not rows) and (found[1] or not blocks):
                return found
        return None, None

    return Method(
        update=compiled(update, shardings),
        collect=collect_rollout,
        most=told if ragged and not short else None,
    )
