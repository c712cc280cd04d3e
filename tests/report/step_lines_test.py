"""Lines of a stage's steps: when one is printed, the time left, names that a person reads."""

import itertools
import types

import pytest

from segjax.report import step_lines
from segjax.report.console import ProgressBar
from segjax.report.step_lines import StepLines

SHOW = ('objective/reward', 'objective/kl', 'response/length_mean', 'segments/per_response')
VALUES = dict(zip(SHOW, (12.25, 3.21, 17.6, 5.9), strict=True))


@pytest.fixture
def run(capsys, monkeypatch):
  """Returns a function: (seconds per step, values of each step) -> lines on the console."""
  clock = [0.0]
  monkeypatch.setattr(step_lines, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))

  def run_steps(seconds, steps, total=None, every=5.0, first=0.0, after=lambda _: None):
    bar = ProgressBar('ppo', total or len(steps), in_log_file=not every)
    lines = StepLines(bar, SHOW, every, after)
    clock[0] += first  # for compiling
    for step, values in enumerate(steps):
      clock[0] += seconds
      lines.update(step, VALUES | values)
    lines.close()
    return capsys.readouterr().out.splitlines()

  return run_steps


def _steps(lines):
  return [int(line.split()[2]) for line in lines]


def test_a_line_says_which_step_and_how_long_is_left(run):
  lines = run(60, [{'perf/tokens_per_second': 7432.0}] * 3, total=59, first=600)
  assert 'left' not in lines[0]  # compiling says nothing about the other steps
  assert lines[1] == (
    'ppo         step 2 of 59: reward 12.2, KL 3.21, length 17.6, segments 5.9, 7.4k tok/s; '
    '57:00 left'
  )
  (line,) = run(2, [{}] * 2, total=5, after=lambda seconds: 10 * seconds)
  assert line.endswith('; 00:06 left, whole run about 01:46')


@pytest.mark.parametrize('seconds, total, max_gap', [(1.2, 45, 5), (300, 59, 1), (0.1, 200, 51)])
def test_the_demo_and_the_published_run_print_every_few_steps(run, seconds, total, max_gap):
  steps = [0, *_steps(run(seconds, [{}] * total))]
  assert steps[-1] == total
  assert max(after - before for before, after in itertools.pairwise(steps)) <= max_gap


def test_lines_are_rarer_in_a_long_stage(run):
  lines = run(1, [{}] * 18_000)  # five hours
  assert 300 < len(lines) < 700
  steps = _steps(lines)
  assert steps[1] - steps[0] == 5 and steps[-2] - steps[-3] == 60


def test_every_evaluation_is_a_line(run):
  evaluation = {'eval/reward': 1.5, 'eval/kl': 2.0, 'eval/length_mean': 18.0, 'eval/gold': 0.25}
  lines = run(0.1, [{}, {}, evaluation, {}])
  assert lines == [
    'ppo         step 3 of 4: reward 12.2, KL 3.21, length 17.6, segments 5.9; 00:00 left',
    'ppo         step 3 of 4, held out: gold 0.25, reward 1.5, KL 2, length 18',
    'ppo         step 4 of 4: reward 12.2, KL 3.21, length 17.6, segments 5.9',
  ]


def test_rounding_errors_are_zero(run):
  (line,) = run(1, [{'objective/kl': -1.6e-8}])
  assert 'KL 0,' in line


def test_a_stage_that_stops_shows_its_last_step(run):
  assert _steps(run(0.1, [{}] * 3, total=9)) == [3]


def test_without_lines_a_log_file_has_the_bar(run):
  (line,) = run(20, [{}] * 3, every=0.0)
  assert '| 3/3 [' in line
