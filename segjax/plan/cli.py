"""Plans a run without its devices: whether it fits, and the time of a step.

  segjax plan ppo:llama3_8b_sft,v5p:2x2x2
  segjax plan ppo:llama3_8b_sft --topology=cuda:8xH100-80GB --json
  segjax plan sft:local --lengths=maximum     the time of texts of the maximum length
  segjax plan --table                         every preset on every topology that has batch sizes

Compiles every phase of the job for the topology, from shapes alone; of local rows for reward it
reads how many have labelled steps. The exit code is 1 if the run does not fit.
`python tools/plan.py --config=configs/ppo.py...` is the same.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from segjax.config import command_line
from segjax.plan import topologies
from segjax.plan.lengths import KINDS

if TYPE_CHECKING:
  from segjax.plan.phases import JobPlan

_TOPOLOGY = flags.DEFINE_string(
  'topology', '', "v5p:2x2x2, v5e:8x8, cuda:8xH100-80GB, cpu:8; empty: the preset's."
)
_PHASES = flags.DEFINE_list('phases', [], 'Phases to compile; empty: all.')
_LENGTHS = flags.DEFINE_enum(
  'lengths', KINDS[0], KINDS, 'Of the texts that the time of a step is counted with.'
)
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
_TABLE = flags.DEFINE_bool('table', False, 'Print a table of all presets, in Markdown.')
_PLANS = flags.DEFINE_string(
  'plans', str(Path.home() / '.cache' / 'segjax' / 'plans'), 'Directory for stored results.'
)


def main(_: list[str], find_plan: Callable[[str], 'JobPlan']) -> None:
  """Plans the last of config.stages, or every preset.

  Args:
    find_plan: maps the name of a job to its plan.
  """
  if _TABLE.value:
    print_table()
    return
  settings, preset = command_line.settings_from_flags()
  topology = topologies.parse(_TOPOLOGY.value or preset.rpartition(',')[2])
  topologies.prepare(topology)
  from segjax.plan import plan_report, planner

  job = find_plan(settings.stages[-1] if settings.stages else '')
  cache = Path(_PLANS.value) if _PLANS.value else None
  plan = planner.make_plan(job, settings, topology, tuple(_PHASES.value), cache, _LENGTHS.value)
  plan_report.print_plan(plan)
  if _JSON.value:
    print(plan_report.to_json(plan))
  if not plan.fits:
    sys.exit(1)


def print_table() -> None:
  """Prints a line for each preset, each from its own process, as jax has one set of devices."""
  from configs.shared import topologies as batch_sizes

  columns = (
    *('preset', 'GiB of a device', 'generation', 'scoring', 'updates', 'compile'),
    *('generation', 'scoring', 'updates', 'a step', 'bound by', 'tokens/s', 'MFU of updates'),
  )
  print(f'| {" | ".join(columns)} |\n{"|---" * len(columns)}|', flush=True)
  for (job, size), by_topology in batch_sizes.TOPOLOGIES.items():
    name = {'8b': 'llama3_8b_sft', '70b': 'llama3_70b'}.get(size, size)
    for topology in by_topology:
      preset = f'{job}.py:{name},{topology}'
      flags = (f'--config=configs/{preset}', f'--plans={_PLANS.value}', '--json')
      flags += (f'--lengths={_LENGTHS.value}',)
      done = subprocess.run(
        [sys.executable, '-m', 'segjax.main', 'plan', *flags], stdout=subprocess.PIPE, text=True
      )
      last = done.stdout.splitlines()[-1:] or ['']
      if not last[0].startswith('{'):
        raise ValueError(f'{preset} could not be planned.')
      print(_line(preset, json.loads(last[0])), flush=True)


_PARTS = (('prefill', 'page', 'decode'), ('scoring', 'rewards'), ('update',))


def _line(preset: str, plan: dict) -> str:
  parts = [
    [phase for phase in plan['phases'] if any(word in phase['name'] for word in words)]
    for words in _PARTS
  ]
  costs = [[phase['cost'] for phase in part if phase['cost']] for part in parts]
  slowest = max((cost for part in costs for cost in part), key=lambda c: c['seconds'], default={})
  seconds, tokens, mfu = (plan[k] for k in ('seconds_per_step', 'tokens_per_second', 'update_mfu'))
  cells = (
    f'`{preset}`',
    f'{plan["memory"] / 2**30:.1f}' + ('' if plan['fits'] else ', does NOT fit'),
    *(f'{max(p["peak"] for p in part) / 2**30:.1f}' if part else '' for part in parts),
    f'{sum(p["compile_seconds"] for p in plan["phases"]):.0f} s',
    *(f'{sum(cost["seconds"] for cost in part):.1f} s' if part else '' for part in costs),
    f'{seconds:.1f} s' if seconds else '',
    slowest.get('bound', ''),
    f'{tokens:,.0f}' if tokens else '',
    f'{mfu:.0%}' if mfu else '',
  )
  return f'| {" | ".join(cells)} |'
