"""Plans the safetensors files of a checkpoint and writes tensors into them.

Every tensor's position is known before its data, so that tensors are written in any order and from
several threads; safetensors' own writer needs complete tensors. jax is not imported.
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
  """An HF tensor to write, or a part of one: layer `layer` of our tensor `entry`, or all of it."""

  entry: tensor_names.TensorMapping
  layer: int
  dtype: str  # safetensors' name

  @property
  def name(self) -> str:
    """HF's name of the tensor."""
    return self.entry.hf_name(self.layer)

  @property
  def num_bytes(self) -> int:
    """Number of bytes of its data."""
    return math.prod(self.entry.part_shape) * ITEM_SIZE[self.dtype]

  @property
  def first_byte(self) -> int:
    """Byte of the HF tensor at which its data begin."""
    return self.entry.row * math.prod(self.entry.hf_shape[1:]) * ITEM_SIZE[self.dtype]

  @property
  def hf_bytes(self) -> int:
    """Number of bytes of the HF tensor."""
    return math.prod(self.entry.hf_shape) * ITEM_SIZE[self.dtype]


ShardPlan = list[HFTensor]


def plan_shards(
  tensors: Sequence[tuple[tensor_names.TensorMapping, str]], max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[ShardPlan]:
  """Returns the HF tensors of each file, in the order of their bytes.

  Files are filled from the embedding through the layers to the head. Within a file, wider dtypes
  come first, which keeps every tensor aligned, then names are sorted, as safetensors does. The
  parts of an HF tensor follow each other.

  Args:
    tensors: the model's entries with safetensors' names of their dtypes.
    max_shard_bytes: maximum bytes of a file, unless a single tensor is larger.
  """
  before, layers, after = [], [], []
  for entry, dtype in tensors:
    group = layers if entry.stacked else after if layers else before
    group += [HFTensor(entry, i, dtype) for i in range(len(entry.hf_names()))]
  shards: list[ShardPlan] = [[]]
  size = 0
  # Our tensors hold all layers; by layer, the tensors of one are in the same file or two.
  for piece in before + sorted(layers, key=lambda piece: piece.layer) + after:
    if shards[-1] and not piece.first_byte and size + piece.hf_bytes > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(piece)
    size += piece.num_bytes
  return [sorted(shard, key=lambda p: (-ITEM_SIZE[p.dtype], p.name)) for shard in shards]


def num_bytes(shards: list[ShardPlan]) -> int:
  """Returns the number of bytes of all tensors."""
  return sum(piece.num_bytes for shard in shards for piece in shard)


class ShardWriter:
  """Opens the files of a plan for writing; several threads may write different parts at once.

  Args:
    directory: of the files.
    shards: the plan.
    creates: makes the files, and in the end the index; False writes into those of another process.
  """

  def __init__(self, directory: Path, shards: list[ShardPlan], *, creates: bool = True) -> None:
    self._directory, self._shards, self._creates = directory, shards, creates
    self._open: list[int] = []
    self._offsets: dict[str, tuple[int, int]] = {}  # file descriptor, first byte
    self._weight_map: dict[str, str] = {}

  def __enter__(self) -> 'ShardWriter':
    count = len(self._shards)
    for number, shard in enumerate(self._shards, 1):
      name = f'model-{number:05d}-of-{count:05d}.safetensors' if count > 1 else WEIGHTS
      # O_EXCL: never into an existing file, whose bytes would mix with these.
      new = os.O_CREAT | os.O_EXCL if self._creates else 0
      file = os.open(self._directory / name, os.O_WRONLY | new, 0o666)
      self._open.append(file)
      header = _header(shard)
      if self._creates:
        _write_at(file, header, 0)
      offset = len(header)
      for piece in shard:
        self._offsets.setdefault(piece.name, (file, offset))
        self._weight_map[piece.name] = name
        offset += piece.num_bytes
    return self

  def write(self, name: str, first_byte: int, data: np.ndarray) -> None:
    """Writes a contiguous array into tensor `name`, starting at its byte `first_byte`."""
    file, offset = self._offsets[name]
    _write_at(file, data.reshape(-1).view(np.uint8), offset + first_byte)

  def __exit__(
    self, kind: type | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    for file in self._open:
      if not self._creates:
        os.fsync(file)  # the other process may be on another machine
      os.close(file)
    # The index is written last: without it the files of a failed export are not a checkpoint.
    if error is None and self._creates and len(self._shards) > 1:
      total = num_bytes(self._shards)
      index = {'metadata': {'total_size': total}, 'weight_map': self._weight_map}
      write_json(self._directory / INDEX, index)


def write_json(path: Path, value: dict[str, Any]) -> None:
  """Writes a JSON object with sorted keys."""
  path.write_text(json.dumps(value, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def _header(shard: ShardPlan) -> bytes:
  """Returns a safetensors header: its length, JSON, and spaces up to a multiple of 8 bytes."""
  # transformers 4 refuses to load a file without a format.
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  offset = 0
  for piece in shard:
    if not piece.first_byte:
      header[piece.name] = {
        'dtype': piece.dtype,
        'shape': list(piece.entry.hf_shape),
        'data_offsets': [offset, offset + piece.hf_bytes],
      }
    offset += piece.num_bytes
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)  # aligns the data of every dtype
  return struct.pack('<Q', len(text)) + text


def _write_at(file: int, data: Any, offset: int) -> None:
  view = memoryview(data)
  while len(view):
    # pwrite has no shared position, so that threads may write at once. Linux writes at most 2 GiB
    # per call.
    written = os.pwrite(file, view, offset)
    view, offset = view[written:], offset + written
