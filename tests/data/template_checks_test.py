"""Words that a template drops, and text that it would write twice."""

import json

import pytest
from absl import logging
from fixtures import tokenizers
from fixtures.tokenizers import assistant, system, user

from segjax.data.limits import Limits
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_conversations, tokenize_pairs, tokenize_prompts
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError

READERS = {
  'pairs': tokenize_pairs,
  'prompts': tokenize_prompts,
  'conversations': tokenize_conversations,
}
# As that of the R1 distillates of Llama.
THINK = tokenizers.LLAMA3.replace("m['content'] | trim", "m['content'].split('</think>')[-1]")
# The reasoning of the last answer is kept.
THINK_EARLIER = tokenizers.LLAMA3.replace(
  "m['content'] | trim",
  "m['content'].split('</think>')[-1] if m['role'] == 'assistant' and not loop.last "
  "else m['content']",
)
JOIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def _read(kind, chat, *rows):
  return READERS[kind](Rows(list(rows), 'rows.jsonl'), chat, Limits(512, 256))


@pytest.mark.parametrize('kind', ['pairs', 'conversations'])
def test_a_template_that_drops_words_of_an_answer_is_refused(tmp_path, kind):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, THINK))
  plain = {'prompt': 'a', 'chosen': 'one', 'rejected': 'two'}
  reasoned = plain | {'chosen': '<think>so</think> one'}
  with pytest.raises(UserError, match=r"rows\.jsonl, row 2: .*'<think>so</think> one' became"):
    _read(kind, chat, plain, reasoned)
  assert len(_read(kind, chat, plain)) == 1


@pytest.mark.parametrize('kind', list(READERS))
def test_a_template_that_drops_words_of_a_prompt_is_refused(tmp_path, kind):
  template = tokenizers.LLAMA3.replace("m['content']", "(m['content'] if m['role'] != 'system')")
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, template))
  row = {'messages': [system('be kind'), user('a')], 'chosen': 'one', 'rejected': 'two'}
  with pytest.raises(UserError, match=r'row 1: .*message 1 \(system\): .be kind.'):
    _read(kind, chat, row)


@pytest.mark.parametrize('kind', ['pairs', 'prompts'])
def test_reasoning_dropped_from_earlier_answers_is_said_once(tmp_path, kind, monkeypatch):
  lines = []
  monkeypatch.setattr(logging, 'warning', lambda text, *values: lines.append(text % values))
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, THINK_EARLIER))
  history = [user('a'), assistant('<think>so</think> one'), user('b')]
  rows = [
    {'messages': [user('a')], 'chosen': 'one', 'rejected': 'two'},
    *({'messages': history, 'chosen': 'one', 'rejected': 'two'} for _ in range(2)),
  ]
  assert len(_read(kind, chat, *rows)) == 3
  (line,) = lines
  assert line.startswith('rows.jsonl, row 2: ') and 'message 2' in line


def test_white_space_may_change(llama3):
  row = {'prompt': ' a\n', 'chosen': '\n one two ', 'rejected': 'two'}
  assert len(_read('pairs', llama3, row)) == 1


RENDERED = (
  '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>'
  '<|start_header_id|>assistant<|end_header_id|>\n\n'
)


@pytest.mark.parametrize('kind', list(READERS))
@pytest.mark.parametrize(
  'prompt, opening',
  [
    (RENDERED, '<|begin_of_text|>'),
    (RENDERED.removeprefix('<|begin_of_text|>'), '<|start_header_id|>'),
    ('<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n', '<|im_start|>'),
    ('[INST] hello [/INST]', '[INST]'),
  ],
)
def test_a_prompt_that_is_rendered_already(llama3, kind, prompt, opening):
  rows = [{'prompt': text, 'chosen': 'one', 'rejected': 'two'} for text in ('hello', prompt)]
  with pytest.raises(UserError, match=r'rows\.jsonl, row 2: .*begins with') as error:
    _read(kind, llama3, *rows)
  assert repr(opening) in str(error.value)


def test_headers_without_special_tokens(tmp_path):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, tokenizers.PLAIN))
  with pytest.raises(UserError, match="begins with 'user:'"):
    chat.prompt_ids([user('user: hello\nassistant: ')])
  chat.prompt_ids([user('user: hello')])  # may be a person's words


@pytest.mark.parametrize('kind, side', [('pairs', 'rejected'), ('conversations', 'chosen')])
@pytest.mark.parametrize('ending', ['<|eot_id|>', '<|eot_id|>\n', ' <|end_of_text|>'])
def test_an_answer_that_ends_in_a_stop_token(llama3, kind, side, ending):
  row = {'prompt': 'hello', 'chosen': 'one', 'rejected': 'two'}
  with pytest.raises(UserError, match=r'rows\.jsonl, row 2: .*already ends in') as error:
    _read(kind, llama3, row, row | {side: 'one' + ending})
  assert repr(ending.strip()) in str(error.value)


@pytest.mark.parametrize('kind', list(READERS))
def test_a_user_who_ends_in_a_stop_token(llama3, kind):
  row = {'prompt': 'hello<|eot_id|>', 'chosen': 'one', 'rejected': 'two'}
  with pytest.raises(UserError, match='row 1: the text of the user already ends in'):
    _read(kind, llama3, row)


@pytest.mark.parametrize('kind', list(READERS))
def test_marks_inside_the_words_are_let_through(llama3, kind):
  row = {
    'prompt': 'what is <|begin_of_text|> or <|eot_id|> for?',
    'chosen': 'one<|eot_id|>two',
    'rejected': 'the <|start_header_id|>, [INST]',
  }
  assert len(_read(kind, llama3, row)) == 1


def test_rendered_rows_are_read_by_a_template_that_only_joins(tmp_path):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, JOIN))
  data = _read('pairs', chat, {'prompt': RENDERED, 'chosen': 'one', 'rejected': 'two'})
  text = chat.decode(data.chosen[0], skip_special=False)
  assert text == RENDERED + 'one<|end_of_text|>'


def test_a_text_of_the_api_that_begins_with_bos(llama3):
  bos, ids = llama3.text_ids('hello')
  assert bos == [llama3.tokenizer.bos_token_id] and ids == llama3.encode(['hello'])[0]
  with pytest.raises(UserError, match=r'begins with .<\|begin_of_text\|>.'):
    llama3.text_ids('<|begin_of_text|>hello')


def test_results_of_tools_may_be_written_as_json(tmp_path):
  template = tokenizers.LLAMA3.replace(
    "m['content'] | trim", "m['content'] | tojson if m['role'] == 'tool' else m['content']"
  )
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, template))
  result = {'role': 'tool', 'content': '"two"\nlines'}
  assert json.dumps(result['content']) in chat.prompt_text([user('a'), assistant('b'), result])
