"""Compares the policy with the reference on held-out prompts."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.settings import Evaluate, Settings
from segjax.data.batches import eval_batches
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.evaluation import repetition
from segjax.evaluation.intervals import clustered_interval, format_interval
from segjax.evaluation.win_rates import length_controlled, outcomes, win_rate
from segjax.jobs.job import (
  COMMON,
  OPTIONAL_REWARD_MODEL,
  REFERENCE,
  TRAINED_POLICY,
  Job,
  data_input,
)
from segjax.report.console import log, table, track
from segjax.report.response_log import ResponseLog
from segjax.report.segment_table import format_segments
from segjax.rl.segmentation import content_mask
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.train.collect import Collector
from segjax.train.custom_reward import load_custom_reward, load_function
from segjax.train.rollout import RolloutSampler
from segjax.train.segmenter import sequence_scores
from segjax.types import Experience


class EvaluatedResponses(NamedTuple):
  """The responses of one model, N of them.

  Attributes:
    experience: arrays on the host.
    score: aggregated score of each response; None without a reward model.
    prompt: number of each response's prompt.
    prompts: last message of each prompt.
    texts: the responses.
    gold: reward by config.evaluate.gold_reward_fn; None without one.
  """

  experience: Experience
  score: np.ndarray | None
  prompt: np.ndarray
  prompts: list[str]
  texts: list[str]
  gold: np.ndarray | None


def run(stage: Stage) -> dict[str, Any]:
  """Samples responses of the reference ('before') and of the policy ('after') and compares them.

  Returns:
    The figures of both, also written to `results.json`: score of the reward model, gold reward
    where config.evaluate.gold_reward_fn is set, KL, length, segments, EOS rate, repetition; and of
    the policy its win rates over the reference (`win_rates`).
  """
  s = stage.settings
  gold, is_boundary = load_eval_functions(s.evaluate)
  resolved = models.resolve_models(s, stage.mesh, stage.log)
  paths, meaning, networks = resolved
  tokenizer = load_tokenizer(str(paths['policy']), s.data.chat_template)
  # The critic is not run. A batch is scored at once, as large as config.evaluate.batch_size.
  recipe = models.make_recipe(s, networks, networks['policy'], meaning, tokenizer)
  recipe = dataclasses.replace(recipe, ppo=dataclasses.replace(s.ppo, scoring_batch_size=0))
  limits = inputs.prompt_limits(
    s.data, networks, s.rollout.max_new_tokens, 'rollout.max_new_tokens', stage.log
  )
  prompts = tokenize_prompts(inputs.load_config_rows(s.data), tokenizer, limits)
  inputs.log_dataset(prompts, stage.log)
  params = models.load_models(resolved, tuple(models.HEADS), s.runtime, stage.mesh)
  collector = Collector(
    prompts,
    RolloutSampler(recipe.policy, s.rollout, tokenizer.stop_ids, stage.mesh, log=stage.log),
    recipe,
    jax.tree.map(jnp.float32, meaning.normalizer),
    load_custom_reward(s.reward_shaping.reward_fn, tokenizer.decode),
  )

  def sample(name: str) -> EvaluatedResponses:
    def batches(count):
      size = s.evaluate.batch_size
      return track(stage.name, eval_batches(count, size), -(-count // size), name)

    responses = sample_responses(
      collector,
      params | {'policy': params[name]},
      stage.key('samples'),
      s.evaluate,
      batches,
      tokenizer.decode,
    )
    return _with_gold(responses, gold)

  sampled = {'before': sample('reference'), 'after': sample('policy')}
  figures = {name: _figures(responses) for name, responses in sampled.items()}
  figures['after'] |= win_rates(sampled['after'], sampled['before'], s.seed)
  if is_boundary is not None:
    figures['before']['boundary_f1'] = boundary_f1(
      sampled['before'].experience, tokenizer, is_boundary
    )
  _show_responses(stage, sampled, tokenizer)
  _keep_responses(
    sampled,
    models.make_response_log(stage.directory, s.report, recipe, tokenizer, prompts),
    s.report.eval_responses,
  )
  path = stage.directory / 'results.json'
  if processes.is_first():
    path.write_text(json.dumps(figures, indent=2) + '\n', encoding='utf-8')
  return figures


def load_eval_functions(settings: Evaluate) -> tuple[Callable | None, Callable | None]:
  """Loads the gold and boundary functions of config.evaluate; None for those that are not set.

  Raises:
    UserError: a function cannot be loaded.
  """
  paths = {
    'evaluate.gold_reward_fn': settings.gold_reward_fn,
    'evaluate.boundary_fn': settings.boundary_fn,
  }
  return tuple(load_function(path, key) if path else None for key, path in paths.items())


def check_functions(settings: Settings) -> None:
  """Loads the user's functions; UserError names the config key of one that cannot be loaded."""
  load_eval_functions(settings.evaluate)
  if settings.reward_shaping.reward_fn:
    load_function(settings.reward_shaping.reward_fn, 'reward_shaping.reward_fn')


