"""What would make a plan fit: the cheapest changes first, each with the peak that it leaves.

What lives on the devices is counted anew from shapes. Temporaries are those that were measured;
with fewer rows at once they are taken to shrink in proportion, but for the gradient being added up.
"""

import dataclasses
from collections.abc import Iterator
from operator import attrgetter

from jax.sharding import Mesh

from segjax.config.settings import Settings, replace
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import batch_devices
from segjax.plan import abstract_arrays, programs
from segjax.plan.memory import PhaseMemory, held_bytes, in_gib


@dataclasses.dataclass(frozen=True)
class SettingChange:
  """A setting's new value, and the share of the rows that the named phases then have at once."""

  key: str
  value: int | str
  rows: dict[str, float] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    return f'--config.{self.key}={self.value}'


def suggest_changes(
  job: str,
  s: Settings,
  network: LlamaConfig,
  mesh: Mesh,
  measured: list[PhaseMemory],
  limit: float | int,
) -> list[str]:
  """A line for each change that lowers the peak, and a last one with what is enough together."""
  if any(found.refused for found in measured):
    return ['take fewer rows at once or more chips: the compiler refused a phase']
  peak = max(found.peak for found in measured)
  lines, taken = [], []
  for change in _changes(job, s, mesh):
    alone = estimate_peak([change], job, s, network, mesh, measured)
    if alone < peak:
      lines.append(f'{change}: peak {in_gib(alone)} GiB')
    if estimate_peak(taken, job, s, network, mesh, measured) > limit:
      taken.append(change)
  left = estimate_peak(taken, job, s, network, mesh, measured)
  verdict = 'they fit' if left <= limit else 'not enough: take more chips'
  return [*lines, f'all of {" ".join(map(str, taken))}: peak {in_gib(left)} GiB, {verdict}']


def estimate_peak(
  changes: list[SettingChange],
  job: str,
  s: Settings,
  network: LlamaConfig,
  mesh: Mesh,
  measured: list[PhaseMemory],
) -> int:
  """The largest peak of all phases with these changes, bytes."""
  changed = programs.program(job, replace(s, **{c.key: c.value for c in changes}), network, mesh)
  peaks = []
  for phase in changed.phases:
    found = next((m for m in measured if m.name == phase.name), None)
    if found is None:
      continue
    extra, fixed = found.temporaries + found.outputs - found.aliased, 0
    share = min((c.rows.get(phase.name, 1.0) for c in changes), default=1.0)
    if phase.name.endswith('update'):
      fixed = min(abstract_arrays.bytes_per_device(phase.arguments[0].params), extra)
    peaks.append(held_bytes(phase, changed) + fixed + int((extra - fixed) * share))
  return max(peaks)


def _changes(job: str, s: Settings, mesh: Mesh) -> Iterator[SettingChange]:
  """From what costs nothing but time to what changes numbers."""
  devices = batch_devices(mesh)
  if job == 'ppo':
    slots = s.rollout.max_concurrent or s.ppo.rollout_batch_size
    names = ('prefill', 'cache growth', 'decode chunk')
    for share in _shares(slots, devices):
      yield SettingChange('rollout.max_concurrent', int(slots * share), dict.fromkeys(names, share))
  for key, whole, names in _ROWS[job]:
    rows = attrgetter(key)(s) or attrgetter(whole)(s)
    for share in _shares(rows, devices):
      yield SettingChange(key, int(rows * share), dict.fromkeys(names, share))
  if job == 'ppo' and s.runtime.frozen_params_memory == 'device':
    yield SettingChange('runtime.frozen_params_memory', 'host')
  for key in _OPTIMIZERS[job]:
    if attrgetter(f'{key}.moments_dtype')(s) == 'float32':
      yield SettingChange(f'{key}.moments_dtype', 'bfloat16')
  if s.runtime.param_dtype == 'float32':
    yield SettingChange('runtime.param_dtype', 'bfloat16')


def _shares(rows: int, devices: int) -> list[float]:
  """1/2 and 1/4, where so many rows divide over the devices."""
  return [1 / n for n in (2, 4) if rows % (n * devices) == 0]


# Keys of rows at once, of the rows of which they are a part, and the phases that have them.
_ROWS = {
  'ppo': (
    ('ppo.micro_batch_size', 'ppo.minibatch_size', ('policy update', 'critic update')),
    ('ppo.scoring_batch_size', 'ppo.rollout_batch_size', ('scoring',)),
  ),
  'reward': (('reward.micro_batch_size', 'reward.batch_size', ('reward model update',)),),
  'sft': (('sft.micro_batch_size', 'sft.batch_size', ('policy update',)),),
}
_OPTIMIZERS = {
  'ppo': ('ppo.policy_optimizer', 'ppo.critic_optimizer'),
  'reward': ('reward.optimizer',),
  'sft': ('sft.optimizer',),
}
