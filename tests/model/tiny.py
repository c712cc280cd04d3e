"""A tiny Llama with every feature, in few fixed shapes so that each function compiles once.

Sizes differ from each other, whole and halved, so that a shape names its axes.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from segjax.model import heads, sharding
from segjax.model.llama import LlamaConfig, RopeScaling

BATCH, LENGTH, VOCAB = 8, 24, 80
STOP_IDS = (7, 3, 11)

CONFIG = LlamaConfig(
  vocab_size=VOCAB,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=64,
  logprob_chunk=8,
)
TIED = dataclasses.replace(
  CONFIG,
  tie_word_embeddings=True,
  attention_bias=True,
  mlp_bias=True,
  rope_theta=100.0,
  rope_scaling=RopeScaling('llama3', 4.0, original_max_position_embeddings=16),
)
CONFIGS = {'untied': CONFIG, 'tied': TIED}


def params(config, head='language', seed=0):
  """Parameters that are all far from their initial values, so that none of them is idle."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = sharding.path_name(path)
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if name.endswith('scale'):
      return 1 + 0.1 * noise
    return (0.1 if name.endswith('bias') else 0.3) * noise

  shapes = heads.param_shapes(config, head)
  return jax.tree_util.tree_map_with_path(lambda *leaf: jnp.asarray(draw(*leaf)), shapes)


def ids(seed=0, shape=(BATCH, LENGTH)):
  """Random tokens, int32."""
  return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)


token_logprobs = jax.jit(heads.token_logprobs, static_argnames='config')
scores = jax.jit(heads.scores, static_argnames='config')
values = jax.jit(heads.values, static_argnames='config')
logits = jax.jit(heads.logits, static_argnames='config')


@functools.cache
def mesh(devices):
  """One device, or eight as 2 x 2 x 2."""
  if devices == 1:
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  return sharding.make_mesh(2, 2, 2)


def place(tree, on):
  """Parameters laid out over the mesh by the table; the originals are not consumed by donation."""
  return jax.device_put(jax.tree.map(np.asarray, tree), sharding.tree_shardings(tree, on))


@contextlib.contextmanager
def captured_stderr():
  """Yields a list that holds what C++ wrote to file descriptor 2, once the block has ended."""
  lines = []
  with tempfile.TemporaryFile('w+') as file:
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
      yield lines
    finally:
      os.dup2(saved, 2)
      os.close(saved)
      file.seek(0)
      lines += file.read().splitlines()


def rematerialisations(lines):
  """The partitioner's warnings that it could only gather a tensor whole to lay it out anew."""
  return [line for line in lines if 'Involuntary full rematerialization' in line]
