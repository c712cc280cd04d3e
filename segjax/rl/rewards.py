"""Redistributes, penalises and clamps the rewards of one response.

Not here: the normalisation (`normalizer`), what the tokens of a segment get (`spreads`) and the KL
estimate (`kl`).

The order of application: `spreads.dense_reward` (or `red`), `end_penalty`, `length_penalty`, then
`shaped_reward`, which clamps and takes off the KL penalty.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.masked import at_least_float32
from segjax.rl.recurrences import latest
from segjax.rl.spreads import check_name, last_token
from segjax.types import Segments

BASELINES = ('prompt', 'zero')
END_PENALTIES = ('off', 'per_token', 'at_eos')
LENGTH_PENALTIES = ('off', 'threshold', 'linear')


def red(
  score: Float[Array, 'T'],
  prompt_score: Float[Array, ''],
  segments: Segments,
  response_mask: Bool[Array, 'T'],
  *,
  baseline: str = 'prompt',
) -> Float[Array, 'T']:
  """Redistributes the score of an ordinary reward model: each segment earns what it added.

  reward at end_j = score(end_j) − score(end_{j−1}),  score(end_0) = the baseline

  The rewards of a response sum to score(last end) − baseline. With segments cut so that the stop
  token lies in the last one (`segment(..., stop_inside=True)`), the last end is the token that the
  model was trained to be read at. See Li et al. 2024 (RED), https://arxiv.org/abs/2411.08302.

  Args:
    score: the reward model read at each token.
    prompt_score: the same, read at the last token of the prompt.
    segments: the segments of the response; single tokens in the paper.
    response_mask: True on the response, stop token included.
    baseline: one of BASELINES: prompt_score, as published, or 0.

  Returns:
    The reward of each token, in at least float32; 0 where no segment ends.

  Raises:
    ValueError: on an unknown baseline.
  """
  check_name('baseline', baseline, BASELINES)
  score = at_least_float32(score)
  before = prompt_score.astype(score.dtype) if baseline == 'prompt' else jnp.zeros((), score.dtype)

  ends = segments.end & response_mask
  at_end = latest(score, ends, before)
  before = jnp.concatenate([before[None], at_end[:-1]])
  return jnp.where(ends, score - before, 0)


def end_penalty(
  dense: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  finished: Bool[Array, ''],
  *,
  kind: str,
  value: ScalarLike,
) -> Float[Array, 'T']:
  """Penalises a response that did not end in a stop token.

  'per_token': each of its tokens gets `value` INSTEAD of its reward, as the code of Yin et al.
    2025, https://arxiv.org/abs/2501.02790, has it: over a long response this is a large sum.
  'at_eos': `value` is added where the stop token should have been, at the last token.
  'off': nothing happens, as to every finished response.

  Args:
    dense: reward of each token.
    response_mask: True on the response, stop token included.
    finished: whether the last token of the response is a stop token.
    kind: one of END_PENALTIES.
    value: the penalty, in the unit of the rewards; negative.

  Returns:
    The reward of each token; 0 outside the response.

  Raises:
    ValueError: on an unknown kind.
  """
  check_name('end_penalty', kind, END_PENALTIES)
  dense = jnp.where(response_mask, at_least_float32(dense), 0)
  if kind == 'per_token':
    return jnp.where(response_mask & ~finished, value, dense)
  if kind == 'at_eos':
    return dense + jnp.where(last_token(response_mask) & ~finished, value, 0)
  return dense


def length_penalty(
  dense: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  *,
  kind: str,
  value: ScalarLike,
  threshold: ScalarLike,
) -> Float[Array, 'T']:
  """Penalises a response for its length.

  'threshold': each token of a response of more than `threshold` tokens gets `value` INSTEAD of its
    reward, as the code of Yin et al. 2025, https://arxiv.org/abs/2501.02790, has it.
  'linear': `value` is added to each token past the first `threshold` ones.
  'off': nothing happens.

  Args:
    dense: reward of each token.
    response_mask: True on the response, stop token included.
    kind: one of LENGTH_PENALTIES.
    value: the penalty, in the unit of the rewards; negative.
    threshold: how many tokens are free, stop token included.

  Returns:
    The reward of each token; 0 outside the response.

  Raises:
    ValueError: on an unknown kind.
  """
  check_name('length_penalty', kind, LENGTH_PENALTIES)
  dense = jnp.where(response_mask, at_least_float32(dense), 0)
  if kind == 'threshold':
    return jnp.where(response_mask & (jnp.sum(response_mask) > threshold), value, dense)
  if kind == 'linear':
    is_past = response_mask & (jnp.cumsum(response_mask) > threshold)
    return dense + jnp.where(is_past, value, 0)
  return dense


def shaped_reward(
  dense: Float[Array, 'T'],
  kl: Float[Array, 'T'],
  response_mask: Bool[Array, 'T'],
  *,
  kl_coef: ScalarLike,
  clip: ScalarLike | None = 10.0,
) -> Float[Array, 'T']:
  """Clamps the dense reward, then takes off the KL penalty.

  reward_t = clip(dense_t, −clip, clip) − max(β, 0) kl_t

  The clamp comes after the spreading and before the penalty, which it does not bound. The stop
  token pays its penalty too. See Yin et al. 2025, https://arxiv.org/abs/2501.02790.

  Args:
    dense: reward of each token.
    kl: estimate of the KL at each token, in nats.
    response_mask: True on the response, stop token included.
    kl_coef: β; a negative one counts as 0.
    clip: largest size of a dense reward; None means no bound.

  Returns:
    The reward that the policy is trained on; 0 outside the mask.
  """
  dense = at_least_float32(dense)
  if clip is not None:
    dense = jnp.clip(dense, -clip, clip)
  reward = dense - jnp.maximum(kl_coef, 0) * at_least_float32(kl)
  return jnp.where(response_mask, reward, 0)
