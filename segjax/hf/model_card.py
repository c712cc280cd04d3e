"""Writes README.md of an exported model: the hub's metadata block, metrics, a usage snippet.

The format is at https://huggingface.co/docs/hub/model-cards. No weights are read.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segjax.data.sources import is_hub_id
from segjax.hf import card_snippets

FILE, RECORD, CURVES = 'README.md', 'segjax_config.json', 'curves.png'
DOC_FILES = (FILE, RECORD, CURVES)  # documentation; loading a model reads none of them

_PAPER = 'https://arxiv.org/abs/2501.02790'
_INHERITED = ('license', 'license_name', 'license_link')


@dataclasses.dataclass(frozen=True)
class Card:
  """Fields of a model card; '' if unknown.

  Attributes:
    base_model: hub id of the model that this one was trained from.
    stage: job that made it: import, sft, reward, normalizer, ppo.
    recipe: config and preset, or another description of how to reproduce it.
    metrics: finite numbers by name; others are left out.
    dataset: dataset of the metrics.
    license: the hub's identifier, such as llama3; 'other' with a name and a link.
    license_name: name of another licence.
    license_link: link to another licence.
    record: provenance for segjax_config.json; see `run.provenance`. The card shows its `command`,
      `data`, `versions`, `commit`, `seed`, `devices` and `settings`.
    curves: a PNG of the metrics by step.
  """

  base_model: str = ''
  stage: str = ''
  recipe: str = ''
  metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
  dataset: str = ''
  license: str = ''
  license_name: str = ''
  license_link: str = ''
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  curves: bytes = b''


def from_source(source: str | Path, directory: Path) -> Card:
  """Returns the fields that a model trained from `source` inherits: base model and licence.

  Args:
    source: the source as the user named it, a hub id or a path.
    directory: its directory, whose README.md is read if there is one.
  """
  metadata = _metadata(directory)
  base = source if isinstance(source, str) and is_hub_id(source) else metadata.get('base_model')
  base = base[0] if isinstance(base, list) and base else base
  texts = {key: metadata.get(key) for key in _INHERITED} | {'base_model': base}
  return Card(**{key: value for key, value in texts.items() if isinstance(value, str)})


def merge(base: Card, over: Card) -> Card:
  """Returns the fields of `over`, and those of `base` that `over` leaves empty."""
  return dataclasses.replace(base, **{k: v for k, v in vars(over).items() if v})


def write_card(
  directory: Path, card: Card, *, name: str, head: str, with_template: bool, base: str = ''
) -> None:
  """Writes README.md, and segjax_config.json and curves.png if the card has them.

  Existing ones in the directory, as after an import, are shown as if they were the card's.

  Args:
    directory: directory of the model.
    card: fields of the card.
    name: name of the model, in title and snippet.
    head: 'language' or 'scalar'.
    with_template: whether the tokenizer has a chat template.
    base: directory or hub id of an adapter's base; '' for a whole model.
  """
  _write_files(directory, card)
  card = _with_record(card, read_record(directory))
  task = 'text-generation' if head == 'language' else 'text-classification'
  metrics = {k: v for k, v in card.metrics.items() if _is_finite(v)}
  lines = ['---', *_front_matter(card, name, task, metrics, base), '---', '', f'# {name}', '']
  kind = 'language model' if head == 'language' else 'model with a scalar head'
  what = f'A {kind}' + (f' as a LoRA adapter of {_code(base)}' if base else '')
  origin = f', trained from {_code(card.base_model)}' if card.base_model not in ('', base) else ''
  lines += [
    f'{what}{origin}, exported by segjax (segment-level RLHF, [paper]({_PAPER})).',
    '',
    *([f'Stage: {card.stage}', ''] if card.stage else []),
    *([f'Recipe: {_code(card.recipe)}', ''] if card.recipe else []),
    *_fenced(card.record.get('command'), 'bash'),
  ]
  if (directory / CURVES).is_file():
    lines += [f'![metrics of the training, by step]({CURVES})', '']
  if metrics:
    on = f' ({_cell(card.dataset)})' if card.dataset else ''
    lines += ['## Metrics', '', f'| metric{on} | value |', '|---|---|']
    lines += [f'| {_cell(key)} | {value:.6g} |' for key, value in metrics.items()] + ['']
  lines += card_snippets.usage(name, head, with_template, base, card.record)
  lines += _provenance(card.record)
  (directory / FILE).write_text('\n'.join(lines), encoding='utf-8')


def _write_files(directory: Path, card: Card) -> None:
  if card.record:
    text = json.dumps(card.record, indent=2) + '\n'
    (directory / RECORD).write_text(text, encoding='utf-8')
  if card.curves:
    (directory / CURVES).write_bytes(card.curves)


def read_record(directory: Path) -> dict[str, Any]:
  """Returns the content of segjax_config.json, empty if it is missing or not written by segjax."""
  try:
    record = json.loads((directory / RECORD).read_text(encoding='utf-8'))
  except (OSError, ValueError, RecursionError):
    return {}
  return record if isinstance(record, dict) else {}


def _with_record(card: Card, record: dict[str, Any]) -> Card:
  """Returns the card, with empty fields filled in from the record."""
  data = record.get('data')
  fields = {
    'stage': record.get('stage'),
    'recipe': record.get('recipe'),
    'dataset': data.get('path') if isinstance(data, dict) else None,
  }
  texts = {key: value for key, value in fields.items() if isinstance(value, str)}
  metrics = record.get('metrics')
  metrics = (
    {k: float(v) for k, v in metrics.items() if _is_finite(v)} if isinstance(metrics, dict) else {}
  )
  return merge(Card(**texts, metrics=metrics), dataclasses.replace(card, record=record))


def _provenance(record: Mapping[str, Any]) -> list[str]:
  """Returns a table of data, models and versions, and all settings, folded."""
  rows = []
  for key in ('data', 'models', 'seed', 'devices', 'versions', 'commit'):
    value = record.get(key)
    if isinstance(value, dict):
      value = ', '.join(f'{k} {v}' for k, v in value.items() if v not in ('', None))
    if value not in ('', None):
      rows.append(f'| {key} | {_cell(str(value))} |')
  lines = ['## Provenance', '', '| | |', '|---|---|', *rows, ''] if rows else []
  if record.get('settings'):
    settings = _fenced(json.dumps(record['settings'], indent=2), 'json')
    summary = f'<summary>All settings, as in {RECORD}</summary>'
    lines += ['<details>', summary, '', *settings, '</details>', '']
  return lines


def _code(text: str) -> str:
  """Returns text as inline code, without newlines; backticks in it are allowed."""
  text = ' '.join(text.split())
  return f'`` {text} ``' if '`' in text else f'`{text}`'


def _cell(text: str) -> str:
  """Returns text for a table cell, where | would end the cell and < begin a tag."""
  return ' '.join(text.split()).replace('|', '\\|').replace('<', '&lt;')


def _fenced(text: Any, language: str) -> list[str]:
  """Returns a block of code in a fence that does not occur in the text."""
  if not isinstance(text, str) or not text:
    return []
  fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
  return [f'{fence}{language}', text, fence, '']


def _front_matter(
  card: Card, name: str, task: str, metrics: Mapping[str, float], base: str
) -> list[str]:
  """Returns the metadata block; JSON strings, numbers and lists are valid YAML."""
  license_ = card.license or ('other' if card.license_name else 'unknown')
  fields: dict[str, Any] = {
    'library_name': 'peft' if base else 'transformers',
    'pipeline_tag': task,
    'tags': ['segjax', 'rlhf', *(['lora'] if base else []), *([card.stage] if card.stage else [])],
    'license': license_,
    'license_name': card.license_name,
    'license_link': card.license_link,
    'base_model': card.base_model,
    'datasets': _hub_datasets(card.record),
    'stage': card.stage,
    'recipe': card.recipe,
  }
  if metrics:
    fields['metrics'] = list(metrics)
    dataset = card.dataset or 'not named'
    result = {
      'task': {'type': task},
      'dataset': {'type': dataset, 'name': dataset},
      'metrics': [{'type': key, 'value': float(value)} for key, value in metrics.items()],
    }
    fields['model-index'] = [{'name': name, 'results': [result]}]
  return [f'{key}: {json.dumps(value)}' for key, value in fields.items() if value]


def _hub_datasets(record: Mapping[str, Any]) -> list[str]:
  """Returns the hub id of the dataset, if it is from the hub."""
  data = record.get('data')
  return [data['hub']] if isinstance(data, dict) and isinstance(data.get('hub'), str) else []


def _metadata(directory: Path) -> dict[str, Any]:
  """Returns the metadata block of a README.md, empty if it is missing or invalid."""
  file = directory / FILE
  if not file.is_file():
    return {}
  import huggingface_hub
  import yaml

  try:
    metadata = huggingface_hub.metadata_load(file)
  except (OSError, ValueError, yaml.YAMLError):
    return {}
  return metadata if isinstance(metadata, dict) else {}


def _is_finite(value: Any) -> bool:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and math.isfinite(value)
