import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures.strategies import corrupted, masks, numbers
from hypothesis import given
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl import oracle
from segjax.rl.losses import (
  MEANS,
  batch_mean,
  bradley_terry,
  cross_entropy,
  importance_weights,
  num_terms,
  policy_loss,
  value_loss,
)

TRIANGLE = jnp.array([[True, True], [False, True]])
POLICY = (
  jnp.array([[-1, -1.5], [-2, -0.2]]),
  jnp.array([[-1.2, -1.4], [-1.5, -0.6]]),
  jnp.array([[1, -0.5], [2, -1]]),
)
VALUE = (
  jnp.array([[0.5, 1], [0.2, -0.4]]),
  jnp.array([[0.1, 0.9], [0.9, 0]]),
  jnp.array([[0.3, 1.5], [0, -0.1]]),
)


def test_policy_loss_golden():
  loss, metrics = policy_loss(*POLICY, TRIANGLE)
  assert_allclose(loss, 0.5590170260, rtol=1e-6)
  assert_allclose(metrics['ratio_mean'], 1.2774723929, rtol=1e-6)
  # Ratios e^.2 = 1.221 and e^-.1 = .905 in the first sequence, e^.4 = 1.492 in the second.
  assert_allclose(metrics['ratio_max_deviation'], 0.4918247, rtol=1e-6)
  assert_allclose(metrics['clipfrac'], 0.75)
  # ((1.2214028 - 1 - .2) + (.9048374 - 1 + .1)) / 2 = .0131201; 1.4918247 - 1 - .4 = .0918247.
  assert_allclose(metrics['approx_kl'], 0.0524724, atol=1e-6)


@pytest.mark.parametrize('value_clip_eps', [0.25, 0.2])
def test_value_loss_golden(value_clip_eps):
  loss, metrics = value_loss(*VALUE, TRIANGLE, value_clip_eps=value_clip_eps)
  assert_allclose(loss, 0.05875, rtol=1e-6)
  # Means of (.5, 1) and (-.4); of (.3, 1.5) and (-.1); of |.2|, |-.5| and |-.3|.
  assert_allclose(metrics['mean'], 0.175, rtol=1e-6)
  assert_allclose(metrics['return_mean'], 0.4, rtol=1e-6)
  assert_allclose(metrics['error'], 0.325, rtol=1e-6)


BATCHES = {'mask': masks((4, 6)), 'arrays': numbers((3, 4, 6), size=1)}


@pytest.mark.parametrize('mean', MEANS)
@pytest.mark.parametrize('extras', [(None, None), (0.4, 1.5)], ids=['plain', 'high and dual clip'])
@given(**BATCHES)
def test_policy_loss_equals_oracle(mean, extras, mask, arrays):
  loss, metrics = run_policy_loss(*corrupted(arrays, mask), mask, 0.3, *extras, mean=mean)
  expected = oracle.policy_loss(*arrays.tolist(), mask.tolist(), 0.3, *extras, mean)
  got = loss, metrics['ratio_mean'], metrics['clipfrac']
  assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
  assert ('dual_clipfrac' in metrics) == (extras[1] is not None)


@functools.partial(jax.jit, static_argnames='mean')
def run_policy_loss(logprob, old_logprob, advantage, mask, low, high, dual, mean):
  options = {'clip_eps': low, 'clip_eps_high': high, 'dual_clip': dual, 'mean': mean}
  return policy_loss(logprob, old_logprob, advantage, mask, **options)


