"""Times report.html of a synthetic long run: writing it, and opening it in Chromium."""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks import browser

from segjax.report.console import table
from segjax.report.html_report import REPORT_FILE, Page

_METRICS = (
  *('objective/reward', 'objective/rlhf_reward', 'objective/kl', 'objective/scores'),
  *('response/length_mean', 'response/eos_rate', 'policy/loss', 'policy/entropy', 'critic/loss'),
  *('timing/generate', 'timing/score', 'timing/update', 'timing/between_steps', 'timing/step'),
  *(f'reward/by_position/{k}' for k in range(1, 11)),
  *(f'policy/extra_{k}' for k in range(15)),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  parser.add_argument('--steps', type=int, default=1000)
  parser.add_argument('--responses', type=int, default=2000)
  parser.add_argument('--tokens', type=int, default=300, help='mean length of a response')
  parser.add_argument('--long', type=int, default=20, help='responses of 4,096 tokens')
  parser.add_argument('--keep', type=Path, help='directory in which the report is kept')


def run(steps: int, responses: int, tokens: int, long: int, keep: Path | None) -> dict[str, Any]:
  """Writes a run and its report, and opens the report; returns the fields of the JSON line."""
  with tempfile.TemporaryDirectory() as directory:
    workdir = keep or Path(directory)
    write_run(workdir, steps, responses, tokens, long)
    page = Page(workdir, 'configs/ppo.py', ['ppo'])
    seconds = []
    for _ in range(2):  # the second one as during a run, when all is imported
      with (workdir / 'ppo' / 'metrics.jsonl').open('a') as metrics:
        metrics.write(json.dumps({'step': steps} | dict.fromkeys(_METRICS, 1.0)) + '\n')
      begin = time.monotonic()
      page.write()
      seconds.append(time.monotonic() - begin)
    size = (workdir / REPORT_FILE).stat().st_size
    values = {
      'write_seconds': round(seconds[1], 2),
      'first_write_seconds': round(seconds[0], 2),
      'megabytes': round(size / 1e6, 2),
      'peak_rss_gib': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
      'open_seconds': opening_seconds(workdir / REPORT_FILE),
    }
  table(
    f'{steps:,} steps, {responses:,} responses',
    ('', ''),
    [(name, f'{value}') for name, value in values.items()],
  )
  return {'steps': steps, 'responses': responses, 'tokens': tokens, 'long': long} | values


def opening_seconds(path: Path) -> float | None:
  """Returns the median time of three until the table can be used; None without a browser."""
  program = browser.find_browser()
  if program is None:
    return None
  with browser.Browser(program) as tab:
    seconds = sorted(tab.open(path) for _ in range(3))
    if tab.errors:
      raise RuntimeError(f'errors in the page: {tab.errors}')
  return round(seconds[1], 2)


def write_run(workdir: Path, steps: int, responses: int, tokens: int, long: int) -> None:
  """Writes a PPO stage's metrics.jsonl and samples.jsonl with random numbers and words."""
  rng = np.random.default_rng(0)
  directory = workdir / 'ppo'
  directory.mkdir(parents=True, exist_ok=True)
  values = np.abs(np.cumsum(rng.normal(size=(steps, len(_METRICS))), axis=0)) + 1
  with (directory / 'metrics.jsonl').open('w') as out:
    for step in range(steps):
      row = dict(zip(_METRICS, values[step].tolist(), strict=True))
      out.write(json.dumps({'step': step} | row) + '\n')
  with (directory / 'samples.jsonl').open('w') as out:
    for number in range(responses):
      step = number * steps // responses
      is_long = long and number % max(1, responses // long) == 0
      length = 4096 if is_long else int(rng.integers(tokens // 2, tokens * 3 // 2))
      out.write(json.dumps(_sample(rng, step, length)) + '\n')


def _words(rng: np.random.Generator, count: int) -> list[str]:
  letters = rng.choice(list('eeettaaoinshrdlu'), (400, 9))
  vocabulary = [' ' + ''.join(row[: 1 + i % 9]) for i, row in enumerate(letters)]
  return [vocabulary[i] for i in rng.zipf(1.4, count) % len(vocabulary)]


def _sample(rng: np.random.Generator, step: int, length: int) -> dict[str, Any]:
  words = _words(rng, length)
  entropy = np.round(rng.gamma(1.0, 0.8, length), 4).tolist()
  starts = [0, *(t for t in range(1, length) if entropy[t] > 2)]
  segments = []
  for begin, end in zip(starts, [*starts[1:], length], strict=True):
    tokens = words[begin:end]
    score, reward = (round(float(x), 4) for x in rng.normal(size=2))
    part = {'text': ''.join(tokens), 'tokens': tokens, 'entropy': entropy[begin:end]}
    segments.append(part | {'score': score, 'reward': reward})
  total = sum(segment['reward'] for segment in segments)
  totals = {'reward': total, 'kl': float(rng.normal()), 'length': length, 'finished': True}
  prompt = [{'role': 'user', 'content': ''.join(_words(rng, 40))}]
  return {
    'step': step,
    'model': 'policy',
    'prompt': prompt,
    'segments': segments,
    'totals': totals,
    'threshold': 2.0,
    'pair': None,
  }
