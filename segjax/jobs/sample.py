"""Samples several responses to each prompt, with segment rewards, and keeps the best as rows.

Rejection sampling: the rows that are kept are those of a further sft job (Llama 2, Touvron et al.
2023, https://arxiv.org/abs/2307.09288, section 3.2.3).
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.settings import Settings
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.evaluation.intervals import clustered_interval, format_interval
from segjax.evaluation.segment_records import Segment
from segjax.jobs import evaluate
from segjax.jobs.job import (
  COMMON,
  LISTED_REWARDS,
  LM_REWARD,
  OPTIONAL_REWARD_MODEL,
  REFERENCE,
  REWARDED,
  TRAINED_POLICY,
  Job,
  data_input,
  more_rewarding_models,
  needs_reward_model,
)
from segjax.report.console import table
from segjax.report.response_log import segments_from_experience
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.run.weights import Weights
from segjax.storage import writing
from segjax.train.best_of_n import Search, best_rollout, check_differ
from segjax.train.collect import Collector
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.rollout import RolloutSampler, response_tokens
from segjax.train.segmenter import sequence_scores
from segjax.train.text_reward import TextSegments
from segjax.types import Experience

RESPONSES_FILE, BEST_FILE = 'responses.jsonl', 'best.jsonl'


class Batch(NamedTuple):
  """The responses to some prompts, those to one prompt next to each other; host arrays [B].

  Attributes:
    prompt: the row of each response's prompt.
    value: what they are ranked by.
    is_kept: whether a response is among the best of its prompt.
  """

  experience: Experience
  prompt: np.ndarray
  value: np.ndarray
  is_kept: np.ndarray


def load(stage: Stage) -> evaluate.Loaded:
  """Loads all but weights."""
  check_ranking(stage.settings)
  return evaluate.load_collector(stage)


def check_ranking(settings: Settings) -> None:
  """Checks that responses can be ranked, and those to a prompt be sampled together.

  Raises:
    UserError: names the keys and the fix.
  """
  s = settings.sample
  if s.rank_by == 'score' and not needs_reward_model(settings):
    raise UserError(
      'config.sample.rank_by=score needs a reward model, and reward_shaping.reward_model_weight is '
      '0; use rank_by=reward.'
    )
  if s.search == 'segment' and (s.rank_by != 'score' or s.keep > 1):
    raise UserError(
      'config.sample.search=segment finds one response to a prompt by the score of its segments; '
      'use sample.rank_by=score and sample.keep=1.'
    )
  if s.samples_per_prompt > 1:
    check_differ(settings.rollout)
  if s.keep > s.samples_per_prompt:
    raise UserError(
      f'config.sample.keep={s.keep} is above sample.samples_per_prompt={s.samples_per_prompt}; '
      'lower it.'
    )
  if s.batch_size % s.samples_per_prompt:
    raise UserError(
      f'config.sample.batch_size={s.batch_size} is not a multiple of sample.samples_per_prompt='
      f'{s.samples_per_prompt}; use one.'
    )


def run(stage: Stage, loaded: evaluate.Loaded) -> dict[str, Any]:
  """Samples `sample.samples_per_prompt` responses of the policy to each prompt of config.data.

  With sample.search=segment there is one to each prompt, of the best segments (`best_of_n`).

  Writes a line for each of them to `responses.jsonl`: messages, score, reward, segments, whether it
  is kept. The `sample.keep` best to each prompt are rows of `best.jsonl` too, which sft reads. They
  are ranked by score, that of the reward model for the whole response as it was trained, or by
  reward, the sum of the dense rewards of PPO without KL, functions of the user's included. A
  response without a stop token is never kept.

  Returns:
    Means of what they are ranked by, over all responses and over those that are kept.
  """
  s = stage.settings
  values, prompts, kept = [], [], []
  files = [stage.directory / name for name in (RESPONSES_FILE, BEST_FILE)]
  if processes.is_first():
    for path in files:
      path.unlink(missing_ok=True)
  for batch in _batches(stage, loaded):
    values.append(batch.value)
    prompts.append(batch.prompt)
    kept.append(batch.is_kept)
    if processes.is_first():
      records = [_record(batch, index, s, loaded) for index in range(len(batch.prompt))]
      best = [record for record in records if record['kept']]
      for path, lines in zip(files, (records, best), strict=True):
        with writing(path), path.open('a', encoding='utf-8') as out:
          out.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in lines)
  value, prompt, is_kept = map(np.concatenate, (values, prompts, kept))
  if not is_kept.any():
    stage.log('warning: no response ends by a stop token, so none is kept; see max_new_tokens')
  return {
    'prompts': len(np.unique(prompt)),
    'responses': len(value),
    'kept': int(is_kept.sum()),
    'all': _mean(value, prompt),
    'best': _mean(value[is_kept], prompt[is_kept]),
    'rank_by': s.sample.rank_by,
  }


def _mean(value: np.ndarray, prompt: np.ndarray) -> dict[str, Any] | None:
  """Returns the mean over responses with its interval; None of no response."""
  return (
    clustered_interval(value, np.unique(prompt, return_inverse=True)[1]) if len(value) else None
  )


def _batches(stage: Stage, loaded: evaluate.Loaded) -> Iterator[Batch]:
  """Samples and scores the responses, batch by batch."""
  s, collector = stage.settings, loaded.collector
  count, size = s.sample.samples_per_prompt, s.sample.batch_size // s.sample.samples_per_prompt
  weights = Weights(s.runtime, stage.mesh)
  params = models.load_models(loaded.models, tuple(loaded.models.frozen), weights)
  sampler = dataclasses.replace(collector.sampler, samples_per_prompt=count)
  if s.sample.search == 'segment':
    count = 1
    sample = best_rollout(params, _make_search(s, collector, sampler))
    collector = dataclasses.replace(collector, sample=sample)
  else:
    collector = dataclasses.replace(collector, sampler=sampler)
  segmentation = collector.recipe.segmenter.segmentation
  sequence_score = jax.jit(functools.partial(sequence_scores, segmentation=segmentation))
  for rows, real in inputs.tracked_batches(stage.name, len(collector.prompts), size):
    # Numbered by prompt: a prompt's responses do not depend on the batch that it is in.
    collected = collector.collect(params, rows, stage.key('samples'), jnp.float32(0), rows)
    experience = collected.experience
    scores = sequence_score(experience.score, experience.segments)
    arrays = processes.to_host((experience, scores, jnp.sum(experience.reward, axis=1)))
    experience, score, reward = jax.tree.map(lambda x, real=real: x[: real * count], arrays)
    value = score if s.sample.rank_by == 'score' else reward
    is_kept = best_of(
      value.reshape(real, -1), experience.rollout.finished.reshape(real, -1), s.sample.keep
    )
    yield Batch(experience, np.repeat(rows[:real], count), value, is_kept.ravel())


def _make_search(s: Settings, collector: Collector, sampler: RolloutSampler) -> Search:
  """Returns how the best response of each prompt is found segment by segment."""
  recipe, text = collector.recipe, collector.texts.get('reward')
  network = recipe.reward if text is None else text.scorer.network
  scorer = SegmentScorer(network, recipe.reference, recipe.segmenter)
  search = Search(sampler, scorer, s.sample.segment_tokens)
  if text is None:
    return search
  segments = TextSegments(text, scorer)
  return dataclasses.replace(search, read_text=segments.option_reader(collector.prompts.messages))


def best_of(value: np.ndarray, finished: np.ndarray, keep: int) -> np.ndarray:
  """Returns which responses are kept: the best `keep` of each prompt's finished ones, [P, N]."""
  order = np.argsort(np.where(finished, -value, np.inf), axis=1, kind='stable')
  is_kept = np.zeros(value.shape, bool)
  np.put_along_axis(is_kept, order[:, :keep], True, axis=1)
  return is_kept & finished


