"""Writes report.html: a working directory on one page, which opens from disk without a network.

It shows what the stages wrote, whichever command ran them; `stage_history`, `charts`, `summary` and
`response_data` read it.
"""

import base64
import contextlib
import datetime
import functools
import hashlib
import importlib.resources
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from segjax import processes
from segjax.errors import UserError
from segjax.evaluation.segment_records import AnnotatedResponse
from segjax.report import (
  charts,
  metric_names,
  response_data,
  response_log,
  stage_history,
  study_charts,
  summary,
)
from segjax.report.console import log
from segjax.report.metric_log import METRICS_FILE
from segjax.storage import write_text_atomically

REPORT_FILE = 'report.html'

_MAX_SHARE = 0.01  # of the run's time that may be spent on writing the page
_FIRST_AFTER = 30.0  # seconds before the page is first written within a stage


class Page:
  """Writes report.html of a working directory, repeatedly; only the first process does.

  Args:
    workdir: directory of the page and of the stages' directories.
    name: the config's file name.
    stages: names of the stages of the present command, in order.
    clock: returns seconds; replaced in tests.
  """

  def __init__(
    self,
    workdir: Path,
    name: str,
    stages: Sequence[str],
    clock: Callable[[], float] = time.monotonic,
  ):
    self._workdir, self._name, self._stages, self._clock = workdir, name, list(stages), clock
    self._due, self._max_seconds = clock() + _FIRST_AFTER, 0.0
    self._begun, self._error = '', ''
    _template()
    self._charts: dict[str, tuple[Any, charts.Charts]] = {}

  def __enter__(self) -> 'Page':
    return self

  def __exit__(self, error_type: type | None, error: BaseException | None, _: object) -> None:
    if error is not None and processes.is_first():
      self._error = error_message(error)
      stage_history.record_error(self._workdir, self._begun, self._error)
      self.write('stopped')

  def begin(self, stage: str) -> None:
    """Records which stage of the present command runs now; those after it wait."""
    self._begun = stage

  def refresh(self) -> None:
    """Writes the page if that takes at most 1 % of the time since it was last written."""
    if processes.is_first() and self._clock() >= self._due:
      self.write()

  def write(self, state: str = 'running') -> bool:
    """Writes the page now; returns whether it was. A failure is logged and does not stop the run.

    Args:
      state: 'running' or 'stopped', of the stage that has begun, unless it is finished.
    """
    if not processes.is_first():
      return False
    begun, is_written = self._clock(), True
    try:
      write_text_atomically(self._workdir / REPORT_FILE, self._html(state))
    except Exception as error:  # the run matters more than its report
      is_written, path = False, self._workdir / REPORT_FILE
      log(f'warning: {path} was not written: {type(error).__name__}: {error}')
    now = self._clock()
    # The longest time so far: a page whose charts are all unchanged takes less than the next one.
    self._max_seconds = max(self._max_seconds, now - begun)
    self._due = now + self._max_seconds / _MAX_SHARE
    return is_written

  def _html(self, state: str) -> str:
    present = self._unfinished(state)
    names = stage_history.stages_in_order(self._workdir, self._stages)
    # A stage that has not begun may hold what an earlier command wrote, which this one replaces.
    ran = [name for name in names if present.get(name) not in ('starting', 'waiting')]
    runs = stage_history.read(self._workdir)
    return render(
      title=self._workdir.absolute().name,
      config_name=self._name,
      stages=summary.stages(self._workdir, names, present, self._error),
      figures=summary.figures(self._workdir, ran),
      warnings=summary.warnings(self._workdir, ran),
      charts={name: self._stage_charts(name) for name in ran},
      opened={'ppo', *self._stages[-1:]},
      responses=response_data.collect_responses([self._workdir / name for name in ran]),
      commands=_commands({name: run for name, run in runs.items() if name in ran}),
    )

  def _unfinished(self, state: str) -> dict[str, str]:
    """Returns the states of the present command's stages that are not finished."""
    if self._begun not in self._stages:
      return {}
    later = self._stages[self._stages.index(self._begun) + 1 :]
    states = dict.fromkeys(later, 'waiting')
    if 'results' not in stage_history.load_stage(self._workdir / self._begun):
      states[self._begun] = state
    elif later:
      states[later[0]] = 'starting'
    return states

  def _stage_charts(self, name: str) -> charts.Charts:
    """Returns the stage's charts, drawn again only if the files they show have changed."""
    directory = self._workdir / name
    study = (study_charts.RESULTS_FILE, study_charts.SUMMARY_FILE)
    files = (METRICS_FILE, response_log.RESPONSES_FILE, 'normalizer.json', *study)
    stats = [path.stat() for file in files if (path := directory / file).exists()]
    version = [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]
    if self._charts.get(name, (None,))[0] != version:
      self._charts[name] = (version, charts.stage_charts(directory))
    return self._charts[name][1]


