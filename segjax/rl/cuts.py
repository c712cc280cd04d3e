"""Where the segments of one response may begin: each way a pure function, by name in CUTS.

Not here: what a segment is (`segmentation.segment_at`), nor how a threshold is chosen
(`threshold`).

`shuffled_entropy` and `random` are controls: they make as many segments as `entropy`, in other
places. Their random numbers are a function of the response's tokens, so that a text is cut alike
wherever it occurs: in a batch, after any padding, in training and in an evaluation.

To add a way: write it with the common signature (response, **options) and name it in CUTS with
what it reads. Its options are fields of `Segmentation` in the settings.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike, UInt

from segjax.rl.recurrences import rank
from segjax.rl.segmentation import content_mask, previous, segment_at
from segjax.types import Segments


class Response(NamedTuple):
  """What a cut may read of one response of T tokens; None what it does not read.

  Attributes:
    mask: True on the response, one contiguous run that may begin anywhere.
    finished: whether the last token of the response is a stop token.
    signal: the number of each token that `Cut.signal` names; outside the response anything.
    ids: token ids; outside the response anything.
    closes: True on tokens whose text ends a segment.
  """

  mask: Bool[Array, 'T']
  finished: Bool[Array, '']
  signal: Float[Array, 'T'] | None = None
  ids: Int[Array, 'T'] | None = None
  closes: Bool[Array, 'T'] | None = None


def entropy(response: Response, *, entropy_threshold: ScalarLike) -> Bool[Array, 'T']:
  """Before a token that the reference drew from a distribution of entropy H_t > c, in nats.

  See Yin et al. 2025, https://arxiv.org/abs/2501.02790, and `segmentation.segment`.
  """
  return response.signal > entropy_threshold


def low_probability(response: Response, *, probability_threshold: ScalarLike) -> Bool[Array, 'T']:
  """Before a token to which the reference gave a probability p_t < p.

  The cut of SPO (Guo et al. 2025, https://arxiv.org/abs/2505.23564), whose code lets a segment end
  at the token before one of p_t < 0.9, though only at every fifth such token, and reads p_t from
  the policy. AdaptiveStep (https://arxiv.org/abs/2502.13943: the 2 % of tokens of lowest p_t) and
  SAE (https://arxiv.org/abs/2601.07320) cut at such tokens too; after their abstracts, which leave
  open on which side. The frozen reference is read here: the cuts of a text stay the same in
  training.
  """
  return response.signal < jnp.log(probability_threshold)


def score_jump(response: Response, *, jump_threshold: ScalarLike) -> Bool[Array, 'T']:
  """Before a token at which the reward model's raw score jumps: |s_t − s_{t−1}| > threshold.

  After the abstract of Li et al. 2024 (adaptive segment-wise reward),
  https://arxiv.org/abs/2411.00809, which cuts where the rewards of tokens change; its rule may be
  another. A reward model cannot be trained on cuts that its own scores make.
  """
  score = response.signal
  before = jnp.concatenate([score[:1], score[:-1]])
  return jnp.abs(score - before) > jump_threshold


def fixed_length(response: Response, *, segment_length: int) -> Bool[Array, 'T']:
  """Before every `segment_length`-th token of the response, the first included.

  Raises:
    ValueError: on a length below 1.
  """
  if segment_length < 1:
    raise ValueError(f'segment_length={segment_length} is below 1; every segment has a token.')
  return response.mask & (_index(response.mask) % segment_length == 0)


def delimiter(response: Response) -> Bool[Array, 'T']:
  """Before a token that follows a delimiter and is none.

  A run of delimiters stays together, at the end of the segment that it closes.
  """
  return previous(response.closes) & ~response.closes


def function(response: Response) -> Bool[Array, 'T']:
  """After every token that ends a segment by a function of its text, as a language may know."""
  return previous(response.closes)


def shuffled_entropy(
  response: Response,
  *,
  entropy_threshold: ScalarLike,
  min_segment_length: int = 1,
  shuffle_seed: int = 0,
) -> Bool[Array, 'T']:
  """The segments of `entropy`, laid out in a random order of their lengths.

  As many segments of the same lengths, in places that say nothing: a placebo for the entropy. The
  order is uniform over all orders of the segments.

  Args:
    response: `signal` is the entropy.
    entropy_threshold: c, in nats.
    min_segment_length: of the segments before they are shuffled; the last may be shorter, and
      come to lie anywhere.
    shuffle_seed: chooses another order for every text.
  """
  segments = _entropy_segments(response, entropy_threshold, min_segment_length)
  draw = _draws(response, shuffle_seed)
  # Segments in the order of the draws at their ends, other tokens behind them.
  order = jnp.lexsort((draw, ~segments.end))
  length = jnp.where(segments.end, rank(segments.start), 0)[order]
  first = jnp.argmax(response.mask) + jnp.cumsum(length) - length
  return _marks(first, segments.end[order])


def random(
  response: Response,
  *,
  entropy_threshold: ScalarLike,
  min_segment_length: int = 1,
  shuffle_seed: int = 0,
) -> Bool[Array, 'T']:
  """As many segments as `entropy` makes, cut at random.

  Uniform over all ways to cut the content into so many segments of which none but the last has
  fewer than n = `min_segment_length` tokens. With n − 1 tokens taken out of each segment but the
  last, these are the subsets of the tokens that are left without the first.

  Args:
    response: `signal` is the entropy.
    entropy_threshold: c, in nats.
    min_segment_length: n, in tokens.
    shuffle_seed: chooses other cuts for every text.
  """
  segments = _entropy_segments(response, entropy_threshold, min_segment_length)
  num_cuts = segments.num_segments - 1
  extra = min_segment_length - 1
  index = _index(response.mask)
  is_left = index < jnp.sum(segments.segment_id >= 0) - num_cuts * extra
  order = jnp.lexsort((_draws(response, shuffle_seed), ~(is_left & (index > 0))))
  token = jnp.arange(len(order))
  is_cut = _marks(order, token < num_cuts)
  return _marks(token + extra * jnp.cumsum(is_cut), is_cut)


class Cut(NamedTuple):
  """A way of cutting.

  Attributes:
    function: (Response, **options) -> True where a segment may start, for `segment_at`.
    signal: what it reads of each token: 'entropy' or 'logprob' under the reference, 'score' of the
      reward model, or '' for nothing.
    options: fields of the settings that it is called with. One that is called with
      `min_segment_length` sees to it itself.
  """

  function: Callable[..., Bool[Array, 'T']]
  signal: str = ''
  options: tuple[str, ...] = ()


_CONTROL = ('entropy_threshold', 'min_segment_length', 'shuffle_seed')
CUTS = {
  'entropy': Cut(entropy, 'entropy', ('entropy_threshold',)),
  'fixed_length': Cut(fixed_length, options=('segment_length',)),
  'delimiter': Cut(delimiter),
  'function': Cut(function),
  'low_probability': Cut(low_probability, 'logprob', ('probability_threshold',)),
  'score_jump': Cut(score_jump, 'score', ('jump_threshold',)),
  'shuffled_entropy': Cut(shuffled_entropy, 'entropy', _CONTROL),
  'random': Cut(random, 'entropy', _CONTROL),
}


def _entropy_segments(
  response: Response, entropy_threshold: ScalarLike, min_length: int
) -> Segments:
  """The segments of `entropy`, without the stop token."""
  boundary = entropy(response, entropy_threshold=entropy_threshold)
  return segment_at(boundary, response.mask, response.finished, min_length=min_length)


def _index(mask: Bool[Array, 'T']) -> Int[Array, 'T']:
  """Positions counted from the first token of the response."""
  return jnp.arange(mask.shape[0]) - jnp.argmax(mask)


def _marks(position: Int[Array, 'N'], is_real: Bool[Array, 'N']) -> Bool[Array, 'N']:
  """True at the real ones of N positions among N tokens."""
  size = position.shape[0]
  return jnp.zeros(size, bool).at[jnp.where(is_real, position, size)].set(True, mode='drop')


def _draws(response: Response, seed: int) -> UInt[Array, 'T']:
  """A random number for each token: a function of the seed, the content and the token's index.

  The stop token is no content: a text is cut alike whether or not it is finished.
  """
  content = content_mask(response.mask, response.finished)
  index = _index(response.mask).astype(jnp.uint32)
  words = _mixed(response.ids.astype(jnp.uint32) ^ _mixed(index))
  # A sum of integers, which no order of summation changes, of words that hold their places.
  digest = jnp.sum(jnp.where(content, words, 0), dtype=jnp.uint32)
  key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), digest)
  # One key a token: bits of one shape might depend on its size, which is that of the padding.
  return jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i)))(index)


def _mixed(x: UInt[Array, 'T']) -> UInt[Array, 'T']:
  """A bijection of 32-bit words that lets every bit change every other: MurmurHash3's last step."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
