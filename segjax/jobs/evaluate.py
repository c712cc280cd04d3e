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
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.evaluation.clause_credit import clause_ends, clause_figures, make_clauses
from segjax.evaluation.policy_figures import (
  EvaluatedResponses,
  boundary_f1,
  by_response,
  gains,
  pairwise_win_rates,
  response_figures,
)
from segjax.jobs import demo, evaluate_functions, evaluate_summary
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
)
from segjax.model.llama import LlamaConfig
from segjax.report.console import log
from segjax.report.response_log import ResponseLog
from segjax.report.segment_table import escape_control, print_response
from segjax.run import inputs, models, recipes
from segjax.run.reward_sources import load_listed
from segjax.run.stage import Stage
from segjax.run.text_model import check_prompts
from segjax.run.weights import Weights
from segjax.storage import write_text_atomically
from segjax.train.collect import Collector
from segjax.train.custom_reward import load_custom_reward
from segjax.train.response_functions import Responses
from segjax.train.rollout import RolloutSampler, response_tokens
from segjax.train.segmenter import sequence_scores

RESPONSES_FILE = 'responses.json'  # the figures of each response, see `by_response`
CREDIT = ('spearman', 'advantage_spearman', 'sign', 'on_deciding_token')  # of `clause_figures`


class Loaded(NamedTuple):
  """The models before their weights are loaded, the tokenizer, how prompts are answered."""

  models: models.Models
  tokenizer: ChatTokenizer
  collector: Collector


def load(stage: Stage) -> Loaded:
  """Loads all but weights; logs a warning if there is nothing to compare."""
  loaded = load_collector(stage)
  if stage.settings.evaluate.credit_fn:
    evaluate_functions.check_credit(stage.settings.evaluate)
  paths = loaded.models.paths
  if paths['policy'].samefile(paths['reference']):
    stage.log('warning: config.policy.path and reference.path are one model: nothing differs')
  return loaded


