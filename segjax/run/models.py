"""What PPO and evaluation share: networks, the reward model's meaning, the user's reward."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.config.conflicts import check_redistribution
from segjax.config.settings import Segmentation
from segjax.config.validate import spread
from segjax.data.batches import Prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.hf import reader, tensor_names
from segjax.model import sharding
from segjax.model.llama import LlamaConfig
from segjax.report.response_log import SampleLog
from segjax.run import stage as jobs
from segjax.run.stage import Stage
from segjax.train import reward_spec
from segjax.train.custom_reward import load_function, token_rewards
from segjax.train.experience import Recipe
from segjax.train.reward_spec import SegmentReward
from segjax.train.segmenter import cutter_of
from segjax.types import Normalizer, Rollout

HEADS = {'policy': 'language', 'reference': 'language', 'reward': 'scalar'}


def find(stage: Stage) -> tuple[dict[str, Path], SegmentReward, dict[str, LlamaConfig]]:
  """(directories, what the reward model's scores mean, networks) of config's models, by name.

  Without config.reward_model.path there is no 'reward' among them: rewards come from a function.
  """
  s = stage.settings
  paths = {
    'policy': jobs.checkpoint(s.policy.path, 'policy.path'),
    'reference': jobs.checkpoint(s.reference.path, 'reference.path'),
  }
  if s.reward_model.path:
    paths['reward'] = jobs.checkpoint(s.reward_model.path, 'reward_model.path')
    meaning = reward_spec.resolve(s.reward_model, paths['reward'], paths['policy'])
  else:
    segmentation = reward_spec.overruled(Segmentation(), s.reward_model.segmentation)
    meaning = SegmentReward(segmentation, Normalizer(), 'none')
  granularity = meaning.segmentation.granularity
  check_redistribution(s, granularity, float(meaning.normalizer.w_mean))
  reward_spec.check_tokenizer(paths['reference'], paths['policy'])
  return paths, meaning, networks(stage, paths)


def networks(stage: Stage, paths: dict[str, Path]) -> dict[str, LlamaConfig]:
  """The network in each directory.

  Raises:
    ValueError: the reward model has no scalar head: the scores of one that is drawn mean nothing.
  """
  found = {name: jobs.network(stage, path) for name, path in paths.items()}
  if 'reward' in paths:
    tensors = reader.open_model(paths['reward'], found['reward'], 'scalar')[1]
    if len(tensors) < len(tensor_names.entries(found['reward'], 'scalar')):
      raise ValueError(
        f'{paths["reward"]} has no scalar head, so it is no reward model; train one from it by the '
        'reward job.'
      )
  return found


def load(
  stage: Stage, paths: dict[str, Path], networks: dict[str, LlamaConfig], names: Sequence[str]
) -> dict[str, Any]:
  """The frozen parameters of those models that there are."""
  return {
    name: jobs.load(stage, paths[name], networks[name], HEADS[name])
    for name in names
    if name in paths
  }


def load_waiting(
  stage: Stage, paths: dict[str, Path], networks: dict[str, LlamaConfig], names: Sequence[str]
) -> dict[str, Any]:
  """As `load`, in the memory where config.runtime.frozen_memory lets them wait to be used."""
  wait = sharding.to_host if stage.settings.runtime.frozen_memory == 'host' else lambda tree: tree
  found = {}
  for name in names:  # one after the other, so that the devices never hold them all
    for model, params in load(stage, paths, networks, (name,)).items():
      found[model] = wait(params)
  return found


def recipe_of(
  stage: Stage,
  networks: dict[str, LlamaConfig],
  critic: LlamaConfig,
  meaning: SegmentReward,
  tokenizer: ChatTokenizer,
) -> Recipe:
  """What is fixed over a run of PPO or an evaluation."""
  s, segmentation = stage.settings, meaning.segmentation
  if s.shaping.redistribute == 'red':
    # The score is read at the response's end, so the stop token has to lie in a segment.
    segmentation = dataclasses.replace(segmentation, stop_token='inside')
  return Recipe(
    policy=networks['policy'],
    reference=networks['reference'],
    reward=networks.get('reward'),
    critic=critic,
    cutter=cutter_of(segmentation, tokenizer),
    spread=spread(s, segmentation.granularity),
    shaping=s.shaping,
    ppo=s.ppo,
    compat=s.compat,
    recompute_logprob=s.rollout.recompute_logprob,
  )


def sample_log(
  stage: Stage, recipe: Recipe, tokenizer: ChatTokenizer, prompts: Prompts
) -> SampleLog:
  """Keeps responses to the prompts for the report."""
  return SampleLog(
    stage.directory,
    stage.settings.report,
    tokenizer,
    prompts.messages,
    has_score=recipe.reward is not None,
    threshold=recipe.cutter.threshold,
  )


def rule_of(
  stage: Stage, prompts: Prompts, tokenizer: ChatTokenizer
) -> Callable[[Rollout, np.ndarray], jax.Array | None]:
  """(rollout, its rows of `prompts`) -> rewards per token of config.shaping.reward_fn.

  None where the config names no function. A function needs the text: the rollout is waited for.
  """
  path = stage.settings.shaping.reward_fn
  if not path:
    return lambda rollout, rows: None
  function = load_function(path, 'shaping.reward_fn')

  def rewards(rollout: Rollout, rows: np.ndarray) -> jax.Array:
    ids, mask = processes.fetch((rollout.response_ids, rollout.response_mask))
    asked = [prompts.messages(row)[-1]['content'] for row in rows]
    return stage.place(token_rewards(function, asked, ids, mask, tokenizer.decode))

  return rewards
