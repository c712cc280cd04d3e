"""report.html without a browser: which responses it shows, what it contains, what is escaped."""

import base64
import gzip
import json
import re

import numpy as np
import pytest

from segjax.report import charts, html_report, response_data, summary

HOSTILE = '</script><script>document.title = "owned"</script><img src=x onerror=alert(1)>'


def response_record(step, text='a b', model='policy', pair=None):
  """Returns a response of one segment; each word is a token."""
  tokens = re.findall(r'\s*\S+', text)
  segment = {'text': text, 'tokens': tokens, 'entropy': [0.5] * len(tokens)}
  return {
    'step': step,
    'model': model,
    'prompt': [{'role': 'user', 'content': 'Why?'}],
    'segments': [segment | {'score': 1.0, 'reward': -0.5}],
    'totals': {'reward': -0.5, 'kl': 0.1, 'length': len(tokens), 'finished': True},
    'threshold': 2.0,
    'pair': pair,
  }


def write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def decode_responses(html):
  data = re.search(r'id="data">([^<]*)</script>', html)[1]
  return json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture
def workdir(tmp_path):
  rows = [{'step': k, 'objective/reward': k / 10, 'timing/update': 1.0, 'odd': k} for k in range(9)]
  write_lines(
    tmp_path / 'ppo' / 'metrics.jsonl',
    [*rows, {'step': 9, 'objective/reward': 'nan', 'skipped_updates': 1}],
  )
  write_lines(tmp_path / 'ppo' / 'samples.jsonl', [response_record(0), response_record(5, HOSTILE)])
  bins = {'p': [0.5, 1.0], 'count': [3, 9], 'mean': [0.1, 0.4], 'std': [1.0, 1.2]}
  c = {'w_mean': 0.4, 'b_mean': 0.4, 'w_std': 0.1, 'b_std': 1.2}
  write_lines(tmp_path / 'normalizer' / 'normalizer.json', [{'coefficients': c, 'bins': bins}])
  (tmp_path / 'config.json').write_text(json.dumps({'wandb_project': HOSTILE}))
  return tmp_path


def test_responses_are_selected_evenly_over_steps():
  lines = [response_data.SampleLocation('x', i, 100, ('step', i // 4)) for i in range(400)]
  chosen = response_data.downsample(lines, 4000)
  steps = sorted({line.group[1] for line in chosen})
  assert 30 <= len(chosen) <= 40 and len(chosen) == 4 * len(steps)
  assert steps[0] == 0 and steps[-1] == 99
  assert max(np.diff(steps)) <= 2 * min(np.diff(steps))
  assert response_data.downsample(lines, 10**9) == lines
  assert response_data.downsample([], 10) == []
  assert len(response_data.downsample(lines[:4], 250)) == 2  # a truncated group


def test_a_page_shows_what_the_run_wrote(workdir):
  html_report.Page(workdir, 'configs/ppo.py', ['reward', 'normalizer', 'ppo']).write()
  html = (workdir / 'report.html').read_text()
  assert [row['step'] for row in decode_responses(html)] == [0, 5]
  assert decode_responses(html)[1]['segments'][0][0][0].startswith('</script>')
  assert 'Reward per response' in html and 'Seconds per step by part' in html
  assert 'Mean(p) of segment scores' in html and 'Entropy of the reference' in html
  assert 'updates were skipped in 1 step(s), last in step 10' in html
  assert not list(workdir.glob('*.partial'))


def test_text_cannot_become_markup(workdir):
  html_report.Page(workdir, HOSTILE, ['ppo']).write()
  html = (workdir / 'report.html').read_text()
  assert '<script>document.title' not in html and '<img' not in html
  assert html.count('<script') == 2
  assert '&lt;/script&gt;' in html  # the config's


def test_the_page_needs_no_network(workdir):
  (workdir / 'config.json').write_text('{}')
  html_report.Page(workdir, '', ['ppo']).write()
  html = (workdir / 'report.html').read_text()
  urls = set(re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', html))
  assert all(url.startswith(('#', 'data:')) for url in urls), urls


def test_writing_takes_at_most_one_percent_of_the_time(workdir):
  now, written_at = [0.0], []
  page = html_report.Page(workdir, '', ['ppo'], clock=lambda: now[0])
  draw = page._html

  def slow(state):
    written_at.append(now[0])
    now[0] += 2.0
    return draw(state)

  page._html = slow
  while now[0] < 1000:
    page.refresh()
    now[0] += 1.0
  assert 3 <= len(written_at) <= 5
  assert min(np.diff(written_at)) >= 200


def test_a_page_that_cannot_be_written_does_not_stop_the_run(tmp_path, capsys):
  write_lines(tmp_path / 'ppo' / 'samples.jsonl', [{'step': 0}])
  html_report.Page(tmp_path, '', ['ppo']).write()
  assert 'report.html was not written: KeyError' in capsys.readouterr().out


def test_a_run_that_fails_is_shown_as_stopped(workdir):
  with pytest.raises(RuntimeError), html_report.Page(workdir, '', ['ppo', 'evaluate']):
    raise RuntimeError
  states = re.findall(r'<span class="state">(\w+)', (workdir / 'report.html').read_text())
  assert states == ['stopped', 'waiting']


def test_stages_have_states_and_notes(workdir):
  record = {'key': {}, 'results': {'seconds': 75.0, 'n': 2}}
  write_lines(workdir / 'reward' / 'stage.json', [record])
  states = summary.stages(workdir, ['reward', 'ppo', 'evaluate'], 'running')
  assert [(s.state, s.note) for s in states] == [
    *(('done', '1 min 15 s'), ('running', 'step 10'), ('waiting', ''))
  ]


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (0.0, '0'),
    (-5e-8, '0'),
    (-0.0001, '-1.00e-04'),
    (12.345, '12.35'),
    (123456.0, '123,456'),
    (3, '3'),
    (float('nan'), 'nan'),
    (None, '–'),
  ],
)
def test_numbers_are_short(value, text):
  assert charts.format_number(value) == text


def test_warnings_equal_those_of_the_console(tmp_path):
  lines = [{'step': k, 'skipped_updates': int(k == 3), 'policy/clipfrac': 0.6} for k in range(8)]
  write_lines(tmp_path / 'ppo' / 'metrics.jsonl', lines)
  skipped, clipped = summary.warnings(tmp_path, ['ppo'])
  assert skipped == 'ppo: updates were skipped in 1 step(s), last in step 4'
  assert clipped.startswith('ppo, step 3: 60% of the tokens are clipped')


def test_seconds_by_part_include_the_time_between_steps(tmp_path):
  parts = {f'timing/{part}': 0.5 for part in charts.TIMING}
  assert 'timing/between_steps' in parts
  write_lines(tmp_path / 'ppo' / 'metrics.jsonl', [{'step': 0, 'timing/step': 2.5} | parts])
  (chart,) = charts.stage_charts(tmp_path / 'ppo').main
  assert (chart.title, chart.last) == ('Seconds per step by part', '2.500 s')
