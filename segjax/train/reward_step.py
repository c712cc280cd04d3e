"""The reward model's step: segments by the reference's entropy, their scores, Bradley-Terry.

`score_sequences` is also what fits the normaliser and what evaluation reads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.model.heads import scores, token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.rl.losses import bradley_terry, segment_mean
from segjax.rl.normalizer import relative_position
from segjax.rl.segmentation import segment
from segjax.settings import Optimizer
from segjax.train.optimizer import apply_update
from segjax.train.state import TrainState
from segjax.types import PreferenceBatch, Segments, Sequences


@dataclasses.dataclass(frozen=True)
class Scorer:
  """How sequences are cut and scored: both networks, granularity, threshold in nats."""

  reward: LlamaConfig
  reference: LlamaConfig
  granularity: str
  entropy_threshold: float


def score_sequences(
  params: Any, reference: Any, sequences: Sequences, scorer: Scorer
) -> tuple[Float[Array, 'B S'], Segments]:
  """The reward model's score at every token, and the segments that the reference's entropy cuts.

  Token and bandit granularity need no entropy, and the reference is not run.
  """
  if scorer.granularity == 'segment':
    _, entropy = token_logprobs(reference, sequences.ids, scorer.reference)
    entropy = jax.lax.stop_gradient(entropy)
  else:
    entropy = jnp.zeros(sequences.ids.shape, jnp.float32)
  cut = functools.partial(
    segment, granularity=scorer.granularity, entropy_threshold=scorer.entropy_threshold
  )
  segments = jax.vmap(cut)(entropy, sequences.response_mask, sequences.finished)
  return scores(params, sequences.ids, scorer.reward), segments


def pair_scores(
  params: Any, reference: Any, pairs: PreferenceBatch, scorer: Scorer
) -> tuple[Float[Array, 'B 2'], Segments]:
  """Mean segment score of chosen and rejected, in one forward of 2B rows."""
  score, segments = score_sequences(params, reference, _interleave(pairs), scorer)
  return jax.vmap(segment_mean)(score, segments).reshape(-1, 2), segments


def _interleave(pairs: PreferenceBatch) -> Sequences:
  """2B rows, chosen and rejected in turn: no row leaves its device, as a concatenation would."""
  return jax.tree.map(
    lambda chosen, rejected: jnp.stack([chosen, rejected], 1).reshape(-1, *chosen.shape[1:]),
    pairs.chosen,
    pairs.rejected,
  )


@functools.partial(
  jax.jit, static_argnames=('scorer', 'margin', 'optimizer', 'total_steps'), donate_argnames='state'
)
def reward_step(
  state: TrainState,
  reference: Any,
  pairs: PreferenceBatch,
  *,
  scorer: Scorer,
  margin: float,
  optimizer: Optimizer,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update: -mean log σ(score(chosen) - score(rejected) - margin), in float32."""

  def loss_fn(params):
    score, segments = pair_scores(params, reference, pairs, scorer)
    loss = jnp.mean(bradley_terry(score[:, 0], score[:, 1], margin))
    return loss, {
      'loss': loss,
      'accuracy': jnp.mean((score[:, 0] > score[:, 1]).astype(jnp.float32)),
      'margin': jnp.mean(score[:, 0] - score[:, 1]),
      'segments': jnp.mean(segments.num_segments.astype(jnp.float32)),
    }

  (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  state, update = apply_update(state, grads, loss, optimizer, total_steps)
  return state, metrics | update


@functools.partial(jax.jit, static_argnames='scorer')
def evaluate_pairs(
  params: Any, reference: Any, pairs: PreferenceBatch, *, scorer: Scorer
) -> Float[Array, 'B 2']:
  """Scores of chosen and rejected, for held-out accuracy."""
  return pair_scores(params, reference, pairs, scorer)[0]


@functools.partial(jax.jit, static_argnames='scorer')
def segment_statistics(
  params: Any, reference: Any, pairs: PreferenceBatch, *, scorer: Scorer
) -> tuple[Float[Array, 'N S'], Float[Array, 'N S'], Array]:
  """Relative position, score, and where segments end, for both sides of each pair (N = 2B)."""
  score, segments = score_sequences(params, reference, _interleave(pairs), scorer)
  return jax.vmap(relative_position)(segments), score, segments.end
