"""Where arrays live on the devices of a mesh: one table of parameter and activation layouts.

Only this module and `mesh` name mesh axes. Neither creates nor loads weights: `hf.reader` and
`train` ask here where a tensor belongs.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from segjax.errors import UserError
from segjax.model.mesh import AXES, BATCH, check_batch

# Exactly one rule matches each tensor; none or two is an error. Optimizer moments carry their
# parameter's path as a suffix, so the same rule applies to them. Stacked layers have L in front.
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
  # As the head, transposed. Devices that have other rows exchange columns of the hidden states of
  # their tokens; with parts of the vocabulary they would add up rows of all tokens of all devices.
  (r'backbone/embedding$', P('tensor', 'fsdp')),
  # Columns over tensor here, rows over tensor in output and down: between the two products no
  # device needs heads or MLP columns of another.
  (r'layers/(query|key|value|gate|up)/kernel$', P(None, 'fsdp', 'tensor')),
  (r'layers/(query|key|value|gate|up)/(bias|scale)$', P(None, 'tensor')),
  (r'layers/(output|down)/kernel$', P(None, 'tensor', 'fsdp')),
  # Of the sum over tensor, which has the full width.
  (r'layers/(output|down)/(bias|scale)$', P(None, None)),
  (r'layers/(attention|query|key|mlp)_norm/scale$', P(None, None)),
  (r'backbone/norm/scale$', P(None)),
  # Of adapters, A is split as the input of its matrix and B as the output; where that leaves fsdp,
  # it splits the rank, or each device would hold half of the moments in full.
  (r'layers/(query|key|value|gate|up)/a$', P(None, 'fsdp', None)),
  (r'layers/(query|key|value|gate|up)/b$', P(None, 'fsdp', 'tensor')),
  (r'layers/(output|down)/a$', P(None, 'tensor', 'fsdp')),
  (r'layers/(output|down)/b$', P(None, None, 'fsdp')),
  (r'lm_head/kernel$', P('fsdp', 'tensor')),
  (r'scalar_head/(hidden/)?kernel$', P(None, None)),  # one column, too small to split
  (r'scalar_head/(hidden/)?bias$', P(None)),
  (r'(^|/)(step|seed|count|notfinite_count)$', P()),
)

ACTIVATION_RULES: dict[str, P] = {
  'tokens': P(BATCH, None),
  # Sequence parallelism: between the matrix products each device of the tensor axis holds a part of
  # the positions, so that the activations saved for the backward pass are split too. For the
  # products the parts are gathered.
  'hidden': P(BATCH, 'tensor', None),
  'gathered': P(BATCH, None, None),
  'replicated': P(None),
  'product': P(BATCH, None, 'tensor'),
  # Attention needs all positions and no other head: split by heads, it exchanges nothing.
  'heads': P(BATCH, None, 'tensor', None),
  # Split by vocabulary: a softmax exchanges its sums, [B, S], and no device holds [B, S, V].
  'logits': P(BATCH, None, 'tensor'),
  # Decoding has a mesh of its own, see `mesh.decode_mesh`, and never gathers a weight.
  'scalar': P(),
  'decode_rows': P('data'),
  # Keys or values in pages [K, groups L N, P, h]; on TPU both in one, [groups L N, P, 2 K, h].
  'decode_pages': P('tensor', 'data', None, None),
  'decode_ragged_pages': P('data', None, 'tensor', None),
  # Without a backward pass no activations are saved, so positions need not be split.
  'decode_hidden': P('data', None, None),
  'decode_gathered': P('data', None, None),
  'decode_product': P('data', None, 'tensor'),
  'decode_logits': P('data', None, 'tensor'),
  'decode_heads': P('data', None, 'tensor', None),
  'decode_key': P('data', 'tensor', None, None),
  'decode_value': P('data', 'tensor', None, None),
  # Before sampling: each device takes a part of the rows, instead of gathering those of its group.
  'decode_row_logits': P(('data', 'tensor'), None),
}


def path_name(path: tuple[Any, ...]) -> str:
  """Returns a pytree path as 'a/b/c'."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def parameter_spec(name: str) -> P:
  """Returns the layout of the tensor at path `name`.

  Raises:
    UserError: no rule matches, or more than one.
  """
  matches = [spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name)]
  # A default for unmatched names would leave a large new tensor on every device, unnoticed.
  if len(matches) != 1:
    raise UserError(
      f'{len(matches)} rules of PARAMETER_RULES match tensor {name!r}; exactly one must.'
    )
  return matches[0]


