"""Hashes of the code that results depend on."""

import sys

import pytest

from segjax.run import source_code

FILES = {
  'rules.py': 'import helper\nfrom bag import words\ndef f(prompt, response):\n  import late\n',
  'helper.py': 'import math\n',
  'late.py': '',
  'unused.py': '',
  'bag/__init__.py': '',
  'bag/words.py': 'from . import deep\n',
  'bag/deep.py': '',
  'folder/rules.py': 'import other\n',
  'folder/other.py': '',
}


@pytest.fixture
def module(tmp_path, monkeypatch):
  """A directory on sys.path with `FILES`."""
  for name, text in FILES.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  yield tmp_path
  for name in ('rules', 'helper', 'late', 'bag', 'folder'):
    sys.modules.pop(name, None)


@pytest.mark.parametrize(
  'function, file, counts',
  [
    ('rules:f', 'rules.py', True),
    ('rules:f', 'helper.py', True),
    ('rules:f', 'late.py', True),
    ('rules:f', 'bag/__init__.py', True),
    ('rules:f', 'bag/deep.py', True),
    ('rules:f', 'unused.py', False),
    ('bag.words:f', 'bag/deep.py', True),
    ('bag.words:f', 'helper.py', False),
    ('folder.rules:f', 'folder/rules.py', True),
    ('folder.rules:f', 'folder/other.py', True),
  ],
)
def test_an_edit_changes_the_hash_of_what_imports_it(module, function, file, counts):
  before = source_code.hash_function(function)
  (module / file).write_text(FILES[file] + '\nedited = True\n')
  assert (source_code.hash_function(function) != before) == counts


@pytest.mark.parametrize('function', ['operator:add', 'numpy:sum', 'json:loads', 'rules:f'])
def test_hashes_are_stable(module, function):
  assert len(source_code.hash_function(function)) == 64
  assert source_code.hash_function(function) == source_code.hash_function(function)


def test_segjax_is_covered_by_its_own_version():
  assert source_code.hash_function('segjax.data.demo_language:gold') == ''
  assert {'segjax', 'segjax source', 'jax', 'transformers'} <= set(source_code.versions())
