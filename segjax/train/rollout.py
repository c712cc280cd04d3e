"""Responses to a batch of prompts, in device-sized pieces. Scores nothing: that is `experience`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from segjax.model import sharding
from segjax.model.decode import Sampling, generate
from segjax.model.llama import LlamaConfig
from segjax.settings import Rollout as RolloutSettings
from segjax.types import Rollout


def sampling(settings: RolloutSettings) -> Sampling:
  """The part of the settings that the decode loop reads."""
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
) -> Rollout:
  """Samples one response per prompt, `settings.batch` prompts at a time."""
  total = len(prompt_ids)
  size = settings.batch or total
  pieces = []
  for start in range(0, total, size):
    ids, length = sharding.place_batch(
      (prompt_ids[start : start + size], prompt_length[start : start + size]), mesh
    )
    out = generate(
      params,
      ids,
      length,
      jax.random.fold_in(key, start),
      config=config,
      sampling=sampling(settings),
      stop_ids=stop_ids,
    )
    pieces.append(
      Rollout(ids, length, out.response_ids, out.response_mask, out.finished, out.logprob)
    )
  return pieces[0] if len(pieces) == 1 else concatenate(pieces)


@jax.jit
def concatenate(pieces: list[Any]) -> Any:
  """Pieces of a batch joined along B, still split over the devices."""
  return jax.tree.map(
    lambda *parts: sharding.constrain_batch(jnp.concatenate(parts, axis=0)), *pieces
  )
