"""PPO on dense segment rewards: rollout, scoring, advantages, clipped updates, HF export."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax.config.settings import PPO
from segjax.data.batches import endless_batch_indices, split_holdout
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.hf.writer import save_checkpoint
from segjax.jobs import evaluate
from segjax.jobs.job import (
  COMMON,
  OPTIONAL_REWARD_MODEL,
  POLICY,
  REFERENCE,
  Input,
  Job,
  data,
)
from segjax.plan.ppo_programs import PPO as PLAN
from segjax.report.timing import StepTimer
from segjax.rl.kl import adaptive_kl_coef
from segjax.run import inputs, models, preemption, provenance, training_loop
from segjax.run.stage import Stage
from segjax.train import throughput
from segjax.train.collect import Collected, Collector, held_out_metrics
from segjax.train.custom_reward import load_custom_reward
from segjax.train.metrics import Metrics, combine_updates
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import Minibatch, ppo_step
from segjax.train.recipe import PPORecipe
from segjax.train.rollout import RolloutSampler
from segjax.train.rollout_metrics import within_bounds

FIGURES = {  # of the last step: names in results, names of metrics
  'reward': 'objective/reward',
  'kl': 'objective/kl',
  'length': 'response/length_mean',
  'segments': 'segments/per_response',
}
CRITICS = ('policy', 'reward_model')  # values of config.critic.init that are not paths
SHOW = list(FIGURES.values())  # on the console, the first two beside the bar; in the card's curves


def run(stage: Stage) -> dict[str, Any]:
  """Trains config.policy.path on the prompts of config.data.path; writes `model/` and `critic/`."""
  s = stage.settings
  resolved = models.resolve_models(s, stage.mesh, stage.log)
  paths, meaning, networks = resolved
  critic_path = critic_directory(s.critic.init, paths)
  tokenizer = load_tokenizer(str(paths['policy']), s.data.chat_template)
  policy_config, critic_config = (
    models.load_network_config(path, s.runtime, stage.mesh, stage.log, trained=True)
    for path in (paths['policy'], critic_path)
  )
  recipe = models.make_recipe(
    s, networks | {'policy': policy_config}, critic_config, meaning, tokenizer
  )
  limits = inputs.prompt_limits(
    s.data,
    networks | {'critic': recipe.critic},
    s.rollout.max_new_tokens,
    'rollout.max_new_tokens',
    stage.log,
  )
  prompts = tokenize_prompts(inputs.load_config_rows(s.data), tokenizer, limits)
  inputs.log_dataset(prompts, stage.log)
  stage.log(describe_rewards(recipe, meaning.normalizer_kind))
  frozen = models.load_models(
    resolved,
    ('reference', 'reward'),
    s.runtime,
    stage.mesh,
    on_host=s.runtime.frozen_params_memory == 'host',
  )
  warmup = s.critic.warmup_rollouts * updates_per_step(s.ppo)
  total = s.ppo.max_steps * updates_per_step(s.ppo)
  policy = models.load_params(
    paths['policy'], recipe.policy, 'language', s.runtime, stage.mesh, trained=True
  )
  critic = models.load_params(
    critic_path,
    recipe.critic,
    'scalar',
    s.runtime,
    stage.mesh,
    key=stage.key('head'),
    trained=True,
  )
  states = {
    'policy': init_state(policy, s.ppo.policy_optimizer, total - warmup),
    'critic': init_state(critic, s.ppo.critic_optimizer, total),
    'kl': {'coef': jnp.float32(s.ppo.kl_coef)},
  }
  trees = {'policy': states['policy'], 'critic': states['critic']} | frozen
  models.log_memory(trees, stage.mesh, stage.log)
  normalizer = jax.tree.map(jnp.float32, meaning.normalizer)
  train_set, held_out = split_holdout(prompts, s.ppo.holdout_fraction, s.seed)
  timing = StepTimer()
  collector = Collector(
    train_set,
    RolloutSampler(
      recipe.policy,
      s.rollout,
      tokenizer.stop_ids,
      stage.mesh,
      s.rollout.samples_per_prompt,
      stage.log,
    ),
    recipe,
    normalizer,
    load_custom_reward(s.reward_shaping.reward_fn, tokenizer.decode),
    preemption.raise_if_stop_requested,
    timing.end,
  )
  eval_collector = dataclasses.replace(
    collector, prompts=held_out, on_part=lambda name, arrays: None
  )
  gold, _ = evaluate.load_eval_functions(s.evaluate)
  responses = models.make_response_log(stage.directory, s.report, recipe, tokenizer, train_set)

  def step_fn(states, step):
    timing.begin()
    key = jax.random.fold_in(stage.key('rollout'), step)
    rows = endless_batch_indices(
      len(train_set), s.ppo.rollout_batch_size // s.rollout.samples_per_prompt, s.seed, step
    )
    coef = states['kl']['coef']
    collected = collector.collect(frozen | parameters(states), rows, key, coef)
    metrics = collected.metrics
    work = throughput.ppo_step(recipe, collected.rollout.length)
    policy_from = warmup if step >= s.critic.warmup_rollouts else None
    is_within = within_bounds(metrics, ppo=s.ppo)
    states, updates = update(
      states, collected, recipe, (s.seed, step), total, policy_from, is_within
    )
    if s.ppo.kl_target:
      moved = _next_coef(coef, metrics['objective/kl'], s.ppo)
      states['kl'] = {'coef': jnp.where(is_within, moved, coef)}
    timing.end('update', states)
    metrics |= {'objective/kl_coef': coef} | updates | work
    if s.ppo.eval_every and (step + 1) % s.ppo.eval_every == 0:
      # The step is done: asked to stop while it is looked at, it goes without these figures.
      with contextlib.suppress(preemption.StepAbortedError):
        metrics |= held_out_metrics(
          eval_collector,
          frozen | parameters(states),
          stage.key('held out'),
          states['kl']['coef'],
          gold,
          tokenizer.decode,
        )
      timing.end('evaluate')
    responses.take(
      step,
      s.ppo.max_steps,
      collected.experience,
      np.repeat(rows, s.rollout.samples_per_prompt),
    )
    return states, metrics | timing.seconds

  states, last = training_loop.train(stage, states, step_fn, s.ppo.max_steps, SHOW)
  figures = {name: last.get(metric) for name, metric in FIGURES.items()}
  card = provenance.card(stage, figures, prompts, SHOW)
  for directory, name, head, source in (
    (stage.model_directory, 'policy', 'language', paths['policy']),
    (stage.directory / 'critic', 'critic', 'scalar', critic_path),
  ):
    network, params = getattr(recipe, name), states[name].params
    save_checkpoint(directory, params, network, head, source=source, card=card)
  return {'steps': s.ppo.max_steps} | figures


def parameters(states: training_loop.TrainStates) -> dict[str, Any]:
  """Of policy and critic."""
  return {name: states[name].params for name in ('policy', 'critic')}


def critic_directory(init: str, paths: dict[str, Any]) -> Any:
  """Where the critic's first weights are."""
  if init == 'reward_model' and 'reward' not in paths:
    raise UserError('config.critic.init=reward_model, but there is none; use policy.')
  known = {'policy': paths['policy'], 'reward_model': paths.get('reward')}
  return known.get(init) or inputs.resolve_checkpoint(init, 'critic.init')


