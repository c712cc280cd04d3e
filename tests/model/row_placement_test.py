import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models

from segjax.model import row_placement

TABLE = np.arange(60).reshape(20, 3)
ROWS = np.array([7, 3, 19, 0, 4, 4, 11, 2])


class Gather:
  """Remembers the rows that it is asked for."""

  def __call__(self, rows, place):
    self.rows = rows.tolist()
    return {'ids': place(TABLE[rows]), 'first': place(TABLE[rows, 0])}


def test_rows_are_placed_on_all_devices():
  gather = Gather()
  placed = row_placement.place_rows(gather, ROWS, models.mesh(8))
  np.testing.assert_array_equal(placed['ids'], TABLE[ROWS])
  np.testing.assert_array_equal(placed['first'], TABLE[ROWS, 0])
  assert placed['ids'].sharding.shard_shape((8, 3)) == (2, 3)
  assert gather.rows == ROWS.tolist()
  with pytest.raises(ValueError, match='a batch of 7 rows'):
    row_placement.place_rows(gather, ROWS[:7], models.mesh(8))


def test_a_process_gathers_the_rows_of_its_own_devices(monkeypatch):
  """Of four groups of devices, it has the second and, twice, the last one."""

  class Sharding:
    def addressable_devices_indices_map(self, shape):
      assert shape == (8,)
      return {'a': (slice(2, 4),), 'b': (slice(6, 8),), 'c': (slice(6, 8),)}

  def make(shape, sharding, read):
    assert shape[0] == 8
    more = [slice(None)] * (len(shape) - 1)
    return jnp.stack([read((slice(start, start + 2), *more)) for start in (6, 2)])

  monkeypatch.setattr(row_placement, 'batch_sharding', lambda rank, mesh: Sharding())
  monkeypatch.setattr(jax, 'make_array_from_callback', make)
  gather = Gather()
  placed = row_placement.place_rows(gather, ROWS, models.mesh(8))
  assert gather.rows == [19, 0, 11, 2]
  np.testing.assert_array_equal(placed['ids'], [TABLE[[11, 2]], TABLE[[19, 0]]])
  np.testing.assert_array_equal(placed['first'], [TABLE[[11, 2], 0], TABLE[[19, 0], 0]])
