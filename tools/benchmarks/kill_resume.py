"""Kills runs and damages their checkpoints; compares what they write with an undisturbed run."""

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

from segjax.report.console import table

ROOT = Path(__file__).resolve().parents[2]
_STAGES = ('sft', 'reward', 'normalizer', 'ppo')
_SMALL = {  # a few steps of each job of the demo, a checkpoint after every step
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
_RESUMED = r'resuming from step (\d+)'
_TIMES = re.compile('seconds|timing/|perf/')


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  parser.add_argument('--kills', type=int, default=50, help='number of kills')
  parser.add_argument('--damages', type=int, default=len(DAMAGES), help='number of kinds of damage')
  parser.add_argument('--seed', type=int, default=0)


def run(kills: int, damages: int, seed: int) -> dict:
  """Kills runs of the demo at random moments until they end; damages checkpoints of others."""
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as directory:
    home = Path(directory)
    _finish(home / 'warm-up', home)  # fills the cache of compiled programs
    begin = time.monotonic()
    _finish(home / 'undisturbed', home)
    seconds = time.monotonic() - begin
    expected = _outcome(home / 'undisturbed')
    print(f'one run takes {seconds:.0f} s\n')
    counts = {'SIGKILL': _Count(), 'SIGTERM': _Count(), 'damage': _Count()}
    while sum(counts[name].tried for name in ('SIGKILL', 'SIGTERM')) < kills:
      _kill_until_done(home, rng, seconds, counts, kills, expected)
    for name in list(DAMAGES)[:damages]:
      _damage_and_resume(home, name, counts['damage'], expected)
  _print_table(counts)
  return {name: vars(count) for name, count in counts.items()} | {'seconds_of_a_run': seconds}


class _Count:
  """Counts of one kind of fault.

  Attributes:
    tried: number of faults.
    completed: runs that ended after the fault.
    differ: of these, runs whose results differ from those of the undisturbed run.
    lost: steps before the newest complete checkpoint that were run again.
    repeated: steps after it that were run again.
  """

  def __init__(self):
    self.tried = self.completed = self.differ = self.lost = self.repeated = 0


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
    raise RuntimeError(f'the run exited with {process.returncode}:\n{out[-3000:]}')
  return out


def _kill_until_done(home, rng, seconds, counts, kills, expected) -> None:
  """Kills one run at random moments, each time later in the run, until it ends."""
  workdir = Path(tempfile.mkdtemp(dir=home))
  faults, num_before = [], sum(counts[name].tried for name in ('SIGKILL', 'SIGTERM'))
  saved: dict[str, int] = {}  # newest step by stage at the last kill
  while num_before + len(faults) < kills:
    name = rng.choice(['SIGKILL', 'SIGKILL', 'SIGTERM'])
    process = _start(workdir, home)
    try:
      out, _ = process.communicate(timeout=rng.uniform(0.2, 0.9) * seconds)
    except subprocess.TimeoutExpired:
      process.send_signal(getattr(signal, name))
      out, _ = process.communicate()
      if faults:
        faults[-1].lost += _lost(saved, out)
      faults.append(counts[name])
      counts[name].tried += 1
      saved = {stage: _saved(workdir / stage) for stage in _STAGES}
      lines = {stage: len(_metrics(workdir / stage)) for stage in _STAGES if saved[stage]}
      counts[name].repeated += sum(max(0, lines[stage] - saved[stage]) for stage in lines)
      continue
    if process.returncode:
      raise RuntimeError(f'after kills, the run exited with {process.returncode}\n{out[-3000:]}')
    break
  else:
    out = _finish(workdir, home)
  if faults:
    faults[-1].lost += _lost(saved, out)
  _compare(workdir, expected, faults)


def _lost(saved: dict[str, int], out: str) -> int:
  """Returns how many steps were saved at a kill and yet run again by the run that wrote `out`."""
  lost = 0
  for stage, step in saved.items():
    match = re.search(rf'{stage} +{_RESUMED}', out)
    if match:
      lost += max(0, step - int(match[1]))
    elif re.search(rf'{stage} +(done in|\d+%)', out):
      lost += step
  return lost


def _saved(stage: Path) -> int:
  """Returns the newest complete checkpoint of an unfinished stage, 0 if there is none."""
  names = [path.name for path in stage.glob('checkpoints/*')]
  steps = [int(name) for name in names if name.isdecimal()]
  return max(steps, default=0)


def _damage_and_resume(home: Path, name: str, count: _Count, expected: dict) -> None:
  """Kills PPO after its third checkpoint, damages the newest one, and resumes."""
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
  match = re.search(rf'ppo +{_RESUMED}', out)
  count.lost += max(0, saved - 1 - int(match[1])) if match else saved
  _compare(workdir, expected, [count])


def _compare(workdir: Path, expected: dict, counts: list[_Count]) -> None:
  outcome = _outcome(workdir)
  differing = [name for name in expected if outcome.get(name) != expected[name]]
  if differing:
    print(f'{workdir.name}: {", ".join(differing)} differ')
  for count in counts:
    count.completed += 1
    count.differ += bool(differing)


def _outcome(workdir: Path) -> dict:
  """Returns what must be equal: weights as bytes, metrics and results without times."""
  outcome = {}
  for path in sorted(workdir.glob('*/*/model.safetensors')):
    outcome[str(path.relative_to(workdir))] = path.read_bytes()
  for stage in _STAGES:
    outcome[f'{stage}/metrics'] = _metrics(workdir / stage)
  results = json.loads((workdir / 'results.json').read_text())
  outcome['results'] = _without_times(results)
  return outcome


def _without_times(value):
  if isinstance(value, dict):
    return {k: _without_times(v) for k, v in value.items() if not _TIMES.search(k)}
  return value


def _metrics(stage: Path) -> list[dict]:
  rows = []
  with contextlib.suppress(FileNotFoundError):
    for line in (stage / 'metrics.jsonl').read_text().splitlines():
      with contextlib.suppress(ValueError):  # a line that a kill cut off
        rows.append(_without_times(json.loads(line)))
  return rows


def _print_table(counts: dict[str, _Count]) -> None:
  columns = ('tried', 'completed', 'differ', 'lost', 'repeated')
  table(
    'kills and damages; lost, repeated: steps run again before, after the newest checkpoint',
    ('fault', *columns),
    [
      (name, *(str(getattr(count, column)) for column in columns)) for name, count in counts.items()
    ],
  )
