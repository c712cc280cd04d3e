"""A reward model that reads text: characters against its tokens, scores against plain passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, tokenizers

from segjax.data.token_texts import token_texts
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.model.heads import scores
from segjax.train.text_scoring import (
  NOT_READ,
  StepMarks,
  TextScorer,
  character_ends,
  mark_steps,
)

PROMPT = [{'role': 'user', 'content': 'one 日本?'}]
TEXTS = ['the fox é 日本 😀  says\nhello', 'é', '日本日本', '', ' a\u0301b 👩‍👩‍👧 c ', '2 + 2 = 4.']
NETWORK = dataclasses.replace(models.CONFIG, vocab_size=320, max_position_embeddings=128)


def write_characters(directory):
  """Writes a tokenizer with a token for each character, and others of two characters."""
  from tokenizers import AddedToken, Tokenizer, decoders
  from tokenizers.models import Unigram
  from transformers import PreTrainedTokenizerFast

  letters = sorted({*''.join(TEXTS), *tokenizers.PLAIN, *'one 日本?userassistant: \n.!', '本日'})
  pairs = ['日本', 'he', '\nh', 'fo', '. ', '4.', 'us', 'er', 's\n']
  core = Tokenizer(
    Unigram(
      [('<unk>', -20.0)] + [(t, -2.0 * len(t) + (len(t) > 1)) for t in [*letters, *pairs]], unk_id=0
    )
  )
  core.decoder = decoders.Fuse()
  core.add_special_tokens([AddedToken(t, special=True) for t in ('<s>', '</s>', '<tag>')])
  own = PreTrainedTokenizerFast(tokenizer_object=core, bos_token='<s>', eos_token='</s>')
  own.chat_template = tokenizers.PLAIN.replace('\n{% endfor', '</s>\n{% endfor')
  own.save_pretrained(directory)
  return str(directory)


@pytest.fixture(scope='module', params=['bytes', 'characters'])
def scorer(request, tmp_path_factory):
  directory = tmp_path_factory.mktemp(request.param)
  write = write_characters if request.param == 'characters' else tokenizers.write_tokenizer
  tokenizer = load_tokenizer(write(directory))
  return TextScorer(NETWORK, tokenizer, models.mesh(1))


@pytest.fixture(scope='module')
def params():
  return models.place(models.params(NETWORK, 'scalar', 3), models.mesh(1))


def every_end(text):
  return np.arange(-1, len(text) + 2)


def slow_position(scorer, text, end):
  """Returns the first token after which the reward model has read text[:end], by decoding."""
  tokenizer = scorer.tokenizer
  prompt = tokenizer.prompt_ids(PROMPT)
  response = tokenizer.encode([text + tokenizer.turn_close])[0]
  ids = [*prompt, *response]
  if end == NOT_READ:
    return ids, NOT_READ
  if end > len(text):
    return ids, len(ids) - 1
  for count in range(len(response) + 1):
    if tokenizer.decode(response[:count], skip_special=False).startswith(text[:end]):
      return ids, len(prompt) + count - 1
  raise AssertionError(f'{text[:end]!r} is never read')


@pytest.mark.parametrize('text', TEXTS)
def test_an_end_is_read_at_the_token_that_completes_its_characters(scorer, text):
  ends = every_end(text)
  row = scorer.tokenize(PROMPT, text, ends)
  for end, position in zip(ends, row.positions, strict=True):
    ids, expected = slow_position(scorer, text, int(end))
    assert list(row.ids) == list(ids)
    assert position == expected, (end, text)


@pytest.mark.parametrize('batch_size', [0, 4, 64])
def test_scores_are_those_of_each_text_by_itself(scorer, params, batch_size):
  ends = np.full((len(TEXTS), max(map(len, TEXTS)) + 3), NOT_READ)
  for row, text in zip(ends, TEXTS, strict=True):
    own = every_end(text)
    row[: len(own)] = own[::-1]
  found = np.asarray(scorer.score(params, [PROMPT] * len(TEXTS), TEXTS, ends, batch_size))
  plain = jax.jit(functools.partial(scores, config=NETWORK))
  for row, text, own in zip(found, TEXTS, ends, strict=True):
    tokens = np.zeros((1, NETWORK.max_position_embeddings), np.int32)
    ids = slow_position(scorer, text, 0)[0]
    tokens[0, : len(ids)] = ids
    at_token = [*np.asarray(plain(params, jnp.asarray(tokens)))[0], 0.0]  # NOT_READ is the last
    expected = [at_token[slow_position(scorer, text, int(end))[1]] for end in own]
    # Sums of another order: a batch has another shape.
    np.testing.assert_allclose(row, expected, atol=1e-5)


def test_a_long_text_loses_the_beginning_of_its_prompt(scorer):
  response = 'the fox'
  ends = every_end(response)
  whole = scorer.tokenize(PROMPT, response, ends)
  for positions in (len(whole.ids), len(whole.ids) - 3, 12, 4):
    network = dataclasses.replace(NETWORK, max_position_embeddings=positions)
    row = dataclasses.replace(scorer, network=network).tokenize(PROMPT, response, ends)
    assert len(row.ids) == positions
    assert row.is_cut == (positions < len(whole.ids))
    tokens = [NOT_READ if at == NOT_READ else whole.ids[at] for at in whole.positions]
    cut = [NOT_READ if at == NOT_READ else row.ids[at] for at in row.positions]
    if positions > 8:  # the response fits
      assert row.ids == whole.ids[-positions:] and cut == tokens
    else:
      assert row.positions.max() == positions - 1


@pytest.mark.parametrize(
  'delimiter, expected',
  [(None, 'a 1# \nb 2#\n\nc#'), ('', 'a 1#b 2#c#'), ('\n', 'a 1#\nb 2#\nc#')],
)
def test_a_tag_follows_the_words_of_each_step(delimiter, expected):
  response, ends = 'a 1 \nb 2\n\nc', np.array([NOT_READ, 11, 5, NOT_READ, 10, 12, 5])
  text, places = mark_steps(response, ends, StepMarks('#', delimiter))
  assert text == expected
  tags = [index + 1 for index, character in enumerate(expected) if character == '#']
  assert places == [NOT_READ, tags[2], tags[0], NOT_READ, tags[1], tags[2], tags[0]]
  assert mark_steps(response, ends, StepMarks()) == (response, ends.tolist())


def test_a_tag_is_read_at_its_last_token(scorer):
  marked = dataclasses.replace(scorer, marks=StepMarks(' good', ''))
  response, ends = 'one fox\nthe 日本', np.array([8, 14, NOT_READ])
  row = marked.tokenize(PROMPT, response, ends)
  text = 'one fox goodthe 日本 good'
  assert row.ids == scorer.tokenize(PROMPT, text, ends).ids
  expected = [slow_position(scorer, text, end)[1] for end in (12, len(text))]
  assert row.positions.tolist() == [*expected, NOT_READ]


def test_ends_of_segments_in_characters(scorer):
  tokenizer = scorer.tokenizer
  rng, width = np.random.default_rng(0), 120
  ids = [
    tokenizer.encode([text])[0] + [tokenizer.stop_ids[0]] * (i % 2) for i, text in enumerate(TEXTS)
  ]
  end, mask = np.zeros((len(ids), width), bool), np.zeros((len(ids), width), bool)
  finished = np.arange(len(ids)) % 2 == 1
  for row, tokens in enumerate(ids):
    mask[row, 2 : 2 + len(tokens)] = True
    end[row] = mask[row] & (rng.random(width) < 0.5)
    end[row, 1 + len(tokens)] = len(tokens) > 0
  ends = character_ends(ids, end, mask, finished, lambda x: token_texts(x, tokenizer.decode))
  for row, tokens in enumerate(ids):
    for index in range(width):
      if not end[row, index]:
        assert ends[row, index] == NOT_READ
        continue
      read = tokenizer.decode(tokens[: index - 1])
      if finished[row] and index == 1 + len(tokens):
        assert ends[row, index] == len(read) + 1
      else:  # without the bytes of a character that is not complete
        assert TEXTS[row][: ends[row, index]] == read.rstrip('\ufffd')


def test_a_prompt_that_the_template_refuses_is_one_line(scorer):
  again = [{'role': 'user', 'content': scorer.tokenizer.prompt_text(PROMPT)}]
  with pytest.raises(UserError, match='has written it already'):
    scorer.tokenize(again, 'x', np.array([1]))
