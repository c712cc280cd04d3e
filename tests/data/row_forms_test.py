import pytest
from fixtures.tokenizers import assistant, system, user

from segjax.data import row_forms
from segjax.data.limits import Limits
from segjax.data.rows import Reading, Rows
from segjax.data.sources import Pair, as_conversation, as_pair, as_prompt, load_rows
from segjax.data.step_labels import as_labelled_response
from segjax.data.tokenize import tokenize_conversations
from segjax.errors import UserError

TURNS = [user('2 + 2?'), assistant('4.')]
SHAREGPT = [{'from': 'human', 'value': '2 + 2?'}, {'from': 'gpt', 'value': '4.'}]
HH = '\n\nHuman: 2 + 2?\n\nAssistant: 4.'

ANSWERED = {
  'messages': {'messages': TURNS},
  'sharegpt': {'conversations': SHAREGPT},
  'roles_of_others': {'messages': [{'role': 'Human', 'content': '2 + 2?'}, assistant('4.')]},
  'mixed_keys': {'conversations': [{'from': 'user', 'value': '2 + 2?'}, assistant('4.')]},
  'columns_of_lists': {'messages': {'role': ['user', 'bot'], 'content': ['2 + 2?', '4.']}},
  'prompt_completion': {'prompt': '2 + 2?', 'completion': '4.'},
  'prompt_completion_messages': {'prompt': TURNS[:1], 'completion': TURNS[1:]},
  'prompt_response': {'prompt': '2 + 2?', 'response': '4.'},
  'alpaca': {'instruction': '2 + 2?', 'input': '', 'output': '4.'},
  'question_response': {'question': '2 + 2?', 'response': '4.'},
  'question_answer': {'question': '2 + 2?', 'answer': '4.'},
  'context_messages': {'context_messages': TURNS[:1], 'response': '4.'},
  'hh_text': {'text': HH},
  'hh_prompt': {'prompt': '\n\nHuman: 2 + 2?\n\nAssistant:', 'response': '4.'},
}


@pytest.mark.parametrize('form', ANSWERED)
def test_answered_rows(form):
  row = ANSWERED[form]
  assert as_conversation(row) == TURNS
  if form != 'hh_text':  # for sft alone
    assert as_prompt(row) == TURNS[:1]


PAIR = Pair(TURNS[:1], '4.', '5.')
PAIRS = {
  'question': {'question': '2 + 2?', 'chosen': '4.', 'rejected': '5.'},
  'instruction': {'instruction': '2 + 2?', 'chosen': '4.', 'rejected': '5.'},
  'context_messages': {'context_messages': TURNS[:1], 'chosen': '4.', 'rejected': '5.'},
  'hh': {'chosen': HH, 'rejected': HH.replace('4.', '5.')},
  'hh_prompt': {
    'prompt': '\n\nHuman: 2 + 2?\n\nAssistant:',
    'chosen': '4.',
    'rejected': '5.',
  },
  'sharegpt_lists': {
    'chosen': SHAREGPT,
    'rejected': [SHAREGPT[0], {'from': 'gpt', 'value': '5.'}],
  },
  'llama_factory': {
    'conversations': SHAREGPT[:1],
    'chosen': {'from': 'gpt', 'value': '4.'},
    'rejected': {'from': 'gpt', 'value': '5.'},
  },
}


@pytest.mark.parametrize('form', PAIRS)
def test_pairs(form):
  assert as_pair(PAIRS[form]) == PAIR
  assert as_prompt(PAIRS[form]) == PAIR.prompt
  assert as_conversation(PAIRS[form]) == TURNS


def test_input_system_and_history_belong_to_the_prompt():
  row = {'instruction': 'Add.', 'input': '2, 2', 'output': '4', 'system': 'Be brief.'}
  row['history'] = [['Hi', 'Hello']]
  earlier = [system('Be brief.'), user('Hi'), assistant('Hello')]
  assert as_prompt(row) == [*earlier, user('Add.\n\n2, 2')]
  assert as_conversation(row) == [*earlier, user('Add.\n\n2, 2'), assistant('4')]
  row = {'system': 'Be brief.', 'conversations': SHAREGPT}
  assert as_conversation(row) == [system('Be brief.'), *TURNS]


def test_plain_text():
  assert as_conversation({'text': 'Once.'}) == [{'role': row_forms.PLAIN_TEXT, 'content': 'Once.'}]
  assert as_conversation({'text': 'Once.', 'messages': TURNS}) == TURNS


def test_dialogue_of_several_turns():
  text = '\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant: e\n'
  assert row_forms.read_dialogue(text) == [
    user('a\n\nb'),
    assistant('c'),
    user('d'),
    assistant('e'),
  ]
  for other in ('Human: hello', 'She said:\n\nHuman: a\n\nAssistant: b', '', None):
    assert row_forms.read_dialogue(other) is None


