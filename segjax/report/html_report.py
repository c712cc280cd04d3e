"""Writes report.html: a run on one page, which opens from disk and needs no network.

It shows what the run writes anyway, read by `charts`, `summary` and `response_data`.
"""

import base64
import contextlib
import datetime
import functools
import hashlib
import importlib.resources
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from segjax import processes
from segjax.evaluation.segment_records import AnnotatedResponse
from segjax.report import charts, response_data, response_log, summary
from segjax.report.console import log
from segjax.report.metric_log import METRICS_FILE
from segjax.storage import write_text_atomically

REPORT_FILE = 'report.html'

_MAX_SHARE = 0.01  # of the run's time that may be spent on writing the page
_FIRST_AFTER = 30.0  # seconds before the page is first written within a stage


class Page:
  """Writes report.html of a run, repeatedly; only the first of several processes does.

  Args:
    workdir: directory of the page and of the stages' directories.
    name: the config's file name.
    stages: names of the stages, in order.
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
    _template()
    self._charts: dict[str, tuple[Any, charts.Charts]] = {}

  def __enter__(self) -> 'Page':
    return self

  def __exit__(self, error: type | None, *_: object) -> None:
    if error is not None:
      self.write('stopped')

  def refresh(self) -> None:
    """Writes the page if that takes at most 1 % of the time since it was last written."""
    if processes.is_first() and self._clock() >= self._due:
      self.write()

  def write(self, state: str = 'running') -> None:
    """Writes the page now. A failure is logged, and does not stop the run.

    Args:
      state: 'running' or 'stopped', of the stage that has begun and is not finished.
    """
    if not processes.is_first():
      return
    begun = self._clock()
    try:
      write_text_atomically(self._workdir / REPORT_FILE, self._html(state))
    except Exception as error:  # the run matters more than its report
      path = self._workdir / REPORT_FILE
      log(f'warning: {path} was not written: {type(error).__name__}: {error}')
    now = self._clock()
    # The longest time so far: a page whose charts are all unchanged takes less than the next one.
    self._max_seconds = max(self._max_seconds, now - begun)
    self._due = now + self._max_seconds / _MAX_SHARE

  def _html(self, state: str) -> str:
    names = [name for name in self._stages if (self._workdir / name).is_dir()]
    config = self._workdir / 'config.json'
    stage_charts = [(name, self._stage_charts(name)) for name in names]
    with_charts = [name for name, stage in stage_charts if stage.main]
    return render(
      title=self._workdir.absolute().name,
      config_name=self._name,
      stages=summary.stages(self._workdir, self._stages, state),
      figures=summary.figures(self._workdir, self._stages),
      warnings=summary.warnings(self._workdir, names),
      charts=stage_charts,
      featured='ppo' if 'ppo' in with_charts else with_charts[-1] if with_charts else '',
      responses=response_data.collect_responses([self._workdir / name for name in names]),
      config=config.read_text(encoding='utf-8') if config.exists() else '',
    )

  def _stage_charts(self, name: str) -> charts.Charts:
    """Returns the stage's charts, drawn again only if the files they show have changed."""
    directory = self._workdir / name
    files = (METRICS_FILE, response_log.RESPONSES_FILE, 'normalizer.json')
    stats = [path.stat() for file in files if (path := directory / file).exists()]
    version = [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]
    if self._charts.get(name, (None,))[0] != version:
      self._charts[name] = (version, charts.stage_charts(directory))
    return self._charts[name][1]


class NoPage(contextlib.nullcontext):
  """The page of a run that writes no files."""

  def __enter__(self) -> 'NoPage':
    return self

  def refresh(self) -> None:
    """Does nothing."""

  def write(self, state: str = 'running') -> None:
    """Does nothing."""


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


def render(**content: Any) -> str:
  """Renders the template with `content`, which replaces empty defaults; all text is escaped."""
  import jinja2

  template = _template()
  script = f'{template["page.js"]}\n\n{template["tokens.js"]}'
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  now = datetime.datetime.now().astimezone()
  defaults = {
    **{'config_name': '', 'stages': (), 'figures': (), 'warnings': (), 'charts': ()},
    **{'featured': '', 'config': '', 'style': template['page.css'], 'script': script},
    # The page's content security policy admits the script of this hash alone.
    'script_hash': base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    'written': now.strftime('%Y-%m-%d %H:%M'),
    'isotime': now.isoformat(timespec='seconds'),
  }
  return environment.from_string(template['page.html.j2']).render(defaults | content)


@functools.cache
def _template() -> dict[str, str]:
  """Reads the files of the template, once: a run must not see them change."""
  folder = importlib.resources.files('segjax.report') / 'template'
  return {file.name: file.read_text(encoding='utf-8').strip() for file in folder.iterdir()}
