"""Decoding: tokens per second against `transformers.generate`, and the share of the roofline.

Both sides have the same random weights, prompts and lengths of responses, and run alternately;
greedy tokens are compared. Only tokens of responses count. The roofline knows no compute.
"""

import argparse
import contextlib
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.decode_backends import SIZES, Ours, Peer, Task, cores, make_config, make_task, timed

from segjax.hf.writer import save_checkpoint
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.report import timing
from segjax.report.console import log, table

COPIED_BYTES = 1 << 31  # to measure the bandwidth of an accelerator; 1/8 of it on a CPU

_DEFAULTS = {'1b': ([128], 512, 512), '8b': ([128], 512, 512)}  # batches, prompt, new tokens
_SIDES = ('ours', 'doubled', 'dynamic', 'static')
_QUIET = 0.3  # seconds before each timed run, in which idle threads of torch stop spinning
_PEERS = ('tiny', 'small')  # sizes that transformers takes part in


def add_flags(command: argparse.ArgumentParser) -> None:
  """The flags of `run`."""
  flag, switch = command.add_argument, argparse.BooleanOptionalAction
  flag('--shape', choices=SIZES, default='small', help='of the network; 1b, 8b: roofline only')
  flag('--batches', type=_integers, default=None, help='default 1,8,64,256; 1b, 8b: 128')
  flag('--prompt', type=int, default=None, help='tokens, default 64; 1b, 8b: 512')
  flag('--new', type=int, default=None, help='tokens, default 128; 1b, 8b: 512')
  flag('--repeats', type=int, default=5, help='alternations')
  flag('--ragged', action=switch, default=True, help='also a queue of ragged responses')
  flag('--ragged-new', type=int, default=256, help='tokens that the longest of them may have')
  flag('--static', action=switch, default=False, help="also transformers' static cache")
  flag('--doubled', action=switch, default=False, help='also ours with room for twice as many')
  flag('--roofline', action=switch, default=None, help='default: on accelerators')


def run(
  shape: str,
  batches: list[int] | None,
  prompt: int | None,
  new: int | None,
  repeats: int,
  ragged: bool,
  ragged_new: int,
  static: bool,
  doubled: bool,
  roofline: bool | None,
) -> dict:
  """Prints each measurement and a table; returns what the JSON line holds."""
  usual = _DEFAULTS.get(shape, ([1, 8, 64, 256], 64, 128))
  batches, prompt, new = batches or usual[0], prompt or usual[1], new or usual[2]
  ours = Ours(make_config(shape, prompt + 2 * max(new, ragged_new)))
  roofline = ours.is_accelerated if roofline is None else roofline
  kinds = ('equal', 'ragged') if ragged and shape in _PEERS else ('equal',)
  size = {'equal': new, 'ragged': ragged_new}
  tasks = [
    make_task(kind, batch, prompt, size[kind], ours.config) for batch in batches for kind in kinds
  ]
  result = {'shape': shape, 'prompt': prompt, 'new': new, 'ragged_new': ragged_new}
  result |= {'repeats': repeats, 'device': ours.device, 'cores': cores()}
  first = [_first_calls(task, ours) for task in tasks]  # before torch takes memory
  with _peers(shape, ours, static) as peers:
    result['tasks'] = [
      f | _alternate(task, ours, peers, repeats, doubled)
      for task, f in zip(tasks, first, strict=True)
    ]
  _print_table(f'decode, {shape}: medians of {repeats}, {ours.device}', result['tasks'])
  if roofline:
    equal = [task for task in tasks if task.is_greedy]
    result['roofline'] = _rooflines(equal, ours, repeats)
  return result


@contextlib.contextmanager
def _peers(shape: str, ours: Ours, static: bool):
  """The others by name, none where there is nobody to compare with."""
  missing = [name for name in ('torch', 'transformers') if not importlib.util.find_spec(name)]
  if shape not in _PEERS or ours.is_accelerated or missing:
    what = f'{missing[0]} is not installed' if missing else f'{shape} on {ours.device}'
    log(f'no ratios to transformers: {what}')
    yield {}
    return
  caches = ('dynamic', 'static') if static else ('dynamic',)
  with tempfile.TemporaryDirectory(prefix='segjax-decode-') as work:
    source = save_checkpoint(Path(work) / 'model', ours.params, ours.config, 'language')
    yield {cache: Peer(source, cache) for cache in caches}


def _first_calls(task: Task, ours: Ours) -> dict:
  """Seconds of the first call, which compiles, and the peak of memory in the second."""
  _, seconds = timed(ours, task)
  ours.forget_peak()
  _, again = timed(ours, task)
  peak = ours.peak_memory()
  log(f'{task!s:<20}first call {seconds:.2f} s, then {again:.2f} s; peak {peak / 1e9:.2f} GB')
  found = {'kind': task.kind, 'batch': task.batch, 'tokens': task.tokens}
  return found | {'first_call_seconds': round(seconds, 2), 'peak_gb': round(peak / 1e9, 3)}


