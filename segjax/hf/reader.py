"""Loads HF safetensors into our parameter tree; each device reads only the slices it holds.

Names are mapped by `tensor_names`, shardings are defined in `model.sharding`, slices are put onto
devices by `placement`.
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.errors import UserError
from segjax.hf import placement, tensor_names
from segjax.hf.adapter import (
  Adapter,
  base_directory,
  is_adapter,
  load_trained,
  open_weights,
  read_adapter,
)
from segjax.hf.checkpoint import (
  CONFIG,
  INDEX,
  WEIGHTS,
  Checkpoint,
  open_checkpoint,
  read_json,
  refuse_adapter,
  resolve_checkpoint,
  without_wrapper,
)
from segjax.hf.config import config_from_hf, head_name
from segjax.hf.score_head import load_score_head
from segjax.hf.tensor_names import list_tensors
from segjax.hf.tensor_slices import DTYPES, SliceReader, describe_not_finite
from segjax.model.llama import LlamaConfig
from segjax.model.lora import HEAD, place

__all__ = ['DTYPES', 'load_config', 'load_params', 'open_checkpoint', 'resolve_checkpoint']

Params = dict[str, Any]

_IGNORED = r'(^|\.)rotary_emb\.inv_freq$'  # a buffer in old checkpoints
_SCALAR_HEAD = 'scalar_head/kernel'


def load_config(path: str | Path, **runtime: Any) -> LlamaConfig:
  """Returns the network of a checkpoint or hub id; `runtime` sets dtype, remat, attention.

  That of an adapter is the one of its base, with `lora`.
  """
  directory = resolve_checkpoint(path)
  if not is_adapter(directory):
    return config_from_hf(directory, **runtime)
  adapter = read_adapter(directory)
  return config_from_hf(base_directory(adapter), lora=adapter.lora, **runtime)


def load_params(
  path: str | Path,
  config: LlamaConfig,
  head: str,
  mesh: Mesh | None = None,
  dtype: str | Callable[[str], str] = 'float32',
  key: jax.Array | None = None,
  strict: bool = False,
) -> Params:
  """Loads the parameters of a checkpoint, cast on the way and sharded by `sharding`'s table.

  A scalar head that the checkpoint lacks is drawn from N(0, 1 / (D + 1)²); a language model's head
  is left out of a scalar model. Those of an adapter are its base's and its own, in float32.

  Args:
    path: local directory or hub id.
    config: the network.
    head: 'language' or 'scalar'.
    mesh: None puts everything on the default device.
    dtype: dtype of the parameters, or a function that returns it for a path; '' keeps each tensor's
      own.
    key: random key of a fresh scalar head.
    strict: refuse NaN and infinity among the weights, instead of logging a warning.

  Raises:
    ValueError: tensors are missing, unexpected or have a wrong shape, or a scalar head has to be
      drawn without a key.
  """
  directory = resolve_checkpoint(path)
  if is_adapter(directory):
    adapter = _open_adapter(directory, head)
    # First: it is small, and what is wrong with it is known before the base is read.
    trained = load_trained(adapter, config, head, mesh, strict=strict)
    if adapter.has_score:
      key = jax.random.key(0)  # of a head that the adapter's replaces
    base = base_directory(adapter)
    return load_params(base, config, head, mesh, dtype, key, strict) | trained
  dtype_of = dtype if callable(dtype) else lambda _: dtype
  checkpoint, entries = open_model(directory, config, head)
  for entry in entries:
    if dtype_of(entry.path) not in ('', *DTYPES.values()):
      raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES.values())} or ''.")
  own_score = config.score if head == 'scalar' else None
  fresh = head == 'scalar' and entries[-1].path != _SCALAR_HEAD and not own_score
  if fresh and key is None:
    raise UserError(
      f'{checkpoint.directory} has no scalar head; provide a random key to draw one, or a reward '
      'model.'
    )
  dtypes = [
    resolve_dtype(checkpoint, entry, dtype_of(entry.path)) for entry in entries
  ]  # before any is read
  params = placement.load_tensors(checkpoint, entries, dtypes, mesh, strict)
  if own_score:
    params['scalar_head'] = load_score_head(checkpoint, own_score, mesh)
  if fresh:
    own = dtype_of(_SCALAR_HEAD) or params['backbone']['embedding'].dtype
    params['scalar_head'] = {'kernel': init_scalar_head(key, config.hidden_size, own, mesh)}
  return params


def open_model(
  path: str | Path, config: LlamaConfig, head: str
) -> tuple[Checkpoint, tuple[tensor_names.TensorMapping, ...]]:
  """Opens a checkpoint as `open_headers` does.

  Only if a tied model has a head in its file, that is read, and compared with the embedding.

  Raises:
    ValueError: tensors are missing, unexpected or have a wrong shape, or it is an adapter.
  """
  refuse_adapter(resolve_checkpoint(path))
  checkpoint, entries = open_headers(path, config, head)
  if head == 'language' and config.tie_word_embeddings:
    _check_tied(checkpoint)
  return checkpoint, entries


def open_headers(
  path: str | Path, config: LlamaConfig, head: str
) -> tuple[Checkpoint, tuple[tensor_names.TensorMapping, ...]]:
  """Opens a checkpoint, or the base of an adapter, and returns it with the tensors of ours in it.

  These are all tensors of the model, except a scalar head if the checkpoint has none. Names and
  shapes are checked by the headers alone. A language model's head is not part of a scalar model.

  Args:
    path: local directory or hub id.
    config: the network.
    head: 'language' or 'scalar'.

  Raises:
    ValueError: tensors are missing, unexpected or have a wrong shape.
  """
  directory = resolve_checkpoint(path)
  if is_adapter(directory):
    adapter = _open_adapter(directory, head)
    open_weights(adapter, config)
    directory = base_directory(adapter)
  checkpoint = without_wrapper(open_checkpoint(directory))
  score = head_name(read_json(checkpoint.directory / CONFIG))
  entries = tensor_names.tensor_mappings(config, head, score)
  other = config.score.names if head == 'scalar' and config.score else ()
  if head == 'scalar' and (other or f'{score}.weight' not in checkpoint.tensors):
    entries = entries[:-1]  # the scalar head is the last one of the table
  _check(checkpoint, entries, head, other)
  return checkpoint, entries


def has_scalar_head(path: str | Path, config: LlamaConfig) -> bool:
  """Returns whether a checkpoint, an adapter or its base has a scalar head, by the headers alone.

  Raises:
    ValueError: tensors are missing, unexpected or have a wrong shape.
  """
  directory = resolve_checkpoint(path)
  entries = open_headers(directory, config, 'scalar')[1]
  own = is_adapter(directory) and read_adapter(directory).has_score
  return own or config.score is not None or entries[-1].path == _SCALAR_HEAD


def resolve_dtype(
  checkpoint: Checkpoint, entry: tensor_names.TensorMapping, dtype: str
) -> np.dtype:
  """Returns `dtype`, or if that is empty the dtype of the HF tensors of `entry`.

  Raises:
    ValueError: `dtype` is empty and they have several.
  """
  own = {checkpoint.tensors[name].dtype: name for name in entry.hf_names()}
  if not dtype and len(own) > 1:
    name = next(iter(own.values()))
    raise UserError(
      f'{checkpoint.tensors[name].file}: tensor {name} is {checkpoint.tensors[name].dtype}, but '
      f'the layers of {entry.template} have dtypes {", ".join(sorted(own))}, and stacked layers '
      'need a single one; set the dtype to load them in.'
    )
  return jnp.dtype(dtype or DTYPES[next(iter(own))])


def init_scalar_head(key: jax.Array, width: int, dtype: Any, mesh: Mesh | None = None) -> jax.Array:
  """Returns a scalar head [D, 1] from N(0, 1 / (D + 1)²), drawn in float32."""
  kernel = (jax.random.normal(key, (width, 1), jnp.float32) / (width + 1)).astype(dtype)
  if mesh is None:
    return kernel
  # Every process draws the same kernel from the key and places its own part.
  return place({HEAD: {'kernel': kernel}}, mesh)[HEAD]['kernel']


def find_not_finite(checkpoint: Checkpoint, entries: tuple[tensor_names.TensorMapping, ...]) -> str:
  """Reads every weight once; returns a message about NaN and infinity, '' if there are none."""
  files = SliceReader(checkpoint)
  with ThreadPoolExecutor(placement.THREADS) as pool:
    names = {name: None for entry in entries for name in entry.hf_names()}
    # list() waits, and raises the first error.
    list(pool.map(files.check, names))
  return describe_not_finite(files.not_finite) if files.not_finite else ''


def _open_adapter(directory: Path, head: str) -> Adapter:
  """Returns the description of an adapter; ValueError if it is not that of the head."""
  adapter = read_adapter(directory)
  if adapter.has_score and head == 'language':
    raise UserError(
      f'{directory} holds the scalar head of a reward model or critic; name an adapter of a '
      'language model.'
    )
  return adapter


def _check(
  checkpoint: Checkpoint,
  entries: tuple[tensor_names.TensorMapping, ...],
  head: str,
  other: tuple[str, ...] = (),
) -> None:
  """Raises ValueError unless the checkpoint holds exactly the tensors of the table, and `other`."""
  tensors = checkpoint.tensors
  expected = {name: entry.hf_shape for entry in entries for name in entry.hf_names()}
  # Names before shapes: a config of another model shows best in what is missing.
  missing = [name for name in expected if name not in tensors]
  if missing:
    single = checkpoint.directory / WEIGHTS
    file = single if single.is_file() else checkpoint.directory / INDEX
    raise UserError(
      f'{file} lacks {list_tensors(missing)} of a {head} model; check {CONFIG} against the files '
      '(number of layers, tie_word_embeddings) and the requested head.'
    )
  # A head may be left over: of a reward model its language head, of a tied model a copy of the
  # embedding.
  known = {*expected, *other, 'lm_head.weight'}
  extra = [name for name in tensors if name not in known and not re.search(_IGNORED, name)]
  if extra:
    raise UserError(
      f'{tensors[extra[0]].file} holds {list_tensors(extra)} that a {head} model with its '
      f'{CONFIG} does not have; check the number of layers, attention_bias, mlp_bias and the '
      'requested head.'
    )
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise UserError(
        f'{tensors[name].file}: tensor {name} has shape {list(tensors[name].shape)}, but by its '
        f'{CONFIG} it should be {list(shape)}'
        + (' (num_labels 1)' if shape[0] == 1 else '')
        + '; use the config that belongs to the weights.'
      )


def _check_tied(checkpoint: Checkpoint) -> None:
  """Raises ValueError if a tied model's file has a head that differs from its embedding.

  transformers 4 drops such a head, transformers 5 uses it.
  """
  head, embedding = 'lm_head.weight', 'model.embed_tokens.weight'
  if head in checkpoint.tensors and not SliceReader(checkpoint).bits_equal(head, embedding):
    raise UserError(
      f'{checkpoint.tensors[head].file}: tensor {head} is not {embedding}, although {CONFIG} ties '
      'them (tie_word_embeddings); set it to false to use the head, or remove the head.'
    )
