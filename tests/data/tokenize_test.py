import numpy as np
import pytest
from fixtures import tokenizers
from fixtures.tokenizers import assistant, user

from segjax.data.limits import Limits, describe_counts, pair_lengths
from segjax.data.sources import Rows, load_rows
from segjax.data.tokenize import (
  tokenize_conversations,
  tokenize_pairs,
  tokenize_prompts,
)
from segjax.data.tokenizer import load_tokenizer

WIDE = Limits(max_length=512, max_prompt_length=256)
NONE = {'truncated': 0, 'dropped_overlong': 0, 'dropped_identical': 0, 'dropped_empty': 0}


def _rows(*rows):
  return Rows(list(rows), 'rows.jsonl')


def _pair(prompt, chosen, rejected):
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


# (prompt, chosen, rejected) before and after, for max_length 2048 and max_prompt_length 1728.
@pytest.mark.parametrize(
  'before, after',
  [
    ((2000, 100, 40), (1728, 100, 40)),
    ((1800, 400, 100), (1728, 320, 100)),
    ((500, 1800, 300), (500, 1548, 300)),
    ((100, 1900, 1948), (100, 1900, 1948)),
    ((3000, 10, 10), (1728, 10, 10)),
    ((1728, 320, 10), (1728, 320, 10)),
    ((1700, 400, 300), (1700, 348, 300)),
  ],
)
def test_golden_pair_lengths(before, after):
  assert pair_lengths(*before, Limits(2048, 1728)) == after


def test_pair_batch_by_hand(llama3):
  data = tokenize_pairs(_rows(_pair('hello', 'one', 'one two three')), llama3, WIDE)
  batch = data.gather(np.array([0]))
  prompt = llama3.prompt_ids([user('hello')])
  for side, text in ((batch.chosen, 'one'), (batch.rejected, 'one two three')):
    response = llama3.response_ids([user('hello')], text)
    real = len(prompt) + len(response)
    assert side.ids[0, :real].tolist() == prompt + response
    assert set(side.ids[0, real:].tolist()) <= {llama3.pad_id}
    assert np.flatnonzero(side.response_mask[0]).tolist() == list(range(len(prompt), real))
    assert side.finished.tolist() == [True]
  assert data.counts == {'rows': 1, **NONE}
  assert data.length % 8 == 0
  assert batch.chosen.ids.shape == batch.rejected.ids.shape == (1, data.length)


def test_pair_truncation_keeps_ends_and_marks_unfinished(llama3):
  row = _pair('hello there ' * 9, 'one two three ' * 9, 'two')
  prompt = llama3.prompt_ids([user(row['prompt'])])
  chosen = llama3.response_ids([user(row['prompt'])], row['chosen'])
  limits = Limits(max_length=30, max_prompt_length=20)
  assert len(prompt) > 20 and len(chosen) > 10
  data = tokenize_pairs(_rows(row), llama3, limits)
  batch = data.gather(np.array([0]))
  assert batch.chosen.ids[0].tolist() == prompt[-20:] + chosen[:10]
  assert batch.chosen.finished.tolist() == [False]
  assert batch.rejected.finished.tolist() == [True]
  assert data.counts == {'rows': 1, **NONE, 'truncated': 1}
  assert data.length == 30


def test_pairs_dropped_and_counted(llama3):
  long = 'one two three ' * 9
  rows = _rows(
    _pair('a', 'one', 'one'),  # identical
    _pair('a', long + 'x', long + 'y'),  # identical once truncated
    _pair('a', '  ', 'one'),  # no words
    _pair('a', 'one', ''),  # no words
    _pair('a', 'one', 'two'),
    _pair('a', long, 'two'),  # truncated
  )
  data = tokenize_pairs(rows, llama3, Limits(32, 24))
  assert data.counts == {
    'rows': 6,
    'truncated': 1,
    'dropped_overlong': 0,
    'dropped_identical': 2,
    'dropped_empty': 2,
  }
  assert len(data) == 2


def test_no_room_for_a_response_drops_the_pair(llama3):
  rows = _rows(_pair('one two ' * 30, 'one', 'two'), _pair('a', 'one', 'two'))
  data = tokenize_pairs(rows, llama3, Limits(32, 32))
  assert data.counts == {'rows': 2, **NONE, 'dropped_empty': 1}


