"""A conversation, its lines given beforehand: what is streamed, kept, forgotten and shown."""

import builtins

import jax
import pytest

from segjax.evaluation import annotate
from segjax.jobs import chat
from segjax.run.stage import Stage


@pytest.fixture
def values(language, small):
  def make(**more):
    return small('chat', **{'policy.path': str(language / 'model'), **more})

  return make


@pytest.fixture
def talk(run, values, tmp_path, monkeypatch, capsys):
  """Types the lines; what is printed."""

  def go(*lines, **more):
    waiting = iter(lines)

    def type_line(prompt):
      for line in waiting:
        return line
      raise EOFError

    monkeypatch.setattr(builtins, 'input', type_line)
    run(values(**more), tmp_path)
    return capsys.readouterr().out

  return go


def test_answers_segments_and_a_new_beginning(talk):
  out = talk('/segments', 'describe the badger', '/segments', '/what', '/new', '/segments', '/quit')
  first, _, rest = out.partition('entropy')
  assert first.count('there is no answer yet') == 1
  assert rest.count('there is no answer yet') == 1
  assert rest.count(chat.HELP) == 1
  assert 'chat        done in' in out


def test_the_oldest_turns_are_forgotten(talk):
  out = talk(*['describe the badger of the island'] * 8)
  assert '(the first 2 messages are forgotten' in out


def test_no_policy(run, values):
  with pytest.raises(ValueError, match=r'config.policy.path is empty'):
    run(values(**{'policy.path': ''}))


def test_what_streams_is_the_answer(values, one_device, tmp_path):
  stage = Stage('chat', values(), tmp_path, one_device)
  messages = [{'role': 'user', 'content': 'describe the badger'}]
  with jax.set_mesh(one_device):
    reader = annotate.load(stage)
    pieces, answers = [], []
    for number in (0, 0, 1):
      pieces.append([])
      answers.append(chat.reply(stage, reader, messages, number, pieces[-1].append))
  assert [''.join(some) for some in pieces] == answers
  assert sum(map(bool, pieces[0])) > 1  # it came in parts
  assert answers[0] == answers[1] != answers[2]
