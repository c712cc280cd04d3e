"""HF safetensors into our parameter tree, each device reading only the slices it holds.

What the tensors are called is `layout`'s business, where they live `model.sharding`'s.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from segjax.hf import layout
from segjax.hf.config import config_from_hf, head_name
from segjax.hf.headers import CONFIG, Checkpoint, open_checkpoint, read_json, resolve
from segjax.hf.transpose import transpose_into
from segjax.model import sharding
from segjax.model.llama import LlamaConfig

__all__ = ['DTYPES', 'load_config', 'load_params', 'open_checkpoint', 'resolve']

Params = dict[str, Any]

DTYPES = {'F64': 'float64', 'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}

_IGNORED = r'(^|\.)rotary_emb\.inv_freq$'  # a buffer that old checkpoints carry
_SHOWN = 5  # names in an error message


def load_config(path: str | Path, **runtime: Any) -> LlamaConfig:
  """The network of a local checkpoint or hub id; `runtime` sets dtype, remat, attention."""
  return config_from_hf(resolve(path), **runtime)


def load_params(
  path: str | Path,
  config: LlamaConfig,
  head: str,
  mesh: Mesh | None = None,
  dtype: str = 'float32',
  key: jax.Array | None = None,
) -> Params:
  """The parameters of a checkpoint, cast on the way and placed by `sharding`'s table.

  A scalar head that the checkpoint lacks is drawn from N(0, 1 / (D + 1)); a language model's head
  is left out of a scalar model.

  Args:
    path: local directory or hub id.
    head: 'language' or 'scalar'.
    mesh: None puts everything on the default device.
    dtype: of the parameters; '' keeps each tensor's own.
    key: for a fresh scalar head.

  Raises:
    ValueError: for missing, unexpected or misshapen tensors, and for a scalar head that has to be
      drawn without a key.
  """
  if dtype and dtype not in DTYPES.values():
    raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES.values())} or ''.")
  checkpoint = open_checkpoint(resolve(path))
  score = head_name(read_json(checkpoint.directory / CONFIG))
  entries = layout.entries(config, head, score)
  fresh = head == 'scalar' and f'{score}.weight' not in checkpoint.tensors
  if fresh:
    entries = tuple(entry for entry in entries if entry.path != 'scalar_head/kernel')
  _check(checkpoint, entries, head)
  if fresh and key is None:
    raise ValueError(
      f'{checkpoint.directory} has no {score}.weight, so the scalar head has to be drawn: '
      'give a random key, or a reward model.'
    )
  params: Params = {}
  with _Files() as files:
    for entry in entries:
      _insert(params, entry.path, _place(checkpoint, files, entry, mesh, dtype))
  if fresh:
    own = params['backbone']['embedding'].dtype
    _insert(params, 'scalar_head/kernel', _fresh_head(key, config.hidden_size, own, mesh))
  return params


class _Files(contextlib.ExitStack):
  """Open safetensors files by path, closed together."""

  def __init__(self) -> None:
    super().__init__()
    self._open: dict[Path, Any] = {}

  def slices(self, file: Path, name: str) -> Any:
    """A view of tensor `name` that reads what it is indexed with."""
    if file not in self._open:
      self._open[file] = self.enter_context(safetensors.safe_open(file, framework='numpy'))
    return self._open[file].get_slice(name)


def _check(checkpoint: Checkpoint, entries: tuple[layout.Entry, ...], head: str) -> None:
  """ValueError unless the checkpoint holds exactly the tensors of the table."""
  where, tensors = checkpoint.directory, checkpoint.tensors
  expected = {name: entry.hf_shape for entry in entries for name in entry.hf_names()}
  missing = [name for name in expected if name not in tensors]
  if missing:
    raise ValueError(
      f'{where} lacks {_some(missing)} of a {head} model; check {CONFIG} against the files '
      '(number of layers, tie_word_embeddings) and the head that you ask for.'
    )
  extra = [
    name
    for name in tensors
    if name not in expected and name != 'lm_head.weight' and not re.search(_IGNORED, name)
  ]
  if extra:
    raise ValueError(
      f'{where} holds {_some(extra)} that a {head} model with its {CONFIG} does not have; check '
      'the number of layers, attention_bias, mlp_bias and the head that you ask for.'
    )
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise ValueError(
        f'{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, but by its '
        f'{CONFIG} it should be {list(shape)}'
        + (' (num_labels 1)' if shape[0] == 1 else '')
        + '; use the config that belongs to the weights.'
      )


def _some(names: list[str]) -> str:
  more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return f'tensor{"s" if len(names) > 1 else ""} {", ".join(names[:_SHOWN])}{more}'


def _place(
  checkpoint: Checkpoint, files: _Files, entry: layout.Entry, mesh: Mesh | None, dtype: str
) -> jax.Array:
  """One of our tensors, on its devices."""
  own = {checkpoint.tensors[name].dtype for name in entry.hf_names()}
  if not dtype and len(own) > 1:
    raise ValueError(
      f'{checkpoint.directory}: the layers of {entry.template} have dtypes '
      f'{", ".join(sorted(own))}, and one stack has one; name the dtype to load them in.'
    )
  kind = jnp.dtype(dtype or DTYPES[own.pop()])

  def read(index: tuple[slice, ...]) -> np.ndarray:
    return _read(checkpoint, files, entry, index, kind)

  if mesh is None:
    return jnp.asarray(read((slice(None),) * len(entry.shape)))
  place = sharding.parameter_sharding(entry.path, entry.shape, mesh)
  return jax.make_array_from_callback(entry.shape, place, _once(read))


def _once(read: Callable[[tuple[slice, ...]], np.ndarray]) -> Callable:
  """`read` remembering its results: devices that hold the same slice share one reading."""
  known: dict[tuple, np.ndarray] = {}

  def remembered(index: tuple[slice, ...]) -> np.ndarray:
    name = tuple((part.start, part.stop) for part in index)
    if name not in known:
      known[name] = read(index)
    return known[name]

  return remembered


def _read(
  checkpoint: Checkpoint,
  files: _Files,
  entry: layout.Entry,
  index: tuple[slice, ...],
  dtype: np.dtype,
) -> np.ndarray:
  """The slice `index` of our tensor from the HF tensors it is made of, as `dtype`."""
  ranges = [range(*part.indices(size)) for part, size in zip(index, entry.shape, strict=True)]
  out = np.empty([len(part) for part in ranges], dtype)
  layers, inner = (ranges[0], ranges[1:]) if entry.stacked else (range(1), ranges)
  if entry.transposed:
    inner = inner[::-1]
  window = tuple(slice(part.start, part.stop) for part in inner)
  for target, layer in zip(out if entry.stacked else [out], layers, strict=True):
    name = entry.hf_name(layer)
    piece = files.slices(checkpoint.tensors[name].file, name)[window]
    if entry.transposed:
      transpose_into(piece, target)
    else:
      target[...] = piece
  return out


def _fresh_head(key: jax.Array, width: int, dtype: Any, mesh: Mesh | None) -> jax.Array:
  """A scalar head [D, 1] from N(0, 1 / (D + 1)), drawn in float32."""
  kernel = (jax.random.normal(key, (width, 1), jnp.float32) / (width + 1)).astype(dtype)
  if mesh is None:
    return kernel
  host = np.asarray(kernel)
  place = sharding.parameter_sharding('scalar_head/kernel', host.shape, mesh)
  return jax.make_array_from_callback(host.shape, place, lambda index: host[index])


def _insert(tree: Params, path: str, leaf: jax.Array) -> None:
  *parents, name = path.split('/')
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[name] = leaf
