"""Writes the files of a tokenizer next to weights: those of the source, then what a run fixed.

A run fixes the chat template, and the ids that begin, end and pad a text. They are written where
transformers and a later stage read them; everything else is copied byte for byte.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from segjax.data.tokenizer import ChatTokenizer
from segjax.hf import shards
from segjax.hf.adapter_config import config_directory, tokenizer_directory
from segjax.hf.checkpoint import read_json

GENERATION = 'generation_config.json'
FILES = (
  'LICENSE',
  'LICENSE.md',
  'LICENSE.txt',
  'NOTICE',
  'USE_POLICY.md',
  'added_tokens.json',
  'additional_chat_templates',
  'chat_template.jinja',
  'chat_template.json',
  GENERATION,
  'merges.txt',
  'special_tokens_map.json',
  'tokenizer.json',
  'tokenizer.model',
  'tokenizer_config.json',
  'vocab.json',
)

_TEMPLATE, _TEMPLATE_JSON, _MORE_TEMPLATES = FILES[7], FILES[8], FILES[6]
_NOT_OF_TOKENIZER = (GENERATION, *FILES[:5])
_CONFIG, _SPECIAL_TOKENS = 'tokenizer_config.json', 'special_tokens_map.json'


def copy_tokenizer(source: Path, target: Path) -> None:
  """Copies tokenizer files, templates, generation_config.json and licence, byte for byte.

  Those of an adapter without a tokenizer are its base's, and so is what it lacks of the others.
  """
  own = tokenizer_directory(source)
  for name in FILES:
    file = own / name
    if name in _NOT_OF_TOKENIZER and not file.is_file():
      file = config_directory(source) / name
    if file.is_dir():
      shutil.copytree(file, target / name)
    elif file.is_file():
      shutil.copyfile(file, target / name)


def has_template(directory: Path) -> bool:
  """Returns whether a chat template is in a file of its own or in tokenizer_config.json."""
  names = (_TEMPLATE, _TEMPLATE_JSON, _MORE_TEMPLATES)
  is_in_config = bool(_read(directory / _CONFIG).get('chat_template'))
  return is_in_config or any((directory / name).exists() for name in names)


def write_template(directory: Path, template: str) -> None:
  """Makes `template` the only chat template of the directory's tokenizer; keeps an equal one."""
  file, config = directory / _TEMPLATE, _read(directory / _CONFIG)
  if not (directory / _MORE_TEMPLATES).exists():
    text = file.read_text(encoding='utf-8') if file.exists() else config.get('chat_template')
    if text == template:
      return
  file.write_text(template, encoding='utf-8')
  (directory / _TEMPLATE_JSON).unlink(missing_ok=True)
  shutil.rmtree(directory / _MORE_TEMPLATES, ignore_errors=True)
  if config.pop('chat_template', None) is not None:
    _write(directory / _CONFIG, config)


def special_ids(tokenizer: ChatTokenizer, vocab_size: int, head: str) -> dict[str, Any]:
  """Returns bos_token_id, eos_token_id and pad_token_id of a model, for its config.json.

  Ids for which the network has no embedding are left out: transformers would not load the model.

  Args:
    tokenizer: the tokenizer that the model was trained with.
    vocab_size: number of embeddings.
    head: 'language' or 'scalar'.
  """
  stops = [i for i in tokenizer.stop_ids if i < vocab_size]
  pad = tokenizer.pad_id if head == 'language' else _scalar_pad(tokenizer, vocab_size)
  bos = tokenizer.tokenizer.bos_token_id
  return {
    'bos_token_id': bos if bos is not None and bos < vocab_size else None,
    'eos_token_id': stops[0] if len(stops) == 1 else stops or None,
    'pad_token_id': pad if pad is not None and pad < vocab_size else None,
  }


def write_pad_token(directory: Path, tokenizer: ChatTokenizer, pad_id: int | None) -> None:
  """Makes `pad_id` the tokenizer's pad token, so that a batch is padded with what the model skips.

  The model would read the score at another token than the last of a text otherwise.
  """
  if pad_id is None or pad_id == tokenizer.tokenizer.pad_token_id:
    return
  token = tokenizer.tokenizer.convert_ids_to_tokens(pad_id)
  for name in (_CONFIG, _SPECIAL_TOKENS):
    if (directory / name).is_file():
      _write(directory / name, _read(directory / name) | {'pad_token': token})


def write_generation_config(directory: Path, ids: dict[str, Any]) -> None:
  """Writes the special ids into generation_config.json, whose other fields stay."""
  file = directory / GENERATION
  before = _read(file) if file.exists() else {'_from_model_config': True}
  after = before | ids
  if after != before or not file.exists():
    shards.write_json(file, after)


def _scalar_pad(tokenizer: ChatTokenizer, vocab_size: int) -> int | None:
  """Returns the id that pads texts of a model with a scalar head; None if no token can.

  transformers reads the score at the last token that is not the pad token, so a stop token, at
  which a response is scored, cannot be it. Next come tokens that no text has, then BOS, which is
  never last.
  """
  fast = tokenizer.tokenizer
  others = [(i, str(token)) for i, token in sorted(fast.added_tokens_decoder.items())]
  unused = [i for word in ('pad', 'reserved') for i, token in others if word in token]
  candidates = [fast.pad_token_id, *unused, fast.unk_token_id, fast.bos_token_id]
  return next(
    (i for i in candidates if i is not None and i not in tokenizer.stop_ids and i < vocab_size),
    None,
  )


def _read(file: Path) -> dict[str, Any]:
  return read_json(file) if file.is_file() else {}


def _write(file: Path, value: dict[str, Any]) -> None:
  # In the order of the file, unlike `shards.write_json`: it was another program's.
  file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
