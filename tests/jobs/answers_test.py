"""The answers job: files in the formats of the judges, from a small network."""

import json

import numpy as np
import pytest

from segjax.jobs import answers

MT = [
  {'question_id': i, 'category': category, 'turns': ['describe the otter of the coast', 'more?']}
  for i, category in ((81, 'writing'), (82, 'math'), (83, 'stem'))
]


@pytest.fixture
def ask(language, small, run, tmp_path):
  """Returns a function that runs the job on questions; it returns (results, output file)."""

  def run_job(rows, workdir='a', **values):
    path = tmp_path / 'questions.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    overrides = {
      'policy.path': str(language / 'model'),
      'data.path': str(path),
      'answers.batch_size': 2,
    }
    overrides |= {'answers.model_name': 'mine', 'rollout.temperature': 0.0} | values
    results = run(small('answers', **overrides), tmp_path / workdir)['answers']
    (file,) = (tmp_path / workdir / 'answers' / 'answers').iterdir()
    return results, file

  return run_job


@pytest.mark.campaign
def test_two_turns_of_mt_bench_are_equal_when_run_again(ask):
  results, file = ask(MT)
  lines = [json.loads(line) for line in file.read_text().splitlines()]
  assert file.name == 'mine.jsonl' and [line['question_id'] for line in lines] == [81, 82, 83]
  assert all(len(line['choices'][0]['turns']) == 2 for line in lines)
  # Greedy, and the questions are equal: so are the three answers.
  assert len({tuple(line['choices'][0]['turns']) for line in lines}) == 1
  assert results['answered'] == 3 and results['judge'] == 'MT-Bench'
  assert 0 < results['tokens_per_answer'] <= 8
  assert ask(MT, 'b')[1].read_bytes() == file.read_bytes()


@pytest.mark.campaign
def test_temperatures_by_category(ask):
  sampled = ask(MT, 'c', **{'answers.category_temperatures': True})[1].read_text()
  texts = [json.loads(line)['choices'][0]['turns'][0] for line in sampled.splitlines()]
  greedy = json.loads(ask(MT, 'd')[1].read_text().splitlines()[1])['choices'][0]['turns'][0]
  assert texts[1] == greedy and texts[0] != greedy  # mathematics is greedy, writing is at 0.7


def test_alpaca_eval_list_and_overlong_prompts(ask):
  rows = [{'instruction': 'describe the otter of the coast'}, {'instruction': 'more? ' * 40}]
  results, file = ask(rows)
  outputs = json.loads(file.read_text())
  assert file.name == 'model_outputs.json' and [row['generator'] for row in outputs] == ['mine'] * 2
  assert (results['truncated_prompts'], results['dropped_prompts']) == (1, 0)
  dropped, file = ask(rows, 'b', **{'data.overlong_policy': 'drop'})
  assert (dropped['answered'], dropped['dropped_prompts']) == (1, 1)
  assert json.loads(file.read_text()) == outputs[:1]


def test_other_files_are_refused_before_the_model_is_loaded(ask, monkeypatch):
  monkeypatch.setattr(answers.Weights, 'frozen', lambda *_: pytest.fail('loaded'))
  with pytest.raises(ValueError, match=r'questions.jsonl, row 1: not a question of a known judge'):
    ask([{'text': 'a'}])


@pytest.mark.parametrize(
  'name, path, expected',
  [
    ('mine', 'x', 'mine'),
    ('', 'runs/a/ppo/model', 'runs-a-ppo-model'),
    ('', '/w/sft/model/', 'w-sft-model'),
    ('', 'meta-llama/Llama-3.1-8B', 'meta-llama-Llama-3.1-8B'),
  ],
)
def test_model_name(name, path, expected):
  assert answers.model_name(name, path) == expected


def test_timestamp_is_that_of_the_weights(language):
  assert answers._time_written(language / 'model') > 1e9
  assert np.isfinite(answers._time_written(language))
