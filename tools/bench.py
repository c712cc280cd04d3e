"""Times what must be fast; BENCHMARKS says what. The last line of output is one JSON object.

Not a test: timings depend on the machine. What is timed is checked for equality all the same.

To add a benchmark: write a module in `benchmarks/` with `add_flags` and a `run` that takes these
flags, prints a table and returns what the JSON line holds, and name it in BENCHMARKS.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

BENCHMARKS = {
  'rewards': 'from scores to advantages, against Python lists',
  'convert': 'HF checkpoints to Orbax and back, against cp: memory and throughput',
  'train': 'the policy update: tokens per second, share of the peak, packing against padding',
  'metric_log': 'what writing metrics costs a step, and whether memory grows',
  'checkpoint_save': 'how long a checkpoint keeps the training loop waiting',
  'kill_resume': 'kills and damaged checkpoints: what is lost, and whether a bit differs',
  'report': 'report.html of a long run: time to write, size, time to open in Chromium',
  'decode': 'tokens per second against transformers, and the share of the roofline',
}


def main() -> None:
  """Runs one benchmark."""
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
