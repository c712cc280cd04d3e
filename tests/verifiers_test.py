"""Ready reward functions, on worked examples."""

import pytest

from segjax import verifiers
from segjax.train.user_functions import asked_by_name, load_function

SOLUTION = 'She sold 48/2 = <<48/2=24>>24 clips in May, 48+24 = 72 altogether.\n#### 1,072'


@pytest.mark.parametrize(
  'response, numeric, exact',
  [
    (SOLUTION, 1, 1),
    ('So\n#### 1,072', 1, 1),
    ('#### 1072', 1, 0),
    ('So it is $1,072.00.', 1, 0),
    ('1072 or 5', 0, 0),
    ('#### 5\n#### 1072 clips', 1, 0),
    ('1072 clips #### none', 0, 0),
    ('-1072', 0, 0),
    ('1072.5', 0, 0),
    ('', 0, 0),
  ],
)
def test_answers_of_gsm8k(response, numeric, exact):
  row = {'answer': SOLUTION}
  assert verifiers.numeric_answer('', response, row=row) == numeric
  assert verifiers.exact_answer('', response, row=row) == exact


def test_answers_without_the_form_of_gsm8k():
  assert verifiers.exact_answer('', ' New\n York', row={'answer': 'new york'}) == 1
  assert verifiers.numeric_answer('', 'about .50', row={'answer': 0.5}) == 1
  assert verifiers.numeric_answer('', 'none', row={'answer': 'none'}) == 0
  # No float could tell these two apart.
  assert verifiers.numeric_answer('', '9007199254740993', row={'answer': 9007199254740992}) == 0


def test_regular_expression():
  row = {'pattern': r'^\d{4}-\d\d-\d\d$'}
  assert verifiers.regular_expression('', '2024-07-26', row=row) == 1
  assert verifiers.regular_expression('', 'on 2024-07-26', row=row) == 0


@pytest.mark.parametrize(
  'response, value',
  [
    ('{"a": [1, 2]}', 1),
    ('```json\n{"a": 1}\n```\n', 1),
    ('Here: {"a": 1}', 0),
    ("{'a': 1}", 0),
    ('', 0),
    ('[' * 100_000, 0),
  ],
)
def test_valid_json(response, value):
  assert verifiers.valid_json('', response) == value


def test_word_limit():
  row = {'max_words': 2}
  values = [verifiers.word_limit('', text, row=row) for text in ('', 'a b', 'a b c d')]
  assert values == [1, 1, 0.5]


def test_language_by_script():
  assert verifiers.same_script('Где ты?', 'дом and') == 0.5
  assert verifiers.same_script('Hello?', 'naïve') == 1
  assert verifiers.same_script('1 + 1', 'zwei') == verifiers.same_script('one', '2') == 1
  row = {'script': 'cjk hiragana katakana'}
  assert verifiers.script('', '日本のテキスト', row=row) == 1
  assert verifiers.script('', '日本 ab', row=row) == 0.5


def test_each_can_be_named_by_a_setting():
  names = [name for name in vars(verifiers) if getattr(vars(verifiers)[name], '__module__', '') ==
           verifiers.__name__ and name[0] != '_']  # fmt: skip
  assert len(names) == 7
  for name in names:
    function = load_function(f'segjax.verifiers:{name}', 'reward_shaping.reward_fn')
    assert set(asked_by_name(function)) <= {'row'}