def _alternate(task: Task, ours: Ours, peers: dict[str, Peer], repeats: int, doubled: bool) -> dict:
  """Runs all sides in turn; checks the tokens of the first turn."""
  sides: dict[str, Callable[[Task], object]] = {'ours': ours}
  if doubled and task.is_greedy:
    sides['doubled'] = functools.partial(ours, room=2)
  sides |= peers
  found = {}
  for name, side in sides.items():
    if name != 'ours':
      side(task)  # not timed
  seconds: dict[str, list[float]] = {name: [] for name in sides}
  compiled = timing.compiles()
  for turn in range(repeats):
    outs = {}
    for name, side in sides.items():
      time.sleep(_QUIET)
      outs[name], took = timed(side, task)
      seconds[name].append(took)
      log(f'{task!s:<20}{name:<9}{took:8.3f} s {task.tokens / took:9.0f} tokens/s')
    assert outs['ours'].response_mask.sum() == task.tokens
    if turn == 0 and task.is_greedy:
      for name, peer in peers.items():
        found[f'same_{name}'] = peer.check(task, outs['ours'], outs[name][0])
  found['compiles'] = timing.compiles() - compiled
  middle = {name: statistics.median(each) for name, each in seconds.items()}
  for name, took in middle.items():
    found[name] = {
      'seconds': round(took, 4),
      'all': [round(each, 3) for each in seconds[name]],
      'tokens_per_second': round(task.tokens / took, 1),
      'times_as_long': round(took / middle['ours'], 3),
    }
  return found


def _rooflines(tasks: list[Task], ours: Ours, repeats: int) -> list[dict]:
  """Steps after the first chunk against the time to read what they must."""
  bandwidth = _bandwidth(COPIED_BYTES if ours.is_accelerated else COPIED_BYTES // 8)
  bandwidth *= ours.mesh.size
  log(f'copying moves {bandwidth / 1e9:.0f} GB/s')
  found = []
  for task in tasks:
    start = min(16, task.new - 1)  # so prefill, first steps and the host's start cancel
    few = np.full_like(task.limits, start)
    ours(task), ours(task, few)
    turns = [(timed(ours, task)[1], timed(ours, task, few)[1]) for _ in range(repeats)]
    whole, begun = (statistics.median(each) for each in zip(*turns, strict=True))
    num_bytes = _bytes_read(ours.config, task, start)
    share = 100 * num_bytes / bandwidth / (whole - begun)
    step = 1e3 * (whole - begun) / (task.new - start)
    log(f'{task!s:<20}{step:.2f} ms a step, {share:.0f} % of the roofline')
    record = {'batch': task.batch, 'gb_per_second': round(bandwidth / 1e9, 1)}
    record |= {'milliseconds_per_step': round(step, 3), 'percent': round(share, 1)}
    record['percent_with_prefill'] = round(
      100 * _bytes_read(ours.config, task, 0) / bandwidth / whole, 1
    )
    found.append(record)
  return found


def _bytes_read(config: LlamaConfig, task: Task, start: int) -> float:
  """By steps `start` to the last: weights, but of the embedding some rows only; filled cache."""
  embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
  weights = num_parameters(config) - embedding
  heads_size = config.num_key_value_heads * config.head_dim
  per_position = 2 * config.num_hidden_layers * heads_size
  steps = np.arange(start, task.new)
  positions = task.batch * (task.prompts.shape[1] + steps + 1).sum()
  return jnp.dtype(config.dtype).itemsize * (weights * len(steps) + per_position * positions)


def _bandwidth(num_bytes: int) -> float:
  """Bytes per second that a device reads and writes when it copies."""
  source = jnp.zeros(num_bytes // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy(source).block_until_ready()
  seconds = [timed(lambda: copy(source).block_until_ready())[1] for _ in range(10)]
  return 2 * num_bytes / statistics.median(seconds)


def _print_table(title: str, tasks: list[dict]) -> None:
  rows = []
  for task in tasks:
    for name in (name for name in _SIDES if name in task):
      side, what = task[name], f'{task["kind"]}, batch {task["batch"]}'
      row = (f'{side["seconds"]:.3f}', f'{side["tokens_per_second"]:.0f}')
      row += (f'{side["times_as_long"]:.2f}',)
      if name == 'ours':
        row += (f'{task["first_call_seconds"]:.1f}', f'{task["peak_gb"]:.2f}')
        row += (str(task['compiles']),)
      rows.append((f'{what}: {name}', *row, *[''] * (6 - len(row))))
  columns = ('', 's', 'tokens/s', 'times as long', 'first call s', 'peak GB', 'compiles')
  table(title, columns, rows)


def _integers(text: str) -> list[int]:
  return [int(part) for part in text.split(',')]