def describe_rewards(recipe: PPORecipe, normalizer_kind: str) -> str:
  """What the rewards are, in a line."""
  cutting = recipe.segmenter.segmentation
  how = ''
  if cutting.granularity == 'segment':
    size = {'entropy': f' above {cutting.entropy_threshold:g} nats', 'delimiter': ''}
    how = f' by {cutting.boundary}{size.get(cutting.boundary, f" {cutting.segment_length}")}'
  red = ', redistributed' if recipe.shaping.redistribute == 'red' else ''
  return (
    f'{cutting.granularity} rewards{how}, {normalizer_kind} normaliser{red}, spread {recipe.spread}'
  )


def updates_per_step(ppo: PPO) -> int:
  """Minibatches that a rollout gives, over all epochs."""
  return ppo.num_ppo_epochs * (ppo.rollout_batch_size // ppo.minibatch_size)


def update(
  states: training_loop.TrainStates,
  collected: Collected,
  recipe: PPORecipe,
  seed: tuple[int, int],
  total_updates: int,
  policy_from: int | None = 0,
  enabled: Any = True,
) -> tuple[training_loop.TrainStates, dict[str, Any]]:
  """Runs `ppo.num_ppo_epochs` passes over the rollout in shuffled minibatches.

  Metrics are combined over the updates: means, the largest `policy/ratio_max_deviation`, the sum
  of `skipped_updates`. `total_updates` and `policy_from` are those of `ppo_step`, `enabled` that
  of its minibatch.
  """
  policy, critic, updates = states['policy'], states['critic'], []
  ppo, lengths = recipe.ppo, collected.rollout.length
  for epoch in range(ppo.num_ppo_epochs):
    order = np.random.default_rng([*seed, epoch]).permutation(ppo.rollout_batch_size)
    for rows in order.reshape(-1, ppo.minibatch_size):
      packing, efficiency = training_loop.plan_packing_for(ppo, lengths[rows])
      policy, critic, metrics = ppo_step(
        policy,
        critic,
        Minibatch(collected.experience, rows, packing, enabled),
        states['kl']['coef'],
        recipe=recipe,
        total_steps=total_updates,
        policy_from=policy_from,
      )
      updates.append(metrics.merge(Metrics(mean=efficiency)))
  metrics = combine_updates(updates)
  if 'policy/ratio_max_deviation' in updates[0].max:
    metrics['policy/initial_ratio_deviation'] = updates[0].max['policy/ratio_max_deviation']
  return states | {'policy': policy, 'critic': critic}, metrics


def _next_coef(coef: jax.Array, measured: jax.Array, ppo: PPO) -> jax.Array:
  return adaptive_kl_coef(coef, measured, ppo.kl_target, ppo.rollout_batch_size, ppo.kl_horizon)


JOB = Job(
  name='ppo',
  run=run,
  sections=(
    *COMMON,
    'policy',
    'reference',
    'reward_model',
    'critic',
    'rollout',
    'reward_shaping',
    'ppo',
    'compat',
  ),
  inputs=(
    POLICY,
    REFERENCE,
    OPTIONAL_REWARD_MODEL,
    Input('critic.init', keywords=CRITICS),
    data('prompts'),
  ),
  check=evaluate.check_functions,
  outputs=('model', 'critic'),
  batch_keys=PLAN.batch_keys,
  summary=('reward', 'kl'),
  num_networks=4,
  tokens_per_step=lambda s: (
    s.ppo.rollout_batch_size * (s.data.max_prompt_length + s.rollout.max_new_tokens)
  ),
  num_steps=lambda s, rows: s.ppo.max_steps,
  plan=PLAN,
)
