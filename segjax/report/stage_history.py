"""Records in config.json which command ran each stage of a working directory, with its config.

The stages are in the order in which they ran. A command adds its own stages and leaves those of
earlier commands as they are, so that a working directory remembers all of them.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from segjax.storage import write_text_atomically

FILE = 'config.json'
STAGE_FILE = 'stage.json'  # which only the directory of a stage has

_MAX_MESSAGE = 4_000  # characters of an error that are kept


class StageRun(NamedTuple):
  """How a stage was started last, and why it stopped.

  Attributes:
    started: local time, ISO 8601.
    command: the command line; '' if it was started from Python.
    config_file: the config file with its preset.
    config: all settings of the command.
    error: the message of the error that stopped the stage; '' without one.
  """

  started: str
  command: str
  config_file: str
  config: dict[str, Any]
  error: str = ''


def read(workdir: Path) -> dict[str, StageRun]:
  """Returns the stages that ran in a working directory, in their order; {} without a record."""
  try:
    record = json.loads((workdir / FILE).read_text(encoding='utf-8'))
    return {name: StageRun(**entry) for name, entry in record.items()}
  except (OSError, ValueError, TypeError, AttributeError, RecursionError):
    return {}  # absent, damaged, or of another form: the next stage begins a new one


def load_stage(directory: Path) -> dict[str, Any]:
  """Returns the record of a stage, with its key and, once it is done, its results; {} if none."""
  try:
    record = json.loads((directory / STAGE_FILE).read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def record_start(
  workdir: Path, stage: str, command: str, config_file: str, config: dict[str, Any]
) -> None:
  """Records that a stage starts: it moves to the end of the order, without an error."""
  started = datetime.datetime.now().astimezone().isoformat(timespec='seconds')
  runs = read(workdir)
  runs.pop(stage, None)
  _write(workdir, runs | {stage: StageRun(started, command, config_file, config)})


def record_error(workdir: Path, stage: str, message: str) -> None:
  """Records the message of the error that stopped a stage which has started."""
  runs = read(workdir)
  if stage in runs:
    _write(workdir, runs | {stage: runs[stage]._replace(error=message[:_MAX_MESSAGE])})


def stages_in_order(workdir: Path, current: Sequence[str]) -> list[str]:
  """Returns the stages of a working directory, in the order in which they ran.

  Directories of stages that config.json does not know come first, the oldest first; stages of the
  current command that have not begun come last.
  """
  known = list(read(workdir))
  directories = (
    path.parent
    for path in workdir.glob(f'*/{STAGE_FILE}')
    if path.parent.suffix not in ('.old', '.spare') and path.parent.name not in known
  )
  unknown = sorted(directories, key=lambda path: (path / STAGE_FILE).stat().st_mtime_ns)
  ran = [*(path.name for path in unknown), *(name for name in known if (workdir / name).is_dir())]
  return [*ran, *(name for name in current if name not in ran)]


def _write(workdir: Path, runs: dict[str, StageRun]) -> None:
  record = {name: run._asdict() for name, run in runs.items()}
  write_text_atomically(workdir / FILE, json.dumps(record, indent=2) + '\n')
