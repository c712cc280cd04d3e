"""Does a run fit, and how long does a step take? Answered without the devices.

  python tools/plan.py --config=configs/ppo.py:llama3_8b_sft,v5p:2x2x2
  python tools/plan.py --config=configs/ppo.py:llama3_8b_sft --topology=cuda:8xH100-80GB --json

Compiles every phase of the job for the topology, from shapes alone. Exit code 1 if it does not fit.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from absl import flags

from segjax import main as segjax  # --config and its overrides
from segjax.plan import chips

_TOPOLOGY = flags.DEFINE_string(
  'topology', '', "v5p:2x2x2, v5e:8x8, cuda:8xH100-80GB, cpu:8; empty: the preset's."
)
_PHASES = flags.DEFINE_list('phases', [], 'Compile these alone.')
_JSON = flags.DEFINE_bool('json', False, 'Print one JSON object as the last line.')
_PLANS = flags.DEFINE_string(
  'plans', str(Path.home() / '.cache' / 'segjax' / 'plans'), 'Where results are kept.'
)


def main(_: list[str]) -> None:
  """Plans the last of config.stages."""
  settings, preset = segjax.settings_from_flags()
  topology = chips.parse(_TOPOLOGY.value or preset.rpartition(',')[2])
  chips.prepare(topology)
  from segjax.plan import command

  job = settings.stages[-1]
  cache = Path(_PLANS.value) if _PLANS.value else None
  plan = command.make(job, settings, topology, tuple(_PHASES.value), cache)
  command.show(plan)
  if _JSON.value:
    print(command.as_json(plan))
  if not plan.fits:
    sys.exit(1)


if __name__ == '__main__':
  segjax.run(main)