@pytest.mark.parametrize('advantage', [-1.0, 0.0, 1.0])
def test_policy_loss_is_finite_at_any_log_ratio(advantage):
  """e^89 overflows, and 0 times infinity is NaN."""
  old, mask = jnp.array([[-100.0, -1e3, 0.0]]), jnp.ones((1, 3), bool)

  def loss(logprob):
    return policy_loss(logprob, old, jnp.full((1, 3), advantage), mask)

  (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(jnp.array([[0.0, 0.0, -100.0]]))
  assert np.isfinite(value) and np.all(np.isfinite(grad))
  assert all(np.isfinite(x) for x in metrics.values())
  assert_allclose(metrics['ratio_max_deviation'], np.exp(20) - 1, rtol=1e-6)


def test_without_a_clip():
  """clip_eps None: the ratio itself, A = 1 and -1; clip_eps_high alone clips above alone."""
  logprob, mask = jnp.log(jnp.array([[4.0, 0.25]])), jnp.ones((1, 2), bool)
  for sign in (1.0, -1.0):
    arguments = logprob, jnp.zeros((1, 2)), jnp.full((1, 2), sign), mask
    loss, metrics = policy_loss(*arguments, clip_eps=None)
    assert_allclose(loss, -sign * (4 + 0.25) / 2)
    assert metrics['clipfrac'] == 0
    grad = jax.grad(lambda x: policy_loss(x, *arguments[1:], clip_eps=None)[0])(logprob)  # noqa: B023
    assert_allclose(grad, [[-sign * 4 / 2, -sign * 0.25 / 2]])
  loss, metrics = policy_loss(*arguments[:2], -arguments[2], mask, clip_eps=None, clip_eps_high=1.0)
  assert_allclose(loss, -(2 + 0.25) / 2)
  assert metrics['clipfrac'] == 0.5


def test_asymmetric_and_dual_clip_worked():
  """Ratios e^2 and e^-2, each with an advantage of 1 and of -1."""
  logprob, mask = jnp.array([[2.0, -2.0], [2.0, -2.0]]), jnp.ones((2, 2), bool)
  advantage = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
  up, down = np.exp(2), np.exp(-2)

  def loss(**options):
    return policy_loss(logprob, jnp.zeros((2, 2)), advantage, mask, clip_eps=0.2, **options)

  assert_allclose(loss()[0], -(1.2 + down - up - 0.8) / 4, rtol=1e-6)
  assert_allclose(loss(clip_eps_high=0.28)[0], -(1.28 + down - up - 0.8) / 4, rtol=1e-6)
  # Of the four terms only -e² lies below 3 A.
  got, metrics = loss(dual_clip=3.0)
  assert_allclose(got, -(1.2 + down - 3 - 0.8) / 4, rtol=1e-6)
  assert metrics['dual_clipfrac'] == 0.25
  assert metrics['clipfrac'] == 1
  gradient = jax.grad(lambda x: policy_loss(x, logprob * 0, advantage, mask, dual_clip=3.0)[0])
  assert_allclose(gradient(logprob), [[0, -down / 4], [0, 0]], rtol=1e-6)


def test_importance_weights_golden():
  """π_old / q is 2, 1 and 0.25; under the mask nothing counts."""
  old = jnp.log(jnp.array([[0.5, 0.3], [0.9, 0.1]]))
  drawn = jnp.log(jnp.array([[0.25, 0.3], [jnp.nan, 0.4]]))
  weights, metrics = importance_weights(old, drawn, TRIANGLE, 1.5)
  assert_allclose(weights, [[1.5, 1], [1, 0.25]], rtol=1e-6)
  assert_allclose(metrics['importance_mean'], 0.75, rtol=1e-6)  # ((1.5 + 1) / 2 + 0.25) / 2
  assert_allclose(metrics['importance_clipfrac'], 0.25)
  weights, metrics = importance_weights(old, drawn, TRIANGLE, 2.5, mean='token')
  assert_allclose(metrics['importance_mean'], 3.25 / 3, rtol=1e-6)
  assert metrics['importance_clipfrac'] == 0


@pytest.mark.parametrize('mean', MEANS)
@given(mask=masks((4, 6)), arrays=numbers((2, 4, 6), size=1))
def test_importance_weights_equal_oracle(mean, mask, arrays):
  weights, metrics = run_importance_weights(*corrupted(arrays, mask), mask, mean=mean)
  expected = oracle.importance_weights(*arrays.tolist(), 1.5)
  assert_allclose(weights, np.where(mask, expected, 1), rtol=1e-5)
  average = oracle.batch_mean(expected, mask.tolist(), mean)
  assert_allclose(metrics['importance_mean'], average, rtol=1e-5)


@functools.partial(jax.jit, static_argnames='mean')
def run_importance_weights(old_logprob, sample_logprob, mask, mean):
  return importance_weights(old_logprob, sample_logprob, mask, 1.5, mean=mean)


def test_importance_weights_of_the_policy_itself_are_1():
  """Also where the clip is 1; the weights are constants, whatever is differentiated."""
  logprob = POLICY[0]
  weights, metrics = importance_weights(logprob, logprob, TRIANGLE, 1.0)
  assert (weights == 1).all()
  assert metrics['importance_mean'] == 1 and metrics['importance_clipfrac'] == 0
  far = importance_weights(logprob + 1e3, logprob - 1e3, TRIANGLE, 2.0)[0]
  assert_allclose(far, [[2, 2], [1, 2]])
  gradient = jax.grad(lambda x: importance_weights(x, POLICY[1], TRIANGLE, 2.0)[0].sum())
  assert not gradient(logprob).any()


def test_weighted_advantages_weigh_the_terms():
  """A factor of the advantage is one of the whole term, beyond both clips too."""
  logprob = jnp.array([[2.0, -2.0, 0.1, 2.0]])
  advantage, weights = jnp.array([[1.0, 1.0, -1.0, -1.0]]), jnp.array([[0.5, 2.0, 1.5, 3.0]])

  def gradient(advantage):
    def loss(x):
      return policy_loss(x, logprob * 0, advantage, jnp.ones((1, 4), bool), dual_clip=3.0)[0]

    return jax.grad(loss)(logprob)

  assert_allclose(gradient(advantage * weights), weights * gradient(advantage), rtol=1e-6)


@pytest.mark.campaign
def test_importance_weights_recover_the_gradient_of_the_policy():
  """Exactly, summed over all tokens that q may draw, unless weights are truncated."""
  logits, noise, advantage = np.random.default_rng(5).normal(size=(3, 12)).astype(np.float32)
  old, drawn = jax.nn.log_softmax(logits), jax.nn.log_softmax(logits + 0.5 * noise)
  mask = jnp.ones((12, 1), bool)  # a response of one token for each of the vocabulary

  def mean_gradient(distribution, clip=None):
    """Returns Σ_y distribution(y) w A ∇ ln π(y), with q = `drawn`."""
    weighted = (12 * jnp.exp(distribution) * advantage)[:, None]
    if clip:
      weighted *= importance_weights(old[:, None], drawn[:, None], mask, clip)[0]

    def loss(x):
      return policy_loss(jax.nn.log_softmax(x)[:, None], old[:, None], weighted, mask)[0]

    return -jax.grad(loss)(logits)

  expected = mean_gradient(old)
  assert_allclose(mean_gradient(drawn, clip=100.0), expected, atol=1e-6)
  unweighted = np.abs(mean_gradient(drawn) - expected).max()
  assert unweighted > 0.1 * np.abs(expected).max()
  assert 1e-3 < np.abs(mean_gradient(drawn, clip=1.2) - expected).max() < unweighted


@pytest.mark.parametrize('mean', MEANS)
@pytest.mark.parametrize('value_clip_eps', [None, 0.3])
@given(**BATCHES)
def test_value_loss_equals_oracle(mean, value_clip_eps, mask, arrays):
  loss, metrics = run_value_loss(*corrupted(arrays, mask), mask, value_clip_eps, mean=mean)
  expected = oracle.value_loss(*arrays.tolist(), mask.tolist(), value_clip_eps, mean)
  assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
  assert_allclose(
    metrics['mean'], oracle.batch_mean(arrays[0].tolist(), mask.tolist(), mean), atol=1e-6
  )
  if value_clip_eps is None:
    assert metrics['clipfrac'] == 0


@functools.partial(jax.jit, static_argnames='mean')
def run_value_loss(value, old_value, return_, mask, value_clip_eps, mean):
  return value_loss(value, old_value, return_, mask, value_clip_eps=value_clip_eps, mean=mean)


@pytest.mark.parametrize('mean', MEANS)
@given(**BATCHES)
def test_micro_batches_add_up(mean, mask, arrays):
  """However uneven they are, and even if one has no token at all."""
  full, parts = jax.device_get(run_in_parts(*corrupted(arrays, mask), mask, mean=mean))
  for name, expected in full.items():
    assert_allclose(sum(part[name] for part in parts), expected, rtol=1e-5, atol=1e-6)
  assert_allclose(
    full['mean'], oracle.batch_mean(arrays[0].tolist(), mask.tolist(), mean), rtol=1e-5, atol=1e-6
  )


@functools.partial(jax.jit, static_argnames='mean')
def run_in_parts(first, second, third, mask, mean):
  count, tokens = num_terms(mask, mean), num_terms(mask, 'token')

  def losses(rows, count=None, tokens=None):
    x, y, z, part = first[rows], second[rows], third[rows], mask[rows]
    policy, metrics = policy_loss(x, y, z, part, mean=mean, count=count)
    value, _ = value_loss(x, y, z, part, value_clip_eps=0.2, mean=mean, count=count)
    return {
      'mean': batch_mean(x, part, mean, count=count),
      'policy': policy,
      'approx_kl': metrics['approx_kl'],
      'value': value,
      'supervised': cross_entropy(x, part, count=tokens),
    }

  return losses(slice(None)), [losses(slice(i, i + 2), count, tokens) for i in (0, 2)]


def test_means_worked():
  """(1 + 2) / 2 and 6; a third sequence is empty."""
  x = jnp.array([[1.0, 2.0], [jnp.nan, 6.0], [jnp.nan, jnp.nan]])
  mask = jnp.array([[True, True], [False, True], [False, False]])
  assert batch_mean(x, mask) == 3.75 and num_terms(mask) == 2
  assert batch_mean(x, mask, 'token') == 3 and num_terms(mask, 'token') == 3
  assert batch_mean(x, mask, 'token', count=jnp.array(9.0)) == 1
  with pytest.raises(ValueError, match=r"'row'.*sequence.*token"):
    batch_mean(x, mask, 'row')


def test_gradients_ignore_nan_under_the_mask():
  rng = np.random.default_rng(11)
  arrays, mask = rng.normal(size=(3, 4, 6)).astype(np.float32), rng.random((4, 6)) < 0.6
  mask[1] = False
  garbage, mask = jnp.asarray(corrupted(arrays, mask)), jnp.asarray(mask)

  def policy(x, rest):
    return policy_loss(x, *rest, mask, dual_clip=1.5)[0]

  def value(x, rest):
    return value_loss(x, *rest, mask, value_clip_eps=0.2)[0]

  def supervised(x, rest):
    return cross_entropy(x, mask)

  for loss in (policy, value, supervised):
    gradient = jax.jit(jax.grad(loss))
    clean = gradient(jnp.asarray(arrays[0]), list(jnp.asarray(arrays[1:])))
    again = gradient(garbage[0], list(garbage[1:]))
    assert_allclose(again, clean)
    assert_allclose(np.asarray(again)[~np.asarray(mask)], 0)


def test_on_policy_gradient_is_that_of_reinforce():
  """At ratio 1 the loss is −mean A and its gradient −A by the weight of the token."""
  logprob, _, advantage = POLICY
  (loss, metrics), gradient = jax.value_and_grad(policy_loss, has_aux=True)(
    logprob, logprob, advantage, TRIANGLE
  )
  weight = np.array([[0.25, 0.25], [0, 0.5]])
  assert_allclose(loss, -np.sum(weight * advantage), rtol=1e-6)
  assert_allclose(gradient, -weight * advantage, rtol=1e-6)
  assert metrics['clipfrac'] == metrics['ratio_max_deviation'] == metrics['approx_kl'] == 0


def test_empty_sequences_do_not_dilute():
  mask = jnp.concatenate([TRIANGLE, jnp.zeros((2, 2), bool)])
  policy = [jnp.concatenate([x, jnp.full((2, 2), jnp.nan)]) for x in POLICY]
  assert_allclose(policy_loss(*policy, mask)[0], policy_loss(*POLICY, TRIANGLE)[0])
  value = [jnp.concatenate([x, jnp.full((2, 2), jnp.nan)]) for x in VALUE]
  assert_allclose(value_loss(*value, mask, value_clip_eps=0.2)[0], 0.05875, rtol=1e-6)


def test_nothing_but_empty_sequences_is_zero():
  nan, nothing = jnp.full((2, 2), jnp.nan), jnp.zeros((2, 2), bool)
  for loss, metrics in (
    policy_loss(nan, nan, nan, nothing),
    value_loss(nan, nan, nan, nothing, value_clip_eps=0.2),
  ):
    assert loss == 0 and all(value == 0 for value in metrics.values())
  assert cross_entropy(nan, nothing) == 0


def test_targets_carry_no_gradient():
  def policy(advantage):
    return policy_loss(*POLICY[:2], advantage, TRIANGLE)[0]

  def value(return_):
    return value_loss(*VALUE[:2], return_, TRIANGLE, value_clip_eps=0.2)[0]

  for loss, target in ((policy, POLICY[2]), (value, VALUE[2])):
    assert_allclose(jax.grad(loss)(target), np.zeros((2, 2)))


def test_bradley_terry_golden():
  # Segments .2, .4, .6 against .1, -.3: -ln σ(.4 + .1) and, with margin .5, ln 2.
  chosen, rejected = jnp.array([0.4, 0.4]), jnp.array([-0.1, -0.1])
  expected = [0.4740769842, 0.6931471806]
  assert_allclose(bradley_terry(chosen, rejected)[0], expected[0], rtol=1e-6)
  assert_allclose(bradley_terry(chosen, rejected, jnp.array([0, 0.5])), expected, rtol=1e-6)
  assert_allclose(bradley_terry(chosen, rejected, 0.5)[0], expected[1], rtol=1e-6)


def test_bradley_terry_is_stable():
  far = jnp.array([1e4, -1e4])
  assert_allclose(bradley_terry(far, -far), [0, 2e4])
  gradient = jax.grad(lambda x: bradley_terry(x, -far).sum())(far)
  assert_allclose(gradient, [0, -1])
  assert bradley_terry(far.astype(jnp.bfloat16), far.astype(jnp.bfloat16)).dtype == jnp.float32


def test_cross_entropy_weighs_tokens_alike():
  # (1 + 2 + 6) / 3, not ((1 + 2) / 2 + 6) / 2.
  logprob = jnp.array([[-1.0, -2.0], [jnp.nan, -6.0]])
  assert_allclose(cross_entropy(logprob, TRIANGLE), 3)


def test_precision():
  mask, half = TRIANGLE, jnp.ones((2, 2), jnp.bfloat16)
  assert policy_loss(half, half, half, mask)[0].dtype == jnp.float32
  assert value_loss(half, half, half, mask, value_clip_eps=0.2)[0].dtype == jnp.float32
  assert cross_entropy(half, mask).dtype == jnp.float32
  with jax.enable_x64(True):
    double = jnp.ones((2, 2), jnp.float64)
    assert policy_loss(double, double, double, mask)[0].dtype == jnp.float64


def test_wrong_arrays_raise():
  good, integer, narrow = jnp.zeros((2, 2)), jnp.zeros((2, 2), int), jnp.zeros((2, 1))
  for bad in (integer, narrow, good[0]):
    with pytest.raises(TypeCheckError):
      policy_loss(bad, good, good, TRIANGLE)
    with pytest.raises(TypeCheckError):
      value_loss(good, bad, good, TRIANGLE, value_clip_eps=0.2)
    with pytest.raises(TypeCheckError):
      cross_entropy(bad, TRIANGLE)
  with pytest.raises(TypeCheckError):
    policy_loss(good, good, good, good)
  with pytest.raises(TypeCheckError):
    bradley_terry(jnp.zeros(2), jnp.zeros(3))