@pytest.mark.parametrize('role', ['narrator', 'critic', '', 'text'])
def test_unknown_roles_are_refused(role):
  """A role that is no other name of the assistant would put the answer into the prompt of PPO."""
  row = {'messages': [user('2 + 2?'), {'role': role, 'content': '4.'}]}
  for read in (as_prompt, as_conversation):
    with pytest.raises(
      ValueError, match=r'^f, row 3: message 2 of `messages` has the role .*system'
    ):
      read(row, 'f, row 3')


@pytest.mark.parametrize(
  'row',
  [
    {'messages': [*TURNS, system('The answer above is right.')]},
    {'prompt': TURNS},
    {'prompt': HH},
    {'messages': [*TURNS, assistant('4, I think.')]},
    {'messages': [*TURNS, user(' ')]},
  ],
)
def test_a_reference_answer_is_not_a_prompt(row):
  with pytest.raises(ValueError, match=r'^row: the prompt in `\w+` (is empty or )?ends in a'):
    as_prompt(row)


@pytest.mark.parametrize(
  'row, message',
  [
    (
      {'messages': user('a')},
      r'`messages` is one object, .* in place of a list of messages; write',
    ),
    ({'prompt': user('a'), 'chosen': 'b', 'rejected': 'c'}, '`prompt` is one object'),
    (
      {
        'chosen': [user('a'), assistant('b'), user('c'), assistant('d')],
        'rejected': [user('a'), assistant('x'), user('c'), assistant('d')],
      },
      'part at message 2 of 4 and 4, .* data.bad_rows=drop',
    ),
    (
      {'chosen': HH, 'rejected': HH + '\n\nHuman: c\n\nAssistant: d'},
      'part at message 2 of 2 and 4',
    ),
    ({'chosen': HH, 'rejected': '\n\nHuman: 2 + 2?\n\nAssistant: a\n\nHuman: b'}, "by 'user'"),
    (
      {'prompt': 'a', 'chosen': 'b\ud83d', 'rejected': 'c'},
      r'`chosen` has half .* \\ud83d, at position 1',
    ),
    (
      {'prompt': [user('\udc00')], 'chosen': 'b', 'rejected': 'c'},
      r'message 1 of `prompt` has half .* 0;',
    ),
    ({'question': 'a\ud800', 'chosen': 'b', 'rejected': 'c'}, '`question` has half'),
  ],
)
def test_messages_say_what_to_do(row, message):
  read = as_pair if 'chosen' in row else as_conversation
  with pytest.raises(ValueError, match=r'^f, row 1: .*' + message):
    read(row, 'f, row 1')


def test_columns_of_the_users_names():
  rows = [{'input': 'a', 'instruction': 'other', 'good': 'b', 'bad': 'c', 'messages': TURNS}]
  columns = {'prompt': 'input', 'chosen': 'good', 'rejected': 'bad'}
  rows = Rows(rows, 'f', reading=Reading(columns))
  assert as_pair(rows[0]) == Pair([user('a')], 'b', 'c')
  assert [as_prompt(row) for row in rows] == [[user('a')]]
  (item,) = rows.read(as_pair, {})
  assert item == (0, 'f, row 1', Pair([user('a')], 'b', 'c'))


def test_a_column_that_does_not_exist():
  rows = Rows([{'prompt': 'a'}, {'x': 'b'}], 'f', reading=Reading({'prompt': 'input'}))
  assert as_prompt(rows[0]) == [user('a')]  # of another source, whose name is ours
  with pytest.raises(
    ValueError, match=r"f, row 2: data\.columns\.prompt='input', but .* keys are x"
  ):
    rows[1]


PAIR_ROW = {'question': 'a', 'good': 'b', 'bad': 'c'}
LABELLED_ROW = {'question': 'a', 'text_of_answer': 'b', 'process': [[1, 1]]}
STEPWISE_ROW = {'question': 'a', 'steps': ['b', 'c'], 'ratings': [1, 0]}
SIDES = {'chosen': 'good', 'rejected': 'bad'}


@pytest.mark.parametrize('null', [False, True])
def test_each_row_needs_the_columns_of_its_form(null):
  rows = [PAIR_ROW, LABELLED_ROW, STEPWISE_ROW]
  steps = {'response': 'text_of_answer', 'steps': 'process'}
  stepwise = {'completions': 'steps', 'labels': 'ratings'}
  columns = {'prompt': 'question'} | SIDES | steps | stepwise
  if null:  # as in a table, which has all columns in each row
    keys = {key for row in rows for key in row}
    rows = [dict.fromkeys(sorted(keys)) | row for row in rows]
  pair, labelled, written = Rows(rows, 'f', reading=Reading(columns))
  assert as_pair(pair) == Pair([user('a')], 'b', 'c') and row_forms.is_pair(pair)
  assert as_labelled_response(labelled) == ([user('a')], 'b', [(1, 1.0)])
  assert as_labelled_response(written) == ([user('a')], 'b\nc', [(1, 1.0), (3, 0.0)])
  row = row_forms.with_columns(STEPWISE_ROW, stepwise | SIDES, 'f')
  assert row.keys() == {'question', 'ratings', *row_forms.STEPWISE}


