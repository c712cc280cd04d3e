"""Shapes and layouts of the arguments of a job's programs; no array is created.

Which program takes which of them is up to `programs` and `ppo_programs`.
"""

import functools
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from segjax.config.settings import Optimizer, Settings
from segjax.model import heads, sharding
from segjax.model.llama import LlamaConfig
from segjax.model.lora import ADAPTER, trained_params
from segjax.model.precision import stored_dtype
from segjax.plan.topologies import Topology
from segjax.train.optimizer import init_state
from segjax.train.scoring import ModelOutputs
from segjax.types import Experience, PreferenceBatch, Rollout, Segments, Sequences

# The TPU compiler raises an error instead of giving the size of a program that does not fit.
_COMPILE_TOO_LARGE = {'xla_tpu_no_crash_on_oom': 'true'}
_LOWERED_FOR = {'gpu': 'cuda'}  # name of a platform in `lower`, where it is not that of its devices


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes of these arrays on the device that holds the largest part of them."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    total += math.prod(shape) * (8 if is_key else leaf.dtype.itemsize)
  return total


def with_shardings(tree: Any, shardings: Any) -> Any:
  """Returns the shapes with these shardings."""
  return jax.tree.map(
    lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree, shardings
  )


def params(config: LlamaConfig, head: str, dtype: str, mesh: Mesh, *, trained: bool = False) -> Any:
  """Returns the shapes of a network's parameters."""
  dtype_of = functools.partial(
    stored_dtype, dtype=dtype, trained=trained, tied=config.tie_word_embeddings
  )
  shapes = heads.param_shapes(config, head)
  adapter = {ADAPTER: shapes.pop(ADAPTER)} if config.lora else {}  # float32, as they are loaded
  shapes = adapter | jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(x.shape, dtype_of(sharding.path_name(path))), shapes
  )
  return with_shardings(shapes, sharding.tree_shardings(shapes, mesh))


def state(config: LlamaConfig, head: str, optimizer: Optimizer, settings: Settings, mesh: Mesh):
  """Returns the shapes of a network's TrainState."""
  weights = params(config, head, settings.runtime.param_dtype, mesh, trained=True)
  if config.lora:
    weights = trained_params(weights, config.lora)
  shapes = jax.eval_shape(lambda params: init_state(params, optimizer, 100), weights)
  return with_shardings(shapes, sharding.tree_shardings(shapes, mesh))


def batch(mesh: Mesh, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
  """Returns the shape of an array that is split along its first axis."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(len(shape), mesh))


def replicated(mesh: Mesh, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
  """Returns the shape of an array of which every device has a copy."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))


def on_all_devices(tree: Any, mesh: Mesh) -> Any:
  """Returns the shapes of arrays of which every device has a copy."""
  layout = sharding.replicated(mesh)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), tree)


def signature(arguments: Any) -> Any:
  """Returns what two trees of shapes have in common if one program serves both."""
  leaves, structure = jax.tree.flatten(arguments)
  return structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def batch_shape_structs(make: Callable[[], Any], mesh: Mesh) -> Any:
  """Returns the shapes of the arrays that `make` would return, each split along its first axis."""
  return jax.tree.map(lambda x: batch(mesh, x.dtype, *x.shape), jax.eval_shape(make))


def output_shape_structs(mesh: Mesh, function: Any, *arguments: Any, **static: Any) -> Any:
  """Returns the shapes of a jitted function's outputs, with the layouts that it gives them."""
  with jax.set_mesh(mesh):
    shapes = function.eval_shape(*arguments, **static)
  compiled = compile_program(lower(mesh, function, arguments, static))
  return with_shardings(shapes, compiled.output_shardings)


def rollout(size: int, prompt: int, response: int) -> Rollout:
  """Returns a rollout of zeros, for `batch_shape_structs`, as do the functions below.

  Args:
    size: number of responses.
    prompt: tokens of a prompt.
    response: tokens of a response.
  """
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