def sample_responses(
  collector: Collector,
  params: dict[str, Any],
  key: jax.Array,
  settings: Evaluate,
  batches: Callable[[int], Iterable[tuple[np.ndarray, int]]],
  decode: Callable[[Any], str],
) -> EvaluatedResponses:
  """Samples `settings.samples_per_prompt` responses of params['policy'] to every prompt.

  Args:
    collector: prompts, sampling and scoring; its KL coefficient is that of its recipe.
    params: parameters by name.
    key: the same for each model, so that equal models give equal responses.
    settings: config.evaluate.
    batches: (number of rows) -> `eval_batches`.
    decode: maps token ids to text, without special tokens.

  Returns:
    The responses, on the host, in the order of the prompts.
  """
  prompts, recipe = collector.prompts, collector.recipe
  repeated = np.repeat(np.arange(len(prompts)), settings.samples_per_prompt)
  sequence_score = jax.jit(
    functools.partial(sequence_scores, segmentation=recipe.segmenter.segmentation)
  )
  parts = []
  for number, (rows, real) in enumerate(batches(len(repeated))):
    index = number * settings.batch_size + np.arange(len(rows))
    experience, *_ = collector.collect(
      params, repeated[rows], key, jnp.float32(recipe.ppo.kl_coef), index
    )
    arrays = experience, sequence_score(experience.score, experience.segments)
    parts.append(jax.tree.map(lambda x, real=real: x[:real], processes.to_host(arrays)))
  experience, scores = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  rollout = experience.rollout
  responses = zip(rollout.response_ids, rollout.response_mask, strict=True)
  return EvaluatedResponses(
    experience=experience,
    score=scores if recipe.reward is not None else None,
    prompt=repeated,
    prompts=collector.prompt_texts(repeated),
    texts=[decode(ids[mask]) for ids, mask in responses],
    gold=None,
  )


def _with_gold(sampled: EvaluatedResponses, gold: Callable | None) -> EvaluatedResponses:
  if gold is None:
    return sampled
  pairs = zip(sampled.prompts, sampled.texts, strict=True)
  return sampled._replace(gold=np.array([gold(prompt, text) for prompt, text in pairs]))


def win_rates(after: EvaluatedResponses, before: EvaluatedResponses, seed: int) -> dict[str, Any]:
  """Returns win rates of `after` over `before`, by score and by gold reward.

  The i-th response to a prompt is compared with the i-th of the other model, which had the same
  random numbers: equal models tie. `win_rate_score` compares scores of the reward model,
  `win_rate_gold` gold rewards; `lc_win_rate_*` are length-controlled, see `evaluation.win_rates`.
  """
  rates = {}
  after_length, before_length = (
    np.array([len(text) for text in responses.texts]) for responses in (after, before)
  )
  for judge in ('score', 'gold'):
    values = getattr(after, judge)
    if values is not None:
      outcome = outcomes(values, getattr(before, judge))
      rates[f'win_rate_{judge}'] = win_rate(outcome, after.prompt, seed)
      rates[f'lc_win_rate_{judge}'] = length_controlled(
        outcome, after_length, before_length, after.prompt, seed
      )
  return rates


def _figures(sampled: EvaluatedResponses) -> dict[str, Any]:
  """Returns the figures of one model; kl is Σ_t (log π - log π_ref) per response, in nats."""
  e = sampled.experience
  mask = e.rollout.response_mask
  difference = np.where(mask, e.rollout.old_logprob - e.ref_logprob, 0)
  figures = {
    'kl_nats': float(difference.sum(1).mean()),
    'length': float(mask.sum(1).mean()),
    'segments': float(e.segments.num_segments.mean()),
    'eos_rate': float(e.rollout.finished.mean()),
    **repetition.repetition_metrics(_content(e)),
  }
  if sampled.score is not None:
    figures['score'] = clustered_interval(sampled.score, sampled.prompt)
  if sampled.gold is not None:
    figures['gold'] = clustered_interval(sampled.gold, sampled.prompt)
  return figures


def _content(e: Experience) -> list[np.ndarray]:
  """Returns the tokens of each response, without the stop token."""
  rows = zip(e.rollout.response_ids, e.rollout.response_mask, e.rollout.finished, strict=True)
  return [ids[mask][: int(mask.sum()) - int(finished)] for ids, mask, finished in rows]


