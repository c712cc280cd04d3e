"""Rewards an answer of a conversation as PPO would, with the part of each source of rewards."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.reward_lines import REWARD_FN
from segjax.config.settings import Settings, replace
from segjax.data.ragged import round_up_width
from segjax.data.sources import Message
from segjax.errors import UserError
from segjax.evaluation.annotate import Annotator
from segjax.evaluation.segment_records import AnnotatedResponse
from segjax.model import sharding
from segjax.report.console import log
from segjax.report.response_log import segments_from_experience
from segjax.run import models, recipes
from segjax.run.reward_sources import load_listed
from segjax.run.weights import Weights
from segjax.train.collect import ListedSources
from segjax.train.custom_reward import CustomReward, call_functions, load_custom_reward
from segjax.train.experience import make_experience
from segjax.train.recipe import PPORecipe
from segjax.train.response_functions import Responses
from segjax.train.reward_mixing import ListedRewards
from segjax.train.rollout import CollectedRollout
from segjax.train.rollout_scoring import score
from segjax.train.text_reward import TextReward, add_text_scores
from segjax.types import Normalizer, Rollout


@dataclasses.dataclass(frozen=True)
class AnswerRewards:
  """The sources of rewards, loaded beside the models of an annotator.

  Attributes:
    annotator: tokenizer, and the policy, which is the reference of its own answers.
    recipe: how answers are segmented and rewarded.
    params: of the networks by name.
    normalizer: of the first reward model's scores.
    custom_reward: reward_shaping.reward_fn, if there is one.
    listed: of config.rewards.
    texts: the reward models that read text, by the names of their networks.
  """

  annotator: Annotator
  recipe: PPORecipe
  params: dict[str, Any]
  normalizer: Normalizer
  custom_reward: CustomReward | None
  listed: ListedSources
  texts: dict[str, TextReward]

  def annotate(self, messages: list[Message], answer: str) -> AnnotatedResponse:
    """Returns the segments of an answer with their rewards and the parts of these, without KL.

    Args:
      messages: the conversation before the answer.
      answer: its text.

    Raises:
      UserError: a function of the user's fails.
    """
    tokenizer, mesh = self.annotator.tokenizer, self.annotator.mesh
    prompt = tokenizer.prompt_ids(messages)
    ids = tokenizer.response_ids(messages, answer)
    arrays = _rollout_arrays(prompt, ids, bool(ids) and ids[-1] in tokenizer.stop_ids, mesh.size)
    mask = arrays['response_mask'][:1]
    functions = {} if self.custom_reward is None else {REWARD_FN: self.custom_reward}
    responses = Responses([messages[-1]['content']], [ids], messages=lambda index: messages)
    by_function, _ = call_functions(functions | self.listed.functions, responses, mask, log)
    rewards = {
      name: np.repeat(np.float32(self.listed.weights.get(name, 1.0)) * x, mesh.size, axis=0)
      for name, x in by_function.items()
    }
    arrays, rewards = sharding.place_batch((arrays, rewards), mesh)
    rollout = Rollout(**arrays)
    length = np.full(mesh.size, len(prompt) + len(ids))
    outputs = score(self.params, rollout, length, recipe=self.recipe)
    if self.texts:
      host = processes.to_host((rollout.response_ids, rollout.response_mask, rollout.finished))
      collected = CollectedRollout(rollout, *host, length)
      prompts = [messages] * len(length)
      outputs = add_text_scores(self.texts, self.params, outputs, collected, prompts, self.recipe)
    # The policy that has drawn the answer is the reference.
    drawn = jnp.where(rollout.response_mask, outputs.ref_logprob, 0.0)
    custom_reward = rewards.pop(REWARD_FN, None)
    experience, _ = make_experience(
      rollout,
      outputs._replace(old_logprob=drawn),
      self.normalizer,
      jnp.float32(0),
      custom_reward,
      ListedRewards(self.listed.normalizers, rewards),
      recipe=self.recipe,
    )
    has_score = self.recipe.has_scores
    segments, _ = segments_from_experience(
      processes.to_host(experience), 0, tokenizer, has_score=has_score
    )
    return AnnotatedResponse(messages, answer, segments)


def load_answer_rewards(
  annotator: Annotator, settings: Settings, weights: Weights
) -> AnswerRewards | None:
  """Loads what config.rewards names; None where it is empty.

  Args:
    annotator: the policy and, if there is one, the first reward model.
    settings: of the run.
    weights: those that the annotator was loaded with.

  Raises:
    UserError: config.rewards names reward models, and config.reward_model none.
  """
  if not settings.rewards:
    return None
  s = replace(settings, **{'reference.path': settings.policy.path})
  resolved = models.resolve_models(s, annotator.mesh, log)
  if resolved.listed and 'reward' not in resolved.frozen:
    raise UserError(
      'config.reward_model.path is empty, and config.rewards names further reward models; set it '
      'to the first.'
    )
  tokenizer = annotator.tokenizer
  recipe = recipes.make_recipe(s, resolved, tokenizer)
  # Rewards alone are read: no critic is run, and one answer is compared with no other.
  ppo = dataclasses.replace(s.ppo, estimator='reinforce_plus_plus', scoring_batch_size=0)
  recipe = dataclasses.replace(recipe, ppo=ppo, samples_per_prompt=1, recompute_logprob=False)
  others = [name for name in resolved.frozen if name not in ('policy', *annotator.params)]
  return AnswerRewards(
    annotator=annotator,
    recipe=recipe,
    params=annotator.params | models.load_models(resolved, others, weights),
    normalizer=jax.tree.map(jnp.float32, resolved.reward_spec.normalizer),
    custom_reward=load_custom_reward(s.reward_shaping, tokenizer.decode),
    listed=load_listed(s, resolved.listed, tokenizer.decode),
    texts=resolved.text_rewards(tokenizer),
  )


def _rollout_arrays(
  prompt: list[int], ids: list[int], finished: bool, rows: int
) -> dict[str, np.ndarray]:
  """Returns the arrays of a rollout whose rows are all the same answer, on the host."""

  def padded(tokens):
    width = round_up_width(len(tokens))
    return np.tile(np.array(tokens + [0] * (width - len(tokens)), np.int32), (rows, 1))

  response = padded(ids)
  return {
    'prompt_ids': padded(prompt),
    'prompt_length': np.full(rows, len(prompt), np.int32),
    'response_ids': response,
    'response_mask': np.tile(np.arange(response.shape[1]) < len(ids), (rows, 1)),
    'finished': np.full(rows, finished),
    'old_logprob': np.zeros(response.shape, np.float32),
  }