def load_collector(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  resolved = models.resolve_models(s, stage.mesh, stage.log)
  tokenizer = models.load_chat_tokenizer(s, resolved, stage.log)
  tokenizer = tokenizer.for_networks(resolved.configs)
  return Loaded(resolved, tokenizer, _make_collector(stage, resolved, tokenizer))


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Samples responses of the reference ('before') and of the policy ('after') and compares them.

  Returns:
    The figures of both, also written to `results.json`: score of the reward model, gold reward
    where config.evaluate.gold_reward_fn is set, KL, length, segments, EOS rate, repetition; and of
    the policy its gains and win rates over the reference (`policy_figures`). With
    config.evaluate.credit_fn, credit_spearman and others of 'before' say how well the dense rewards
    of the reference's clauses agree with their true credit (`clause_credit`).
  """
  s = stage.settings
  resolved, tokenizer, collector = loaded
  gold = evaluate_functions.load_gold(s, tokenizer.decode)
  is_boundary = evaluate_functions.load_boundary(s.evaluate)
  weights = Weights(s.runtime, stage.mesh)
  params = models.load_models(resolved, tuple(resolved.frozen), weights)

  def sample(name: str) -> EvaluatedResponses:
    responses = sample_responses(
      with_policy(collector, resolved.configs[name]),
      params | {'policy': params[name]},
      stage.key('samples'),
      s.evaluate,
      lambda count: inputs.tracked_batches(stage.name, count, s.evaluate.batch_size, name),
      tokenizer.decode,
      # The reference has no KL to itself but roundings, which would rank clauses without reward.
      s.ppo.kl_coef if name == 'policy' else 0.0,
    )
    if gold is None:
      return responses
    return responses._replace(gold=np.array(gold(_asked(responses, collector))))

  sampled = {'before': sample('reference'), 'after': sample('policy')}
  figures = {name: response_figures(responses) for name, responses in sampled.items()}
  figures['after'] |= gains(sampled['after'], sampled['before'])
  figures['after'] |= pairwise_win_rates(sampled['after'], sampled['before'], s.seed)
  if s.evaluate.credit_fn:
    figures['before'] |= _credit(sampled['before'], loaded, s)
  if is_boundary is not None:
    figures['before']['boundary_f1'] = boundary_f1(
      sampled['before'].experience, tokenizer, is_boundary
    )
  _print_responses(sampled, s.evaluate.num_printed, tokenizer)
  response_log = recipes.make_response_log(
    stage.directory, s.report, collector.recipe, tokenizer, collector.prompts
  )
  _log_responses(sampled, response_log, s.report.eval_responses)
  if processes.is_first():
    record = json.dumps(figures, indent=2) + '\n'
    write_text_atomically(stage.directory / 'results.json', record)
    columns = json.dumps(by_response(sampled))
    write_text_atomically(stage.directory / RESPONSES_FILE, columns + '\n')
  return figures


def _make_collector(stage: Stage, resolved: models.Models, tokenizer: ChatTokenizer) -> Collector:
  """Returns how responses to the held-out prompts are sampled and scored."""
  s, configs = stage.settings, resolved.configs
  recipe = recipes.make_recipe(s, resolved, tokenizer)
  # Nothing reads advantages: no critic is run, and a batch may have any responses to a prompt. It
  # is scored at once, as large as config.evaluate.batch_size.
  ppo = dataclasses.replace(s.ppo, scoring_batch_size=0, estimator='reinforce_plus_plus')
  recipe = dataclasses.replace(recipe, ppo=ppo, samples_per_prompt=1)
  rollout = inputs.fit_rollout(s.rollout, configs, stage.log)
  limits = inputs.prompt_limits(s.data, configs, rollout.max_new_tokens, stage.log)
  prompts = tokenize_prompts(inputs.load_config_rows(s.data, stage.log), tokenizer, limits)
  inputs.log_dataset(prompts, stage.log)
  check_prompts(resolved.texts.values(), prompts)
  return Collector(
    prompts,
    RolloutSampler(recipe.policy, rollout, tokenizer.stop_ids, stage.mesh, log=stage.log),
    recipe,
    jax.tree.map(jnp.float32, resolved.reward_spec.normalizer),
    load_custom_reward(s.reward_shaping, tokenizer.decode),
    load_listed(s, resolved.listed, tokenizer.decode),
    texts=resolved.text_rewards(tokenizer),
  )


def with_policy(collector: Collector, network: LlamaConfig) -> Collector:
  """Returns the collector for responses of another network, whose adapters may be others."""
  return dataclasses.replace(
    collector,
    sampler=dataclasses.replace(collector.sampler, config=network),
    recipe=dataclasses.replace(collector.recipe, policy=network),
  )


def _asked(responses: EvaluatedResponses, collector: Collector) -> Responses:
  """Returns the responses for functions of the user's."""
  return collector.responses(responses.prompt, response_tokens(responses.experience.rollout))


def _credit(responses: EvaluatedResponses, loaded: Loaded, s: Settings) -> dict[str, Any]:
  """Returns the figures `CREDIT` of the dense rewards; {} where no true credit is known."""
  decode, e = loaded.tokenizer.decode, responses.experience
  ends = clause_ends(e.rollout, decode, evaluate_functions.load_boundary(s.evaluate))
  credit = evaluate_functions.load_credit(s, decode)(_asked(responses, loaded.collector))
  clauses = make_clauses(e.rollout.response_mask, ends, credit)
  figures = clause_figures(e.reward, clauses, s.seed) if len(clauses.truth) else {}
  return {f'credit_{name}': figures[name] for name in CREDIT if figures}


def sample_responses(
  collector: Collector,
  params: dict[str, Any],
  key: jax.Array,
  settings: Evaluate,
  batches: Callable[[int], Iterable[tuple[np.ndarray, int]]],
  decode: Callable[[Any], str],
  kl_coef: float,
) -> EvaluatedResponses:
  """Samples `settings.samples_per_prompt` responses of params['policy'] to every prompt.

  Args:
    collector: prompts, sampling and scoring.
    params: parameters by name.
    key: the same for each model, so that equal models give equal responses.
    settings: config.evaluate.
    batches: (number of responses) -> their batches, as `data.batches.eval_batches` yields them.
    decode: maps token ids to text, without special tokens.
    kl_coef: of the KL penalty in the rewards.

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
    experience, *_ = collector.collect(params, repeated[rows], key, jnp.float32(kl_coef), index)
    arrays = experience, sequence_score(experience.score, experience.segments)
    parts.append(jax.tree.map(lambda x, real=real: x[:real], processes.to_host(arrays)))
  experience, scores = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
  rollout = experience.rollout
  return EvaluatedResponses(
    experience=experience,
    score=scores if recipe.has_scores else None,
    prompt=repeated,
    prompts=collector.prompt_texts(repeated),
    texts=[decode(ids) for ids in response_tokens(rollout)],
    gold=None,
  )


def _print_responses(
  sampled: dict[str, EvaluatedResponses], max_responses: int, tokenizer: ChatTokenizer
) -> None:
  """Prints a few responses to the same prompts with the reward of each segment."""
  chosen = _spread_indices(len(sampled['after'].texts), max_responses)
  if len(chosen):
    log('\nSome responses; behind each segment is its reward, KL penalty included')
  for index in chosen:
    log(f'\n{escape_control(sampled["after"].prompts[index], keep=chr(10))}')
    for name, responses in sampled.items():
      gold = '' if responses.gold is None else f', gold {responses.gold[index]:+.2f}'
      log(f'  {name}{gold}')
      e = responses.experience
      mask = e.rollout.response_mask[index]
      texts = tokenizer.token_texts(e.rollout.response_ids[index][mask].tolist())
      print_response(texts, e.segments.segment_id[index][mask], e.reward[index][mask])


def _log_responses(
  sampled: dict[str, EvaluatedResponses], response_log: ResponseLog, max_responses: int
) -> None:
  """Writes responses of each model for report.html, those to one prompt as a pair."""
  chosen = _spread_indices(len(sampled['after'].texts), max_responses)
  for name, responses in sampled.items():
    experience = jax.tree.map(lambda x: x[chosen], responses.experience)
    gold = None if responses.gold is None else responses.gold[chosen]
    response_log.write(0, name, experience, responses.prompt[chosen], pairs=chosen, gold=gold)


def _spread_indices(total: int, max_count: int) -> np.ndarray:
  """Returns at most `max_count` of the indices 0 to total - 1, evenly spread."""
  return np.linspace(0, total - 1, min(max_count, total)).astype(int)


JOB = Job(
  name='evaluate',
  load=load,
  run=run,
  sections=(*COMMON, *REWARDED, 'evaluate'),
  inputs=(
    TRAINED_POLICY,
    # Without PPO or DPO in the same run, only the user knows what the policy is compared with.
    dataclasses.replace(REFERENCE, only_after=('ppo', 'dpo')),
    OPTIONAL_REWARD_MODEL,
    LM_REWARD,
    LISTED_REWARDS,
    data_input('held_out'),
  ),
  functions=lambda s: (
    'evaluate.gold_reward_fn',
    'evaluate.boundary_fn',
    'evaluate.credit_fn',
    'reward_model.segmentation.boundary_fn',
    'reward_shaping.reward_fn',
  ),
  outputs=('results.json', RESPONSES_FILE),
  batch_keys=('evaluate.batch_size',),
  print_table=evaluate_summary.print_table,
  headline=evaluate_summary.headline,
  after_run=demo.update_results,
  num_networks=lambda s: 3 + more_rewarding_models(s),
)
