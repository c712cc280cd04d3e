"""Opens HF checkpoint directories: config.json and the headers of the tensors.

Reads no weights and does not import jax, so that inspecting 140 GB takes no time. Tensor names are
mapped by `tensor_names`, weights read by `reader`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors

from segjax import json_files
from segjax.data.sources import is_hub_id
from segjax.errors import UserError, excerpt
from segjax.hf import hub
from segjax.hf.families import find_family

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
ADAPTER, ADAPTER_WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'  # of peft

# Headers of real checkpoints take 100 bytes a tensor; the largest Llama has 1,138 tensors.
_MAX_HEADER_BYTES, _MAX_TENSORS = 16 << 20, 50_000

ITEM_SIZE = {'F64': 8, 'F32': 4, 'BF16': 2, 'F16': 2}  # the dtypes that weights may have

# Names of a backbone's tensors, with and without the prefix of a language model.
_BACKBONE, _EMBEDDING = 'model.', 'embed_tokens.weight'
_BARE = (_EMBEDDING, 'layers.', 'norm.')

_ORIGINAL = 'original_max_position_embeddings'

_HUB_FILES = (
  *('*.json', '*.safetensors', '*.jinja', '*.model', '*.txt'),
  *('README.md', 'LICENSE*'),  # for the model card of a model trained from it
)


@dataclasses.dataclass(frozen=True)
class TensorHeader:
  """Location of one tensor: its file, dtype (safetensors' name), shape and first byte."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)

  @property
  def num_bytes(self) -> int:
    """Number of bytes of its data."""
    return self.size * ITEM_SIZE[self.dtype]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A checkpoint directory and its tensors by HF name, in the order of the files."""

  directory: Path
  tensors: dict[str, TensorHeader]

  def num_parameters(self) -> int:
    """Returns the number of elements of all tensors."""
    return sum(tensor.size for tensor in self.tensors.values())


def resolve_checkpoint(name: str | Path) -> Path:
  """Returns the directory of a checkpoint, after downloading it if it is a hub id 'owner/name'.

  Only json, safetensors and tokenizer files are downloaded, into huggingface_hub's cache.

  Raises:
    ValueError: for a missing directory, an unknown or gated hub id, a hub that cannot be reached,
      and, before any download, a model of a family that is not read, or without safetensors.
  """
  try:
    path = Path(name).expanduser()
    if path.is_dir():
      return path
  except (OSError, RuntimeError) as error:  # a name that is too long, ~ of no user
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{excerpt(str(name))} cannot be looked up ({reason}).') from error
  if path.exists():
    raise UserError(f'{name} is a file; give the directory that holds {CONFIG} and the weights.')
  text = str(name)
  if '://' in text:
    raise UserError(f'{name} is remote; copy the checkpoint to a local directory first.')
  if isinstance(name, Path) or not is_hub_id(text):
    raise UserError(
      f'no directory {name}; give an existing one, or a hub id of the form owner/name (without a '
      'slash at its ends, and not below a directory that exists here).'
    )
  return hub.download(text, _HUB_FILES, functools.partial(_check_listing, text))


def read_json(path: Path) -> dict[str, Any]:
  """Reads a JSON object of a checkpoint; a UserError names the file if it is missing or invalid."""
  if not path.exists():
    if path.name == CONFIG:
      refuse_adapter(path.parent)
    raise UserError(f'{path} does not exist; is {path.parent} an HF checkpoint?')
  return json_files.read_object(path, fix='fetch it again')


def rope_parameters(raw: dict[str, Any], location: str = CONFIG) -> dict[str, Any]:
  """Returns the RoPE parameters of a raw config.json, in any of its forms, as one dict.

  The dict always has rope_type, rope_theta and partial_rotary_factor.

  The forms are rope_theta with rope_scaling (whose type may be spelled 'type') and
  rope_parameters. As in transformers 5, rope_scaling takes precedence over rope_parameters, a
  theta inside over one outside, an original length outside (Phi-3's) over one inside, and θ
  defaults to 10000. `location` names the file in errors.
  """
  rope = {}
  for key in ('rope_scaling', 'rope_parameters'):
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
      raise UserError(f'{location}: {key} is {value!r}; it must be a JSON object or null.')
    rope = rope or dict(value or {})
  legacy = rope.pop('type', None)
  rope['rope_type'] = rope.get('rope_type') or legacy or 'default'
  for key, default in (('rope_theta', 10_000.0), ('partial_rotary_factor', 1.0)):
    if rope.get(key) is None:
      rope[key] = default if raw.get(key) is None else raw[key]
  if rope['rope_type'] != 'default' and raw.get(_ORIGINAL) is not None:
    rope[_ORIGINAL] = raw[_ORIGINAL]
  return rope


def open_checkpoint(path: str | Path) -> Checkpoint:
  """Returns names, shapes and dtypes of a checkpoint's tensors; reads headers only.

  Raises:
    ValueError: there are no safetensors, a shard is missing, invalid or disagrees with the index,
      the index names anything but files of its directory, or a tensor's dtype is not read here.
  """
  directory = Path(path)
  if not directory.is_dir():
    raise UserError(f'no directory {directory}; `resolve_checkpoint` downloads a hub id.')
  if (directory / WEIGHTS).is_file():
    return Checkpoint(directory, read_header(directory / WEIGHTS))
  if not (directory / INDEX).is_file():
    refuse_adapter(directory)
    raise UserError(no_weights(str(directory), [file.name for file in directory.iterdir()]))
  tensors: dict[str, TensorHeader] = {}
  for shard, names in sorted(_shard_files(directory / INDEX).items()):
    if not (directory / shard).is_file():
      raise UserError(
        f'{directory / shard} is missing; {INDEX} puts {len(names)} tensors there, the first '
        f'{names[0]}. Fetch the shard again.'
      )
    header = read_header(directory / shard)
    missing = [name for name in names if name not in header]
    repeated = [name for name in header if name in tensors]
    if missing or repeated:
      raise UserError(
        f'{directory / shard} does not agree with {INDEX}: tensor {(missing + repeated)[0]} is '
        f'{"not in it" if missing else "in another shard too"}. Fetch both again.'
      )
    tensors |= header
  return Checkpoint(directory, tensors)


def read_header(file: Path) -> dict[str, TensorHeader]:
  """Returns the tensors of one safetensors file by name, in the order of their bytes.

  The safetensors library validates the file. It does not return offsets, but it accepts only files
  whose tensors cover everything after the header without gaps or overlaps, so that the order and
  the sizes of the tensors determine them. Format: https://huggingface.co/docs/safetensors.

  Raises:
    ValueError: for a file that the library refuses, or a tensor whose dtype is not read here.
  """
  tensors = {}
  _check_header_size(file)
  try:
    with safetensors.safe_open(file, framework='numpy') as opened:
      names = opened.offset_keys()
      if len(names) > _MAX_TENSORS:
        raise UserError(
          f'{file} holds {len(names):,} tensors, more than the {_MAX_TENSORS:,} that are read.'
        )
      for name in names:
        tensor = opened.get_slice(name)
        tensors[name] = TensorHeader(file, tensor.get_dtype(), tuple(tensor.get_shape()), 0)
  except safetensors.SafetensorError as error:
    with file.open('rb') as stream:
      hint = ' but a git-lfs pointer' if stream.read(8) == b'version ' else ''
    raise UserError(
      f'{file} ({file.stat().st_size} bytes) is not a valid safetensors file{hint} ({error}); '
      'fetch it again.'
    ) from error
  for name, tensor in tensors.items():
    if tensor.dtype not in ITEM_SIZE:
      raise UserError(
        f'{file}: tensor {name} has dtype {tensor.dtype}, not one of {", ".join(ITEM_SIZE)}; '
        'quantized checkpoints are not read, use the unquantized one.'
      )
  offset = file.stat().st_size - sum(tensor.num_bytes for tensor in tensors.values())
  for name, tensor in tensors.items():
    tensors[name] = dataclasses.replace(tensor, offset=offset)
    offset += tensor.num_bytes
  return tensors


def _check_header_size(file: Path) -> None:
  """Raises UserError for a file that cannot be opened or whose header would fill the memory."""
  try:
    with file.open('rb') as stream:
      size = int.from_bytes(stream.read(8), 'little')
  except OSError as error:
    raise UserError(f'{file} cannot be read ({error.strerror or error}).') from error
  if _MAX_HEADER_BYTES < size < file.stat().st_size:
    raise UserError(
      f'{file} has a header of {size:,} bytes, more than the {_MAX_HEADER_BYTES:,} that are read.'
    )


def without_wrapper(checkpoint: Checkpoint) -> Checkpoint:
  """Returns a checkpoint with the names that a language model's tensors have.

  Names of all tensors may follow a prefix of a wrapper (module., _orig_mod.), and those of a
  backbone that was saved without a head, as LlamaModel, lack `model.`.
  """
  embedding = [name for name in checkpoint.tensors if name.endswith(_EMBEDDING)]
  if len(embedding) != 1:
    return checkpoint
  outer = embedding[0].removesuffix(_EMBEDDING).removesuffix(_BACKBONE)
  tensors = {}
  for full_name, tensor in checkpoint.tensors.items():
    name = full_name.removeprefix(outer)
    tensors[f'{_BACKBONE}{name}' if name.startswith(_BARE) else name] = tensor
  return dataclasses.replace(checkpoint, tensors=tensors)


def _shard_files(index: Path) -> dict[str, list[str]]:
  """Returns the tensors of each file that an index names; only plain file names are allowed."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index} has no "weight_map"; fetch it again.')
  shards: dict[str, list[str]] = {}
  for name, shard in weight_map.items():
    plain = isinstance(shard, str) and shard not in ('', '.', '..')
    if not plain or any(mark in shard for mark in '/\\\0'):
      raise UserError(
        f'{index} puts tensor {name} into {shard!r}, which is not the name of a file in its own '
        'directory and is not followed; fetch the index from a source you trust.'
      )
    shards.setdefault(shard, []).append(name)
  return shards


def _check_listing(name: str, files: list[str], config: dict[str, Any]) -> None:
  """Raises ValueError if the hub's listing of `name` is not a checkpoint that is read here."""
  find_family(name, config, 'llama')
  if not ({WEIGHTS, INDEX} & set(files) or {ADAPTER, ADAPTER_WEIGHTS} <= set(files)):
    raise UserError(no_weights(name, files))


def refuse_adapter(directory: Path) -> None:
  """Raises UserError, with the fix, if a directory holds an adapter and not a whole model."""
  if (directory / ADAPTER).is_file():
    raise UserError(
      f'{directory} holds an adapter ({ADAPTER}), not a whole model; make one of it and its base '
      f'by `segjax convert merge {directory} OUT`.'
    )


def no_weights(location: str, files: Iterable[str]) -> str:
  """Returns the error for a checkpoint without safetensors, with the fix."""
  files = sorted(files)
  pickled = [file for file in files if re.fullmatch(r'(pytorch|adapter)_model.*\.bin.*', file)]
  if pickled:
    package, name = ('peft', 'AutoPeft') if ADAPTER in files else ('transformers', 'Auto')
    return (
      f'{location}/{pickled[0]} is a pickle, which may run any code when loaded, so it is not '
      f'read. If you trust it, convert it once: python -c "from {package} import '
      f"{name}ModelForCausalLM as M; M.from_pretrained('{location}').save_pretrained('OUT')\" "
      f'({name}ModelForSequenceClassification for a reward model).'
    )
  shown = ', '.join(files[:8]) or 'nothing'
  lacks = f'no {ADAPTER_WEIGHTS}' if ADAPTER in files else f'neither {WEIGHTS} nor {INDEX}'
  return f'{location} has {lacks}; it holds {shown}.'
