"""Prompts in, experience out: what a step of PPO learns from, and what it is looked at by."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.data.batches import Prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.report.timing import StepTimer
from segjax.run import models, preemption
from segjax.run.stage import Stage
from segjax.train.compat import apply_rollout_compat
from segjax.train.experience import PPORecipe, make_experience, score
from segjax.train.rollout import rollout
from segjax.types import Experience, Normalizer, Rollout


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Samples responses to rows of `prompts` and makes them experience.

  Attributes:
    frozen: the parameters that are not trained, by name.
    normalizer: of the segment scores.
  """

  stage: Stage
  recipe: PPORecipe
  tokenizer: ChatTokenizer
  prompts: Prompts
  frozen: dict[str, Any]
  normalizer: Normalizer

  def sample(
    self, trained: dict[str, Any], rows: np.ndarray, key: jax.Array, coef: Any, timing: StepTimer
  ) -> tuple[Experience, dict[str, jax.Array]]:
    """Of the prompts at `rows`, config.rollout.samples_per_prompt each; and their metrics.

    Args:
      trained: the parameters of policy and critic.
      coef: of the KL.
      timing: is told when generation and scoring end.

    Raises:
      AbandonedStepError: the run was asked to stop; nothing has changed here.
    """
    s, recipe = self.stage.settings, self.recipe
    batch = self.prompts.gather(rows, np.asarray)
    found = rollout(
      trained['policy'],
      batch.prompt_ids,
      batch.prompt_length,
      key,
      config=recipe.policy,
      settings=s.rollout,
      stop_ids=self.tokenizer.stop_ids,
      mesh=self.stage.mesh,
      samples=s.rollout.samples_per_prompt,
      say=self.stage.log,
      watch=lambda found: (
        preemption.raise_if_stop_requested()
      ),  # a machine that goes away does not wait
    )
    timing.end('generate', found)
    preemption.raise_if_stop_requested()
    found = apply_rollout_compat(found, self.tokenizer.stop_ids[0], s.compat)
    scored = score(self.frozen | trained, found, recipe=recipe)
    ruled = self._rule(found, np.repeat(rows, s.rollout.samples_per_prompt))
    experience, metrics = make_experience(
      found, scored, self.normalizer, coef, ruled, recipe=recipe
    )
    timing.end('score', experience)
    preemption.raise_if_stop_requested()
    return experience, metrics

  @functools.cached_property
  def _rule(self) -> Callable[[Rollout, np.ndarray], jax.Array | None]:
    """The user's reward; loaded once, not at every step."""
    return models.make_reward_fn(
      self.stage.settings.reward_shaping.reward_fn,
      self.prompts,
      self.tokenizer,
      self.stage.to_device,
    )

  def texts(self, experience: Experience) -> list[str]:
    """The responses as text; every process takes part."""
    found = experience.rollout
    ids, mask = processes.to_host((found.response_ids, found.response_mask))
    return [self.tokenizer.decode(row[real]) for row, real in zip(ids, mask, strict=True)]


def held_out_metrics(
  sampler: Sampler,
  trained: dict[str, Any],
  coef: Any,
  gold: Callable[[str, str], float] | None,
) -> dict[str, Any]:
  """eval/reward, eval/kl, eval/length_mean and, where it is known, eval/gold; means over responses.

  One rollout on the held-out prompts, each as often as it takes to fill it: always the same ones
  with the same random numbers, so that steps can be compared, and nothing is compiled anew.
  """
  s = sampler.stage.settings
  asked = s.ppo.rollout_batch_size // s.rollout.samples_per_prompt
  rows = np.arange(asked) % len(sampler.prompts)
  key = sampler.stage.key('held out')
  experience, found = sampler.sample(trained, rows, key, coef, StepTimer())
  metrics = {
    'eval/reward': found['objective/reward'],
    'eval/kl': found['objective/kl'],
    'eval/length_mean': found['response/length_mean'],
  }
  if gold is not None:
    prompts = [sampler.prompts.messages(row)[-1]['content'] for row in rows]
    asked_texts = [prompt for prompt in prompts for _ in range(s.rollout.samples_per_prompt)]
    pairs = zip(asked_texts, sampler.texts(experience), strict=True)
    metrics['eval/gold'] = float(np.mean([gold(prompt, text) for prompt, text in pairs]))
  return metrics