def test_overlong_drop_and_error(llama3):
  rows = _rows(_pair('a', 'one', 'two'), _pair('a', 'one ' * 60, 'two'))
  data = tokenize_pairs(rows, llama3, Limits(32, 24, 'drop'))
  assert data.counts == {'rows': 2, **NONE, 'dropped_overlong': 1}
  with pytest.raises(ValueError, match=r'^rows\.jsonl, row 2: .*max_length=32.*data\.overlong'):
    tokenize_pairs(rows, llama3, Limits(32, 24, 'error'))
  long = _rows({'prompt': 'a'}, {'prompt': 'one ' * 60})
  assert tokenize_prompts(long, llama3, Limits(32, 24, 'drop')).row.tolist() == [0]
  with pytest.raises(ValueError, match=r'row 2: a prompt of \d+ tokens'):
    tokenize_prompts(long, llama3, Limits(32, 24, 'error'))
  turns = _rows({'messages': [user('a'), assistant('one ' * 60)]})
  with pytest.raises(ValueError, match='row 1'):
    tokenize_conversations(turns, llama3, Limits(32, 24, 'error'))


def test_nothing_left(llama3):
  with pytest.raises(ValueError, match=r'rows\.jsonl: none of its 1 rows.*1 dropped identical'):
    tokenize_pairs(_rows(_pair('a', 'one', 'one')), llama3, WIDE)
  with pytest.raises(ValueError, match='1 dropped empty'):
    tokenize_conversations(_rows({'messages': [user('a')]}), llama3, WIDE)


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((32, 24, 'cut'), r"data\.overlong_policy='cut' is unknown; choose one of truncate_left"),
    ((32, 33), r'data\.max_prompt_length=33 must be'),
    ((32, 0), r'data\.max_prompt_length=0 must be'),
  ],
)
def test_invalid_limits(arguments, message):
  with pytest.raises(ValueError, match=message):
    Limits(*arguments)


def test_errors_name_file_and_row(llama3, tmp_path):
  good = _pair('a', 'one', 'two')
  with pytest.raises(ValueError, match=r'^rows\.jsonl, row 2: no `chosen`'):
    tokenize_pairs(_rows(good, {'prompt': 'a'}), llama3, WIDE)
  template = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}"
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, template + tokenizers.LLAMA3))
  with pytest.raises(ValueError, match=r'^rows\.jsonl, row 2: .*refuses'):
    tokenize_prompts(_rows({'prompt': 'a'}, {'prompt': 'bad'}), chat, WIDE)


def test_conversation_mask_is_each_turn_with_its_stop(chatml):
  messages = [user('a'), assistant('one'), user('b'), assistant('two'), user('c')]
  data = tokenize_conversations(_rows({'messages': messages}), chatml, WIDE)
  batch = data.gather(np.array([0]))
  ids, mask = np.asarray(batch.ids[0]), np.asarray(batch.mask[0])
  assert chatml.decode(ids[mask], skip_special=False) == 'one<|im_end|>two<|im_end|>'
  real = int(data.tokens.lengths[0])
  assert chatml.decode(ids[:real], skip_special=False).endswith('assistant\ntwo<|im_end|>')
  assert not mask[real:].any()


def test_conversation_keeps_its_end(llama3):
  messages = [user('one ' * 40), assistant('two three')]
  data = tokenize_conversations(_rows({'messages': messages}), llama3, Limits(16, 16))
  batch = data.gather(np.array([0]))
  complete = llama3.prompt_ids(messages[:1]) + llama3.response_ids(messages[:1], 'two three')
  assert batch.ids[0].tolist() == complete[-16:]
  assert bool(batch.mask[0, -1])
  assert data.counts == {'rows': 1, **NONE, 'truncated': 1}