def boundary_f1(
  experience: Experience, tokenizer: ChatTokenizer, is_boundary: Callable[[str], bool]
) -> float:
  """Returns F1 of segment ends against true ends, over content tokens.

  The last content token of a response is excluded: it ends a segment by definition.
  """
  rollout = experience.rollout
  content = np.asarray(
    jax.vmap(content_mask)(jnp.asarray(rollout.response_mask), jnp.asarray(rollout.finished))
  )
  position = np.arange(content.shape[1])
  inner = content & (position < (content * position).max(1, keepdims=True))
  by_id = {i: bool(is_boundary(tokenizer.decode([i]))) for i in np.unique(rollout.response_ids)}
  true = np.vectorize(by_id.get)(rollout.response_ids).astype(bool) & inner
  predicted = experience.segments.end & inner
  return float(2 * (true & predicted).sum() / max(true.sum() + predicted.sum(), 1))


def _show_responses(
  stage: Stage, sampled: dict[str, EvaluatedResponses], tokenizer: ChatTokenizer
) -> None:
  """Prints a few responses to the same prompts in segments, each with its reward."""
  total, show = len(sampled['after'].texts), stage.settings.evaluate.num_printed
  for index in np.linspace(0, total - 1, min(show, total)).astype(int):
    log(f'\n{sampled["after"].prompts[index]}')
    for name, one in sampled.items():
      gold = '' if one.gold is None else f', gold {one.gold[index]:+.2f}'
      log(f'  {name}{gold}')
      e = one.experience
      mask = e.rollout.response_mask[index]
      lines = format_segments(
        e.rollout.response_ids[index][mask],
        e.segments.segment_id[index][mask],
        e.reward[index][mask],
        tokenizer.decode,
      )
      log('\n'.join(f'    {line}' for line in lines) or '    (no content)')


def _keep_responses(sampled: dict[str, EvaluatedResponses], kept: ResponseLog, most: int) -> None:
  """At most so many responses of each model, evenly chosen, those to one prompt as a pair."""
  total = len(sampled['after'].texts)
  chosen = np.linspace(0, total - 1, min(most, total)).astype(int)
  for name, one in sampled.items():
    found = jax.tree.map(lambda x: x[chosen], one.experience)
    gold = None if one.gold is None else one.gold[chosen]
    kept.write(0, name, found, one.prompt[chosen], pairs=chosen, gold=gold)


_LABELS = {
  'gold': ('gold reward, mean [95 % interval]', 3),
  'score': ("reward model's score, mean [95 % interval]", 3),
  'win_rate_gold': ('win rate by gold reward', 3),
  'lc_win_rate_gold': ('  at equal length', 3),
  'win_rate_score': ("win rate by reward model's score", 3),
  'lc_win_rate_score': ('  at equal length', 3),
  'kl_nats': ('KL to the reference, nats per response', 2),
  'length': ('length, tokens', 1),
  'segments': ('segments per response', 1),
  'eos_rate': ('responses that end in EOS', 3),
  'repeated_4grams': ('4-grams that repeat one in the response', 3),
  'distinct_1': ('distinct tokens, share over responses', 3),
  'distinct_2': ('distinct pairs of tokens, share', 3),
  'boundary_f1': ('F1 of segment boundaries', 3),
}


def print_table(figures: dict[str, Any]) -> None:
  """Prints the figures of `run` as a table."""

  def cell(value, digits):
    if value is None:
      return ''
    return format_interval(value, digits) if isinstance(value, dict) else f'{value:z.{digits}f}'

  rows = []
  for key, (label, digits) in _LABELS.items():
    values = [figures[name].get(key) for name in ('before', 'after')]
    if values != [None, None]:
      rows.append((label, *(cell(value, digits) for value in values)))
  table('Held-out prompts', ('', 'before PPO', 'after PPO'), rows)


JOB = Job(
  name='evaluate',
  run=run,
  sections=(
    *COMMON,
    'policy',
    'reference',
    'reward_model',
    'rollout',
    'reward_shaping',
    'ppo',
    'compat',
    'evaluate',
  ),
  inputs=(
    TRAINED_POLICY,
    # Without PPO in the same run, the user says what the policy is compared with.
    dataclasses.replace(REFERENCE, only_after='ppo'),
    OPTIONAL_REWARD_MODEL,
    data_input('held_out'),
  ),
  check=check_functions,
  outputs=('results.json',),
  batch_keys=('evaluate.batch_size',),
  print_table=print_table,
  num_networks=3,
)
