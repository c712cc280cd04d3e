"""Counts the decoding steps of rollouts that carry responses, against those that wait for all.

The host's scheduler runs as it does in training; the programs on the devices are replaced by the
lengths that responses would have, log-normal as those of chat data. A step of few live rows costs
less than one of many, so that the ratio of steps bounds that of times.
"""

import argparse
import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np

from segjax.config.settings import RolloutSettings
from segjax.data.batches import Prompts
from segjax.data.ragged import Ragged
from segjax.data.sources import Rows
from segjax.model import generate
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import make_mesh
from segjax.plan.lengths import draw_lengths
from segjax.plan.rollout_counts import CountedPrograms
from segjax.report.console import table
from segjax.train import carry
from segjax.train.rollout import RolloutSampler, rollout

_STOP = 0
_NETWORK = LlamaConfig(
  vocab_size=256,
  hidden_size=16,
  intermediate_size=32,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=8,
  max_position_embeddings=1 << 20,
)
_WARM_UP = 3  # steps before the share of carried responses is steady


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  flag = command.add_argument
  flag('--batch', type=int, default=1024, help='responses of a rollout')
  flag('--concurrent', type=_integers, default=[128, 256, 512, 1024], help='decoded at once')
  flag('--new', type=int, default=1024, help='limit of a response, in tokens')
  flag('--rollouts', type=int, default=8, help='number of rollouts, the first few not counted')


def run(batch: int, concurrent: list[int], new: int, rollouts: int) -> dict[str, Any]:
  """Runs rollouts with and without carrying, for each number of responses at once."""
  records = [_compare(batch, slots, new, rollouts) for slots in concurrent]
  table(
    f'rollouts of {batch} responses of up to {new} tokens: steps of the decoder in each',
    ('at once', 'waiting', 'carrying', 'ratio', 'slots used', 'prefilled', 'older', 'age'),
    [_line(record) for record in records],
  )
  return {'batch': batch, 'limit': new, 'rollouts': rollouts, 'settings': records}


def _line(record: dict[str, Any]) -> tuple[str, ...]:
  waiting, carrying = record['waiting'], record['carrying']
  return (
    f'{record["concurrent"]}',
    f'{waiting["steps"]:.0f}',
    f'{carrying["steps"]:.0f}',
    f'{record["ratio"]:.2f}',
    f'{waiting["slots_used"]:.0%}, {carrying["slots_used"]:.0%}',
    f'{waiting["prefilled"] / 1000:.0f} k, {carrying["prefilled"] / 1000:.0f} k',
    f'{record["older_share"]:.0%}',
    f'{record["age_mean"]:.2f}, up to {record["age_max"]:.0f}',
  )


def _compare(batch: int, slots: int, new: int, rollouts: int) -> dict[str, Any]:
  """Returns steps of a rollout and shares of the slots used, with and without carrying."""
  prompts, mesh = _prompts(batch), make_mesh(devices=jax.devices()[:1])
  settings = RolloutSettings(max_new_tokens=new, max_concurrent=slots)
  sampler = RolloutSampler(_NETWORK, settings, (_STOP,), mesh)
  stream = carry.Stream(prompts, 0, jax.random.key(0), batch, new)
  carried, metrics, counts = carry.nothing_carried(stream, mesh), [], []
  for number in range(rollouts):
    with _without_devices(new) as waiting:
      rows = stream.rows(np.arange(number * batch, (number + 1) * batch))
      key = jax.random.fold_in(stream.key, number)
      rollout(None, prompts.gather(rows, np.asarray), key, sampler)
    with _without_devices(new) as carrying:
      sampled = carry.rollout(None, carried, number, stream, sampler)
    carried = sampled.carried
    metrics.append(sampled.metrics)
    counts.append([(x.steps, x.tokens, x.prefilled) for x in (waiting, carrying)])
  steady, names = metrics[_WARM_UP:], ('waiting', 'carrying')
  record: dict[str, Any] = {'concurrent': slots}
  for name, means in zip(names, np.mean(counts[_WARM_UP:], axis=0).tolist(), strict=True):
    steps, tokens, prefilled = means
    used = tokens / steps / slots
    record[name] = {'steps': steps, 'slots_used': round(used, 4), 'prefilled': prefilled}
  return record | {
    'ratio': round(record['waiting']['steps'] / record['carrying']['steps'], 4),
    'older_share': round(np.mean([each['rollout/older_share'] for each in steady]), 4),
    'age_mean': round(np.mean([each['rollout/age_mean'] for each in steady]), 4),
    'age_max': max(each['rollout/age_max'] for each in steady),
  }


@contextlib.contextmanager
def _without_devices(max_tokens: int) -> Iterator[CountedPrograms]:
  """Replaces the programs on the devices while the context is active."""
  # Beyond the limit a response does not finish.
  lengths = functools.partial(_response_lengths, longest=max_tokens + 1)
  programs = CountedPrograms(lengths)
  with mock.patch.object(generate, '_DevicePrograms', lambda *_: programs):
    yield programs


def _response_lengths(keys: np.ndarray, longest: int) -> np.ndarray:
  return np.array([_response_length(*key, longest) for key in keys.tolist()])


@functools.cache
def _response_length(first: int, second: int, longest: int) -> int:
  # A function of the response: it ends after the same token, wherever it is decoded.
  length = np.random.default_rng((first, second)).lognormal(np.log(330), 0.7)
  return int(np.clip(length, 5, longest))


def _prompts(count: int) -> Prompts:
  """Returns prompts of the lengths of chat data."""
  lengths = draw_lengths('ultrafeedback', count, 1024, 1).prompt
  rows = [np.ones(length, np.int32) for length in lengths]
  return Prompts(
    tokens=Ragged.from_rows(rows, np.int32),
    row=np.arange(count),
    source=Rows([{}] * count, 'lengths'),
    group=np.arange(count),
    length=1024,
    pad_id=_STOP,
    counts={},
  )


def _integers(text: str) -> list[int]:
  return [int(part) for part in text.split(',')]
