"""Reads the description of a low-rank adapter in peft's form: adapter_config.json.

An adapter directory holds that file and adapter_model.safetensors, and names its base, a checkpoint
of its own. What changes the computation in a way that `model.lora` does not follow is refused.
jax is not imported.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

from segjax.config.settings import Lora
from segjax.config.training_settings import ALL_LINEAR, FUSED_TARGETS, LORA_TARGETS
from segjax.errors import UserError, excerpt
from segjax.hf import checkpoint
from segjax.hf.checkpoint import read_json, resolve_checkpoint

CONFIG, WEIGHTS = checkpoint.ADAPTER, checkpoint.ADAPTER_WEIGHTS

SCORE, LM_HEAD = 'score', 'lm_head'  # transformers' names of the heads
# peft adds both names to the adapters of classifiers; a Llama has no module of the second.
_CLASSIFIER = 'classifier'
_TOKENIZER = 'tokenizer.json'
_BASE = 'base_model_name_or_path'
_MAX_RANK = 1 << 16

# Fields of peft's LoraConfig that change what is computed, and what they ask for.
_REFUSED = {
  'rank_pattern': 'ranks that differ between matrices',
  'alpha_pattern': 'scales that differ between matrices',
  'use_dora': 'magnitudes beside the matrices (DoRA)',
  'lora_bias': 'biases of B',
  'fan_in_fan_out': 'transposed weights',
  'layers_to_transform': 'adapters of a part of the layers',
  'layers_pattern': 'adapters of a part of the layers',
  'exclude_modules': 'adapters of a part of the layers',
  'layer_replication': 'repeated layers',
  'trainable_token_indices': 'trained embeddings',
  'target_parameters': 'adapters of single parameters',
  'alora_invocation_tokens': 'adapters of a part of the tokens (aLoRA)',
  'use_qalora': 'pooled inputs (QALoRA)',
  'use_bdlora': 'block-diagonal matrices (BD-LoRA)',
  'arrow_config': 'routing between adapters (Arrow)',
  'kasa_config': 'singular values (KaSA)',
  'monteclora_config': 'sampled adapters (MonteCLoRA)',
  'velora_config': 'compressed gradients (VeLoRA)',
}
# Fields that are read, or that change nothing once an adapter is trained.
_KNOWN = {
  *('peft_type', 'r', 'lora_alpha', 'lora_dropout', 'target_modules', 'use_rslora', 'bias'),
  *('modules_to_save', _BASE, 'revision', 'init_lora_weights', 'task_type', 'inference_mode'),
  *('peft_version', 'auto_mapping', 'megatron_config', 'megatron_core', 'loftq_config'),
  *('eva_config', 'corda_config', 'lora_ga_config', 'qalora_group_size', 'runtime_config'),
  'ensure_weight_tying',
}
# Other ways to draw A and B subtract their product from the base.
_KEEP_BASE = (None, True, False, 'gaussian', 'eva', 'orthogonal')
MERGE = 'merge it into its base by peft (merge_and_unload), and use that checkpoint'


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Description of an adapter directory.

  Attributes:
    directory: the directory.
    base: directory or hub id of the base, as adapter_config.json has it.
    lora: rank, scale and matrices, and whether a head to the vocabulary is trained.
    has_score: whether it holds a scalar head.
    blocks: whether A and B of a matrix that is fused in the base's files consist of those of its
      parts, A of one above the other, B of blocks on the diagonal; else the parts share A.
  """

  directory: Path
  base: str
  lora: Lora
  has_score: bool
  blocks: bool = False


def is_adapter(directory: Path) -> bool:
  """Returns whether a directory holds an adapter, by its adapter_config.json."""
  return (directory / CONFIG).is_file()


