import ml_dtypes
import numpy as np
import pytest

from segjax.hf.transpose import transpose_into


@pytest.mark.parametrize('shape', [(1, 1), (256, 256), (257, 3), (3, 600), (511, 513), (0, 4)])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_equals_numpy(shape, dtype):
  source = np.random.default_rng(0).normal(size=shape).astype(dtype)
  out = np.empty(shape[::-1], np.float32)
  transpose_into(source, out)
  np.testing.assert_array_equal(out, source.T.astype(np.float32))


def test_refuses_other_shapes():
  with pytest.raises(ValueError, match=r'\(2, 3\) is not the transpose of source \(2, 3\)'):
    transpose_into(np.zeros((2, 3)), np.zeros((2, 3)))
