"""Where arrays live on the devices: the mesh, and one table of parameter and activation layouts.

The only module that names mesh axes. It does not create or move weights: `hf.reader` and `train`
ask it where a tensor belongs.

Axes: `data` replicates the weights, `fsdp` splits weights and batch, `tensor` splits heads, MLP
width and vocabulary. The batch is split over data and fsdp together.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segjax.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')
WEIGHT_AXES = ('fsdp', 'tensor')
_HOST = 'pinned_host'

# One match per tensor: none or two is an error. Optimizer moments carry their parameter's path as
# a suffix, so the same line places them. Stacked layers have L in front. The embedding is split on
# its vocabulary only: splitting the width too makes the partitioner rematerialise it.
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
  (r'backbone/embedding$', P(('tensor', 'fsdp'), None)),
  (r'layers/(query|key|value|gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
  (r'layers/(query|key|value|gate|up)/bias$', P(None, 'tensor')),
  (r'layers/(output|down)/kernel$', P(None, 'tensor', 'fsdp')),
  (r'layers/(output|down)/bias$', P(None, None)),
  (r'layers/(attention_norm|mlp_norm)/scale$', P(None, None)),
  (r'backbone/norm/scale$', P(None)),
  (r'lm_head/kernel$', P('fsdp', 'tensor')),
  (r'scalar_head/kernel$', P(None, None)),
  (r'(^|/)(step|count|bad_steps|notfinite_count)$', P()),
)

ACTIVATION_RULES: dict[str, P] = {
  'tokens': P(BATCH, None),
  # Between the matrix products each device of the tensor axis has a part of the positions, so that
  # what is kept for the backward pass is split too; for the products the parts are gathered.
  'hidden': P(BATCH, 'tensor', None),
  'gathered': P(BATCH, None, None),
  'whole': P(None),
  'product': P(BATCH, None, 'tensor'),
  'flat_heads': P(BATCH, None, 'tensor'),
  'heads': P(BATCH, None, 'tensor', None),
  'logits': P(BATCH, None, 'tensor'),
  'chunked_hidden': P(None, BATCH, None, None),
  'chunked_tokens': P(None, BATCH, None),
  'embedding': P('tensor', None),
  'head': P(None, 'tensor'),
  # Of the decode loop, where the weights stay put, split over fsdp and tensor together.
  'decode_tokens': P('data', None),
  'decode_hidden': P('data', None, None),
  'decode_gathered': P('data', None, None),
  'decode_product': P('data', None, WEIGHT_AXES),
  'decode_flat_heads': P('data', None, WEIGHT_AXES),
  'decode_logits': P('data', None, WEIGHT_AXES),
  'decode_heads': P('data', None, WEIGHT_AXES, None),
  'decode_key': P('data', WEIGHT_AXES, None, None),
  'decode_value': P('data', WEIGHT_AXES, None, None),
  # And where the heads do not divide that far: for attention and sampling, rows are split instead.
  'rows_tokens': P(AXES, None),
  'rows_hidden': P('data', None, None),
  'rows_gathered': P('data', None, None),
  'rows_product': P('data', None, WEIGHT_AXES),
  'rows_flat_heads': P(AXES, None, None),
  'rows_logits': P('data', None, WEIGHT_AXES),
  'rows_heads': P(AXES, None, None, None),
  'rows_key': P(AXES, None, None, None),
  'rows_value': P(AXES, None, None, None),
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Any = None) -> Mesh:
  """The device mesh; one axis may be -1 and takes the devices that the others leave.

  Raises:
    ValueError: where the axes' product is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
    raise UserError(f'mesh={sizes}: axes are positive, and at most one is -1 (the rest).')
  known = math.prod(size for size in sizes if size > 0)
  sizes = [len(devices) // known if size == -1 else size for size in sizes]
  if math.prod(sizes) != len(devices):
    raise UserError(
      f'mesh data x fsdp x tensor = {" x ".join(map(str, sizes))} does not use the {len(devices)} '
      'devices exactly; set one axis to -1 to take what the others leave.'
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


class Sizes(NamedTuple):
  """Devices along each axis."""

  data: int
  fsdp: int
  tensor: int


def sizes(mesh: Mesh) -> Sizes:
  """How many devices each axis of the mesh has."""
  return Sizes(*(mesh.shape[axis] for axis in AXES))


def batch_devices(mesh: Mesh) -> int:
  """Over how many devices the batch is split: every global batch must be a multiple of it."""
  return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(what: str, size: int, mesh: Mesh) -> None:
  """ValueError, naming the sizes that would do, unless `size` rows divide over the mesh."""
  parts = batch_devices(mesh)
  if size % parts:
    below = size // parts * parts
    fits = f'{below} or {below + parts}' if below else str(parts)
    raise UserError(
      f'{what} does not divide over the {parts} devices of the mesh axes data and fsdp; use {fits}.'
    )


def check_heads(heads: int, kv_heads: int, mesh: Mesh) -> None:
  """ValueError unless query and key heads divide over the tensor axis."""
  parts = mesh.shape['tensor']
  if heads % parts or kv_heads % parts:
    raise UserError(
      f'config.mesh.tensor={parts} does not divide the {heads} query and {kv_heads} key heads of '
      f'the network; use a divisor of {math.gcd(heads, kv_heads)}.'
    )


def path_name(path: tuple[Any, ...]) -> str:
  """A pytree path as 'a/b/c'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def parameter_spec(name: str) -> P:
  """The layout of the tensor at path `name`; ValueError unless exactly one rule matches."""
  found = [spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name)]
  if len(found) != 1:
    raise UserError(
      f'{len(found)} rules of PARAMETER_RULES match tensor {name!r}; exactly one must.'
    )
  return found[0]


def _fitted(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """`spec` without the axes that do not divide their dimension (an odd vocabulary, say)."""
  entries = []
  for dim, entry in zip(shape, tuple(spec), strict=True):
    axes = [entry] if isinstance(entry, str) else list(entry or ())
    while axes and dim % math.prod(mesh.shape[axis] for axis in axes):
      axes.pop()
    entries.append(tuple(axes) or None)
  return P(*entries)


def parameter_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Where the tensor `name` of `shape` lives on `mesh`."""
  return NamedSharding(mesh, _fitted(parameter_spec(name), shape, mesh))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """The sharding of every leaf of a tree of arrays or shapes: parameters or optimizer state."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: parameter_sharding(path_name(path), leaf.shape, mesh), tree
  )


def _active_mesh() -> AbstractMesh | None:
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def constrain(x: jax.Array, name: str, stack: tuple[None, ...] = ()) -> jax.Array:
  """Lays activation `x` out as ACTIVATION_RULES[name]; no mesh set, no change.

  `stack` has a None for each axis that stands before those of the rule.
  """
  mesh = _active_mesh()
  if mesh is None:
    return x
  spec = P(*stack, *ACTIVATION_RULES[name])
  return jax.lax.with_sharding_constraint(x, _fitted(spec, x.shape, mesh))


def shard_map_activations(
  function: Callable[..., jax.Array], names: tuple[str, ...], result: str
) -> Callable[..., jax.Array]:
  """`function` on every device's own part of arrays laid out as ACTIVATION_RULES[names].

  It must need nothing of the other parts. Arrays may be None; without a mesh it is `function`.
  """

  def run(*arrays):
    mesh = _active_mesh()
    if mesh is None:
      return function(*arrays)
    specs = tuple(
      None if x is None else _fitted(ACTIVATION_RULES[name], x.shape, mesh)
      for name, x in zip(names, arrays, strict=True)
    )
    out = _fitted(ACTIVATION_RULES[result], arrays[names.index(result)].shape, mesh)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(
      *arrays
    )

  return run


def constrain_batch(x: jax.Array) -> jax.Array:
  """Splits x, of any rank, along its first axis; no mesh set, no change."""
  mesh = _active_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, _fitted(_batch_spec(x.ndim), x.shape, mesh))


def _batch_spec(rank: int) -> P:
  return P(BATCH, *(None,) * (rank - 1))


def constrain_tree(tree: Any) -> Any:
  """Lays parameters or optimizer state out by the table, at the end of a jitted step."""
  return _constrain_tree(tree, lambda entry: entry)


def decode_layout(kv_heads: int, mesh: Mesh) -> str:
  """The layout of a decode loop, a prefix of names in ACTIVATION_RULES.

  Both split the weights over fsdp and tensor together, so that no step gathers one. 'decode_'
  splits the cache by heads; 'rows_', where the key heads do not divide that far, by rows over all
  devices, for which queries, keys and values of a step change places.
  """
  return 'rows_' if kv_heads % math.prod(mesh.shape[axis] for axis in WEIGHT_AXES) else 'decode_'


def decode_rows(layout: str, mesh: Mesh) -> int:
  """Over how many devices that layout splits rows."""
  return mesh.size if layout == 'rows_' else mesh.shape['data']


def decode_sharding(tree: Any) -> Any:
  """Parameters laid out for a decode loop, in which none of them is gathered."""
  return _constrain_tree(tree, lambda entry: WEIGHT_AXES if 'tensor' in _axes(entry) else None)


def _constrain_tree(tree: Any, change: Callable[[Any], Any]) -> Any:
  """Lays the tree out by the table, each entry of a layout changed first."""
  mesh = _active_mesh()
  if mesh is None:
    return tree

  def place(path, x):
    spec = parameter_spec(path_name(path))
    spec = P(*(change(entry) for entry in tuple(spec)))
    return jax.lax.with_sharding_constraint(x, _fitted(spec, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(place, tree)


def _axes(entry: Any) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def batch_sharding(rank: int, mesh: Mesh) -> NamedSharding:
  """Split along the first axis."""
  return NamedSharding(mesh, _batch_spec(rank))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device has the whole."""
  return NamedSharding(mesh, P())


def place_batch(tree: Any, mesh: Mesh) -> Any:
  """Host arrays [B, ...] onto the mesh, split along B.

  Raises:
    ValueError: where B does not divide; it names the nearest sizes that do.
  """

  def place(x):
    x = np.asarray(x)
    check_batch(f'a batch of {x.shape[0]} rows', x.shape[0], mesh)
    return jax.make_array_from_callback(
      x.shape, batch_sharding(x.ndim, mesh), lambda index: x[index]
    )

  return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
  """The arrays in the memory of the host they are at, laid out as before.

  Raises:
    ValueError: the devices cannot read from there.
  """
  device = next(iter(jax.tree.leaves(tree)[0].devices()))
  if _HOST not in {memory.kind for memory in device.addressable_memories()}:
    raise UserError(
      f'config.runtime.frozen_params_memory=host: {device.device_kind} devices cannot read the '
      'memory of '
      'the host; use device.'
    )
  return _in_memory(tree, _HOST)


def to_device(tree: Any) -> Any:
  """What `to_host` put away, back on the devices; arrays that are there stay."""
  return _in_memory(tree, 'device')


def _in_memory(tree: Any, kind: str) -> Any:
  return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


def replicate(x: Any, mesh: Mesh) -> jax.Array:
  """A host value as an array that every device holds whole."""
  return jax.device_put(jnp.asarray(x), replicated(mesh))
