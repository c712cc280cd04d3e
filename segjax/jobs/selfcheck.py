"""The invariants that matter, on the accelerator at hand: a table, and an error if one is broken.

Everything runs on a small random network and random responses; nothing is read or downloaded.
Float32 is computed at full precision here (`jax.default_matmul_precision('highest')`): accelerators
multiply float32 matrices in fewer bits unless told otherwise, and rounding would hide mistakes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.config.settings import (
  PPO,
  Network,
  Optimizer,
  RewardShaping,
  RolloutSettings,
  Segmentation,
)
from segjax.errors import UserError
from segjax.jobs import selfcheck_rewards
from segjax.model import sharding
from segjax.model.heads import init_params, scores, token_logprobs
from segjax.model.llama import LlamaConfig, make_config
from segjax.model.mesh import batch_devices, make_mesh
from segjax.report.console import table
from segjax.rl.segmentation import GRANULARITIES
from segjax.run.stage import Stage
from segjax.train.experience import (
  PPORecipe,
  concat_prompt_response,
  gather_response,
  make_experience,
  score,
)
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import ppo_step
from segjax.train.rollout import rollout
from segjax.train.segmenter import Segmenter
from segjax.types import Experience, Rollout

_ROWS, _PROMPT, _RESPONSE, _VOCABULARY = 8, 8, 24, 256
_STOP_IDS = (7, 3)
_NETWORK = Network(vocab_size=_VOCABULARY, initializer_range=0.1, max_position_embeddings=64)
_OPTIMIZER = Optimizer(learning_rate=1e-3, warmup_ratio=0.0, epsilon=1e-5)
_PPO = PPO(policy_optimizer=_OPTIMIZER, critic_optimizer=_OPTIMIZER, kl_coef=0.1)
_HEADS = {'policy': 'language', 'reference': 'language', 'reward': 'scalar', 'critic': 'scalar'}


class CheckResult(NamedTuple):
  """What was measured, the bound it has to keep; NaN where the check cannot be made here."""

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
  """The networks, a rollout of the policy and its experience, all on one mesh."""

  recipe: PPORecipe
  params: dict[str, Any]
  rollout: Rollout
  experience: Experience
  metrics: dict[str, Any]


def run(stage: Stage) -> dict[str, Any]:
  """Runs every check and prints the table.

  Raises:
    ValueError: a check failed; it names them.
  """
  found = {}
  with jax.default_matmul_precision('highest'):
    bench = make_fixture(stage.mesh)
    for name, check in checks(stage, bench):
      found[name] = check()
      stage.log(f'{found[name].status:<8} {name}')
  rows = [
    (name, _short(outcome.measured), _short(outcome.bound), outcome.status, outcome.note)
    for name, outcome in found.items()
  ]
  device = jax.devices()[0]
  table(
    f'Self-check on {len(jax.devices())} x {device.device_kind}, jax {jax.__version__}',
    ('', 'difference', 'at most', '', ''),
    rows,
  )
  failed = [name for name, outcome in found.items() if outcome.status == 'FAILED']
  if failed:
    raise UserError(
      f'{len(failed)} of {len(found)} checks failed: {"; ".join(failed)}. Do not train here: the '
      'numbers above are wrong on this machine or with this version of jax.'
    )
  return {name: outcome._asdict() for name, outcome in found.items()}


def checks(stage: Stage, bench: Fixture) -> Iterator[tuple[str, Callable[[], CheckResult]]]:
  """(what must hold, the check) of each invariant."""
  yield 'cached decoding equals a full forward, log-prob', lambda: decoding(bench)
  yield 'KL is 0 before the first update', lambda: initial_kl(bench)
  yield 'ratio is 1 at the first minibatch', lambda: initial_ratio(bench)
  yield 'padding does not change a sequence', lambda: padding(bench)
  yield 'other rows do not change a sequence', lambda: batch_independence(bench)
  yield 'accumulated gradients equal the whole batch', lambda: accumulation(bench)
  for granularity in GRANULARITIES:
    yield (
      f'{granularity} rewards and advantages equal slow loops',
      functools.partial(_rewards, granularity),
    )
  yield (
    'a reward of 0.7 stays 0.7',
    lambda: CheckResult(selfcheck_rewards.reward_roundtrip_error(), 1e-7),
  )
  yield 'all devices equal one', lambda: sharded(stage, bench)
  yield 'bfloat16 log-probs, mean over tokens', lambda: bfloat16(bench)


def make_fixture(mesh: Any, config: LlamaConfig | None = None) -> Fixture:
  """Fresh networks; the reference is the policy, as before the first update."""
  config = config or make_config(_NETWORK)
  cutter = Segmenter(Segmentation(entropy_threshold=4.5))  # about ln V - 1: some tokens lie above
  recipe = PPORecipe(*[config] * 4, cutter, 'even_split', RewardShaping(), _PPO)
  with jax.set_mesh(mesh):
    params = {
      name: _init(jax.random.key(seed), config, head, mesh)
      for seed, (name, head) in zip((0, 0, 1, 2), _HEADS.items(), strict=True)
    }
    rng = np.random.default_rng(0)
    found = rollout(
      params['policy'],
      rng.integers(8, _VOCABULARY, (_ROWS, _PROMPT)).astype(np.int32),
      rng.integers(1, _PROMPT + 1, _ROWS).astype(np.int32),
      jax.random.key(3),
      config=config,
      settings=RolloutSettings(max_new_tokens=_RESPONSE),
      stop_ids=_STOP_IDS,
      mesh=mesh,
    )
    scored = score(params, found, recipe=recipe)
    experience, metrics = make_experience(
      found, scored, selfcheck_rewards.normalizer_error(), jnp.float32(_PPO.kl_coef), recipe=recipe
    )
  return Fixture(recipe, params, found, experience, jax.device_get(metrics))


def decoding(bench: Fixture) -> CheckResult:
  """Log-probs of the decode loop against those of a forward over the whole sequence."""
  full, _ = _forward(
    bench.params['policy'], concat_prompt_response(bench.rollout), config=bench.recipe.policy
  )
  full = gather_response(full, bench.rollout.prompt_length, _RESPONSE)
  mask = bench.rollout.response_mask
  return CheckResult(_largest(jnp.where(mask, full - bench.rollout.old_logprob, 0)), 1e-4)


def initial_kl(bench: Fixture) -> CheckResult:
  """|log π - log π_ref| of any token, where policy and reference are the same network."""
  return CheckResult(float(bench.metrics['objective/kl_token_max']), 1e-4)


def initial_ratio(bench: Fixture) -> CheckResult:
  """|π / π_old - 1| of any token, before anything was learned."""
  *_, metrics = update(bench)
  return CheckResult(float(metrics['policy/ratio_max_deviation']), 1e-4)


def padding(bench: Fixture) -> CheckResult:
  """Scores of sequences against those of the same with more padding behind."""
  ids = np.asarray(concat_prompt_response(bench.rollout))
  longer = np.pad(ids, ((0, 0), (0, 8)))
  config, params = bench.recipe.reward, bench.params['reward']
  difference = _scores(params, longer, config=config)[:, : ids.shape[1]] - _scores(
    params, ids, config=config
  )
  return CheckResult(_largest(difference), 1e-5)


def batch_independence(bench: Fixture) -> CheckResult:
  """Scores of each sequence against those of the same among others."""
  ids = np.asarray(concat_prompt_response(bench.rollout))
  others = np.where(np.arange(_ROWS)[:, None] % 2 == 0, ids, ids[::-1] ^ 1)
  config, params = bench.recipe.reward, bench.params['reward']
  difference = _scores(params, others, config=config) - _scores(params, ids, config=config)
  return CheckResult(_largest(difference[::2]), 1e-5)


def accumulation(bench: Fixture) -> CheckResult:
  """Parameters after an update in four pieces against those after one in a single piece."""
  whole, parts = update(bench)[0], update(bench, micro_batch=2)[0]
  moved = _distance(whole, bench.params['policy'])
  return CheckResult(_distance(parts, whole) / moved, 1e-3, 'of the update')


def sharded(stage: Stage, bench: Fixture) -> CheckResult:
  """Losses on one device against those on config.mesh."""
  devices = stage.mesh.devices.ravel()
  if len(devices) == 1:
    return CheckResult(math.nan, math.nan, '1 device')
  batch = batch_devices(stage.mesh)
  if _ROWS % batch:
    return CheckResult(math.nan, math.nan, f'{_ROWS} rows, {batch} devices')
  mesh = make_mesh(devices=devices[:1])
  one = make_fixture(mesh, bench.recipe.policy)
  names = ('policy/loss', 'critic/loss', 'policy/grad_norm', 'critic/grad_norm')
  here = update(bench)[2]
  with jax.set_mesh(mesh):
    there = update(one)[2]
  return CheckResult(max(abs(float(here[n] / there[n]) - 1) for n in names), 1e-4, 'relative')


def bfloat16(bench: Fixture) -> CheckResult:
  """Mean over tokens of |difference| between log-probs in bfloat16 and in float32, nats."""
  ids, config = concat_prompt_response(bench.rollout), bench.recipe.policy
  narrow = dataclasses.replace(config, dtype='bfloat16')
  difference = [_forward(bench.params['policy'], ids, config=c)[0] for c in (narrow, config)]
  return CheckResult(float(jnp.mean(jnp.abs(difference[0] - difference[1]))), 0.05, 'nats')


def _rewards(granularity: str) -> CheckResult:
  return CheckResult(selfcheck_rewards.max_abs_error_vs_oracle(granularity), 1e-3)


def update(bench: Fixture, micro_batch: int = 0) -> tuple[Any, Any, dict[str, Any]]:
  """The policy's and the critic's parameters, and the metrics, after one update on all rows."""
  ppo = dataclasses.replace(_PPO, micro_batch_size=micro_batch)
  states = (
    init_state(jax.tree.map(jnp.copy, bench.params[name]), _OPTIMIZER, 10)  # the step donates it
    for name in ('policy', 'critic')
  )
  policy, critic, metrics = ppo_step(
    *states,
    bench.experience,
    np.arange(_ROWS),
    jnp.float32(ppo.kl_coef),
    recipe=dataclasses.replace(bench.recipe, ppo=ppo),
    total_steps=10,
  )
  return policy.params, critic.params, jax.device_get(metrics)


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


def _distance(one: Any, other: Any) -> float:
  """Norm of the difference of all parameters: in one alone Adam may make much of rounding."""
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  return math.sqrt(sum(float(jnp.sum((x - y) ** 2)) for x, y in pairs))


def _short(x: float) -> str:
  return '' if math.isnan(x) else f'{x:.1e}'
