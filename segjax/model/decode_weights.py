"""The policy's weights as the decode loop reads them: cast, split over devices, sliced by layer."""

import functools
from typing import Any

import jax

from segjax.model import precision, sharding
from segjax.model.decode import DecodeConfig, DecodeWeights
from segjax.model.lora import ADAPTER

_MAX_UNROLLED = 32  # layers on a CPU; compiling more of them one by one takes too long


def runs_unrolled(platform: str, layers: int) -> bool:
  """Returns whether decoding traces each of the layers, rather than scan over them."""
  if platform == 'cpu':
    # 30 layers of width 576, 1 to 64 rows: a step of the scan takes 1.1 to 1.4 times as long.
    return layers <= _MAX_UNROLLED
  # In a scan, XLA for GPUs copies the weights and the cache of each layer before its products, in
  # every step (8B: 23 GB of weights and values). XLA for TPUs reads them where they are.
  return platform == 'gpu'


def decode_weights(params: dict[str, Any], *, decoder: DecodeConfig) -> DecodeWeights:
  """Casts and lays out the parameters for `decode_chunk`, once instead of in every step.

  An array that needs neither is passed on and not copied. Under a trace all are outputs.
  """
  converted = _convert(params, decoder=decoder)
  backbone = params['backbone']
  head = converted.head if 'lm_head' not in params else params['lm_head']['kernel']
  all_new = decoder.unrolled or decoder.weights_dtype == 'int8'
  layers = converted.layers if all_new else _layers(params)
  return jax.tree.map(
    lambda new, old: old if new is None else new,
    converted,
    DecodeWeights(backbone['embedding'], layers, backbone['norm'], head),
    is_leaf=lambda x: x is None,
  )


@functools.partial(jax.jit, static_argnames='decoder')
def _convert(params: dict[str, Any], *, decoder: DecodeConfig) -> DecodeWeights:
  """Returns the weights, with None for each that is a parameter as it is."""
  # Cast first: the exchange between devices then moves the narrow dtype.
  cast = precision.cast_for_use(params, decoder.config.dtype, decoder.weights_dtype)
  laid_out = sharding.decode_sharding(cast)  # the weights cross devices here, not in a step
  mesh = sharding.active_mesh()
  one_device = mesh is None or mesh.size == 1

  def without_parameters(new, old):
    # jit copies an argument that it returns.
    return jax.tree.map(
      lambda new, old: None if one_device and new.dtype == old.dtype else new, new, old
    )

  backbone, layers = laid_out['backbone'], _layers(laid_out)
  if decoder.unrolled:
    # Sliced here once: XLA for GPUs would copy each slice in every step, before its product.
    layers = tuple(
      jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      for i in range(decoder.config.num_hidden_layers)
    )
  elif decoder.weights_dtype != 'int8':  # int8 layers are new, with scales that `params` lack
    layers = without_parameters(layers, _layers(params))
  embedding, norm = (
    without_parameters(backbone[name], params['backbone'][name]) for name in ('embedding', 'norm')
  )
  if decoder.config.tie_word_embeddings:
    head = backbone['embedding'].T
  else:
    head = without_parameters(laid_out['lm_head'], params['lm_head'])['kernel']
  return DecodeWeights(embedding, layers, norm, head)


def _layers(params: dict[str, Any]) -> dict[str, Any]:
  """Returns the layers as collections of `llama.Block`: their parameters and adapters."""
  layers = {'params': params['backbone']['layers']}
  # Not merged into the matrices, whose rounding to bfloat16 would lose a small change.
  return layers | ({ADAPTER: params[ADAPTER]['layers']} if ADAPTER in params else {})
