"""Loads the weights of low-rank adapters in peft's form: adapter_model.safetensors.

Their description is read by `adapter_config`, what is loaded is defined in `model.lora`, and
`adapter_writer` saves it.
"""

import dataclasses
import re
from typing import Any

import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import Lora
from segjax.errors import UserError
from segjax.hf import checkpoint, placement, tensor_names
from segjax.hf.adapter_config import (
  CONFIG,
  MERGE,
  SCORE,
  WEIGHTS,
  Adapter,
  base_directory,
  is_adapter,
  read_adapter,
  tokenizer_directory,
)
from segjax.hf.checkpoint import Checkpoint
from segjax.hf.config import head_name
from segjax.hf.tensor_names import TensorMapping
from segjax.hf.tensor_slices import SliceReader
from segjax.model.llama import LlamaConfig
from segjax.model.lora import ADAPTER, MATRICES

__all__ = [
  'ADAPTER',
  'Adapter',
  'base_directory',
  'is_adapter',
  'read_adapter',
  'tokenizer_directory',
]

PREFIX = 'base_model.model.'  # of peft's wrappers, before the names of the base

# Of the heads, that of the other kind of network.
_OTHER_HEAD = {'language': 'scalar_head/kernel', 'scalar': 'lm_head/kernel'}


def tensor_mappings(
  config: LlamaConfig, lora: Lora, score: str = '', *, blocks: bool = True
) -> tuple[TensorMapping, ...]:
  """Returns the tensors of an adapter: A and B of each matrix, and then a head that is trained.

  Args:
    config: the network of the base.
    lora: rank and matrices.
    score: HF's name of the scalar head's module; '' for an adapter without one.
    blocks: of fused matrices, see `adapter_config.Adapter`.
  """
  head = 'scalar' if score else 'language'
  whole = tensor_names.tensor_mappings(config, head, score or SCORE)
  by_path = {entry.path: entry for entry in whole}
  entries = []
  for target in lora.targets:
    name = MATRICES[target]
    kernel = by_path[f'backbone/layers/{name}/kernel']
    depth, inner, outer = kernel.shape
    parts = [entry.path for entry in whole if entry.template == kernel.template]
    # The rank of the matrix in the files, and where that of this part begins in it.
    rank, begin = lora.rank, 0
    if blocks:
      rank, begin = len(parts) * rank, parts.index(kernel.path) * rank
    for ours, theirs, shape, hf_whole, place in (
      ('a', 'lora_A', (depth, inner, lora.rank), (rank, inner), (begin, 0)),
      ('b', 'lora_B', (depth, lora.rank, outer), (kernel.hf_shape[0], rank), (kernel.row, begin)),
    ):
      template = kernel.template.replace('.weight', f'.{theirs}.weight')
      path = f'{ADAPTER}/layers/{name}/{ours}'
      entries.append(TensorMapping(path, template, shape, True, True, hf_whole, place))
  # The head, where there is one of its own, is the last of the table.
  return (*entries, whole[-1]) if score or lora.train_head else tuple(entries)


def open_weights(
  adapter: Adapter, config: LlamaConfig
) -> tuple[Checkpoint, tuple[TensorMapping, ...]]:
  """Opens the weights of an adapter; reads their header only.

  Args:
    adapter: the description.
    config: the network of the base.

  Raises:
    UserError: tensors are missing, unexpected or have a wrong shape.
  """
  file = adapter.directory / WEIGHTS
  if not file.is_file():
    files = [path.name for path in adapter.directory.iterdir()]
    raise UserError(checkpoint.no_weights(str(adapter.directory), files))
  header = checkpoint.read_header(file)
  tensors = {_plain_name(name): tensor for name, tensor in header.items()}
  if len(tensors) < len(header):
    raise UserError(f'{file} holds several adapters; save one of them alone.')
  score = ''
  if adapter.has_score:
    own = head_name(checkpoint.read_json(base_directory(adapter) / checkpoint.CONFIG))
    score = own if f'{own}.weight' in tensors else SCORE
  entries = tensor_mappings(config, adapter.lora, score, blocks=adapter.blocks)
  _check(adapter, tensors, entries)
  return Checkpoint(adapter.directory, tensors), entries


