"""Tokenizers shared by the tests of the data wing."""

import pytest
from fixtures import tokenizers

from segjax.data.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture(scope='session')
def llama3(tmp_path_factory) -> ChatTokenizer:
  """A tiny tokenizer with the Llama-3 template."""
  return load_tokenizer(tokenizers.write_tokenizer(tmp_path_factory.mktemp('llama3')))


@pytest.fixture(scope='session')
def llama31(tmp_path_factory) -> ChatTokenizer:
  """A tiny tokenizer whose template inserts a system turn, as Llama-3.1's does."""
  return load_tokenizer(
    tokenizers.write_tokenizer(tmp_path_factory.mktemp('llama31'), tokenizers.LLAMA31)
  )


@pytest.fixture(scope='session')
def chatml(tmp_path_factory) -> ChatTokenizer:
  """A tiny tokenizer with the ChatML template, which writes a newline after the stop token."""
  return load_tokenizer(
    tokenizers.write_tokenizer(tmp_path_factory.mktemp('chatml'), tokenizers.CHATML)
  )
