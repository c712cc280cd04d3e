"""PPO on dense segment rewards: loads models and prompts, trains, writes the policy and critic.

The steps themselves are in `ppo_trainer`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from segjax.config.no_effect import frozen_networks
from segjax.config.reward_lines import reward_models
from segjax.config.settings import Settings
from segjax.data.batches import Prompts, split_holdout
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.jobs import evaluate_functions, run_end
from segjax.jobs.describe_rewards import describe_rewards
from segjax.jobs.job import (
  COMMON,
  LISTED_REWARDS,
  LM_REWARD,
  OPTIONAL_REWARD_MODEL,
  POLICY,
  REFERENCE,
  REWARDED,
  Input,
  Job,
  data_input,
  more_rewarding_models,
)
from segjax.jobs.ppo_trainer import Trainer, plan_minibatches, updates_per_step
from segjax.plan.ppo_programs import PPO as PLAN
from segjax.report.timing import StepTimer
from segjax.run import inputs, models, preemption, provenance, recipes, training_loop
from segjax.run.reward_sources import load_listed
from segjax.run.stage import Stage
from segjax.run.text_model import check_prompts
from segjax.run.weights import Trainable, Weights, log_memory, save_network
from segjax.train.carry import Stream, nothing_carried
from segjax.train.collect import Collector
from segjax.train.custom_reward import load_custom_reward
from segjax.train.optimizer import init_state
from segjax.train.recipe import PPORecipe
from segjax.train.rollout import RolloutSampler
from segjax.types import Normalizer

RESULTS = {  # of the last step: name in the results -> metric
  'reward': 'objective/reward',
  'kl': 'objective/kl',
  'length': 'response/length_mean',
  'segments': 'segments/per_response',
}
# Printed on the console, the first two next to the progress bar; curves of the model card.
SHOW = tuple(RESULTS.values())
CRITICS = ('policy', 'reward_model')  # values of config.critic.init that are not paths


class Loaded(NamedTuple):
  """What PPO needs but weights.

  Attributes:
    models: the frozen models.
    paths: directories of the trained networks, 'policy' and, if there is one, 'critic'.
    recipe: constants of the run.
    tokenizer: of the policy.
    prompts: the prompts.
    sampler: samples responses of the policy.
  """

  models: models.Models
  paths: dict[str, Path]
  recipe: PPORecipe
  tokenizer: ChatTokenizer
  prompts: Prompts
  sampler: RolloutSampler


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  resolved = models.resolve_models(s, stage.mesh, stage.log)
  paths = {'policy': resolved.paths['policy']}
  if s.ppo.has_critic:
    paths['critic'] = critic_directory(s.critic.init, resolved)
  tokenizer = models.load_chat_tokenizer(s, resolved, stage.log)
  trained = {name: models.load_trained_config(stage, name, path) for name, path in paths.items()}
  configs = resolved.configs | trained
  tokenizer = tokenizer.for_networks(configs)
  scored = resolved._replace(configs=configs, paths=resolved.paths | paths)
  recipe = recipes.make_recipe(s, scored, tokenizer)
  rollout = inputs.fit_rollout(s.rollout, configs, stage.log)
  limits = inputs.prompt_limits(s.data, configs, rollout.max_new_tokens, stage.log)
  prompts = tokenize_prompts(inputs.load_config_rows(s.data, stage.log), tokenizer, limits)
  inputs.log_dataset(prompts, stage.log)
  check_prompts(resolved.texts.values(), prompts)
  sampler = RolloutSampler(
    recipe.policy,
    rollout,
    tokenizer.stop_ids,
    stage.mesh,
    rollout.samples_per_prompt,
    stage.log,
    # Evaluations and answers read the model as it is saved.
    weights_dtype=rollout.weights_dtype,
  )
  return Loaded(resolved, paths, recipe, tokenizer, prompts, sampler)


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Trains config.policy.path on the prompts of config.data.path; writes `model/`, and `critic/`.

  Returns:
    steps, and the metrics of the last step in `RESULTS`.
  """
  s = stage.settings
  resolved, paths, recipe, tokenizer, prompts, _ = loaded
  for name in frozen_networks(s):
    stage.log(f'warning: the {name} is not trained, its learning rate is 0')
  stage.log(describe_rewards(recipe, resolved.reward_spec.normalizer_kind))
  on_host = s.runtime.frozen_params_memory == 'host'
  names = ('reference', 'reward', 'reward_lm', *(source.key for source in recipe.rewards))
  weights = Weights(s.runtime, stage.mesh)
  frozen = models.load_models(resolved, names, weights, on_host=on_host)
  networks = _load_trained(stage, paths, recipe, weights)
  states = _init_states(stage, networks)
  bases = {name: network.base for name, network in networks.items()}
  trees = {name: states[name] for name in networks} | {'bases': bases} | frozen
  log_memory(trees, stage.mesh, stage.log)
  normalizer = jax.tree.map(jnp.float32, resolved.reward_spec.normalizer)
  trainer = _make_trainer(stage, loaded, frozen, bases, normalizer)
  if trainer.stream is not None:
    states['carried'] = nothing_carried(trainer.stream, stage.mesh)
  states, last = training_loop.train(stage, states, trainer.step, s.ppo.max_steps, SHOW)
  results = {name: last.get(metric) for name, metric in RESULTS.items()}
  card = provenance.card(stage, results, prompts, SHOW)
  directories = {'policy': stage.model_directory, 'critic': stage.directory / 'critic'}
  for name in networks:
    save_network(
      directories[name],
      states[name].params,
      getattr(recipe, name),
      models.TRAINED_HEADS[name],
      source=paths[name],
      card=card,
      tokenizer=tokenizer,
    )
  return {'steps': s.ppo.max_steps} | results


