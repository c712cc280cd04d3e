import dataclasses
import math
import pathlib

import jax
import pytest
from fixtures import models

from segjax import processes
from segjax.model import decode, decode_memory
from segjax.model.decode_memory import plan_pool, settle_pool
from segjax.model.decode_sizes import PoolSize
from segjax.model.decode_weights import decode_weights
from segjax.model.generate import make_decode_config
from segjax.model.llama import num_parameters
from segjax.model.mesh import decode_mesh
from segjax.model.sampling import Sampling

CONFIG = dataclasses.replace(models.CONFIG, max_position_embeddings=1024)
LONGEST, NEW = 100, 156  # 256 positions, four pages
PAGE = 64 * 2 * 2 * 2 * 8 * 4  # positions, layers, keys and values, heads, their size, float32
WEIGHTS = 4 * num_parameters(CONFIG)  # bytes, float32


def decoder(max_new_tokens=NEW, implementation='triton', config=CONFIG):
  sampling = Sampling(max_new_tokens=max_new_tokens)
  made = make_decode_config(config, sampling, models.STOP_IDS, models.mesh(1))
  return dataclasses.replace(made, paged_attention=implementation)


def plan(free, *, mesh=None, responses=1000, mean_prompt=36.0, max_concurrent=0, **of_decoder):
  return plan_pool(
    decoder(**of_decoder),
    mesh or models.mesh(1),
    responses=responses,
    longest=LONGEST,
    mean_prompt=mean_prompt,
    max_concurrent=max_concurrent,
    free_bytes=free,
  )


def room(pages, **of_decoder):
  """Free memory of which weights, prefill and a margin of a tenth leave so many pages."""
  return (needed(PoolSize(0, pages, 4), **of_decoder) + 1) / 0.9


def needed(size, mesh=None, **of_decoder):
  return decode_memory._needed(size, decoder(**of_decoder), mesh or models.mesh(1))


def test_a_page_has_the_keys_and_values_of_all_layers():
  one, two = PoolSize(1, 1, 4), PoolSize(1, 2, 4)
  assert needed(two) - needed(one) == PAGE
  groups = decode_mesh(models.mesh(8), 4, 2)  # four groups of two devices, with a head each
  assert needed(two, groups) - needed(one, groups) == PAGE / 2
  assert needed(one) > WEIGHTS


def test_pages_of_the_tpu_have_whole_tiles_of_heads():
  """As many bytes as the arrays have, whose heads are 8 numbers wide and 3 or 5."""
  for kv_heads, in_pages in ((1, 1), (3, 4), (5, 8)):
    config = dataclasses.replace(CONFIG, num_key_value_heads=kv_heads, num_attention_heads=kv_heads)
    sizes = {'implementation': 'ragged', 'config': config}
    one, two = (needed(PoolSize(1, pages, 4), **sizes) for pages in (1, 2))
    with jax.set_mesh(models.mesh(1)):
      empty = decode.empty_pages(1, 1, decoder=decoder(**sizes))
    assert two - one == empty.key.nbytes == 64 * 2 * 2 * in_pages * 128 * 4


@pytest.mark.parametrize('implementation', ['triton', 'xla'])
@pytest.mark.parametrize('pages', [100, 1000])
def test_as_many_responses_as_fit(pages, implementation):
  free = room(pages, implementation=implementation)
  size = plan(free, implementation=implementation)
  left = 0.9 * free - needed(size, implementation=implementation)
  assert 0 <= left < PAGE
  # A response has on average 36 + 156 / 2 positions, and half of its last page is empty.
  mean = (36 + 78) / 64 + 0.5
  assert (size.pages - 2) / size.slots == pytest.approx(mean, rel=0.1)
  assert size.slots > plan(free, mean_prompt=80.0, implementation=implementation).slots


def test_rows_cost_a_dense_view_where_no_kernel_reads_pages():
  slots = [plan(room(200, implementation=i), implementation=i).slots for i in ('triton', 'xla')]
  assert slots[1] < slots[0] / 2


def test_no_more_pages_than_rows_can_fill():
  assert plan(math.inf, responses=12) == PoolSize(12, 12 * 4 + 2, 4)
  assert plan(math.inf, responses=12, max_concurrent=5) == PoolSize(5, 5 * 4 + 2, 4)


def test_rows_that_are_asked_for_share_what_fits():
  size = plan(room(100), max_concurrent=60)
  assert size.slots == 60
  assert 4 <= size.pages - 2 < 60 * 4
  assert needed(size) <= 0.9 * room(100)


