"""Slices of our tensors, read from the safetensors files that hold them, cast and transposed.

One slice at a time: where it goes, onto devices or into another file, is the caller's business.
"""

import mmap
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

from segjax.hf.checkpoint import Checkpoint, TensorHeader
from segjax.hf.tensor_names import TensorMapping
from segjax.hf.transpose import transpose_into

DTYPES = {'F64': 'float64', 'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

Index = tuple[slice, ...]

_NUMPY = {word: np.dtype(getattr(ml_dtypes, name, name)) for word, name in DTYPES.items()}
# Unsigned type of each dtype's width, and the bits of infinity: more, without sign, is NaN.
_INFINITY = {
  'F64': (np.uint64, 0x7FF0000000000000),
  'F32': (np.uint32, 0x7F800000),
  'BF16': (np.uint16, 0x7F80),
  'F16': (np.uint16, 0x7C00),
}
_BLOCK = 1 << 18  # bytes looked at together: they stay in a core's cache


class SliceReader:
  """A checkpoint's files, mapped for reading; may be used from several threads.

  Mapped pages are the kernel's to take back, so that only what `read` returns is memory held.

  Attributes:
    requested: bytes of tensors that `read` was asked for so far.
    not_finite: names of tensors in which `read` met NaN or infinity, in the order it met them.
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
    """The slice `index` of our tensor `entry` as `dtype`; into `out`, of its shape, where given."""
    ranges = [range(*part.indices(size)) for part, size in zip(index, entry.shape, strict=True)]
    if out is None:
      out = np.empty([len(part) for part in ranges], dtype)
    layers, inner = (ranges[0], ranges[1:]) if entry.stacked else (range(1), ranges)
    if entry.transposed:
      inner = inner[::-1]
    window = tuple(slice(part.start, part.stop) for part in inner)
    for target, layer in zip(out if entry.stacked else [out], layers, strict=True):
      piece = self._piece(entry.hf_name(layer), window)
      if entry.transposed:
        transpose_into(piece, target)
      else:
        target[...] = piece
    return out

  def check(self, name: str) -> None:
    """Looks through one HF tensor for NaN and infinity, which then are in `not_finite`."""
    self._piece(name, (slice(None),))

  def same(self, one: str, two: str) -> bool:
    """Whether two HF tensors have the same dtype, shape and bits."""
    first, second = self._tensors[one], self._tensors[two]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
      return False
    kind = _INFINITY[first.dtype][0]
    a, b = (self._mapped(tensor).reshape(-1).view(kind) for tensor in (first, second))
    step = _BLOCK // kind().itemsize
    return all(
      np.array_equal(a[at : at + step], b[at : at + step]) for at in range(0, len(a), step)
    )

  def release(self) -> None:
    """Gives mapped pages back; they stay in the kernel's cache as far as it likes."""
    with self._lock:
      for mapped in self._maps.values():
        mapped.madvise(mmap.MADV_DONTNEED)

  def _piece(self, name: str, window: Index) -> np.ndarray:
    """tensor[window] of an HF tensor, a view of the mapped file."""
    tensor = self._tensors[name]
    piece = self._mapped(tensor)[window]
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


def describe_not_finite(found: dict[str, Path]) -> str:
  """One message about the tensors of `Slices.not_finite`."""
  names = [f'{name} ({file.name})' for name, file in found.items()]
  more = f' and {len(names) - 5} more' if len(names) > 5 else ''
  return (
    f'{next(iter(found.values())).parent}: NaN or infinity in tensor'
    f'{"s" if len(names) > 1 else ""} {", ".join(names[:5])}{more}'
  )


def _has_infinite(piece: np.ndarray, dtype: str) -> bool:
  """Whether an array holds NaN or infinity, block by block, as unsigned integers."""
  kind, infinity = _INFINITY[dtype]
  magnitude = kind(np.iinfo(kind).max >> 1)  # all but the sign
  if not piece.size:
    return False
  rows = np.atleast_2d(piece.view(kind))
  step = max(1, _BLOCK // max(1, rows[0].nbytes))
  width = max(1, _BLOCK // kind().itemsize)
  for row in range(0, len(rows), step):
    for column in range(0, rows.shape[1], width):
      block = rows[row : row + step, column : column + width]
      if (block & magnitude).max() >= infinity:
        return True
  return False
