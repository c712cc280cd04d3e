"""Checkpoints that several test files read, written once."""

import pytest
from fixtures import hf_models


@pytest.fixture(scope='session')
def llama3(tmp_path_factory):
  """A Llama-3 checkpoint in one file; tests must not change it."""
  return hf_models.write(tmp_path_factory.mktemp('llama3'))


@pytest.fixture(scope='session')
def sharded_llama31(tmp_path_factory):
  """A Llama-3.1 checkpoint in shards of 20 KB; tests must not change it."""
  return hf_models.write(tmp_path_factory.mktemp('llama31'), 'llama31', max_shard_size='20KB')
