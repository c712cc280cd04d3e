"""Losses of the policy, the critic, the reward model and supervised fine-tuning.

Not here: the networks whose outputs these read. All of it is in at least float32, whatever the
models run in.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from segjax.rl.logprobs import log_ratio
from segjax.rl.masked import at_least_float32, masked_mean, masked_sum

Metrics = dict[str, Float[Array, '']]

MEANS = ('sequence', 'token')


def num_terms(mask: Bool[Array, 'B T'], mean: str = 'sequence') -> Float[Array, '']:
  """What `batch_mean` divides by: the number of non-empty sequences, or of tokens.

  Raises:
    ValueError: on an unknown mean.
  """
  _check_mean(mean)
  terms = jnp.any(mask, axis=1) if mean == 'sequence' else mask
  return jnp.sum(terms).astype(jnp.result_type(float))


def batch_mean(
  x: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  mean: str = 'sequence',
  *,
  count: Float[Array, ''] | None = None,
) -> Float[Array, '']:
  """Mean over the masked tokens of a batch, in at least float32; 0 if there are none.

  'sequence': Σ_i (1/n_i Σ_t x_it) / N, over the N sequences that have any token. A token of a short
    response weighs more; this is what Yin et al. 2025, https://arxiv.org/abs/2501.02790, ran.
  'token': Σ_i Σ_t x_it / Σ_i n_i. All tokens weigh the same, as in DAPO (Yu et al. 2025,
    https://arxiv.org/abs/2503.14476).

  Args:
    x: the terms; those outside the mask may be anything.
    mask: True on the tokens that count.
    mean: one of MEANS.
    count: divisor in place of N or Σ n_i. With the `num_terms` of a whole batch, the results of its
      micro-batches add up to the mean of the whole.

  Raises:
    ValueError: on an unknown mean.
  """
  terms = num_terms(mask, mean)
  per_row = masked_mean if mean == 'sequence' else masked_sum
  total = jnp.sum(per_row(x, mask, axis=1))
  divisor = terms if count is None else count
  return total / jnp.maximum(divisor, 1).astype(total.dtype)


def bradley_terry(
  chosen: Float[Array, 'B'],
  rejected: Float[Array, 'B'],
  margin: Float[Array, 'B'] | ScalarLike = 0.0,
  label_smoothing: float = 0.0,
) -> Float[Array, 'B']:
  """Loss of each pair: −(1 − ε) ln σ(x) − ε ln σ(−x),  x = chosen − rejected − margin.

  One loss on the scores of two whole responses (`aggregation.sequence_score`), not a mean of
  losses over segments. See Yin et al. 2025, https://arxiv.org/abs/2501.02790. On scores
  `lm_rewards.implicit_reward` it is that of DPO (Rafailov et al. 2023,
  https://arxiv.org/abs/2305.18290), with ε conservative DPO (Mitchell 2023,
  https://ericmitchell.ai/cdpo.pdf), with a margin DPO with an offset (Amini et al. 2024,
  https://arxiv.org/abs/2402.10571).

  Args:
    chosen: score of the preferred response.
    rejected: score of the other one.
    margin: by how much the first should be larger.
    label_smoothing: ε, probability that a pair is labelled the wrong way round; below 1/2.
  """
  excess = at_least_float32(rejected) - at_least_float32(chosen) + margin
  loss = jax.nn.softplus(excess)
  return loss - label_smoothing * excess if label_smoothing else loss


def step_label_loss(
  score: Float[Array, 'B T'],
  label: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  count: Float[Array, ''] | None = None,
) -> Float[Array, '']:
  """Binary cross-entropy of labelled steps: −mean y ln σ(s) + (1 − y) ln σ(−s), nats per step.

  The score of a step is the log-odds that it is good. Lightman et al. 2023,
  https://arxiv.org/abs/2305.20050, and Math-Shepherd (Wang et al. 2023,
  https://arxiv.org/abs/2312.08935), whose soft labels are shares of continuations that succeed.

  Args:
    score: s, read at each token.
    label: y, from 0 to 1; anything outside the mask.
    mask: True on the last token of each labelled step.
    count: divisor of the mean, see `batch_mean`.
  """
  score = at_least_float32(score)
  label = jnp.where(mask, label, 0)
  return batch_mean(jax.nn.softplus(score) - label * score, mask, 'token', count=count)


def policy_loss(
  logprob: Float[Array, 'B T'],
  old_logprob: Float[Array, 'B T'],
  advantage: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  clip_eps: ScalarLike | None = 0.2,
  clip_eps_high: ScalarLike | None = None,
  dual_clip: ScalarLike | None = None,
  mean: str = 'sequence',
  count: Float[Array, ''] | None = None,
) -> tuple[Float[Array, ''], Metrics]:
  """Clipped surrogate of PPO.

  loss = −mean min(ρ A, clip(ρ, 1 − ε, 1 + ε_high) A),  ρ = π / π_old

  A dual clip c holds the term of a token of A < 0 at c A or more, however large ρ. See Schulman et
  al. 2017, https://arxiv.org/abs/1707.06347; for ε_high DAPO, https://arxiv.org/abs/2503.14476; for
  c Ye et al. 2020, https://arxiv.org/abs/1912.09729. It has more than seven parameters: each is a
  symbol of the equation or an option of the mean.

  Args:
    logprob: ln π of the sampled tokens, under the policy being trained.
    old_logprob: the same when they were sampled.
    advantage: A, whitened or not; no gradient flows through it.
    mask: True on the response, stop token included.
    clip_eps: ε; None means no clip.
    clip_eps_high: ε_high; None means ε.
    dual_clip: c > 1; None means no dual clip.
    mean: one of MEANS, see `batch_mean`.
    count: divisor of the means, see `batch_mean`.

  Returns:
    (loss, metrics): ratio_max_deviation = max |ρ − 1|, and averaged like the loss ratio_mean,
    clipfrac = how often ρ is beyond the clip, approx_kl = the k3 estimate of KL(π_old ‖ π) in
    nats and, with a dual clip, dual_clipfrac = how often that one holds.

  Raises:
    ValueError: on an unknown mean.
  """
  average = functools.partial(_average, mask=mask, mean=mean, count=count)
  advantage = jax.lax.stop_gradient(at_least_float32(advantage))
  # Masked and bounded before the exponential: an overflow would poison the gradient.
  exponent = jnp.where(mask, log_ratio(logprob, old_logprob), 0)
  ratio = jnp.exp(exponent)
  eps_high = clip_eps if clip_eps_high is None else clip_eps_high
  low = None if clip_eps is None else 1 - clip_eps
  clipped = jnp.clip(ratio, low, None if eps_high is None else 1 + eps_high)
  surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
  metrics = {
    'ratio_mean': average(ratio),
    'ratio_max_deviation': jnp.max(jnp.where(mask, jnp.abs(ratio - 1), 0), initial=0),
    'clipfrac': average(clipped != ratio),
    'approx_kl': average(jnp.expm1(exponent) - exponent),
  }
  if dual_clip is not None:
    is_held = (advantage < 0) & (surrogate < dual_clip * advantage)
    surrogate = jnp.where(is_held, dual_clip * advantage, surrogate)
    metrics['dual_clipfrac'] = average(is_held)
  return -average(surrogate), jax.lax.stop_gradient(metrics)


def importance_weights(
  old_logprob: Float[Array, 'B T'],
  sample_logprob: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  clip: ScalarLike,
  *,
  mean: str = 'sequence',
  count: Float[Array, ''] | None = None,
) -> tuple[Float[Array, 'B T'], Metrics]:
  """Truncated importance weights of tokens that were drawn from another distribution q than π_old.

  w = min(π_old / q, clip), without a gradient. As a factor of the advantage w multiplies the whole
  term of `policy_loss`, since w ≥ 0 commutes with its minima. The mean over tokens y ~ q of
  (π_old / q) A ∇ ln π is that over y ~ π_old; the truncation bounds the variance for a bias where
  q is below π_old / clip. Each token is weighted by itself: the prefix before it stays that of q.

  The weights are V-trace's ρ (Espeholt et al. 2018, https://arxiv.org/abs/1802.01561), which
  rollout engines of another precision need as well (truncated importance sampling, TIS, or rollout
  correction: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl).

  Args:
    old_logprob: ln π_old of the sampled tokens: unfiltered, at temperature 1.
    sample_logprob: ln q of the same tokens: with temperature, filters and rounded weights.
    mask: True on the response; the weights elsewhere are 1.
    clip: largest weight, at least 1.
    mean: one of MEANS, see `batch_mean`.
    count: divisor of the means, see `batch_mean`.

  Returns:
    (weights, metrics): averaged like the loss, importance_mean = w and importance_clipfrac = how
    often π_old / q is beyond the clip.
  """
  average = functools.partial(_average, mask=mask, mean=mean, count=count)
  ratio = jnp.exp(jnp.where(mask, log_ratio(old_logprob, sample_logprob), 0))
  weights = jnp.minimum(ratio, clip)
  metrics = {'importance_mean': average(weights), 'importance_clipfrac': average(ratio > clip)}
  return jax.lax.stop_gradient((weights, metrics))


def value_loss(
  value: Float[Array, 'B T'],
  old_value: Float[Array, 'B T'],
  return_: Float[Array, 'B T'],
  mask: Bool[Array, 'B T'],
  *,
  value_clip_eps: ScalarLike | None,
  mean: str = 'sequence',
  count: Float[Array, ''] | None = None,
) -> tuple[Float[Array, ''], Metrics]:
  """Squared error of the critic, pessimistic about moves beyond the clip.

  loss = ½ mean max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

  Args:
    value: V, from the critic being trained.
    old_value: V_old, from the critic when the rollout was scored.
    return_: R; no gradient flows through it.
    mask: True on the tokens whose value is trained.
    value_clip_eps: ε; None means no clip, ½ mean (V − R)².
    mean: one of MEANS, see `batch_mean`.
    count: divisor of the means, see `batch_mean`.

  Returns:
    (loss, metrics): mean of V, return_mean, error = mean |V − R|, and clipfrac =
    how often the clipped error is the larger. All are means like the loss.

  Raises:
    ValueError: on an unknown mean.
  """
  average = functools.partial(_average, mask=mask, mean=mean, count=count)
  value = jnp.where(mask, at_least_float32(value), 0)
  old_value = jnp.where(mask, at_least_float32(old_value), 0)
  return_ = jax.lax.stop_gradient(jnp.where(mask, at_least_float32(return_), 0))
  error = clipped_error = jnp.square(value - return_)
  if value_clip_eps is not None:
    clipped = old_value + jnp.clip(value - old_value, -value_clip_eps, value_clip_eps)
    clipped_error = jnp.square(clipped - return_)
  metrics = {
    'mean': average(value),
    'return_mean': average(return_),
    'error': average(jnp.abs(value - return_)),
    'clipfrac': average(clipped_error > error),
  }
  return 0.5 * average(jnp.maximum(error, clipped_error)), jax.lax.stop_gradient(metrics)


def cross_entropy(
  logprob: Float[Array, 'B S'], mask: Bool[Array, 'B S'], *, count: Float[Array, ''] | None = None
) -> Float[Array, '']:
  """−mean of the log-prob over all the masked tokens of the batch, in nats; 0 if there are none.

  `count` replaces the number of tokens as the divisor, see `batch_mean`.
  """
  return -batch_mean(logprob, mask, 'token', count=count)


def _average(x, mask, mean, count):
  """`batch_mean` of numbers or of truths."""
  return batch_mean(x.astype(jnp.result_type(x, jnp.float32)), mask, mean, count=count)


def _check_mean(mean: str) -> None:
  if mean not in MEANS:
    raise ValueError(f'mean={mean!r} is unknown; use one of {MEANS}.')
