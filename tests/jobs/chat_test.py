"""Scripted conversations: streamed answers, commands, and dropped turns."""

import builtins
from pathlib import Path

import jax
import pytest

from segjax.jobs import chat
from segjax.run.scorers import load_annotator


@pytest.fixture
def values(language, small):
  def make(**more):
    return small('chat', **{'policy.path': str(language / 'model'), **more})

  return make


@pytest.fixture
def talk(run, values, tmp_path, monkeypatch, capsys):
  """Returns a function that types lines into the chat and returns its output."""

  def run_chat(*lines, **more):
    pending = iter(lines)

    def type_line(prompt):
      for line in pending:
        return line
      raise EOFError

    monkeypatch.setattr(builtins, 'input', type_line)
    run(values(**more), tmp_path)
    return capsys.readouterr().out

  return run_chat


def test_answers_segments_and_a_new_conversation(talk):
  out = talk('/segments', 'describe the badger', '/segments', '/what', '/new', '/segments', '/quit')
  first, _, rest = out.partition('entropy')
  assert first.count('there is no answer yet') == 1
  assert rest.count('there is no answer yet') == 1
  assert rest.count(chat.HELP) == 1
  assert 'chat        done in' in out


def test_the_oldest_turns_are_dropped(talk):
  out = talk(*['describe the badger of the island'] * 8)
  assert '(dropped the 2 oldest messages' in out


def test_no_policy(run, values):
  with pytest.raises(ValueError, match=r'config.policy.path is empty'):
    run(values(**{'policy.path': ''}))


def test_streamed_pieces_join_to_the_answer(values, one_device):
  settings = values()
  messages = [{'role': 'user', 'content': 'describe the badger'}]
  with jax.set_mesh(one_device):
    path = Path(settings.policy.path)
    annotator = load_annotator(path, None, settings, one_device, print)
    pieces, answers = [], []
    for seed in (0, 0, 1):
      pieces.append([])
      key = jax.random.key(seed)
      answers.append(chat.reply(annotator, messages, settings.rollout, key, pieces[-1].append))
  assert [''.join(parts) for parts in pieces] == answers
  assert sum(map(bool, pieces[0])) > 1  # it was streamed in parts
  assert answers[0] == answers[1] != answers[2]
