"""report.html in Chromium: what it shows, keyboard and mouse, and hostile text."""

import json
import os
import sys
from pathlib import Path

import pytest

from report.html_report_test import HOSTILE, response_record, write_lines
from segjax.evaluation.segment_records import AnnotatedResponse, Segment
from segjax.report import html_report, stage_history

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / 'tools'))
from benchmarks import browser

pytestmark = pytest.mark.browser

# {text: how it is shown}
STRANGE = {
  HOSTILE: HOSTILE,
  'a\u202egnp.exe': 'a\\u202egnp.exe',
  'bell\x07 null\x00': 'bell\\u0007 null\\u0000',
  '👩‍👩‍👧 emoji': '👩‍👩‍👧 emoji',
  'مرحبا بالعالم': 'مرحبا بالعالم',
  '&lt;b&gt; &amp;': '&lt;b&gt; &amp;',
  '{{ 7 * 7 }}': '{{ 7 * 7 }}',
}


@pytest.fixture(scope='module')
def tab():
  program = browser.find_browser()
  if program is None:
    pytest.skip(f'no browser on PATH: one of {", ".join(browser.NAMES)}')
  with browser.Browser(program) as tab:
    yield tab


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  """Writes the page of a run with strange texts, a response of 4,096 tokens, and a pair."""
  workdir = tmp_path_factory.mktemp('run')
  rows = [response_record(step, text) for step, text in enumerate(STRANGE)]
  long = response_record(90, ' '.join(f'w{i}' for i in range(4096)))
  two_segments = response_record(91, 'one two three needle')
  two_segments['segments'].append(two_segments['segments'][0] | {'reward': 2.0})
  two_segments['segments'][0] |= {'entropy': [0.25, 2.5, 0.5, 1.0]}
  two_segments['segments'][1]['parts'] = {'brief': -0.25, 'reward_model': 2.25}
  two_segments['totals'] |= {'parts': {'brief': -0.75, 'reward_model': 3.5}}
  write_lines(workdir / 'ppo' / 'samples.jsonl', [*rows, long, two_segments])
  texts = {'before': 'was', 'after': 'is'}
  pair = [response_record(0, text, model, pair=3) for model, text in texts.items()]
  write_lines(workdir / 'evaluate' / 'samples.jsonl', pair)
  write_lines(workdir / 'answers' / 'stage.json', [{'key': {}, 'results': {'answered': 1}}])
  answer = response_record(0, 'an answer', 'mine', pair=0)
  answer['segments'] = [{'text': 'x', 'tokens': ['x'], 'entropy': [None], 'score': None}]
  answer['segments'][0]['reward'] = None
  write_lines(workdir / 'answers' / 'samples.jsonl', [answer])
  os.utime(workdir / 'answers' / 'stage.json', (1, 1))  # before the evaluation
  long_name = 'objective/a_rather_long_name_of_a_metric/of_it'
  lines = [{'step': k, 'objective/reward': 3 * k, long_name: k} for k in range(30)]
  write_lines(workdir / 'ppo' / 'metrics.jsonl', lines)
  config = {'path': '/long' * 60, 'hostile': HOSTILE}
  stage_history.record_start(workdir, 'ppo', f'segjax {"/long" * 60}', '', config)
  intervals = {'mean': 0.5, 'low': 0.25, 'high': 1.0, 'n': 1234}
  gold = {'gold': intervals, 'score': intervals | {'mean': -123.4567}}
  results = {'before': gold, 'after': gold | {'win_rate_gold': intervals, 'kl_nats': 1.0}}
  settings = {'settings': {'ppo': {'kl_placement': 'reward'}}}
  write_lines(workdir / 'evaluate' / 'stage.json', [{'key': settings, 'results': results}])
  pairs = {'accuracy': intervals, 'length_baseline_accuracy': 0.5, 'margin': 12.5, 'ece': 0.125}
  pairs = {'subsets': {'long_' * 30: pairs}, 'all': pairs, 'truncated': 0, 'reward_bench': {}}
  results = {'pairs_read': 1234, 'pairs': pairs, 'counts': {'/long' * 60: {'rows': 1234}}}
  write_lines(workdir / 'evaluate_reward' / 'stage.json', [{'key': {}, 'results': results}])
  html_report.Page(workdir, HOSTILE, ['ppo', 'evaluate']).write()
  return workdir / html_report.REPORT_FILE


