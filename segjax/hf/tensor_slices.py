"""Reads slices of our tensors from safetensors files, cast and transposed on the way.

Files are mapped, not read through safetensors' get_slice, which copies each slice and cannot give
pages back. Where a slice goes, onto devices or into another file, is up to the caller.
"""

import mmap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

from segjax.errors import UserError
from segjax.hf.checkpoint import Checkpoint, TensorHeader
from segjax.hf.tensor_names import TensorMapping

DTYPES = {'F64': 'float64', 'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

Index = tuple[slice, ...]

_NUMPY = {word: np.dtype(getattr(ml_dtypes, name, name)) for word, name in DTYPES.items()}
# Unsigned type of each dtype's width, and the bits of infinity; larger magnitudes are NaN.
_INFINITY = {
  'F64': (np.uint64, 0x7FF0000000000000),
  'F32': (np.uint32, 0x7F800000),
  'BF16': (np.uint16, 0x7F80),
  'F16': (np.uint16, 0x7C00),
}
_BLOCK = 1 << 18  # bytes checked at once, so that they stay in a core's cache
_TILE = 256  # rows and columns transposed at once
_PAD = 16  # keeps a tile's columns from falling into the same cache sets


class SliceReader:
  """Reads slices of a checkpoint through mapped files; may be used from several threads.

  The kernel can drop mapped pages at any time, so the memory held is what `read` returns.

  Attributes:
    requested: bytes of tensors requested from `read` so far.
    not_finite: tensors in which `read` encountered NaN or infinity, by name with their file, in
      that order.
  """

  def __init__(self, checkpoint: Checkpoint) -> None:
    self.requested = 0
    self.not_finite: dict[str, Path] = {}
    self._tensors = checkpoint.tensors
    self._maps: dict[Path, mmap.mmap] = {}
    self._lock = threading.Lock()

  def read(
    self, entry: TensorMapping, index: Index, dtype: np.dtype, out: np.ndarray | None = None
  ) -> np.ndarray:
    """Returns the slice `index` of our tensor `entry` as `dtype`, in `out` if that is provided."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, entry.shape, strict=True)]
    if out is None:
      out = np.empty([len(part) for part in ranges], dtype)
    layers, inner = (ranges[0], ranges[1:]) if entry.stacked else (range(1), ranges)
    if entry.transposed:
      inner = inner[::-1]  # HF kernels are [out, in]
    window = tuple(
      slice(own.start + part.start, own.start + part.stop)
      for own, part in zip(entry.part, inner, strict=True)
    )
    for target, layer in zip(out if entry.stacked else [out], layers, strict=True):
      piece = self._piece(entry.hf_name(layer), window)
      if entry.transposed:
        transpose_into(piece, target)
      else:
        target[...] = piece
    return out

  def rows(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    """Returns rows of one HF tensor, as float32."""
    return np.asarray(self._piece(name, (rows,)), np.float32)

  def check(self, name: str) -> None:
    """Checks one HF tensor for NaN and infinity; adds it to `not_finite` if it has any."""
    self._piece(name, (slice(None),))

  def bits_equal(self, name: str, other_name: str) -> bool:
    """Returns whether two HF tensors have the same dtype, shape and bits."""
    first, second = self._tensors[name], self._tensors[other_name]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
      return False
    # As integers: a NaN is not equal to itself.
    kind = _INFINITY[first.dtype][0]
    a, b = (self._mapped(tensor).reshape(-1).view(kind) for tensor in (first, second))
    # In blocks: the first difference ends the comparison, and no array of all results is made.
    step = _BLOCK // kind().itemsize
    return all(
      np.array_equal(a[start : start + step], b[start : start + step])
      for start in range(0, len(a), step)
    )

  def release(self) -> None:
    """Drops the mapped pages; the kernel may keep them in its page cache."""
    with self._lock:
      for mapped in self._maps.values():
        # Otherwise the process would count every page it has read as its memory: the whole model.
        mapped.madvise(mmap.MADV_DONTNEED)

  def _piece(self, name: str, window: Index) -> np.ndarray:
    """Returns tensor[window] of an HF tensor, a view of the mapped file."""
    tensor = self._tensors[name]
    piece = self._mapped(tensor)[window]
    # Here, because these bytes are read anyway; outside the lock, so that threads do not wait.
    infinite = _has_infinite(piece, tensor.dtype)
    with self._lock:
      self.requested += piece.nbytes
      if infinite:
        self.not_finite[name] = tensor.file
    return piece

  def _mapped(self, tensor: TensorHeader) -> np.ndarray:
    with self._lock:
      if tensor.file not in self._maps:
        with tensor.file.open('rb') as stream:
          self._maps[tensor.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
      mapped = self._maps[tensor.file]
    kind = _NUMPY[tensor.dtype]
    return np.frombuffer(mapped, kind, tensor.size, tensor.offset).reshape(tensor.shape)


def transpose_into(source: np.ndarray, out: np.ndarray) -> None:
  """Writes the transpose of a matrix into `out`, cast to its dtype: out[j, i] = source[i, j].

  Raises:
    ValueError: the shape of `out` is not the transposed shape of `source`.
  """
  if source.ndim != 2 or out.shape != source.shape[::-1]:
    raise UserError(f'out {out.shape} is not the transpose of source {source.shape}.')
  # Tile by tile through a padded scratch array: a plain `out[:] = source.T` strides through one of
  # the two by a power of two for most layer widths, which is 5 to 10 times slower.
  scratch = np.empty((_TILE, _TILE + _PAD), out.dtype)
  rows, columns = source.shape
  for row in range(0, rows, _TILE):
    for column in range(0, columns, _TILE):
      piece = source[row : row + _TILE, column : column + _TILE]
      tile = scratch[: piece.shape[0], : piece.shape[1]]
      tile[...] = piece
      out[column : column + _TILE, row : row + _TILE] = tile.T


def describe_not_finite(tensors: dict[str, Path]) -> str:
  """Returns one message about the tensors of `SliceReader.not_finite`."""
  names = [f'{name} ({file.name})' for name, file in tensors.items()]
  more = f' and {len(names) - 5} more' if len(names) > 5 else ''
  return (
    f'{next(iter(tensors.values())).parent}: NaN or infinity in tensor'
    f'{"s" if len(names) > 1 else ""} {", ".join(names[:5])}{more}'
  )


def _has_infinite(piece: np.ndarray, dtype: str) -> bool:
  """Returns whether an array holds NaN or infinity, compared as unsigned integers in blocks."""
  kind, infinity = _INFINITY[dtype]
  magnitude = kind(np.iinfo(kind).max >> 1)  # all but the sign
  if not piece.size:
    return False
  # On integers: numpy converts each bfloat16 to float32 to compare it.
  rows = np.atleast_2d(piece.view(kind))
  step = max(1, _BLOCK // max(1, rows[0].nbytes))
  width = max(1, _BLOCK // kind().itemsize)
  for row in range(0, len(rows), step):
    for column in range(0, rows.shape[1], width):
      block = rows[row : row + step, column : column + width]
      if (block & magnitude).max() >= infinity:
        return True
  return False
