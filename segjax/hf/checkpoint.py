"""What an HF checkpoint directory says about itself: config.json and tensor headers.

No weights are read and jax is not imported, so that looking at 140 GB takes no time. Names are
`layout`'s business, weights `reader`'s.
"""

import dataclasses
import functools
import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from segjax.errors import UserError
from segjax.hf import hub

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

ITEM_SIZE = {'F64': 8, 'F32': 4, 'BF16': 2, 'F16': 2}  # the dtypes that weights may have

_HUB_FILES = (
  *('*.json', '*.safetensors', '*.jinja', '*.model', '*.txt'),
  *('README.md', 'LICENSE*'),  # for the card of what is made from it
)
_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors format


@dataclasses.dataclass(frozen=True)
class TensorHeader:
  """Where one tensor lies: its file, dtype (safetensors' word), shape and first byte."""

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
    """Bytes of its data."""
    return self.size * ITEM_SIZE[self.dtype]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A directory and its tensors by HF name, in the order of the files."""

  directory: Path
  tensors: dict[str, TensorHeader]

  def num_parameters(self) -> int:
    """Number of elements of all tensors."""
    return sum(tensor.size for tensor in self.tensors.values())


def resolve_checkpoint(name: str | Path) -> Path:
  """The local directory of a checkpoint: itself, or a download of the hub id 'owner/name'.

  Only json, safetensors and tokenizer files are downloaded, into huggingface_hub's cache.

  Raises:
    ValueError: for a missing directory, an unknown or gated hub id, a hub that cannot be reached,
      and, before any download, a model that is no Llama or has no safetensors.
  """
  path = Path(name).expanduser()
  if path.is_dir():
    return path
  if path.exists():
    raise UserError(f'{name} is a file; give the directory that holds {CONFIG} and the weights.')
  text = str(name)
  if '://' in text:
    raise UserError(f'{name} is remote; copy the checkpoint to a local directory first.')
  if isinstance(name, Path) or text.startswith(('.', '~')) or text.strip('/').count('/') != 1:
    raise UserError(f'no directory {name}; give an existing one, or a hub id like owner/name.')
  if text != text.strip('/'):
    raise UserError(f'no directory {name}; a hub id neither starts nor ends with a slash.')
  return hub.download(text, _HUB_FILES, functools.partial(_check_listing, text))


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object; ValueError names the file where it is missing or broken."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'), object_pairs_hook=_without_repeats)
  except FileNotFoundError as error:
    raise UserError(f'{path} does not exist; is {path.parent} an HF checkpoint?') from error
  except ValueError as error:
    raise UserError(f'{path} is not valid JSON ({error}); fetch it again.') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} holds a JSON {type(value).__name__}, not an object; fetch it again.')
  return value


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
  """RoPE of a raw config.json, in any of its forms, as one dict.

  It always has rope_type, rope_theta and partial_rotary_factor.

  The forms: rope_theta with rope_scaling (whose type may be spelled 'type'), and rope_parameters.
  As in transformers 5, rope_scaling wins over rope_parameters, a theta inside over one outside,
  and θ is 10000 where nobody gives it.
  """
  rope = dict(raw.get('rope_scaling') or raw.get('rope_parameters') or {})
  legacy = rope.pop('type', None)
  rope['rope_type'] = rope.get('rope_type') or legacy or 'default'
  for key, default in (('rope_theta', 10_000.0), ('partial_rotary_factor', 1.0)):
    if rope.get(key) is None:
      rope[key] = default if raw.get(key) is None else raw[key]
  return rope


def open_checkpoint(path: str | Path) -> Checkpoint:
  """Names, shapes and dtypes of a checkpoint's tensors; reads headers only.

  Raises:
    ValueError: where there are no safetensors, a shard is missing, truncated or disagrees with
      the index, the index names anything but files of its directory, or a tensor's dtype is not a
      floating-point one.
  """
  directory = Path(path)
  if not directory.is_dir():
    raise UserError(f'no directory {directory}; `resolve` finds one for a hub id.')
  if (directory / WEIGHTS).is_file():
    return Checkpoint(directory, read_header(directory / WEIGHTS))
  if not (directory / INDEX).is_file():
    raise UserError(_no_weights(str(directory), [file.name for file in directory.iterdir()]))
  tensors: dict[str, TensorHeader] = {}
  for shard, names in sorted(_shard_files(directory / INDEX).items()):
    if not (directory / shard).is_file():
      raise UserError(
        f'{directory / shard} is missing; {INDEX} puts {len(names)} tensors there, the first '
        f'{names[0]}. Fetch the shard again.'
      )
    header = read_header(directory / shard)
    lost = [name for name in names if name not in header]
    twice = [name for name in header if name in tensors]
    if lost or twice:
      raise UserError(
        f'{directory / shard} does not agree with {INDEX}: tensor {(lost + twice)[0]} is '
        f'{"not in it" if lost else "in another shard too"}. Fetch both again.'
      )
    tensors |= header
  return Checkpoint(directory, tensors)


def read_header(file: Path) -> dict[str, TensorHeader]:
  """The tensors of one safetensors file by name, from its header.

  The format: 8 bytes little-endian length, that much JSON, then the data; see
  https://huggingface.co/docs/safetensors.

  Raises:
    ValueError: where it is no safetensors file, is truncated, says what cannot be of its tensors,
      or holds a dtype we do not read.
  """
  total = file.stat().st_size
  with file.open('rb') as stream:
    start = stream.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
    if length > min(_HEADER_LIMIT, total - 8):
      hint = ' but a git-lfs pointer' if start == b'version ' else ''
      raise UserError(f'{file} ({total} bytes) is no safetensors file{hint}; fetch it again.')
    try:
      header = json.loads(stream.read(length), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
      raise UserError(f'{file} has a broken header ({error}); fetch it again.') from error
  if not isinstance(header, dict):
    raise UserError(f'{file} has a broken header (no JSON object); fetch it again.')
  header.pop('__metadata__', None)
  start = 8 + length
  found = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
  tensors, end = {}, start
  for name, tensor in sorted(found.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
    if tensor.offset != end:
      kind = 'a gap' if tensor.offset > end else 'an overlap'
      raise UserError(
        f'{file}: the header lies about tensor {name}: {kind} of {abs(tensor.offset - end)} bytes '
        'before its data. Fetch the file again.'
      )
    end += tensor.num_bytes
    if end > total:
      raise UserError(
        f'{file} ({total} bytes) is truncated or damaged at tensor {name}, which ends at byte '
        f'{end}; fetch it again.'
      )
    tensors[name] = tensor
  if end != total:
    raise UserError(
      f'{file} holds {total - end} bytes after its last tensor, {next(reversed(tensors), "none")}, '
      'which its header does not name; fetch it again.'
    )
  return tensors


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorHeader:
  """One entry of a header, `start` being the first byte of the data."""
  try:
    dtype, shape, (begin, end) = entry['dtype'], tuple(entry['shape']), entry['data_offsets']
    whole = isinstance(dtype, str) and all(
      isinstance(number, int) and number >= 0 for number in (*shape, begin, end)
    )
  except (KeyError, TypeError, ValueError):
    whole = False
  if not whole:
    raise UserError(
      f'{file}: the header lies about tensor {name}: {str(entry)[:80]!r} is no dtype, shape and '
      'data_offsets. Fetch the file again.'
    )
  if dtype not in ITEM_SIZE:
    raise UserError(
      f'{file}: tensor {name} has dtype {dtype}, not one of {", ".join(ITEM_SIZE)}; quantized '
      'checkpoints are not read, use the unquantized one.'
    )
  tensor = TensorHeader(file, dtype, shape, start + begin)
  if end - begin != tensor.num_bytes:
    raise UserError(
      f'{file}: the header lies about tensor {name}: {end - begin} bytes for {dtype} '
      f'{list(shape)}, which takes {tensor.num_bytes}. Fetch the file again.'
    )
  return tensor


def _shard_files(index: Path) -> dict[str, list[str]]:
  """The files that an index names, each with its tensors; only plain names are allowed."""
  weight_map = read_json(index).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f'{index} has no "weight_map"; fetch it again.')
  shards: dict[str, list[str]] = {}
  for name, shard in weight_map.items():
    plain = isinstance(shard, str) and shard not in ('', '.', '..')
    if not plain or any(mark in shard for mark in '/\\\0'):
      raise UserError(
        f'{index} puts tensor {name} into {shard!r}, which is not the name of a file in its own '
        'directory; it is not followed. Fetch the index from where you trust it.'
      )
    shards.setdefault(shard, []).append(name)
  return shards


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object whose keys are all different; json itself keeps the last of equal ones."""
  found = dict(pairs)
  if len(found) < len(pairs):
    names = [name for name, _ in pairs]
    raise UserError(f'{next(name for name in found if names.count(name) > 1)} is there twice')
  return found


def _check_listing(name: str, files: list[str], config: dict[str, Any]) -> None:
  """ValueError where what the hub lists under `name` is nothing that we read."""
  kind = config.get('model_type', 'llama')
  if kind != 'llama':
    raise UserError(f'{name}: model_type is {kind!r}; only llama models are read.')
  if not {WEIGHTS, INDEX} & set(files):
    raise UserError(_no_weights(name, files))


def _no_weights(where: str, files: Iterable[str]) -> str:
  """Why a checkpoint without safetensors is refused, and the way out."""
  files = sorted(files)
  pickled = [file for file in files if re.fullmatch(r'pytorch_model.*\.bin.*', file)]
  if pickled:
    return (
      f'{where}/{pickled[0]} is a pickle, which may run any code when loaded, so it is not '
      'read. Where you trust it, convert it once: python -c "from transformers import '
      f"AutoModelForCausalLM as M; M.from_pretrained('{where}').save_pretrained('OUT')\" "
      '(AutoModelForSequenceClassification for a reward model).'
    )
  return f'{where} has neither {WEIGHTS} nor {INDEX}; it holds {", ".join(files[:8]) or "nothing"}.'
