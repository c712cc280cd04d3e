"""Reads the files of a tokenizer in HF form; what is wrong with them is one line."""

import hashlib
import json
import tempfile
from typing import Any

from etils import epath

from segjax import json_files
from segjax.errors import UserError, excerpt, first_line

_TOKENIZER = 'tokenizer.json'
_GENERATION = 'generation_config.json'
# Files that transformers reads beside tokenizer.json.
_OTHERS = (
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'chat_template.json',
)


def load_fast_tokenizer(directory: str) -> Any:
  """Loads the fast `transformers` tokenizer of a local directory or bucket.

  Raises:
    UserError: there is no tokenizer.json, or a file of the tokenizer is invalid.
  """
  path = epath.Path(directory).expanduser()
  read_tokenizer_json(path)
  for name in _OTHERS:
    if (path / name).exists():
      _check_fields(path / name, json_files.read_object(path / name))
  if '://' not in str(directory):
    return _load(str(path), directory)
  with tempfile.TemporaryDirectory() as folder:
    for entry in path.iterdir():
      if entry.suffix in ('.json', '.jinja') and 'index' not in entry.name:
        entry.copy(epath.Path(folder) / entry.name)
    return _load(folder, directory)


def _check_fields(file: epath.Path, content: dict[str, Any]) -> None:
  """Raises UserError if a field has a type that transformers reads and fails on later."""
  for key, types in (('model_max_length', int | float), ('chat_template', str | list)):
    value = content.get(key)
    if value is not None and not isinstance(value, types):
      raise UserError(f'{file}: {key} is {excerpt(value)}; correct it, or fetch the file again.')


def _load(local: str, directory: str) -> Any:
  from transformers import PreTrainedTokenizerFast

  try:
    return PreTrainedTokenizerFast.from_pretrained(local)
  except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
    raise UserError(
      f'{directory}: transformers cannot load the tokenizer ({type(error).__name__}: '
      f'{first_line(error)}); fetch {_TOKENIZER} and {_OTHERS[0]} again.'
    ) from error


def read_tokenizer_json(path: epath.Path) -> dict[str, Any]:
  """Returns the content of tokenizer.json in a directory.

  Raises:
    UserError: there is none, or it is not the file of a fast tokenizer.
  """
  file = path / _TOKENIZER
  if not file.exists():
    raise UserError(
      f'{path} has no {_TOKENIZER}; write one with '
      'AutoTokenizer.from_pretrained(...).save_pretrained(...).'
    )
  content = json_files.read_object(file, fix='fetch it again')
  model = content.get('model')
  if not isinstance(model, dict) or not isinstance(model.get('vocab'), dict | list):
    raise UserError(f'{file} has no vocabulary, so it is not of a fast tokenizer; fetch it again.')
  return content


def tokenizer_fingerprint(directory: str) -> str:
  """Returns a hash that is equal for tokenizers that give every text the same ids.

  The hash is sha256 of the vocabulary, merges, added tokens, normalizer and pre-tokenizer of
  tokenizer.json. Chat template, padding, pad token, truncation and post-processor do not count.

  Raises:
    UserError: `directory` has no valid tokenizer.json.
  """
  path = epath.Path(directory).expanduser()
  content = read_tokenizer_json(path)
  model = content['model']
  try:
    merges = [m if isinstance(m, str) else ' '.join(m) for m in model.get('merges') or []]
    added = sorted(content.get('added_tokens') or [], key=lambda token: token['id'])
  except (KeyError, TypeError) as error:
    raise UserError(
      f'{path / _TOKENIZER}: merges or added_tokens are not those of a fast tokenizer; fetch it '
      'again.'
    ) from error
  parts = [model['vocab'], merges, added, content.get('normalizer'), content.get('pre_tokenizer')]
  canonical = json.dumps(parts, sort_keys=True, separators=(',', ':'), ensure_ascii=True)
  return hashlib.sha256(canonical.encode()).hexdigest()


def generation_stops(path: epath.Path) -> list[int]:
  """Returns the ids in eos_token_id of generation_config.json, which is an int, a list or null.

  Raises:
    UserError: the file is invalid, or they are not ids.
  """
  file = path / _GENERATION
  stops = json_files.read_object(file).get('eos_token_id') if file.exists() else None
  stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
  for stop in stops:
    if not isinstance(stop, int) or isinstance(stop, bool) or stop < 0:
      raise UserError(
        f'{file}: eos_token_id holds {str(stop)[:60]!r}, which is not a token id; correct it.'
      )
  return stops
