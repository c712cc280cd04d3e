"""Commits of hub repositories and listings of buckets."""

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants

from segjax.run import remote_inputs


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
  """A hub that does not answer, and an empty cache."""

  def fail(*_, **__):
    raise ConnectionError

  monkeypatch.setattr(huggingface_hub.HfApi, 'repo_info', fail)
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
  return tmp_path


def test_without_the_hub_the_cache_decides(no_hub):
  assert remote_inputs.identify('owner/name', is_rows=False) == ''
  refs = no_hub / 'models--owner--name' / 'refs'
  refs.mkdir(parents=True)
  (refs / 'main').write_text('abc')
  assert remote_inputs.identify('owner/name', is_rows=False) == 'abc'
  (refs / 'main').write_text('def')
  assert remote_inputs.identify('owner/name', is_rows=False) == 'def'
  assert remote_inputs.identify('owner/name', is_rows=True) == ''


def test_prepared_datasets_count_too(no_hub, monkeypatch):
  import datasets

  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', no_hub)
  (no_hub / 'owner___name' / 'default' / '0.0.0' / 'abc').mkdir(parents=True)
  assert remote_inputs.identify('owner/name', is_rows=True) == 'abc'


def test_the_hub_decides_where_it_answers(monkeypatch):
  class Info:
    sha = '123'

  monkeypatch.setattr(huggingface_hub.HfApi, 'repo_info', lambda *_, **__: Info)
  assert remote_inputs.identify('owner/name', is_rows=True) == '123'


def test_changed_files_of_a_bucket():
  files = fsspec.filesystem('memory')
  files.pipe('/bucket/rows/train.jsonl', b'{}')
  before = remote_inputs.identify('memory://bucket/rows', is_rows=True)
  assert before == remote_inputs.identify('memory://bucket/rows', is_rows=True)
  files.pipe('/bucket/rows/train.jsonl', b'{ }')
  assert before and remote_inputs.identify('memory://bucket/rows', is_rows=True) != before
  assert remote_inputs.identify('nosuch://bucket/rows', is_rows=True) == ''
