"""Runs one benchmark of BENCHMARKS: prints a table and, as the last line, one JSON object.

python tools/bench.py NAME [--FLAG=VALUE ...]

Timings depend on the machine and are not tests, but the results of what is timed are checked.

To add a benchmark, write a module in `benchmarks/` with `add_flags` and a `run` that takes these
flags, prints a table and returns the fields of the JSON object, and add it to BENCHMARKS.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

BENCHMARKS = {
  'rewards': 'from scores to advantages, compared with loops over Python lists',
  'reward_calls': 'a judge that waits, many at once, and rewards of parts of a text',
  'convert': 'HF checkpoints to Orbax and back, compared with cp: throughput and memory',
  'train': 'the policy update: tokens per second, model FLOPs utilisation, packing and padding',
  'metric_log': 'time that metrics take per step, and whether memory grows',
  'checkpoint_save': 'time for which saving a checkpoint blocks the training loop',
  'kill_resume': 'kills and damaged checkpoints: steps lost, and whether any bit differs',
  'report': 'report.html of a long run: time to write, size, time to open in Chromium',
  'data': 'rows from the start of a run to its first batch: time, memory, a second start',
  'carry': 'steps of a rollout with rollout.carry and without, counted on the host',
  'decode': 'tokens per second, compared with transformers and with the memory roofline',
  'compiled': 'decode, updates, scoring as compiled for GPUs and TPUs: bytes, exchanges; no device',
}


def main() -> None:
  """Runs the benchmark that the command line names."""
  sys.path.insert(0, str(Path(__file__).parent))
  modules = {name: importlib.import_module(f'benchmarks.{name}') for name in BENCHMARKS}
  parser = argparse.ArgumentParser(description='Benchmarks; the last line is JSON.')
  commands = parser.add_subparsers(dest='benchmark', required=True)
  for name, module in modules.items():
    module.add_flags(commands.add_parser(name, help=BENCHMARKS[name]))
  flags = vars(parser.parse_args())
  name = flags.pop('benchmark')
  print(json.dumps({'benchmark': name, **modules[name].run(**flags)}))


if __name__ == '__main__':
  main()
