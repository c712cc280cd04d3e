import itertools
import math

import jax.numpy as jnp
import numpy as np
from fixtures import models

from segjax.train.shapley import segment_worth, shapley_values
from segjax.types import Rollout

COUNT = np.array([3, 1, 0])


def test_an_additive_worth_gives_each_segment_its_own():
  own = np.array([[1.0, -2.0, 0.5], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
  real = np.arange(3) < COUNT[:, None]
  values = shapley_values(lambda kept: (own * kept * real).sum(1), COUNT, orders=2, seed=0)
  np.testing.assert_allclose(values, own * real)


def test_many_orders_approach_the_mean_over_all():
  def worth(kept):  # two segments that are worth something only together, and a third
    return 6.0 * (kept[:, 0] & kept[:, 1]) + 1.0 * kept[:, 2] * kept[:, 0]

  values = shapley_values(worth, np.array([3]), orders=400, seed=0)[0]
  exact = np.zeros(3)
  for order in itertools.permutations(range(3)):
    kept = np.zeros((1, 3), bool)
    for j in order:
      before = worth(kept)[0]
      kept[0, j] = True
      exact[j] += (worth(kept)[0] - before) / math.factorial(3)
  np.testing.assert_allclose(values, exact, atol=0.5)
  assert values.sum() == 7  # v(all) - v(none), whatever the orders


def test_worth_is_the_score_of_what_is_kept():
  params = models.params(models.CONFIG, head='scalar')
  ids = models.ids(shape=(2, 10))
  prompt, response = ids[:, :4], ids[:, 4:]
  mask = np.array([[True] * 6, [True] * 4 + [False] * 2])
  segment_id = np.array([[0, 0, 1, 2, 2, -1], [0, 1, 1, -1, -1, -1]])
  length = np.array([4, 3])
  arrays = prompt, length, response, mask, np.array([True, True]), np.zeros((2, 6), np.float32)
  rollout = Rollout(*map(jnp.asarray, arrays))
  worth = segment_worth(params, rollout, jnp.asarray(segment_id), models.CONFIG)
  for kept in ([[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 0]]):
    kept = np.array(kept, bool)
    for row, got in enumerate(worth(kept)):
      text = list(prompt[row, : length[row]])
      for t in np.flatnonzero(mask[row]):
        if segment_id[row, t] < 0 or kept[row, segment_id[row, t]]:
          text.append(response[row, t])
      padded = np.zeros((8, models.LENGTH), np.int32)
      padded[0, : len(text)] = text
      expected = models.scores(params, padded, models.CONFIG)[0, len(text) - 1]
      np.testing.assert_allclose(got, expected, atol=1e-5)
