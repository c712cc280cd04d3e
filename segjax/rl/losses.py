"""Losses of the policy, the critic, the reward model and supervised fine-tuning.

Not here: the networks whose outputs these read. All of it is in at least float32, whatever the
models run in.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.masked import at_least_float32, masked_mean, masked_sum
from segjax.types import Segments

Metrics = dict[str, Float[Array, '']]


def segment_mean(score: Float[Array, 'T'], segments: Segments) -> Float[Array, '']:
  """Score of a whole response: the mean over segments of the score at their last tokens.

  Segments count alike, whatever their length. 0 if there are none.
  """
  return masked_sum(score, segments.end) / jnp.maximum(segments.num_segments, 1)


def bradley_terry(
  chosen: Float[Array, 'B'],
  rejected: Float[Array, 'B'],
  margin: Float[Array, 'B'] | ScalarLike = 0.0,
) -> Float[Array, 'B']:
  """Loss of each pair: −ln σ(chosen − rejected − margin).

  One loss on the scores of two whole responses (`segment_mean`), not a mean of losses over
  segments. See Yin et al. 2025, https://arxiv.org/abs/2501.02790.
  """
  return jax.nn.softplus(at_least_float32(rejected) - at_least_float32(chosen) + margin)


def policy_loss(
  logprob: Float[Array, 'B T'],
  old_logprob: Float[Array, 'B T'],
  advantage: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_eps: ScalarLike = 0.2,
) -> tuple[Float[Array, ''], Metrics]:
  """Clipped surrogate of PPO.

  loss = −mean_sequences mean_tokens min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),  ρ = π / π_old

  The mean is first over the tokens of a sequence, then over the sequences that have any token, so
  that a token of a short response weighs more. See Schulman et al. 2017,
  https://arxiv.org/abs/1707.06347.

  Args:
    logprob: ln π of the sampled tokens, under the policy being trained.
    old_logprob: the same when they were sampled.
    advantage: A, whitened or not; no gradient flows through it.
    mask: True on the response, stop token included.
    clip_eps: ε.

  Returns:
    (loss, metrics): ratio_mean, ratio_max_deviation = max |ρ − 1|, clip_fraction, and approx_kl =
    the k3 estimate of KL(π_old ‖ π) in nats.
  """
  advantage = jax.lax.stop_gradient(at_least_float32(advantage))
  # Masked before the exponential: garbage there could overflow and poison the gradient.
  log_ratio = jnp.where(mask, at_least_float32(logprob) - at_least_float32(old_logprob), 0)
  ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
  surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
  metrics = {
    'ratio_mean': _mean_of_means(ratio, mask),
    'ratio_max_deviation': jnp.max(jnp.where(mask, jnp.abs(ratio - 1), 0), initial=0),
    'clip_fraction': _mean_of_means((jnp.abs(ratio - 1) > clip_eps).astype(ratio.dtype), mask),
    'approx_kl': _mean_of_means(jnp.expm1(log_ratio) - log_ratio, mask),
  }
  return -_mean_of_means(surrogate, mask), jax.lax.stop_gradient(metrics)


def value_loss(
  value: Float[Array, 'B T'],
  old_value: Float[Array, 'B T'],
  return_: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  value_clip_eps: ScalarLike,
) -> tuple[Float[Array, ''], Metrics]:
  """Squared error of the critic, pessimistic about moves beyond the clip.

  loss = ½ mean_sequences mean_tokens max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

  Args:
    value: V, from the critic being trained.
    old_value: V_old, from the critic when the rollout was scored.
    return_: R; no gradient flows through it.
    mask: True on the response, stop token included.
    value_clip_eps: ε.

  Returns:
    (loss, metrics): value_mean, return_mean, value_error = mean |V − R|, and value_clip_fraction =
    how often the clipped error is the larger.
  """
  value = jnp.where(mask, at_least_float32(value), 0)
  old_value = jnp.where(mask, at_least_float32(old_value), 0)
  return_ = jax.lax.stop_gradient(jnp.where(mask, at_least_float32(return_), 0))
  clipped = old_value + jnp.clip(value - old_value, -value_clip_eps, value_clip_eps)
  error, clipped_error = jnp.square(value - return_), jnp.square(clipped - return_)
  metrics = {
    'value_mean': _mean_of_means(value, mask),
    'return_mean': _mean_of_means(return_, mask),
    'value_error': _mean_of_means(jnp.abs(value - return_), mask),
    'value_clip_fraction': _mean_of_means((clipped_error > error).astype(value.dtype), mask),
  }
  loss = 0.5 * _mean_of_means(jnp.maximum(error, clipped_error), mask)
  return loss, jax.lax.stop_gradient(metrics)


def cross_entropy(logprob: Float[Array, 'B S'], mask: Bool[Array, 'B S']) -> Float[Array, '']:
  """−mean of the log-prob over all the masked tokens of the batch, in nats; 0 if there are none."""
  return -masked_mean(logprob, mask)


def _mean_of_means(x: Float[Array, 'B T'], mask: Bool[Array, 'B T']) -> Float[Array, '']:
  """Mean over the non-empty sequences of the mean over their tokens; 0 if all are empty."""
  return masked_mean(masked_mean(x, mask, axis=1), jnp.any(mask, axis=1))
