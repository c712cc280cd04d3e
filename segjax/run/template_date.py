"""Fixes the date that chat templates read, once for all stages of a working directory."""

import dataclasses
from pathlib import Path

from segjax import processes
from segjax.config.settings import replace
from segjax.data.template_clock import today
from segjax.run import stage_record
from segjax.run.stage import Stage


def with_template_date(stage: Stage) -> Stage:
  """Returns the stage with config.data.template_date set, where the user left it empty.

  The date is the one that the stage recorded when it was started before, else that of another stage
  in the working directory, else today's: a run that goes on the next day reads the same prompts.
  """
  if stage.settings.data.template_date:
    return stage
  date = processes.broadcast_from_first(_recorded_date(stage.directory) or today())
  settings = replace(stage.settings, **{'data.template_date': date})
  return dataclasses.replace(stage, settings=settings)


def _recorded_date(directory: Path) -> str:
  """Returns the date in the stage's key, or the first in those of its neighbours; '' if none."""
  others = sorted(file.parent for file in directory.parent.glob(f'*/{stage_record.FILE}'))
  for path in (directory, *others):
    data = stage_record.stored_key(path).get('settings', {}).get('data')
    date = data.get('template_date') if isinstance(data, dict) else ''
    if date and isinstance(date, str):
      return date
  return ''
