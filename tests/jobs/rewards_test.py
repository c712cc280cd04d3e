"""Runs with several rewards: their parts in metrics, on the page, in samples and in chat."""

import builtins
import json

import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.jobs import credit, ppo_trainer
from segjax.report import metric_docs
from segjax.report.stage_tables import stage_tables
from segjax.types import Normalizer

pytestmark = pytest.mark.campaign

NORMALIZERS = Normalizer(0.1, 0.0, 0.2, 0.5), Normalizer(0.0, 0.0, -0.3, 0.8)
SEGMENTATIONS = Segmentation(boundary='fixed_length', segment_length=3), Segmentation('token')


def short(prompt, response):
  """A custom reward: fewer characters are better."""
  return -0.01 * len(response)


async def vowels(prompt, response, messages):
  """A custom reward at every vowel."""
  assert messages[-1]['content'] == prompt
  return [(k + 1, 0.1) for k, letter in enumerate(response) if letter in 'aeiou']


@pytest.fixture
def values(small, language, tmp_path):
  """Returns a function that gives settings of a run with two reward models and two functions."""
  model = language / 'model'
  paths = [
    runs.reward_model(model, tmp_path / f'rm{k}', NORMALIZERS[k], SEGMENTATIONS[k]) for k in (0, 1)
  ]

  def make(*stages, lines=None, **more):
    listed = (
      f'second path={paths[1]} weight=0.5',
      f'vowels fn={__name__}:vowels weight=2',
    )
    return small(
      *stages,
      **{
        'policy.path': str(model),
        'reward_model.path': str(paths[0]),
        'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
        'rewards': listed if lines is None else lines,
        'reward_shaping.reward_fn': f'{__name__}:short',
        'ppo.policy_optimizer.learning_rate': 1e-2,
        **more,
      },
    )

  return make


NAMES = {'reward_model', 'second', 'reward_fn', 'vowels'}


def lines_of(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_models_and_functions_together(values, run, tmp_path, capsys):
  samples = {'sample.samples_per_prompt': 2, 'sample.batch_size': 8, 'sample.rank_by': 'reward'}
  workdir = tmp_path / 'run'
  settings = values('ppo', 'evaluate', 'sample', **samples)
  results = run(settings, workdir)
  out = capsys.readouterr().out
  assert 'further reward models: second (0.5 x token, spread even_split)' in out
  steps = lines_of(workdir / 'ppo' / 'metrics.jsonl')
  assert len(steps) == 2
  for step in steps:
    parts = {name: step[f'reward/part/{name}'] for name in NAMES}
    assert sum(parts.values()) == pytest.approx(step['objective/reward'], abs=1e-4)
    assert all(parts.values()) and step['reward/disagreement'] > 0
    assert all(metric_docs.find_entry(name) for name in step.keys() - {'step'})
  records = lines_of(workdir / 'ppo' / 'samples.jsonl')
  for record in records:
    assert record['totals']['parts'].keys() == NAMES
    assert all(segment['parts'].keys() == NAMES for segment in record['segments'])
  sampled = lines_of(workdir / 'sample' / 'responses.jsonl')
  for record in sampled:
    for segment in record['segments']:  # no KL, no penalty, no clip at this size
      assert sum(segment['parts'].values()) == pytest.approx(segment['reward'], abs=1e-3)
  for name in NAMES:
    assert results['evaluate']['after'][f'part/{name}']['mean']
    assert f'Reward by {name} ' in out
  (table,) = stage_tables('evaluate', results['evaluate'])
  assert 'Reward by vowels' in [row.label for row in table.rows]
  key = json.loads((workdir / 'ppo' / 'stage.json').read_text())['key']
  assert key['functions'].keys() >= {'reward_shaping.reward_fn', 'rewards: vowels: fn'}
  assert 'rewards: second: path' in key['inputs']
  run(settings, workdir)
  assert capsys.readouterr().out.count('reused from') == 3


def test_a_resumed_run_with_a_penalty_gives_the_same_bits(
  values, run, tmp_path, monkeypatch, capsys
):
  settings = values(
    'ppo',
    **{
      'reward_shaping.mix': 'segment',
      'reward_shaping.disagreement_coef': 0.5,
      'ppo.max_steps': 3,
      'checkpoint.every_steps': 1,
    },
  )
  run(settings, tmp_path / 'whole')
  steps = lines_of(tmp_path / 'whole' / 'ppo' / 'metrics.jsonl')
  assert all(step['reward/part/disagreement'] < 0 for step in steps)
  step = ppo_trainer.Trainer.step

  def interrupted(self, states, number):
    if number == 2:
      raise KeyboardInterrupt
    return step(self, states, number)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ppo_trainer.Trainer, 'step', interrupted)
    run(settings, tmp_path / 'stopped')
  capsys.readouterr()
  run(settings, tmp_path / 'stopped')
  assert 'resuming from step 2 of 3' in capsys.readouterr().out
  weights = [
    (tmp_path / name / 'ppo' / 'model' / 'model.safetensors').read_bytes()
    for name in ('whole', 'stopped')
  ]
  assert weights[0] == weights[1]


def test_chat_shows_the_parts_of_each_segment(values, run, monkeypatch, tmp_path, capsys):
  typed = iter(['describe the badger', '/segments'])

  def type_line(prompt):
    for line in typed:
      return line
    raise EOFError

  monkeypatch.setattr(builtins, 'input', type_line)
  run(values('chat'), tmp_path / 'chat')
  out = capsys.readouterr().out
  header = next(line for line in out.splitlines() if 'entropy' in line)
  assert header.split() == ['tokens', 'entropy', 'score', 'reward', *sorted(NAMES), 'segment']
  rows = out.partition('─\n')[2].splitlines()
  for row in rows[: rows.index('')]:
    reward, *parts = map(float, row.split()[3:8])
    assert sum(parts) == pytest.approx(reward, abs=3e-3)


def test_what_does_not_fit_is_refused_in_one_line(values, run, make_stage, tmp_path, language):
  with pytest.raises(UserError, match="rewards: gone: path='/nowhere' does not exist"):
    run(values('ppo', lines=('gone path=/nowhere',)))
  with pytest.raises(UserError, match="rewards: f: fn='math:no' cannot be loaded"):
    run(values('ppo', lines=('f fn=math:no',)))
  no_head = f'plain path={language / "model"} granularity=token normalizer=none'
  with pytest.raises(UserError, match='has no scalar head'):
    run(values('ppo', lines=(no_head,)))
  bare = runs.reward_model(language / 'model', tmp_path / 'bare', None, Segmentation())
  with pytest.raises(UserError, match=r'rewards: bare: .* has no complete segment_reward'):
    run(values('ppo', lines=(f'bare path={bare}',)))
  functions = dict.fromkeys(('evaluate.credit_fn', 'evaluate.boundary_fn'), 'module:function')
  with pytest.raises(UserError, match='rewards has no effect in credit'):
    credit.load(make_stage('credit', values('credit', **functions)))