def fitted(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
  """Drops from `spec` the axes that do not divide their dimension (such as an odd vocabulary)."""
  entries = []
  for dim, entry in zip(shape, tuple(spec), strict=True):
    axes = list(axes_of(entry))
    while axes and dim % math.prod(mesh.shape[axis] for axis in axes):
      axes.pop()
    entries.append(tuple(axes) or None)
  return P(*entries)


def parameter_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
  """Returns the sharding of the tensor `name` of `shape` on `mesh`."""
  return NamedSharding(mesh, fitted(parameter_spec(name), shape, mesh))


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
  """Returns the sharding of every leaf of parameters or optimizer state, arrays or shapes."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: parameter_sharding(path_name(path), leaf.shape, mesh), tree
  )


def active_mesh() -> AbstractMesh | None:
  """Returns the mesh of the `jax.set_mesh` context, None outside one."""
  # While jit traces, only the abstract mesh of the `jax.set_mesh` context is available.
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def constrain(x: jax.Array, name: str) -> jax.Array:
  """Constrains activation `x` to ACTIVATION_RULES[name]; without a mesh it returns x unchanged."""
  mesh = active_mesh()
  if mesh is None:
    return x
  # Without a constraint the partitioner chooses the layout, and may gather a weight for it.
  spec = fitted(ACTIVATION_RULES[name], x.shape, mesh)
  return jax.lax.with_sharding_constraint(x, spec)


def shard_map_activations(
  function: Callable[..., jax.Array], names: tuple[str, ...], result: str
) -> Callable[..., jax.Array]:
  """Returns `function` mapped over the shards of arrays laid out as ACTIVATION_RULES[names].

  The shards must not depend on each other. Arrays may be None; without a mesh the result is
  `function` itself.
  """

  def run(*arrays):
    mesh = active_mesh()
    if mesh is None:
      return function(*arrays)
    # The partitioner cannot look into a Pallas call: without shard_map it gathers the arguments.
    specs = tuple(
      None if x is None else fitted(ACTIVATION_RULES[name], x.shape, mesh)
      for name, x in zip(names, arrays, strict=True)
    )
    # With the shape of the argument of that name: an axis dropped there is dropped here too.
    out = fitted(ACTIVATION_RULES[result], arrays[names.index(result)].shape, mesh)
    # check_vma=False: a Pallas kernel does not declare how its outputs vary over the mesh.
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(
      *arrays
    )

  return run


def shard_map_named(function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
  """Returns `function` mapped over the shards of arrays laid out as ACTIVATION_RULES[name].

  Args:
    function: of one device's arrays; without a mesh it is returned itself.
    inputs: names, a prefix of the tree of arguments.
    outputs: names, a prefix of the tree that the function returns.
  """

  def run(*arrays):
    mesh = active_mesh()
    if mesh is None:
      return function(*arrays)
    rules = ACTIVATION_RULES.__getitem__
    specs = jax.tree.map(rules, inputs), jax.tree.map(rules, outputs)
    # check_vma=False: a Pallas kernel does not declare how its outputs vary over the mesh.
    mapped = jax.shard_map(
      function, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
    )
    return mapped(*arrays)

  return run


def splits_rows() -> bool:
  """Returns whether devices of a decode loop sample different rows."""
  mesh = active_mesh()
  return mesh is not None and mesh.size > 1


def constrain_batch(x: jax.Array) -> jax.Array:
  """Splits x, of any rank, along its first axis; without a mesh it returns x unchanged."""
  mesh = active_mesh()
  if mesh is None:
    return x
  return jax.lax.with_sharding_constraint(x, fitted(_batch_spec(x.ndim), x.shape, mesh))


def _batch_spec(rank: int) -> P:
  return P(BATCH, *(None,) * (rank - 1))


def constrain_tree(tree: Any) -> Any:
  """Constrains parameters or optimizer state to the table, at the end of a jitted step."""
  mesh = active_mesh()
  if mesh is None:
    return tree
  # Outputs laid out like the inputs can reuse donated buffers, and the next call compiles nothing.
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jax.lax.with_sharding_constraint(
      x, fitted(parameter_spec(path_name(path)), x.shape, mesh)
    ),
    tree,
  )


def decode_sharding(tree: Any) -> Any:
  """Constrains parameters to the layout of a decode loop, which gathers none of them.

  Call it in a context of the decode mesh, with parameters that lie on the training mesh of the same
  devices. They cross devices here, each at most once.
  """
  mesh = active_mesh()
  if mesh is None or mesh.size == 1:
    return tree

  def move(path, x):
    spec = parameter_spec(path_name(path))
    x = _exchange(x, spec, mesh)
    # The dimension over tensor stays split, that over fsdp is made complete: then a product gathers
    # no weight and at most sums activations.
    spec = P(*('tensor' if 'tensor' in axes_of(entry) else None for entry in spec))
    return jax.lax.with_sharding_constraint(x, fitted(spec, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(move, tree)


def _exchange(x: jax.Array, spec: P, mesh: AbstractMesh) -> jax.Array:
  """Constrains a parameter to the layout between that of training and that of the decode mesh.

  If r groups of the decode mesh share one copy of the training mesh, tensor is split as in a group
  and fsdp over the r groups: the exchange stays inside the groups, and a gather over r follows.
  Asked to do both at once, the partitioner gathers the complete weight on every device.
  """
  source = jax.typeof(x).sharding.mesh.shape or mesh.shape
  few, many = sorted((source['tensor'], mesh.shape['tensor']))
  data = source['data']
  # Axes of which those of both meshes are products: the partitioner can then relate the two, and
  # does not give up on the layout of its outputs. `decode_mesh` makes `few` a divisor of `many`.
  sizes = data, mesh.size // data // many, many // few, few
  between = AbstractMesh(sizes, (*AXES, 'more_tensor'), axis_types=(AxisType.Auto,) * len(sizes))
  if mesh.shape['tensor'] == many:
    axes = {'fsdp': ('fsdp',), 'tensor': ('tensor', 'more_tensor')}
  else:
    axes = {'fsdp': ('fsdp', 'tensor'), 'tensor': ('more_tensor',)}
  spec = P(*(sum((axes[axis] for axis in axes_of(entry)), ()) for entry in spec))
  return jax.lax.with_sharding_constraint(x, NamedSharding(between, fitted(spec, x.shape, between)))


def axes_of(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of an entry of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def batch_sharding(rank: int, mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits an array along its first axis."""
  return NamedSharding(mesh, _batch_spec(rank))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Returns the sharding that gives every device a full copy."""
  return NamedSharding(mesh, P())


def place_batch(tree: Any, mesh: Mesh) -> Any:
  """Puts host arrays [B, ...] on the mesh, split along B.

  Raises:
    UserError: B does not divide over the devices; the message names sizes that do.
  """

  def put(x):
    x = np.asarray(x)
    check_batch(f'a batch of {x.shape[0]} rows', x.shape[0], mesh)
    # Each process copies only the rows of its own devices.
    return jax.make_array_from_callback(
      x.shape, batch_sharding(x.ndim, mesh), lambda index: x[index]
    )

  return jax.tree.map(put, tree)
