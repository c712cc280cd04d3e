"""report.html without a browser: which responses it shows, what it contains, what is escaped."""

import base64
import gzip
import json
import re

import numpy as np
import pytest

from segjax.errors import UserError
from segjax.report import (
  charts,
  html_report,
  metric_docs,
  metric_names,
  response_data,
  stage_history,
  stage_tables,
  summary,
)

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
  stage_history.record_start(tmp_path, 'ppo', HOSTILE, '', {'wandb_project': HOSTILE})
  return tmp_path


def write_stage(workdir, name, results=None, **key):
  record = {'key': {'settings': key}} | ({} if results is None else {'results': results})
  write_lines(workdir / name / 'stage.json', [record])


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


def test_numbers_that_are_not_finite_reach_the_browser_as_null():
  """A browser parses no NaN: one gold reward would hide all responses."""
  record = response_record(0)
  record['totals']['gold'] = float('nan')
  record['segments'][0]['reward'] = float('inf')
  (decoded,) = decode_responses(f'id="data">{response_data.encode([record])}</script>')
  assert decoded['totals']['gold'] is None and decoded['segments'][0][3] is None
  assert decoded['totals']['kl'] == 0.1


def test_a_page_shows_what_the_run_wrote(workdir):
  html_report.Page(workdir, 'configs/ppo.py', ['reward', 'normalizer', 'ppo']).write()
  html = (workdir / 'report.html').read_text()
  assert [row['step'] for row in decode_responses(html)] == [0, 5]
  assert decode_responses(html)[1]['segments'][0][0][0].startswith('</script>')
  assert 'Reward per response, before KL' in html and 'Seconds of a step, by part' in html
  assert 'Mean of segment scores' in html and 'Entropy of the reference' in html
  assert 'PPO: updates were skipped in 1 step(s), last in step 10' in html
  assert not list(workdir.glob('*.partial'))


def test_text_cannot_become_markup(workdir):
  html_report.Page(workdir, HOSTILE, ['ppo']).write()
  html = (workdir / 'report.html').read_text()
  assert '<script>document.title' not in html and '<img' not in html
  assert html.count('<script') == 3
  assert '&lt;/script&gt;' in html  # the config's


def test_the_page_needs_no_network(workdir):
  (workdir / 'config.json').unlink()  # its hostile text looks like an address
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
  assert not html_report.Page(tmp_path, '', ['ppo']).write()
  assert 'report.html was not written: KeyError' in capsys.readouterr().out


def test_a_run_that_fails_is_shown_as_stopped(workdir):
  """With its message, which the page keeps when another command writes it."""
  page = html_report.Page(workdir, '', ['ppo', 'evaluate'])
  page.begin('ppo')
  with pytest.raises(UserError), page:
    raise UserError(f'config.x=1 is wrong {HOSTILE}; set it to 2.')
  assert stage_states(workdir) == {'PPO': 'stopped', 'Evaluation': 'waiting'}
  write_stage(workdir, 'ppo')
  write_stage(workdir, 'answers', {'seconds': 1.0, 'answered': 3})
  later = html_report.Page(workdir, '', ['answers'])
  later.begin('answers')
  later.write()
  html = (workdir / 'report.html').read_text()
  assert stage_states(workdir) == {'PPO': 'stopped', 'Answers for a judge': 'done'}
  assert 'PPO stopped at step 10' in html and 'config.x=1 is wrong &lt;/script&gt;' in html
  stage_history.record_start(workdir, 'ppo', '', '', {})
  later.write()
  assert 'config.x=1' not in (workdir / 'report.html').read_text()


def stage_states(workdir):
  """Returns the states on the page, by the stages' names in their order."""
  html = (workdir / 'report.html').read_text()
  items = re.findall(r'<li class="(\w+)">(?:<a [^>]*>|<b>)([^<]*)', html)
  return {name: state for state, name in items}


@pytest.mark.parametrize(
  ('error', 'message'),
  [
    (UserError('a=1 is wrong; set 2.'), 'a=1 is wrong; set 2.'),
    (FileNotFoundError('no x'), 'no x'),
    (KeyError('y'), "KeyError: 'y'"),
    (KeyboardInterrupt(), 'interrupted from the keyboard'),
    (RuntimeError(), 'RuntimeError: '),
  ],
  ids=str,
)
def test_messages_of_errors(error, message):
  assert html_report.error_message(error) == message


def test_stages_have_states_and_notes(workdir):
  write_stage(workdir, 'reward', {'seconds': 75.0, 'n': 2})
  write_stage(workdir, 'ppo', ppo={'max_steps': 45})
  present = {'ppo': 'running', 'evaluate': 'waiting'}
  states = summary.stages(workdir, ['reward', 'ppo', 'evaluate'], present)
  assert [(s.state, s.note) for s in states] == [
    *(('done', '1 min 15 s'), ('running', 'step 10 of 45'), ('waiting', ''))
  ]