def _record(batch: Batch, index: int, s: Settings, loaded: evaluate.Loaded) -> dict[str, Any]:
  """Returns a response as a row of data with its rewards."""
  tokenizer: ChatTokenizer = loaded.tokenizer
  has_score = needs_reward_model(s)
  segments, totals = segments_from_experience(
    batch.experience, index, tokenizer, has_score=has_score
  )
  messages = loaded.collector.prompts.messages(batch.prompt[index])
  (ids,) = response_tokens(jax.tree.map(lambda x: x[index : index + 1], batch.experience.rollout))
  return {
    'messages': [*messages, {'role': 'assistant', 'content': tokenizer.decode(ids)}],
    s.sample.rank_by: float(batch.value[index]),
    'kept': bool(batch.is_kept[index]),
    'finished': totals['finished'],
    'segments': [_segment_record(segment) for segment in segments],
  }


def _segment_record(segment: Segment) -> dict[str, Any]:
  record = {'text': segment.text, 'score': segment.score, 'reward': segment.reward}
  return record | ({'parts': segment.parts} if segment.parts else {})


def print_table(results: dict[str, Any]) -> None:
  """Prints the means of all responses and of those that are kept."""
  means = ((name, results[name]) for name in ('all', 'best'))
  rows = [(name, format_interval(mean, 3)) for name, mean in means if mean]
  title = (
    f'{results["kept"]:,} of {results["responses"]:,} responses to {results["prompts"]:,} prompts '
    'are kept'
  )
  table(title, ('', f'{results["rank_by"]}, mean [95 % interval]'), rows)


JOB = Job(
  name='sample',
  load=load,
  run=run,
  sections=(*COMMON, *REWARDED, 'sample'),
  inputs=(
    TRAINED_POLICY,
    REFERENCE,
    OPTIONAL_REWARD_MODEL,
    LM_REWARD,
    LISTED_REWARDS,
    data_input('prompts'),
  ),
  functions=lambda s: ('reward_model.segmentation.boundary_fn', 'reward_shaping.reward_fn'),
  outputs=(RESPONSES_FILE, BEST_FILE),
  batch_keys=('sample.batch_size',),
  summary=('responses', 'kept'),
  print_table=print_table,
  num_networks=lambda s: 3 + more_rewarding_models(s),
)
