"""Times decoding: tokens per second, compared with transformers and with the memory roofline.

segjax and transformers have the same random weights, prompts and response lengths, and run in turn;
greedy tokens are compared. Only response tokens count. The roofline is that of the memory
bandwidth; it does not count compute.
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
from benchmarks.decode_backends import (
  SIZES,
  Segjax,
  Task,
  Transformers,
  cores,
  make_config,
  make_task,
  timed,
)

from segjax.hf.writer import save_checkpoint
from segjax.model.llama import LlamaConfig, num_parameters
from segjax.report import timing
from segjax.report.console import log, table

COPIED_BYTES = 1 << 31  # copied to measure the bandwidth of an accelerator; on a CPU 1/8 of it

_DEFAULTS = {'1b': ([128], 512, 512), '8b': ([128], 512, 512)}  # batches, prompt, new tokens
_BACKENDS = ('segjax', 'doubled', 'dynamic', 'static')
_PAUSE = 0.3  # seconds before each timed run, in which idle threads of torch stop spinning
_COMPARED = ('tiny', 'small')  # sizes that transformers runs, too


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  flag, switch = command.add_argument, argparse.BooleanOptionalAction
  flag('--shape', choices=SIZES, default='small', help='size of the network; 1b, 8b: roofline only')
  flag('--batches', type=_integers, default=None, help='default 1,8,64,256; 1b, 8b: 128')
  flag('--prompt', type=int, default=None, help='tokens, default 64; 1b, 8b: 512')
  flag('--new', type=int, default=None, help='tokens, default 128; 1b, 8b: 512')
  flag('--repeats', type=int, default=5, help='number of runs of each, in turn')
  flag('--ragged', action=switch, default=True, help='also time responses of different lengths')
  flag('--ragged-new', type=int, default=256, help='longest of these, in tokens')
  flag('--static', action=switch, default=False, help="also time transformers' static cache")
  flag('--doubled', action=switch, default=False, help='also time a cache of twice the length')
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
  """Prints each measurement and a table; returns the fields of the JSON line.

  Its parameters are the flags.
  """
  defaults = _DEFAULTS.get(shape, ([1, 8, 64, 256], 64, 128))
  batches, prompt, new = batches or defaults[0], prompt or defaults[1], new or defaults[2]
  decoder = Segjax(make_config(shape, prompt + 2 * max(new, ragged_new)))
  roofline = decoder.is_accelerated if roofline is None else roofline
  kinds = ('equal', 'ragged') if ragged and shape in _COMPARED else ('equal',)
  size = {'equal': new, 'ragged': ragged_new}
  tasks = [
    make_task(kind, batch, prompt, size[kind], decoder.config)
    for batch in batches
    for kind in kinds
  ]
  result = {'shape': shape, 'prompt': prompt, 'new': new, 'ragged_new': ragged_new}
  result |= {'repeats': repeats, 'device': decoder.device, 'cores': cores()}
  first = [_first_calls(task, decoder) for task in tasks]  # before torch takes memory
  with _peers(shape, decoder, static) as peers:
    result['tasks'] = [
      f | _alternate(task, decoder, peers, repeats, doubled)
      for task, f in zip(tasks, first, strict=True)
    ]
  _print_table(f'decode, {shape}: medians of {repeats}, {decoder.device}', result['tasks'])
  if roofline:
    equal = [task for task in tasks if task.is_greedy]
    result['roofline'] = _rooflines(equal, decoder, repeats)
  return result


@contextlib.contextmanager
def _peers(shape: str, decoder: Segjax, static: bool):
  """Yields the backends to compare with, by name; none where transformers cannot run."""
  missing = [name for name in ('torch', 'transformers') if not importlib.util.find_spec(name)]
  if shape not in _COMPARED or decoder.is_accelerated or missing:
    reason = f'{missing[0]} is not installed' if missing else f'{shape} on {decoder.device}'
    log(f'not compared with transformers: {reason}')
    yield {}
    return
  caches = ('dynamic', 'static') if static else ('dynamic',)
  with tempfile.TemporaryDirectory(prefix='segjax-decode-') as work:
    source = save_checkpoint(Path(work) / 'model', decoder.params, decoder.config, 'language')
    yield {cache: Transformers(source, cache) for cache in caches}


def _first_calls(task: Task, decoder: Segjax) -> dict:
  """Returns the seconds of the first call, which compiles, and the peak memory of the second."""
  _, seconds = timed(decoder, task)
  decoder.reset_peak_memory()
  _, second = timed(decoder, task)
  peak = decoder.peak_memory()
  log(f'{task!s:<20}first call {seconds:.2f} s, second {second:.2f} s; peak {peak / 1e9:.2f} GB')
  record = {'kind': task.kind, 'batch': task.batch, 'tokens': task.tokens}
  return record | {'first_call_seconds': round(seconds, 2), 'peak_gb': round(peak / 1e9, 3)}


def _alternate(
  task: Task, decoder: Segjax, peers: dict[str, Transformers], repeats: int, doubled: bool
) -> dict:
  """Runs all backends in turn; checks the tokens of the first turn."""
  backends: dict[str, Callable[[Task], object]] = {'segjax': decoder}
  if doubled and task.is_greedy:
    backends['doubled'] = functools.partial(decoder, room=2)
  backends |= peers
  record = {}
  for name, backend in backends.items():
    if name != 'segjax':
      backend(task)  # warm-up
  seconds: dict[str, list[float]] = {name: [] for name in backends}
  compiled = timing.compiles()
  for turn in range(repeats):
    outputs = {}
    for name, backend in backends.items():
      time.sleep(_PAUSE)
      outputs[name], took = timed(backend, task)
      seconds[name].append(took)
      log(f'{task!s:<20}{name:<9}{took:8.3f} s {task.tokens / took:9.0f} tokens/s')
    assert outputs['segjax'].response_mask.sum() == task.tokens
    if turn == 0 and task.is_greedy:
      for name, peer in peers.items():
        record[f'same_{name}'] = peer.check(task, outputs['segjax'], outputs[name][0])
  record['compiles'] = timing.compiles() - compiled
  medians = {name: statistics.median(each) for name, each in seconds.items()}
  for name, took in medians.items():
    record[name] = {
      'seconds': round(took, 4),
      'all': [round(each, 3) for each in seconds[name]],
      'tokens_per_second': round(task.tokens / took, 1),
      'relative_time': round(took / medians['segjax'], 3),
    }
  return record


def _rooflines(tasks: list[Task], decoder: Segjax, repeats: int) -> list[dict]:
  """Compares the steps after the first chunk with the time to read weights and cache."""
  bandwidth = _bandwidth(COPIED_BYTES if decoder.is_accelerated else COPIED_BYTES // 8)
  bandwidth *= decoder.mesh.size
  log(f'memory bandwidth: {bandwidth / 1e9:.0f} GB/s')
  records = []
  for task in tasks:
    # The difference of two runs excludes prefill and the start on the host.
    start = min(16, task.new - 1)
    few_tokens = np.full_like(task.limits, start)
    decoder(task), decoder(task, few_tokens)
    turns = [(timed(decoder, task)[1], timed(decoder, task, few_tokens)[1]) for _ in range(repeats)]
    all_steps, first_steps = (statistics.median(each) for each in zip(*turns, strict=True))
    num_bytes = _bytes_read(decoder.config, task, start)
    share = 100 * num_bytes / bandwidth / (all_steps - first_steps)
    step = 1e3 * (all_steps - first_steps) / (task.new - start)
    log(f'{task!s:<20}{step:.2f} ms per step, {share:.0f} % of the roofline')
    record = {'batch': task.batch, 'gb_per_second': round(bandwidth / 1e9, 1)}
    record |= {'milliseconds_per_step': round(step, 3), 'percent': round(share, 1)}
    record['percent_with_prefill'] = round(
      100 * _bytes_read(decoder.config, task, 0) / bandwidth / all_steps, 1
    )
    records.append(record)
  return records


def _bytes_read(config: LlamaConfig, task: Task, start: int) -> float:
  """Returns the bytes that the steps from `start` on read: weights and the filled cache.

  Of an embedding that is not tied, a step reads a few rows only.
  """
  embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
  weights = num_parameters(config) - embedding
  heads_size = config.num_key_value_heads * config.head_dim
  per_position = 2 * config.num_hidden_layers * heads_size
  steps = np.arange(start, task.new)
  positions = task.batch * (task.prompts.shape[1] + steps + 1).sum()
  return jnp.dtype(config.dtype).itemsize * (weights * len(steps) + per_position * positions)


def _bandwidth(num_bytes: int) -> float:
  """Returns the bytes per second that a device reads and writes when it copies."""
  source = jnp.zeros(num_bytes // 4, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy(source).block_until_ready()
  seconds = [timed(lambda: copy(source).block_until_ready())[1] for _ in range(10)]
  return 2 * num_bytes / statistics.median(seconds)


def _print_table(title: str, tasks: list[dict]) -> None:
  rows = []
  for task in tasks:
    for name in (name for name in _BACKENDS if name in task):
      record, label = task[name], f'{task["kind"]}, batch {task["batch"]}'
      row = (f'{record["seconds"]:.3f}', f'{record["tokens_per_second"]:.0f}')
      row += (f'{record["relative_time"]:.2f}',)
      if name == 'segjax':
        row += (f'{task["first_call_seconds"]:.1f}', f'{task["peak_gb"]:.2f}')
        row += (str(task['compiles']),)
      rows.append((f'{label}: {name}', *row, *[''] * (6 - len(row))))
  columns = ('', 's', 'tokens/s', 'relative time', 'first call s', 'peak GB', 'compiles')
  table(title, columns, rows)


def _integers(text: str) -> list[int]:
  return [int(part) for part in text.split(',')]
