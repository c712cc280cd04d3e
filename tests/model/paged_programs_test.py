"""Programs on pages as the compilers for H100 and TPU v5p make them: the pages are never copied."""

import jax
import jax.numpy as jnp
import pytest
from fixtures import chips

from segjax.model.attention import KeyValue
from segjax.model.llama import LlamaConfig
from segjax.model.paged_attention import (
  PrefillRows,
  decode_attention,
  prefill_attention,
  select_paged_attention,
)
from segjax.model.pages import append, copy_pages, empty_pages, gather_view, kernel_heads, write

pytestmark = pytest.mark.compiled
LAYERS, NUM_PAGES, POSITIONS, ROWS, COLUMNS, TOKENS = 2, 4000, 64, 64, 20, 1024
# Layers are unrolled on CUDA and scanned on TPU.
PLATFORMS = ('cuda', 'tpu')


def config_of(heads=32, kv_heads=8, head_dim=128, dtype='bfloat16'):
  return LlamaConfig(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=LAYERS,
    num_attention_heads=heads,
    num_key_value_heads=kv_heads,
    head_dim=head_dim,
    dtype=dtype,
  )


def implementation_of(platform, config):
  return select_paged_attention(platform, config.dtype, config.head_dim)


def shape(*axes, dtype=jnp.int32):
  return jax.ShapeDtypeStruct(axes, dtype)


def heads_of(config, tokens):
  """Shapes of queries, keys and values."""
  counts = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
  return [shape(tokens, count, config.head_dim, dtype=config.dtype) for count in counts]


def through_layers(platform, layer, x, pages):
  """Runs layer(index of page 0, x, pages), as the decode programs do."""
  if platform == 'cuda':
    for i in range(LAYERS):
      x, pages = layer(i * NUM_PAGES, x, pages)
    return x, pages
  begins = NUM_PAGES * jnp.arange(LAYERS)
  return jax.lax.scan(lambda carry, begin: (layer(begin, *carry), None), (x, pages), begins)[0]


def check_pages_stay(platform, config, function, *args):
  """Compiles function(pages, *args): it updates the pages in place and never copies them."""
  implementation = implementation_of(platform, config)
  pages = jax.eval_shape(lambda: empty_pages(config, 1, NUM_PAGES, POSITIONS, implementation))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
  memory = chips.compile_for(platform, function, pages, *args, donate=0).memory_analysis()
  assert memory.alias_size_in_bytes >= size
  # Keys or values of one layer, which a copy of them would take.
  assert memory.temp_size_in_bytes < size / LAYERS / 2, memory.temp_size_in_bytes / size
  return memory


# Of Llama 3 8B, of 70B on 8 devices, of 3.2 1B, and of SmolLM2-135M.
SIZES = (
  {},
  {'heads': 8, 'kv_heads': 1},
  {'head_dim': 64},
  {'heads': 9, 'kv_heads': 3, 'head_dim': 64},
)
# The kernel for TPU computes in float32 too; a head of queries per head of keys is its odd case.
FLOAT32 = [
  ('tpu', {'dtype': 'float32'}),
  ('tpu', {'dtype': 'float32', 'heads': 16, 'kv_heads': 16}),
]
CASES = [(platform, sizes) for platform in PLATFORMS for sizes in SIZES] + FLOAT32


@pytest.mark.parametrize('platform, sizes', CASES)
def test_decode(platform, sizes):
  config = config_of(**sizes)
  implementation = implementation_of(platform, config)
  assert implementation == {'cuda': 'triton', 'tpu': 'ragged'}[platform]

  def steps(pages, query, key, value, table, position):
    column, offset = jnp.divmod(position, POSITIONS)
    page = jnp.take_along_axis(table, column[:, None], axis=1)[:, 0]

    def layer(begin, x, pages):
      pages = write(pages, key + x[:, : key.shape[1]], value, begin + page, offset)
      inputs = x, pages, begin + table, position + 1, implementation
      return decode_attention(*inputs, kv_heads=key.shape[1]), pages

    def step(i, carry):
      return through_layers(platform, layer, *carry)

    return jax.lax.fori_loop(0, 16, step, (query, pages))

  rows = shape(ROWS, COLUMNS), shape(ROWS)
  check_pages_stay(platform, config, steps, *heads_of(config, ROWS), *rows)


def test_decode_of_as_many_rows_as_fit():
  """Small models on TPU: the table of 2,048 rows does not fit into the scalar memory."""
  rows, config = 2048, config_of(heads=4, kv_heads=2)

  def attend(pages, query, *rows):
    return decode_attention(query, pages, *rows, 'ragged'), pages

  query = shape(rows, 4, 128, dtype='bfloat16')
  check_pages_stay('tpu', config, attend, query, shape(rows, 128), shape(rows))


def chunk_shapes():
  rows = 16
  sizes = (TOKENS,), (rows, COLUMNS), (rows,), (rows + 1,), ()
  return PrefillRows(*(shape(*size) for size in sizes)), shape(TOKENS), shape(TOKENS)


@pytest.mark.parametrize('platform, sizes', CASES)
def test_prefill(platform, sizes):
  config = config_of(**sizes)
  implementation = implementation_of(platform, config)

  def prefill(pages, query, key, value, rows, index, offset):
    def layer(begin, x, pages):
      new = key + x[:, : key.shape[1]], value
      pages = write(pages, *new, begin + index, offset)
      local = rows._replace(table=begin + rows.table)
      return prefill_attention(x, *new, pages, local, implementation), pages

    return through_layers(platform, layer, query, pages)

  check_pages_stay(platform, config, prefill, *heads_of(config, TOKENS), *chunk_shapes())


@pytest.mark.parametrize('platform, sizes', CASES)
def test_copy(platform, sizes):
  config = config_of(**sizes)
  memory = check_pages_stay(
    platform,
    config,
    lambda pages, *numbers: copy_pages(pages, *numbers, LAYERS),
    shape(ROWS),
    shape(ROWS),
  )
  # The pages of one layer that are copied: keys and values, in rows of 128 numbers.
  position = 2 * kernel_heads(config.num_key_value_heads) * 128 * jnp.dtype(config.dtype).itemsize
  assert memory.temp_size_in_bytes < 1.1 * ROWS * POSITIONS * position


def test_dense_view_on_cuda():
  """The chunk of 'xla', in float32: pages are gathered once and the buffer is written once."""
  config = config_of(dtype='float32')
  recent = KeyValue(*(shape(ROWS, 8, *tail, dtype='float32') for tail in ((128, 16), (16, 128))))

  def steps(pages, recent, table, position, count):
    peak = jnp.max(gather_view(pages, table).key, axis=(2, 3))
    recent = recent._replace(key=recent.key + peak[:, :, None, None])
    return peak, append(pages, recent, table, position, count, 0)

  rows = shape(ROWS, COLUMNS), shape(ROWS), shape(ROWS)
  check_pages_stay('cuda', config, steps, recent, *rows)
