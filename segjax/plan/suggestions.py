"""Changes of settings that would make a plan fit, the cheapest first, each with its peak.

Resident arrays are computed from shapes. Temporaries are the measured ones; they are assumed to
shrink in proportion to the rows at once, except for the gradient accumulator.
"""

import dataclasses
import math
import operator
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from segjax.config.lora import resolve_lora
from segjax.config.settings import Settings, replace
from segjax.config.validate import longest_sequence
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import batch_devices
from segjax.plan import abstract_arrays
from segjax.plan.phase_plan import PhasePlan, in_gib, live_bytes
from segjax.plan.phases import JobPlan


@dataclasses.dataclass(frozen=True)
class SettingChange:
  """A new value of a setting.

  Attributes:
    rows: the share of rows that phases then have at once, by name of the phase.
  """

  key: str
  value: int | str
  rows: dict[str, float] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    return f'--config.{self.key}={self.value}'


@dataclasses.dataclass(frozen=True)
class Measured:
  """A job whose phases were compiled.

  Attributes:
    limit: bytes of a device.
    lengths: of the texts of a step, one of `lengths.KINDS`.
  """

  job: JobPlan
  settings: Settings
  network: LlamaConfig
  mesh: Mesh
  memory: list[PhasePlan]
  limit: float | int
  lengths: str


def suggest_changes(measured: Measured) -> list[str]:
  """Returns a line per change that lowers the peak, and a last one with all that are needed."""
  if any(phase.refused and not phase.peak for phase in measured.memory):
    return ['use fewer rows at once or more chips: the compiler refused a phase']
  peak = max(math.inf if phase.refused else phase.peak for phase in measured.memory)
  lines, selected = [], []
  for change in _changes(measured):
    alone = peak_with([change], measured)
    if alone < peak:
      lines.append(f'{change}: peak {in_gib(alone)} GiB')
    if peak_with(selected, measured) > measured.limit:
      # The last value of a key is the smallest that was tried.
      selected = [other for other in selected if other.key != change.key] + [change]
  together = peak_with(selected, measured)
  verdict = 'they fit' if together <= measured.limit else 'not enough: use more chips'
  return [*lines, f'all of {" ".join(map(str, selected))}: peak {in_gib(together)} GiB, {verdict}']


def peak_with(changes: list[SettingChange], measured: Measured) -> float | int:
  """Returns the largest peak of all phases under these changes, in bytes; inf if one is refused."""
  settings = replace(measured.settings, **{change.key: change.value for change in changes})
  programs = measured.job.programs(
    settings, measured.network, measured.mesh, measured.limit, measured.lengths
  )
  memory = {phase.name: phase for phase in measured.memory}
  peaks: list[float | int] = []
  for phase in programs.phases:
    if phase.name not in memory:
      continue
    if phase.refused:
      return math.inf
    before = memory[phase.name]
    extra, fixed = before.temporaries + before.outputs - before.aliased, 0
    share = min((change.rows.get(phase.name, 1.0) for change in changes), default=1.0)
    if phase.name.endswith('update'):  # the gradient has the parameters' size, whatever the rows
      size = abstract_arrays.bytes_per_device(phase.arguments[0].params)
      fixed = min(phase.gradients * size, extra)
    peaks.append(live_bytes(phase, programs) + fixed + int((extra - fixed) * share))
  return max(peaks)


def _changes(measured: Measured) -> Iterator[SettingChange]:
  """Yields changes in order: those that cost time alone, then those that change numbers."""
  job, settings = measured.job, measured.settings
  devices = batch_devices(measured.mesh)
  for at_once in job.rows_at_once(settings):
    key, parts = at_once.key, devices
    rows = _get(settings, key) or _get(settings, at_once.total_key)
    if at_once.tokens_key and (tokens := _get(settings, at_once.tokens_key)):
      # A piece has room for a row of the longest sequences on each device.
      longest, _ = longest_sequence(settings, job.name)
      key, rows, parts = at_once.tokens_key, tokens, -(-longest * devices // measured.mesh.size)
    for share in _shares(rows, parts):
      yield SettingChange(key, int(rows * share), dict.fromkeys(at_once.phases, share))
  has_base = any(resolve_lora(settings, name) for name in ('policy', 'critic'))
  if job.has_frozen and settings.runtime.frozen_params_memory == 'device' and not has_base:
    yield SettingChange('runtime.frozen_params_memory', 'host')
  for key in job.optimizers(settings):
    if _get(settings, f'{key}.moments_dtype') == 'float32':
      yield SettingChange(f'{key}.moments_dtype', 'bfloat16')
  if settings.runtime.param_dtype == 'float32':
    yield SettingChange('runtime.param_dtype', 'bfloat16')


def _shares(rows: int, devices: int) -> list[float]:
  """Returns those of 1/2 and 1/4 that leave a number of rows divisible by the devices."""
  return [1 / n for n in (2, 4) if rows % (n * devices) == 0]


def _get(settings: Settings, key: str) -> Any:
  return operator.attrgetter(key)(settings)
