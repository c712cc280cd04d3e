"""Times HF checkpoints to Orbax and back, compared with `cp` and `sync` of the same files.

Each conversion runs in a process of its own, whose memory is sampled once its imports are done.
The benchmark writes and removes a random checkpoint in the shape of a Llama 3.2. In the end the
checkpoint is loaded onto eight devices, as the jobs do it.
"""

import argparse
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

LIMIT_GB = 1.0  # limit of anonymous memory in addition to the imports
SHARD_BYTES = 10**9

_SHAPES = {  # hidden, MLP, layers, heads, head size, vocabulary; 8 key/value heads, tied
  'tiny': (64, 160, 2, 8, 8, 1000),
  '1b': (2048, 8192, 16, 32, 64, 128256),
  '3b': (3072, 8192, 28, 24, 128, 128256),
}
_INTERVAL = 0.005  # seconds between two samples of the memory


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  command.add_argument('--size', choices=_SHAPES, default='1b', help='size of Llama 3.2')
  command.add_argument('--repeats', type=int, default=3, help='number of runs of each, in turn')
  command.add_argument('--directory', default=None, help='a directory on the disk to measure')


def run(size: str, repeats: int, directory: str | None) -> dict:
  """Prints the table; returns the fields of the JSON line."""
  from benchmarks import load_sharded

  copy_seconds: list[float] = []
  records: dict[str, list[dict]] = {'import': [], 'export': []}
  with tempfile.TemporaryDirectory(prefix='segjax-convert-', dir=directory) as work:
    source, orbax, exported = (Path(work) / name for name in ('source', 'orbax', 'exported'))
    num_bytes = _write_source(source, size)
    for _ in range(repeats):
      copy_seconds.append(_copy(source, Path(work) / 'copy'))
      records['import'].append(_convert('import', source, orbax))
      records['export'].append(_convert('export', orbax, exported))
      assert _same_weights(source, exported), 'the exported weights differ from the source'
      shutil.rmtree(orbax)
      shutil.rmtree(exported)
    sharded = load_sharded.measure(source)

  copy = statistics.median(copy_seconds)
  result = {'size': size, 'bytes': num_bytes, 'repeats': repeats, 'exact': True}
  result['cp'] = {'seconds': round(copy, 3), 'all': [round(s, 2) for s in copy_seconds]}
  result |= {name: _summary(each, copy) for name, each in records.items()}
  result['sharded'] = {
    'seconds': sharded['seconds'],
    'requested': sharded['requested'],
    'beyond_gb': round(sharded['beyond'] / 1e9, 3),
  }
  memory = [result[name]['anonymous_gb'] for name in records] + [result['sharded']['beyond_gb']]
  result['within_limit'] = max(memory) <= LIMIT_GB and sharded['requested'] == 1
  _print_table(result)
  return result


def _summary(records: list[dict], copy: float) -> dict:
  """Returns medians and peaks over all conversions of one direction; `copy` in seconds."""
  seconds = [record['seconds'] for record in records]
  median = statistics.median(seconds)
  busy = {key: statistics.median(r['busy'][key] for r in records) for key in records[0]['busy']}
  return {
    'seconds': round(median, 3),
    'all': [round(s, 2) for s in seconds],
    'percent_of_cp': round(100 * copy / median, 1),
    'anonymous_gb': round(max(record['anonymous'] for record in records) / 1e9, 3),
    'resident_gb': round(max(record['resident'] for record in records) / 1e9, 3),
    'shares_percent': {
      key: round(100 * value / sum(busy.values()), 1) for key, value in busy.items()
    },
  }


def _print_table(result: dict) -> None:
  from segjax.report.console import log, table

  gigabytes = result['bytes'] / 1e9
  copy = result['cp']['seconds']
  rows = [('cp and sync', f'{copy:.2f}', f'{gigabytes / copy:.2f}', '100', *[''] * 5)]
  for name in ('import', 'export'):
    record = result[name]
    rows.append(
      (
        *(name, f'{record["seconds"]:.2f}', f'{gigabytes / record["seconds"]:.2f}'),
        *(f'{record["percent_of_cp"]:.0f}', f'{record["anonymous_gb"]:.2f}'),
        f'{record["resident_gb"]:.2f}',
        *(f'{share:.0f}' for share in record['shares_percent'].values()),
      )
    )
  table(
    f'convert: {gigabytes:.2f} GB, bf16, median of {result["repeats"]}; peak memory above imports',
    ('', 's', 'GB/s', '% of cp', 'anon GB', 'RSS GB', 'read %', 'transpose %', 'write %'),
    rows,
  )
  sharded = result['sharded']
  log(
    f'onto 8 devices (2 x 4): {sharded["seconds"]:.2f} s, each byte read '
    f'{sharded["requested"]:g} times, {sharded["beyond_gb"]:.2f} GB in addition to the arrays'
  )


