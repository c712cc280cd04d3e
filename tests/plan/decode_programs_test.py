"""What the programs of a rollout read of the pages, and how many there are."""

import dataclasses

import jax
import jax.numpy as jnp
from fixtures import models

from segjax.model.decode_sizes import PoolSize
from segjax.model.generate import make_decode_config
from segjax.model.mesh import decode_mesh
from segjax.model.pages import Pages
from segjax.model.sampling import Sampling
from segjax.plan.decode_programs import DecodePrograms

ROWS, LIVE, LAYERS, PAGES, COLUMNS, HEADS, SIZE = 4, 100, 2, 9, 20, 2, 16


def programs(implementation):
  """Two heads over two devices, four groups of four rows; L N pages each."""
  mesh = models.mesh(8)
  mesh = decode_mesh(mesh, 4, HEADS)
  decoder = make_decode_config(models.CONFIG, Sampling(max_new_tokens=512), models.STOP_IDS, mesh)
  decoder = dataclasses.replace(decoder, paged_attention=implementation)
  groups, pages = mesh.shape['data'], mesh.shape['data'] * LAYERS * PAGES
  assert (groups, mesh.shape['tensor']) == (4, 2)
  if implementation == 'ragged':
    shape, spec = (pages, 64, 2 * HEADS, SIZE), ('data', None, 'tensor', None)
  else:
    shape, spec = (HEADS, pages, 64, SIZE), ('tensor', 'data', None, None)
  layout = jax.NamedSharding(mesh, jax.P(*spec))
  array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=layout)
  cache = Pages(array, None if implementation == 'ragged' else array)
  size = PoolSize(ROWS * groups, PAGES, COLUMNS)
  return DecodePrograms(decoder, mesh, size, None, cache, [])


def test_kernels_read_whole_blocks_of_live_positions():
  """Of the last block half is live on average: a page for CUDA, up to 8 for TPUs."""
  row = SIZE * 2  # bytes: of a head's key, or of its value
  assert programs('triton').bytes_read(LIVE) == {
    f'bf16[1,{LAYERS * PAGES},64,{SIZE}]': ROWS * (LIVE + 32) * row
  }
  assert programs('ragged').bytes_read(LIVE) == {
    f'bf16[{LAYERS * PAGES},64,2,{SIZE}]': ROWS * (LIVE + 8 * 64 // 2) * 2 * row
  }
  assert programs('xla').bytes_read(LIVE) == {}


def test_the_kernel_for_tpu_needs_five_programs():
  """Weights, pages, prefill, copies of pages, a chunk of steps."""
  assert programs('ragged').count == 5


def test_each_number_of_blocks_of_prefixes_is_a_program():
  """0, 1, 2, 3 of 8 pages, for rows of 20."""
  assert programs('triton').count == 4 + 4


def test_without_a_kernel_each_width_of_the_table_is_a_program():
  """Widths 1, 2, 4, 8, 16, 20 of the table."""
  assert programs('xla').count == 5 + 5