def critic_directory(init: str, resolved: models.Models) -> Path:
  """Returns the checkpoint of the critic's first weights.

  Args:
    init: config.critic.init.
    resolved: the frozen models.
  """
  paths = resolved.paths
  if init == 'policy':
    return paths['policy']
  if init != 'reward_model':
    return inputs.resolve_checkpoint(init, 'critic.init')
  if resolved.text_model is not None:
    raise UserError(
      f'config.critic.init=reward_model, but {resolved.text_model.path} reads text, and a critic '
      'the policy’s tokens; use policy.'
    )
  if 'reward' not in paths:
    raise UserError('config.critic.init=reward_model, but there is no reward model; use policy.')
  if resolved.configs['reward'].score is not None:
    raise UserError(
      f'config.critic.init=reward_model, but the score of {paths["reward"]} is not that of one '
      'label without a bias, which a critic has; use policy.'
    )
  return paths['reward']


def _load_trained(
  stage: Stage, paths: dict[str, Path], recipe: PPORecipe, weights: Weights
) -> dict[str, Trainable]:
  """Loads the policy, and the critic if there is one."""
  keys = {'policy': 'adapter', 'critic': 'head'}
  networks = {
    name: weights.trained(
      path, getattr(recipe, name), models.TRAINED_HEADS[name], stage.key(keys[name])
    )
    for name, path in paths.items()
  }
  for name, network in networks.items():
    stage.log(f'training {network.describe()} of the {name}')
  return networks


def _init_states(stage: Stage, networks: dict[str, Trainable]) -> training_loop.TrainStates:
  """Returns the states before the first step."""
  s, per_step = stage.settings, updates_per_step(stage.settings.ppo)
  optimizers = {'policy': s.ppo.policy_optimizer, 'critic': s.ppo.critic_optimizer}
  # The policy is not updated while the critic warms up, so its schedule is shorter.
  steps = {'policy': s.ppo.max_steps - s.critic.warmup_rollouts, 'critic': s.ppo.max_steps}
  states = {
    name: init_state(
      network.params, optimizers[name], steps[name] * per_step, stage.key(f'rounding of {name}')
    )
    for name, network in networks.items()
  }
  return states | {'kl': {'coef': jnp.float32(s.ppo.kl_coef)}}


def _make_trainer(
  stage: Stage,
  loaded: Loaded,
  frozen: dict[str, Any],
  bases: dict[str, Any],
  normalizer: Normalizer,
) -> Trainer:
  s, (resolved, _, recipe, tokenizer, prompts, sampler) = stage.settings, loaded
  train_set, held_out = split_holdout(prompts, s.ppo.holdout_fraction, s.seed)
  eval_collector = Collector(
    held_out,
    sampler,
    recipe,
    normalizer,
    load_custom_reward(s.reward_shaping, tokenizer.decode),
    load_listed(s, resolved.listed, tokenizer.decode),
    stop=preemption.stop_requested,
    texts=resolved.text_rewards(tokenizer),
  )
  timer, stream, minibatches = StepTimer(), None, None
  if s.ppo.packing_length:
    minibatches = functools.partial(plan_minibatches, s=s, mesh=stage.mesh, network=recipe.policy)
  if s.rollout.carry:
    size, max_tokens = s.ppo.rollout_batch_size, sampler.settings.max_new_tokens
    stream = Stream(train_set, s.seed, stage.key('rollout'), size, max_tokens)
  return Trainer(
    stage=stage,
    frozen=frozen,
    bases=bases,
    collector=dataclasses.replace(
      eval_collector, prompts=train_set, on_part=timer.end, minibatches=minibatches
    ),
    eval_collector=eval_collector,
    gold=evaluate_functions.load_gold(s, tokenizer.decode) if s.ppo.eval_every else None,
    responses=recipes.make_response_log(stage.directory, s.report, recipe, tokenizer, train_set),
    timer=timer,
    stream=stream,
  )


def _headline(stage: Stage, results: dict[str, Any]) -> str:
  if 'policy' in frozen_networks(stage.settings):
    return 'the policy was not trained: config.ppo.policy_optimizer.learning_rate is 0'
  return run_end.describe_change(stage, 'objective/reward', 'reward per training response')


def _functions(settings: Settings) -> tuple[str, ...]:
  gold = ('evaluate.gold_reward_fn',) if settings.ppo.eval_every else ()  # of eval/gold
  return ('reward_shaping.reward_fn', 'reward_model.segmentation.boundary_fn', *gold)


def _passes(s: Settings) -> float:
  """Returns the passes of a token: sampling, scoring, updates of policy and critic."""
  trained, scored = 1 + s.ppo.has_critic, 2 + s.ppo.has_critic + len(reward_models(s.rewards))
  return 1.0 + scored + trained * 3 * s.ppo.num_ppo_epochs


JOB = Job(
  name='ppo',
  load=load,
  run=run,
  sections=(*COMMON, *REWARDED, 'critic', 'lora'),
  inputs=(
    POLICY,
    REFERENCE,
    OPTIONAL_REWARD_MODEL,
    LM_REWARD,
    LISTED_REWARDS,
    Input('critic.init', keywords=CRITICS),
    data_input('prompts'),
  ),
  functions=_functions,
  outputs=('model', 'critic'),
  batch_keys=PLAN.batch_keys,
  summary=('reward', 'kl'),
  num_networks=lambda s: 3 + s.ppo.has_critic + more_rewarding_models(s),
  tokens_per_step=lambda s: (
    s.ppo.rollout_batch_size * (s.data.max_prompt_length + s.rollout.max_new_tokens)
  ),
  num_steps=lambda s, rows: s.ppo.max_steps,
  passes=_passes,
  headline=_headline,
  plan=PLAN,
)
