"""What an HF checkpoint directory says about itself: config.json and tensor headers.

No weights are read and jax is not imported, so that looking at 140 GB takes no time. Names are
`layout`'s business, weights `reader`'s.
"""

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
INDEX = 'model.safetensors.index.json'

ITEM_SIZE = {'F64': 8, 'F32': 4, 'BF16': 2, 'F16': 2}  # the dtypes that weights may have

_HUB_FILES = ('*.json', '*.safetensors', '*.jinja', '*.model', '*.txt')
_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors format


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies: its file, dtype (safetensors' word), shape and first byte."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  offset: int

  @property
  def size(self) -> int:
    """Number of elements."""
    return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A directory and its tensors by HF name, in the order of the files."""

  directory: Path
  tensors: dict[str, Tensor]

  def num_parameters(self) -> int:
    """Number of elements of all tensors."""
    return sum(tensor.size for tensor in self.tensors.values())


def resolve(name: str | Path) -> Path:
  """The local directory of a checkpoint: itself, or a download of the hub id 'owner/name'.

  Only json, safetensors and tokenizer files are downloaded, into huggingface_hub's cache.

  Raises:
    ValueError: for a missing directory, an unknown hub id, or a hub that cannot be reached.
  """
  path = Path(name).expanduser()
  if path.is_dir():
    return path
  if path.exists():
    raise ValueError(f'{name} is a file; give the directory that holds {CONFIG} and the weights.')
  text = str(name)
  if '://' in text:
    raise ValueError(f'{name} is remote; copy the checkpoint to a local directory first.')
  if isinstance(name, Path) or text.startswith(('.', '~')) or text.strip('/').count('/') != 1:
    raise ValueError(f'no directory {name}; give an existing one, or a hub id like owner/name.')
  if text != text.strip('/'):
    raise ValueError(f'no directory {name}; a hub id neither starts nor ends with a slash.')
  import huggingface_hub

  try:
    found = huggingface_hub.snapshot_download(
      text, allow_patterns=list(_HUB_FILES), ignore_patterns=['original/*']
    )
  except (OSError, ValueError) as error:  # not found, gated, no network, malformed
    reason = str(error).strip().splitlines()[:1]
    raise ValueError(
      f'{name} is neither a local directory nor a checkpoint that the Hugging Face hub gives us '
      f'({type(error).__name__}: {"".join(reason)}). Check the name, the network, and '
      '`hf auth login` for gated models.'
    ) from error
  return Path(found)


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object; ValueError names the file where it is missing or broken."""
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as error:
    raise ValueError(f'{path} does not exist; is {path.parent} an HF checkpoint?') from error
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON ({error}); fetch it again.') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds a JSON {type(value).__name__}, not an object; fetch it again.')
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
      the index, or a tensor's dtype is not a floating-point one.
  """
  directory = Path(path)
  if not directory.is_dir():
    raise ValueError(f'no directory {directory}; `resolve` finds one for a hub id.')
  if (directory / WEIGHTS).is_file():
    return Checkpoint(directory, read_header(directory / WEIGHTS))
  if not (directory / INDEX).is_file():
    raise ValueError(_no_weights(directory))
  weight_map = read_json(directory / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise ValueError(f'{directory / INDEX} has no "weight_map"; fetch it again.')
  tensors: dict[str, Tensor] = {}
  for shard in sorted(set(weight_map.values())):
    names = [name for name, file in weight_map.items() if file == shard]
    if Path(shard).name != shard or not (directory / shard).is_file():
      raise ValueError(
        f'{directory / shard} is missing; {INDEX} puts {len(names)} tensors there, the first '
        f'{names[0]}. Fetch the shard again.'
      )
    header = read_header(directory / shard)
    lost = [name for name in names if name not in header]
    twice = [name for name in header if name in tensors]
    if lost or twice:
      raise ValueError(
        f'{directory / shard} does not agree with {INDEX}: tensor {(lost + twice)[0]} is '
        f'{"not in it" if lost else "in another shard too"}. Fetch both again.'
      )
    tensors |= header
  return Checkpoint(directory, tensors)


def read_header(file: Path) -> dict[str, Tensor]:
  """The tensors of one safetensors file by name, from its header.

  The format: 8 bytes little-endian length, that much JSON, then the data; see
  https://huggingface.co/docs/safetensors.

  Raises:
    ValueError: where it is no safetensors file, is truncated, or holds a dtype we do not read.
  """
  total = file.stat().st_size
  with file.open('rb') as stream:
    start = stream.read(8)
    length = struct.unpack('<Q', start)[0] if len(start) == 8 else _HEADER_LIMIT + 1
    if length > min(_HEADER_LIMIT, total - 8):
      hint = ' but a git-lfs pointer' if start == b'version ' else ''
      raise ValueError(f'{file} ({total} bytes) is no safetensors file{hint}; fetch it again.')
    try:
      header = json.loads(stream.read(length))
    except ValueError as error:
      raise ValueError(f'{file} has a broken header ({error}); fetch it again.') from error
  header.pop('__metadata__', None)
  tensors = {}
  for name, entry in sorted(header.items(), key=lambda item: item[1]['data_offsets']):
    begin, end = entry['data_offsets']
    if entry['dtype'] not in ITEM_SIZE:
      raise ValueError(
        f'{file}: tensor {name} has dtype {entry["dtype"]}, not one of {", ".join(ITEM_SIZE)}; '
        'quantized checkpoints are not read, use the unquantized one.'
      )
    tensor = Tensor(file, entry['dtype'], tuple(entry['shape']), 8 + length + begin)
    if end - begin != tensor.size * ITEM_SIZE[tensor.dtype] or 8 + length + end > total:
      raise ValueError(
        f'{file} ({total} bytes) is truncated or damaged at tensor {name}; fetch it again.'
      )
    tensors[name] = tensor
  return tensors


def _no_weights(directory: Path) -> str:
  """Why a directory without safetensors is refused, and the way out."""
  pickled = sorted(file.name for file in directory.glob('pytorch_model*.bin*'))
  if pickled:
    return (
      f'{directory / pickled[0]} is a pickle, which may run any code when loaded, so it is not '
      'read. Where you trust it, convert it once: python -c "from transformers import '
      f"AutoModelForCausalLM as M; M.from_pretrained('{directory}').save_pretrained('OUT')\" "
      '(AutoModelForSequenceClassification for a reward model).'
    )
  found = ', '.join(sorted(file.name for file in directory.iterdir())[:8]) or 'nothing'
  return f'{directory} has neither {WEIGHTS} nor {INDEX}; it holds {found}.'