def read_adapter(directory: Path) -> Adapter:
  """Reads adapter_config.json.

  Raises:
    UserError: it is not the description of a LoRA adapter that is computed here.
  """
  file = directory / CONFIG
  raw = read_json(file)
  if raw.get('peft_type') != 'LORA':
    raise UserError(f'{file}: peft_type={excerpt(raw.get("peft_type"))} is not LORA; {MERGE}.')
  lora = _read_lora(file, raw)
  patterns = block_patterns(lora)
  blocks = bool(raw.get('rank_pattern')) and raw.items() >= patterns.items()
  for key, value in raw.items():
    if blocks and key in patterns:
      continue
    # Fields of later versions: numbers and names take effect by a switch.
    unknown = key not in _KNOWN and (value is True or (isinstance(value, dict | list) and value))
    if unknown or (key in _REFUSED and value):
      what = _REFUSED.get(key, 'something that is not known here')
      raise UserError(f'{file}: {key}={excerpt(value)} asks for {what}, not read; {MERGE}.')
  if raw.get('bias', 'none') != 'none':
    raise UserError(f"{file}: bias={excerpt(raw['bias'])} is not 'none', not read; {MERGE}.")
  drawn = raw.get('init_lora_weights')
  if drawn not in _KEEP_BASE:
    raise UserError(
      f'{file}: init_lora_weights={excerpt(drawn)} changes the weights of the base; save the '
      'adapter by peft with path_initial_model_for_weight_conversion, which makes it plain LoRA.'
    )
  base = raw.get(_BASE)
  if not isinstance(base, str) or not base:
    raise UserError(f'{file}: {_BASE}={excerpt(base)}; set it to the base, a path or a hub id.')
  if raw.get('revision') not in (None, '', 'main') and _local_base(base, directory) is None:
    raise UserError(
      f'{file}: revision={excerpt(raw["revision"])} of {base} is not downloaded; set {_BASE} to a '
      'directory that holds it.'
    )
  has_score, train_head = _read_heads(file, raw, directory, base)
  lora = dataclasses.replace(lora, train_head=train_head)
  return Adapter(directory, base, lora, has_score, blocks)


def block_patterns(lora: Lora) -> dict[str, dict[str, Any]]:
  """Returns peft's rank_pattern and alpha_pattern of an adapter of blocks, see `Adapter`.

  A fused matrix of n parts has rank n r, and an alpha with which the scale is that of the others.
  """
  counts = {name: len(parts) for name, parts in FUSED_TARGETS.items() if parts[0] in lora.targets}
  factor = math.sqrt if lora.rs else float
  return {
    'rank_pattern': {name: n * lora.rank for name, n in counts.items()},
    'alpha_pattern': {name: factor(n) * lora.alpha for name, n in counts.items()},
  }


def fused_targets(targets: tuple[str, ...]) -> list[str]:
  """Returns the names of the matrices in a base whose files have fused ones."""
  fused = {part: name for name, parts in FUSED_TARGETS.items() for part in parts}
  return list(dict.fromkeys(fused.get(name, name) for name in targets))


def base_directory(adapter: Adapter) -> Path:
  """Returns the directory of an adapter's base, after downloading it if it is a hub id.

  A path is absolute, or relative to the working directory or to the adapter's directory.

  Raises:
    UserError: there is no such base, or it is an adapter too.
  """
  return _find_base(adapter.base, adapter.directory)


def config_directory(directory: Path) -> Path:
  """Returns where config.json of a checkpoint is: of an adapter, at its base."""
  return base_directory(read_adapter(directory)) if is_adapter(directory) else directory


def is_local(directory: Path) -> bool:
  """Returns whether a checkpoint, or an adapter with its base, can be read without a download."""
  if not directory.is_dir() or not is_adapter(directory):
    return directory.is_dir()
  return _local_base(read_adapter(directory).base, directory) is not None


def tokenizer_directory(directory: Path) -> Path:
  """Returns where the tokenizer of a checkpoint is: of an adapter without one, at its base."""
  return directory if (directory / _TOKENIZER).is_file() else config_directory(directory)


