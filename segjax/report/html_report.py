"""report.html: all of a run on one page, which opens from disk and needs no network.

What is on it comes from what the run writes anyway: `curves`, `digest` and `table` read that.
"""

import base64
import datetime
import functools
import hashlib
import importlib.resources
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from segjax import processes
from segjax.report import charts, response_data, response_log, summary
from segjax.report.console import log
from segjax.report.metric_log import FILE as METRICS
from segjax.storage import write_text_atomically

FILE = 'report.html'

_SHARE = 0.01  # of the run's time that rewriting may take
_FIRST = 30.0  # seconds before it is written the first time within a stage


class Page:
  """Writes report.html of a run as it goes on; of several processes the first does.

  Args:
    workdir: where it goes, and where the stages' directories are.
    name: of the config.
    stages: their names.
    clock: seconds, for tests.
  """

  def __init__(
    self,
    workdir: Path,
    name: str,
    stages: Sequence[str],
    clock: Callable[[], float] = time.monotonic,
  ):
    self._workdir, self._name, self._stages, self._clock = workdir, name, list(stages), clock
    self._due, self._most = clock() + _FIRST, 0.0
    _template()
    self._charts: dict[str, tuple[Any, charts.Charts]] = {}

  def __enter__(self) -> 'Page':
    return self

  def __exit__(self, error: type | None, *_: object) -> None:
    if error is not None:
      self.write('stopped')

  def refresh(self) -> None:
    """Writes the page, if that takes no more than a hundredth of the time since it was written."""
    if processes.is_first() and self._clock() >= self._due:
      self.write()

  def write(self, state: str = 'running') -> None:
    """Writes the page now. Where that fails the run goes on, and says why.

    Args:
      state: of the stage that is begun and not done: running or stopped.
    """
    if not processes.is_first():
      return
    begun = self._clock()
    try:
      write_text_atomically(self._workdir / FILE, self._html(state))
    except Exception as error:  # the run is worth more than its report
      log(f'warning: {self._workdir / FILE} was not written: {type(error).__name__}: {error}')
    now = self._clock()
    self._most = max(
      self._most, now - begun
    )  # one without a new chart costs little, and says little
    self._due = now + self._most / _SHARE

  def _html(self, state: str) -> str:
    there = [name for name in self._stages if (self._workdir / name).is_dir()]
    config = self._workdir / 'config.json'
    charts = [(name, self._charts_of(name)) for name in there]
    drawn = [name for name, found in charts if found.main]
    return rendered(
      title=self._workdir.absolute().name,
      config_name=self._name,
      stages=summary.stages(self._workdir, self._stages, state),
      figures=summary.figures(self._workdir, self._stages),
      warnings=summary.warnings(self._workdir, there),
      charts=charts,
      featured='ppo' if 'ppo' in drawn else drawn[-1] if drawn else '',
      responses=response_data.of_run([self._workdir / name for name in there]),
      config=config.read_text(encoding='utf-8') if config.exists() else '',
    )

  def _charts_of(self, name: str) -> charts.Charts:
    """The stage's charts, drawn again only if what they show was written to."""
    directory = self._workdir / name
    paths = [directory / file for file in (METRICS, response_log.FILE, 'normalizer.json')]
    stats = [path.stat() for path in paths if path.exists()]
    seen = [(stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]
    if self._charts.get(name, (None,))[0] != seen:
      self._charts[name] = (seen, charts.of_stage(directory))
    return self._charts[name][1]


def write_responses(
  path: Path, title: str, annotated: Iterable[response_log.AnnotatedResponse]
) -> int:
  """Writes a page of the responses alone; returns how many there are."""
  data = [
    one.as_json() | {'totals': {'length': sum(len(s.tokens) for s in one.segments)}}
    for one in annotated
  ]
  responses = response_data.EncodedResponses(response_data.packed(data), len(data), len(data))
  write_text_atomically(path, rendered(title=title, responses=responses))
  return len(data)


def rendered(**content: Any) -> str:
  """The page of what the template asks for; all text is escaped."""
  import jinja2

  text = _template()
  style, script = text['page.css'], f'{text["page.js"]}\n\n{text["tokens.js"]}'
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
  )
  template = environment.from_string(text['page.html.j2'])
  now = datetime.datetime.now().astimezone()
  nothing = {
    'config_name': '',
    'stages': (),
    'figures': (),
    'warnings': (),
    'charts': (),
    'featured': '',
  }
  return template.render(
    nothing
    | {'config': '', 'style': style, 'script': script}
    | {'digest': base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}
    | {'written': now.strftime('%Y-%m-%d %H:%M'), 'isotime': now.isoformat(timespec='seconds')}
    | content
  )


@functools.cache
def _template() -> dict[str, str]:
  """The files of the template, read once: a run does not see them change."""
  folder = importlib.resources.files('segjax.report') / 'template'
  return {file.name: file.read_text(encoding='utf-8').strip() for file in folder.iterdir()}
