"""Reads and writes segment_reward.json, which says how to interpret a reward model's scores.

It is stored next to the weights and holds the segmentation, the aggregation of scores, the
normaliser and a hash of the tokenizer.
"""

import dataclasses
import difflib
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import numpy as np

from segjax import json_files
from segjax.config.choices import CHOICES, MINIMUMS
from segjax.config.conflicts import check_normalizer, check_segmentation
from segjax.config.field_checks import check_choice, check_minimum, typed
from segjax.config.settings import RewardModelSettings, Segmentation, SegmentationOverrides
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.errors import UserError, excerpt
from segjax.hf.adapter_config import tokenizer_directory
from segjax.rl.cuts import CUTS
from segjax.rl.normalizer import KINDS, PUBLISHED
from segjax.storage import write_text_atomically
from segjax.types import Normalizer

REWARD_SPEC_FILE = 'segment_reward.json'
VERSION = 4
# Present names of fields, by those that version 2 wrote.
_VERSION_2 = {
  'cut': 'boundary',
  'fixed_length': 'segment_length',
  'min_length': 'min_segment_length',
  'temperature': 'softmax_temperature',
}
# Fields that version 3 did not have; nothing read them.
_SINCE_4 = ('boundary_fn', 'probability_threshold', 'jump_threshold', 'shuffle_seed')
_FIX = (
  'correct it, fit it again with the normalizer job, or remove the file and set granularity, '
  'threshold and normaliser in config.reward_model'
)
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class RewardSpec:
  """How to interpret the scores of a reward model; `normalizer` is None until it is fitted."""

  segmentation: Segmentation
  normalizer: Normalizer | None
  normalizer_kind: str = ''
  tokenizer_sha256: str = ''


def write_spec(directory: Path, spec: RewardSpec) -> None:
  """Writes segment_reward.json into the reward model's directory."""
  normalizer = None
  if spec.normalizer is not None:
    values = {k: float(v) for k, v in vars(spec.normalizer).items()}
    normalizer = {'kind': spec.normalizer_kind} | values
  record = {
    'version': VERSION,
    **dataclasses.asdict(spec.segmentation),
    'normalizer': normalizer,
    'tokenizer_sha256': spec.tokenizer_sha256,
  }
  # Atomic: the file may replace one that a run is reading.
  write_text_atomically(directory / REWARD_SPEC_FILE, json.dumps(record, indent=2) + '\n')


def read_spec(directory: Path, *, with_normalizer: bool = True) -> RewardSpec | None:
  """Reads segment_reward.json; None where there is no such file.

  Args:
    directory: the reward model's directory.
    with_normalizer: False leaves the normaliser out, unchecked.

  Raises:
    UserError: the file is damaged, or a field has a wrong name, type or value; names both.
  """
  path = directory / REWARD_SPEC_FILE
  if not path.exists():
    return None
  record = _upgrade(json_files.read_object(path, fix=_FIX), path)
  names = {field.name for field in dataclasses.fields(Segmentation)}
  _check_names(record, {*names, 'version', 'normalizer', 'tokenizer_sha256'}, f'{path}:')
  sha256 = typed(f'{path}: tokenizer_sha256', record['tokenizer_sha256'], str)
  if not re.fullmatch('([0-9a-f]{64})?', sha256):
    raise UserError(f'{path}: tokenizer_sha256={sha256[:70]!r} is not a SHA-256; {_FIX}.')
  segmentation = _parse_segmentation({name: record[name] for name in names}, path)
  normalizer, kind = None, ''
  if with_normalizer and record['normalizer'] is not None:
    normalizer, kind = _parse_normalizer(record['normalizer'], path)
    check_normalizer(kind, segmentation.granularity, f'{path}: normalizer.kind')
  return RewardSpec(segmentation, normalizer, kind, sha256)


def _upgrade(record: dict[str, Any], path: Path) -> dict[str, Any]:
  """Returns the record of an earlier version with the present names."""
  version = record.get('version')
  if isinstance(version, bool) or version not in (2, 3, VERSION):
    raise UserError(f'{path}: version={version!r} is not {VERSION}; {_FIX}.')
  if version == 2:
    record = {_VERSION_2.get(name, name): value for name, value in record.items()}
    stop_token = record.pop('stop_token', None)
    check_choice(f'{path}: stop_token', str(stop_token), ('inside', 'outside'))
    record |= {'include_eos': stop_token == 'inside'}
  if version < VERSION:
    record |= {name: getattr(Segmentation(), name) for name in _SINCE_4}
  return record


def _check_names(record: dict[str, Any], names: set[str], prefix: str) -> None:
  """Raises UserError if a field is missing or unknown."""
  unknown = sorted(set(record) - names)
  missing = sorted(names - set(record))
  if unknown:
    near = difflib.get_close_matches(unknown[0], missing or names, n=1)
    hint = f'; did you mean {near[0]!r}?' if near else f'; use {", ".join(sorted(names))}.'
    raise UserError(f'{prefix} the field {unknown[0][:60]!r} does not exist{hint}')
  if missing:
    raise UserError(f'{prefix} the field {missing[0]!r} is missing; {_FIX}.')


def _parse_segmentation(record: dict[str, Any], path: Path) -> Segmentation:
  values = {}
  for name, kind in typing.get_type_hints(Segmentation).items():
    label, key = f'{path}: {name}', f'reward.segmentation.{name}'
    values[name] = typed(label, record[name], kind)
    if key in CHOICES:
      check_choice(label, values[name], CHOICES[key])
    if key in MINIMUMS:
      check_minimum(label, values[name], MINIMUMS[key])
  for name in ('entropy_threshold', 'jump_threshold'):
    _check_float32(f'{path}: {name}', values[name])
  for name in ('softmax_temperature', 'probability_threshold'):
    _check_positive(f'{path}: {name}', values[name])
  segmentation = Segmentation(**values)
  check_segmentation(segmentation, str(path))
  return segmentation


