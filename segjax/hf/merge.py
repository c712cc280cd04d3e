"""Merges a low-rank adapter into its base: W + s A B, one matrix of one layer at a time."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from segjax import storage
from segjax.data.tokenizer import ChatTokenizer, MissingChatTemplateError, load_tokenizer
from segjax.hf import adapter as adapters
from segjax.hf import model_card as cards
from segjax.hf import reader, writer
from segjax.hf.adapter import Adapter
from segjax.hf.checkpoint import resolve_checkpoint
from segjax.hf.tensor_names import TensorMapping
from segjax.hf.tensor_slices import SliceReader, describe_not_finite


def merge_adapter(
  source: str | Path, out: str | Path, *, dtype: str = '', overwrite: bool = False
) -> Path:
  """Writes a plain HF checkpoint of an adapter and its base; returns its directory.

  Sums are computed in float32 and rounded once.

  Args:
    source: directory or hub id of the adapter.
    out: directory to write.
    dtype: dtype of the files; '' keeps that of each tensor of the base, and of the adapter's
      head.
    overwrite: replace a checkpoint at `out`.

  Raises:
    UserError: `out` must not be written to, or adapter and base cannot be read.
  """
  writer.check_dtype(dtype)
  directory, out = resolve_checkpoint(source), Path(out).expanduser().absolute()
  adapter = adapters.read_adapter(directory)
  base = adapters.base_directory(adapter)
  for origin in (directory, base):
    storage.check_target(out, writer.REPLACEABLE, overwrite=overwrite, source=origin)
  config = reader.load_config(directory)
  head = 'scalar' if reader.has_scalar_head(directory, config) else 'language'
  checkpoint, entries = reader.open_model(base, config, head)
  storage.check_space(out, sum(tensor.num_bytes for tensor in checkpoint.tensors.values()))
  own, own_entries = adapters.open_weights(adapter, config)
  adapters.check_blocks(own, own_entries)
  files, own_files = SliceReader(checkpoint), SliceReader(own)
  by_path = {entry.path: _Tensor(own, own_files, entry) for entry in own_entries}
  leaves = {}
  for entry in entries:
    leaf = _Tensor(checkpoint, files, entry)
    stem = entry.path.removesuffix('kernel').replace('backbone', adapters.ADAPTER)
    if stem + 'a' in by_path:
      leaf = _Sum(leaf, by_path[stem + 'a'], by_path[stem + 'b'], adapter.lora.scale)
    leaves[entry.path] = leaf
  heads = [entry.path for entry in adapters.of_network(own_entries, head)]
  leaves |= {path: by_path[path] for path in heads if not path.startswith(adapters.ADAPTER)}
  others = {'source': directory, 'card': _card(adapter, base), 'tokenizer': _tokenizer(directory)}
  writer.save_checkpoint(out, leaves, config, head, dtype=dtype, **others)
  spec = directory / writer.REWARD_SPEC_FILE
  if spec.is_file():
    with storage.atomic_file(out / spec.name) as partial:
      shutil.copyfile(spec, partial)
  if not_finite := files.not_finite | own_files.not_finite:
    logging.warning('%s', describe_not_finite(not_finite))
  return out


class _Tensor:
  """One of our tensors in files, which `writer` reads layer by layer."""

  def __init__(self, checkpoint: Any, files: SliceReader, entry: TensorMapping) -> None:
    self.shape, self.dtype = entry.shape, reader.resolve_dtype(checkpoint, entry, '')
    self._files, self._entry = files, entry

  def __getitem__(self, layer: int) -> np.ndarray:
    rest = (slice(None),) * (len(self.shape) - 1)
    return self._read((slice(layer, layer + 1), *rest))[0]

  def __array__(self, *unused: Any, **unused_options: Any) -> np.ndarray:
    return self._read((slice(None),) * len(self.shape))

  def _read(self, index: tuple[slice, ...]) -> np.ndarray:
    host = self._files.read(self._entry, index, self.dtype)
    self._files.release()  # mapped pages count as memory of the process
    return host


class _Sum:
  """W + s A B of stacked matrices."""

  def __init__(self, weight: _Tensor, a: _Tensor, b: _Tensor, scale: float) -> None:
    self.shape, self.dtype = weight.shape, weight.dtype
    self._weight, self._a, self._b, self._scale = weight, a, b, scale

  def __getitem__(self, layer: int) -> np.ndarray:
    weight, a, b = (x[layer].astype(np.float32) for x in (self._weight, self._a, self._b))
    return weight + np.float32(self._scale) * (a @ b)


def _tokenizer(directory: Path) -> ChatTokenizer | None:
  """Returns the tokenizer of the adapter itself, if it has one with a chat template."""
  if adapters.tokenizer_directory(directory) != directory:
    return None
  with contextlib.suppress(MissingChatTemplateError):
    return load_tokenizer(str(directory))
  return None


def _card(adapter: Adapter, base: Path) -> cards.Card:
  """Returns what the adapter's card says, on the base and its licence."""
  directory, curves = adapter.directory, adapter.directory / cards.CURVES
  own = cards.Card(
    record=cards.read_record(directory), curves=curves.read_bytes() if curves.is_file() else b''
  )
  origin = cards.merge(cards.from_source(adapter.base, base), cards.from_source('', directory))
  return cards.merge(origin, own)
