"""Scripted conversations: streamed answers, commands, and dropped turns."""

import builtins
import io
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.jobs import chat, chat_answers
from segjax.run.scorers import load_annotator
from segjax.types import Normalizer


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
        if isinstance(line, type):
          raise line
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


@pytest.mark.campaign
def test_the_oldest_turns_are_dropped(talk):
  out = talk(*['describe the badger of the island'] * 8)
  assert '(dropped the 2 oldest messages' in out


@pytest.mark.campaign
def test_answers_are_limited_to_half_of_the_positions(talk):
  out = talk('describe the badger', '/segments', **{'rollout.max_new_tokens': 512})
  assert (
    'answers have at most 64 tokens, half of the model’s 128 positions (config.rollout.max_new_to'
    'kens=512)'
  ) in out
  assert 'entropy' in out and 'chat        done in' in out


def test_a_line_that_is_too_long_does_not_end_the_chat(talk):
  out = talk('describe the badger', 'its ' * 200, '/segments', **{'rollout.max_new_tokens': 8})
  assert '(this message has 2' in out and 'and there is room for 119: the model has 128 pos' in out
  assert 'entropy' in out  # of the answer to the first line
  assert 'chat        done in' in out


def test_an_answer_that_fills_the_context_can_be_segmented(talk):
  # The stop token that its text is given takes one more position.
  line = 'describe the badger of the island of its'
  out = talk(*[line] * 5, '/segments', **{'rollout.max_new_tokens': 64})
  assert 'oldest messages' in out and 'entropy' in out and 'but the networks have' not in out


def test_undecodable_bytes_are_replaced(talk):
  out = talk('describe \udcff\ud800', '\udcff')
  assert out.count('(bytes that are not text in the encoding of the terminal were replaced)') == 2
  assert 'chat        done in' in out


def test_bytes_of_another_encoding_are_read(monkeypatch, capsys):
  typed = io.TextIOWrapper(io.BytesIO(b'caf\xe9\n\n \nna\xc3\xafve'), encoding='utf-8')
  monkeypatch.setattr(sys, 'stdin', typed)
  assert list(chat._lines()) == ['caf\ufffd', 'naïve']


def test_ctrl_c_stops_the_answer_and_at_the_prompt_the_chat(talk, monkeypatch):
  generate, calls = chat_answers.generate, []

  def interrupted(*arguments, on_chunk, **options):
    def stop(result):
      on_chunk(result)
      if result.response_mask.any():
        raise KeyboardInterrupt

    calls.append(0)
    return generate(*arguments, on_chunk=stop if len(calls) == 1 else on_chunk, **options)

  monkeypatch.setattr(chat_answers, 'generate', interrupted)
  out = talk('describe the badger', 'describe the otter', KeyboardInterrupt, 'describe the otter')
  assert len(calls) == 2
  assert 'chat        done in' in out


def test_closed_input(run, values, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', None)
  with pytest.raises(UserError, match='standard input, which is closed'):
    run(values())


def test_corrupted_weights_are_said(talk, monkeypatch):
  generate = chat_answers.generate
  broken = lambda *args, **kw: generate(*args, **kw)._replace(non_finite=np.array([True]))  # noqa: E731
  monkeypatch.setattr(chat_answers, 'generate', broken)
  assert 'logits are not finite' in talk('describe the badger')


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
      answers.append(
        chat_answers.reply(annotator, messages, settings.rollout, key, pieces[-1].append)
      )
  assert [''.join(parts) for parts in pieces] == answers
  assert sum(map(bool, pieces[0])) > 1  # it was streamed in parts
  assert answers[0] == answers[1] != answers[2]


@pytest.fixture(scope='module')
def reward_model(language, tmp_path_factory):
  """A reward model of random weights that cuts at full stops."""
  directory = tmp_path_factory.mktemp('reward') / 'model'
  segmentation = Segmentation(boundary='fixed_length', segment_length=3)
  return runs.reward_model(language / 'model', directory, Normalizer(), segmentation)


@pytest.mark.campaign
def test_the_best_of_several_scores_highest_and_again_never_lowers_the_score(talk, reward_model):
  line = 'describe the badger'
  searched = ['/best 4', line, '/best 4 segments', line, *['/again'] * 3, '/segments']
  out = talk(*searched, **{'reward_model.path': str(reward_model), 'rollout.max_new_tokens': 8})
  scores = [float(x) for x in re.findall(r'\(score ([-+.\d]+)\)', out)]
  assert len(scores) == 2
  tried = re.findall(r'\(score ([-+.\d]+)( -> |, not above )([-+.\d]+)', out)
  assert len(tried) == 3 == out.count('(the worst segment is ')
  best = scores[1]
  for first, word, second in tried:
    old, new = (first, second) if '>' in word else (second, first)
    assert float(old) == pytest.approx(best, abs=2e-3)
    assert (float(new) > float(old)) == ('>' in word)
    best = max(float(old), float(new))
  assert 'score' in out.rpartition('entropy')[2].splitlines()[0]


def test_what_cannot_be_searched_is_said(talk, reward_model):
  out = talk('/again', '/best 4', '/best', '/best x', '/best 4 words')
  assert out.count('(this needs a reward model: start with --config.reward_model.path=') == 2
  assert out.count('(write /best N, or /best N segments') == 3
  path = {'reward_model.path': str(reward_model)}
  out = talk('/again', '/best 4', **path, **{'rollout.temperature': 0.0})
  assert '(there is no answer yet)' in out and '(config.rollout.temperature=0 samples equal' in out