def _find_base(base: str, directory: Path) -> Path:
  found = _local_base(base, directory)
  try:
    found = resolve_checkpoint(base) if found is None else found
  except UserError as error:
    raise UserError(
      f'{directory / CONFIG}: {_BASE}: {error} Set {_BASE} to the directory or hub id of the base.'
    ) from error
  if is_adapter(found):
    raise UserError(
      f'{directory / CONFIG}: {_BASE}={base} is an adapter itself; make a checkpoint of that one '
      f'by `segjax convert merge {found} OUT`, and set {_BASE} to OUT.'
    )
  return found


def _local_base(base: str, directory: Path) -> Path | None:
  for path in (Path(base), directory / base):
    try:
      path = path.expanduser()
      if path.is_dir():
        return path
    except (OSError, RuntimeError):  # a name that is too long, ~ of no user
      return None
  return None


def _read_lora(file: Path, raw: dict[str, Any]) -> Lora:
  rank, alpha, rs = raw.get('r'), raw.get('lora_alpha'), raw.get('use_rslora', False)
  if not _is_number(rank) or rank != int(rank) or not 0 < rank <= _MAX_RANK:
    raise UserError(f'{file}: r={excerpt(rank)} is not a rank from 1 to {_MAX_RANK}; correct it.')
  if not _is_number(alpha) or alpha <= 0:
    raise UserError(f'{file}: lora_alpha={excerpt(alpha)} is not a positive number; correct it.')
  if not isinstance(rs, bool):
    raise UserError(f'{file}: use_rslora={excerpt(rs)} is neither true nor false; correct it.')
  return Lora(int(rank), float(alpha), _read_targets(file, raw.get('target_modules')), rs)


def _read_targets(file: Path, value: Any) -> tuple[str, ...]:
  """Returns the matrices in the order of `LORA_TARGETS`.

  A name may be that of a matrix of one layer; whether all layers have it is seen in the weights.
  """
  if value == ALL_LINEAR:
    return LORA_TARGETS
  if isinstance(value, str):
    raise UserError(
      f'{file}: target_modules={excerpt(value)} is a regular expression, not read; set it to the '
      f'list of the names it stands for, out of {", ".join(LORA_TARGETS)}.'
    )
  if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
    raise UserError(
      f'{file}: target_modules={excerpt(value)} is not a list of names; set it to some of '
      f'{", ".join(LORA_TARGETS)}.'
    )
  names = {name: name.rpartition('.')[2] for name in value}
  known = (*LORA_TARGETS, *FUSED_TARGETS)
  for name, matrix in names.items():
    if matrix not in known:
      raise UserError(
        f'{file}: target_modules has {excerpt(name)}, but adapters are read of '
        f'{", ".join(known)} alone; {MERGE}.'
      )
  parts = [part for name in names.values() for part in FUSED_TARGETS.get(name, (name,))]
  return tuple(name for name in LORA_TARGETS if name in parts)


def _read_heads(file: Path, raw: dict[str, Any], directory: Path, base: str) -> tuple[bool, bool]:
  """Returns whether an adapter holds a scalar head, and whether a head to the vocabulary."""
  names = raw.get('modules_to_save') or []
  if not isinstance(names, list):
    raise UserError(f'{file}: modules_to_save={excerpt(names)} is not a list of names; correct it.')
  if names == [LM_HEAD]:
    if read_json(_find_base(base, directory) / checkpoint.CONFIG).get('tie_word_embeddings'):
      raise UserError(
        f'{file}: modules_to_save={excerpt(names)}, but the embedding of {base} is its head '
        f'(tie_word_embeddings), and only another head is read; {MERGE}, untied.'
      )
    return False, True
  others = [name for name in names if name not in (SCORE, _CLASSIFIER)]
  if others:
    head = read_json(_find_base(base, directory) / checkpoint.CONFIG).get('value_head_prefix')
    if others != [head]:
      raise UserError(
        f'{file}: modules_to_save={excerpt(names)}: of whole modules {SCORE} or {LM_HEAD} alone '
        f'is read; {MERGE}.'
      )
  return bool(others) or SCORE in names, False


def _is_number(value: Any) -> bool:
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return is_number and math.isfinite(value)
