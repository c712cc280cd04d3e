"""Strategies of hypothesis, in fixed shapes so that each function compiles once."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from .ragged import LENGTH, from_previous


def numbers(shape=LENGTH, size=4):
  """Float32 in [-size, size]."""
  elements = st.floats(-size, size, width=32, allow_subnormal=False)
  return arrays(np.float32, shape, elements=elements)


def masks(shape=LENGTH):
  """Any pattern."""
  return arrays(bool, shape)


@st.composite
def responses(draw):
  """(entropy_after, entropy, mask, finished) of one ragged response, perhaps an empty one.

  Entropies often tie with 0 and with the threshold 2; quarters are exact in float32.
  """
  begin = draw(st.integers(0, LENGTH))
  stop = draw(st.integers(begin, LENGTH))
  position = np.arange(LENGTH)
  quarters = draw(arrays(np.int8, LENGTH, elements=st.integers(0, 12)))
  entropy_after = (quarters / 4).astype(np.float32)
  finished = np.array(draw(st.booleans()))
  mask = (begin <= position) & (position < stop)
  return entropy_after, from_previous(entropy_after), mask, finished


def spoiled(x, mask):
  """NaN wherever nobody may look."""
  return np.where(mask, x, np.nan).astype(np.float32)
