"""What writing metrics costs a step, and whether memory grows with the number of steps."""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp

from segjax.report import metric_docs
from segjax.report.console import ProgressBar
from segjax.report.metric_log import MetricLog, Options

_TENTHS = [f'reward/by_position/{k}' for k in range(1, 11)]


def add_flags(parser: argparse.ArgumentParser) -> None:
  """How much is logged, and what it is compared with."""
  parser.add_argument('--steps', type=int, default=5_000)
  parser.add_argument('--step_seconds', type=float, default=1.0, help="of the demo's PPO")


def run(steps: int, step_seconds: float) -> dict:
  """Logs device scalars under PPO's names: JSON lines, TensorBoard, the watch, the console."""
  names = [n for entry in metric_docs.ENTRIES for n in entry.names if '*' not in n] + _TENTHS
  values = {name: jnp.float32(0.5) for name in names if name != 'skipped_updates'}
  taken, before = [], 0
  with (
    tempfile.TemporaryDirectory() as place,
    open(os.devnull, 'w') as nowhere,
    contextlib.redirect_stdout(nowhere),
  ):
    log = MetricLog(
      Path(place), ProgressBar('ppo', steps), names[:4], options=Options(line_every=50)
    )
    with log:
      for step in range(steps):
        begun = time.perf_counter()
        log.log(step, values)
        taken.append(time.perf_counter() - begun)
        if step == steps // 10:  # past what is allocated once
          before = _resident()
      growth = _resident() - before
  micros = statistics.median(taken) * 1e6
  share = micros / 1e6 / step_seconds
  log(f'{len(names)} metrics a step: {micros:.0f} µs, {share:.2%} of a step of {step_seconds} s')
  log(f'memory grew by {growth / 1024:.0f} KiB over {steps - steps // 10} steps')
  return {
    'metrics': len(names),
    'microseconds': round(micros, 1),
    'share_of_step': round(share, 5),
    'grown_kib': round(growth / 1024, 1),
    'steps': steps,
  }


def _resident() -> int:
  """Bytes of this process in memory."""
  pages = int(Path('/proc/self/statm').read_text().split()[1])
  return pages * os.sysconf('SC_PAGE_SIZE')
