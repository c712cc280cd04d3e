"""Samples the responses of a policy to a batch of prompts, on the host and on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from segjax.config.settings import RolloutSettings
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.decode import DecodeConfig
from segjax.model.generate import (
  GenerationOptions,
  GenerationResult,
  generate,
  make_decode_config,
)
from segjax.model.llama import LlamaConfig
from segjax.model.sampling import Sampling
from segjax.types import PromptBatch, Rollout


@dataclasses.dataclass(frozen=True)
class RolloutSampler:
  """How responses are sampled, the same for every batch of prompts.

  Attributes:
    config: network of the policy.
    settings: sampling and `max_concurrent`.
    stop_ids: token ids that end a response.
    mesh: the devices.
    samples_per_prompt: responses to each prompt.
    log: called with a warning for each response whose logits were not finite.
    stop: asked before every chunk of tokens whether this process wants to end the generation.
    weights_dtype: in which the layers decode; one of `choices.ROLLOUT_WEIGHTS`.
  """

  config: LlamaConfig
  settings: RolloutSettings
  stop_ids: tuple[int, ...]
  mesh: Mesh
  samples_per_prompt: int = 1
  log: Callable[[str], None] = print
  stop: Callable[[], bool] = lambda: False
  weights_dtype: str = 'compute_dtype'

  def __post_init__(self):
    # Refused here, before weights are loaded.
    decode_config(self)


@dataclasses.dataclass(frozen=True)
class CollectedRollout:
  """A rollout on the devices, and the part of it that the host reads.

  Decoding ends with these arrays on the host. Fetching them from the devices later would wait for
  everything dispatched before.

  Attributes:
    arrays: the rollout, split over the mesh.
    response_ids: token ids of the responses, padded on the right.
    response_mask: True on response tokens, stop token included.
    finished: whether a response ended in a stop token.
    length: tokens of prompt and response together.
  """

  arrays: Rollout
  response_ids: Int[np.ndarray, 'B T']
  response_mask: Bool[np.ndarray, 'B T']
  finished: Bool[np.ndarray, 'B']
  length: Int[np.ndarray, 'B']


def response_tokens(rollout: CollectedRollout | Rollout) -> list[np.ndarray]:
  """Returns the tokens of each response of a rollout on the host, without padding."""
  # The padding has the id of a stop token.
  return [x[mask] for x, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]


def make_sampling(settings: RolloutSettings) -> Sampling:
  """Returns the part of the settings that decides how a token is drawn."""
  return Sampling(
    temperature=settings.temperature,
    top_k=settings.top_k,
    top_p=settings.top_p,
    min_new_tokens=settings.min_new_tokens,
    max_new_tokens=settings.max_new_tokens,
  )


def make_decoder(
  settings: RolloutSettings,
  config: LlamaConfig,
  stop_ids: tuple[int, ...],
  mesh: Mesh,
  chunk: int = 16,
) -> DecodeConfig:
  """Returns the decode configuration of the settings; see `make_decode_config`."""
  sampling = make_sampling(settings)
  return make_decode_config(config, sampling, stop_ids, mesh, chunk, settings.tensor)


def decode_config(sampler: RolloutSampler) -> DecodeConfig:
  """Returns the static configuration of the sampler's programs."""
  decoder = make_decoder(sampler.settings, sampler.config, sampler.stop_ids, sampler.mesh)
  return dataclasses.replace(decoder, weights_dtype=sampler.weights_dtype)


def rollout(
  params: Any,
  prompts: PromptBatch,
  key: Array,
  sampler: RolloutSampler,
  index: np.ndarray | None = None,
) -> CollectedRollout:
  """Samples responses, `sampler.settings.max_concurrent` at once.

  The responses to one prompt are next to each other.

  Args:
    params: parameters of the policy.
    prompts: token ids and lengths, on the host.
    key: random key of this rollout.
    sampler: how to sample.
    index: number of each prompt, for its random numbers; see `generate`.

  Raises:
    UserError: no response has finite logits.
    StepAbortedError: see `generate_requests`.
  """
  samples = sampler.samples_per_prompt
  output = generate(
    params,
    prompts,
    key,
    decoder=decode_config(sampler),
    mesh=sampler.mesh,
    options=GenerationOptions(sampler.settings.max_concurrent, samples, index, stop=sampler.stop),
  )
  # A row per response.
  return place_rollout(PromptBatch(*(np.repeat(x, samples, 0) for x in prompts)), output, sampler)


def place_rollout(
  prompts: PromptBatch,
  output: GenerationResult,
  sampler: RolloutSampler,
  carried: Int[np.ndarray, 'B'] | None = None,
) -> CollectedRollout:
  """Puts responses on the mesh, and logs those whose logits were not finite.

  Args:
    prompts: the prompt of each response, on the host.
    output: the responses.
    sampler: how they were sampled.
    carried: tokens of each that earlier policies drew; None if none was carried.

  Raises:
    UserError: no response has finite logits.
  """
  if output.non_finite.all():  # a single row may overflow, and is only logged
    raise UserError(
      'the logits of every response are not finite: the weights of the policy are corrupted; '
      'resume from an earlier checkpoint, or lower the learning rate.'
    )
  for row in np.flatnonzero(output.non_finite):
    prompt, length = row // sampler.samples_per_prompt, int(output.response_mask[row].sum())
    sampler.log(f'prompt {prompt}: the logits after {length} tokens of a response are not finite')
  return CollectedRollout(
    place_arrays(prompts, output, sampler.mesh, carried),
    output.response_ids,
    output.response_mask,
    output.finished,
    prompts.prompt_length.astype(np.int32) + output.response_mask.sum(axis=1),
  )


def place_arrays(
  prompts: PromptBatch,
  output: GenerationResult,
  mesh: Mesh,
  carried: Int[np.ndarray, 'B'] | None = None,
) -> Rollout:
  """Puts the arrays of a rollout on the mesh; see `place_rollout`."""
  arrays = {
    'prompt_ids': prompts.prompt_ids,
    'prompt_length': prompts.prompt_length.astype(np.int32),
    'response_ids': output.response_ids,
    'response_mask': output.response_mask,
    'finished': output.finished,
    'old_logprob': output.logprob,  # unfiltered: PPO compares policies, not ways to sample
    'sample_logprob': output.sample_logprob,
  }
  if carried is not None:
    arrays['carried'] = carried
  return Rollout(**sharding.place_batch(arrays, mesh))  # each process places its part
