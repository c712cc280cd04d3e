"""Computes the segment scores of a reward model, for sequences and pairs, raw or normalised.

Used by the training step, the fit of the normaliser and every evaluation of a reward model.
"""

import abc
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from segjax.model.heads import scores, token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl.normalizer import normalize, relative_position
from segjax.train.rollout_metrics import one_token_segments
from segjax.train.segmenter import Segmenter, segment_batch, sequence_scores
from segjax.types import Normalizer, PackingSlots, PreferenceBatch, Segments, Sequences


class PairScorer(abc.ABC):
  """How pairs of responses are scored; hashable, as it is a static argument."""

  reference: LlamaConfig

  @abc.abstractmethod
  def score_pairs(
    self, params: Any, reference: Any, pairs: PreferenceBatch, slots: PackingSlots | None = None
  ) -> tuple[Float[Array, 'B 2'], dict[str, Float[Array, 'B']]]:
    """Returns (scores of chosen and rejected, other figures of each pair by name).

    Args:
      params: parameters of the network that scores.
      reference: parameters of the reference; None where it is not run.
      pairs: the pairs.
      slots: of the 2B sequences, chosen and rejected in turn; None for one per row.
    """


@dataclasses.dataclass(frozen=True)
class SegmentScorer(PairScorer):
  """How sequences are segmented and scored.

  Attributes:
    reward: the reward model.
    reference: the model whose entropies or log-probs segment; not run where none are needed.
  """

  reward: LlamaConfig
  reference: LlamaConfig
  segmenter: Segmenter

  @property
  def networks(self) -> dict[str, LlamaConfig]:
    """The networks by name."""
    return {'reward model': self.reward, 'reference': self.reference}

  def score_pairs(
    self, params: Any, reference: Any, pairs: PreferenceBatch, slots: PackingSlots | None = None
  ) -> tuple[Float[Array, 'B 2'], dict[str, Float[Array, 'B']]]:
    """Returns (aggregated scores of chosen and rejected, segments of a response of each pair)."""
    # One forward pass of 2B sequences: two would gather the weights twice.
    score, segments = score_sequences(params, reference, interleave(pairs), self, slots)

    def mean_of_both(x):
      return jnp.sum(x.reshape(-1, 2), axis=1) / 2

    figures = {'segments': mean_of_both(segments.num_segments)}
    if self.segmenter.segmentation.granularity == 'segment':
      figures['one_token_segments'] = mean_of_both(one_token_segments(segments))
    score = sequence_scores(score, segments, self.segmenter.segmentation)
    return score.reshape(-1, 2), figures


def reference_signal(
  reference: Any, sequences: Sequences, scorer: SegmentScorer, slots: PackingSlots | None = None
) -> Float[Array, 'B S']:
  """Returns what boundaries read of the reference, in nats; zeros where they read nothing.

  That is the entropy or the log-prob of every token, as `Segmenter.signal` says. Returns
  `sequences.ref_signal` itself if it was computed beforehand.
  """
  if sequences.ref_signal is not None:
    return sequences.ref_signal
  if not scorer.segmenter.needs_reference:
    return jnp.zeros(sequences.ids.shape, jnp.float32)
  logprob, entropy = run_packed(token_logprobs, reference, sequences.ids, scorer.reference, slots)
  return jax.lax.stop_gradient(entropy if scorer.segmenter.signal == 'entropy' else logprob)


def score_sequences(
  params: Any,
  reference: Any,
  sequences: Sequences,
  scorer: SegmentScorer,
  slots: PackingSlots | None = None,
) -> tuple[Float[Array, 'B S'], Segments]:
  """Returns (the reward model's score at every token, the segments).

  The score is `sequences.score` itself if it was computed beforehand.
  """
  signal = reference_signal(reference, sequences, scorer, slots)
  score = sequences.score
  if score is None:
    score = run_packed(scores, params, sequences.ids, scorer.reward, slots)
  segments = segment_batch(
    sequences.ids,
    sequences.response_mask,
    sequences.finished,
    score if scorer.segmenter.signal == 'score' else signal,
    scorer.segmenter,
  )
  return score, segments


def interleave(pairs: PreferenceBatch) -> Sequences:
  """Returns 2B rows, chosen and rejected in turn, so that no row leaves its device."""
  return jax.tree.map(
    lambda chosen, rejected: jnp.stack([chosen, rejected], 1).reshape(-1, *chosen.shape[1:]),
    pairs.chosen,
    pairs.rejected,
  )


@functools.partial(jax.jit, static_argnames='scorer')
def evaluate_pairs(
  params: Any, reference: Any, pairs: PreferenceBatch, *, scorer: PairScorer
) -> Float[Array, 'B 2']:
  """Returns the scores of chosen and rejected, in one compiled program."""
  return scorer.score_pairs(params, reference, pairs)[0]


@functools.partial(jax.jit, static_argnames='scorer')
def segment_statistics(
  params: Any, reference: Any, pairs: PreferenceBatch, *, scorer: SegmentScorer
) -> tuple[Float[Array, 'N S'], Float[Array, 'N S'], Bool[Array, 'N S'], Float[Array, 'N']]:
  """Returns the statistics that a normaliser is fitted to, over both sides: N = 2B.

  Returns:
    (relative position of each token's segment, score, whether a segment ends there, aggregated
    score of the response).
  """
  score, segments = score_sequences(params, reference, interleave(pairs), scorer)
  response_score = sequence_scores(score, segments, scorer.segmenter.segmentation)
  return jax.vmap(relative_position)(segments), score, segments.end, response_score


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
  """Returns (z at every token, the segments); z counts at the last token of each segment."""
  score, segments = score_sequences(params, reference, sequences, scorer)
  z = functools.partial(normalize, std_floor_ratio=std_floor_ratio)
  return jax.vmap(z, (0, 0, None))(score, segments, normalizer), segments
