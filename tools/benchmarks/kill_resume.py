"""Kills and damage: does a run end as one that nothing happened to?"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.checkpoint_damage import DAMAGES

ROOT = Path(__file__).resolve().parents[2]
_STAGES = ('sft', 'reward', 'normalizer', 'ppo')
_SMALL = {  # the demo's jobs, each a few steps, a checkpoint after every one
  'demo.sft_rows': 256,
  'demo.pairs': 256,
  'sft.max_steps': 8,
  'reward.max_steps': 8,
  'normalizer.max_pairs': 64,
  'ppo.max_steps': 6,
  'ppo.rollout_batch_size': 32,
  'ppo.minibatch_size': 16,
  'ppo.num_ppo_epochs': 2,
  'evaluate.samples_per_prompt': 1,
  'checkpoint.every_steps': 1,
}
_TIMES = re.compile('seconds|timing/|perf/')


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The size of the campaign."""
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--damages', type=int, default=len(DAMAGES), help='kinds of damage')
  parser.add_argument('--seed', type=int, default=0)


def run(kills: int, damages: int, seed: int) -> dict:
  """Kills runs of the demo at random moments until they end, spoils checkpoints on the way."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as directory:
    home = Path(directory)
    _finish(home / 'warm', home)  # fills the cache of compiled programs
    begun = time.monotonic()
    _finish(home / 'whole', home)
    seconds = time.monotonic() - begun
    want = _outcome(home / 'whole')
    print(f'one run takes {seconds:.0f} s\n')
    counts = {'SIGKILL': _Count(), 'SIGTERM': _Count(), 'damage': _Count()}
    while sum(counts[name].tried for name in ('SIGKILL', 'SIGTERM')) < kills:
      _until_done(home, rng, seconds, counts, kills, want)
    for name in list(DAMAGES)[:damages]:
      _damaged(home, name, counts['damage'], want)
  _table(counts)
  return {name: vars(count) for name, count in counts.items()} | {'seconds_of_a_run': seconds}


class _Count:
  """What came of one kind of fault.

  Attributes:
    lost: steps before the newest finished save that were run again.
    redone: steps after it that were.
  """

  def __init__(self):
    self.tried = self.survived = self.lost = self.redone = self.differ = 0


def _command(workdir: Path) -> list[str]:
  flags = [f'--config.{key}={value}' for key, value in _SMALL.items()]
  command = [sys.executable, '-m', 'segjax.main', '--config=configs/ppo.py']
  return [*command, f'--workdir={workdir}', *flags]


def _start(workdir: Path, home: Path) -> subprocess.Popen:
  environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(home / 'cache')}
  return subprocess.Popen(
    _command(workdir),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=ROOT,
    env=environment,
  )


def _finish(workdir: Path, home: Path) -> str:
  process = _start(workdir, home)
  out, _ = process.communicate()
  if process.returncode:
    raise RuntimeError(f'the run ended with {process.returncode}:\n{out[-3000:]}')
  return out


def _until_done(home, rng, seconds, counts, kills, want) -> None:
  """Kills one run again and again at random moments; it gets further each time."""
  workdir = Path(tempfile.mkdtemp(dir=home))
  felt, total = [], sum(counts[name].tried for name in ('SIGKILL', 'SIGTERM'))
  saved: dict[str, int] = {}  # by stage, when the last kill came
  while total + len(felt) < kills:
    name = rng.choice(['SIGKILL', 'SIGKILL', 'SIGTERM'])
    process = _start(workdir, home)
    try:
      out, _ = process.communicate(timeout=rng.uniform(0.2, 0.9) * seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(getattr(signal, name))
      out, _ = process.communicate()
      if felt:
        felt[-1].lost += _lost(saved, out)
      felt.append(counts[name])
      counts[name].tried += 1
      saved = {stage: _saved(workdir / stage) for stage in _STAGES}
      lines = {stage: len(_lines(workdir / stage)) for stage in _STAGES if saved[stage]}
      counts[name].redone += sum(max(0, lines[stage] - saved[stage]) for stage in lines)
      continue
    if process.returncode:
      raise RuntimeError(f'after kills: ended with {process.returncode}\n{out[-3000:]}')
    break
  else:
    out = _finish(workdir, home)
  if felt:
    felt[-1].lost += _lost(saved, out)
  _compare(workdir, want, felt)


def _lost(saved: dict[str, int], out: str) -> int:
  """Steps that were saved when a kill came, and yet run again by the run that wrote `out`."""
  lost = 0
  for stage, step in saved.items():
    found = re.search(rf'{stage} +resuming from step (\d+)', out)
    if found:
      lost += max(0, step - int(found.group(1)))
    elif re.search(rf'{stage} +(done in|\d+%)', out):
      lost += step
  return lost


def _saved(stage: Path) -> int:
  """The newest finished save of a stage that is under way."""
  place = stage / 'checkpoints'
  steps = [int(p.name) for p in place.iterdir() if p.name.isdecimal()] if place.exists() else []
  return max(steps, default=0)


def _damaged(home: Path, name: str, count: _Count, want: dict) -> None:
  """Kills PPO once it has saved twice, spoils the newer step, goes on."""
  workdir = Path(tempfile.mkdtemp(dir=home))
  process = _start(workdir, home)
  while _saved(workdir / 'ppo') < 3 and process.poll() is None:
    time.sleep(0.05)
  process.kill()
  process.communicate()
  saved = _saved(workdir / 'ppo')
  DAMAGES[name](workdir / 'ppo' / 'checkpoints' / str(saved))
  out = _finish(workdir, home)
  count.tried += 1
  found = re.search(r'ppo +resuming from step (\d+)', out)
  count.lost += max(0, saved - 1 - int(found.group(1))) if found else saved
  _compare(workdir, want, [count])


def _compare(workdir: Path, want: dict, counts: list[_Count]) -> None:
  got = _outcome(workdir)
  differing = [name for name in want if got.get(name) != want[name]]
  if differing:
    print(f'{workdir.name}: {", ".join(differing)} differ')
  for count in counts:
    count.survived += 1
    count.differ += bool(differing)


def _outcome(workdir: Path) -> dict:
  """All that a run leaves and that is no time: weights as bytes, metrics and results as numbers."""
  found = {}
  for path in sorted(workdir.glob('*/*/model.safetensors')):
    found[str(path.relative_to(workdir))] = path.read_bytes()
  for stage in _STAGES:
    found[f'{stage}/metrics'] = _lines(workdir / stage)
  results = json.loads((workdir / 'results.json').read_text())
  found['results'] = _timeless(results)
  return found


def _timeless(value):
  if isinstance(value, dict):
    return {k: _timeless(v) for k, v in value.items() if not _TIMES.search(k)}
  return value


def _lines(stage: Path) -> list[dict]:
  found = []
  with contextlib.suppress(FileNotFoundError):
    for line in (stage / 'metrics.jsonl').read_text().splitlines():
      with contextlib.suppress(ValueError):  # cut off by a kill
        found.append(_timeless(json.loads(line)))
  return found


def _table(counts: dict[str, _Count]) -> None:
  columns = ('tried', 'survived', 'differ', 'lost', 'redone')
  print(f'{"fault":<10}' + ''.join(f'{name:>10}' for name in columns))
  for name, count in counts.items():
    print(f'{name:<10}' + ''.join(f'{getattr(count, column):>10}' for column in columns))
  print('lost: steps before the newest finished save that were run again; redone: after it')
  print(f'damage: one of {len(DAMAGES)} kinds each; the newest save of two is spoilt')
