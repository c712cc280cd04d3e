"""Responses that go on from one rollout to the next: `rollout.carry`.

A rollout ends as soon as B responses are done. Those that are not are carried: the next rollout
prefills their prompts and tokens with the policy, which has changed meanwhile, and goes on with
them before it takes new prompts from the stream. Each token keeps the log-probs that it was drawn
with, so that the ratio and the KL penalty are those of the policies that drew it; where log-probs
come from a full forward pass, it is one of that policy, before it changes.

The random numbers of a response depend on the seed, the position of its prompt in the stream and
the token alone. Which responses a step learns from depends on the number of rows decoded too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from segjax import processes
from segjax.data.batches import Prompts, stream_rows
from segjax.model import generate, sharding
from segjax.model.generate import Generated, GenerationOptions, GenerationResult
from segjax.model.requests import Partial, Request
from segjax.train.rollout import (
  CollectedRollout,
  RolloutSampler,
  decode_config,
  place_arrays,
  place_rollout,
)
from segjax.types import Rollout

# (responses of B rows, tokens of prompt and response or 0 to leave a row out) -> log-probs [B, T].
Recompute = Callable[[Rollout, np.ndarray], np.ndarray]


class Responses(NamedTuple):
  """Responses to prompts of the stream, done or not; a row each, [N] and [N, T].

  Attributes:
    position: that of the prompt in the stream; -1 in rows that only fill up.
    began: the step that drew the first token.
    count: tokens so far.
    is_done: the response ended by itself or is at its limit.
    finished: it ended in a stop token.
    non_finite: it ended because its logits were not finite.
  """

  position: Any
  began: Any
  count: Any
  is_done: Any
  finished: Any
  non_finite: Any
  ids: Any
  logprob: Any
  sample_logprob: Any

  def take(self, rows: np.ndarray) -> 'Responses':
    """Returns these rows."""
    return Responses(*(x[rows] for x in self))


class Carried(NamedTuple):
  """What one rollout leaves to the next: a part of the training state, whole on every device.

  Attributes:
    cursor: position in the stream of the first prompt that was not started.
    responses: those that are not done, and those that are beyond the B of the rollout; B rows.
  """

  cursor: Int[Array, '']
  responses: Responses


@dataclasses.dataclass(frozen=True)
class Stream:
  """The endless stream of prompts, and the random numbers of the responses to them.

  Attributes:
    prompts: the prompts, in another order in each epoch.
    seed: seed of the order.
    key: random key of the run.
    batch: responses of a rollout, B.
    max_tokens: limit of a response, T.
  """

  prompts: Prompts
  seed: int
  key: jax.Array
  batch: int
  max_tokens: int

  def rows(self, position: Int[np.ndarray, 'N']) -> Int[np.ndarray, 'N']:
    """Returns the rows of the prompts at these positions."""
    return stream_rows(len(self.prompts), self.seed, position)


class CarriedRollout(NamedTuple):
  """A rollout, the row of each response's prompt, what is left to the next one, and metrics."""

  rollout: CollectedRollout
  rows: Int[np.ndarray, 'B']
  carried: Carried
  metrics: dict[str, float]


def nothing_carried(stream: Stream, mesh: Mesh) -> Carried:
  """Returns what the first rollout begins with."""
  return _place(0, _no_responses(stream), stream, mesh)


def rollout(
  params: Any,
  carried: Carried,
  step: int,
  stream: Stream,
  sampler: RolloutSampler,
  recompute: Recompute | None = None,
) -> CarriedRollout:
  """Goes on with the carried responses and starts new ones until B are done.

  Args:
    params: parameters of the policy.
    carried: what the rollout before has left.
    step: number of this step.
    stream: the prompts.
    sampler: how to sample.
    recompute: gives the tokens of this policy in responses that are carried other log-probs than
      those of decoding; None leaves these.

  Raises:
    UserError: no response has finite logits.
  """
  state = processes.to_host(carried)
  before = state.responses.take(state.responses.position >= 0)
  state = state._replace(cursor=int(state.cursor), responses=before)
  responses, older = _go_on(params, state, step, stream, sampler)
  is_batch = responses.is_done & (np.cumsum(responses.is_done) <= stream.batch)
  begun = responses.position[responses.is_done | (responses.count > 0)]
  cursor = max(state.cursor, int(begun.max()) + 1)
  is_left = ~is_batch & (responses.position < cursor)
  left = responses.take(is_left)
  if recompute is not None and is_left.any():
    left = _recompute(left, older[is_left], stream, sampler.mesh, recompute)
  batch, older = responses.take(is_batch), older[is_batch]
  rows = stream.rows(batch.position)
  return CarriedRollout(
    place_rollout(stream.prompts.gather(rows, np.asarray), _result(batch), sampler, older),
    rows,
    _place(cursor, left, stream, sampler.mesh),
    {
      'rollout/carried_responses': float((before.count > 0).sum()),
      'rollout/carried_tokens': float(before.count.sum()),
      'rollout/older_share': float(older.sum() / max(batch.count.sum(), 1)),
      'rollout/age_mean': float((step - batch.began).mean()),
      'rollout/age_max': float((step - batch.began).max()),
    },
  )


