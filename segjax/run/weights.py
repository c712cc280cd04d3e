"""The weights of a run: those that are trained, and frozen ones, each of which is loaded once.

Networks that add adapters to one base share its arrays, see `model.lora`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from segjax.config.settings import Lora, Runtime
from segjax.data.tokenizer import ChatTokenizer
from segjax.errors import UserError
from segjax.hf import adapter_config, hub, reader
from segjax.hf.adapter import load_trained
from segjax.hf.adapter_writer import save_adapter
from segjax.hf.model_card import Card
from segjax.hf.writer import save_checkpoint
from segjax.model.llama import LlamaConfig
from segjax.model.lora import ADAPTER, HEAD, LM_HEAD, init_adapter
from segjax.model.precision import cast_for_use, stored_dtype
from segjax.report.console import NO_BREAK

Params = dict[str, Any]


class Trainable(NamedTuple):
  """A network that is trained: `base | params`, of which `params` are updated."""

  params: Params
  base: Params

  def describe(self) -> str:
    """Returns how many parameters are trained."""
    count, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in self)
    if not frozen:
      return f'{count:,} parameters'
    return f'{count:,} parameters ({count / frozen:.2%}) beside a base of {frozen:,}'


class Weights:
  """Loads the weights of a run.

  Args:
    runtime: config.runtime.
    mesh: the devices.
  """

  def __init__(self, runtime: Runtime, mesh: Mesh):
    self._runtime, self._mesh = runtime, mesh
    self._loaded: dict[tuple[Path, str], Params] = {}

  def frozen(self, directory: Path, config: LlamaConfig, head: str) -> Params:
    """Returns the parameters of a checkpoint or adapter, in config.runtime.compute_dtype.

    Args:
      directory: of the checkpoint or adapter.
      config: the network.
      head: 'language' or 'scalar'.
    """
    if not adapter_config.is_adapter(directory):
      return self._checkpoint(directory, config, head)
    adapter = adapter_config.read_adapter(directory)
    own = load_trained(adapter, config, head, self._mesh)
    if LM_HEAD in own:
      own[LM_HEAD] = cast_for_use(own[LM_HEAD], self._runtime.compute_dtype)  # it is large
    return self._below(adapter_config.base_directory(adapter), config, head) | own

  def trained(
    self, directory: Path, config: LlamaConfig, head: str, key: jax.Array | None = None
  ) -> Trainable:
    """Returns a network to be trained: adapters and a head if config.lora, else all of it.

    Args:
      directory: of the first weights; an adapter's are trained further.
      config: the network.
      head: 'language' or 'scalar'.
      key: draws what the directory lacks: a scalar head, and an adapter.
    """
    if config.lora is None:
      return Trainable(load_params(directory, config, head, self._runtime, self._mesh, key), {})
    path, own = directory, {}
    if adapter_config.is_adapter(directory):
      adapter = adapter_config.read_adapter(directory)
      path = adapter_config.base_directory(adapter)
      own = load_trained(adapter, config, head, self._mesh)
    base = self._below(path, config, head)
    if not own:
      layers, adapter_key = base['backbone']['layers'], jax.random.fold_in(key, 1)
      own = {ADAPTER: init_adapter(adapter_key, layers, config.lora, self._mesh)}
    if head == 'scalar' and HEAD not in own:
      own[HEAD] = self._first_head(base, config, key)
    if head == 'language' and config.lora.train_head and LM_HEAD not in own:
      # A copy, in float32 as other trained heads: a step donates it, and the base stays.
      own[LM_HEAD] = jax.tree.map(lambda x: jnp.array(x, jnp.float32), base[LM_HEAD])
    return Trainable(own, base)

  def forget(self) -> None:
    """Drops what is loaded; arrays that are still used live on."""
    self._loaded.clear()

  def _below(self, directory: Path, config: LlamaConfig, head: str) -> Params:
    """Returns the base of an adapter, which a language model on the same base shares."""
    if head == 'language' or reader.has_scalar_head(directory, config):
      return self._checkpoint(directory, config, head)
    shared = self._checkpoint(directory, config, 'language')
    return {name: tree for name, tree in shared.items() if name != LM_HEAD}

  def _checkpoint(self, directory: Path, config: LlamaConfig, head: str) -> Params:
    name = directory.resolve(), head
    if name not in self._loaded:
      plain = dataclasses.replace(config, lora=None)
      self._loaded[name] = load_params(
        directory, plain, head, self._runtime, self._mesh, trained=False
      )
    return self._loaded[name]

  def _first_head(self, base: Params, config: LlamaConfig, key: jax.Array) -> Params:
    if HEAD in base:
      return jax.tree.map(jnp.copy, base[HEAD])  # a step donates it, and the base stays
    return {'kernel': reader.init_scalar_head(key, config.hidden_size, 'float32', self._mesh)}


def load_params(
  directory: Path,
  config: LlamaConfig,
  head: str,
  runtime: Runtime,
  mesh: Mesh,
  key: jax.Array | None = None,
  *,
  trained: bool = True,
) -> Params:
  """Loads the parameters of a checkpoint, in config.runtime.param_dtype if they are trained.

  Norms and heads stay in float32, see `model.precision`.

  Args:
    head: 'language' or 'scalar'.
    key: draws a scalar head where the checkpoint has none.
  """
  # Frozen weights are only read: cast at loading, they need no copy in another dtype.
  dtype = runtime.param_dtype if trained else runtime.compute_dtype
  dtype_of = functools.partial(
    stored_dtype, dtype=dtype, trained=trained, tied=config.tie_word_embeddings
  )
  # NaN in one weight is NaN in every score: refused before the first step.
  return reader.load_params(
    directory, config, head, mesh=mesh, dtype=dtype_of, key=key, strict=True
  )


def check_adapter(directory: Path, stored: Lora | None, lora: Lora | None, network: str) -> None:
  """Raises UserError if a network cannot be trained from the weights of `directory`.

  Args:
    directory: of the first weights.
    stored: of the adapter there; None for a checkpoint.
    lora: of config.lora for the network.
    network: its name in config.lora.
  """
  # An adapter that has left the head of its base may be trained further with one.
  if stored is None or (lora and stored in (lora, dataclasses.replace(lora, train_head=False))):
    return
  merge = f'merge it: segjax convert merge {directory} OUT'
  settings = ' '.join(
    f'--config.lora.{network}.{name}={",".join(value) if isinstance(value, tuple) else value}'
    for name, value in vars(stored).items()
    if lora is None or value != getattr(lora, name)
    if name != 'train_head' or value
  )
  wanted = 'trains all weights' if lora is None else 'asks for another one'
  raise UserError(
    f'{directory} is an adapter, and config.lora.{network} {wanted}; to train it further set '
    f'{settings}, or {merge}.'
  )


def base_directory(directory: Path) -> Path:
  """Returns the checkpoint that holds the weights of a directory: an adapter's base, or itself."""
  if not adapter_config.is_adapter(directory):
    return directory.resolve()
  return adapter_config.base_directory(adapter_config.read_adapter(directory)).resolve()


