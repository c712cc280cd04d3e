"""Chooses the entropy threshold on responses of the SFT model, and shows what others would give."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from segjax import processes
from segjax.config.settings import RolloutSettings
from segjax.data.batches import eval_batches
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.report.console import table, track
from segjax.rl.threshold import threshold_curve, threshold_for_length, threshold_for_quantile
from segjax.run import inputs
from segjax.run.stage import Stage
from segjax.train.reward_scoring import SegmentScorer
from segjax.train.rollout import RolloutSampler, rollout
from segjax.train.scoring import concat_prompt_response, gather_response
from segjax.types import Rollout as Responses

FILE = 'calibration.json'
_POINTS = 12  # thresholds in the table


def run(stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: ChatTokenizer) -> float:
  """The threshold that config.reward.threshold_search asks for, in nats; writes
  calibration.json.

  The reference answers prompts of config.data, as PPO's policy will at its first step; the
  entropies of these responses are what is looked at.
  """
  wanted = stage.settings.reward.threshold_search
  entropy, mask, finished = sample(stage, scorer, reference, tokenizer)
  min_length = scorer.segmenter.segmentation.min_segment_length
  if wanted.entropy_quantile:
    why = f'{wanted.entropy_quantile:.0%} of the tokens lie at or below it'
    find = jax.jit(threshold_for_quantile)
    threshold = float(find(entropy, mask, finished, wanted.entropy_quantile))
  else:
    why = f'segments of {wanted.target_segment_length:g} tokens were asked for'
    find = jax.jit(threshold_for_length, static_argnames='min_length')
    target = wanted.target_segment_length
    threshold = float(find(entropy, mask, finished, target, min_length=min_length))
  quantiles = np.quantile(np.asarray(entropy)[np.asarray(mask)], np.linspace(0, 0.99, _POINTS))
  thresholds = np.unique(np.append(quantiles, threshold)).astype(np.float32)
  curve = jax.jit(threshold_curve, static_argnames='min_length')
  length, segments = curve(entropy, mask, finished, jnp.asarray(thresholds), min_length=min_length)
  points = [
    {'entropy_threshold': float(c), 'segment_length': float(n), 'segments': float(k)}
    for c, n, k in zip(thresholds, length, segments, strict=True)
  ]
  if processes.is_first():
    stage.directory.mkdir(parents=True, exist_ok=True)
    (stage.directory / FILE).write_text(
      json.dumps({'entropy_threshold': threshold, 'curve': points}, indent=2) + '\n'
    )
  show(points, threshold, len(mask))
  stage.log(f'entropy threshold {threshold:.4f} nats: {why}')
  return threshold


def sample(
  stage: Stage, scorer: SegmentScorer, reference: Any, tokenizer: ChatTokenizer
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(entropy [N, T], response_mask [N, T], finished [N]) of the reference's own responses."""
  s = stage.settings
  limits = inputs.prompt_limits(
    s.data,
    {'reference': scorer.reference},
    s.reward.threshold_search.max_new_tokens,
    'reward.threshold_search.max_new_tokens',
    stage.log,
  )
  prompts = tokenize_prompts(inputs.load_config_rows(s.data), tokenizer, limits)
  rows = np.random.default_rng(s.seed).permutation(len(prompts))[
    : s.reward.threshold_search.num_samples
  ]
  size, parts = s.reward.threshold_search.batch_size, []
  sampler = RolloutSampler(
    scorer.reference,
    RolloutSettings(max_new_tokens=s.reward.threshold_search.max_new_tokens),
    tokenizer.stop_ids,
    stage.mesh,
    log=stage.log,
  )
  batches = track(stage.name, eval_batches(len(rows), size), -(-len(rows) // size), 'calibration')
  for number, (index, real) in enumerate(batches):
    batch = prompts.gather(rows[index], np.asarray)
    index = number * size + np.arange(size)
    responses = rollout(reference, batch, stage.key('calibration'), sampler, index)
    entropy = processes.to_host(_entropy(reference, responses.arrays, config=scorer.reference))
    arrays = entropy, responses.response_mask, responses.finished
    parts.append([x[:real] for x in arrays])
  return tuple(jnp.asarray(np.concatenate(column)) for column in zip(*parts, strict=True))


def show(points: list[dict[str, float]], threshold: float, samples: int) -> None:
  """Prints the curve; the chosen threshold is marked."""
  rows = [
    (
      f'{point["entropy_threshold"]:.3f}'
      + ('  <' if point['entropy_threshold'] == np.float32(threshold) else ''),
      f'{point["segment_length"]:.2f}',
      f'{point["segments"]:.2f}',
    )
    for point in points
  ]
  columns = ('threshold, nats', 'tokens a segment', 'segments a response')
  table(f'What a threshold gives, on {samples} responses of the SFT model', columns, rows)


@functools.partial(jax.jit, static_argnames='config')
def _entropy(reference: Any, made: Responses, *, config: LlamaConfig) -> jax.Array:
  _, entropy = token_logprobs(reference, concat_prompt_response(made), config)
  return gather_response(entropy, made.prompt_length, made.response_ids.shape[1])
