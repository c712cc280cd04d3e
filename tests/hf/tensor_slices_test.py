from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from segjax.hf import checkpoint, tensor_names, tensor_slices

KERNEL = tensor_names.TensorMapping(
  'up/kernel', 'up.{layer}', (2, 5, 7), stacked=True, transposed=True
)
VECTOR = tensor_names.TensorMapping('norm', 'norm', (7,), stacked=False, transposed=False)
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope='module')
def reader_and_tensors(tmp_path_factory):
  directory = tmp_path_factory.mktemp('checkpoint')
  tensors = {f'up.{i}': RANDOM.normal(size=(7, 5)).astype(ml_dtypes.bfloat16) for i in range(2)}
  tensors['norm'] = RANDOM.normal(size=7).astype(np.float32)
  safetensors.numpy.save_file(tensors, directory / checkpoint.WEIGHTS)
  return tensor_slices.SliceReader(checkpoint.open_checkpoint(directory)), tensors


@pytest.mark.parametrize(
  'index', [np.s_[:, :, :], np.s_[1:, 2:4, :], np.s_[0:1, :, 3:6], np.s_[:, 4:, 6:]]
)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_reads_any_slice(index, dtype, reader_and_tensors):
  files, tensors = reader_and_tensors
  full = np.stack([tensors['up.0'].T, tensors['up.1'].T]).astype(dtype)
  before = files.requested
  values = files.read(KERNEL, index, np.dtype(dtype))
  assert values.dtype == dtype
  np.testing.assert_array_equal(values, full[index])
  assert files.requested - before == full[index].size * 2
  out = np.empty_like(values)
  assert files.read(KERNEL, index, np.dtype(dtype), out=out) is out
  np.testing.assert_array_equal(out, values)


def test_reads_a_vector(reader_and_tensors):
  files, tensors = reader_and_tensors
  files.release()
  np.testing.assert_array_equal(
    files.read(VECTOR, (slice(2, 5),), np.dtype(np.float32)), tensors['norm'][2:5]
  )
  assert not files.not_finite


@pytest.mark.parametrize('word', tensor_slices.DTYPES)
@pytest.mark.parametrize('shape', [(3,), (700, 300), (2, 300_000)])
def test_finds_one_value_that_is_not_finite(word, shape, tmp_path):
  dtype = np.dtype(getattr(ml_dtypes, tensor_slices.DTYPES[word], tensor_slices.DTYPES[word]))
  largest = ml_dtypes.finfo(dtype).max
  for value, expected in ((largest, {}), (-largest, {}), (-np.inf, ['norm']), (np.nan, ['norm'])):
    tensor = np.zeros(shape, dtype)
    tensor[(-1,) * len(shape)] = value
    safetensors.numpy.save_file({'norm': tensor}, tmp_path / checkpoint.WEIGHTS)
    files = tensor_slices.SliceReader(checkpoint.open_checkpoint(tmp_path))
    files.check('norm')
    assert list(files.not_finite) == list(expected)


def test_describes_the_first_five():
  not_finite = {f't{i}': Path('/x/model.safetensors') for i in range(7)}
  text = tensor_slices.describe_not_finite(not_finite)
  assert text.startswith('/x: NaN or infinity in tensors t0 (model.safetensors), t1')
  assert text.endswith('t4 (model.safetensors) and 2 more')


@pytest.mark.parametrize('shape', [(1, 1), (256, 256), (257, 3), (3, 600), (511, 513), (0, 4)])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_transpose_equals_numpy(shape, dtype):
  source = np.random.default_rng(0).normal(size=shape).astype(dtype)
  out = np.empty(shape[::-1], np.float32)
  tensor_slices.transpose_into(source, out)
  np.testing.assert_array_equal(out, source.T.astype(np.float32))


def test_transpose_refuses_other_shapes():
  with pytest.raises(ValueError, match=r'\(2, 3\) is not the transpose of source \(2, 3\)'):
    tensor_slices.transpose_into(np.zeros((2, 3)), np.zeros((2, 3)))
