"""From prompts to experience: rollout, scores, custom reward, rewards and advantages.

One path for the steps of PPO and for evaluation.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import ScalarLike

from segjax import processes
from segjax.config.reward_lines import REWARD_FN
from segjax.data.batches import Prompts
from segjax.errors import StepAbortedError
from segjax.model import sharding
from segjax.train import carry
from segjax.train.carry import Carried, Stream
from segjax.train.compat import apply_rollout_compat
from segjax.train.custom_reward import CustomReward, Gold, call_functions
from segjax.train.experience import make_experience
from segjax.train.recipe import PPORecipe
from segjax.train.response_functions import Responses
from segjax.train.reward_mixing import ListedRewards
from segjax.train.rollout import CollectedRollout, RolloutSampler, response_tokens, rollout
from segjax.train.rollout_scoring import Minibatches, policy_logprobs, score
from segjax.train.text_reward import TextReward, add_text_scores
from segjax.types import Experience, Normalizer


class Collected(NamedTuple):
  """Experience on the devices, its metrics, and the rollout with its part on the host.

  Attributes:
    rows: the row of each response's prompt.
    carried: what goes on in the next rollout; None where no response is carried.
  """

  experience: Experience
  metrics: dict[str, Any]
  rollout: CollectedRollout
  rows: np.ndarray
  carried: Carried | None = None


@dataclasses.dataclass(frozen=True)
class ListedSources:
  """What config.rewards adds, by name of the line.

  Attributes:
    normalizers: of the reward models' scores.
    functions: the user's.
    weights: of these functions in the sum of all rewards.
  """

  normalizers: dict[str, Normalizer]
  functions: dict[str, CustomReward]
  weights: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Collector:
  """Samples responses to prompts and turns them into experience.

  Attributes:
    prompts: the prompts; `collect` samples responses to some of their rows.
    sampler: how responses are sampled.
    recipe: how they are scored and rewarded.
    normalizer: normaliser of segment scores.
    custom_reward: the user's reward, if there is one.
    listed: of config.rewards; None where it is empty.
    texts: the reward models that read text, by the names of their networks.
    stop: asked while responses are sampled whether this process wants to stop; StepAbortedError
      then abandons the collection in all processes. It has changed nothing.
    on_part: called with the name of a part ('generate', 'score') and its arrays once the part is
      dispatched.
    sample: samples the responses in place of `rollout`.
    minibatches: of a training step, if it packs its responses, by their lengths.
  """

  prompts: Prompts
  sampler: RolloutSampler
  recipe: PPORecipe
  normalizer: Normalizer
  custom_reward: CustomReward | None = None
  listed: ListedSources | None = None
  stop: Callable[[], bool] = lambda: False
  on_part: Callable[[str, Any], None] = lambda name, arrays: None
  sample: Callable[..., CollectedRollout] | None = None
  texts: Mapping[str, TextReward] = dataclasses.field(default_factory=dict)
  minibatches: Callable[[int, np.ndarray], Minibatches] | None = None

  def collect(
    self,
    params: dict[str, Any],
    rows: np.ndarray,
    key: jax.Array,
    kl_coef: ScalarLike,
    index: np.ndarray | None = None,
    step: int | None = None,
  ) -> Collected:
    """Samples `sampler.samples_per_prompt` responses to each prompt and scores them.

    Args:
      params: parameters by name: 'policy', 'reference' and, where present, 'reward', 'reward_lm'
        and 'critic'.
      rows: rows of `prompts`.
      key: random key of this rollout.
      kl_coef: coefficient of the KL penalty.
      index: number of each prompt, for its random numbers; 0, 1, ... by default.
      step: number of the training step, for the user's reward.
    """
    # On the host, which assigns prompts to the slots of generation.
    batch = self.prompts.gather(rows, np.asarray)
    sample = self.sample or rollout
    collected = sample(params['policy'], batch, key, self._stopping_sampler(), index)
    repeated = np.repeat(rows, self.sampler.samples_per_prompt)
    return self._score(params, collected, repeated, kl_coef, step)

  def collect_carrying(
    self,
    params: dict[str, Any],
    carried: Carried,
    step: int,
    stream: Stream,
    kl_coef: ScalarLike,
  ) -> Collected:
    """Goes on with the carried responses, starts others, and scores those that are finished.

    Args:
      params: see `collect`.
      carried: what the step before has left.
      step: number of this step.
      stream: the prompts in their order, and the random numbers.
      kl_coef: coefficient of the KL penalty.
    """
    policy, recompute = params['policy'], None
    if self.recipe.recompute_logprob:
      recompute = functools.partial(policy_logprobs, policy, recipe=self.recipe)
    sampler = self._stopping_sampler()
    sampled = carry.rollout(policy, carried, step, stream, sampler, recompute)
    collected = self._score(params, sampled.rollout, sampled.rows, kl_coef, step)
    metrics = collected.metrics | sampled.metrics
    return collected._replace(metrics=metrics, carried=sampled.carried)

  def _stopping_sampler(self) -> RolloutSampler:
    # A machine that is about to be preempted does not wait for the longest response.
    return dataclasses.replace(self.sampler, stop=self.stop)

  def _score(
    self,
    params: dict[str, Any],
    collected: CollectedRollout,
    rows: np.ndarray,
    kl_coef: ScalarLike,
    step: int | None,
  ) -> Collected:
    """Scores responses to the prompts of `rows`, one row for each."""
    self.on_part('generate', collected.arrays)
    collected = apply_rollout_compat(
      collected, self.sampler.stop_ids[0], self.recipe.compat, self.sampler.mesh
    )
    minibatches = None
    if self.minibatches is not None and step is not None:
      minibatches = self.minibatches(step, collected.length)
    outputs = score(
      params, collected.arrays, collected.length, recipe=self.recipe, minibatches=minibatches
    )
    if self.texts:
      prompts = [self.prompts.messages(row) for row in rows]
      outputs = add_text_scores(self.texts, params, outputs, collected, prompts, self.recipe)
    # Dispatched before the user's function runs on the host, so that the two overlap.
    rewards, calls = self._function_rewards(collected, rows, step)
    custom_reward, listed = rewards.pop(REWARD_FN, None), None
    if self.listed is not None:
      listed = ListedRewards(self.listed.normalizers, rewards)
    experience, metrics = make_experience(
      collected.arrays, outputs, self.normalizer, kl_coef, custom_reward, listed, recipe=self.recipe
    )
    # The user's function may have taken long. Several processes would have to agree first.
    if processes.process_count() == 1 and self.stop():
      raise StepAbortedError
    self.on_part('score', metrics)
    return Collected(experience, metrics | calls, collected, rows)

  def prompt_texts(self, rows: Sequence[int] | np.ndarray) -> list[str]:
    """Returns the last message of the prompt in each of the rows."""
    return [self.prompts.messages(row)[-1]['content'] for row in rows]

  def responses(
    self, rows: Sequence[int] | np.ndarray, ids: Sequence[Any], step: int | None = None
  ) -> Responses:
    """Returns responses to the prompts of `rows` for functions of the user's.

    Args:
      rows: the row of each response's prompt.
      ids: tokens of each response, without padding.
      step: number of the training step.
    """
    return Responses(
      prompts=self.prompt_texts(rows),
      ids=ids,
      row=lambda index: self.prompts.columns(rows[index]),
      messages=lambda index: self.prompts.messages(rows[index]),
      step=step,
    )

  def _function_rewards(
    self, collected: CollectedRollout, rows: np.ndarray, step: int | None
  ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Returns the rewards of each token by each of the user's functions, and metrics of its calls.

    Those of config.rewards are multiplied by their weights.
    """
    functions = {} if self.custom_reward is None else {REWARD_FN: self.custom_reward}
    weights: dict[str, float] = {}
    if self.listed is not None:
      functions |= self.listed.functions
      weights = self.listed.weights
    if not functions:
      return {}, {}
    responses = self.responses(rows, response_tokens(collected), step)
    values, failed = call_functions(functions, responses, collected.response_mask, self.sampler.log)
    rewards = {
      name: sharding.place_batch(x * np.float32(weights.get(name, 1.0)), self.sampler.mesh)
      for name, x in values.items()
    }
    is_counted = self.recipe.shaping.reward_fn_on_error == 'zero'
    return rewards, {'reward/failed_calls': failed} if is_counted else {}


