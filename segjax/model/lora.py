"""Low-rank adapters on a frozen network: y = x W + s (x A) B, with s of `settings.Lora.scale`.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. Parameters of a network with adapters are those
of its base, and {'adapter': {'layers': {'query': {'a': A, 'b': B}, ...}}} beside them. What is
trained, adapters and a scalar head, is a tree of its own, and `base | trained` is the network: one
base serves any number of networks, and is neither donated nor differentiated.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from segjax.config.settings import Lora
from segjax.model import sharding

Params = dict[str, Any]

ADAPTER = 'adapter'  # in a tree of parameters, and Flax's collection
HEAD = 'scalar_head'  # is trained beside adapters
# Our names of the matrices, by HF's.
MATRICES = {
  'q_proj': 'query',
  'k_proj': 'key',
  'v_proj': 'value',
  'o_proj': 'output',
  'gate_proj': 'gate',
  'up_proj': 'up',
  'down_proj': 'down',
}


def backbone_variables(params: Params) -> dict[str, Any]:
  """Returns the parameters and adapters of a network as the collections of `llama.Llama`."""
  adapter = {ADAPTER: params[ADAPTER]} if ADAPTER in params else {}
  return {'params': params['backbone'], **adapter}


# Of the network that `stack` makes, whose scales are in B.
STACKED = Lora(rank=1, alpha=1.0)


def trained_params(params: Params) -> Params:
  """Returns the part of the parameters that is trained beside a frozen base."""
  return {name: params[name] for name in (ADAPTER, HEAD) if name in params}


def adapter_shapes(layers: Any, lora: Lora) -> dict[str, Any]:
  """Returns the shapes of the adapters of stacked layers: A [L, in, r] and B [L, r, out]."""
  shapes = {}
  for target in lora.targets:
    depth, inner, outer = layers[MATRICES[target]]['kernel'].shape
    shapes[MATRICES[target]] = {
      'a': jax.ShapeDtypeStruct((depth, inner, lora.rank), jnp.float32),
      'b': jax.ShapeDtypeStruct((depth, lora.rank, outer), jnp.float32),
    }
  return {'layers': shapes}


def init_adapter(key: Array, layers: Any, lora: Lora, mesh: Mesh | None = None) -> dict[str, Any]:
  """Draws an adapter that changes nothing yet: A from U(-1/√in, 1/√in), as in peft, and B = 0.

  Args:
    key: random key.
    layers: of the base, for the shapes.
    lora: rank and targets.
    mesh: None puts everything on the default device.
  """

  def draw(path, shape):
    name = sharding.path_name(path)
    if name.endswith('b'):
      return jnp.zeros(shape.shape, shape.dtype)
    number = list(MATRICES.values()).index(name.split('/')[-2])  # whichever others have adapters
    bound = shape.shape[1] ** -0.5
    return jax.random.uniform(
      jax.random.fold_in(key, number), shape.shape, shape.dtype, -bound, bound
    )

  shapes = adapter_shapes(layers, lora)
  adapter = jax.tree_util.tree_map_with_path(draw, shapes)
  return adapter if mesh is None else place({ADAPTER: adapter}, mesh)[ADAPTER]


def place(trained: Params, mesh: Mesh) -> Params:
  """Puts small parameters, which every process has in full, on the mesh by the table of layouts."""

  def put(path, x):
    host = np.asarray(x)
    target = sharding.parameter_sharding(sharding.path_name(path), host.shape, mesh)
    return jax.make_array_from_callback(host.shape, target, lambda index: host[index])

  return jax.tree_util.tree_map_with_path(put, trained)


def adapted(
  x: Float[Array, 'R S I'], y: Float[Array, 'R S O'], a: Array, b: Array, scale: float
) -> Float[Array, 'R S O']:
  """Returns y + scale · (x A) B in y's dtype.

  With A [n, in, r] and B [n, r, out] of n networks, row i of x belongs to network i mod n.
  """
  down, up = a.astype(x.dtype), b.astype(x.dtype)
  # Scaled where it is narrow, and added in y's dtype, so that a compiler can add y inside the
  # product with B: passes over arrays as wide as y would cost a third of an update.
  if a.ndim == 3:
    rows = x.reshape(-1, len(a), *x.shape[1:])
    narrow = jnp.einsum('mnsi,nir->mnsr', rows, down) * jnp.asarray(scale, x.dtype)
    change = jnp.einsum('mnsr,nro->mnso', narrow, up).reshape(y.shape)
    return y + change
  narrow = (x.reshape(-1, x.shape[-1]) @ down) * jnp.asarray(scale, x.dtype)
  return (y.reshape(-1, y.shape[-1]) + narrow @ up).reshape(y.shape)


def merge(params: Params, lora: Lora) -> Params:
  """Returns the parameters of the plain network W + s A B, each matrix in its dtype."""
  layers = dict(params['backbone']['layers'])
  for name, pair in params[ADAPTER]['layers'].items():
    kernel = layers[name]['kernel']
    a, b = (pair[key].astype(jnp.promote_types(pair[key].dtype, jnp.float32)) for key in 'ab')
    change = jnp.asarray(lora.scale, a.dtype) * jnp.matmul(a, b)
    merged = (kernel.astype(a.dtype) + change).astype(kernel.dtype)
    layers[name] = {**layers[name], 'kernel': merged}
  others = {name: value for name, value in params.items() if name != ADAPTER}
  return {**others, 'backbone': {**params['backbone'], 'layers': layers}}


def stack(networks: Sequence[tuple[Params, Lora | None]]) -> dict[str, Any]:
  """Returns adapters of n networks as one, for `adapted`: A [L, n, in, r] and B [L, n, r, out].

  Ranks are filled up with zeros, and so are matrices that a network has no adapter for. Scales are
  in B.
  """
  pairs = [
    {name: (pair, lora) for name, pair in params.get(ADAPTER, {'layers': {}})['layers'].items()}
    for params, lora in networks
  ]
  stacked = {}
  for name in dict.fromkeys(name for network in pairs for name in network):
    present = [network[name][0] for network in pairs if name in network]
    rank = max(pair['a'].shape[-1] for pair in present)
    a, b = present[0]['a'], present[0]['b']
    empty = jnp.zeros((*a.shape[:-1], rank), a.dtype), jnp.zeros((len(b), rank, b.shape[-1]))
    filled = []
    for network in pairs:
      if name not in network:
        filled.append(empty)
        continue
      pair, lora = network[name]
      missing = rank - pair['a'].shape[-1]
      filled.append(
        (
          jnp.pad(pair['a'], ((0, 0), (0, 0), (0, missing))),
          jnp.pad(pair['b'] * lora.scale, ((0, 0), (0, missing), (0, 0))),
        )
      )
    a, b = (jnp.stack(parts, axis=1) for parts in zip(*filled, strict=True))
    stacked[name] = {'a': a, 'b': b}
  return {'layers': stacked}
