"""Times the path from a rollout's scores to its advantages: one jitted call, and Python lists.

Both give the same advantages, which is checked.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from segjax.report.console import table
from segjax.rl import oracle
from segjax.rl.advantages import gae
from segjax.rl.kl import k1
from segjax.rl.normalizer import PUBLISHED, normalize
from segjax.rl.rewards import shaped_reward
from segjax.rl.segmentation import segment
from segjax.rl.spreads import dense_reward

NORMALIZER = PUBLISHED['llama3_8b_sft/segment']
STD_FLOOR_RATIO = 0.01  # of b_std
THRESHOLD = 2.0  # nats
KL_COEF = 0.01
GAMMA, GAE_LAMBDA = 1.0, 0.95
ORACLE_REPEATS = 3  # the oracle takes seconds


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  command.add_argument('--batch', type=int, default=256, help='responses')
  command.add_argument('--length', type=int, default=1024, help='tokens per response, with padding')
  command.add_argument('--repeats', type=int, default=20)


def run(batch: int, length: int, repeats: int) -> dict:
  """Prints the table; returns the fields of the JSON line."""
  arrays = _rollout(batch, length)
  advantages = jax.jit(jax.vmap(_advantage))
  on_device = jax.device_put(arrays)
  begin = time.perf_counter()
  advantage = np.asarray(advantages(*on_device))
  first_call = time.perf_counter() - begin
  jitted = _median(lambda: jax.block_until_ready(advantages(*on_device)), repeats)

  rows = list(zip(*(array.tolist() for array in arrays), strict=True))
  slow = _median(lambda: [_oracle_advantage(*row) for row in rows], min(repeats, ORACLE_REPEATS))
  expected = np.array([_oracle_advantage(*row) for row in rows]).reshape(advantage.shape)
  np.testing.assert_allclose(advantage, expected, rtol=1e-3, atol=1e-3)  # sums in float32

  table(
    f'rewards: {batch} responses of up to {length} tokens',
    ('', 'median ms', 'speed-up'),
    [
      ('segjax.rl.oracle, Python lists', f'{1e3 * slow:.1f}', '1'),
      (f'one jitted call, {_device()}', f'{1e3 * jitted:.2f}', f'{slow / jitted:.0f}'),
    ],
  )
  return {
    'batch': batch,
    'length': length,
    'milliseconds': round(1e3 * jitted, 3),
    'oracle_milliseconds': round(1e3 * slow, 1),
    'ratio': round(slow / jitted, 1),
    'first_call_seconds': round(first_call, 2),
    'largest_difference': float(np.max(np.abs(advantage - expected), initial=0)),
    'device': _device(),
  }


def _rollout(batch, length):
  """Returns random entropy, mask, finished, score, value, log-prob and reference log-prob."""
  rng = np.random.default_rng(0)
  shape = batch, length
  finished = rng.random(batch) < 0.9  # unfinished responses have the full length
  stop = np.where(finished, rng.integers(0, length + 1, batch), length)
  mask = np.arange(length) < stop[:, None]
  entropy = rng.uniform(0, 2.5, shape).astype(np.float32)
  score, value = rng.normal(size=(2, *shape)).astype(np.float32)
  logprob = -entropy
  ref_logprob = logprob + rng.normal(scale=0.1, size=shape).astype(np.float32)
  return entropy, mask, finished, score, value, logprob, ref_logprob


def _advantage(entropy, mask, finished, score, value, logprob, ref_logprob):
  segments = segment(entropy, mask, finished, entropy_threshold=THRESHOLD)
  z = normalize(score, segments, NORMALIZER, STD_FLOOR_RATIO)
  dense = dense_reward(z, segments, mask)
  reward = shaped_reward(dense, k1(logprob, ref_logprob), mask, kl_coef=KL_COEF)
  return gae(reward, value, mask, gamma=GAMMA, gae_lambda=GAE_LAMBDA)


def _oracle_advantage(entropy, mask, finished, score, value, logprob, ref_logprob):
  entropy_after = [*entropy[1:], 0.0]
  ends = oracle.segment_ends(entropy_after, mask, finished, 'segment', THRESHOLD)
  n = NORMALIZER
  parameters = n.w_mean, n.w_std, n.b_mean, n.b_std
  z = oracle.segment_z(score, ends, parameters, STD_FLOOR_RATIO * n.b_std)
  dense = oracle.spread(z, ends, mask, 'even_split')
  kl = [p - q for p, q in zip(logprob, ref_logprob, strict=True)]
  reward = oracle.shaped_reward(dense, kl, mask, KL_COEF)
  return oracle.gae(reward, value, mask, GAMMA, GAE_LAMBDA)


def _median(function, repeats):
  """Returns the median time of a call, in seconds."""
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    function()
    seconds.append(time.perf_counter() - begin)
  return statistics.median(seconds)


def _device():
  device = jax.devices()[0]
  return device.device_kind if device.platform != 'cpu' else 'CPU'
