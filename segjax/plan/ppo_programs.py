"""The jitted programs of PPO: generation, scoring, rewards, the updates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.reward_lines import reward_models
from segjax.config.settings import Segmentation, Settings
from segjax.config.validate import resolve_recompute_logprob
from segjax.model.llama import LlamaConfig
from segjax.model.lora import trained_params
from segjax.plan import abstract_arrays
from segjax.plan.generation_phases import generation_phases
from segjax.plan.lengths import TextLengths, draw_lengths
from segjax.plan.phases import (
  TOTAL_STEPS,
  JobPlan,
  JobPrograms,
  Phase,
  RowsAtOnce,
)
from segjax.plan.ppo_networks import listed_sources, names_on_one_base, networks
from segjax.plan.scoring_phase import LISTED, scores_packed, scoring_phase
from segjax.plan.update_calls import update_calls
from segjax.train import throughput
from segjax.train.experience import make_experience
from segjax.train.ppo_step import Minibatch, critic_step, policy_step
from segjax.train.recipe import PPORecipe
from segjax.train.reward_mixing import ListedRewards
from segjax.train.reward_spec import override
from segjax.train.segmenter import Segmenter
from segjax.types import Normalizer

Trees = dict[str, Any]

_STATES = ('policy state', 'critic state')
_FROZEN = ('reference', 'reward model', 'reward language model')


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
  configs = networks(s, network, mesh)
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
    one_base=names_on_one_base(configs),
    samples_per_prompt=s.rollout.samples_per_prompt,
    rewards=listed_sources(s, configs),
  )
  trees = _trees(s, configs, mesh)
  # Training states stay on the devices all the time, and so do frozen networks unless they wait
  # in host memory, from which scoring alone fetches them.
  waits_on_host = s.runtime.frozen_params_memory == 'host'
  states = tuple(name for name in _STATES if name in trees)
  frozen_names = tuple(name for name in trees if name in _FROZEN or name.startswith(LISTED))
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
    scoring_phase(s, recipe, trees, texts, mesh),
    _rewards(s, recipe, trees, mesh),
    *_updates(s, recipe, trees, texts, mesh),
  ]
  for i, phase in enumerate(phases):
    always = (*states, *frozen_names) if phase.name == 'scoring' else resident
    phases[i] = dataclasses.replace(phase, live=(*always, *phase.live))
  return JobPrograms(trees, phases, configs, int(texts.total.sum()), at_once)


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
    *((line.network, f'{LISTED}{line.name}', 'scalar') for line in reward_models(s.rewards)),
  ):
    if name in configs:
      params, lora = abstract_arrays.params(configs[name], head, dtype, mesh), configs[name].lora
      trees[tree] = trained_params(params, lora) if lora else params
  # Parts of the others: what the backbone of adapters is, and what generation reads.
  trees['base parameters'] = {'backbone': trees['reference']['backbone']}
  base = trees['reference'] if configs['policy'].lora else {}
  trees['sampled parameters'] = base | policy.params
  return trees


def _rewards(s: Settings, recipe: PPORecipe, trees: Trees, mesh: Mesh) -> Phase:
  outputs = abstract_arrays.batch_shape_structs(
    lambda: abstract_arrays.model_outputs(
      s.ppo.rollout_batch_size,
      s.rollout.max_new_tokens,
      has_critic=s.ppo.has_critic,
      has_lm=recipe.reward_lm is not None,
      listed=[source.name for source in recipe.rewards],
    ),
    mesh,
  )
  coef = abstract_arrays.replicated(mesh, dtype=jnp.float32)
  normalizer = jax.tree.map(lambda _: coef, Normalizer())
  names = [source.name for source in recipe.rewards]
  listed = ListedRewards(dict.fromkeys(names, normalizer), {}) if s.rewards else None
  return Phase(
    'rewards',
    make_experience,
    (trees['rollout'], outputs, normalizer, coef, None, listed),
    {'recipe': recipe},
    live=('rollout',),
    passed_in=('rollout',),
  )


def _updates(
  s: Settings, recipe: PPORecipe, trees: Trees, texts: TextLengths, mesh: Mesh
) -> list[Phase]:
  rows = abstract_arrays.replicated(mesh, s.ppo.minibatch_size)
  coef = abstract_arrays.replicated(mesh, dtype=jnp.float32)
  enabled = abstract_arrays.replicated(mesh, dtype=jnp.bool)
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


def _rows_at_once(s: Settings) -> tuple[RowsAtOnce, ...]:
  decoding, updates = ('prefill', 'decode chunk'), ('policy update', 'critic update')
  scoring = ('scoring',)
  if scores_packed(s):
    updates, scoring = (*updates, *scoring), ()
  return (
    RowsAtOnce('rollout.max_concurrent', 'ppo.rollout_batch_size', decoding),
    RowsAtOnce('ppo.micro_batch_size', 'ppo.minibatch_size', updates, 'ppo.micro_batch_tokens'),
    *(RowsAtOnce('ppo.scoring_batch_size', 'ppo.rollout_batch_size', (each,)) for each in scoring),
  )


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
  rows_at_once=_rows_at_once,
  optimizers=lambda s: ('ppo.policy_optimizer', *['ppo.critic_optimizer'] * s.ppo.has_critic),
  has_frozen=True,
)
