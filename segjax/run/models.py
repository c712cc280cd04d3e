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
from segjax.config.validate import resolve_spread
from segjax.data.batches import Prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.hf import reader, tensor_names
from segjax.model import sharding
from segjax.model.llama import LlamaConfig
from segjax.report.response_log import ResponseLog
from segjax.run import stage as jobs
from segjax.run.stage import Stage
from segjax.train import reward_spec
from segjax.train.custom_reward import load_function, token_rewards
from segjax.train.experience import PPORecipe
from segjax.train.reward_spec import RewardSpec
from segjax.train.segmenter import make_segmenter
from segjax.types import Normalizer, Rollout

HEADS = {'policy': 'language', 'reference': 'language', 'reward': 'scalar'}


def resolve_models(stage: Stage) -> tuple[dict[str, Path], RewardSpec, dict[str, LlamaConfig]]:
  """(directories, what the reward model's scores mean, networks) of config's models, by name.

  Without config.reward_model.path there is no 'reward' among them: rewards come from a function.
  """
  s = stage.settings
  paths = {
    'policy': jobs.resolve_checkpoint(s.policy.path, 'policy.path'),
    'reference': jobs.resolve_checkpoint(s.reference.path, 'reference.path'),
  }
  if s.reward_model.path:
    paths['reward'] = jobs.resolve_checkpoint(s.reward_model.path, 'reward_model.path')
    meaning = reward_spec.resolve_spec(s.reward_model, paths['reward'], paths['policy'])
  else:
    segmentation = reward_spec.override(Segmentation(), s.reward_model.segmentation)
    meaning = RewardSpec(segmentation, Normalizer(), 'none')
  granularity = meaning.segmentation.granularity
  check_redistribution(s, granularity, float(meaning.normalizer.w_mean))
  reward_spec.check_tokenizer(paths['reference'], paths['policy'])
  return paths, meaning, load_network_configs(stage, paths)


def load_network_configs(stage: Stage, paths: dict[str, Path]) -> dict[str, LlamaConfig]:
  """The network in each directory.

  Raises:
    ValueError: the reward model has no scalar head: the scores of one that is drawn mean nothing.
  """
  found = {name: jobs.load_network_config(stage, path) for name, path in paths.items()}
  if 'reward' in paths:
    tensors = reader.open_model(paths['reward'], found['reward'], 'scalar')[1]
    if len(tensors) < len(tensor_names.tensor_mappings(found['reward'], 'scalar')):
      raise UserError(
        f'{paths["reward"]} has no scalar head, so it is no reward model; train one from it by the '
        'reward job.'
      )
  return found


def load_models(
  stage: Stage, paths: dict[str, Path], networks: dict[str, LlamaConfig], names: Sequence[str]
) -> dict[str, Any]:
  """The frozen parameters of those models that there are."""
  return {
    name: jobs.load_params(stage, paths[name], networks[name], HEADS[name])
    for name in names
    if name in paths
  }


def load_frozen(
  stage: Stage, paths: dict[str, Path], networks: dict[str, LlamaConfig], names: Sequence[str]
) -> dict[str, Any]:
  """As `load`, in the memory where config.runtime.frozen_params_memory lets them wait to be
  used.
  """
  wait = (
    sharding.to_host if stage.settings.runtime.frozen_params_memory == 'host' else lambda tree: tree
  )
  found = {}
  for name in names:  # one after the other, so that the devices never hold them all
    for model, params in load_models(stage, paths, networks, (name,)).items():
      found[model] = wait(params)
  return found


def make_recipe(
  stage: Stage,
  networks: dict[str, LlamaConfig],
  critic: LlamaConfig,
  meaning: RewardSpec,
  tokenizer: ChatTokenizer,
) -> PPORecipe:
  """What is fixed over a run of PPO or an evaluation."""
  s, segmentation = stage.settings, meaning.segmentation
  if s.reward_shaping.redistribute == 'red':
    # The score is read at the response's end, so the stop token has to lie in a segment.
    segmentation = dataclasses.replace(segmentation, stop_token='inside')
  return PPORecipe(
    policy=networks['policy'],
    reference=networks['reference'],
    reward=networks.get('reward'),
    critic=critic,
    cutter=make_segmenter(segmentation, tokenizer),
    spread=resolve_spread(s, segmentation.granularity),
    shaping=s.reward_shaping,
    ppo=s.ppo,
    compat=s.compat,
    recompute_logprob=s.rollout.recompute_logprob,
  )


def make_response_log(
  stage: Stage, recipe: PPORecipe, tokenizer: ChatTokenizer, prompts: Prompts
) -> ResponseLog:
  """Keeps responses to the prompts for the report."""
  return ResponseLog(
    stage.directory,
    stage.settings.report,
    tokenizer,
    prompts.messages,
    has_score=recipe.reward is not None,
    threshold=recipe.cutter.threshold,
  )


def make_reward_fn(
  stage: Stage, prompts: Prompts, tokenizer: ChatTokenizer
) -> Callable[[Rollout, np.ndarray], jax.Array | None]:
  """(rollout, its rows of `prompts`) -> rewards per token of config.reward_shaping.reward_fn.

  None where the config names no function. A function needs the text: the rollout is waited for.
  """
  path = stage.settings.reward_shaping.reward_fn
  if not path:
    return lambda rollout, rows: None
  function = load_function(path, 'reward_shaping.reward_fn')

  def rewards(rollout: Rollout, rows: np.ndarray) -> jax.Array:
    ids, mask = processes.to_host((rollout.response_ids, rollout.response_mask))
    asked = [prompts.messages(row)[-1]['content'] for row in rows]
    return stage.place(token_rewards(function, asked, ids, mask, tokenizer.decode))

  return rewards