def test_conversation_and_pair_give_the_same_tokens(llama3):
  rows = _rows(_pair('hello', 'one two', 'three'))
  sft = tokenize_conversations(rows, llama3, WIDE).gather(np.array([0]))
  pair = tokenize_pairs(rows, llama3, WIDE).gather(np.array([0])).chosen
  real = int(np.flatnonzero(pair.response_mask[0])[-1]) + 1
  np.testing.assert_array_equal(sft.ids[0, :real], pair.ids[0, :real])
  np.testing.assert_array_equal(sft.mask[0, :real], pair.response_mask[0, :real])


def test_prompts_keep_their_end_and_their_words(llama3):
  rows = _rows({'prompt': 'hello'}, {'prompt': 'one two ' * 30})
  data = tokenize_prompts(rows, llama3, Limits(64, 24))
  batch = data.gather(np.array([1, 0]))
  long = llama3.prompt_ids([user('one two ' * 30)])
  assert batch.prompt_ids.shape == (2, 24)
  assert batch.prompt_ids[0].tolist() == long[-24:]
  short = llama3.prompt_ids([user('hello')])
  assert batch.prompt_length.tolist() == [24, len(short)]
  assert batch.prompt_ids[1, : len(short)].tolist() == short
  assert data.messages(0) == [user('hello')]
  assert data.counts == {'rows': 2, **NONE, 'truncated': 1}


def test_a_prompt_of_special_tokens_alone_is_dropped(llama3, monkeypatch):
  ids = {'hello': llama3.prompt_ids([user('hello')]), '': sorted(llama3.special_ids)[:3]}
  monkeypatch.setattr(type(llama3), 'encode', lambda self, texts: [ids[text] for text in texts])
  monkeypatch.setattr(type(llama3), 'prompt_text', lambda self, messages: messages[0]['content'])
  data = tokenize_prompts(_rows({'prompt': 'hello'}, {'prompt': ''}), llama3, WIDE)
  assert data.counts == {'rows': 2, **NONE, 'dropped_empty': 1}
  assert data.row.tolist() == [0]


def test_many_chunks_give_the_same_as_one(llama3, monkeypatch):
  rows = _rows(*[_pair(f'hello {i}', f'one {i}', f'two {i}') for i in range(10)])
  complete = tokenize_pairs(rows, llama3, WIDE)
  monkeypatch.setattr('segjax.data.tokenize._CHUNK', 3)
  parts = tokenize_pairs(rows, llama3, WIDE)
  np.testing.assert_array_equal(complete.chosen.values, parts.chosen.values)
  np.testing.assert_array_equal(complete.rejected.lengths, parts.rejected.lengths)


def test_real_pairs(shared_files):
  rows = load_rows(str(shared_files / 'data' / 'hh_harmless' / 'pairs.jsonl.gz'), limit=60)
  template = '{{ bos_token }}' + tokenizers.CHATML.replace('<|im_end|>', '</s>')
  chat = load_tokenizer(str(shared_files / 'models' / 'stories260k-hf'), template)
  data = tokenize_pairs(rows, chat, Limits(512, 384))
  counts = data.counts
  dropped = sum(counts[k] for k in counts if k.startswith('dropped'))
  assert counts['rows'] == 60 == len(data) + dropped
  assert data.length <= 512 and counts['truncated'] > 0
  batch = data.gather(np.arange(len(data)))
  for side in (batch.chosen, batch.rejected):
    last = data.length - 1 - np.argmax(np.asarray(side.response_mask)[:, ::-1], axis=1)
    ends = np.asarray(side.ids)[np.arange(len(data)), last]
    # A response ends in the stop token exactly if it was not truncated.
    np.testing.assert_array_equal(ends == 2, np.asarray(side.finished))
  # Every complete prompt keeps its BOS, and there is only one.
  is_complete = data.prompt_length < 384
  assert (np.asarray(batch.chosen.ids)[is_complete, 0] == 1).all()
  assert ((np.asarray(batch.chosen.ids) == 1).sum(axis=1) <= 1).all()
  assert len(tokenize_prompts(rows, chat, Limits(512, 384))) == 60
  assert len(tokenize_conversations(rows, chat, Limits(512, 384))) > 55


def test_describe_counts():
  counts = {'rows': 12, 'truncated': 0, 'dropped_overlong': 3}
  assert describe_counts(counts) == '12 rows, 3 dropped overlong'