def _go_on(
  params: Any, state: Carried, step: int, stream: Stream, sampler: RolloutSampler
) -> tuple[Responses, np.ndarray]:
  """Decodes until B responses are done, those of `state` included.

  Returns:
    (responses, begun or not; how many tokens of each earlier policies drew).
  """
  before = state.responses
  done, unfinished = before.take(before.is_done), before.take(~before.is_done)
  new = state.cursor + np.arange(2 * stream.batch - len(unfinished.position))
  position = np.concatenate([unfinished.position, new])
  requests = _requests(position, unfinished, stream, sampler)
  # With those that are done 2 B: B are used, and at most B left, for which the state has room.
  count = len(position) - len(done.position)
  generated = generate.generate_requests(
    params,
    requests[:count],
    stream.key,
    longest=stream.prompts.length,
    decoder=decode_config(sampler),
    mesh=sampler.mesh,
    max_concurrent=sampler.settings.max_concurrent,
    at_once=stream.batch,  # more would be carried for longer
    enough=stream.batch - len(done.position),
    stop=sampler.stop,
  )
  # Those that were done before come first: no response waits for more than one step.
  responses = _join(done, _responses(generated, position[:count], unfinished, step))
  older = np.concatenate([done.count, unfinished.count])
  return responses, np.pad(older, (0, len(responses.count) - len(older)))


def _requests(
  position: np.ndarray, unfinished: Responses, stream: Stream, sampler: RolloutSampler
) -> list[Request]:
  """Returns requests at these positions, of which the first have the tokens of `unfinished`."""
  prompts = stream.prompts.gather(stream.rows(position), np.asarray)
  options = GenerationOptions(prompt_index=position)
  requests = generate.make_requests(prompts, decode_config(sampler), options)
  for i, count in enumerate(unfinished.count):
    tokens = (unfinished.ids, unfinished.logprob, unfinished.sample_logprob)
    response = Partial(*(x[i, :count] for x in tokens))
    requests[i] = dataclasses.replace(requests[i], response=response)
  return requests


def _responses(
  generated: Generated, position: np.ndarray, unfinished: Responses, step: int
) -> Responses:
  """Returns the generated responses, of which the first went on from `unfinished`."""
  result, began = generated.result, np.full(len(position), step)
  # A response without tokens has waited, and begins now.
  began[: len(unfinished.began)] = np.where(unfinished.count > 0, unfinished.began, step)
  return Responses(
    position=position,
    began=began,
    count=result.response_mask.sum(axis=1),
    is_done=generated.done,
    finished=result.finished,
    non_finite=result.non_finite,
    ids=result.response_ids,
    logprob=result.logprob,
    sample_logprob=result.sample_logprob,
  )


def _result(responses: Responses) -> GenerationResult:
  return GenerationResult(
    response_ids=responses.ids,
    response_mask=np.arange(responses.ids.shape[1]) < responses.count[:, None],
    finished=responses.finished,
    logprob=responses.logprob,
    sample_logprob=responses.sample_logprob,
    non_finite=responses.non_finite,
  )


def _no_responses(stream: Stream) -> Responses:
  """Returns B rows that only fill up."""
  shape = stream.batch, stream.max_tokens
  integers, flags = np.zeros(shape[0], np.int32), np.zeros(shape[0], bool)
  ids, logprob = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
  return Responses(integers - 1, integers, integers, *[flags] * 3, ids, logprob, logprob)


def _fill_up(responses: Responses, stream: Stream) -> Responses:
  """Returns the responses in B rows."""

  def join(x, empty):
    return np.concatenate([x, empty[len(x) :]]).astype(empty.dtype)

  return Responses(*map(join, responses, _no_responses(stream)))


def _recompute(
  left: Responses, older: np.ndarray, stream: Stream, mesh: Mesh, recompute: Recompute
) -> Responses:
  """Replaces the log-probs of all tokens but the first `older` of each response."""
  full = _fill_up(left, stream)
  prompts = stream.prompts.gather(stream.rows(np.maximum(full.position, 0)), np.asarray)
  length = np.where(full.position >= 0, prompts.prompt_length + full.count, 0)
  logprob = recompute(place_arrays(prompts, _result(full), mesh), length)[: len(older)]
  column = np.arange(stream.max_tokens)
  is_new = (older[:, None] <= column) & (column < left.count[:, None])
  return left._replace(logprob=np.where(is_new, logprob, left.logprob))


def _place(cursor: int, responses: Responses, stream: Stream, mesh: Mesh) -> Carried:
  """Returns the state on the devices."""
  carried = Carried(np.int32(cursor), _fill_up(responses, stream))
  return jax.device_put(carried, sharding.replicated(mesh))


def _join(first: Responses, second: Responses) -> Responses:
  return Responses(*map(np.concatenate, zip(first, second, strict=True)))
