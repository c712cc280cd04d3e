"""Lines, bars and tables in a log file, and a bar on a narrow terminal."""

import io
import sys

import pytest

from segjax.report import console


def test_lines_of_a_stage_begin_with_its_name(capsys):
  console.log('hello')
  console.log('300 rows', 'sft')
  assert capsys.readouterr().out == 'hello\nsft         300 rows\n'


def test_a_line_wider_than_the_terminal_is_wrapped_below_its_text(monkeypatch, capsys):
  monkeypatch.setenv('COLUMNS', '40')
  whole = f'one{console.NO_BREAK}item,'
  path = '/a/long/path-that-is/kept/in/one/piece.json'
  console.log(f'ab  cd {path} {"word " * 9}', 'sft')
  assert capsys.readouterr().out.count('\n') == 1  # a log file keeps lines whole, for grep
  monkeypatch.setattr(sys.stdout, 'isatty', lambda: True)
  console.log(f'ab  cd {path} {"word " * 9}', 'sft')
  assert capsys.readouterr().out.splitlines() == [
    'sft         ab  cd',
    f'            {path}',
    '            word word word word word',
    '            word word word word',
  ]
  console.log(f'{whole} ' * 4, 'sft')
  assert capsys.readouterr().out.splitlines() == [
    'sft         one item, one item,',
    '            one item, one item,',
  ]


def test_bar_in_a_log_is_one_line(capsys):
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
def test_bar_on_a_narrow_terminal_is_not_truncated(monkeypatch, stage, total, note):
  screen = io.StringIO()
  screen.isatty = lambda: True
  monkeypatch.setattr(sys, 'stdout', screen)
  monkeypatch.setenv('COLUMNS', '80')
  monkeypatch.setenv('LINES', '24')
  bar = console.ProgressBar(stage, total)
  bar._bar.ncols, bar._bar.dynamic_ncols = 80, None
  bar._bar.start_t -= 5 * 3600  # after five hours, with five left
  bar.update(total // 2, note)
  bar._bar.refresh()
  bar.close()
  *_, line = screen.getvalue().split('\r')
  line = line.rstrip('\n')
  assert line.startswith(f'{stage:<12}|') and line.endswith(note)
  assert f'{total // 2}/{total} ' in line and ' left, ' in line
  assert len(line) <= 80


def test_long_stage_prints_at_intervals(capsys, monkeypatch):
  monkeypatch.setattr(console, '_SECONDS', -1)
  bar = console.ProgressBar('ppo', 3, start=1)
  bar.update(2)
  bar.update(3)
  bar.close()
  lines = capsys.readouterr().out.splitlines()
  assert [line.partition('%')[0].split()[-1] for line in lines] == ['67', '100']


def test_bar_without_progress_prints_nothing(capsys):
  console.ProgressBar('ppo', 3, start=3).close()
  assert capsys.readouterr().out == ''


def test_track_yields_the_items(capsys):
  assert list(console.track('evaluate', iter('abc'), 3, 'policy')) == ['a', 'b', 'c']
  assert 'policy' in capsys.readouterr().out


def test_table_aligns_its_columns(capsys):
  console.table('Title', ('', 'before'), [('gold reward', '0.5'), ('KL', '12.0')])
  assert capsys.readouterr().out.splitlines() == [
    'Title',
    '             before',
    '───────────────────',
    'gold reward     0.5',
    'KL             12.0',
    '',
  ]


def test_table_in_a_log_shortens_its_first_column_to_100(capsys):
  console.table('', ('segment', 'reward'), [('a word ' * 20, '-0.5'), ('日本', '+0.25'), ('', '')])
  lines = capsys.readouterr().out.splitlines()
  assert [len(line) for line in lines[:3]] == [100, 100, 100]
  assert '…' in lines[2] and lines[2].endswith(' -0.5')
  assert len(lines[3]) == 98 and lines[3].endswith(' +0.25')  # both characters are two columns wide


def test_table_without_rows_has_its_head(capsys):
  console.table('T', ('a', 'b'), [])
  assert capsys.readouterr().out == 'T\na  b\n────\n\n'
