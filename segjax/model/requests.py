"""What is asked of decoding and what it answers: requests, and responses on the host."""

import dataclasses
from typing import NamedTuple

import numpy as np


class Partial(NamedTuple):
  """The tokens of an unfinished response, with the log-probs that they were drawn with."""

  ids: np.ndarray = np.zeros(0, np.int32)
  logprob: np.ndarray = np.zeros(0, np.float32)
  sample_logprob: np.ndarray = np.zeros(0, np.float32)


_NO_TOKENS = Partial()


@dataclasses.dataclass(frozen=True)
class Request:
  """A response to sample.

  Attributes:
    prompt_ids: tokens of the prompt, without padding.
    prompt: number of the prompt; requests with one number have the same prompt and share its pages.
    number: of the prompt and of the sample, for the random numbers, uint32[2].
    limit: maximum tokens of the response.
    response: tokens that it has already.
  """

  prompt_ids: np.ndarray
  prompt: int
  number: np.ndarray
  limit: int
  response: Partial = _NO_TOKENS


class GenerationResult(NamedTuple):
  """Responses on the host, padded on the right by the first stop id; numpy, [N, T].

  Attributes:
    response_mask: True on the response, stop token included.
    finished: whether the response ended in a stop token, [N].
    logprob: under the unfiltered distribution at temperature 1, as a full forward would give it.
    sample_logprob: under the distribution drawn from.
    non_finite: whether the response ended because its logits were not finite, [N].
  """

  response_ids: np.ndarray
  response_mask: np.ndarray
  finished: np.ndarray
  logprob: np.ndarray
  sample_logprob: np.ndarray
  non_finite: np.ndarray


def start_result(requests: list[Request], max_tokens: int, fill: int) -> GenerationResult:
  """Returns the result before the first chunk: what the responses have already."""
  shape = len(requests), max_tokens
  result = GenerationResult(
    response_ids=np.full(shape, fill, np.int32),
    response_mask=np.zeros(shape, bool),
    finished=np.zeros(shape[0], bool),
    logprob=np.zeros(shape, np.float32),
    sample_logprob=np.zeros(shape, np.float32),
    non_finite=np.zeros(shape[0], bool),
  )
  for i, request in enumerate(requests):
    ids, logprob, sample_logprob = request.response
    result.response_ids[i, : len(ids)] = ids
    result.response_mask[i, : len(ids)] = True
    result.logprob[i, : len(ids)] = logprob
    result.sample_logprob[i, : len(ids)] = sample_logprob
  return result