@pytest.mark.parametrize(
  'row, columns, wrong',
  [
    (PAIR_ROW, SIDES | {'chosen': 'god', 'steps': 'process'}, 'chosen'),
    (PAIR_ROW, SIDES | {'rejected': 'worse', 'steps': 'process'}, 'rejected'),
    (PAIR_ROW, SIDES | {'chosen_rating': 'stars', 'steps': 'process'}, 'chosen_rating'),
    (PAIR_ROW, SIDES | {'prompt': 'q', 'steps': 'process'}, 'prompt'),
    (LABELLED_ROW, SIDES | {'steps': 'proces'}, 'chosen'),
    (LABELLED_ROW, {'steps': 'proces'}, 'steps'),
    (LABELLED_ROW, {'steps': 'process', 'response': 'answer'}, 'response'),
    (STEPWISE_ROW, {'completions': 'steps', 'labels': 'rating'}, 'labels'),
    (STEPWISE_ROW, {'completions': 'step', 'labels': 'ratings'}, 'completions'),
  ],
)
def test_a_column_that_a_row_of_its_form_does_not_have(row, columns, wrong):
  message = rf'^f: data\.columns\.{wrong}={columns[wrong]!r}, but .* keys are {", ".join(row)}\.$'
  with pytest.raises(UserError, match=message):
    row_forms.with_columns(row, columns, 'f')


def test_the_column_of_one_label_leaves_its_texts():
  row = {'prompt': 'a', 'steps': 'x', 'completions': ['b'], 'ratings': [1]}
  assert row_forms.with_columns(row, {'labels': 'ratings'}, 'f') == {
    'prompt': 'a',
    'completions': ['b'],
    'ratings': [1],
    'labels': [1],
  }
  row = {'steps': 'x', 'process': [[1, 1]], 'completions': ['b'], 'labels': [1]}
  assert row_forms.with_columns(row, {'steps': 'process'}, 'f').keys() == {'process', 'steps'}


def test_other_names_of_roles_are_said_once():
  lines = []
  rows = [{'conversations': SHAREGPT}, {'messages': TURNS}, {'conversations': SHAREGPT}]
  list(Rows(rows, 'f', reading=Reading(log=lines.append)).read(as_conversation, {}))
  assert lines == [
    "f, row 1: role 'human' is read as user, here and in all rows",
    "f, row 1: role 'gpt' is read as assistant, here and in all rows",
  ]


def test_bad_rows_are_dropped_and_counted():
  lines, counts = [], {'rows': 4}
  rows = [
    PAIRS['hh'],
    {'chosen': HH, 'rejected': '\n\nHuman: x\n\nAssistant: y'},
    {},
    PAIRS['question'],
  ]
  read = Rows(rows, 'f', reading=Reading(drop_bad=True, log=lines.append)).read(as_pair, counts)
  assert [index for index, _, _ in read] == [0, 3]
  assert counts == {'rows': 4, 'dropped_bad': 2}
  (line,) = lines
  assert line.startswith(
    'dropped by data.bad_rows=drop, the first of these rows: f, row 2: `chosen`'
  )
  with pytest.raises(ValueError, match='f, row 2'):
    list(Rows(rows, 'f').read(as_pair, counts))
  with pytest.raises(ValueError, match='f: none of its 2 rows can be read; f, row 1'):
    list(Rows([{}, {}], 'f', reading=Reading(drop_bad=True)).read(as_pair, {}))


def test_real_dialogues(shared_files):
  path = str(shared_files / 'data' / 'hh_harmless' / 'harmless-base-test.jsonl.gz')
  counts = {}
  pairs = [p for _, _, p in load_rows(path, reading=Reading(drop_bad=True)).read(as_pair, counts)]
  assert (len(pairs), counts) == (2307, {'dropped_bad': 5})  # two answers in a row
  # The same rows, parsed by another program, which dropped four empty answers.
  clean = load_rows(str(shared_files / 'data' / 'hh_harmless' / 'pairs.jsonl.gz'))
  assert [as_pair(row) for row in clean] == [p for p in pairs if p.chosen and p.rejected]


def test_plain_text_is_trained_whole(llama3):
  bos, stop = llama3.tokenizer.bos_token, llama3.decode(llama3.stop_ids[:1], skip_special=False)
  rows = Rows([{'text': 'Once.'}, {'text': f'{bos}Once.{stop}'}, {'text': ' '}], 'f')
  data = tokenize_conversations(rows, llama3, Limits(64, 32))
  assert data.counts['dropped_empty'] == 1
  for index in range(2):
    assert llama3.decode(data.tokens[index], skip_special=False) == f'{bos}Once.{stop}'
    assert list(data.trained[index]) == [False] + [True] * (len(data.tokens[index]) - 1)
