"""Estimates how long the rest of a run takes, from the stages that have been timed.

Stages are compared by the passes of their tokens through a network. That is rough: sampling is
slower than its passes say, and rows are shorter than their limit.
"""

from collections.abc import Sequence

from segjax.jobs.registry import JOBS
from segjax.run import inputs
from segjax.run.stage import Stage


class RunEstimate:
  """The time that the stages of a run take, as far as their steps are known."""

  def __init__(self, stages: Sequence[Stage]):
    self._stages = {stage.name: stage for stage in stages}
    self._work: dict[str, float] = {}
    self._seconds: dict[str, float] = {}

  def begin(self, name: str) -> float | None:
    """Returns about the seconds of a stage that begins and of those after it; None if unknown."""
    for later in self._from(name) if len(self._stages) > 1 else ():  # it may read all rows
      # What was unknown may be known now: earlier stages write rows.
      self._work[later] = self._work.get(later) or count_work(self._stages[later])
    return self._scaled(self._from(name), self._seconds)

  def record(self, name: str, seconds: float) -> None:
    """Records how long a stage has taken."""
    self._seconds[name] = seconds

  def seconds_after(self, name: str, seconds: float) -> float | None:
    """Returns about the seconds of the stages after one that takes `seconds`; None if unknown."""
    return self._scaled(self._from(name)[1:], self._seconds | {name: seconds})

  def _from(self, name: str) -> list[str]:
    names = list(self._stages)
    return names[names.index(name) :]

  def _scaled(self, names: list[str], seconds: dict[str, float]) -> float | None:
    """Returns the seconds of stages at the rate of those that have taken `seconds`."""
    timed = [name for name in seconds if self._work.get(name)]
    work = sum(self._work.get(name, 0.0) for name in names)
    if not timed or not work:
      return None
    return work * sum(seconds[name] for name in timed) / sum(self._work[name] for name in timed)


def count_work(stage: Stage) -> float:
  """Returns the passes of tokens through networks of a stage, at most; 0 if unknown."""
  job, settings = JOBS[stage.name], stage.settings
  if job.tokens_per_step is None:
    return 0.0
  try:
    steps = job.num_steps(settings, 0) or job.num_steps(
      settings, inputs.count_local_rows(settings.data)
    )
  except Exception:  # the stage itself reports what is wrong with its rows
    return 0.0
  return float(steps * job.tokens_per_step(settings) * job.passes(settings))
