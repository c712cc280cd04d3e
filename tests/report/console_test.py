"""Lines, bars and tables as a log file gets them."""

import io
import sys

import pytest

from segjax.report import console


def test_lines_of_a_stage_begin_with_its_name(capsys):
  console.log('hello')
  console.log('300 rows', 'sft')
  assert capsys.readouterr().out == 'hello\nsft         300 rows\n'


def test_bar_in_a_log_is_one_whole_line(capsys):
  bar = console.ProgressBar('sft', 4)
  for done in range(1, 5):
    bar.update(done, f'loss={done}')
  bar.close()
  out = capsys.readouterr().out
  assert out.count('\n') == 1
  assert '\r' not in out
  assert out.startswith('sft         100%|')
  assert '4/4' in out and 'loss=4' in out
  assert len(out) <= 101


@pytest.mark.parametrize(
  'stage, total, note',
  [
    ('ppo', 59, '12.3k tok/s, reward -0.231, kl 13.2'),
    ('sft', 9000, '25.2k tok/s, loss 1.69, entropy 1.51'),
    ('reward', 9000, '12.2k tok/s, loss 0.693, accuracy 0.512'),
  ],
)
def test_bar_on_a_narrow_terminal_cuts_nothing_off(monkeypatch, stage, total, note):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr(sys, 'stdout', screen)
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setenv('LINES', '24')
  bar = console.ProgressBar(stage, total)
  bar._bar.ncols, bar._bar.dynamic_ncols = 80, None
  bar._bar.start_t -= 5 * 3600  # hours have gone by, and as many are left
  bar.update(total // 2, note)
  bar._bar.refresh()
  bar.close()
  *_, line = screen.getvalue().split('\r')
  line = line.rstrip('\n')
  assert line.startswith(f'{stage:<12}|') and line.endswith(note)
  assert f'{total // 2}/{total} ' in line and ' left, ' in line
  assert len(line) <= 80


def test_long_stage_is_heard_of_now_and_then(capsys, monkeypatch):
  monkeypatch.setattr(console, '_SECONDS', -1)
  bar = console.ProgressBar('ppo', 3, start=1)
  bar.update(2)
  bar.update(3)
  bar.close()
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition('%')[0].split()[-1] for line in lines] == ['67', '100']


def test_bar_that_did_nothing_is_silent(capsys):
  console.ProgressBar('ppo', 3, start=3).close()
  assert capsys.readouterr().out == ''


def test_track_gives_the_items(capsys):
  assert list(console.track('evaluate', iter('abc'), 3, 'policy')) == ['a', 'b', 'c']
  assert 'policy' in capsys.readouterr().out


def test_table_fits_a_page(capsys):
  console.table('Title', ('', 'before'), [('gold reward', '0.5'), ('KL', '1.0')])
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].strip() == 'Title'
  assert max(map(len, lines)) <= 100
  assert any('gold reward' in line and line.rstrip().endswith('0.5') for line in lines)