def test_slots_divide_over_the_devices():
  groups = decode_mesh(models.mesh(8), 4, 2)
  assert plan(math.inf, mesh=groups, responses=3) == PoolSize(4, 4 + 2, 4)
  # From eight on every device samples for as many rows, but never more than there are responses.
  assert plan(math.inf, mesh=groups, max_concurrent=9) == PoolSize(16, 4 * 4 + 2, 4)
  assert plan(math.inf, mesh=groups, responses=13) == PoolSize(12, 3 * 4 + 2, 4)
  for pages in (20, 30, 50, 90):
    assert plan(room(pages), mesh=groups).slots % 8 == 0


@pytest.mark.parametrize(
  ('pages', 'max_concurrent', 'message'),
  [
    (-1, 0, r'of weights .* GiB are free; use more devices\.$'),
    (5, 0, r'a prompt of up to 100 tokens, rollout\.max_new_tokens=156.*lower data\.max_prompt'),
    (10, 1000, r'^rollout\.max_concurrent=1000 needs .* set it to at most \d+, or to 0 '),
  ],
)
def test_what_does_not_fit_is_one_line(pages, max_concurrent, message):
  with pytest.raises(ValueError, match=message) as error:
    plan(room(pages), max_concurrent=max_concurrent)
  assert '\n' not in str(error.value)


def test_the_number_in_the_message_fits():
  with pytest.raises(ValueError, match='to at most') as error:
    plan(room(10), max_concurrent=1000)
  fits = int(str(error.value).partition('at most ')[2].partition(',')[0])
  assert plan(room(10), max_concurrent=fits).slots == fits
  with pytest.raises(ValueError, match='to at most'):
    plan(room(10), max_concurrent=fits + 1)


@pytest.mark.parametrize('config', models.CONFIGS.values(), ids=models.CONFIGS)
@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize(
  ('weights_dtype', 'most'),
  [('compute_dtype', 1.02), pytest.param('int8', 1.1, marks=pytest.mark.campaign)],
)
def test_weights_are_counted_as_they_lie_on_a_device(config, devices, weights_dtype, most):
  training = models.mesh(devices)
  mesh = decode_mesh(training, 4, 2)
  params = models.place(models.params(config), training)
  made = dataclasses.replace(decoder(config=config), weights_dtype=weights_dtype)
  with jax.set_mesh(mesh):
    weights = decode_weights(params, decoder=made)
  actual = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(weights))
  # Biases and scales are split too, and are counted as whole.
  assert actual <= decode_memory._weight_bytes(made, mesh.shape['tensor']) < most * actual


@pytest.fixture
def free(monkeypatch):
  """A list whose last element is the free memory; nothing is settled yet."""
  values = [room(1000)]
  monkeypatch.setattr(decode_memory, '_free_bytes', lambda mesh: values[-1])
  monkeypatch.setattr(decode_memory, '_settled', {})
  return values


def settle(mean_prompt=36.0, longest=LONGEST):
  return settle_pool(
    decoder(),
    models.mesh(1),
    responses=1000,
    longest=longest,
    mean_prompt=mean_prompt,
    max_concurrent=0,
  )


def test_sizes_stay_from_one_rollout_to_the_next(free):
  first = settle()
  for factor in (0.95, 1.5):  # what other arrays take and give back
    free.append(factor * free[0])
    assert settle(mean_prompt=50.0) == first
  free.append(0.85 * free[0])
  smaller = settle()
  assert smaller.pages < first.pages
  assert needed(smaller) <= free[-1]


def test_processes_agree_on_the_smallest_memory(free, monkeypatch):
  first = settle()
  monkeypatch.setattr(processes, 'smallest', lambda value: 0.85 * value)
  assert settle().pages < first.pages


def test_free_memory_of_this_machine():
  one, eight = (decode_memory._free_bytes(models.mesh(n)) for n in (1, 8))
  assert 2**20 < eight < one < 2**50


def test_int8_weights_leave_more_room():
  made = decoder()
  int8 = dataclasses.replace(made, weights_dtype='int8')
  sizes = [decode_memory._weight_bytes(each, 1) for each in (made, int8)]
  layers = 4 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # bytes of the kernels in float32
  assert sizes[0] - sizes[1] == pytest.approx(0.75 * layers, rel=0.06)  # scales are left


def test_memory_of_a_host_that_does_not_tell_what_is_free(monkeypatch):
  available = decode_memory._host_bytes()
  monkeypatch.setattr(decode_memory, 'Path', lambda _: pathlib.Path('/does/not/exist'))
  assert 0 < available <= decode_memory._host_bytes() < math.inf
  monkeypatch.setattr(decode_memory.os, 'sysconf_names', {})
  assert decode_memory._host_bytes() == math.inf
