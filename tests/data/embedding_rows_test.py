"""Ids without a row in an embedding are refused; a lookup would return the last row."""

import dataclasses
import json

import pytest
from fixtures import tokenizers
from fixtures.tokenizers import user

from segjax.data.embedding_rows import check_sampled_ids
from segjax.data.limits import Limits
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig

_NETWORK = LlamaConfig(
  vocab_size=300,
  hidden_size=8,
  intermediate_size=8,
  num_hidden_layers=1,
  num_attention_heads=2,
  num_key_value_heads=1,
  head_dim=4,
)


def network(rows):
  return dataclasses.replace(_NETWORK, vocab_size=rows)


@pytest.fixture
def chat(tmp_path):
  """A tokenizer whose last two tokens are one that texts may hold and a pad token."""
  directory = tokenizers.write_tokenizer(tmp_path)
  tokenizer = load_tokenizer(directory).tokenizer
  tokenizer.add_special_tokens({'additional_special_tokens': ['<|extra|>']})
  tokenizer.add_special_tokens({'pad_token': '<|pad|>'})
  tokenizer.save_pretrained(directory)
  return load_tokenizer(directory)


def id_of(chat, token):
  return chat.tokenizer.convert_tokens_to_ids(token)


def test_a_pad_token_that_no_text_holds_does_no_harm(chat):
  pad = id_of(chat, '<|pad|>')
  assert chat.pad_id == pad == len(chat.tokenizer) - 1
  limited = chat.for_networks({'policy': network(pad)})
  assert limited.prompt_ids([user('hello')]) == chat.prompt_ids([user('hello')])
  assert limited.pad_id == chat.stop_ids[0]  # the pad token has no row
  assert chat.for_networks({'policy': network(pad + 1)}).pad_id == pad


def test_the_smallest_embedding_decides_and_the_row_is_named(chat):
  extra = id_of(chat, '<|extra|>')
  limited = chat.for_networks({'policy': network(500), 'reward': network(extra)})
  message = rf"'<\|extra\|>' as id {extra}, but the embedding of the reward has {extra} rows"
  for encode in (
    lambda: limited.prompt_ids([user('say <|extra|>')]),
    lambda: limited.response_ids([user('say')], '<|extra|>'),
    lambda: limited.encode_response('', 'a <|extra|>'),
  ):
    with pytest.raises(UserError, match=message):
      encode()
  rows = Rows([{'prompt': 'a'}, {'prompt': 'a <|extra|>'}, {'prompt': 'b'}], 'rows.jsonl')
  with pytest.raises(UserError, match=rf'rows\.jsonl, row 2: the tokenizer writes {message}'):
    tokenize_prompts(rows, limited, Limits(50, 50, 'error'))


@pytest.mark.parametrize('token', ['<|eot_id|>', '<|start_header_id|>'])
def test_tokens_of_the_template_are_refused_at_once(tmp_path, token):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path))
  with pytest.raises(UserError, match='the embedding of the policy has'):
    chat.for_networks({'policy': network(id_of(chat, token))})


def test_stop_tokens_that_cannot_be_sampled_are_left_out(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path, tokenizers.CHATML, generation_eos=[5, 400])
  chat = load_tokenizer(directory)
  assert 400 in chat.stop_ids
  limited = chat.for_networks({'policy': network(400)})
  assert limited.stop_ids == tuple(i for i in chat.stop_ids if i != 400)


def test_bos_of_plain_text(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path, tokenizers.CHATML)
  file = tmp_path / 'tokenizer_config.json'
  file.write_text(json.dumps(json.loads(file.read_text()) | {'bos_token': '<|new|>'}))
  chat = load_tokenizer(directory)
  bos = chat.tokenizer.bos_token_id
  assert chat.bos_ids == [bos] and bos == len(chat.tokenizer) - 1
  with pytest.raises(UserError, match=r"'<\|new\|>' as id"):
    _ = chat.for_networks({'policy': network(bos)}).bos_ids


def test_sampled_ids_need_rows_in_every_network():
  check_sampled_ids(network(300), {'reward': network(300), 'critic': network(304)})
  with pytest.raises(UserError, match='ids up to 303, but the embedding of the reward has 300'):
    check_sampled_ids(network(304), {'reward': network(300), 'critic': network(304)})
