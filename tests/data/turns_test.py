"""Long conversations are split in few renderings, into the pieces of the exact way."""

import pytest
from fixtures import tokenizers
from fixtures.tokenizers import assistant, system, user

from segjax.data import chat_template
from segjax.data.tokenizer import load_tokenizer
from segjax.data.turns import TurnSplitter
from segjax.errors import UserError

PHI3 = tokenizers.CHATML.replace('{% endif %}', '{% else %}{{ eos_token }}{% endif %}')
TEMPLATES = {
  'llama3': tokenizers.LLAMA3,
  'llama31': tokenizers.LLAMA31,
  'chatml': tokenizers.CHATML,
  'plain': tokenizers.PLAIN,
  'phi3': PHI3,
  # Writes words of its own before an answer, unless it is followed by others.
  'last differs': tokenizers.CHATML.replace(
    "{{ m['content'] }}",
    "{{ 'so: ' if loop.last and m['role'] == 'assistant' }}{{ m['content'] }}",
  ),
}


def _conversation(turns):
  messages = [system('be kind'), assistant('hello')]
  for number in range(turns):
    messages += [
      user(f' question {number}\n'),
      assistant(f'\n answer {number} ' if number else ' '),
    ]
  return [*messages, user('and then?')]


@pytest.mark.parametrize('name', [name for name in TEMPLATES if name != 'last differs'])
def test_the_pieces_are_the_exact_ones(tmp_path, name):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, TEMPLATES[name]))
  splitter = TurnSplitter(chat.tokenizer, chat.turn_end, chat.turn_close)
  messages = _conversation(20)
  answers = [i for i, m in enumerate(messages) if i and m['role'] == 'assistant']
  pieces = splitter._split_rendered(messages, answers)
  assert pieces == splitter._split_one_by_one(messages, answers)
  assert chat.turn_texts(messages) == pieces
  assert sum(is_answer for _, is_answer in pieces) == 20  # one more, and one without words


def test_a_template_that_is_not_the_same_everywhere_is_split_exactly(tmp_path):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, TEMPLATES['last differs']))
  with pytest.raises(UserError, match='rewrites earlier turns'):
    chat.turn_texts(_conversation(20))


def test_4000_messages_are_rendered_a_few_times(llama3, monkeypatch):
  rendered = []
  render = chat_template.render

  def count(tokenizer, messages, has_header):
    rendered.append(len(messages))
    return render(tokenizer, messages, has_header)

  monkeypatch.setattr(chat_template, 'render', count)
  messages = [m for i in range(2000) for m in (user(f'question {i}'), assistant(f'answer {i}'))]
  pieces = llama3.turn_texts(messages)
  assert len(pieces) == 4000
  assert sum(rendered) < 8 * len(messages)
