"""The steps of PPO: collect a rollout, update policy and critic on it, evaluate."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from segjax.config.settings import PPO, Settings
from segjax.data.batches import endless_batch_indices
from segjax.errors import StepAbortedError, UserError
from segjax.model.llama import LlamaConfig
from segjax.report.held_out_log import HeldOutLog
from segjax.report.response_log import ResponseLog
from segjax.report.timing import StepTimer
from segjax.rl.kl import adaptive_kl_coef
from segjax.run import training_loop
from segjax.run.stage import Stage
from segjax.train import throughput
from segjax.train.carry import Stream
from segjax.train.collect import Collected, Collector, held_out_metrics
from segjax.train.custom_reward import Gold
from segjax.train.metrics import Metrics, combine_updates
from segjax.train.ppo_step import Minibatch, ppo_step
from segjax.train.rollout_metrics import within_bounds
from segjax.types import PackingPlan


def updates_per_step(ppo: PPO) -> int:
  """Returns the number of minibatches of a rollout, over all epochs."""
  return ppo.num_ppo_epochs * (ppo.rollout_batch_size // ppo.minibatch_size)


def check_first_rollout(kl: float, ppo: PPO) -> None:
  """Raises UserError if skip_if_kl_above skips the first rollout.

  The policy stays as it was, and with it the KL of the rollouts that follow.
  """
  if ppo.skip_if_kl_above and abs(kl) > ppo.skip_if_kl_above:
    raise UserError(
      f'config.ppo.skip_if_kl_above={ppo.skip_if_kl_above:g} is less than the absolute '
      f'KL of the first rollout, {kl:.3g} nats, so that the policy would never be updated; make it '
      'larger.'
    )


def plan_minibatches(
  step: int,
  length: Int[np.ndarray, 'B'],
  epoch: int = 0,
  *,
  s: Settings,
  mesh: Mesh,
  network: LlamaConfig,
) -> list[tuple[np.ndarray, PackingPlan | None]]:
  """Returns the minibatches of an epoch: rows of the rollout, and how they are packed, if they are.

  Args:
    step: of PPO.
    length: tokens of each prompt with its response.
    epoch: over the rollout.
    s: the settings.
    mesh: the devices.
    network: of the policy.
  """
  # The order depends on seed, step and epoch alone: a resumed run repeats it.
  order = np.random.default_rng([s.seed, step, epoch]).permutation(len(length))
  plan = functools.partial(training_loop.plan_packing_for, s.ppo, mesh=mesh, network=network)
  return [(rows, plan(length[rows])[0]) for rows in order.reshape(-1, s.ppo.minibatch_size)]


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The steps of PPO.

  Attributes:
    frozen: parameters of reference and reward model.
    bases: of 'policy' and, if there is one, 'critic': what adapters are added to; {} where all is
      trained.
    collector: samples and scores training prompts.
    eval_collector: samples and scores held-out prompts.
    gold: true rewards of responses, for eval/gold.
    responses: keeps responses for report.html.
    timer: of the parts of a step.
    stream: of the prompts, where responses are carried from one step to the next.
  """

  stage: Stage
  frozen: dict[str, Any]
  bases: dict[str, Any]
  collector: Collector
  eval_collector: Collector
  gold: Gold | None
  responses: ResponseLog
  timer: StepTimer
  stream: Stream | None = None

  def step(
    self, states: training_loop.TrainStates, step: int
  ) -> tuple[training_loop.TrainStates, dict[str, Any]]:
    """Samples a rollout and updates policy and critic on it.

    Raises:
      StepAbortedError: the run must stop; the states are those from before the step.
    """
    s, recipe = self.stage.settings, self.collector.recipe
    self.timer.begin()
    kl_coef = states['kl']['coef']
    if step == 0 and self.gold is not None:
      self._evaluate(states, HeldOutLog.BEFORE)  # where the curve of gold over KL begins
    collected = self._collect(states, step)
    metrics = collected.metrics
    enabled = within_bounds(metrics, ppo=s.ppo)
    if step == 0:
      check_first_rollout(float(metrics['objective/kl']), s.ppo)
    states, updates = self._update(states, collected, step, enabled)
    if s.ppo.kl_target:
      measured = metrics['objective/kl']
      new_coef = adaptive_kl_coef(
        kl_coef, measured, s.ppo.kl_target, s.ppo.rollout_batch_size, s.ppo.kl_horizon
      )
      states['kl'] = {'coef': jnp.where(enabled, new_coef, kl_coef)}
    if collected.carried is not None:
      states['carried'] = collected.carried
    self.timer.end('update', updates)  # not the states, which the next step donates
    metrics |= {'objective/kl_coef': kl_coef} | updates
    metrics |= throughput.ppo_step(
      recipe, collected.rollout.length, policy_is_trained=step >= s.critic.warmup_rollouts
    )
    if s.ppo.eval_every and (step + 1) % s.ppo.eval_every == 0:
      metrics |= self._evaluate(states, step)
    self.responses.take(step, s.ppo.max_steps, collected.experience, collected.rows)
    self.timer.end('between_steps')
    return states, metrics | self.timer.seconds

  def _collect(self, states: training_loop.TrainStates, step: int) -> Collected:
    """Samples and scores the responses of a step."""
    s, params, kl_coef = self.stage.settings, self._params(states), states['kl']['coef']
    if self.stream is not None:
      return self.collector.collect_carrying(params, states['carried'], step, self.stream, kl_coef)
    prompts = s.ppo.rollout_batch_size // s.rollout.samples_per_prompt
    rows = endless_batch_indices(len(self.collector.prompts), prompts, s.seed, step)
    key = jax.random.fold_in(self.stage.key('rollout'), step)
    return self.collector.collect(params, rows, key, kl_coef, step=step)

  def _params(self, states: training_loop.TrainStates) -> dict[str, Any]:
    return self.frozen | {name: base | states[name].params for name, base in self.bases.items()}

  def _update(
    self, states: training_loop.TrainStates, collected: Collected, step: int, enabled: jax.Array
  ) -> tuple[training_loop.TrainStates, dict[str, Any]]:
    """Runs config.ppo.num_ppo_epochs passes over the rollout in shuffled minibatches.

    Metrics are combined over the updates: means, the largest `policy/ratio_max_deviation`, the sum
    of `skipped_updates`.

    Args:
      enabled: False skips the updates; the states stay as they are.
    """
    s, recipe = self.stage.settings, self.collector.recipe
    per_step = updates_per_step(s.ppo)
    is_warmup = step < s.critic.warmup_rollouts
    networks, updates = {name: states[name] for name in self.bases}, []
    # The parts of the rewards are shown alone: the programs are those of a run without them.
    experience = dataclasses.replace(collected.experience, parts=None)
    for epoch in range(s.ppo.num_ppo_epochs):
      minibatches = plan_minibatches(
        step, collected.rollout.length, epoch, s=s, mesh=self.stage.mesh, network=recipe.policy
      )
      for rows, packing in minibatches:
        networks, metrics = ppo_step(
          networks,
          self.bases,
          Minibatch(experience, rows, packing, enabled),
          states['kl']['coef'],
          recipe=recipe,
          total_steps=s.ppo.max_steps * per_step,
          policy_from=None if is_warmup else s.critic.warmup_rollouts * per_step,
        )
        updates.append(metrics.merge(Metrics(mean=training_loop.packing_metrics(packing))))
    metrics = combine_updates(updates)
    if 'policy/ratio_max_deviation' in updates[0].max:
      first = updates[0].max
      # Where responses are carried, of the tokens that the present policy drew.
      metrics['policy/initial_ratio_deviation'] = first.get(
        'policy/own_ratio_max_deviation', first['policy/ratio_max_deviation']
      )
      metrics.pop('policy/own_ratio_max_deviation', None)
    return states | networks, metrics

  @functools.cached_property
  def _held_out(self) -> HeldOutLog:
    """Keeps the gold reward of each held-out prompt."""
    return HeldOutLog(self.stage.directory)

  def _evaluate(self, states: training_loop.TrainStates, step: int) -> dict[str, Any]:
    metrics = {}
    # If a stop is requested during the evaluation, the finished step has no eval metrics.
    with contextlib.suppress(StepAbortedError):
      metrics, gold = held_out_metrics(
        self.eval_collector,
        self._params(states),
        self.stage.key('held out'),
        states['kl']['coef'],
        self.gold,
        step,
      )
      if self.gold is not None:
        self._held_out.write(step, float(metrics['eval/kl']), gold)
    self.timer.end('evaluate', metrics)
    return metrics
