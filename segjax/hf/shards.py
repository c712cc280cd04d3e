"""Which safetensors file an HF tensor goes into, at which byte, and writing it there.

Every place is known before a byte of data is, so that tensors come in any order and from several
threads. Names and shapes are `layout`'s business; jax is not imported.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from segjax.hf import tensor_names
from segjax.hf.checkpoint import INDEX, ITEM_SIZE, WEIGHTS

MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class HFTensor:
  """One HF tensor to be written: layer `layer` of our tensor `entry`, or all of it."""

  entry: tensor_names.TensorMapping
  layer: int
  dtype: str  # safetensors' word

  @property
  def name(self) -> str:
    """HF's name."""
    return self.entry.hf_name(self.layer)

  @property
  def num_bytes(self) -> int:
    """Of its data."""
    return math.prod(self.entry.hf_shape) * ITEM_SIZE[self.dtype]


ShardPlan = list[HFTensor]


def plan_shards(
  tensors: Sequence[tuple[tensor_names.TensorMapping, str]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[ShardPlan]:
  """Which HF tensors go into which file, in the order of their bytes.

  Files are filled from the embedding through the layers to the head; inside one, wider dtypes come
  first, which keeps every tensor aligned, then names in order, as the safetensors library does.

  Args:
    tensors: the model's entries with safetensors' word for their dtypes.
  """
  before, layers, after = [], [], []
  for entry, dtype in tensors:
    group = layers if entry.stacked else after if layers else before
    group += [HFTensor(entry, i, dtype) for i in range(len(entry.hf_names()))]
  shards: list[ShardPlan] = [[]]
  size = 0
  for piece in before + sorted(layers, key=lambda piece: piece.layer) + after:
    if shards[-1] and size + piece.num_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(piece)
    size += piece.num_bytes
  return [sorted(shard, key=lambda p: (-ITEM_SIZE[p.dtype], p.name)) for shard in shards]


def num_bytes(shards: list[ShardPlan]) -> int:
  """Of all tensors together."""
  return sum(piece.num_bytes for shard in shards for piece in shard)


class ShardWriter:
  """The files of a plan, open for writing; several threads may write different parts at once."""

  def __init__(self, directory: Path, shards: list[ShardPlan]) -> None:
    self._directory, self._shards = directory, shards
    self._open: list[int] = []
    self._places: dict[str, tuple[int, int]] = {}  # file descriptor, first byte
    self._weight_map: dict[str, str] = {}

  def __enter__(self) -> 'ShardWriter':
    count = len(self._shards)
    for number, shard in enumerate(self._shards, 1):
      name = f'model-{number:05d}-of-{count:05d}.safetensors' if count > 1 else WEIGHTS
      file = os.open(self._directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
      self._open.append(file)
      header = _header(shard)
      _write_at(file, header, 0)
      offset = len(header)
      for piece in shard:
        self._places[piece.name] = file, offset
        self._weight_map[piece.name] = name
        offset += piece.num_bytes
    return self

  def write(self, name: str, first_byte: int, data: np.ndarray) -> None:
    """Writes a contiguous array into tensor `name`, from its byte `first_byte` on."""
    file, offset = self._places[name]
    _write_at(file, data.reshape(-1).view(np.uint8), offset + first_byte)

  def __exit__(
    self, kind: type | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for file in self._open:
      os.close(file)
    if error is None and len(self._shards) > 1:
      total = num_bytes(self._shards)
      index = {'metadata': {'total_size': total}, 'weight_map': self._weight_map}
      write_json(self._directory / INDEX, index)


def write_json(path: Path, value: dict[str, Any]) -> None:
  """A JSON object, keys in order."""
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _header(shard: ShardPlan) -> bytes:
  """A safetensors header: its length, JSON, and spaces up to a multiple of 8 bytes."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for piece in shard:
    header[piece.name] = {
      'dtype': piece.dtype,
      'shape': list(piece.entry.hf_shape),
      'data_offsets': [offset, offset + piece.num_bytes],
    }
    offset += piece.num_bytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return struct.pack('<Q', len(text)) + text


def _write_at(file: int, data: Any, offset: int) -> None:
  view = memoryview(data)
  while len(view):
    written = os.pwrite(file, view, offset)
    view, offset = view[written:], offset + written
