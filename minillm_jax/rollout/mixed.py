"""Teacher-mixed sampling: the student writes, at every position the teacher may take the pen.

Tokens come from p~ = (1 - alpha) q + alpha p (MiniLLM, section 2.2 "Teacher-Mixed Sampling").
That is a coin per position: with probability alpha draw from the teacher, else from the student.
The coins depend on no token, so they are thrown first, one sequence for the whole batch, and the
teacher reads only when it is needed: a whole run of tokens in one chunk, when its next coin comes
up or `chunk` tokens wait.

```
position   0 1 2 3 4 5 6 7 8
coin       s s s T s s s s T        T: the teacher draws
teacher          ^chunk 0-2        ^chunk 3-7; its hidden states 0..8 are all known then
```

Each row alone has exactly the law of p~, which is what w = q / p~ needs; rows share only the
schedule. Nothing is generated twice and no scoring pass follows: log q comes from the decode
steps, the teacher's hidden states from its chunks, and log p from their head.
"""

import math
from dataclasses import dataclass
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from minillm_jax.axes import parts
from minillm_jax.models import DecoderConfig, extend, head, init_cache, logits, unstack
from minillm_jax.objectives.policy import log_mixture
from minillm_jax.rollout.compiled import decoding
from minillm_jax.rollout.warp import draw
from minillm_jax.types import Params, Sequences


@flax.struct.dataclass
class Rollout(Sequences):
    """Sampled responses with what the objective needs of both models at every position.

    At masked positions the log-probabilities are 0. `teacher_hidden[:, t]` is the teacher's last
    hidden state that predicts token t: with the teacher's head it gives p over the whole
    vocabulary again in every inner epoch, at 1/30 or less of the bytes of the logits.
    """

    log_q: jax.Array  # [B, N] float32, the student that wrote
    log_p: jax.Array  # [B, N] float32, the teacher
    log_mix: jax.Array  # [B, N] float32, log((1 - alpha) q + alpha p)
    teacher_hidden: jax.Array  # [B, N, Dp]


@dataclass(frozen=True)
class Mixing:
    """Settings of a collection.

    `slots` is the response buffer N, `alpha` the teacher's share (the paper's 0.2), `vocab` the
    number of ids true in both models, `dtype` that of the student's arithmetic and cache; the
    teacher's is that of its parameters. `chunk` is the most tokens of a row that the teacher reads
    at once; 0: as `longest_chunk` has it.
    """

    slots: int
    alpha: float
    eos_id: int
    pad_id: int
    vocab: int
    dtype: str = "float32"
    chunk: int = 0


# Tokens that an accelerator reads in little more time than one, for it reads the same weights for
# them; to a CPU with more than a few rows the length of a chunk hardly matters.
_AT_ONCE = 128
_LEAST = 6  # with many rows, where products are the bound
_LONGER = 1 / 32  # of the runs of tokens between two coins do not fit into one chunk


