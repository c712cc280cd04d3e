"""The jitted programs of PPO: generation, scoring, rewards, the two updates."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from segjax.config.settings import Segmentation, Settings
from segjax.config.validate import resolve_recompute_logprob
from segjax.errors import UserError
from segjax.model import decode_memory, sharding
from segjax.model.decode import DecodeConfig
from segjax.model.decode_sizes import PoolSize
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import decode_mesh
from segjax.plan import abstract_arrays, roofline
from segjax.plan.decode_programs import decode_programs
from segjax.plan.programs import TOTAL_STEPS, JobPlan, JobPrograms, Phase, RowsAtOnce
from segjax.run.models import apply_runtime
from segjax.train import rollout as rollouts
from segjax.train.experience import make_experience
from segjax.train.ppo_step import Minibatch, critic_step, policy_step
from segjax.train.recipe import PPORecipe
from segjax.train.reward_spec import override
from segjax.train.scoring import score_chunk
from segjax.train.segmenter import Segmenter
from segjax.types import Normalizer

STOP_IDS = (0,)  # their number and values change no shape

Trees = dict[str, Any]

_STATES = ('policy state', 'critic state')
_FROZEN = ('reference', 'reward model')


def ppo_programs(s: Settings, network: LlamaConfig, mesh: Mesh, memory: float | int) -> JobPrograms:
  """Returns the programs of PPO for networks of these sizes."""
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  configs = {'policy': trained, 'critic': trained, 'reference': frozen}
  if s.reward_shaping.reward_model_weight:
    configs['reward'] = frozen
  recipe = PPORecipe(
    policy=trained,
    reference=frozen,
    reward=configs.get('reward'),
    critic=trained,
    segmenter=Segmenter(override(Segmentation(), s.reward_model.segmentation)),
    spread='even_split',
    shaping=s.reward_shaping,
    ppo=s.ppo,
    compat=s.compat,
    recompute_logprob=resolve_recompute_logprob(s),
  )
  trees = _trees(s, configs, mesh)
  # Training states stay on the devices all the time, and so do frozen networks unless they wait
  # in host memory, from which scoring alone fetches them.
  waits_on_host = s.runtime.frozen_params_memory == 'host'
  frozen_names = tuple(name for name in _FROZEN if name in trees)
  resident = (*_STATES, *(() if waits_on_host else frozen_names))
  left = float(memory - sum(abstract_arrays.bytes_per_device(trees[name]) for name in resident))
  phases = [
    *_generation(s, trained, trees, mesh, left),
    _scoring(s, recipe, trees, mesh),
    _rewards(s, recipe, trees, mesh),
    *_updates(s, recipe, trees, mesh),
  ]
  for i, phase in enumerate(phases):
    always = (*_STATES, *frozen_names) if phase.name == 'scoring' else resident
    phases[i] = dataclasses.replace(phase, live=(*always, *phase.live))
  return JobPrograms(trees, phases, configs)


def _trees(s: Settings, configs: dict[str, LlamaConfig], mesh: Mesh) -> Trees:
  """Returns the trees that live across phases, without those that only generation uses."""
  sizes = s.ppo.rollout_batch_size, s.data.max_prompt_length, s.rollout.max_new_tokens
  dtype = s.runtime.compute_dtype
  policy = abstract_arrays.state(configs['policy'], 'language', s.ppo.policy_optimizer, s, mesh)
  critic = abstract_arrays.state(configs['critic'], 'scalar', s.ppo.critic_optimizer, s, mesh)
  trees = {
    'policy state': policy,
    'critic state': critic,
    'policy parameters': policy.params,
    'critic parameters': critic.params,
    'reference': abstract_arrays.params(configs['reference'], 'language', dtype, mesh),
    'rollout': abstract_arrays.batch_shape_structs(lambda: abstract_arrays.rollout(*sizes), mesh),
    'experience': abstract_arrays.batch_shape_structs(
      lambda: abstract_arrays.experience(*sizes), mesh
    ),
  }
  if 'reward' in configs:
    trees['reward model'] = abstract_arrays.params(configs['reward'], 'scalar', dtype, mesh)
  return trees


def _generation(
  s: Settings, config: LlamaConfig, trees: Trees, mesh: Mesh, free_bytes: float
) -> list[Phase]:
  """Returns the phases of a rollout; adds its weights and pages to `trees`.

  Args:
    free_bytes: of a device, beside what lives there all the time.
  """
  decoder = rollouts.make_decoder(s.rollout, config, STOP_IDS, mesh)
  decoder = dataclasses.replace(decoder, weights_dtype=s.rollout.weights_dtype)
  mesh = decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads, decoder.tensor)
  size = _pool_size(s, decoder, mesh, free_bytes)
  programs = decode_programs(
    decoder, mesh, trees['policy parameters'], size, s.data.max_prompt_length
  )
  trees |= {'decode weights': programs.weights, 'pages': programs.pages}
  return programs.phases


def _pool_size(s: Settings, decoder: DecodeConfig, mesh: Mesh, free_bytes: float) -> PoolSize:
  """Returns the rows and pages that a run would have, with prompts of the maximum length."""
  arguments = {
    'responses': s.ppo.rollout_batch_size,
    'longest': s.data.max_prompt_length,
    'mean_prompt': s.data.max_prompt_length / s.rollout.samples_per_prompt,
    'max_concurrent': s.rollout.max_concurrent,
  }
  try:
    return decode_memory.plan_pool(decoder, mesh, free_bytes=free_bytes, **arguments)
  except UserError:
    # A run would be refused. With a row per group the plan says by how much it does not fit.
    arguments['max_concurrent'] = 1
    return decode_memory.plan_pool(decoder, mesh, free_bytes=math.inf, **arguments)


def _scoring(s: Settings, recipe: PPORecipe, trees: Trees, mesh: Mesh) -> Phase:
  size = s.ppo.scoring_batch_size or s.ppo.rollout_batch_size
  prompt, response = s.data.max_prompt_length, s.rollout.max_new_tokens
  params = {'reference': trees['reference'], 'critic': trees['critic parameters']}
  passed_in = ['reference', 'critic parameters']
  if 'reward model' in trees:
    params['reward'] = trees['reward model']
    passed_in.append('reward model')
  if recipe.recompute_logprob:
    params['policy'] = trees['policy parameters']
    passed_in.append('policy parameters')
  ids = abstract_arrays.batch(mesh, jnp.int32, size, prompt + response)
  rollout = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.rollout(size, prompt, response), mesh
  )
  return Phase(
    'scoring',
    score_chunk,
    (params, ids, None, rollout),
    {'recipe': recipe},
    live=('rollout', 'experience'),
    passed_in=tuple(passed_in),
  )


def _rewards(s: Settings, recipe: PPORecipe, trees: Trees, mesh: Mesh) -> Phase:
  outputs = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.model_outputs(s.ppo.rollout_batch_size, s.rollout.max_new_tokens), mesh
  )
  coef = _replicated(mesh, dtype=jnp.float32)
  normalizer = jax.tree.map(lambda _: coef, Normalizer())
  return Phase(
    'rewards',
    make_experience,
    (trees['rollout'], outputs, normalizer, coef, None),
    {'recipe': recipe},
    live=('rollout',),
    passed_in=('rollout',),
  )


def _updates(s: Settings, recipe: PPORecipe, trees: Trees, mesh: Mesh) -> list[Phase]:
  rows = _replicated(mesh, s.ppo.minibatch_size)
  coef = _replicated(mesh, dtype=jnp.float32)
  packing = abstract_arrays.packing(s.ppo, s.ppo.minibatch_size, mesh)
  static = {'recipe': recipe, 'total_steps': TOTAL_STEPS}
  enabled = _replicated(mesh, dtype=jnp.bool)
  minibatch = Minibatch(trees['experience'], rows, packing, enabled)
  policy = (trees['policy state'], minibatch, coef)
  critic = (trees['critic state'], minibatch)
  return [
    Phase(
      f'{name} update', step, arguments, static, ('experience',), (f'{name} state', 'experience')
    )
    for name, step, arguments in (('policy', policy_step, policy), ('critic', critic_step, critic))
  ]


def _replicated(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))


PPO = JobPlan(
  name='ppo',
  programs=ppo_programs,
  costs=roofline.ppo_step,
  items_per_step=lambda s: s.ppo.rollout_batch_size // s.rollout.samples_per_prompt,
  items='prompts',
  batch_keys=(
    'ppo.rollout_batch_size',
    'ppo.minibatch_size',
    'ppo.micro_batch_size',
    'ppo.scoring_batch_size',
  ),
  rows_at_once=(
    RowsAtOnce(
      'rollout.max_concurrent',
      'ppo.rollout_batch_size',
      ('prefill', 'decode chunk'),
    ),
    RowsAtOnce(
      'ppo.micro_batch_size',
      'ppo.minibatch_size',
      ('policy update', 'critic update'),
      'ppo.micro_batch_tokens',
    ),
    RowsAtOnce('ppo.scoring_batch_size', 'ppo.rollout_batch_size', ('scoring',)),
  ),
  optimizers=('ppo.policy_optimizer', 'ppo.critic_optimizer'),
  has_frozen=True,
)
