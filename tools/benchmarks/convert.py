"""HF checkpoints to Orbax and back, against `cp` and `sync` of the same files on the same disk.

Each conversion runs in a process of its own, whose memory is watched from when its imports are
done. The checkpoint is random, of the shape of a Llama 3.2, written and removed by the benchmark.
At last it is loaded onto eight devices, as jobs load it.
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

LIMIT_GB = 1.0  # of anonymous memory above the process after its imports
SHARD_BYTES = 10**9

_SHAPES = {  # hidden, MLP, layers, heads, head size, vocabulary; 8 key/value heads, tied
  'tiny': (64, 160, 2, 8, 8, 1000),
  '1b': (2048, 8192, 16, 32, 64, 128256),
  '3b': (3072, 8192, 28, 24, 128, 128256),
}
_INTERVAL = 0.005  # seconds between looks at the memory


def add_flags(command: argparse.ArgumentParser) -> None:
  """The flags of `run`."""
  command.add_argument('--size', choices=_SHAPES, default='1b', help='of Llama 3.2')
  command.add_argument('--repeats', type=int, default=3, help='alternations with cp')
  command.add_argument('--directory', default=None, help='on the disk to be measured')


def run(size: str, repeats: int, directory: str | None) -> dict:
  """Prints the table; returns what the JSON line holds."""
  from benchmarks import load_sharded

  from segjax.report.console import log, table

  seconds: dict[str, list[float]] = {'cp': [], 'import': [], 'export': []}
  reports: dict[str, list[dict]] = {'import': [], 'export': []}
  with tempfile.TemporaryDirectory(prefix='segjax-convert-', dir=directory) as work:
    source = Path(work) / 'source'
    num_bytes = _write_source(source, size)
    for _ in range(repeats):
      seconds['cp'].append(_copy(source, Path(work) / 'copy'))
      for what, before, after in (('import', 'source', 'stored'), ('export', 'stored', 'exported')):
        reports[what].append(_convert(what, Path(work) / before, Path(work) / after))
        seconds[what].append(reports[what][-1]['seconds'])
      exact = _same_weights(source, Path(work) / 'exported')
      assert exact, 'the exported weights differ from the source'
      for name in ('stored', 'exported'):
        shutil.rmtree(Path(work) / name)
    spread = load_sharded.measure(source)

  copy = statistics.median(seconds['cp'])
  rows = [('cp and sync', f'{copy:.2f}', f'{num_bytes / 1e9 / copy:.2f}', '100', *[''] * 5)]
  result = {'size': size, 'bytes': num_bytes, 'repeats': repeats, 'exact': exact}
  result['cp'] = {'seconds': round(copy, 3), 'all': [round(s, 2) for s in seconds['cp']]}
  for what, found in reports.items():
    took = statistics.median(seconds[what])
    anonymous, resident = (max(r[key] for r in found) for key in ('anonymous', 'resident'))
    busy = {key: statistics.median(r['busy'][key] for r in found) for key in found[0]['busy']}
    shares = {key: 100 * value / sum(busy.values()) for key, value in busy.items()}
    rows.append(
      (
        *(what, f'{took:.2f}', f'{num_bytes / 1e9 / took:.2f}', f'{100 * copy / took:.0f}'),
        *(f'{anonymous / 1e9:.2f}', f'{resident / 1e9:.2f}'),
        *(f'{share:.0f}' for share in shares.values()),
      )
    )
    result[what] = {
      'seconds': round(took, 3),
      'all': [round(s, 2) for s in seconds[what]],
      'percent_of_cp': round(100 * copy / took, 1),
      'anonymous_gb': round(anonymous / 1e9, 3),
      'resident_gb': round(resident / 1e9, 3),
      'shares_percent': {key: round(share, 1) for key, share in shares.items()},
    }
  result['sharded'] = {
    'seconds': spread['seconds'],
    'requested': spread['requested'],
    'beyond_gb': round(spread['beyond'] / 1e9, 3),
  }
  held = [result[what]['anonymous_gb'] for what in reports] + [result['sharded']['beyond_gb']]
  result['within_limit'] = max(held) <= LIMIT_GB and spread['requested'] == 1
  table(
    f'convert: {num_bytes / 1e9:.2f} GB, bf16, median of {repeats}; memory above the imports, peak',
    ('', 's', 'GB/s', '% of cp', 'anon GB', 'RSS GB', 'read %', 'transpose %', 'write %'),
    rows,
  )
  log(
    f'onto 8 devices (2 x 4): {spread["seconds"]:.2f} s, each byte requested '
    f'{spread["requested"]:g} times, {spread["beyond"] / 1e9:.2f} GB held beyond the arrays'
  )
  return result


def _write_source(directory: Path, size: str) -> int:
  """A checkpoint of random weights; returns how many bytes of them there are."""
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
    for piece in (piece for shard in planned for piece in shard):
      for start in range(0, piece.num_bytes, 1 << 26):
        bits = np.frombuffer(rng.bytes(min(1 << 26, piece.num_bytes - start)), np.uint16)
        # Sign and mantissa at random, an exponent of 8 in the middle: finite, of any sign.
        files.write(piece.name, start, bits & 0x83FF | 0x3C00)
  shards.write_json(directory / 'config.json', config_to_hf(config, 'language', dtype='bfloat16'))
  return shards.num_bytes(planned)


def _copy(source: Path, target: Path) -> float:
  """Seconds of cp and sync."""
  _settle(source)
  begun = time.perf_counter()
  subprocess.run(['cp', '-r', source, target], check=True)
  subprocess.run(['sync'], check=True)
  seconds = time.perf_counter() - begun
  shutil.rmtree(target)
  return seconds


def _settle(source: Path) -> None:
  """Nothing left to be written, and as much free memory as the page cache is going to take.

  A virtual machine that gave free pages back to its host is several times slower to write to new
  ones, for cp as for us; so all of them are touched first.
  """
  subprocess.run(['sync'], check=True)
  size = sum(file.stat().st_size for file in source.rglob('*') if file.is_file())
  np.zeros(size + (1 << 29), np.uint8)[:: 1 << 12] = 1


def _convert(what: str, source: Path, target: Path) -> dict:
  """One conversion in a process of its own."""
  root = str(Path(__file__).resolve().parents[2])
  paths = os.pathsep.join(filter(None, (root, os.environ.get('PYTHONPATH', ''))))
  done = subprocess.run(
    [sys.executable, __file__, what, source, target],
    env=os.environ | {'PYTHONPATH': paths},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def _same_weights(one: Path, two: Path) -> bool:
  names = sorted(file.name for file in one.glob('*.safetensors*'))
  found = sorted(file.name for file in two.glob('*.safetensors*'))
  return names == found and all(filecmp.cmp(one / n, two / n, shallow=False) for n in names)


class _Memory(threading.Thread):
  """Watches the memory of this process; peaks above what there was at the start, in bytes."""

  def __init__(self):
    super().__init__(daemon=True)
    self._base, self._done = _memory(), threading.Event()
    self.peak = [0, 0]

  def run(self):
    while not self._done.wait(_INTERVAL):
      now = _memory()
      self.peak = [max(p, n - b) for p, n, b in zip(self.peak, now, self._base, strict=True)]

  def stop(self):
    self._done.set()
    self.join()


def _memory() -> tuple[int, int]:
  """Anonymous (RssAnon and RssShmem) and resident bytes."""
  fields = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
  size = {key: 1024 * int(fields[key].split()[0]) for key in ('RssAnon', 'RssShmem', 'VmRSS')}
  return size['RssAnon'] + size['RssShmem'], size['VmRSS']


def _child(what: str, source: str, target: str) -> None:
  """Converts, and prints seconds, peaks, and what the threads were busy with."""
  from segjax import storage
  from segjax.hf import convert, orbax_stream, shards, tensor_slices

  busy = dict.fromkeys(('read', 'transpose', 'write'), 0.0)
  lock = threading.Lock()

  def timed(name, function, within=''):
    def wrapper(*args, **kwargs):
      begun = time.perf_counter()
      try:
        return function(*args, **kwargs)
      finally:
        seconds = time.perf_counter() - begun
        with lock:
          busy[name] += seconds
          if within:
            busy[within] -= seconds

    return wrapper

  if what == 'import':
    tensor_slices.transpose_into = timed('transpose', tensor_slices.transpose_into, within='read')
    tensor_slices.SliceReader.read = timed('read', tensor_slices.SliceReader.read, within='write')
    orbax_stream._write = timed('write', orbax_stream._write)
  else:
    orbax_stream._take = timed('read', orbax_stream._take)
    convert.transpose_into = timed('transpose', convert.transpose_into)
    shards.ShardWriter.write = timed('write', shards.ShardWriter.write)
  storage._sync = timed('write', storage._sync)

  _settle(Path(source))
  watch = _Memory()
  watch.start()
  begun = time.perf_counter()
  if what == 'import':
    convert.import_checkpoint(source, target)
  else:
    convert.export_checkpoint(source, target, max_shard_bytes=SHARD_BYTES)
  seconds = time.perf_counter() - begun
  watch.stop()
  anonymous, resident = watch.peak
  found = {'seconds': seconds, 'anonymous': anonymous, 'resident': resident, 'busy': busy}
  print(json.dumps(found))


if __name__ == '__main__':
  _child(*sys.argv[1:])
