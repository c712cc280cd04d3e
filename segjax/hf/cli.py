"""Command line of the conversions: `segjax convert ...` and `tools/convert_hf.py ...`.

Flags and messages only. Heavy packages are imported where they are used: `inspect` needs no jax.
"""

import argparse
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from segjax import json_files
from segjax.errors import UserError, one_line

ROLES = ('policy', 'reward', 'critic')

_UNITS = {'': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30}


def main(arguments: Sequence[str], prog: str = 'segjax convert') -> int:
  """Runs one command and returns the exit code, 0 on success.

  Errors are one line on standard error; SEGJAX_TRACEBACK=1 shows the traceback.
  """
  flags = _parser(prog).parse_args(arguments)
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  try:
    return flags.run(flags)
  except KeyboardInterrupt:
    print(f'{prog}: interrupted; no partial output was kept', file=sys.stderr)
  except UserError as error:
    if os.environ.get('SEGJAX_TRACEBACK'):
      raise
    print(f'{prog}: {one_line(error)}', file=sys.stderr)
  return 1


def parse_size(text: str) -> int:
  """Returns the number of bytes of '5GB', '500 MiB' or '1000000'.

  Raises:
    ValueError: the text is not a size, or not positive.
  """
  match = re.fullmatch(r'([\d.]+)\s*([KMG]I?B)?', text.strip().upper())
  try:
    count = int(float(match[1]) * _UNITS[match[2] or '']) if match else 0
  except ValueError:
    count = 0
  if count <= 0:
    raise UserError(f'{text!r} is not a size; use 5GB, 500MB or 2GiB.')
  return count


def parse_metrics(items: Sequence[str]) -> dict[str, float]:
  """Returns numbers by name from NAME=VALUE and JSON files; nested names are joined by '/'.

  Raises:
    ValueError: an item is neither.
  """
  metrics: dict[str, float] = {}
  for item in items:
    name, equals, value = item.partition('=')
    if not equals:
      metrics |= _numbers(json_files.read_object(Path(item)))
      continue
    try:
      metrics[name] = float(value)
    except ValueError:
      raise UserError(f'--metrics {item}: {value!r} is not a number.') from None
  return metrics


def _numbers(value: Any, name: str = '') -> dict[str, float]:
  if isinstance(value, dict):
    pairs = [_numbers(v, f'{name}/{k}'.lstrip('/')) for k, v in value.items()]
    return {k: v for pair in pairs for k, v in pair.items()}
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return {name: float(value)} if is_number and name else {}


def _parser(prog: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog=prog,
    description='Converts HF checkpoints to segjax checkpoints (Orbax) and back; merges adapters; '
    'uploads models.',
  )
  commands = parser.add_subparsers(required=True, metavar='import|export|merge|push|verify|inspect')

  add = _command(commands, 'import', _import, 'import an HF checkpoint as a segjax checkpoint')
  add('hf', metavar='HF', help='directory or hub id')
  add('out', metavar='OUT', help='directory to write')
  add('--role', choices=ROLES, default='policy', help='role of the imported model (default policy)')
  add('--dtype', default='', help="dtype of the parameters (default the file's)")
  add('--seed', type=int, default=0, help="seed of a critic's scalar head if HF has none")
  add('--strict', action='store_true', help='refuse NaN and infinity among the weights')
  add('--overwrite', action='store_true', help='replace a segjax checkpoint at OUT')

  add = _command(commands, 'export', _export, 'export a segjax checkpoint as an HF directory')
  add('checkpoint', metavar='CHECKPOINT', help="imported, or a training run's .../STEP/policy")
  add('out', metavar='OUT', help='directory to write')
  add('--dtype', default='', help="dtype of the files (default the parameters')")
  add('--max_shard_size', default='5GB', help='maximum size of a safetensors file (default 5GB)')
  add('--overwrite', action='store_true', help='replace a checkpoint at OUT')
  add('--source', default='', help="for a training run's item: the HF model it started from")
  add('--role', choices=ROLES, default='', help="for a training run's item: its role")
  card = commands.choices['export'].add_argument_group('model card').add_argument
  card('--base_model', default='', help="hub id (default the source's)")
  card('--stage', default='', help='job that made the model: sft, reward, ppo')
  card('--recipe', default='', help='such as configs/ppo.py:llama3_8b_sft')
  card('--metrics', nargs='+', default=[], help='NAME=VALUE, or JSON files of numbers')
  card('--dataset', default='', help='dataset of the metrics')
  card('--license', default='', help="the hub's identifier (default the source's)")
  card('--license_name', default='')
  card('--license_link', default='')

  add = _command(commands, 'merge', _merge, 'make an HF checkpoint of a LoRA adapter and its base')
  add('adapter', metavar='ADAPTER', help='directory or hub id')
  add('out', metavar='OUT', help='directory to write')
  add('--dtype', default='', help="dtype of the files (default the base's)")
  add('--overwrite', action='store_true', help='replace a checkpoint at OUT')

  add = _command(commands, 'push', _push, 'upload a model, its card and report to the HF hub')
  add('model', metavar='DIRECTORY', help='HF directory or adapter, such as RUN/ppo/model')
  add('name', metavar='OWNER/NAME', help='repository; private if it is new')
  add('--public', action='store_true', help='make the repository public, if it is new')
  add('--dry_run', action='store_true', help='print the files and their sizes, and upload nothing')

  add = _command(commands, 'verify', _verify, "compare logits with transformers' (needs torch)")
  add('hf', metavar='HF', help='directory or hub id')
  add('checkpoint', metavar='CHECKPOINT', nargs='?', help='compare this one instead of HF itself')
  add('--ids', nargs='+', metavar='ID,ID,...', help='token sequences (default built-in ones)')
  add('--length', type=int, default=0, help='length of one random sequence instead')
  add('--dtype', default='float32', help='dtype of the computation (default float32)')
  add('--tolerance', type=float, help='maximum difference (default by dtype)')

  add = _command(commands, 'inspect', _inspect, 'print names, shapes, dtypes, from headers only')
  add('hf', metavar='HF', help='directory or hub id')
  return parser