class NoPage(contextlib.nullcontext):
  """The page of a run that writes no files."""

  def __enter__(self) -> 'NoPage':
    return self

  def begin(self, stage: str) -> None:
    """Does nothing."""

  def refresh(self) -> None:
    """Does nothing."""

  def write(self, state: str = 'running') -> bool:
    """Does nothing."""
    return False


def write_responses(path: Path, title: str, annotated: Iterable[AnnotatedResponse]) -> int:
  """Writes a page that shows responses only; returns their number."""
  records = [
    response.as_json() | {'totals': {'length': sum(len(s.tokens) for s in response.segments)}}
    for response in annotated
  ]
  data = response_data.encode(records)
  responses = response_data.EncodedResponses(data, len(records), len(records))
  write_text_atomically(path, render(title=title, responses=responses))
  return len(records)


def error_message(error: BaseException) -> str:
  """Returns an error as a person reads it; its type too, unless segjax raised it."""
  if isinstance(error, KeyboardInterrupt):
    return 'interrupted from the keyboard'
  kind = type(error)
  is_plain = isinstance(error, UserError | OSError) or kind.__module__.startswith('segjax.')
  return str(error) if is_plain and str(error) else f'{kind.__name__}: {error}'


def render(**content: Any) -> str:
  """Renders the template with `content`, which replaces empty defaults; all text is escaped."""
  import jinja2

  template = _template()
  script = '\n\n'.join(template[name] for name in ('page.js', 'tokens.js', 'charts.js', 'start.js'))
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  now = datetime.datetime.now().astimezone()
  defaults = {
    **{'config_name': '', 'stages': (), 'figures': (), 'warnings': (), 'charts': {}},
    **{'opened': (), 'commands': (), 'script': script},
    'style': f'{template["page.css"]}\n{template["segments.css"]}',
    # The page's content security policy admits the script of this hash alone.
    'script_hash': base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    'written': now.strftime('%Y-%m-%d %H:%M'),
    'isotime': now.isoformat(timespec='seconds'),
  }
  content = defaults | content
  drawn = [chart for stage in content['charts'].values() for chart in _all_charts(stage)]
  numbers = {id(chart): number for number, chart in enumerate(drawn)}
  environment.filters['number'] = lambda chart: numbers[id(chart)]
  points = response_data.compress([chart.drawing.points for chart in drawn])
  return environment.from_string(template['page.html.j2']).render(content, points=points)


def _all_charts(stage: charts.Charts) -> list[charts.Chart]:
  return [*stage.main, *(chart for _, group in stage.groups for chart in group)]


def _commands(runs: dict[str, stage_history.StageRun]) -> list[dict[str, Any]]:
  """Returns the commands that ran the stages: each with its stages and its config as text."""
  commands: dict[tuple[str, str], dict[str, Any]] = {}
  for name, run in runs.items():
    text = json.dumps(run.config, indent=2)
    command = commands.setdefault(
      (run.command, text), {'stages': [], 'started': run.started, 'config': text}
    )
    command['line'] = run.command or run.config_file
    command['stages'].append(metric_names.stage_name(name))
  return list(commands.values())


@functools.cache
def _template() -> dict[str, str]:
  """Reads the files of the template, once: a run must not see them change."""
  folder = importlib.resources.files('segjax.report') / 'template'
  return {file.name: file.read_text(encoding='utf-8').strip() for file in folder.iterdir()}
