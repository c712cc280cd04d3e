"""The reward model's step: segments of each response, their scores, Bradley-Terry.

`score_sequences` is also what fits the normaliser and what evaluation reads.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from segjax.config.settings import RewardTraining
from segjax.model.heads import scores, token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl.losses import bradley_terry
from segjax.rl.normalizer import normalize, relative_position
from segjax.train import gradient_accumulation
from segjax.train.optimizer import apply_update
from segjax.train.segmenter import Segmenter, segment_batch, sequence_scores
from segjax.train.state import TrainState
from segjax.types import Normalizer, PackingPlan, PackingSlots, PreferenceBatch, Segments, Sequences


@dataclasses.dataclass(frozen=True)
class SegmentScorer:
  """How sequences are cut and scored: both networks, and the cutter."""

  reward: LlamaConfig
  reference: LlamaConfig
  cutter: Segmenter


def entropies(
  reference: Any, sequences: Sequences, scorer: SegmentScorer, places: PackingSlots | None = None
) -> Float[Array, 'B S']:
  """Entropy under the reference at every token, nats: as given, computed, or 0 if not needed."""
  if sequences.entropy is not None:
    return sequences.entropy
  if not scorer.cutter.needs_entropy:
    return jnp.zeros(sequences.ids.shape, jnp.float32)
  _, entropy = run_packed(token_logprobs, reference, sequences.ids, scorer.reference, places)
  return jax.lax.stop_gradient(entropy)


def score_sequences(
  params: Any,
  reference: Any,
  sequences: Sequences,
  scorer: SegmentScorer,
  places: PackingSlots | None = None,
) -> tuple[Float[Array, 'B S'], Segments]:
  """The reward model's score at every token, and the segments."""
  segments = segment_batch(
    sequences.ids,
    sequences.response_mask,
    sequences.finished,
    entropies(reference, sequences, scorer, places),
    scorer.cutter,
  )
  return run_packed(scores, params, sequences.ids, scorer.reward, places), segments


def pair_scores(
  params: Any,
  reference: Any,
  pairs: PreferenceBatch,
  scorer: SegmentScorer,
  places: PackingSlots | None = None,
) -> tuple[Float[Array, 'B 2'], Segments]:
  """Aggregated segment scores of chosen and rejected, in one forward of 2B sequences."""
  score, segments = score_sequences(params, reference, _interleave(pairs), scorer, places)
  return sequence_scores(score, segments, scorer.cutter.segmentation).reshape(-1, 2), segments


def _interleave(pairs: PreferenceBatch) -> Sequences:
  """2B rows, chosen and rejected in turn: no row leaves its device, as a concatenation would."""
  return jax.tree.map(
    lambda chosen, rejected: jnp.stack([chosen, rejected], 1).reshape(-1, *chosen.shape[1:]),
    pairs.chosen,
    pairs.rejected,
  )


def margins(pairs: PreferenceBatch, settings: RewardTraining) -> Float[Array, 'B']:
  """What the chosen score must lead by: a constant, and a part of the difference of ratings."""
  constant = jnp.full(pairs.chosen.finished.shape, settings.margin, jnp.float32)
  if pairs.rating_gap is None or not settings.rating_margin_coef:
    return constant
  gap = jnp.where(jnp.isnan(pairs.rating_gap), 0, pairs.rating_gap)
  return constant + settings.rating_margin_coef * gap


@functools.partial(
  jax.jit, static_argnames=('scorer', 'settings', 'total_steps'), donate_argnames='state'
)
def reward_step(
  state: TrainState,
  reference: Any,
  pairs: PreferenceBatch,
  packing: PackingPlan | None = None,
  *,
  scorer: SegmentScorer,
  settings: RewardTraining,
  total_steps: int,
) -> tuple[TrainState, dict[str, Array]]:
  """One update: -mean log σ(score(chosen) - score(rejected) - margin), in float32.

  Args:
    packing: of the 2B sequences, chosen and rejected in turn, where
    reward.packing_length says so.
  """
  count = len(pairs.chosen.finished)

  def objective(params, pairs, *, places):
    score, segments = pair_scores(params, reference, pairs, scorer, places)
    lead = score[:, 0] - score[:, 1]
    loss = bradley_terry(score[:, 0], score[:, 1], margins(pairs, settings))
    is_pair = jnp.ones(lead.shape, bool) if places is None else places.sequence[::2] >= 0

    def mean(x):
      return jnp.sum(jnp.where(is_pair, x, 0)) / count

    return mean(loss), {
      'loss': mean(loss),
      'accuracy': mean(lead > 0),
      'margin': mean(lead),
      'segments': mean(jnp.sum(segments.num_segments.reshape(-1, 2), axis=1)) / 2,
    }

  (loss, metrics), grads = gradient_accumulation.value_and_grad(
    objective, state.params, pairs, settings.micro_batch_size, packing
  )
  state, update = apply_update(state, grads, loss, settings.optimizer, total_steps)
  return state, metrics | update


@functools.partial(jax.jit, static_argnames='scorer')
def evaluate_pairs(
  params: Any, reference: Any, pairs: PreferenceBatch, *, scorer: SegmentScorer
) -> Float[Array, 'B 2']:
  """Scores of chosen and rejected, for what is measured on held-out pairs."""
  return pair_scores(params, reference, pairs, scorer)[0]


@functools.partial(jax.jit, static_argnames='scorer')
def segment_statistics(
  params: Any, reference: Any, pairs: PreferenceBatch, *, scorer: SegmentScorer
) -> tuple[Float[Array, 'N S'], Float[Array, 'N S'], Array, Float[Array, 'N']]:
  """Relative position, score, where segments end, and the whole's score, of both sides (N = 2B)."""
  score, segments = score_sequences(params, reference, _interleave(pairs), scorer)
  whole = sequence_scores(score, segments, scorer.cutter.segmentation)
  return jax.vmap(relative_position)(segments), score, segments.end, whole


@functools.partial(jax.jit, static_argnames=('scorer', 'std_floor_ratio'))
def segment_rewards(
  params: Any,
  reference: Any,
  sequences: Sequences,
  normalizer: Normalizer,
  *,
  scorer: SegmentScorer,
  std_floor_ratio: float | None = None,
) -> tuple[Float[Array, 'B S'], Segments]:
  """The normalised score read at every token, which counts where a segment ends; the segments."""
  score, segments = score_sequences(params, reference, sequences, scorer)
  one = functools.partial(normalize, std_floor_ratio=std_floor_ratio)
  return jax.vmap(one, (0, 0, None))(score, segments, normalizer), segments