def held_out_metrics(
  collector: Collector,
  params: dict[str, Any],
  key: jax.Array,
  kl_coef: ScalarLike,
  gold: Gold | None,
  step: int,
) -> tuple[dict[str, Any], np.ndarray]:
  """Returns eval/reward, eval/kl, eval/length_mean and, with `gold`, eval/gold; gold by prompt.

  The latter is the mean over a prompt's responses, [P]; [0] without `gold`. The metrics are means
  over the responses of one rollout, whose prompts are repeated to fill it. With the same key its
  prompts and random numbers are the same at every step, so that steps can be compared; its size is
  that of training, so that no other program is compiled.

  Args:
    collector: collector of the held-out prompts.
    params: see `Collector.collect`.
    key: the same at every step.
    kl_coef: coefficient of the KL penalty.
    gold: true rewards of responses; None without any.
    step: number of the training step, for the user's functions.
  """
  count = collector.recipe.ppo.rollout_batch_size // collector.sampler.samples_per_prompt
  # Always the first prompts in order: a random choice would add noise to the curve.
  rows = np.arange(count) % len(collector.prompts)
  collected = collector.collect(params, rows, key, kl_coef, step=step)
  metrics = {
    'eval/reward': collected.metrics['objective/reward'],
    'eval/kl': collected.metrics['objective/kl'],
    'eval/length_mean': collected.metrics['response/length_mean'],
  }
  if gold is None:
    return metrics, np.zeros(0)
  ids = response_tokens(collected.rollout)
  values = np.array(gold(collector.responses(collected.rows, ids, step)), float)
  metrics['eval/gold'] = float(np.mean(values))
  return metrics, np.bincount(collected.rows, values) / np.bincount(collected.rows)
