"""Checks after the training of a stage that it has changed its networks."""

from segjax import processes
from segjax.errors import UserError
from segjax.report.metric_log import METRICS_FILE
from segjax.run.stage import Stage
from segjax.train.checkpoint import TrainStates
from segjax.train.checksums import checksums


def check_trained(stage: Stage, before: dict[str, int], states: TrainStates) -> None:
  """Logs a warning for each network whose weights are what they were.

  Args:
    stage: the stage.
    before: `checksums` of the states before the first step; {} checks nothing.
    states: the states after the last step.

  Raises:
    UserError: every update was skipped.
  """
  if not before:
    return
  updates = [int(processes.to_host(states[name].step)) for name in before]
  if not any(updates):
    raise UserError(
      f'{stage.name} made no update: all steps were skipped, because a bound of config.ppo.skip_if '
      f'or a value that is not finite forbade them; see {stage.directory / METRICS_FILE}.'
    )
  after = checksums(states)
  for name, checksum in before.items():
    if checksum == after[name]:
      stage.log(f'warning: training has not changed a single weight of the {name} model')
