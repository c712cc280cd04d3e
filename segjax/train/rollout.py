"""Responses to a batch of prompts, as arrays on the mesh. Scores nothing: that is `experience`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from segjax.config.settings import RolloutSettings
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.generate import (
  GenerationOptions,
  GenerationResult,
  generate,
  make_decode_config,
)
from segjax.model.llama import LlamaConfig
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch, Rollout


def sampling(settings: RolloutSettings) -> Sampling:
  """The part of the settings that says how a token is drawn."""
  return Sampling(
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    min_new_tokens=settings.min_new_tokens,
    max_new_tokens=settings.max_new_tokens,
  )


def rollout(
  params: Any,
  prompt_ids: np.ndarray,
  prompt_length: np.ndarray,
  key: Array,
  *,
  config: LlamaConfig,
  settings: RolloutSettings,
  stop_ids: tuple[int, ...],
  mesh: Mesh,
  samples: int = 1,
  index: np.ndarray | None = None,
  say: Callable[[str], None] = print,
  watch: Callable[[GenerationResult], object] = lambda found: None,
) -> Rollout:
  """Samples responses, `settings.slots` at once; those to one prompt stand next to each other.

  Args:
    samples: responses per prompt.
    index: of each prompt, for its random numbers; see `generate`.
    say: is told of responses that ended because their logits were not finite.
    watch: of `generate`.

  Raises:
    ValueError: no response has finite logits: the policy's weights are spoilt.
  """
  found = generate(
    params,
    PromptBatch(prompt_ids, prompt_length),
    key,
    decoder=make_decode_config(config, sampling(settings), stop_ids, mesh),
    mesh=mesh,
    options=GenerationOptions(settings.max_concurrent, samples, index),
    on_chunk=watch,
  )
  if found.non_finite.all():
    raise UserError(
      'the logits of every response are not finite: the weights of the policy are spoilt; go on '
      'from an earlier checkpoint, or lower the learning rate.'
    )
  for row in np.flatnonzero(found.non_finite):
    length = int(found.response_mask[row].sum())
    say(f'prompt {row // samples}: the logits after {length} tokens of a response are not finite')
  arrays = {
    'prompt_ids': np.repeat(prompt_ids, samples, axis=0),
    'prompt_length': np.repeat(prompt_length, samples).astype(np.int32),
    'response_ids': found.response_ids,
    'response_mask': found.response_mask,
    'finished': found.finished,
    'old_logprob': found.logprob,
    'sample_logprob': found.sample_logprob,
  }
  return Rollout(**sharding.place_batch(arrays, mesh))