def _command(commands: Any, name: str, function: Any, text: str) -> Any:
  command = commands.add_parser(name, help=text, description=text)
  command.set_defaults(run=function)
  return command.add_argument


def _import(flags: argparse.Namespace) -> int:
  from segjax.hf import convert

  start = time.perf_counter()
  with _progress() as progress:
    out = convert.import_checkpoint(
      flags.hf,
      flags.out,
      role=flags.role,
      dtype=flags.dtype,
      seed=flags.seed,
      strict=flags.strict,
      overwrite=flags.overwrite,
      progress=progress,
    )
  _print_done('imported', out, start)
  return 0


def _export(flags: argparse.Namespace) -> int:
  from segjax.hf import convert, model_card

  start = time.perf_counter()
  card = model_card.Card(
    base_model=flags.base_model,
    stage=flags.stage,
    recipe=flags.recipe,
    metrics=parse_metrics(flags.metrics),
    dataset=flags.dataset,
    license=flags.license,
    license_name=flags.license_name,
    license_link=flags.license_link,
  )
  with _progress() as progress:
    out = convert.export_checkpoint(
      flags.checkpoint,
      flags.out,
      dtype=flags.dtype,
      max_shard_bytes=parse_size(flags.max_shard_size),
      overwrite=flags.overwrite,
      card=card,
      source=flags.source,
      role=flags.role,
      progress=progress,
    )
  _print_done('exported', out, start)
  return 0


def _merge(flags: argparse.Namespace) -> int:
  from segjax.hf import merge

  start = time.perf_counter()
  out = merge.merge_adapter(flags.adapter, flags.out, dtype=flags.dtype, overwrite=flags.overwrite)
  _print_done('merged', out, start)
  return 0


def _push(flags: argparse.Namespace) -> int:
  from segjax.hf import upload

  repository, model = upload.Repository(flags.name, flags.public), Path(flags.model)
  if flags.dry_run:
    files = upload.find_files(model)
    print(f'{model} would be uploaded to {repository}')
    print('\n'.join([*upload.describe(files), *upload.find_warnings(files)]))
    return 0
  upload.find_files(model)  # what is wrong here is told before the hub is asked
  repository.check_access()
  upload.push(repository, model, print)
  return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
  """Shows a progress bar on a terminal, nothing elsewhere."""
  import tqdm

  lock = threading.Lock()
  with tqdm.tqdm(unit='B', unit_scale=True, disable=None, leave=False) as bar:

    def update(done: int, total: int) -> None:
      with lock:
        bar.total = total
        bar.update(done)

    yield update


def _print_done(verb: str, out: Path, start: float) -> None:
  total = sum(file.stat().st_size for file in out.rglob('*') if file.is_file())
  seconds = time.perf_counter() - start
  print(f'{verb} {out}: {total / 1e9:.2f} GB in {seconds:.1f} s')


def _verify(flags: argparse.Namespace) -> int:
  from segjax.hf import verify

  try:
    ids = flags.ids and [[int(token) for token in text.split(',')] for text in flags.ids]
  except ValueError:
    raise UserError(f'--ids {" ".join(flags.ids)}: give token ids as 1,2,3.') from None
  result = verify.verify(
    flags.hf,
    flags.checkpoint,
    ids=ids,
    length=flags.length,
    dtype=flags.dtype,
    tolerance=flags.tolerance,
  )
  print(result)
  return 0 if result.passed else 1


def _inspect(flags: argparse.Namespace) -> int:
  from segjax.hf import inspect

  print(inspect.inspect(flags.hf))
  return 0
