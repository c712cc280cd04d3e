"""Times the policy update: tokens per second, model FLOPs utilisation, and the gain of packing.

Three minibatches are timed in turn: full rows; ragged rows (their mean length is a quarter of the
maximum), padded; the same ragged rows, packed into pieces of as many tokens. Only real tokens
count. Utilisation is the model's FLOPs (forward and backward, without remat) over the FLOP/s that
matrix products reach here. On a chip that `segjax plan` knows, the time that a plan gives to the
program stands beside the measured one; with `--trace`, a profile of an update of each is written.

With `--other`, the same minibatches are timed in another checkout too, in turn with this one; the
ratio is the median over the rounds.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import PPO, Network, RewardShaping, Segmentation
from segjax.data.packing_plan import PieceBound, packing_efficiency, plan_level_packing
from segjax.model import sharding
from segjax.model.attention import select_implementation, skips_other_segments
from segjax.model.chips import chip_for_kind
from segjax.model.flops import attended_pairs, forward_flops
from segjax.model.heads import init_params
from segjax.model.llama import LlamaConfig, make_config, num_parameters
from segjax.model.mesh import batch_devices, make_mesh
from segjax.plan.hlo_cost import program_cost
from segjax.plan.update_calls import attended_share
from segjax.report.console import log, table
from segjax.train.optimizer import init_state
from segjax.train.ppo_step import Minibatch, policy_step
from segjax.train.recipe import PPORecipe
from segjax.train.segmenter import Segmenter
from segjax.types import Experience, Rollout, Segments

SIZES = {
  'tiny': Network(80, 32, 48, 2, 4, 2, 128),
  'small': Network(4096, 256, 1024, 4, 8, 2, 4096),
  '1b': Network(128_256, 2048, 8192, 16, 32, 8, 4096, tie_word_embeddings=True),
  '3b': Network(128_256, 3072, 8192, 28, 24, 8, 4096, tie_word_embeddings=True),
  '8b': Network(128_256, 4096, 14_336, 32, 32, 8, 4096),
}
TASKS = ('full', 'padded', 'packed')
PROMPT_SHARE = 4  # a prompt takes 1 / PROMPT_SHARE of a full row


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  command.add_argument('--shape', choices=SIZES, default='small', help='size of the network')
  command.add_argument('--layers', type=int, default=None, help='default: of the size')
  command.add_argument('--batch', type=int, default=32, help='sequences per minibatch')
  command.add_argument('--micro-batch', type=int, default=4, help='rows per forward pass')
  command.add_argument('--length', type=int, default=512, help='length of the longest sequence')
  command.add_argument('--dtype', choices=('float32', 'bfloat16'), default=None)
  command.add_argument('--remat', default='full')
  command.add_argument('--attention', default='auto')
  command.add_argument('--repeats', type=int, default=5)
  command.add_argument('--trace', type=Path, default=None, help='directory for profiles')
  command.add_argument('--other', type=Path, default=None, help='checkout to compare with')
  command.add_argument('--rounds', type=int, default=3, help='of both checkouts, in turn')


def run(other: Path | None, rounds: int, **flags: Any) -> dict:
  """Prints the table; returns the fields of the JSON line. Its parameters are the flags."""
  return _measure(**flags) if other is None else _compare(other, rounds, flags)


def _compare(other: Path, rounds: int, flags: dict[str, Any]) -> dict:
  """Returns the last records of both checkouts, and how many times as fast this one is."""
  arguments = [f'--{k.replace("_", "-")}={v}' for k, v in flags.items() if v is not None]
  checkouts = Path(__file__).resolve().parents[2], other.resolve()
  ratios = {name: [] for name in TASKS}
  for _ in range(rounds):
    ours, theirs = (_record_of(checkout, arguments) for checkout in checkouts)
    for name in TASKS:
      ratios[name].append(theirs[name]['seconds'] / ours[name]['seconds'])
  ratios = {name: round(statistics.median(x), 3) for name, x in ratios.items()}
  rows = [
    (name, *(f'{x[name]["seconds"]} s, {x[name]["percent_of_peak"]} %' for x in (ours, theirs)))
    for name in TASKS
  ]
  table(
    'policy update, a minibatch and its % of peak, last round; ratio: median of the rounds',
    ('rows', 'this checkout', str(other), 'ratio'),
    [(*row, f'{ratios[row[0]]:.2f}') for row in rows],
  )
  return ours | {'other': theirs, 'times_as_fast': ratios}


def _record_of(checkout: Path, arguments: list[str]) -> dict:
  command = [sys.executable, str(checkout / 'tools' / 'bench.py'), 'train', *arguments]
  environment = os.environ | {'PYTHONPATH': str(checkout)}
  done = subprocess.run(
    command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True
  )
  return json.loads(done.stdout.splitlines()[-1])


def _measure(
  shape: str,
  layers: int | None,
  batch: int,
  micro_batch: int,
  length: int,
  dtype: str | None,
  remat: str,
  attention: str,
  repeats: int,
  trace: Path | None,
) -> dict:
  """Prints the table of this checkout and returns its record; the parameters are the flags."""
  device = jax.devices()[0]
  dtype = dtype or ('float32' if device.platform == 'cpu' else 'bfloat16')
  config, mesh = _network(shape, layers, dtype, remat, attention), make_mesh()
  ppo = PPO(minibatch_size=batch, micro_batch_size=micro_batch)
  static = {
    'recipe': PPORecipe(
      *[config] * 4, Segmenter(Segmentation()), 'even_split', RewardShaping(), ppo
    ),
    'total_steps': 10_000,
  }
  full = np.full(batch, length)
  ragged = _ragged(batch, length)
  devices = batch_devices(mesh)
  widens = skips_other_segments(config.attention, length, config.head_dim)
  bound = PieceBound(devices, max(micro_batch // devices, 1) * length, length, widens)
  packing = plan_level_packing(ragged, bound)
  tasks = {'full': (full, None), 'padded': (ragged, None), 'packed': (ragged, packing)}
  with jax.set_mesh(mesh):
    state = _state(config, ppo, mesh)
    experiences = {name: (_experience(x, length, mesh), plan) for name, (x, plan) in tasks.items()}
    seconds, losses = {name: [] for name in tasks}, {}
    rows, compiled = np.arange(batch), policy_step._cache_size()
    for _ in range(repeats + 1):  # the first of each compiles
      for name, (experience, plan) in experiences.items():
        begin = time.perf_counter()
        minibatch = Minibatch(experience, rows, plan)
        state, metrics = policy_step(state, minibatch, np.float32(0), **static)
        losses[name] = float(metrics.mean['loss'])
        seconds[name].append(time.perf_counter() - begin)
    compiles = policy_step._cache_size() - compiled
    planned = {}
    for name, (experience, plan) in experiences.items():
      arguments = state, Minibatch(experience, rows, plan), np.float32(0)
      planned[name] = _planned_seconds(arguments, static, mesh)
      if trace:
        with jax.profiler.trace(trace / name):
          state, metrics = policy_step(*arguments, **static)
          jax.block_until_ready(metrics)
  peak = _matmul_peak(dtype) * mesh.size
  return _report(
    config, device, tasks, seconds, planned, peak, compiles, packing_efficiency(packing)
  )


def _planned_seconds(arguments: tuple, static: dict[str, Any], mesh: Mesh) -> float:
  """Returns the seconds that `segjax plan` gives to the update; nan on a chip unknown to it."""
  if (chip := chip_for_kind(mesh.devices.flat[0].device_kind)) is None:
    return math.nan
  plan = arguments[1].packing
  text = policy_step.lower(*arguments, **static).compile().as_text()
  if plan is None:
    return program_cost(text, chip, [0] * mesh.size).seconds
  attended = attended_share([plan], mesh)
  return program_cost(text, chip, [0] * mesh.size, plan.num_pieces, attended=attended).seconds


def _network(shape: str, layers: int | None, dtype: str, remat: str, attention: str) -> LlamaConfig:
  size = SIZES[shape]
  config = make_config(
    dataclasses.replace(size, num_hidden_layers=layers or size.num_hidden_layers)
  )
  name, reason = select_implementation(attention, jax.devices()[0].platform, dtype, config.head_dim)
  if reason:
    log(reason)
  return dataclasses.replace(config, dtype=dtype, remat=remat, attention=name)


def _state(config: LlamaConfig, ppo: PPO, mesh):
  def make(key):
    return sharding.constrain_tree(init_params(key, config, 'language'))

  return init_state(jax.jit(make)(jax.random.key(0)), ppo.policy_optimizer, 10_000)


def _ragged(batch: int, longest: int) -> np.ndarray:
  """Returns exponentially distributed lengths up to `longest`, of mean `longest` / 4."""
  shortest = longest // PROMPT_SHARE // 4 + 2
  drawn = np.random.default_rng(0).exponential(1.0, batch)

  def lengths(scale):
    clipped = np.clip((drawn * scale).astype(int), shortest, longest)
    clipped[np.argmax(drawn)] = longest
    return clipped

  return min(map(lengths, range(1, longest)), key=lambda x: abs(x.mean() - longest / 4))


def _experience(lengths: np.ndarray, longest: int, mesh) -> Experience:
  """Returns the experience of a rollout with these lengths; all other numbers are random."""
  rng, rows = np.random.default_rng(1), len(lengths)
  prompt = np.maximum(lengths // PROMPT_SHARE, 1)
  width = longest // PROMPT_SHARE

  def to_devices(x):
    return sharding.place_batch(x, mesh)

  def tokens(size):
    return to_devices(rng.integers(1, 80, (rows, size)).astype(np.int32))

  mask = to_devices(np.arange(longest - width) < (lengths - prompt)[:, None])
  floats = to_devices(rng.normal(size=mask.shape).astype(np.float32))
  return Experience(
    rollout=Rollout(
      prompt_ids=tokens(width),
      prompt_length=to_devices(prompt.astype(np.int32)),
      response_ids=tokens(longest - width),
      response_mask=mask,
      finished=to_devices(np.ones(rows, bool)),
      old_logprob=floats,
    ),
    **dict.fromkeys(
      ('ref_logprob', 'ref_entropy', 'score', 'value', 'reward', 'advantage', 'return_'), floats
    ),
    segments=Segments(mask, mask, tokens(longest - width), to_devices(np.ones(rows, np.int32))),
    value_mask=mask,
  )


def _matmul_peak(dtype: str) -> float:
  """Returns the FLOP/s of a large square product on one device: the best of ten."""
  size = 2048 if jax.devices()[0].platform == 'cpu' else 8192
  x = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(x, x))
  best = np.inf
  for _ in range(10):
    begin = time.perf_counter()
    jax.block_until_ready(product(x, x))
    best = min(best, time.perf_counter() - begin)
  return 2 * size**3 / best


def _report(config, device, tasks, seconds, planned, peak, compiles, efficiency) -> dict:
  record, table_rows = {}, []
  for name, (lengths, _) in tasks.items():
    median = statistics.median(seconds[name][1:])
    pairs = sum(attended_pairs(float(n)) for n in lengths)
    flops = 3 * forward_flops(config, float(lengths.sum()), pairs)
    record[name] = {
      'seconds': round(median, 4),
      'first_call_seconds': round(seconds[name][0], 2),
      'tokens': int(lengths.sum()),
      'tokens_per_second': round(lengths.sum() / median, 1),
      'percent_of_peak': round(100 * flops / median / peak, 1),
    }
    if not math.isnan(planned[name]):
      record[name]['planned_seconds'] = round(planned[name], 4)
    table_rows.append((name, *map(str, record[name].values())))
  speedup = record['padded']['seconds'] / record['packed']['seconds']
  title = (
    f'policy update, {num_parameters(config) / 1e6:,.0f} M, {config.dtype}, {device.device_kind}'
  )
  headers = 'rows', 's', 'first call s', 'tokens', 'tokens/s', '% of peak', 'planned s'
  table(title, headers[: len(table_rows[0])], table_rows)
  log(f'matrix products reach {peak / 1e12:.3f} TFLOP/s; {config.attention} attention')
  log(f'packing is {speedup:.2f} times as fast as padding; rows are {efficiency:.0%} full')
  return record | {
    'parameters': num_parameters(config),
    'device': device.device_kind,
    'dtype': config.dtype,
    'attention': config.attention,
    'peak_flops': peak,
    'packing_speedup': round(speedup, 3),
    'packing_efficiency': round(efficiency, 3),
    'compiles': compiles,
  }
