"""Reads and writes segment_reward.json, which says how to interpret a reward model's scores.

It is stored next to the weights and holds the segmentation, the aggregation of scores, the
normaliser and a hash of the tokenizer.
"""

import dataclasses
import json
from pathlib import Path

from segjax.config.settings import RewardModelSettings, Segmentation, SegmentationOverrides
from segjax.data.tokenizer_files import tokenizer_fingerprint
from segjax.errors import UserError
from segjax.rl.normalizer import PUBLISHED
from segjax.storage import write_text_atomically
from segjax.types import Normalizer

REWARD_SPEC_FILE = 'segment_reward.json'
VERSION = 3
# Names of fields that version 2 wrote, by the present ones.
_VERSION_2 = {
  'boundary': 'cut',
  'segment_length': 'fixed_length',
  'min_segment_length': 'min_length',
  'softmax_temperature': 'temperature',
}


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


def read_spec(directory: Path) -> RewardSpec | None:
  """Reads segment_reward.json; None where there is no such file."""
  path = directory / REWARD_SPEC_FILE
  if not path.exists():
    return None
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
    if record['version'] not in (2, VERSION):
      raise UserError(f'version {record["version"]} is not {VERSION}')
    if record['version'] == 2:
      record |= {new: record[old] for new, old in _VERSION_2.items()}
      record['include_eos'] = {'inside': True, 'outside': False}[record['stop_token']]
    normalizer = record['normalizer']
    kind = normalizer.pop('kind') if normalizer else ''
    names = [field.name for field in dataclasses.fields(Segmentation)]
    return RewardSpec(
      segmentation=Segmentation(**{name: record[name] for name in names}),
      normalizer=Normalizer(**normalizer) if normalizer else None,
      normalizer_kind=kind,
      tokenizer_sha256=record['tokenizer_sha256'],
    )
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(
      f'{path}: {error!r}; fit it again with the normalizer job, or remove the file and set '
      'granularity, threshold and normaliser in config.reward_model.'
    ) from error


def resolve_spec(
  settings: RewardModelSettings, directory: Path, policy_directory: Path
) -> RewardSpec:
  """Returns the stored spec, each field replaced where the config sets it.

  Raises:
    UserError: a field is set by neither file nor config, or the tokenizers of reward model and
      policy differ.
  """
  stored = read_spec(directory)
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
  needs_threshold = segmentation.granularity in (None, 'segment') and segmentation.boundary in (
    None,
    'entropy',
  )
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
  if (sha256 or tokenizer_fingerprint(str(directory))) != tokenizer_fingerprint(str(other)):
    raise UserError(
      f'the tokenizers of {directory} and {other} differ; segments and scores are per token, so '
      'all models of a run must share one tokenizer.'
    )
