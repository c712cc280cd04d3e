import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jaxtyping import TypeCheckError
from numpy.testing import assert_allclose

from segjax.rl.losses import (
  bradley_terry,
  cross_entropy,
  policy_loss,
  segment_mean,
  value_loss,
)
from segjax.rl.segmentation import segment

from .ragged import make_batch

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


def with_nan(arrays, mask):
  return [jnp.where(mask, array, jnp.nan) for array in arrays]


def test_policy_loss_golden():
  loss, metrics = policy_loss(*POLICY, TRIANGLE)
  assert_allclose(loss, 0.5590170260, rtol=1e-6)
  assert_allclose(metrics['ratio_mean'], 1.2774723929, rtol=1e-6)
  # Ratios e^.2 = 1.221 and e^-.1 = .905 in the first sequence, e^.4 = 1.492 in the second.
  assert_allclose(metrics['ratio_max_deviation'], 0.4918247, rtol=1e-6)
  assert_allclose(metrics['clip_fraction'], 0.75)
  # ((1.2214028 - 1 - .2) + (.9048374 - 1 + .1)) / 2 = .0131201; 1.4918247 - 1 - .4 = .0918247.
  assert_allclose(metrics['approx_kl'], 0.0524724, atol=1e-6)


@pytest.mark.parametrize('value_clip_eps', [0.25, 0.2])
def test_value_loss_golden(value_clip_eps):
  loss, metrics = value_loss(*VALUE, TRIANGLE, value_clip_eps=value_clip_eps)
  assert_allclose(loss, 0.05875, rtol=1e-6)
  # Means of (.5, 1) and (-.4); of (.3, 1.5) and (-.1); of |.2|, |-.5| and |-.3|.
  assert_allclose(metrics['value_mean'], 0.175, rtol=1e-6)
  assert_allclose(metrics['return_mean'], 0.4, rtol=1e-6)
  assert_allclose(metrics['value_error'], 0.325, rtol=1e-6)


def random_batch(seed):
  """Arrays [N, T] with NaN under the mask, some sequences empty."""
  rng = np.random.default_rng(seed)
  mask = make_batch(seed).mask
  arrays = rng.normal(size=(3, *mask.shape)).astype(np.float32) / 2
  return mask, arrays, with_nan(arrays, mask)


def test_policy_loss_equals_oracle():
  mask, arrays, spoiled = random_batch(9)
  loss, metrics = jax.jit(policy_loss)(*spoiled, mask=jnp.asarray(mask), clip_eps=0.3)
  expected = oracle.policy_loss(*arrays.tolist(), mask.tolist(), 0.3)
  assert_allclose([loss, metrics['ratio_mean']], expected, rtol=1e-5)


def test_value_loss_equals_oracle():
  mask, arrays, spoiled = random_batch(10)
  loss, _ = jax.jit(value_loss)(*spoiled, mask=jnp.asarray(mask), value_clip_eps=0.3)
  assert_allclose(loss, oracle.value_loss(*arrays.tolist(), mask.tolist(), 0.3), rtol=1e-5)


def test_gradients_ignore_nan_under_the_mask():
  mask, arrays, spoiled = random_batch(11)
  mask = jnp.asarray(mask)

  def policy(x, rest):
    return policy_loss(x, *rest, mask)[0]

  def value(x, rest):
    return value_loss(x, *rest, mask, value_clip_eps=0.2)[0]

  def supervised(x, rest):
    return cross_entropy(x, mask)

  for loss in (policy, value, supervised):
    gradient = jax.jit(jax.grad(loss))
    clean = gradient(jnp.asarray(arrays[0]), list(jnp.asarray(arrays[1:])))
    again = gradient(spoiled[0], spoiled[1:])
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
  assert metrics['clip_fraction'] == metrics['ratio_max_deviation'] == metrics['approx_kl'] == 0


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


def test_segment_mean_golden():
  # Ends at 1, 2, 4; the stop token at 5 is in no segment.
  entropy = jnp.array([9, 0, 9, 9, 0, 9.0])
  mask = jnp.ones(6, bool)
  segments = segment(entropy, mask, jnp.array(True))
  score = jnp.array([jnp.nan, 0.2, 0.4, jnp.nan, 0.6, jnp.nan])
  assert_allclose(segment_mean(score, segments), 0.4, rtol=1e-6)
  gradient = jax.grad(segment_mean)(score, segments)
  assert_allclose(gradient, [0, 1 / 3, 1 / 3, 0, 1 / 3, 0], rtol=1e-6)
  nothing = segment(entropy, jnp.zeros(6, bool), jnp.array(True))
  assert segment_mean(score, nothing) == 0


@pytest.mark.parametrize('granularity', ['segment', 'token', 'bandit'])
def test_segment_mean_equals_oracle(granularity):
  batch = make_batch(seed=12)

  @jax.jit
  @jax.vmap
  def run(entropy, mask, finished, score):
    return segment_mean(score, segment(entropy, mask, finished, granularity=granularity))

  names = ('entropy', 'mask', 'finished', 'score')
  got = run(*(jnp.asarray(getattr(batch, name)) for name in names))
  for row, (entropy_after, mask, finished, score) in enumerate(
    batch.rows('entropy_after', 'mask', 'finished', 'score')
  ):
    ends = oracle.segment_ends(entropy_after, mask, finished, granularity, 2.0)
    expected = sum(score[end] for end in ends) / max(len(ends), 1)
    assert_allclose(got[row], expected, atol=1e-6)


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
