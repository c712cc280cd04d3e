"""Makes the recipe and the response log of PPO and evaluation from the models of a run."""

import dataclasses
from pathlib import Path

from segjax.config.settings import Report, Settings, replace
from segjax.config.validate import resolve_recompute_logprob, resolve_spread
from segjax.data.batches import Prompts
from segjax.data.embedding_rows import check_sampled_ids
from segjax.data.tokenizer import ChatTokenizer
from segjax.report.response_log import ResponseLog
from segjax.run import reward_sources
from segjax.run.models import Models
from segjax.run.weights import names_on_one_base
from segjax.train.recipe import PPORecipe
from segjax.train.segmenter import make_segmenter


def make_recipe(settings: Settings, models: Models, tokenizer: ChatTokenizer) -> PPORecipe:
  """Returns the constants of a PPO run or an evaluation.

  Args:
    settings: of the run.
    models: the networks that are scored, with 'critic' among their paths and configs if there is
      one.
    tokenizer: of the policy.
  """
  configs = models.configs
  texts = {name: model.scorer.network for name, model in models.texts.items()}
  others = {name: network for name, network in configs.items() if name != 'policy'}
  check_sampled_ids(configs['policy'], others)
  segmentation = models.reward_spec.segmentation
  if settings.reward_shaping.redistribute != 'none':
    # The score is read at the response's end, so the stop token has to lie in a segment.
    segmentation = dataclasses.replace(segmentation, include_eos=True)
  return PPORecipe(
    policy=configs['policy'],
    reference=configs['reference'],
    reward=configs.get('reward'),
    reward_lm=configs.get('reward_lm'),
    critic=configs.get('critic'),
    segmenter=make_segmenter(segmentation, tokenizer),
    spread=resolve_spread(settings, segmentation.granularity),
    # The same programs serve a model in another directory.
    shaping=replace(settings.reward_shaping, **{'lm_reward.path': ''}),
    ppo=settings.ppo,
    compat=settings.compat,
    recompute_logprob=resolve_recompute_logprob(settings),
    one_base=names_on_one_base(models.paths, configs),
    samples_per_prompt=settings.rollout.samples_per_prompt,
    rewards=reward_sources.make_sources(settings, models.listed, configs, texts, tokenizer),
    reads_text='reward' in texts,
  )


def make_response_log(
  directory: Path, report: Report, recipe: PPORecipe, tokenizer: ChatTokenizer, prompts: Prompts
) -> ResponseLog:
  """Returns the log that keeps responses to the prompts for report.html."""
  return ResponseLog(
    directory,
    report,
    tokenizer,
    prompts.messages,
    has_score=recipe.has_scores,
    threshold=recipe.segmenter.threshold,
  )
