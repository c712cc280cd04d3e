import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from segjax.model import attention as module
from segjax.model.attention import attention
from segjax.model.flash import flash
from segjax.model.mesh import make_mesh
from segjax.model.splash import splash


def arrays(heads=4, kv_heads=2, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  shapes = ((2, 6, heads, 8), (2, 6, kv_heads, 8), (2, 6, kv_heads, 8))
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def by_loops(query, key, value, mask):
  """One head, one query at a time."""
  out = np.zeros(query.shape)
  group = query.shape[2] // key.shape[2]
  for b, q, h in np.ndindex(*query.shape[:3]):
    seen = [s for s in range(key.shape[1]) if mask[b, q, s]]
    weight = np.exp([query[b, q, h] @ key[b, s, h // group] / np.sqrt(8) for s in seen])
    out[b, q, h] = sum(w * value[b, s, h // group] for w, s in zip(weight, seen, strict=True))
    out[b, q, h] /= weight.sum()
  return out


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_causal_grouped_queries(kv_heads):
  query, key, value = arrays(kv_heads=kv_heads)
  mask = np.tril(np.ones((2, 6, 6), bool))
  expected = by_loops(*map(np.asarray, (query, key, value)), mask)
  assert_allclose(attention(query, key, value), expected, atol=1e-5)  # float32


ATTENDED = jnp.array([[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0]])


def test_unattended_tokens_are_masked_and_give_0():
  query, key, value = arrays()
  mask = np.broadcast_to(np.tril(np.ones((6, 6), bool)), (2, 6, 6))
  seen = mask & (np.asarray(ATTENDED) > 0)[:, None]
  expected = by_loops(*map(np.asarray, (query, key, value)), seen | np.eye(6, dtype=bool))
  expected[np.asarray(ATTENDED) == 0] = 0
  output = attention(query, key, value, segment_ids=ATTENDED)
  assert_allclose(output, expected, atol=1e-5)  # float32
  assert np.all(np.asarray(output)[np.asarray(ATTENDED) == 0] == 0)


def test_all_attended_equals_no_segment_ids():
  query, key, value = arrays()
  output = attention(query, key, value, segment_ids=jnp.ones((2, 6), int))
  np.testing.assert_array_equal(output, attention(query, key, value))


@pytest.mark.parametrize('attended', [ATTENDED, jnp.zeros((2, 6), int)])
def test_unattended_tokens_have_no_gradient(attended):
  def loss(*tensors):
    return jnp.sum(attention(*tensors, segment_ids=attended) ** 2)

  out, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays())
  assert jnp.isfinite(out)
  for grad in map(np.asarray, grads):
    assert np.all(np.isfinite(grad))
    assert np.all(grad[np.asarray(attended) == 0] == 0)


def test_call_of_cudnn(monkeypatch, caplog):
  """The call that is made on CUDA, computed by the implementation that runs anywhere."""
  original, calls = jax.nn.dot_product_attention, []

  def by_xla(*tensors, implementation, **options):
    calls.append(implementation)
    return original(*tensors, implementation='xla', **options)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', by_xla)
  output = attention(*arrays(), implementation='cudnn')
  assert_allclose(output, attention(*arrays()), atol=1e-5)  # float32
  assert calls == ['cudnn']


def test_packed_rows_on_cuda(monkeypatch, caplog):
  """They never go to cudnn, which would ignore where sequences end."""

  def by_xla(*tensors):
    calls.append(tensors[0].shape)
    return attention(*tensors[:3], segment_ids=tensors[3])

  calls = []
  monkeypatch.setattr('segjax.model.flash.flash', by_xla)
  module._warn_once.cache_clear()
  expected = attention(*arrays(), segment_ids=ATTENDED)
  for name in ('cudnn', 'cudnn', 'flash'):
    output = attention(*arrays(), implementation=name, segment_ids=ATTENDED)
    assert_allclose(output, expected, atol=0)
  assert calls == [(2, 6, 4, 8)]  # of 'flash': it is known to have been selected
  assert [record.message for record in caplog.records] == [
    'neither cudnn nor flash attention supports packed rows with head_dim=8; they use xla'
  ]
  monkeypatch.setattr(module, '_FLASH_SIZES', (8,))
  attention(*arrays(), implementation='cudnn', segment_ids=ATTENDED)
  assert len(calls) == 2


LONG = 384  # three blocks of splash
# Four sequences and padding; one sequence.
PACKED = np.stack([np.repeat([1, 2, 3, 4, 0], [100, 28, 128, 100, 28]), np.ones(LONG, int)])


def long_arrays():
  rng = np.random.default_rng(2)
  return [jnp.asarray(rng.normal(size=(2, LONG, n, 128)), jnp.float32) for n in (4, 2, 2)]


@functools.cache
def long_gradients(name):
  """Attention in packed rows, and the gradients of a function of it."""
  weight = jnp.asarray(np.random.default_rng(3).normal(size=(2, LONG, 4, 128)), jnp.float32)

  def run(*tensors):
    if name == 'splash':
      output = splash(*tensors, jnp.asarray(PACKED), interpret=True)
      output = jnp.where(PACKED[:, :, None, None] > 0, output, 0)
    else:
      output = attention(*tensors, segment_ids=jnp.asarray(PACKED))
    return jnp.sum(output * weight), output

  return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))


@functools.cache
def long_results(name):
  (_, output), grads = long_gradients(name)(*long_arrays())
  return output, *grads


@pytest.mark.parametrize('sequence', [2, 3, 4])
def test_packed_equals_apart(sequence):
  """Forward and backward, each sequence in a row of its own."""
  columns = np.flatnonzero(PACKED[0] == sequence)
  weight = np.random.default_rng(3).normal(size=(2, LONG, 4, 128))[:1, columns]

  def run(*tensors):
    output = attention(*tensors)
    return jnp.sum(output * weight), output

  apart = [x[:1, columns] for x in long_arrays()]
  grad = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
  (_, output), grads = jax.jit(grad)(*apart)
  for got, expected in zip(long_results('xla'), (output, *grads), strict=True):
    assert_allclose(got[:1, columns], expected, atol=1e-5)  # float32


def test_splash_equals_xla():
  """The kernel, interpreted: grouped queries, packed rows, padding; forward and backward."""
  for got, expected in zip(long_results('splash'), long_results('xla'), strict=True):
    assert_allclose(got, expected, atol=2e-5)  # float32


def test_splash_skips_blocks_of_other_sequences():
  """The third sequence fills a block: a NaN there would spread if others saw it."""
  spoilt = [x.at[0, 128:256].set(jnp.nan) for x in long_arrays()]
  (_, output), grads = long_gradients('splash')(*spoilt)
  for got, expected in zip((output, *grads), long_results('splash'), strict=True):
    assert np.all(np.isnan(got[0, 128:256]))
    for others in (np.s_[0, :128], np.s_[0, 256:], np.s_[1]):
      assert_allclose(got[others], expected[others], atol=0)


def test_blocks_of_queries_change_nothing(monkeypatch):
  unblocked = long_results('xla')
  monkeypatch.setattr(module, '_BLOCK', 160)  # the last one is shorter
  long_gradients.cache_clear()
  long_results.cache_clear()
  for got, expected in zip(long_results('xla'), unblocked, strict=True):
    assert_allclose(got, expected, atol=1e-5)  # float32
  long_gradients.cache_clear()
  long_results.cache_clear()


@pytest.mark.devices
@pytest.mark.parametrize('name', ['splash', 'flash'])
def test_kernels_on_each_device(monkeypatch, name):
  """Rows and heads are split; every device runs the kernel on its own."""
  monkeypatch.setattr(module, 'splash', functools.partial(splash, interpret=True))
  monkeypatch.setattr('segjax.model.flash.flash', functools.partial(flash, interpret=True))
  expected = long_results('xla')[0]
  run = jax.jit(lambda *tensors: attention(*tensors, name, segment_ids=jnp.asarray(PACKED)))
  with jax.set_mesh(make_mesh(1, 2, 2, jax.devices()[:4])):
    assert_allclose(run(*long_arrays()), expected, atol=2e-5)  # float32


def test_rows_that_splash_does_not_support_use_xla(caplog):
  module._warn_once.cache_clear()
  short = attention(*arrays(), implementation='splash')
  assert_allclose(short, attention(*arrays()), atol=0)
  assert not caplog.records  # no warning for a short prompt
  odd = [x[:, :200] for x in long_arrays()]
  assert_allclose(attention(*odd, 'splash'), attention(*odd), atol=0)
  assert 'a multiple of 128 tokens; rows of 200 use xla' in caplog.text


@pytest.mark.parametrize(
  ('requested', 'platform', 'dtype', 'size', 'expected', 'reason'),
  [
    ('auto', 'cpu', 'bfloat16', 128, 'xla', ''),
    ('auto', 'tpu', 'float32', 64, 'splash', ''),
    ('auto', 'gpu', 'bfloat16', 128, 'cudnn', ''),
    ('auto', 'gpu', 'float32', 128, 'xla', ''),
    ('auto', 'gpu', 'bfloat16', 256, 'xla', ''),
    ('xla', 'tpu', 'bfloat16', 128, 'xla', ''),
    ('splash', 'cpu', 'bfloat16', 128, 'xla', 'it is for TPU, and the devices are cpu'),
    ('cudnn', 'tpu', 'bfloat16', 128, 'xla', 'it is for CUDA, and the devices are tpu'),
    ('cudnn', 'gpu', 'float32', 128, 'xla', 'compute_dtype=float32'),
    ('cudnn', 'gpu', 'bfloat16', 20, 'xla', 'head_dim=20 is not a multiple of 8 up to 128'),
    ('flash', 'gpu', 'bfloat16', 64, 'flash', ''),
    ('flash', 'gpu', 'bfloat16', 80, 'xla', 'head_dim=80 is not one of (64, 128)'),
    ('flash', 'cpu', 'bfloat16', 128, 'xla', 'it is for CUDA, and the devices are cpu'),
  ],
)
def test_select_implementation(requested, platform, dtype, size, expected, reason):
  name, why = module.select_implementation(requested, platform, dtype, size)
  assert name == expected
  assert reason in why
  assert bool(reason) == bool(why)


@pytest.mark.parametrize(
  ('name', 'length', 'size', 'expected'),
  [
    ('xla', 2048, 128, False),
    ('splash', 2048, 128, True),
    ('splash', 100, 128, False),
    ('cudnn', 2048, 128, True),
    ('cudnn', 2048, 80, False),
    ('flash', 2048, 64, True),
  ],
)
def test_flash_attention_skips_other_segments(name, length, size, expected):
  assert module.skips_other_segments(name, length, size) == expected


def test_softmax_is_in_float32():
  """1 + 2⁻⁹ rounds to 1 in bfloat16, yet many such keys move the mean."""
  query, key, value = arrays(dtype=jnp.bfloat16)
  out = attention(query, key, value)
  assert out.dtype == jnp.bfloat16
  wide = [x.astype(jnp.float32) for x in (query, key, value)]
  # Weights and output are rounded to 8 bits, the logits are not.
  assert_allclose(out.astype(jnp.float32), attention(*wide), atol=0.03)


def test_unknown_implementation():
  with pytest.raises(
    ValueError,
    match=r"attention='eager' is unknown; use one of \('xla', 'cudnn', 'flash', 'splash'\)",
  ):
    attention(*arrays(), implementation='eager')