def load_trained(
  adapter: Adapter, config: LlamaConfig, head: str, mesh: Mesh | None, *, strict: bool = True
) -> dict[str, Any]:
  """Loads the adapter, and a head beside it that is the network's, in float32.

  Args:
    adapter: the description.
    config: the network of the base.
    head: 'language' or 'scalar', of the network.
    mesh: None puts everything on the default device.
    strict: refuse NaN and infinity among the weights, instead of logging a warning.

  Returns:
    The trees 'adapter' and 'scalar_head' or 'lm_head' of the network's parameters, see
    `model.lora`.

  Raises:
    UserError: tensors are missing, unexpected or have a wrong shape.
  """
  opened, entries = open_weights(adapter, config)
  check_blocks(opened, entries)
  entries = of_network(entries, head)
  dtypes = [np.dtype(np.float32)] * len(entries)
  return placement.load_tensors(opened, entries, dtypes, mesh, strict)


def check_blocks(opened: Checkpoint, entries: tuple[TensorMapping, ...]) -> None:
  """Raises UserError if B of a fused matrix has more than the blocks of ours, see `Adapter`."""
  files = SliceReader(opened)
  for entry in entries:
    own, rank = entry.part[-1], entry.hf_shape[-1]
    if not entry.path.endswith('/b') or own == slice(0, rank):
      continue
    depth, _, outer = entry.shape
    rows = dataclasses.replace(entry, shape=(depth, rank, outer), begin=(entry.row, 0))
    b = files.read(rows, (slice(None),) * 3, np.dtype(np.float32))
    b[:, own] = 0
    if b.any():
      raise UserError(
        f'{opened.directory / CONFIG}: by rank_pattern {entry.hf_name()} is block-diagonal, but '
        f'other elements are not 0, not read; {MERGE}.'
      )


def of_network(entries: tuple[TensorMapping, ...], head: str) -> tuple[TensorMapping, ...]:
  """Returns the tensors of an adapter that a network with this head reads."""
  return tuple(entry for entry in entries if entry.path != _OTHER_HEAD[head])


def _plain_name(name: str) -> str:
  """Returns the name of a tensor without the wrappers and the adapter's name.

  peft leaves out the name of the adapter, a saved state of the whole wrapper does not.
  """
  name = name.rpartition(PREFIX)[2]
  name = f'model.{name}' if name.startswith('layers.') else name
  name = re.sub(r'\.modules_to_save(\.default)?\.weight$', '.weight', name)
  return re.sub(r'\.(lora_[AB])\.default\.weight$', r'.\1.weight', name)


def _check(adapter: Adapter, tensors: dict[str, Any], entries: tuple[TensorMapping, ...]) -> None:
  """Raises UserError unless the adapter holds exactly the tensors of the table."""
  file = adapter.directory / WEIGHTS
  expected = {name: entry.hf_shape for entry in entries for name in entry.hf_names()}
  extra = [name for name in tensors if name not in expected]
  missing = [name for name in expected if name not in tensors]
  for names, verb, reason in (
    (extra, 'holds', 'that are not in it'),
    (missing, 'lacks', 'that are in it'),
  ):
    if names:
      raise UserError(
        f'{file} {verb} {tensor_names.list_tensors(names)} {reason} by {CONFIG} (target_modules, '
        f'modules_to_save) and the base {adapter.base}; use the base that it was trained on, and '
        'adapters of whole matrices of all layers.'
      )
  for name, shape in expected.items():
    if tensors[name].shape != shape:
      raise UserError(
        f'{file} is an adapter for another base than {adapter.base}: tensor {name} has shape '
        f'{list(tensors[name].shape)}, but by that base and r={adapter.lora.rank} it should be '
        f'{list(shape)}' + ('' if '.lora_' in name else ' (num_labels 1)') + '; set '
        f'base_model_name_or_path in {CONFIG} to the base that it was trained on.'
      )
