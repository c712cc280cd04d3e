"""Ids of pieces are those of the whole text, whatever a tokenizer puts in front of a text."""

import numpy as np
import pytest
from fixtures import tokenizers
from fixtures.tokenizers import assistant, user

from segjax.data.limits import Limits
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_conversations, tokenize_pairs, tokenize_steps
from segjax.data.tokenizer import load_tokenizer

# Llama-2's, in which an answer follows a bracket; and one in which it follows a line.
LLAMA2 = (
  "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
  "[/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ROLE = (
  "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}{{ eos_token }}"
  '{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}'
)
WORDS = ('there', 'there was a dog')  # up to the ends of two steps
KINDS = ('prepend', 'metaspace first', 'metaspace always', 'byte-level with a space')


def _write(directory, kind, template):
  """Writes a tokenizer that puts a space in front of a text in one of four ways."""
  from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
  )
  from transformers import PreTrainedTokenizerFast

  core = Tokenizer(models.BPE(byte_fallback=False, unk_token='<unk>'))
  if kind == 'prepend':
    core.normalizer = normalizers.Sequence(
      [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
    )
    core.decoder = decoders.Sequence(
      [decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
  elif kind.startswith('metaspace'):
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1])
    core.decoder = decoders.Metaspace(prepend_scheme=kind.split()[1])
  else:
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
  alphabet = list('abcdefghijklmnopqrstuvwxyzTIONS[]/.:\n ▁?Q')
  if 'byte' in kind:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  text = ['tell a story once upon a time', 'once there was a dog. user assistant', 'one two'] * 3
  trainer = trainers.BpeTrainer(
    vocab_size=330, initial_alphabet=alphabet, show_progress=False, special_tokens=['<unk>']
  )
  core.train_from_iterator(text, trainer)
  core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ('<s>', '</s>')])
  fast = PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token='<s>', eos_token='</s>', unk_token='<unk>'
  )
  fast.chat_template = template
  fast.save_pretrained(directory)
  return load_tokenizer(str(directory))


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('template', [LLAMA2, ROLE], ids=['llama2', 'role'])
def test_prompt_and_response_are_those_of_the_whole(tmp_path, kind, template):
  chat = _write(tmp_path, kind, template)
  assert chat.sentinel
  messages = [user('tell a story'), assistant('once upon a time.')]
  ids = chat.prompt_ids(messages[:1]) + chat.response_ids(messages[:1], messages[1]['content'])
  text = chat.tokenizer.apply_chat_template(messages, tokenize=False)
  assert ids == chat.encode([text])[0]


@pytest.mark.parametrize('kind', KINDS)
def test_datasets_hold_the_ids_of_the_whole(tmp_path, kind):
  chat = _write(tmp_path, kind, ROLE)
  turns = [user('tell'), assistant('once upon'), user('one two'), assistant('there was a dog')]
  rows = Rows([{'messages': turns}, {'messages': turns[:2]}], 'rows.jsonl')
  data = tokenize_conversations(rows, chat, Limits(256, 128))
  text = chat.tokenizer.apply_chat_template(turns, tokenize=False)
  assert data.tokens[0].tolist() == chat.encode([text])[0]
  trained = data.tokens[0][data.trained[0]]
  assert chat.decode(trained, skip_special=False).replace(' ', '') == (
    'onceupon</s>therewasadog</s>'
  )
  pair = {'messages': turns[:3], 'chosen': 'there was', 'rejected': 'once'}
  pairs = tokenize_pairs(Rows([pair], 'rows.jsonl'), chat, Limits(256, 128))
  for side in ('chosen', 'rejected'):
    answered = [*turns[:3], assistant(pair[side])]
    text = chat.tokenizer.apply_chat_template(answered, tokenize=False)
    assert getattr(pairs, side)[0].tolist() == chat.encode([text])[0]
  assert pairs.chosen[0][: pairs.prompt_length[0]].tolist() == chat.prompt_ids(turns[:3])
  labelled = {'messages': turns, 'steps': [[5, 1], [15, 0]]}
  steps = tokenize_steps(Rows([labelled], 'rows.jsonl'), chat, Limits(256, 128))
  assert steps.tokens[0].tolist() == data.tokens[0].tolist()
  prompt_length = len(chat.prompt_ids(turns[:3]))
  ids, labels = steps.tokens[0][prompt_length:], steps.labels[0][prompt_length:]
  for position, words in zip(np.flatnonzero(~np.isnan(labels)), WORDS, strict=True):
    assert chat.decode(ids[: position + 1]).strip().startswith(words)
    assert not chat.decode(ids[:position]).strip().startswith(words)


def test_a_token_that_would_span_prompt_and_answer_is_split(tmp_path):
  chat = _write(tmp_path, 'prepend', tokenizers.PLAIN)  # the prompt ends in a space
  prompt = chat.prompt_ids([user('one')])
  ids = prompt + chat.response_ids([user('one')], 'once')
  text = chat.prompt_text([user('one')]) + 'once\n</s>'
  assert ids != chat.encode([text])[0]
  assert ids[: len(prompt)] == prompt
  assert chat.decode(ids, skip_special=False) == chat.decode(
    chat.encode([text])[0], skip_special=False
  )


def test_characters_of_a_response(tmp_path):
  chat = _write(tmp_path, 'prepend', ROLE)
  prompt = chat.prompt_text([user('one')])
  ids, characters = chat.encode_response(prompt, 'two dogs.</s>')
  assert ids == chat.response_ids([user('one')], 'two dogs.')
  assert characters[0][0] == 0 and characters[-1] == (9, 13)
  covered = np.zeros(13, bool)
  for start, end in characters:
    covered[start:end] = True
  assert covered.all()


def test_byte_level_tokenizers_stay_as_they_were(llama3, chatml):
  assert llama3.sentinel == chatml.sentinel == ''
  groups = [['a b', ' c'], ['a b', 'd '], []]
  pieces = llama3.encode_pieces(groups)
  as_lists = [[ids.tolist() for ids in group] for group in pieces]
  assert as_lists == [llama3.encode(group) for group in groups]


def test_a_real_sentencepiece_tokenizer(shared_files):
  model = str(shared_files / 'models' / 'stories260k-hf')
  messages = [user('Tell a story.'), assistant('Once upon a time.')]
  for template in (LLAMA2, ROLE):
    chat = load_tokenizer(model, template)
    ids = chat.prompt_ids(messages[:1]) + chat.response_ids(messages[:1], 'Once upon a time.')
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids == chat.encode([text])[0]