def _parse_normalizer(record: Any, path: Path) -> tuple[Normalizer, str]:
  """Returns (normaliser, its kind)."""
  if not isinstance(record, dict):
    raise UserError(f'{path}: normalizer={excerpt(record)} is neither null nor an object; {_FIX}.')
  names = [field.name for field in dataclasses.fields(Normalizer)]
  _check_names(record, {'kind', *names}, f'{path}: in normalizer,')
  kind = typed(f'{path}: normalizer.kind', record['kind'], str)
  check_choice(f'{path}: normalizer.kind', kind, KINDS)
  values = {}
  for name in names:
    values[name] = typed(f'{path}: normalizer.{name}', record[name], float)
    _check_float32(f'{path}: normalizer.{name}', values[name])
  # Std(p) = w_std ln p + b_std is b_std at the end of every response, where p = 1.
  _check_positive(f'{path}: normalizer.b_std', values['b_std'])
  return Normalizer(**values), kind


def _check_float32(key: str, value: float) -> None:
  if abs(value) > _LARGEST:
    raise UserError(f'{key}={value!r} is too large for float32; {_FIX}.')


def _check_positive(key: str, value: float) -> None:
  if value < _SMALLEST:
    raise UserError(f'{key}={value!r} must be above 0; {_FIX}.')


def describe_extreme_boundaries(segmentation: Segmentation, vocab_size: int) -> str:
  """Returns why no text, or all text, is cut into segments; '' if neither."""
  if segmentation.granularity != 'segment':
    return ''
  if segmentation.boundary == 'delimiter' and not segmentation.delimiters:
    return 'delimiters is empty, so every response is one segment'
  threshold, largest = segmentation.entropy_threshold, math.log(vocab_size)
  if CUTS[segmentation.boundary].signal != 'entropy':
    return ''
  if threshold <= 0:
    return f'entropy_threshold={threshold:g} nats cuts at every token'
  if threshold >= largest:
    return (
      f'entropy_threshold={threshold:g} nats cuts nowhere: the entropy over {vocab_size} tokens is '
      f'at most {largest:.2f}'
    )
  return ''


def resolve_spec(
  settings: RewardModelSettings, directory: Path, policy_directory: Path | None
) -> RewardSpec:
  """Returns the stored spec, each field replaced where the config sets it.

  Args:
    settings: config.reward_model.
    directory: of the reward model.
    policy_directory: of the policy or reference whose tokens it reads; None if it reads text.

  Raises:
    UserError: a field is set by neither file nor config, or the tokenizers of reward model and
      policy differ.
  """
  stored = read_spec(directory, with_normalizer=not settings.normalizer)
  if policy_directory is not None:
    check_tokenizer(directory, policy_directory, stored.tokenizer_sha256 if stored else '')
  segmentation = override(stored.segmentation if stored else None, settings.segmentation)
  kind, normalizer = '', None
  if settings.normalizer == 'none':
    kind, normalizer = 'none', Normalizer()
  elif settings.normalizer:
    kind = settings.normalizer
    normalizer = PUBLISHED[settings.normalizer.partition(':')[2]]
  elif stored:
    kind, normalizer = stored.normalizer_kind, stored.normalizer
  missing = [] if stored else missing_fields(settings.segmentation)
  if normalizer is None:
    missing.append("config.reward_model.normalizer ('published:NAME', or 'none' to do without)")
  if missing:
    raise UserError(
      f'{directory} has no complete {REWARD_SPEC_FILE}; run the normalizer job on it, or set '
      f'{", ".join(missing)}.'
    )
  return RewardSpec(segmentation, normalizer, kind)


def override(stored: Segmentation | None, overrides: SegmentationOverrides) -> Segmentation:
  """Returns the stored (or default) segmentation with the overrides that are not None."""
  values = {key: value for key, value in vars(overrides).items() if value is not None}
  return dataclasses.replace(stored or Segmentation(), **values)


def missing_fields(segmentation: SegmentationOverrides) -> list[str]:
  """Returns the keys that must be set where no segmentation is stored."""
  missing, key = [], 'config.reward_model.segmentation'
  if segmentation.granularity is None:
    missing.append(f'{key}.granularity (segment, token or bandit)')
  cut = CUTS[segmentation.boundary or Segmentation().boundary]
  needs_threshold = segmentation.granularity in (None, 'segment') and cut.signal == 'entropy'
  if needs_threshold and segmentation.entropy_threshold is None:
    missing.append(f'{key}.entropy_threshold (nats)')
  return missing


def check_tokenizer(directory: Path, other: Path, sha256: str = '') -> None:
  """Raises UserError unless two models share a tokenizer: segments and scores are per token.

  Args:
    directory: directory of the first model.
    other: directory of the second model.
    sha256: hash of the first model's tokenizer, if known; '' reads its files.
  """
  if not shares_tokenizer(directory, other, sha256):
    raise UserError(
      f'the tokenizers of {directory} and {other} differ; segments and scores are per token here, '
      'so use models of one tokenizer. Only reward models may have another, by reads=text or auto.'
    )


def shares_tokenizer(directory: Path, other: Path, sha256: str = '') -> bool:
  """Returns whether two models have one tokenizer; arguments as in `check_tokenizer`."""
  own, theirs = (tokenizer_directory(path) for path in (directory, other))
  return (sha256 or tokenizer_fingerprint(str(own))) == tokenizer_fingerprint(str(theirs))
