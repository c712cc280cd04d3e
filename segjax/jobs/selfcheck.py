"""Checks the invariants of training on the available devices: a table, and an error on failure.

Runs a small random network on random responses; reads and downloads nothing.
Float32 is computed at full precision here (`jax.default_matmul_precision('highest')`): by default
accelerators multiply float32 matrices in fewer bits, and rounding would hide mistakes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import (
  PPO,
  Network,
  Optimizer,
  RewardShaping,
  RolloutSettings,
  Segmentation,
)
from segjax.errors import UserError
from segjax.jobs import selfcheck_packing, selfcheck_rewards
from segjax.jobs.job import Job
from segjax.model import sharding
from segjax.model.heads import init_params, scores, token_logprobs
from segjax.model.llama import LlamaConfig, make_config
from segjax.model.mesh import batch_devices, make_mesh
from segjax.report.console import table
from segjax.rl.segmentation import GRANULARITIES
from segjax.run.stage import Stage
from segjax.train.experience import make_experience
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import Minibatch, ppo_step
from segjax.train.recipe import PPORecipe
from segjax.train.rollout import RolloutSampler, rollout
from segjax.train.rollout_rows import concat_prompt_response, gather_response
from segjax.train.rollout_scoring import score
from segjax.train.segmenter import Segmenter
from segjax.types import Experience, PromptBatch, Rollout

_ROWS, _PROMPT, _RESPONSE, _VOCABULARY = 8, 8, 24, 256
_STOP_IDS = (7, 3)
_NETWORK = Network(vocab_size=_VOCABULARY, initializer_range=0.1, max_position_embeddings=64)
_OPTIMIZER = Optimizer(learning_rate=1e-3, warmup_ratio=0.0, epsilon=1e-5)
_PPO = PPO(policy_optimizer=_OPTIMIZER, critic_optimizer=_OPTIMIZER, kl_coef=0.1)
_HEADS = {'policy': 'language', 'reference': 'language', 'reward': 'scalar', 'critic': 'scalar'}


class CheckResult(NamedTuple):
  """A measured value and its bound; NaN where the check cannot run on these devices."""

  measured: float
  bound: float
  note: str = ''

  @property
  def status(self) -> str:
    """ok, FAILED or skipped."""
    if math.isnan(self.bound):
      return 'skipped'
    return 'ok' if self.measured <= self.bound else 'FAILED'


@dataclasses.dataclass(frozen=True)
class Fixture:
  """Networks, a rollout of the policy and its experience, all on one mesh."""

  recipe: PPORecipe
  params: dict[str, Any]
  rollout: Rollout
  experience: Experience
  metrics: dict[str, Any]


def run(stage: Stage) -> dict[str, Any]:
  """Runs every check and prints the table.

  Raises:
    UserError: checks failed; names them.
  """
  results = {}
  with jax.default_matmul_precision('highest'):
    fixture = make_fixture(stage.mesh)
    for name, check in checks(stage.mesh, fixture):
      results[name] = check()
      stage.log(f'{results[name].status:<8} {name}')
  rows = [
    (name, _short(result.measured), _short(result.bound), result.status, result.note)
    for name, result in results.items()
  ]
  device = jax.devices()[0]
  table(
    f'Self-check on {len(jax.devices())} x {device.device_kind}, jax {jax.__version__}',
    ('', 'difference', 'at most', '', ''),
    rows,
  )
  failed = [name for name, result in results.items() if result.status == 'FAILED']
  if failed:
    raise UserError(
      f'{len(failed)} of {len(results)} checks failed: {"; ".join(failed)}. Training on this '
      'machine, or with this version of jax, would be wrong; use another one.'
    )
  return {name: result._asdict() for name, result in results.items()}


def checks(mesh: Mesh, fixture: Fixture) -> Iterator[tuple[str, Callable[[], CheckResult]]]:
  """Yields (what must hold, the check) of each invariant."""
  yield 'cached decoding equals a full forward, log-prob', lambda: decoding(fixture)
  yield 'KL is 0 before the first update', lambda: initial_kl(fixture)
  yield 'ratio is 1 at the first minibatch', lambda: initial_ratio(fixture)
  yield (
    'ratio is 1 in packed rows of bfloat16',
    lambda: CheckResult(
      selfcheck_packing.first_ratio_deviation(mesh, fixture.experience, fixture.recipe), 0.1
    ),
  )
  yield 'padding does not change a sequence', lambda: padding(fixture)
  yield 'other rows do not change a sequence', lambda: batch_independence(fixture)
  yield 'accumulated gradients equal the whole batch', lambda: accumulation(fixture)
  for granularity in GRANULARITIES:
    yield (
      f'{granularity} rewards and advantages equal slow loops',
      functools.partial(_rewards, granularity),
    )
  yield (
    'a reward of 0.7 stays 0.7',
    lambda: CheckResult(selfcheck_rewards.reward_roundtrip_error(), 1e-7),
  )
  yield 'all devices equal one', lambda: sharded(mesh, fixture)
  yield 'bfloat16 log-probs, mean over tokens', lambda: bfloat16(fixture)


def make_fixture(mesh: Any, config: LlamaConfig | None = None) -> Fixture:
  """Returns fresh networks; the reference equals the policy, as before the first update."""
  config = config or make_config(_NETWORK)
  # About ln V - 1: the entropies of some tokens lie above it.
  segmenter = Segmenter(Segmentation(entropy_threshold=4.5))
  recipe = PPORecipe(*[config] * 4, segmenter, 'even_split', RewardShaping(), _PPO)
  with jax.set_mesh(mesh):
    params = {
      name: _init(jax.random.key(seed), config, head, mesh)
      for seed, (name, head) in zip((0, 0, 1, 2), _HEADS.items(), strict=True)
    }
    rng = np.random.default_rng(0)
    prompts = PromptBatch(
      rng.integers(8, _VOCABULARY, (_ROWS, _PROMPT)).astype(np.int32),
      rng.integers(1, _PROMPT + 1, _ROWS).astype(np.int32),
    )
    settings = RolloutSettings(max_new_tokens=_RESPONSE)
    sampler = RolloutSampler(config, settings, _STOP_IDS, mesh)
    sampled = rollout(params['policy'], prompts, jax.random.key(3), sampler)
    outputs = score(params, sampled.arrays, sampled.length, recipe=recipe)
    experience, metrics = make_experience(
      sampled.arrays,
      outputs,
      selfcheck_rewards.position_normalizer(),
      jnp.float32(_PPO.kl_coef),
      recipe=recipe,
    )
  return Fixture(recipe, params, sampled.arrays, experience, jax.device_get(metrics))


def decoding(fixture: Fixture) -> CheckResult:
  """Compares log-probs of the decode loop with those of a forward over the full sequence."""
  full, _ = _forward(
    fixture.params['policy'], concat_prompt_response(fixture.rollout), config=fixture.recipe.policy
  )
  full = gather_response(full, fixture.rollout.prompt_length, _RESPONSE)
  mask = fixture.rollout.response_mask
  return CheckResult(_largest(jnp.where(mask, full - fixture.rollout.old_logprob, 0)), 1e-4)


def initial_kl(fixture: Fixture) -> CheckResult:
  """Measures |log π - log π_ref| per token, where policy and reference are the same network."""
  return CheckResult(float(fixture.metrics['objective/kl_token_max']), 1e-4)


def initial_ratio(fixture: Fixture) -> CheckResult:
  """Measures |π / π_old - 1| per token, before the first update."""
  *_, metrics = update(fixture)
  return CheckResult(float(metrics['policy/ratio_max_deviation']), 1e-4)


def padding(fixture: Fixture) -> CheckResult:
  """Compares the scores of sequences with those of the same sequences with more padding."""
  ids = np.asarray(concat_prompt_response(fixture.rollout))
  longer = np.pad(ids, ((0, 0), (0, 8)))
  config, params = fixture.recipe.reward, fixture.params['reward']
  difference = _scores(params, longer, config=config)[:, : ids.shape[1]] - _scores(
    params, ids, config=config
  )
  return CheckResult(_largest(difference), 1e-5)


def batch_independence(fixture: Fixture) -> CheckResult:
  """Compares the scores of sequences with those of the same sequences among other rows."""
  ids = np.asarray(concat_prompt_response(fixture.rollout))
  others = np.where(np.arange(_ROWS)[:, None] % 2 == 0, ids, ids[::-1] ^ 1)
  config, params = fixture.recipe.reward, fixture.params['reward']
  difference = _scores(params, others, config=config) - _scores(params, ids, config=config)
  return CheckResult(_largest(difference[::2]), 1e-5)


def accumulation(fixture: Fixture) -> CheckResult:
  """Compares the parameters after an update in four pieces with those after one in one piece."""
  expected, accumulated = update(fixture)[0], update(fixture, micro_batch=2)[0]
  size = _distance(expected, fixture.params['policy'])
  return CheckResult(_distance(accumulated, expected) / size, 1e-3, 'of the update')


def sharded(mesh: Mesh, fixture: Fixture) -> CheckResult:
  """Compares losses and gradient norms on one device with those on the mesh."""
  devices = mesh.devices.ravel()
  if len(devices) == 1:
    return CheckResult(math.nan, math.nan, '1 device')
  batch = batch_devices(mesh)
  if _ROWS % batch:
    return CheckResult(math.nan, math.nan, f'{_ROWS} rows, {batch} devices')
  single = make_mesh(devices=devices[:1])
  expected = make_fixture(single, fixture.recipe.policy)
  names = ('policy/loss', 'critic/loss', 'policy/grad_norm', 'critic/grad_norm')
  metrics = update(fixture)[2]
  with jax.set_mesh(single):
    expected = update(expected)[2]
  errors = [abs(float(metrics[name] / expected[name]) - 1) for name in names]
  return CheckResult(max(errors), 1e-4, 'relative')


def bfloat16(fixture: Fixture) -> CheckResult:
  """Measures the mean over tokens of |log-prob in bfloat16 - log-prob in float32|, nats."""
  ids, config = concat_prompt_response(fixture.rollout), fixture.recipe.policy
  narrow = dataclasses.replace(config, dtype='bfloat16')
  difference = [_forward(fixture.params['policy'], ids, config=c)[0] for c in (narrow, config)]
  return CheckResult(float(jnp.mean(jnp.abs(difference[0] - difference[1]))), 0.05, 'nats')


def _rewards(granularity: str) -> CheckResult:
  return CheckResult(selfcheck_rewards.max_abs_error_vs_oracle(granularity), 1e-3)


def update(fixture: Fixture, micro_batch: int = 0) -> tuple[Any, Any, dict[str, Any]]:
  """Returns (parameters of the policy, of the critic, metrics) after one update on all rows."""
  ppo = dataclasses.replace(_PPO, micro_batch_size=micro_batch)
  states = {
    # The step donates it.
    name: init_state(jax.tree.map(jnp.copy, fixture.params[name]), _OPTIMIZER, 10)
    for name in ('policy', 'critic')
  }
  states, metrics = ppo_step(
    states,
    {},
    Minibatch(fixture.experience, np.arange(_ROWS)),
    jnp.float32(ppo.kl_coef),
    recipe=dataclasses.replace(fixture.recipe, ppo=ppo),
    total_steps=10,
  )
  return states['policy'].params, states['critic'].params, jax.device_get(metrics.flat())


@functools.partial(jax.jit, static_argnames='config')
def _forward(params: Any, ids: jax.Array, *, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
  return token_logprobs(params, ids, config)


@functools.partial(jax.jit, static_argnames='config')
def _scores(params: Any, ids: jax.Array, *, config: LlamaConfig) -> jax.Array:
  return scores(params, ids, config)


def _init(key: jax.Array, config: LlamaConfig, head: str, mesh: Any) -> Any:
  params = jax.jit(init_params, static_argnums=(1, 2))(key, config, head)
  return jax.device_put(params, sharding.tree_shardings(params, mesh))


def _largest(x: jax.Array) -> float:
  return float(jnp.max(jnp.abs(x)))


def _distance(a: Any, b: Any) -> float:
  """Returns the norm of the difference of all parameters; Adam may amplify rounding in a few."""
  pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  return math.sqrt(sum(float(jnp.sum((x - y) ** 2)) for x, y in pairs))


def _short(x: float) -> str:
  return '' if math.isnan(x) else f'{x:.1e}'


JOB = Job(name='selfcheck', run=run, sections=('seed',), has_files=False, num_networks=lambda s: 4)
