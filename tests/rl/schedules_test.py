import json
import math

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose

from segjax.rl.schedules import warmup_cosine


@pytest.mark.parametrize(
  ('step', 'rate'), [(0, 0), (1, 1.72414e-8), (29, 5e-7), (475, 2.861241e-7), (950, 5e-8)]
)
def test_worked_example(step, rate):
  got = warmup_cosine(step, peak=5e-7, total_steps=950, warmup_steps=29)
  assert_allclose(got, rate, rtol=2e-6)  # as many digits as are printed


def test_golden_file(material):
  for case in json.loads((material / 'spec' / 'golden.json').read_text())['lr']:
    got = warmup_cosine(
      case['step'], peak=5e-7, total_steps=case['total'], warmup_steps=case['warm']
    )
    assert_allclose(got, case['lr'], rtol=1e-6)


def test_traced_step_and_shape_of_the_curve():
  @jax.jit
  @jax.vmap
  def rate(step):
    return warmup_cosine(step, peak=2.0, total_steps=100, warmup_steps=10, min_ratio=0.25)

  rates = rate(jnp.arange(121))
  assert jnp.all(jnp.diff(rates[:11]) > 0) and jnp.all(jnp.diff(rates[10:101]) < 0)
  assert_allclose(rates[55], 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 2)), rtol=1e-6)
  assert_allclose(rates[100:], 0.5, rtol=1e-6)  # stays at the minimum


@pytest.mark.parametrize('warmup_steps', [0, 5])
def test_no_warmup_and_nothing_but_warmup(warmup_steps):
  rate = warmup_cosine(0, peak=1.0, total_steps=5, warmup_steps=warmup_steps)
  assert rate == (0 if warmup_steps else 1)
  assert jnp.isfinite(warmup_cosine(5, peak=1.0, total_steps=5, warmup_steps=warmup_steps))