def experience(size: int, prompt: int, response: int, *, has_critic: bool) -> Experience:
  """Returns the experience of PPO."""
  zeros = rollout(size, prompt, response)
  mask, tokens, floats = zeros.response_mask, zeros.response_ids, zeros.old_logprob
  names = ('ref_logprob', 'ref_entropy', 'score', 'reward', 'advantage')
  learned = {'value': floats, 'return_': floats, 'value_mask': mask} if has_critic else {}
  return Experience(
    rollout=zeros,
    **dict.fromkeys(names, floats),
    segments=Segments(mask, mask, tokens, zeros.prompt_length),
    **learned,
  )


def model_outputs(
  size: int, response: int, *, has_critic: bool, has_lm: bool, listed: Sequence[str] = ()
) -> ModelOutputs:
  """Returns log-probs, entropies, scores and, with these networks, values and others' log-probs.

  Args:
    size: number of responses.
    response: tokens of a response.
    has_critic: whether there are values.
    has_lm: whether a language model rewards.
    listed: names of the reward models of config.rewards.
  """
  tokens = jnp.zeros((size, response), jnp.float32)
  return ModelOutputs(
    *[tokens] * 4,
    value=tokens if has_critic else None,
    prompt_score=tokens[:, 0],
    lm_logprob=tokens if has_lm else None,
    scores=dict.fromkeys(listed, tokens) or None,
  )


def pairs(size: int, length: int, has_signal: bool = False) -> PreferenceBatch:
  """Returns a batch of preference pairs, each side padded to `length`.

  Args:
    size: pairs.
    length: tokens of a side.
    has_signal: they hold what boundaries read of the reference.
  """
  ids = jnp.zeros((size, length), jnp.int32)
  signal = ids.astype(jnp.float32) if has_signal else None
  side = Sequences(ids=ids, response_mask=ids > 0, finished=ids[:, 0] > 0, ref_signal=signal)
  return PreferenceBatch(side, side)


def lower(mesh: Mesh, function: Any, arguments: tuple[Any, ...], static: dict[str, Any]) -> Any:
  """Traces a jitted function for these arguments and lowers it for the platform of the mesh."""
  with jax.set_mesh(mesh):
    platform = mesh.devices.flat[0].platform
    traced = function.trace(*arguments, **static)
    return traced.lower(lowering_platforms=(_LOWERED_FOR.get(platform, platform),))


def compile_program(lowered: Any, options: dict[str, Any] | None = None) -> Any:
  """Compiles a program, also one that does not fit into the memory of the devices.

  Args:
    options: of the compiler.

  Raises:
    jax.errors.JaxRuntimeError: the compiler refuses the program.
  """
  options = options or {}
  try:
    return lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as error:
    if not refusal(error):
      raise
    try:
      return lowered.compile(compiler_options=options | _COMPILE_TOO_LARGE)
    except jax.errors.JaxRuntimeError:  # another libtpu may not know the option
      raise error from None


def compile_with_text(lowered: Any, topology: Topology) -> tuple[Any, str]:
  """Compiles a program as `compile_program` does; returns it and its text.

  The text of a TPU program is read from the files that the compiler writes: a jax that is older or
  newer than libtpu may not know all of its instructions.
  """
  if not topology.is_tpu:
    compiled = compile_program(lowered)
    return compiled, compiled.as_text()
  with tempfile.TemporaryDirectory() as folder:
    compiled = compile_program(lowered, {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True})
    files = sorted(Path(folder).glob('*.after_optimizations.txt'))  # of each attempt
    return compiled, files[-1].read_text(encoding='utf-8')


def refusal(error: jax.errors.JaxRuntimeError) -> str:
  """Returns the compiler's words for a program that does not fit; '' for another error."""
  # Its first sentences; a table of allocations follows them.
  return re.sub(r'\s+', ' ', str(error)).partition('RESOURCE_EXHAUSTED: ')[2][:200]
