"""What moves between chips, in programs compiled ahead of time for a slice of TPUs."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from segjax.model import decode_memory, decode_sizes
from segjax.model.attention import attention
from segjax.model.generate import make_decode_config
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import BATCH, decode_mesh, make_mesh
from segjax.model.sampling import Sampling
from segjax.plan import abstract_arrays, phases
from segjax.plan.decode_programs import decode_programs

pytest.importorskip('libtpu', reason='no libtpu, without which nothing compiles for TPUs')
pytestmark = pytest.mark.compiled

GIB = 2**30
SLOTS, POSITIONS = 128, 1024
LLAMA_8B = LlamaConfig(
  vocab_size=128256,
  hidden_size=4096,
  intermediate_size=14336,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=8,
  head_dim=128,
  rope_theta=5e5,
  max_position_embeddings=8192,
  dtype='bfloat16',
)


@pytest.fixture
def mesh(monkeypatch):
  """Eight TPU chips, described to the compiler only."""
  for name, value in (
    ('TPU_SKIP_MDS_QUERY', '1'),
    ('TPU_ACCELERATOR_TYPE', 'v5p-16'),
    ('TPU_WORKER_HOSTNAMES', 'localhost'),
    ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1'),  # another process may have loaded it
  ):
    monkeypatch.setenv(name, value)
  chips = topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x2').devices
  jax.config.update('jax_disable_most_optimizations', False)  # the optimized program is tested
  yield make_mesh(data=1, fsdp=8, tensor=1, devices=chips)
  jax.config.update('jax_disable_most_optimizations', True)  # as in all other tests


def _compile(function, *args, **static):
  return function.trace(*args, **static).lower(lowering_platforms=('tpu',)).compile()


def _decode_chunk(config, mesh):
  """The compiled chunk of steps, and the weights that it reads."""
  decoder = make_decode_config(config, Sampling(max_new_tokens=512), (128001, 128009), mesh)
  params = abstract_arrays.params(config, 'language', config.dtype, mesh)
  longest = POSITIONS - decoder.sampling.max_new_tokens
  mesh = decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads)
  size = decode_sizes.full_pool(SLOTS, mesh.shape['data'], longest, decoder)
  rollout = decode_programs(decoder, mesh, params, size, longest)
  phase = next(phase for phase in rollout.phases if phase.name == 'decode chunk')
  return phases.lower_phase(phase, mesh).compile(), rollout.weights


def _moved_weights(compiled, weights):
  """Lines of the program that gather or exchange an array as large as a matrix of weights."""
  sizes = set()
  for x in jax.tree.leaves(weights):
    if x.ndim > 1:
      sizes |= {x.size, math.prod(x.shape[1:])} if x.ndim == 3 else {x.size}
  moved = []
  for line in compiled.as_text().splitlines():
    match = re.match(
      r'\s*(?:ROOT )?%\S+ = (.*?) (all-gather|all-to-all|collective-permute)(-start)?\(', line
    )
    if match:
      shapes = re.findall(r'\[([\d,]+)\]', match[1])
      if any(math.prod(map(int, shape.split(','))) in sizes for shape in shapes):
        moved.append(line.strip())
  return moved


def test_no_step_gathers_a_weight(mesh):
  """Llama-3-8B in bfloat16, 128 rows with 1024 positions: weights stay, and it fits."""
  compiled, weights = _decode_chunk(LLAMA_8B, mesh)
  assert 'all-reduce' in compiled.as_text()  # activations move
  assert _moved_weights(compiled, weights) == []
  memory = compiled.memory_analysis()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  assert used < 4.5 * GIB, f'{used / GIB:.2f} GiB per chip'
  # The pages are updated in place.
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 0.01 * GIB


def test_no_step_gathers_a_weight_where_chips_outnumber_heads(mesh):
  """Eight key heads over sixteen chips: two groups of rows, each with all weights."""
  chips = topologies.get_topology_desc(platform='tpu', topology_name='v5p:2x2x4').devices
  mesh = make_mesh(devices=chips)
  config = dataclasses.replace(LLAMA_8B, num_hidden_layers=3)
  compiled, weights = _decode_chunk(config, mesh)
  assert _moved_weights(compiled, weights) == []


def test_temporaries_are_no_more_than_the_memory_check_counts(mesh):
  config = dataclasses.replace(LLAMA_8B, num_hidden_layers=2)
  sampling = Sampling(max_new_tokens=512, top_p=0.9)  # bisection needs most
  decoder = make_decode_config(config, sampling, (128001, 128009), mesh)
  params = abstract_arrays.params(config, 'language', 'float32', mesh)
  mesh = decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads)
  size = decode_sizes.full_pool(512, 1, 512, decoder)
  rollout = decode_programs(decoder, mesh, params, size, 512)
  memory = {
    phase.name: phases.lower_phase(phase, mesh).compile().memory_analysis()
    for phase in rollout.phases
  }
  counted = decode_memory._bytes(decoder, mesh, size.columns)
  assert memory['decode weights'].output_size_in_bytes == pytest.approx(counted.weights, rel=0.01)
  assert memory['decode weights'].temp_size_in_bytes < counted.exchange
  assert memory['prefill'].temp_size_in_bytes < counted.prefill
  assert memory['decode chunk'].temp_size_in_bytes < 512 * counted.row
  assert memory['prefill'].alias_size_in_bytes == pytest.approx(size.pages * counted.page, rel=0.01)


def test_gathers_are_detected(mesh):
  """The tests above would notice a gathered weight."""
  layout = jax.NamedSharding(mesh, jax.P(None, ('fsdp', 'tensor')))
  weights = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=layout)
  everywhere = jax.NamedSharding(mesh, jax.P())
  compiled = _compile(jax.jit(lambda w: w * 2, out_shardings=everywhere), weights)
  assert _moved_weights(compiled, {'weights': weights})


@pytest.mark.parametrize(('tensor', 'size'), [(1, 128), (2, 128), (2, 64)])
def test_splash_attention(mesh, tensor, size):
  """Forward and backward of packed rows compile, and no device sees another's rows or heads."""
  mesh = make_mesh(fsdp=-1, tensor=tensor, devices=mesh.devices.flatten().tolist())
  shapes = {name: (8, 2048, heads, size) for name, heads in (('q', 8), ('k', 2), ('v', 2))}

  def loss(arrays, ids):
    output = attention(arrays['q'], arrays['k'], arrays['v'], 'splash', segment_ids=ids)
    return jnp.sum(output.astype(jnp.float32) ** 2)

  with jax.set_mesh(mesh):
    layout = jax.NamedSharding(mesh, jax.P(BATCH, None, 'tensor', None))
    arrays = {
      name: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)
      for name, shape in shapes.items()
    }
    ids = jax.NamedSharding(mesh, jax.P(BATCH, None))
    ids = jax.ShapeDtypeStruct((8, 2048), jnp.int32, sharding=ids)
    compiled = _compile(jax.jit(jax.grad(loss)), arrays, ids)
  text = compiled.as_text()
  assert 'custom-call' in text and 'all-gather' not in text
  # The logits of one row alone would be 8 MiB a head.
  assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20