def names_on_one_base(paths: dict[str, Path], configs: dict[str, LlamaConfig]) -> tuple[str, ...]:
  """Returns the networks that are the base of the reference, with adapters or without.

  Returns () where none of them has adapters: then no two of them share weights.

  Args:
    paths: of each network.
    configs: of each network.
  """
  base = base_directory(paths['reference'])
  # A network that is trained without adapters leaves its base.
  frozen = [name for name in paths if name == 'reference' or configs[name].lora]
  names = tuple(name for name in frozen if base_directory(paths[name]) == base)
  return names if len(names) > 1 else ()


def save_network(
  directory: Path,
  params: Params,
  config: LlamaConfig,
  head: str,
  *,
  source: Path,
  card: Card,
  tokenizer: ChatTokenizer,
) -> None:
  """Writes what was trained: an HF checkpoint, or an adapter in the form of peft.

  Args:
    directory: to write.
    params: of `Trainable`.
    config: the network.
    head: 'language' or 'scalar'.
    source: directory of the first weights.
    card: fields of README.md.
    tokenizer: that the model was trained with.
  """
  others = {'source': source, 'card': card, 'tokenizer': tokenizer}
  if config.lora is None:
    save_checkpoint(directory, params, config, head, **others)
    return
  base = hub.id_of(source) or str(source.absolute())
  if adapter_config.is_adapter(source):
    base = adapter_config.read_adapter(source).base  # one adapter, not one on another
  save_adapter(directory, params, config, head, base=base, **others)


def log_memory(trees: dict[str, Any], mesh: Mesh, log: Callable[[str], None]) -> None:
  """Logs the memory of each tree per device; activations come on top, see `tools/plan.py`.

  Arrays of several trees count in the first.
  """
  sizes, counted = {}, set()
  for name, tree in trees.items():
    leaves = {id(x): x for x in jax.tree.leaves(tree) if id(x) not in counted}
    counted |= leaves.keys()
    if leaves:
      # A single shard: the other devices hold as much.
      sizes[name] = sum(x.addressable_shards[0].data.nbytes for x in leaves.values())
  stats = mesh.local_devices[0].memory_stats() or {}  # none on CPU
  limit = f', of {_memory(stats["bytes_limit"])}' if 'bytes_limit' in stats else ''
  parts = ', '.join(f'{name}{NO_BREAK}{_memory(size)}' for name, size in sizes.items())
  log(f'memory per device: {parts}{limit}')


def _memory(size: int) -> str:
  return f'{size / 2**30:.1f}{NO_BREAK}GiB' if size >= 2**30 else f'{size / 2**20:.1f}{NO_BREAK}MiB'