def longest_chunk(mixing: Mixing, rows: int) -> int:
    """Most tokens of a row that the teacher reads at once, in a collection of so many `rows`."""
    if mixing.chunk:
        return min(mixing.chunk, mixing.slots)
    longest = mixing.slots
    if mixing.alpha == 1:
        longest = 1
    elif mixing.alpha > 0:  # P(run > n) = (1 - alpha)^n
        longest = math.ceil(min(longest, math.log(_LONGER) / math.log1p(-mixing.alpha)))
    return min(max(_AT_ONCE // _on_a_device(rows), _LEAST), longest)


def scored_at_once(slots: int, rows: int) -> int:
    """Positions whose log p is computed at once, of the `slots` of so many rows."""
    slices = -(-slots // max(_AT_ONCE // _on_a_device(rows), 8))
    return -(-slots // slices)


def throw_coins(key: jax.Array, mixing: Mixing) -> jax.Array:
    """Where the teacher draws, [N] bool, in the collection of this `key`."""
    return jax.random.bernoulli(jax.random.split(key)[0], mixing.alpha, (mixing.slots,))


def _on_a_device(rows: int) -> int:
    return rows // parts("batch", rows)


@decoding(static_argnames=("student", "teacher", "mixing", "most"))
def collect(
    student: DecoderConfig,
    teacher: DecoderConfig,
    params: Params,
    teacher_params: Params,
    prompt: jax.Array,  # [B, P] left-padded
    prompt_mask: jax.Array,  # [B, P]
    key: jax.Array,
    mixing: Mixing,
    most: int | None = None,
) -> Rollout:
    """Sample a response per prompt from the mixture of the two models as they are.

    With `most`, at least the tokens of the prompts that `ragged.distinct` counts, no other is read.

    Returns:
        The rollout; the loop ends as soon as every row has ended.
    """
    rows, width = prompt.shape
    slots, chunk, vocab = mixing.slots, longest_chunk(mixing, rows), mixing.vocab
    coins = throw_coins(key, mixing)
    # Whatever rows fill the batch.
    uniforms = jax.random.uniform(jax.random.split(key)[1], (rows, slots)).T

    dtype, teacher_dtype = mixing.dtype, teacher_params["embed"]["tokens"].dtype
    q_weights = unstack(student, params, dtype)
    p_weights = unstack(teacher, teacher_params, teacher_dtype)
    q_head, p_head = head(student, q_weights.outer), head(teacher, p_weights.outer)
    read_q = partial(extend, student, q_weights, dtype=dtype)
    read_p = partial(extend, teacher, p_weights, dtype=teacher_dtype)
    q_cache = init_cache(student, rows, width + slots, dtype)
    # The last chunk is written whole, however few of its tokens are real.
    p_cache = init_cache(teacher, rows, width + slots + chunk, teacher_dtype)
    with jax.named_scope("prefill"):
        q_read, p_read = (
            {"first": True, "most": most, "stacked": None if most is None else one["layers"]}
            for one in (params, teacher_params)
        )
        hidden, q_cache = read_q(prompt, prompt_mask, q_cache, **q_read)
        p_hidden, p_cache = read_p(prompt, prompt_mask, p_cache, **p_read)
    states = jnp.zeros((rows, slots + chunk + 1, p_hidden.shape[-1]), p_hidden.dtype)
    states = states.at[:, 0].set(p_hidden[:, -1])

    def student_turn(carry):
        """One token for every row, from the teacher's scores where its coin is up."""
        t, done, hidden, cache, tokens, mask, log_q, teacher_scores = carry
        with jax.named_scope("student_step"):
            scores = logits(q_head, hidden)[:, :vocab]
            source = jnp.where(coins[t], teacher_scores, scores)
            token = jnp.where(done, mixing.pad_id, draw(source, uniforms[t]))
            chosen = jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0]
            log_prob = jnp.where(done, 0.0, chosen - jax.nn.logsumexp(scores, axis=-1))
            tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, t))
            mask = jax.lax.dynamic_update_slice(mask, ~done[:, None], (0, t))
            log_q = jax.lax.dynamic_update_slice(log_q, log_prob[:, None], (0, t))
            done = done | (token == mixing.eos_id)
            hidden, cache = read_q(token[:, None], ~done[:, None], cache)
        return t + 1, done, hidden[:, 0], cache, tokens, mask, log_q, teacher_scores

    def unfinished(t, done):
        return (t < slots) & ~jnp.all(done)

    def round_trip(carry):
        """Student tokens up to the teacher's next turn, then the teacher reads them."""
        first, done, hidden, q_cache, tokens, mask, log_q, states, p_cache = carry
        with jax.named_scope("teacher_turn"):
            state = jax.lax.dynamic_index_in_dim(states, first, axis=1, keepdims=False)
            # Not where the last chunk was merely full.
            teacher_scores = jax.lax.cond(
                coins[first],
                lambda state: logits(p_head, state)[:, :vocab],
                lambda state: jnp.zeros((rows, vocab), jnp.float32),
                state,
            )

        def students_turn(inner):
            t, done = inner[0], inner[1]
            teachers_turn = (t > first) & coins[jnp.minimum(t, slots - 1)]
            return unfinished(t, done) & (t < first + chunk) & ~teachers_turn

        t, done, hidden, q_cache, tokens, mask, log_q, _ = jax.lax.while_loop(
            students_turn,
            student_turn,
            (first, done, hidden, q_cache, tokens, mask, log_q, teacher_scores),
        )
        with jax.named_scope("teacher_chunk"):
            waiting = jax.lax.dynamic_slice_in_dim(tokens, first, chunk, axis=1)
            real = jnp.arange(chunk)[None] < t - first
            real &= jax.lax.dynamic_slice_in_dim(mask, first, chunk, axis=1)
            read, p_cache = read_p(waiting, real, p_cache, advance=t - first)
            states = jax.lax.dynamic_update_slice(states, read, (0, first + 1, 0))
        return t, done, hidden, q_cache, tokens, mask, log_q, states, p_cache

    buffer = slots + chunk
    start = (
        jnp.int32(0),
        ~prompt_mask.any(axis=1),  # rows that only fill the batch
        hidden[:, -1],
        q_cache,
        jnp.full((rows, buffer), mixing.pad_id, jnp.int32),
        jnp.zeros((rows, buffer), bool),
        jnp.zeros((rows, slots), jnp.float32),
        states,
        p_cache,
    )
    t, _, _, _, tokens, mask, log_q, states, _ = jax.lax.while_loop(
        lambda carry: unfinished(carry[0], carry[1]), round_trip, start
    )
    tokens, mask, states = (x[:, :slots] for x in (tokens, mask, states))
    log_p = jnp.where(mask, _label_log_probs(p_head, states, tokens, t, vocab), 0.0)
    log_mix = jnp.where(mask, log_mixture(log_q, log_p, mixing.alpha), 0.0)
    return Rollout(
        prompt=prompt,
        prompt_mask=prompt_mask,
        response=jnp.where(mask, tokens, mixing.pad_id),
        response_mask=mask,
        log_q=log_q,
        log_p=log_p,
        log_mix=log_mix,
        teacher_hidden=jnp.where(mask[..., None], states, 0),
    )


def _label_log_probs(top, states, tokens, length, vocab) -> jax.Array:
    """log p of the drawn tokens [B, N] from the teacher's states, a slice of positions at a time.

    Positions from `length` on, that no row reached, are left 0.
    """
    rows, slots = tokens.shape
    stride = scored_at_once(slots, rows)

    def step(carry):
        start, out = carry
        # The last slice is moved back to fit; what overlaps is computed twice, to the same value.
        at = jnp.minimum(start, slots - stride)
        some = jax.lax.dynamic_slice_in_dim(states, at, stride, 1)
        # As [B stride, E], which a CPU multiplies faster where rows are few.
        scores = logits(top, some.reshape(-1, some.shape[-1]))[:, :vocab]
        scores = scores.reshape(rows, stride, vocab)
        ids = jax.lax.dynamic_slice_in_dim(tokens, at, stride, 1)
        chosen = jnp.take_along_axis(scores, jnp.minimum(ids, vocab - 1)[..., None], -1)[..., 0]
        value = chosen - jax.nn.logsumexp(scores, axis=-1)
        return start + stride, jax.lax.dynamic_update_slice(out, value, (0, at))

    out = jnp.zeros((rows, slots), jnp.float32)
    with jax.named_scope("teacher_log_probs"):
        return jax.lax.while_loop(lambda c: c[0] < length, step, (jnp.int32(0), out))[1]
