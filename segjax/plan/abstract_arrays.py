"""Shapes and layouts of what a job's programs are given; no array is made.

Which program is given what is `phases`' business.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import PPO, SFT, Optimizer, RewardTraining, Settings
from segjax.model import heads, sharding
from segjax.model.llama import LlamaConfig
from segjax.run.training_loop import plan_packing_for
from segjax.train.optimizer import init_state
from segjax.train.scoring import ModelOutputs
from segjax.types import Experience, PackingPlan, PreferenceBatch, Rollout, Segments, Sequences


def bytes_per_device(tree: Any) -> int:
  """What the arrays of such shapes take on the device that has most of them."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    size = functools.reduce(lambda a, b: a * b, shape, 1)
    total += size * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
  return total


def with_shardings(tree: Any, shardings: Any) -> Any:
  """The shapes, laid out so."""
  return jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, shardings
  )


def params(config: LlamaConfig, head: str, dtype: str, mesh: Mesh) -> Any:
  """Of a network's weights."""
  shapes = heads.param_shapes(config, head)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
  return with_shardings(shapes, sharding.tree_shardings(shapes, mesh))


def state(config: LlamaConfig, head: str, optimizer: Optimizer, settings: Settings, mesh: Mesh):
  """Of what training a network carries on."""
  weights = params(config, head, settings.runtime.param_dtype, mesh)
  shapes = jax.eval_shape(lambda params: init_state(params, optimizer, 100), weights)
  return with_shardings(shapes, sharding.tree_shardings(shapes, mesh))


def batch(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
  """An array split along its first axis."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(len(shape), mesh))


def packing(
  settings: SFT | RewardTraining | PPO, sequences: int, mesh: Mesh, group: int = 1
) -> Any:
  """Where the sequences of an update lie, if they are packed; its shapes know no lengths."""
  found: PackingPlan | None = plan_packing_for(settings, np.ones(sequences, np.int32), group)[0]
  everywhere = sharding.replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), found)


def batch_shape_structs(make: Callable[[], Any], mesh: Mesh) -> Any:
  """The shapes of the arrays that `make` would return, each split along its first axis."""
  return jax.tree.map(lambda x: batch(mesh, x.dtype, *x.shape), jax.eval_shape(make))


def output_shape_structs(mesh: Mesh, function: Any, *arguments: Any, **static: Any) -> Any:
  """The shapes that a jitted function returns, laid out as it lays them out."""
  with jax.set_mesh(mesh):
    shapes = function.eval_shape(*arguments, **static)
  compiled = lower(mesh, function, arguments, static).compile()
  return with_shardings(shapes, compiled.output_shardings)


def rollout(size: int, prompt: int, response: int) -> Rollout:
  """So many responses of that length, as zeros; for `split`, like those below."""
  lengths, tokens = jnp.zeros(size, jnp.int32), jnp.zeros((size, response), jnp.int32)
  return Rollout(
    prompt_ids=jnp.zeros((size, prompt), jnp.int32),
    prompt_length=lengths,
    response_ids=tokens,
    response_mask=tokens > 0,
    finished=lengths > 0,
    old_logprob=tokens.astype(jnp.float32),
    sample_logprob=tokens.astype(jnp.float32),
  )


def experience(size: int, prompt: int, response: int) -> Experience:
  """What PPO learns from, of so many responses."""
  sampled = rollout(size, prompt, response)
  mask, tokens = sampled.response_mask, sampled.response_ids
  names = ('ref_logprob', 'ref_entropy', 'score', 'value', 'reward', 'advantage', 'return_')
  return Experience(
    rollout=sampled,
    **dict.fromkeys(names, sampled.old_logprob),
    segments=Segments(mask, mask, tokens, sampled.prompt_length),
    value_mask=mask,
  )


def scores(size: int, response: int) -> ModelOutputs:
  """What the networks say of so many responses."""
  tokens = jnp.zeros((size, response), jnp.float32)
  return ModelOutputs(*[tokens] * 5, prompt_score=tokens[:, 0])


def pairs(size: int, length: int) -> PreferenceBatch:
  """So many preferences."""
  ids = jnp.zeros((size, length), jnp.int32)
  side = Sequences(ids=ids, response_mask=ids > 0, finished=ids[:, 0] > 0)
  return PreferenceBatch(side, side)


def lower(mesh: Mesh, function: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> Any:
  """The function, traced for such arguments and lowered for the platform of the mesh."""
  with jax.set_mesh(mesh):
    traced = function.trace(*arguments, **static)
    return traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,))
