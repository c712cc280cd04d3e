"""The layout of an imported checkpoint, apart from its weights.

A directory with params/ (an Orbax CheckpointManager's, step 0), hf/ (config.json, tokenizer files
and provenance of the source, byte for byte) and segjax.json (the model's role and base model).
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.errors import UserError
from segjax.hf import model_card as cards
from segjax.hf import shards, tokenizer_writer, writer
from segjax.hf.checkpoint import CONFIG, read_json, refuse_adapter, resolve_checkpoint

DESCRIPTION, PARAMS, SOURCE = 'segjax.json', 'params', 'hf'
HEADS = {'policy': 'language', 'reward': 'scalar', 'critic': 'scalar'}  # by role

_VERSION = 1
_MANIFEST = Path('manifest', 'metadata')  # of a training run's step, see `train.checkpoint`


@dataclasses.dataclass(frozen=True)
class ExportSource:
  """The parts of a segjax checkpoint that an export reads.

  Attributes:
    params: directory of the Orbax checkpoint.
    origin: directory with the HF description: config.json, tokenizer files.
    role: policy, reward or critic.
    card: the model card's fields that are inherited.
    is_imported: whether it is an imported checkpoint, not an item of a training run.
  """

  params: Path
  origin: Path
  role: str
  card: cards.Card
  is_imported: bool


def write_description(directory: Path, source: str | Path, origin: Path, role: str) -> None:
  """Writes everything but the weights of an imported checkpoint.

  Args:
    directory: the new checkpoint.
    source: the HF checkpoint as the user named it, a hub id or a path.
    origin: its directory.
    role: policy, reward or critic.
  """
  (directory / SOURCE).mkdir()
  for name in (CONFIG, writer.REWARD_SPEC_FILE) if role == 'reward' else (CONFIG,):
    if (origin / name).exists():
      shutil.copyfile(origin / name, directory / SOURCE / name)
  tokenizer_writer.copy_tokenizer(origin, directory / SOURCE)
  copy_provenance(origin, directory / SOURCE)
  card = {k: v for k, v in vars(cards.from_source(source, origin)).items() if v}
  shards.write_json(directory / DESCRIPTION, {'version': _VERSION, 'role': role} | card)


def read_description(checkpoint: Path, source: str | Path, role: str) -> ExportSource:
  """Locates the parts of an imported checkpoint or of a training run's item.

  Args:
    checkpoint: the imported checkpoint, or an item of a training run's (STEP/policy).
    source: for an item, the HF checkpoint that the run started from.
    role: for an item, its role; otherwise '' or the stored one.

  Raises:
    ValueError: the directory is neither, or source and role are missing or contradict it.
  """
  file = checkpoint / DESCRIPTION
  if not file.is_file():
    if not checkpoint.is_dir():
      raise UserError(f'no directory {checkpoint}.')
    if not source or not role:
      raise UserError(
        f'{checkpoint} has no {DESCRIPTION}, so it is not an imported checkpoint; for a training '
        'run name an item of a step (checkpoints/STEP/policy), and with --source and --role the '
        'HF checkpoint that it was trained from and its role.'
      )
    origin = resolve_checkpoint(source)
    refuse_adapter(origin)
    return ExportSource(checkpoint, origin, role, cards.from_source(source, origin), False)
  record = read_json(file)
  if record.get('version') != _VERSION or record.get('role') not in HEADS:
    raise UserError(
      f'{file}: version {record.get("version")!r} with role {record.get("role")!r} cannot be read '
      f'(version {_VERSION}; {", ".join(HEADS)}); import the HF checkpoint again.'
    )
  if role and role != record['role']:
    raise UserError(f'role={role!r} contradicts {checkpoint}, which is a {record["role"]}.')
  params, origin = checkpoint / PARAMS, checkpoint / SOURCE
  return ExportSource(params, origin, record['role'], _card(record), True)


def load_trained_tokenizer(exported: ExportSource) -> ChatTokenizer | None:
  """Loads the tokenizer that a run's item was trained with; None if it has no chat template.

  The chat template is in the settings of the run, which are stored with each of its steps. None for
  an imported checkpoint: its files are those of its source.
  """
  if exported.is_imported:
    return None
  manifest, data = exported.params.parent / _MANIFEST, {}
  if manifest.is_file():
    data = read_json(manifest).get('run', {}).get('settings', {}).get('data', {})
  template, date = (data.get(name, '') for name in ('chat_template', 'template_date'))
  try:
    return load_tokenizer(str(exported.origin), template, date)
  except UserError:
    if template:
      raise
    return None


def copy_own_files(exported: ExportSource, target: Path) -> None:
  """Copies the files that describe this very model: a reward model's spec, and its provenance.

  The source of a training run's item is another model, whose provenance is not copied.
  """
  spec = exported.origin / writer.REWARD_SPEC_FILE
  if exported.role == 'reward' and spec.is_file():
    shutil.copyfile(spec, target / writer.REWARD_SPEC_FILE)
  if exported.is_imported:
    copy_provenance(exported.origin, target)


def copy_provenance(source: Path, target: Path) -> None:
  """Copies the record and the curves of a model's training; the card itself is written again."""
  for name in (cards.RECORD, cards.CURVES):
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)


def _card(record: dict[str, Any]) -> cards.Card:
  names = {field.name for field in dataclasses.fields(cards.Card)}
  return cards.Card(**{k: v for k, v in record.items() if k in names and isinstance(v, str)})
