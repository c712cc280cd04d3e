"""report.html without a browser: what is thinned, what the template escapes, what stands on it."""

import base64
import gzip
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from segjax.report import charts, html_report, plots, response_data, summary

HOSTILE = '</script><script>document.title = "owned"</script><img src=x onerror=alert(1)>'


def sample(step, text='a b', model='policy', pair=None):
  """A response of one segment, a token a word."""
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


def write(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def unpacked(html):
  data = re.search(r'id="data">([^<]*)</script>', html)[1]
  return json.loads(gzip.decompress(base64.b64decode(data)))


@pytest.fixture
def workdir(tmp_path):
  rows = [{'step': k, 'objective/reward': k / 10, 'timing/update': 1.0, 'odd': k} for k in range(9)]
  write(
    tmp_path / 'ppo' / 'metrics.jsonl',
    [*rows, {'step': 9, 'objective/reward': 'nan', 'skipped_updates': 1}],
  )
  write(tmp_path / 'ppo' / 'samples.jsonl', [sample(0), sample(5, HOSTILE)])
  bins = {'p': [0.5, 1.0], 'count': [3, 9], 'mean': [0.1, 0.4], 'std': [1.0, 1.2]}
  c = {'w_mean': 0.4, 'b_mean': 0.4, 'w_std': 0.1, 'b_std': 1.2}
  write(tmp_path / 'normalizer' / 'normalizer.json', [{'coefficients': c, 'bins': bins}])
  (tmp_path / 'config.json').write_text(json.dumps({'wandb_project': HOSTILE}))
  return tmp_path


def test_a_thinned_curve_keeps_its_spikes():
  y = np.sin(np.arange(10_000) / 900)
  y[4321], y[7], y[17] = 50.0, -50.0, np.nan
  at, values = plots.thinned(np.arange(10_000), y)
  assert len(at) <= plots.POINTS
  assert values.max() == 50 and values.min() == -50
  assert (np.diff(at) > 0).all() and np.isfinite(values).all()


@pytest.mark.parametrize('y', [[], [1.0], [float('nan')], [0.0, 0.0]], ids=str)
def test_short_curves_are_drawn_as_they_are(y):
  svg = plots.curve(range(len(y)), {'a': y}, 'one & <two>')
  root = ElementTree.fromstring(svg)
  assert root.attrib['aria-label'] == 'one & <two>'
  assert len(plots.thinned(range(len(y)), y)[0]) == sum(x == x for x in y)


def test_the_running_mean_is_that_of_a_loop():
  y = np.random.default_rng(0).normal(size=30)
  expected = [y[max(0, i - 3) : i + 4].mean() for i in range(30)]
  np.testing.assert_allclose(plots.averaged(y, 6), expected, atol=1e-12)  # float64 sums


def test_charts_have_the_colours_of_the_page():
  for svg in (
    plots.curve(range(100), {'a': range(100), 'b': range(100)}, 'x'),
    plots.stacked([0, 1], {'a': [1, 2], 'b': [1, float('nan')]}, 'x'),
    plots.histogram([0.5, 1, 3], 'x', 'nats', mark=2.0),
    plots.histogram([], 'x', 'tokens', whole=True),
    plots.fit([0.5, 1], [1, 2], [0.1, 0.2], 0.1, 0.2, 'x'),
  ):
    assert '#0000' not in svg and 'var(--' in svg and '<metadata' not in svg


def test_responses_are_thinned_evenly_over_steps():
  lines = [response_data.SampleLocation('x', i, 100, ('step', i // 4)) for i in range(400)]
  chosen = response_data.thinned(lines, 4000)
  steps = sorted({line.group[1] for line in chosen})
  assert 30 <= len(chosen) <= 40 and len(chosen) == 4 * len(steps)
  assert steps[0] == 0 and steps[-1] == 99
  assert max(np.diff(steps)) <= 2 * min(np.diff(steps))
  assert response_data.thinned(lines, 10**9) == lines
  assert response_data.thinned([], 10) == []
  assert len(response_data.thinned(lines[:4], 250)) == 2  # a group too large is cut short


def test_a_page_shows_what_the_run_has_written(workdir):
  html_report.Page(workdir, 'configs/ppo.py', ['reward', 'normalizer', 'ppo']).write()
  html = (workdir / 'report.html').read_text()
  assert [row['step'] for row in unpacked(html)] == [0, 5]
  assert unpacked(html)[1]['segments'][0][0][0].startswith('</script>')
  assert 'Reward per response' in html and 'Where a step’s seconds go' in html
  assert 'Mean(p) of segment scores' in html and 'Entropy of the reference' in html
  assert '1 step(s) were left out as bad, the last was 10' in html
  assert not list(workdir.glob('*.partial'))


def test_text_cannot_become_markup(workdir):
  html_report.Page(workdir, HOSTILE, ['ppo']).write()
  html = (workdir / 'report.html').read_text()
  assert '<script>document.title' not in html and '<img' not in html
  assert html.count('<script') == 2
  assert '&lt;/script&gt;' in html  # the config's


def test_the_page_asks_no_network(workdir):
  (workdir / 'config.json').write_text('{}')
  html_report.Page(workdir, '', ['ppo']).write()
  html = (workdir / 'report.html').read_text()
  urls = set(re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s)>]+)', html))
  assert all(url.startswith(('#', 'data:')) for url in urls), urls


def test_rewriting_takes_a_hundredth_of_the_time(workdir):
  now, taken = [0.0], []
  found = html_report.Page(workdir, '', ['ppo'], clock=lambda: now[0])
  draw = found._html

  def slow(state):
    taken.append(now[0])
    now[0] += 2.0
    return draw(state)

  found._html = slow
  while now[0] < 1000:
    found.refresh()
    now[0] += 1.0
  assert 3 <= len(taken) <= 5
  assert min(np.diff(taken)) >= 200


def test_a_page_that_cannot_be_written_stops_nobody(tmp_path, capsys):
  write(tmp_path / 'ppo' / 'samples.jsonl', [{'step': 0}])
  html_report.Page(tmp_path, '', ['ppo']).write()
  assert 'report.html was not written: KeyError' in capsys.readouterr().out


def test_a_run_that_ends_badly_is_told(workdir):
  with pytest.raises(RuntimeError), html_report.Page(workdir, '', ['ppo', 'evaluate']):
    raise RuntimeError
  states = re.findall(r'<span class="state">(\w+)', (workdir / 'report.html').read_text())
  assert states == ['stopped', 'waiting']


def test_stages_say_where_they_are(workdir):
  write(workdir / 'reward' / 'stage.json', [{'key': {}, 'results': {'seconds': 75.0, 'n': 2}}])
  found = summary.stages(workdir, ['reward', 'ppo', 'evaluate'], 'running')
  assert [(s.state, s.note) for s in found] == [
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
  assert charts.formatted(value) == text


def test_warnings_are_those_of_the_console(tmp_path):
  lines = [{'step': k, 'skipped_updates': int(k == 3), 'policy/clipfrac': 0.6} for k in range(8)]
  write(tmp_path / 'ppo' / 'metrics.jsonl', lines)
  bad, clipped = summary.warnings(tmp_path, ['ppo'])
  assert bad == 'ppo: 1 step(s) were left out as bad, the last was 4'
  assert clipped.startswith('ppo, step 3: the clip holds 60% of the tokens')
