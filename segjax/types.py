"""The arrays that travel between the stages, as frozen trees, and the shape letters.

No mathematics here: that is `segjax.rl`.

Shape letters, the same everywhere:
  B batch   P prompt tokens   T response tokens   S tokens of a whole sequence (P + T, or segments
  where a docstring says so)   V vocabulary   D model width   H query heads   K key/value heads
  L layers

Alignment, the same everywhere: `logprob[t]` and `ref_entropy[t]` belong to the distribution that
token t was drawn FROM (the hidden state of token t-1); `value[t]` is read at that same state;
`score[t]` is the reward model read AT token t.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int


def _pytree(cls):
  """Makes a frozen dataclass of arrays and registers it as a pytree.

  jax rebuilds trees with shapes, shardings and host arrays in place of the arrays, so unflattening
  bypasses `__init__` and the checks of shape that tests install there.
  """
  cls = dataclasses.dataclass(frozen=True)(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  keys = [jax.tree_util.GetAttrKey(name) for name in names]

  def flatten(tree):
    return [(key, getattr(tree, key.name)) for key in keys], None

  def unflatten(_, leaves):
    tree = object.__new__(cls)
    for name, leaf in zip(names, leaves, strict=True):
      object.__setattr__(tree, name, leaf)
    return tree

  jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
  return cls


@_pytree
class Segments:
  """One response cut into segments; batched by vmap.

  Attributes:
    start: True on the first token of each segment.
    end: True on the last token of each segment.
    segment_id: index of the segment a token lies in, 0-based; -1 outside every segment.
    num_segments: how many segments there are; 0 for an empty response.
  """

  start: Bool[Array, '*B T']
  end: Bool[Array, '*B T']
  segment_id: Int[Array, '*B T']
  num_segments: Int[Array, '*B']


@_pytree
class Normalizer:
  """Mean(p) = w_mean ln p + b_mean and Std(p) = w_std ln p + b_std of a segment's raw score.

  p = (segment_id + 1) / num_segments, in (0, 1]. A constant normaliser has both w at zero; the
  identity has Mean 0 and Std 1. See method section 3 of Yin et al. 2025, arXiv 2501.02790.
  """

  w_mean: Float[Array, ''] | float = 0.0
  w_std: Float[Array, ''] | float = 0.0
  b_mean: Float[Array, ''] | float = 0.0
  b_std: Float[Array, ''] | float = 1.0


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['sequence', 'row', 'offset', 'length'],
  meta_fields=['rows', 'width', 'group'],
)
@dataclasses.dataclass(frozen=True)
class PackingSlots:
  """Slots of M sequences in `rows` rows of `width` tokens; integer arrays, [M].

  Attributes:
    sequence: its index in the batch; -1 for an unused slot.
    row: the packed row that holds it.
    offset: position of its first token in that row.
    length: number of its tokens; 0 for an unused slot.
    group: number of consecutive sequences that belong together, as 2 for pairs.
  """

  sequence: Any
  row: Any
  offset: Any
  length: Any
  rows: int
  width: int
  group: int = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackingPlan:
  """A batch in packed pieces: slots with arrays [P, M], of which the first `count` are used.

  `count` is an array, so that other lengths need no other program; None for all P.
  """

  pieces: PackingSlots
  count: Any = None

  @property
  def num_pieces(self) -> int:
    """The pieces in use, where `count` is on the host."""
    return len(self.pieces.sequence) if self.count is None else int(self.count)


@_pytree
class Sequences:
  """Rows of tokens, padded on the right.

  Attributes:
    ids: token ids; the padding may be any valid id.
    response_mask: True on the response tokens, stop token included.
    finished: True where the response's last token is a stop token.
    ref_signal: what boundaries read of the reference at each token, entropy or log-prob, where it
      was computed beforehand; aligned like a log-prob, in nats.
    score: raw scores of the reward model at the ends of segments, where it reads text instead of
      these tokens; see `text_reward.TextSegments`.
  """

  ids: Int[Array, 'B S']
  response_mask: Bool[Array, 'B S']
  finished: Bool[Array, 'B']
  ref_signal: Float[Array, 'B S'] | None = None
  score: Float[Array, 'B S'] | None = None


@_pytree
class PreferenceBatch:
  """Pairs of responses to the same prompt, the first preferred to the second.

  Attributes:
    rating_gap: rating of the chosen response minus that of the rejected one; NaN for a pair without
      ratings, None if no pair of the dataset has ratings.
  """

  chosen: Sequences
  rejected: Sequences
  rating_gap: Float[Array, 'B'] | None = None


class PromptBatch(NamedTuple):
  """Prompts, padded on the right, on the host or on the devices.

  Attributes:
    prompt_ids: token ids; the padding may be any valid id.
    prompt_length: how many of the P tokens are real.
  """

  prompt_ids: Int[ArrayLike, 'B P']
  prompt_length: Int[ArrayLike, 'B']


@_pytree
class Rollout:
  """Prompts and the responses that the policy sampled, each padded on the right.

  Attributes:
    prompt_length: how many of the P prompt tokens are real.
    response_mask: True on response tokens, stop token included.
    finished: True where the response ended in a stop token.
    old_logprob: log-prob under the sampling policy, unfiltered, at temperature 1.
    attended: True on response tokens that attention sees; None for all.
    sample_logprob: log-prob under the distribution drawn from: temperature, filters, bans.
    carried: tokens at the start of each response that the policies of earlier rollouts drew; None
      where no response is carried from one rollout to the next.
  """

  prompt_ids: Int[Array, 'B P']
  prompt_length: Int[Array, 'B']
  response_ids: Int[Array, 'B T']
  response_mask: Bool[Array, 'B T']
  finished: Bool[Array, 'B']
  old_logprob: Float[Array, 'B T']
  attended: Bool[Array, 'B T'] | None = None
  sample_logprob: Float[Array, 'B T'] | None = None
  carried: Int[Array, 'B'] | None = None


@_pytree
class Experience:
  """A rollout with scores, rewards and advantages: the input of the PPO update.

  `value_mask` marks the states whose value the critic learns: the response, or the first token of
  each action where actions are segments. It, `value` and `return_` are None without a critic.
  `learn_mask` marks the tokens that the policy is trained on; None for the whole response.
  `parts` are the rewards of each source before penalties and clip, by name; None without
  config.rewards.
  """

  rollout: Rollout
  ref_logprob: Float[Array, 'B T']
  ref_entropy: Float[Array, 'B T']
  score: Float[Array, 'B T']
  segments: Segments
  reward: Float[Array, 'B T']
  advantage: Float[Array, 'B T']
  value: Float[Array, 'B T'] | None = None
  return_: Float[Array, 'B T'] | None = None
  value_mask: Bool[Array, 'B T'] | None = None
  learn_mask: Bool[Array, 'B T'] | None = None
  parts: dict[str, Float[Array, 'B T']] | None = None

  @property
  def policy_mask(self) -> Bool[Array, 'B T']:
    """True on the tokens that the policy is trained on."""
    return self.rollout.response_mask if self.learn_mask is None else self.learn_mask