INTERVALS = {
  'before': {'gold': {'mean': -0.5, 'low': -0.6, 'high': -0.4, 'n': 8}, 'kl_nats': 0.0},
  'after': {
    'gold': {'mean': 0.25, 'low': 0.0, 'high': 0.5, 'n': 8},
    'win_rate_gold': {'mean': 0.75, 'low': 0.5, 'high': 1.0, 'n': 8},
    'gold_gain': {'mean': 0.75, 'low': 0.5, 'high': 1.0, 'n': 8},
    'lc_win_rate_gold': {'mean': 0.7, 'low': 0.4, 'high': 1.0, 'n': 8, 'length_effect': 0.1},
    'kl_nats': 3.5,
  },
  'seconds': 2.0,
}


def test_the_page_shows_every_stage_in_the_order_in_which_they_ran(workdir):
  """Whichever command ran last: the curves of PPO stay, and answers have a section."""
  accuracy = {'mean': 0.75, 'low': 0.5, 'high': 0.9, 'n': 12}
  figures = {'accuracy': accuracy, 'length_baseline_accuracy': 0.5, 'margin': 1.0, 'ece': 0.1}
  pairs = {'subsets': {'chat': figures}, 'all': figures, 'truncated': 0, 'reward_bench': {}}
  write_stage(workdir, 'ppo', {'seconds': 5.0, 'reward': 0.8})
  write_stage(workdir, 'evaluate', INTERVALS)
  write_stage(workdir, 'evaluate_reward', {'pairs_read': 12, 'pairs': pairs, 'counts': {}})
  write_stage(workdir, 'answers', {'judge': 'MT-Bench', 'answered': 3})
  for name in ('evaluate', 'evaluate_reward', 'answers'):
    stage_history.record_start(workdir, name, f'segjax {name}', '', {'seed': len(name)})
  page = html_report.Page(workdir, '', ['answers'])
  page.begin('answers')
  page.write()
  html = (workdir / 'report.html').read_text()
  assert list(stage_states(workdir)) == [
    *('PPO', 'Evaluation', 'Evaluation of the reward model', 'Answers for a judge')
  ]
  assert 'Reward per response, before KL' in html  # the curves of PPO
  assert '0.750 [0.500,\u00a0' in html and 'Win rate by gold reward' in html
  assert '<td data-column="pairs">12</td>' in html and 'MT-Bench' in html
  for name in ('evaluate', 'evaluate_reward', 'answers'):
    assert f'>segjax {name}</pre>' in html
  # An older stage that runs again moves to the end; the evaluation is then of an older policy.
  write_stage(workdir, 'evaluate', INTERVALS, policy={'path': 'ppo/model'})
  stage_history.record_start(workdir, 'ppo', 'segjax ppo', '', {})
  page.write()
  assert list(stage_states(workdir))[-1] == 'PPO'
  assert 'PPO ran again since' in (workdir / 'report.html').read_text()


def test_the_comparison_comes_first(workdir):
  write_stage(workdir, 'ppo', {'seconds': 5.0})
  write_stage(workdir, 'evaluate', INTERVALS)
  html_report.Page(workdir, '', []).write()
  html = (workdir / 'report.html').read_text()
  order = [html.index(f'id="{name}"') for name in ('comparison', 'responses', 'stage-ppo')]
  assert order == sorted(order)


def test_a_stage_that_waits_does_not_show_what_it_will_replace(workdir):
  write_stage(workdir, 'evaluate', INTERVALS)
  page = html_report.Page(workdir, '', ['ppo', 'evaluate'])
  page.begin('ppo')
  page.write()
  html = (workdir / 'report.html').read_text()
  assert stage_states(workdir) == {'PPO': 'running', 'Evaluation': 'waiting'}
  assert 'win rate' not in html.lower() and 'Reward before KL, per response' in html
  write_stage(workdir, 'ppo', {'seconds': 1.0})
  page.write()
  assert stage_states(workdir) == {'PPO': 'done', 'Evaluation': 'starting'}
  assert 'win rate' not in (workdir / 'report.html').read_text().lower()


def test_a_figure_has_one_value_on_the_page(workdir):
  """The last value is in the key figures, in the stage's results and above its curve."""
  lines = [{'step': k, 'objective/reward': k / 3, 'objective/kl': k / 7} for k in range(30)]
  write_lines(workdir / 'ppo' / 'metrics.jsonl', lines)
  write_stage(workdir, 'ppo', {'reward': 29 / 3, 'kl': 29 / 7})
  html_report.Page(workdir, '', []).write()
  html = (workdir / 'report.html').read_text()
  key_figures = {f.label: (f.scope, f.value, f.note) for f in summary.figures(workdir, ['ppo'])}
  assert key_figures == {
    'Reward before KL, per response': ('training prompts, step 30', '9.667', '0 at step 1'),
    'KL to the reference, nats per response': ('training prompts, step 30', '4.143', '0 at step 1'),
  }
  assert html.count('>9.667') == 3 and html.count('>4.143') == 3