@pytest.fixture(autouse=True)
def no_browser_errors(tab):
  yield
  assert tab.errors == []


def texts(tab):
  script = """[...document.querySelectorAll('#list .text')].map((text) => {
    const copy = text.cloneNode(true);
    copy.querySelectorAll('.value').forEach((value) => value.remove());
    return copy.textContent; })"""
  return tab.run(script)


def choose(tab, control, value):
  tab.run(
    f"(() => {{ const s = document.getElementById('{control}'); s.value = {json.dumps(value)};"
    " s.dispatchEvent(new Event(s.type === 'search' ? 'input' : 'change')); })()"
  )
  tab.run('new Promise((done) => setTimeout(done, 250))')


def test_strange_text_is_shown_as_text(tab, report):
  tab.open(report)
  title = tab.run('document.title')
  for step, (_, shown) in enumerate(STRANGE.items()):
    choose(tab, 'step', f'PPO, step {step + 1}')
    assert texts(tab) == [shown]
  assert tab.run('document.title') == title
  assert tab.run("document.querySelectorAll('#list img, #list script').length") == 0
  assert HOSTILE in tab.run("document.querySelector('#commands details pre').textContent").replace(
    '\\"', '"'
  )
  assert HOSTILE in tab.run("document.querySelector('.brand').textContent")


def test_hover_and_keys_show_the_numbers(tab, report):
  tab.open(report)
  choose(tab, 'step', 'PPO, step 92')
  tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText"
  assert tab.run(tip) == ''
  script = """(() => { const token = document.querySelectorAll('#list .token')[1];
    token.scrollIntoView({block: 'center'}); const r = token.getBoundingClientRect();
    return [r.x + r.width / 2, r.y + r.height / 2]; })()"""
  tab.point(1, 1)
  at = tab.run(script)
  tab.run('new Promise((done) => setTimeout(done, 150))')
  tab.point(*at)
  shown = tab.run(tip)
  assert (
    '" two"' in shown
    and '2.50 > 2' in shown
    and '1 of 2' in shown
    and '+1.000' in shown
    and '−0.500' in shown
  )
  assert '−0.125' in shown  # a token's share
  tab.point(1, 1)
  assert tab.run(tip) == ''
  tab.run("document.querySelector('#list .token').focus()")
  assert '0.25' in tab.run(tip)
  tab.press('ArrowRight')
  assert '2.50 > 2' in tab.run(tip)
  tab.press('ArrowDown')
  assert '2 of 2' in tab.run(tip) and '+2.000' in tab.run(tip)
  assert all(text in tab.run(tip) for text in ('of it brief', '−0.250', '+2.250'))
  assert 'brief −0.75' in tab.run("document.querySelector('.meta').textContent")
  tab.press('Escape')
  assert tab.run(tip) == ''


def test_each_segment_shows_its_number(tab, report):
  tab.open(report)
  choose(tab, 'step', 'PPO, step 92')
  values = "[...document.querySelectorAll('#list .value')].map((value) => value.textContent)"
  assert tab.run(values) == ['−0.50', '+2.00']
  choose(tab, 'colour', 'entropy')
  assert tab.run("document.querySelectorAll('.token.hot').length") == 8


def test_search_filter_and_sort(tab, report):
  tab.open(report)
  everything = len(STRANGE) + 4
  count = "document.querySelector('#range').textContent"
  choose(tab, 'step', '')
  assert tab.run(count) == f'1–5 of {everything}'
  tab.run("document.getElementById('search').focus()")
  tab.type('NEEDLE')
  tab.run('new Promise((done) => setTimeout(done, 250))')
  assert tab.run(count) == '1–1 of 1'
  assert tab.run("[...CSS.highlights.get('search')].map(String)") == ['needle', 'needle']
  choose(tab, 'search', 'nowhere at all')
  assert tab.run(count) == '0' and texts(tab) == []
  choose(tab, 'search', '')
  choose(tab, 'model', 'after')
  assert texts(tab) == ['is']
  choose(tab, 'model', '')
  choose(tab, 'sort', 'longest')
  assert texts(tab)[0].startswith('w0 w1')


