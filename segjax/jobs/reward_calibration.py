"""Chooses the entropy threshold on responses of the SFT model; prints the effect of others."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.settings import RolloutSettings, ThresholdSearch
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.report.console import table
from segjax.rl.threshold import threshold_curve, threshold_for_length, threshold_for_quantile
from segjax.run import inputs
from segjax.run.stage import Stage
from segjax.storage import make_directory, write_text_atomically
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.rollout import RolloutSampler, rollout
from segjax.train.rollout_rows import concat_prompt_response, gather_response
from segjax.types import Rollout

CALIBRATION_FILE = 'calibration.json'
_POINTS = 12  # thresholds in the table

# (entropy [N, T], response_mask [N, T], finished [N]) of responses.
Entropies = tuple[jax.Array, jax.Array, jax.Array]


def run(stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: ChatTokenizer) -> float:
  """Returns the threshold of config.reward.threshold_search, in nats; writes calibration.json.

  Uses the entropies of the reference's own responses to prompts of config.data, which are those of
  PPO's policy at its first step.
  """
  entropies = sample_entropies(stage, scorer, reference, tokenizer)
  min_length = scorer.segmenter.segmentation.min_segment_length
  threshold, reason = find_threshold(stage.settings.reward.threshold_search, entropies, min_length)
  curve = effect_of_thresholds(entropies, threshold, min_length)
  if processes.is_first():
    make_directory(stage.directory)
    record = json.dumps({'entropy_threshold': threshold, 'curve': curve}, indent=2) + '\n'
    write_text_atomically(stage.directory / CALIBRATION_FILE, record)
  print_curve(curve, threshold, len(entropies[0]))
  stage.log(f'entropy threshold {threshold:.4f} nats: {reason}')
  return threshold


def sample_entropies(
  stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: ChatTokenizer
) -> Entropies:
  """Samples responses of the reference and returns its entropies on them."""
  s = stage.settings
  search = s.reward.threshold_search
  networks, key = {'reference': scorer.reference}, 'reward.threshold_search.max_new_tokens'
  max_new_tokens = inputs.fit_responses(search.max_new_tokens, networks, key, stage.log)
  limits = inputs.prompt_limits(s.data, networks, max_new_tokens, stage.log)
  prompts = tokenize_prompts(inputs.load_config_rows(s.data), tokenizer, limits)
  order = np.random.default_rng(s.seed).permutation(len(prompts))[: search.num_samples]
  sampler = RolloutSampler(
    scorer.reference,
    RolloutSettings(max_new_tokens=max_new_tokens),
    tokenizer.stop_ids,
    stage.mesh,
    log=stage.log,
  )
  parts = []
  batches = inputs.tracked_batches(stage.name, len(order), search.batch_size, 'calibration')
  for number, (rows, num_real) in enumerate(batches):
    batch = prompts.gather(order[rows], np.asarray)
    index = number * search.batch_size + np.arange(search.batch_size)
    responses = rollout(reference, batch, stage.key('calibration'), sampler, index)
    entropy = processes.to_host(_entropy(reference, responses.arrays, config=scorer.reference))
    arrays = entropy, responses.response_mask, responses.finished
    parts.append([x[:num_real] for x in arrays])
  return tuple(jnp.asarray(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))


def find_threshold(
  search: ThresholdSearch, entropies: Entropies, min_length: int
) -> tuple[float, str]:
  """Returns the threshold that the search asks for, and the reason as text."""
  if search.entropy_quantile:
    threshold = jax.jit(threshold_for_quantile)(*entropies, search.entropy_quantile)
    return float(threshold), f'{search.entropy_quantile:.0%} of the tokens lie at or below it'
  target = search.target_segment_length
  find = jax.jit(threshold_for_length, static_argnames='min_length')
  threshold = find(*entropies, target, min_length=min_length)
  return float(threshold), f'for a mean segment length of {target:g} tokens'


def effect_of_thresholds(
  entropies: Entropies, threshold: float, min_length: int
) -> list[dict[str, float]]:
  """Returns mean segment length and segments per response at quantiles and at `threshold`."""
  entropy, mask, _ = entropies
  quantiles = np.quantile(np.asarray(entropy)[np.asarray(mask)], np.linspace(0, 0.99, _POINTS))
  thresholds = np.unique(np.append(quantiles, threshold)).astype(np.float32)
  curve = jax.jit(threshold_curve, static_argnames='min_length')
  length, segments = curve(*entropies, jnp.asarray(thresholds), min_length=min_length)
  return [
    {'entropy_threshold': float(c), 'segment_length': float(n), 'segments': float(k)}
    for c, n, k in zip(thresholds, length, segments, strict=True)
  ]


def print_curve(curve: list[dict[str, float]], threshold: float, num_responses: int) -> None:
  """Prints the curve as a table, with a mark at the chosen threshold."""
  rows = [
    (
      f'{point["entropy_threshold"]:.3f}'
      + ('  <' if point['entropy_threshold'] == np.float32(threshold) else ''),
      f'{point["segment_length"]:.2f}',
      f'{point["segments"]:.2f}',
    )
    for point in curve
  ]
  columns = ('threshold, nats', 'tokens per segment', 'segments per response')
  table(f'Thresholds and segments, on {num_responses} responses of the SFT model', columns, rows)


@functools.partial(jax.jit, static_argnames='config')
def _entropy(reference: Any, responses: Rollout, *, config: LlamaConfig) -> jax.Array:
  _, entropy = token_logprobs(reference, concat_prompt_response(responses), config)
  return gather_response(entropy, responses.prompt_length, responses.response_ids.shape[1])