def _write_source(directory: Path, size: str) -> int:
  """Writes a checkpoint of random weights; returns the number of their bytes."""
  from segjax.hf import shards, tensor_names
  from segjax.hf.config import config_from_hf, config_to_hf

  keys = ('hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads')
  raw = dict(zip((*keys, 'head_dim', 'vocab_size'), _SHAPES[size], strict=True))
  raw |= {'model_type': 'llama', 'num_key_value_heads': 8, 'tie_word_embeddings': True}
  raw |= {'rope_theta': 5e5, 'max_position_embeddings': 131072}
  config = config_from_hf(raw)
  planned = shards.plan_shards(
    [(e, 'BF16') for e in tensor_names.tensor_mappings(config, 'language')], SHARD_BYTES
  )
  rng = np.random.default_rng(0)
  directory.mkdir(parents=True)
  with shards.ShardWriter(directory, planned) as files:
    for tensor in (tensor for shard in planned for tensor in shard):
      for start in range(0, tensor.num_bytes, 1 << 26):
        bits = np.frombuffer(rng.bytes(min(1 << 26, tensor.num_bytes - start)), np.uint16)
        # Sign and mantissa are random; the exponent is one of 8, so that all values are finite.
        files.write(tensor.name, start, bits & 0x83FF | 0x3C00)
  shards.write_json(directory / 'config.json', config_to_hf(config, 'language', dtype='bfloat16'))
  return shards.num_bytes(planned)


def _copy(source: Path, target: Path) -> float:
  """Returns the seconds that cp and sync take."""
  _settle(source)
  begin = time.perf_counter()
  subprocess.run(['cp', '-r', source, target], check=True)
  subprocess.run(['sync'], check=True)
  seconds = time.perf_counter() - begin
  shutil.rmtree(target)
  return seconds


def _settle(source: Path) -> None:
  """Writes what the kernel has buffered, and touches the memory that the page cache will use.

  A virtual machine that has returned free pages to its host writes to new ones several times
  slower; touching them first gives cp and the conversion the same start.
  """
  subprocess.run(['sync'], check=True)
  size = sum(file.stat().st_size for file in source.rglob('*') if file.is_file())
  np.zeros(size + (1 << 29), np.uint8)[:: 1 << 12] = 1


def _convert(direction: str, source: Path, target: Path) -> dict:
  """Runs one conversion in a process of its own; returns the record that it prints."""
  root = str(Path(__file__).resolve().parents[2])
  paths = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH', ''))))
  process = subprocess.run(
    [sys.executable, __file__, direction, source, target],
    env=os.environ | {'PYTHONPATH': paths},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(process.stdout.splitlines()[-1])


def _same_weights(source: Path, copy: Path) -> bool:
  names, copied = (
    sorted(file.name for file in directory.glob('*.safetensors*')) for directory in (source, copy)
  )
  return names == copied and all(filecmp.cmp(source / n, copy / n, shallow=False) for n in names)


class _Memory(threading.Thread):
  """Samples the memory of this process; `peak` is in bytes, above the memory at the start."""

  def __init__(self):
    super().__init__(daemon=True)
    self._start_memory, self._stopped = _memory(), threading.Event()
    self.peak = [0, 0]

  def run(self):
    while not self._stopped.wait(_INTERVAL):
      growth = [now - start for now, start in zip(_memory(), self._start_memory, strict=True)]
      self.peak = [max(pair) for pair in zip(self.peak, growth, strict=True)]

  def stop(self):
    self._stopped.set()
    self.join()


def _memory() -> tuple[int, int]:
  """Returns the anonymous bytes (RssAnon and RssShmem) and the resident bytes."""
  fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
  size = {key: 1024 * int(fields[key].split()[0]) for key in ('RssAnon', 'RssShmem', 'VmRSS')}
  return size['RssAnon'] + size['RssShmem'], size['VmRSS']


def _child(direction: str, source: str, target: str) -> None:
  """Converts; prints seconds, peaks of memory and seconds per activity as JSON."""
  from segjax import storage
  from segjax.hf import convert, orbax_stream, shards, tensor_slices

  busy = dict.fromkeys(('read', 'transpose', 'write'), 0.0)
  lock = threading.Lock()

  def timed(name, function, within=''):
    def wrapper(*args, **kwargs):
      begin = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        seconds = time.perf_counter() - begin
        with lock:
          busy[name] += seconds
          if within:
            busy[within] -= seconds

    return wrapper

  if direction == 'import':
    tensor_slices.transpose_into = timed('transpose', tensor_slices.transpose_into, within='read')
    tensor_slices.SliceReader.read = timed('read', tensor_slices.SliceReader.read, within='write')
    orbax_stream._write = timed('write', orbax_stream._write)
  else:
    orbax_stream._read_slice = timed('read', orbax_stream._read_slice)
    convert.transpose_into = timed('transpose', convert.transpose_into)
    shards.ShardWriter.write = timed('write', shards.ShardWriter.write)
  storage._sync = timed('write', storage._sync)

  _settle(Path(source))
  memory = _Memory()
  memory.start()
  begin = time.perf_counter()
  if direction == 'import':
    convert.import_checkpoint(source, target)
  else:
    convert.export_checkpoint(source, target, max_shard_bytes=SHARD_BYTES)
  seconds = time.perf_counter() - begin
  memory.stop()
  anonymous, resident = memory.peak
  record = {'seconds': seconds, 'anonymous': anonymous, 'resident': resident, 'busy': busy}
  print(json.dumps(record))


if __name__ == '__main__':
  _child(*sys.argv[1:])