def test_tables_show_results_that_have_no_label():
  results = {'before': {'new_metric': 1.0}, 'after': {'new_metric': 2.0}}
  (table,) = stage_tables.stage_tables('evaluate', results)
  assert [(row.label, row.cells) for row in table.rows] == [('New metric', ('1.000', '2.000'))]
  assert stage_tables.stage_tables('sft', {'loss': 1.0}) == []


def test_marks_lie_on_the_scale_of_their_row():
  (table,) = stage_tables.stage_tables('evaluate', INTERVALS)
  assert [row.middle for row in table.rows[:3]] == [None, 0.5, 0.5]
  gold, gain, rate = (row.marks for row in table.rows[:3])
  assert [(m.kind, m.mean, m.low, m.high) for m in gold] == [
    ('before', 0.0909, 0.0, 0.1818),
    ('after', 0.7727, 0.5455, 1.0),
  ]
  assert [(m.mean, m.low, m.high) for m in gain] == [(0.875, 0.75, 1.0)]  # of -1 to 1
  assert [(m.mean, m.low, m.high) for m in rate] == [(0.75, 0.5, 1.0)]


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
  assert skipped == 'PPO: updates were skipped in 1 step(s), last in step 4'
  assert clipped.startswith('PPO, step 3: 60% of the tokens are clipped')


def test_seconds_by_part_include_the_time_between_steps(tmp_path):
  parts = {f'timing/{part}': 0.5 for part in charts.TIMING}
  assert 'timing/between_steps' in parts
  write_lines(tmp_path / 'ppo' / 'metrics.jsonl', [{'step': 0, 'timing/step': 2.5} | parts])
  (chart,) = charts.stage_charts(tmp_path / 'ppo').main
  assert (chart.title, chart.last) == ('Seconds of a step, by part', '2.500 s')


def test_seconds_of_a_step_leave_out_compiling(tmp_path):
  path = tmp_path / 'ppo' / 'metrics.jsonl'
  steps = [(30.0, 9), (1.0, 9), (1.0, 9), (20.0, 10), (3.0, 10)]  # seconds, programs so far
  lines = [
    {'step': k, 'timing/update': seconds, 'perf/num_compiles': count}
    for k, (seconds, count) in enumerate(steps)
  ]
  write_lines(path, lines)
  chart = charts.stage_charts(tmp_path / 'ppo').main[0]
  assert chart.legend == (('Updates', '1.667 s'),)
  assert chart.note == 'mean of 3 steps · without 2 that compiled programs'
  assert chart.drawing.points['series'][0][2:] == ([2.0, 3.0, 5.0], [1.0, 1.0, 3.0])
  # Seconds that are measured apart from those of compiling are all shown.
  write_lines(path, [row | {'timing/compile': 2.0 * (row['step'] == 0)} for row in lines])
  chart = charts.stage_charts(tmp_path / 'ppo').main[0]
  assert chart.note == 'mean of 5 steps · compiling is not in it, 2.000 s in all'


def test_curves_count_steps_from_one_and_say_on_which_data(tmp_path):
  lines = [{'step': k, 'objective/reward': 2.0 * k} for k in range(4)]
  write_lines(tmp_path / 'ppo' / 'metrics.jsonl', [*lines, {'step': 4, 'eval/reward': 7.0}])
  (chart,) = charts.stage_charts(tmp_path / 'ppo').main
  assert chart.legend == (
    ('training prompts', '6.000'),
    ('held-out prompts, during training', '7.000'),
  )
  assert chart.note == 'at step 5'
  assert '>step</text>' in chart.drawing.svg  # the axis has a name
  assert chart.drawing.points == {
    'box': [0.13, 0.985],
    'range': chart.drawing.points['range'],
    'x': 'step',
    'series': [
      ('training prompts', '', [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 4.0, 6.0]),
      ('held-out prompts, during training', '', [5.0], [7.0]),
    ],
  }


def test_metrics_have_names_that_a_person_reads():
  names = {
    'objective/rlhf_reward': 'Reward after KL, per response',
    'critic/grad_norm': 'Gradient norm',
    'reward/by_position/3': 'Normalised score, tenth 3 of a response',
    'perf/of_a_later_version': 'Of a later version',
    'odd': 'Odd',
  }
  assert {name: metric_names.metric_name(name) for name in names} == names
  assert metric_names.result_name('sft', 'held_out_loss') == 'Loss, held-out rows'
  assert metric_names.result_name('reward', 'held_out_ece') == (
    'Calibration error (ECE), held-out pairs'
  )
  assert metric_names.result_name('ppo', 'reward') == 'Reward before KL, training, last step'
  unnamed = [
    name
    for entry in metric_docs.ENTRIES
    for name in entry.names
    if '*' not in name and name not in metric_names.METRICS
  ]
  assert unnamed == []
