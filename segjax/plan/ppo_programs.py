"""The jitted programs of PPO: generation, scoring, rewards, the updates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.lora import resolve_lora
from segjax.config.settings import Segmentation, Settings
from segjax.config.validate import resolve_recompute_logprob
from segjax.model import sharding
from segjax.model.llama import LlamaConfig
from segjax.model.lora import trained_params
from segjax.plan import abstract_arrays
from segjax.plan.generation_phases import generation_phases
from segjax.plan.lengths import TextLengths, draw_lengths
from segjax.plan.phases import (
  TOTAL_STEPS,
  Calls,
  JobPlan,
  JobPrograms,
  Phase,
  RowsAtOnce,
)
from segjax.plan.update_calls import update_calls
from segjax.run.network_runtime import apply_runtime
from segjax.train import throughput
from segjax.train.experience import make_experience
from segjax.train.ppo_step import Minibatch, critic_step, policy_step
from segjax.train.recipe import PPORecipe
from segjax.train.reward_spec import override
from segjax.train.scoring import chunk_rows, score_chunk
from segjax.train.segmenter import Segmenter
from segjax.types import Normalizer

Trees = dict[str, Any]

_STATES = ('policy state', 'critic state')
_FROZEN = ('reference', 'reward model', 'reward language model')
_ADAPTERS_OF = {'reward_lm': 'dpo'}  # in config.lora, where that is not the network's name


def ppo_programs(
  s: Settings, network: LlamaConfig, mesh: Mesh, memory: float | int, lengths: str
) -> JobPrograms:
  """Returns the programs of PPO for networks of these sizes.

  Args:
    s: the settings.
    network: of the policy.
    mesh: the devices.
    memory: bytes of a device.
    lengths: of the texts of a step, one of `lengths.KINDS`.
  """
  configs = _networks(s, network, mesh)
  recipe = PPORecipe(
    policy=configs['policy'],
    reference=configs['reference'],
    reward=configs.get('reward'),
    critic=configs.get('critic'),
    segmenter=Segmenter(override(Segmentation(), s.reward_model.segmentation)),
    spread='even_split',
    shaping=s.reward_shaping,
    ppo=s.ppo,
    compat=s.compat,
    recompute_logprob=resolve_recompute_logprob(s),
    reward_lm=configs.get('reward_lm'),
    one_base=_on_one_base(configs),
    samples_per_prompt=s.rollout.samples_per_prompt,
  )
  trees = _trees(s, configs, mesh)
  # Training states stay on the devices all the time, and so do frozen networks unless they wait
  # in host memory, from which scoring alone fetches them.
  waits_on_host = s.runtime.frozen_params_memory == 'host'
  states, frozen_names = (
    tuple(name for name in names if name in trees) for names in (_STATES, _FROZEN)
  )
  resident = (*states, *(() if waits_on_host else frozen_names))
  left = float(memory - sum(abstract_arrays.bytes_per_device(trees[name]) for name in resident))
  texts = draw_lengths(
    lengths,
    s.ppo.rollout_batch_size,
    s.data.max_prompt_length,
    s.rollout.max_new_tokens,
    s.rollout.samples_per_prompt,
  )
  generation, at_once = generation_phases(s, configs['policy'], trees, texts, mesh, left)
  phases = [
    *generation,
    _scoring(s, recipe, trees, texts, mesh),
    _rewards(s, recipe, trees, mesh),
    *_updates(s, recipe, trees, texts, mesh),
  ]
  for i, phase in enumerate(phases):
    always = (*states, *frozen_names) if phase.name == 'scoring' else resident
    phases[i] = dataclasses.replace(phase, live=(*always, *phase.live))
  return JobPrograms(trees, phases, configs, int(texts.total.sum()), at_once)


def _networks(s: Settings, network: LlamaConfig, mesh: Mesh) -> dict[str, LlamaConfig]:
  """Returns the networks; those that reward have the adapters of `config.lora.reward` and `dpo`."""
  trained, _ = apply_runtime(network, s.runtime, mesh, trained=True)
  frozen, _ = apply_runtime(network, s.runtime, mesh, trained=False)
  configs = {'policy': trained, 'reference': frozen}
  if s.ppo.has_critic:
    configs['critic'] = trained
  if s.reward_shaping.reward_model_weight:
    configs['reward'] = frozen
  if s.reward_shaping.lm_reward.kind != 'off':
    configs['reward_lm'] = frozen
  others = configs.keys() - {'reference'}
  return configs | {
    name: dataclasses.replace(configs[name], lora=resolve_lora(s, _ADAPTERS_OF.get(name, name)))
    for name in others
  }


def _on_one_base(configs: dict[str, LlamaConfig]) -> tuple[str, ...]:
  """Returns the networks that add adapters to the reference, and itself; () if none does."""
  names = tuple(name for name, config in configs.items() if config.lora)
  return ('reference', *names) if names else ()


def _trees(s: Settings, configs: dict[str, LlamaConfig], mesh: Mesh) -> Trees:
  """Returns the trees that live across phases, without those that only generation uses."""
  sizes = s.ppo.rollout_batch_size, s.data.max_prompt_length, s.rollout.max_new_tokens
  dtype = s.runtime.compute_dtype
  policy = abstract_arrays.state(configs['policy'], 'language', s.ppo.policy_optimizer, s, mesh)
  trees = {'policy state': policy, 'policy parameters': policy.params}
  if 'critic' in configs:
    critic = abstract_arrays.state(configs['critic'], 'scalar', s.ppo.critic_optimizer, s, mesh)
    trees |= {'critic state': critic, 'critic parameters': critic.params}
  trees |= {
    'reference': abstract_arrays.params(configs['reference'], 'language', dtype, mesh),
    'rollout': abstract_arrays.batch_shape_structs(lambda: abstract_arrays.rollout(*sizes), mesh),
    'experience': abstract_arrays.batch_shape_structs(
      lambda: abstract_arrays.experience(*sizes, has_critic=s.ppo.has_critic), mesh
    ),
  }
  for name, tree, head in (
    ('reward', 'reward model', 'scalar'),
    ('reward_lm', 'reward language model', 'language'),
  ):
    if name in configs:
      params, lora = abstract_arrays.params(configs[name], head, dtype, mesh), configs[name].lora
      trees[tree] = trained_params(params, lora) if lora else params
  # Parts of the others: what the backbone of adapters is, and what generation reads.
  trees['base parameters'] = {'backbone': trees['reference']['backbone']}
  base = trees['reference'] if configs['policy'].lora else {}
  trees['sampled parameters'] = base | policy.params
  return trees


def _scoring(s: Settings, recipe: PPORecipe, trees: Trees, texts: TextLengths, mesh: Mesh) -> Phase:
  size = s.ppo.scoring_batch_size or s.ppo.rollout_batch_size
  prompt, response = s.data.max_prompt_length, s.rollout.max_new_tokens
  passed_in = {'reference': 'reference'}
  if recipe.critic is not None:
    passed_in['critic'] = 'critic parameters'
  if recipe.reward is not None:
    passed_in['reward'] = 'reward model'
  if recipe.reward_lm is not None:
    passed_in['reward_lm'] = 'reward language model'
  if recipe.recompute_logprob:
    passed_in['policy'] = 'policy parameters'
  params = {name: trees[tree] for name, tree in passed_in.items()}
  rollout = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.rollout(size, prompt, response), mesh
  )

  def arguments(width):
    return params, abstract_arrays.batch(mesh, jnp.int32, size, width), None, rollout

  longest = prompt + response
  # The work of a chunk grows with its width: of all widths the mean stands for the others.
  widths = [width for _, width in chunk_rows(texts.total, size, longest)]
  mean = min(widths, key=lambda width: abs(width - np.mean(widths)))
  return Phase(
    'scoring',
    score_chunk,
    arguments(longest),
    {'recipe': recipe},
    live=('rollout', 'experience'),
    passed_in=tuple(passed_in.values()),
    calls=lambda: Calls(sum(widths) / mean, arguments=None if mean == longest else arguments(mean)),
  )


def _rewards(s: Settings, recipe: PPORecipe, trees: Trees, mesh: Mesh) -> Phase:
  outputs = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.model_outputs(
      s.ppo.rollout_batch_size,
      s.rollout.max_new_tokens,
      has_critic=s.ppo.has_critic,
      has_lm=recipe.reward_lm is not None,
    ),
    mesh,
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


def _updates(
  s: Settings, recipe: PPORecipe, trees: Trees, texts: TextLengths, mesh: Mesh
) -> list[Phase]:
  rows = _replicated(mesh, s.ppo.minibatch_size)
  coef = _replicated(mesh, dtype=jnp.float32)
  enabled = _replicated(mesh, dtype=jnp.bool)
  longest = s.data.max_prompt_length + s.rollout.max_new_tokens
  epochs = s.ppo.num_ppo_epochs
  # In the order of the draw, which is random as that of a run.
  batches = np.tile(texts.total, epochs).reshape(-1, s.ppo.minibatch_size)

  def phase(name, step, head, config, *others):
    # The critic does not read the head to the vocabulary.
    tree = 'reference' if head == 'language' else 'base parameters'
    base, base_name = ([trees[tree]], (tree,)) if config.lora else ([], ())

    def arguments(packing):
      minibatch = Minibatch(trees['experience'], rows, packing, enabled)
      return trees[f'{name} state'], minibatch, *others, *base

    largest, calls = update_calls(arguments, s.ppo, batches, longest, mesh, config)
    return Phase(
      f'{name} update',
      step,
      largest,
      {'recipe': recipe, 'total_steps': TOTAL_STEPS},
      live=('experience',),
      passed_in=(f'{name} state', 'experience', *base_name),
      calls=lambda: calls,
      model_flops=epochs * throughput.update(texts.total, config, head)[throughput.FLOPS],
    )

  phases = [phase('policy', policy_step, 'language', recipe.policy, coef)]
  if recipe.critic is not None:
    phases.append(phase('critic', critic_step, 'scalar', recipe.critic))
  return phases


def _replicated(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))


PPO = JobPlan(
  name='ppo',
  programs=ppo_programs,
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
  optimizers=lambda s: ('ppo.policy_optimizer', *['ppo.critic_optimizer'] * s.ppo.has_critic),
  has_frozen=True,
)