def test_before_and_after_come_first_side_by_side(tab, report):
  tab.open(report)
  assert tab.run("document.getElementById('step').value") == 'Evaluation'
  assert texts(tab) == ['was', 'is']
  left, right = tab.run(
    "[...document.querySelectorAll('.sides > div')].map((side) => side.getBoundingClientRect().x)"
  )
  assert right > left
  assert tab.run("document.querySelectorAll('#list .prompt').length") == 1
  assert 'reward after KL −0.50' in tab.run("document.querySelector('#list .meta').innerText")


def test_a_long_response_is_shown_completely_on_request(tab, report):
  tab.open(report)
  choose(tab, 'step', 'PPO, step 91')
  assert texts(tab)[0].endswith('w799')
  tab.run("document.querySelector('.more').click()")
  assert texts(tab)[0].endswith('w4095')


def test_the_pointer_and_keys_show_the_values_of_a_chart(tab, report):
  tab.open(report)
  tab.run("document.querySelectorAll('details').forEach((details) => (details.open = true))")
  tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText"
  script = """(() => { const plot = document.querySelector('#stage-ppo .plot');
    plot.scrollIntoView({block: 'center'}); const r = plot.getBoundingClientRect();
    return [r.x, r.y + r.height / 2, r.width]; })()"""
  tab.point(1, 1)
  x, y, width = tab.run(script)
  tab.run('new Promise((done) => setTimeout(done, 150))')
  tab.point(x + width - 3, y)
  assert tab.run(tip).split('\n')[:3] == ['step 30', 'training prompts', '87.00']
  assert 'objective/reward: dense reward' in tab.run(tip)
  tab.point(1, 1)
  assert tab.run(tip) == ''
  tab.run("document.querySelector('#stage-ppo .plot').focus()")
  tab.press('Home')
  assert tab.run(tip).split('\n')[0] == 'step 1'
  tab.press('ArrowRight')
  assert tab.run(tip).split('\n')[:3] == ['step 2', 'training prompts', '3.000']
  tab.press('Escape')
  assert tab.run(tip) == ''
  # A finger leaves the chart when it is lifted: the values stay until another place is touched.
  touch = f"""(() => {{ const plot = document.querySelector('#stage-ppo .plot');
    for (const name of ['pointerdown', 'pointerleave'])
      plot.dispatchEvent(
        new PointerEvent(name, {{pointerType: 'touch', clientX: {x + width - 3}}}));
  }})()"""
  tab.run(touch)
  assert tab.run(tip).startswith('step 30')
  tab.run("dispatchEvent(new Event('scroll'))")
  assert tab.run(tip) == '' and tab.run("document.querySelector('.cursor:not([hidden])')") is None


def test_a_page_without_responses_has_values_under_the_pointer(tab, tmp_path):
  write_lines(tmp_path / 'sft' / 'metrics.jsonl', [{'step': k, 'sft/loss': 1.0} for k in range(3)])
  html_report.Page(tmp_path, '', ['sft']).write()
  tab.open(tmp_path / 'report.html')
  tab.run("document.querySelector('.plot').focus()")
  tab.press('End')
  assert tab.run("document.getElementById('tip').innerText").startswith('step 3')


@pytest.mark.parametrize('dark', [False, True], ids=['light', 'dark'])
@pytest.mark.parametrize('width', [375, 700, 1200])
def test_no_width_needs_horizontal_scroll(tab, report, width, dark):
  tab.open(report, width=width, height=700, dark=dark)
  for control, value in (('step', ''), ('step', 'PPO, step 91'), ('step', 'Evaluation')):
    choose(tab, control, value)
    tab.run("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    assert tab.run('document.documentElement.scrollWidth') <= width


def test_texts_outside_training_show_the_normalised_score(tab, tmp_path):
  segment = Segment('a b', ['a', ' b'], [0.5, 0.25], score=3.0, normalized_score=-1.25)
  html_report.write_responses(tmp_path / 'r.html', 'r', [AnnotatedResponse([], 'a b', [segment])])
  tab.open(tmp_path / 'r.html')
  assert tab.run("document.querySelector('#list .value').textContent") == '−1.25'
  assert tab.run("document.getElementById('colour').value") == 'normalised score'
  assert tab.run("document.getElementById('shown-number').textContent") == 'normalised score'
