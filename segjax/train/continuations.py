"""True credit for any gold reward: what continuations of a response earn before and after a clause.

V(prefix) is the mean gold reward of K responses that the policy samples from a prefix on, and the
credit of a clause is V after it less V before it. It is the estimate of Kazemnejad et al. 2024
(VinePPO), https://arxiv.org/abs/2410.01679.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from segjax.model.generate import GenerationOptions, GenerationResult, generate
from segjax.train.rollout import RolloutSampler, decode_config
from segjax.types import PromptBatch


class Prefix(NamedTuple):
  """A prompt, as a row of the prompts, and the tokens of a response to it so far."""

  prompt: int
  ids: tuple[int, ...]


def continuation_credit(
  prompt: Int[np.ndarray, 'R'],
  response_ids: Int[np.ndarray, 'R T'],
  ends: Bool[np.ndarray, 'R T'],
  gold: Sequence[float],
  value: Callable[[list[Prefix]], Sequence[float]],
) -> list[list[float]]:
  """Returns the credit of each clause of each response.

  V(clauses 1 to j) - V(clauses 1 to j - 1): what a clause is worth, not that the response ended
  there. Only where no token is left, V is the response's own gold reward.

  Args:
    prompt: row of each response's prompt.
    response_ids: tokens of the responses.
    ends: True on the last token of each clause.
    gold: gold reward of each response.
    value: of prefixes. Each is asked for once, however many responses begin with it.
  """
  limit = response_ids.shape[1]
  prefixes, values = [], {}
  for row, ids, is_end, whole in zip(prompt, response_ids, ends, gold, strict=True):
    sizes = [0, *np.flatnonzero(is_end) + 1] if is_end.any() else []
    prefixes.append([Prefix(int(row), tuple(ids[:size].tolist())) for size in sizes])
    values |= {prefix: whole for prefix in prefixes[-1] if len(prefix.ids) == limit}
  distinct = [
    prefix for prefix in dict.fromkeys(itertools.chain(*prefixes)) if prefix not in values
  ]
  values |= dict(zip(distinct, value(distinct), strict=True))
  return [np.diff([float(values[prefix]) for prefix in own]).tolist() for own in prefixes]


def prefix_values(
  params: Any,
  prompts: Callable[[np.ndarray], PromptBatch],
  prefixes: Sequence[Prefix],
  gold: Callable[[list[int], list[list[int]]], Sequence[float]],
  *,
  key: jax.Array,
  sampler: RolloutSampler,
  batches: Iterable[tuple[np.ndarray, int]],
) -> Float[np.ndarray, 'N']:
  """Returns the mean gold reward of `sampler.samples_per_prompt` continuations of each prefix.

  A response is as long as one that is sampled at once: config.rollout.max_new_tokens, the prefix
  included. The continuations of a prefix share its pages of the cache.

  Args:
    params: of the policy.
    prompts: of rows, on the host.
    prefixes: N of them.
    gold: of (row of the prompt, tokens) of responses.
    key: random key.
    sampler: how to sample.
    batches: of 0 to N - 1: (indices, how many of them are not padding).
  """
  samples, limit = sampler.samples_per_prompt, sampler.settings.max_new_tokens
  values = np.empty(len(prefixes))
  for number, (rows, real) in enumerate(batches):
    chosen = [prefixes[row] for row in rows]
    result = continue_prefixes(
      params,
      prompts(np.array([prefix.prompt for prefix in chosen])),
      [prefix.ids for prefix in chosen],
      jax.random.fold_in(key, number),
      sampler,
      [limit - len(prefix.ids) for prefix in chosen],
    )
    repeated = [prefix for prefix in chosen[:real] for _ in range(samples)]
    continuations = zip(repeated, result.response_ids, result.response_mask, strict=False)
    responses = [[*prefix.ids, *ids[mask].tolist()] for prefix, ids, mask in continuations]
    rewards = gold([prefix.prompt for prefix in repeated], responses)
    values[rows[:real]] = np.reshape(rewards, (real, samples)).mean(1)
  return values


def continue_prefixes(
  params: Any,
  prompts: PromptBatch,
  prefixes: Sequence[Sequence[int]],
  key: jax.Array,
  sampler: RolloutSampler,
  limits: Sequence[int],
  index: np.ndarray | None = None,
) -> GenerationResult:
  """Samples `sampler.samples_per_prompt` continuations of responses, which share their pages.

  Args:
    params: of the policy.
    prompts: of the responses, on the host, [B].
    prefixes: tokens of each response so far.
    key: random key.
    sampler: how to sample.
    limits: maximum tokens of the continuations of each response.
    index: number of each prompt, for its random numbers.

  Returns:
    The new tokens, the continuations of one response next to each other.
  """
  samples = sampler.samples_per_prompt
  return generate(
    params,
    join_prefixes(prompts, prefixes, sampler.settings.max_new_tokens),
    key,
    decoder=decode_config(sampler),
    mesh=sampler.mesh,
    options=GenerationOptions(
      sampler.settings.max_concurrent,
      samples,
      index,
      limits=np.repeat(limits, samples),
      stop=sampler.stop,
    ),
  )


def join_prefixes(
  prompts: PromptBatch, prefixes: Sequence[Sequence[int]], room: int
) -> PromptBatch:
  """Returns the prompts with the prefixes behind them, `room` wider: one width for any prefixes."""
  ids = np.pad(np.asarray(prompts.prompt_ids), ((0, 0), (0, room)))
  length = np.array(prompts.prompt_length)
  for row, prefix in enumerate(prefixes):
    ids[row, length[row] : length[row] + len(prefix)] = prefix
    length[row] += len(prefix)
  return PromptBatch(ids, length)
