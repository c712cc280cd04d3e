"""Low-rank adapters on a frozen network: y = x W + s (x A) B, with s of `settings.Lora.scale`.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. Parameters of a network with adapters are those
of its base, and {'adapter': {'layers': {'query': {'a': A, 'b': B}, ...}}} beside them. What is
trained, adapters and a head, is a tree of its own, and `base | trained` is the network: one base
serves any number of networks, and is neither donated nor differentiated. A scalar head is always
trained, a head to the vocabulary with `train_head`; then it replaces the base's.
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
HEAD, LM_HEAD = 'scalar_head', 'lm_head'
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


# Of the network that `stack` makes, whose scales are in 'own'.
STACKED = Lora(rank=1, alpha=1.0)


def trained_params(params: Params, lora: Lora) -> Params:
  """Returns the part of the parameters that is trained beside a frozen base."""
  names = (ADAPTER, HEAD, LM_HEAD) if lora.train_head else (ADAPTER, HEAD)
  return {name: params[name] for name in names if name in params}


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
  x: Float[Array, 'R S I'], y: Float[Array, 'R S O'], pair: dict[str, Array], scale: float
) -> Float[Array, 'R S O']:
  """Returns y + scale · (x A) B in y's dtype.

  Args:
    x: what the matrix multiplies.
    y: its product.
    pair: 'a' and 'b'; those of several networks have 'own' too, see `stack`.
    scale: of `Lora`.
  """
  a, b = (pair[name].astype(x.dtype) for name in 'ab')
  narrow = x.reshape(-1, x.shape[-1]) @ a
  if 'own' in pair:
    own = pair['own'].astype(x.dtype)[None, :, None]
    by_network = narrow.reshape(-1, own.shape[1], x.shape[1], a.shape[1])
    narrow = (by_network * own).reshape(narrow.shape)
  # Scaled where it is narrow, and added in y's dtype, so that a compiler can add y inside the
  # product with B.
  narrow = narrow * jnp.asarray(scale, x.dtype)
  return (y.reshape(-1, y.shape[-1]) + narrow @ b).reshape(y.shape)


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
  """Returns the adapters of n networks side by side, for rows of which i belongs to i mod n.

  A is [L, in, R] and B [L, R, out], with R the sum of the ranks. 'own' [L, n, R] has a network's
  scale for its own columns of x A, and 0 for those of the others: as R is small, computing all of
  them costs less than bringing rows of a network together.
  """
  adapters = [params.get(ADAPTER, {'layers': {}})['layers'] for params, _ in networks]
  stacked = {}
  for name in dict.fromkeys(name for layers in adapters for name in layers):
    pairs, own = [], []
    for number, (layers, (_, lora)) in enumerate(zip(adapters, networks, strict=True)):
      if name in layers:
        pairs.append(layers[name])
        depth, _, rank = layers[name]['a'].shape
        column = lora.scale * (jnp.arange(len(networks)) == number)
        own.append(jnp.broadcast_to(column[:, None], (depth, len(networks), rank)))
    stacked[name] = {
      'a': jnp.concatenate([pair['a'] for pair in pairs], axis=2),
      'b': jnp.concatenate([pair['b'] for pair in pairs], axis=1),
      'own': jnp.concatenate(own, axis=2),
    }
  return {'layers': stacked}
