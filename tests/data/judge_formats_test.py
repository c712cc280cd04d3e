"""Questions of the public judges and the files their tools read."""

import json

import pytest

from segjax.data.judge_formats import Answer, conversation, read_questions
from segjax.data.sources import Rows, load_rows


def _read(*rows):
  return read_questions(Rows(list(rows), 'q.jsonl'))


ALPACA = {'instruction': 'Name a fish.', 'output': 'Eel.', 'generator': 'x', 'dataset': 'koala'}
MT = {'question_id': 81, 'category': 'math', 'turns': ['Two?', 'And three?'], 'reference': ['2']}
ARENA = {'uid': 'ab', 'category': 'arena-hard-v0.1', 'cluster': 'C', 'prompt': 'Why?'}
OLD_ARENA = {'question_id': 'cd', 'category': 'c', 'cluster': 'C', 'turns': [{'content': 'Why?'}]}


@pytest.mark.parametrize(
  'row, name, number, turns',
  [
    (ALPACA, 'AlpacaEval', 'Name a fish.', ('Name a fish.',)),
    (MT, 'MT-Bench', 81, ('Two?', 'And three?')),
    (ARENA, 'Arena-Hard', 'ab', ('Why?',)),
    (OLD_ARENA, 'Arena-Hard', 'cd', ('Why?',)),
  ],
)
def test_questions_are_recognised_by_their_fields(row, name, number, turns):
  judge, (question,) = _read(row)
  assert (judge.name, question.id, question.turns) == (name, number, turns)


def test_alpaca_eval_answer():
  judge, (question,) = _read(ALPACA)
  answer = judge.write(question, Answer(('Trout.',), (3,)), 'mine', 5.0)
  # Neither the question's own `output` nor its generator is copied.
  assert answer == {
    'dataset': 'koala',
    'instruction': 'Name a fish.',
    'output': 'Trout.',
    'generator': 'mine',
  }
  assert judge.file_name('mine') == 'model_outputs.json'


def test_mt_bench_answer():
  judge, (question,) = _read(MT)
  answer = judge.write(question, Answer(('2', '3'), (1, 1)), 'mine', 5.0)
  assert list(answer) == ['question_id', 'answer_id', 'model_id', 'choices', 'tstamp']
  assert answer['choices'] == [{'index': 0, 'turns': ['2', '3']}]
  assert (answer['question_id'], answer['model_id'], answer['tstamp']) == (81, 'mine', 5.0)
  assert judge.file_name('mine') == 'mine.jsonl'
  assert question.temperature == 0.0


def test_arena_hard_answer():
  judge, (question,) = _read(ARENA)
  answer = judge.write(question, Answer(('So.',), (2,)), 'mine', 5.0)
  assert answer['choices'] == [{'index': 0, 'turns': [{'content': 'So.', 'token_len': 2}]}]
  assert answer['question_id'] == 'ab'
  assert question.temperature == 0.7  # no category of MT-Bench


def test_answer_ids_follow_the_content():
  judge, (question,) = _read(MT)
  first, same, different = (
    judge.write(question, Answer(texts, (1, 1)), 'm', time)['answer_id']
    for texts, time in ((('2', '3'), 1.0), (('2', '3'), 9.0), (('23', ''), 1.0))
  )
  assert first == same != different


def test_second_turn_holds_the_first_answer():
  _, (question,) = _read(MT)
  assert conversation(question, []) == [{'role': 'user', 'content': 'Two?'}]
  assert conversation(question, ['2.']) == [
    {'role': 'user', 'content': 'Two?'},
    {'role': 'assistant', 'content': '2.'},
    {'role': 'user', 'content': 'And three?'},
  ]


@pytest.mark.parametrize(
  'rows, message',
  [
    (
      [{'messages': []}],
      r'q.jsonl, row 1: not a question .*AlpacaEval: instruction.* keys',
    ),
    ([{'instruction': ' '}], 'not a question of a known judge'),
    ([{'question_id': 1, 'turns': []}], 'not a question of a known judge'),
    ([{'question_id': 1, 'turns': ['a', 3]}], 'not a question of a known judge'),
    ([MT, ARENA], r'q.jsonl, row 2: .* is not a question of MT-Bench'),
    ([MT, MT], r'q.jsonl, row 2: id 81 is already that of row 1'),
  ],
)
def test_other_forms_are_named(rows, message):
  with pytest.raises(ValueError, match=message):
    _read(*rows)


def test_published_files(shared_files):
  data = shared_files / 'data'
  judge, questions = read_questions(load_rows(str(data / 'mt_bench' / 'mt_bench_question.jsonl')))
  assert (judge.name, len(questions)) == ('MT-Bench', 80)
  assert all(len(question.turns) == 2 for question in questions)
  assert {question.temperature for question in questions} == {0.0, 0.1, 0.7}
  path = data / 'arena_hard' / 'arena-hard-v0.1-question.jsonl'
  judge, questions = read_questions(load_rows(str(path)))
  assert (judge.name, len(questions)) == ('Arena-Hard', 500)
  assert json.loads(path.read_text().splitlines()[0])['uid'] == questions[0].id
