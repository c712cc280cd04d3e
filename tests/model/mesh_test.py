import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from segjax.model.mesh import AXES, batch_devices, check_heads, decode_mesh, make_mesh


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [
    ((1, -1, 1), (1, 8, 1)),
    ((2, -1, 2), (2, 2, 2)),
    ((-1, 2, 4), (1, 2, 4)),
    ((8, 1, 1), (8, 1, 1)),
  ],
)
def test_make_mesh(sizes, expected):
  mesh = make_mesh(*sizes)
  assert tuple(mesh.shape.values()) == expected
  assert batch_devices(mesh) == expected[0] * expected[1]


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ((2, 2, 1), 'data x fsdp x tensor = 2 x 2 x 1 does not use the 8 devices.*set one axis to -1'),
    ((3, -1, 1), '3 x 2 x 1 does not use the 8 devices'),
    ((16, -1, 1), 'does not use the 8 devices'),
    ((-1, -1, 1), 'at most one -1'),
    ((0, 8, 1), 'axes must be positive'),
    ((-2, 8, 1), 'axes must be positive'),
  ],
)
def test_make_mesh_errors(sizes, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(*sizes)


def test_heads_must_divide_over_tensor():
  mesh = make_mesh(1, 2, 4)
  check_heads(8, 4, mesh)
  with pytest.raises(ValueError, match=r'mesh\.tensor=4 .* 4 query and 2 key .* of 2'):
    check_heads(4, 2, mesh)


@pytest.mark.parametrize(
  ('sizes', 'kv_heads', 'tensor', 'expected'),
  [
    ((1, 8, 1), 8, 0, (1, 8)),
    ((1, 8, 1), 2, 0, (4, 2)),
    ((1, 8, 1), 8, 4, (2, 4)),
    ((2, 2, 2), 8, 0, (2, 4)),
    ((2, 4, 1), 8, 2, (4, 2)),
    ((1, 2, 4), 8, 2, (4, 2)),
    ((8, 1, 1), 8, 0, (8, 1)),
    ((1, 8, 1), 3, 0, (8, 1)),
  ],
)
def test_decode_mesh(sizes, kv_heads, tensor, expected):
  mesh = make_mesh(*sizes)
  decoding = decode_mesh(mesh, 4 * kv_heads, kv_heads, tensor)
  data, group = expected
  assert dict(decoding.shape) == {'data': data, 'fsdp': 1, 'tensor': group}
  assert decoding.axis_types == mesh.axis_types
  assert decoding.devices.ravel().tolist() == mesh.devices.ravel().tolist()


@pytest.mark.parametrize(
  ('sizes', 'tensor', 'message'),
  [
    (
      (1, 8, 1),
      3,
      r'^rollout\.tensor=3 .* 8 query and 4 key .*8 x 1; use one of 1, 2, 4\.$',
    ),
    ((4, 2, 1), 4, 'use one of 1, 2'),  # a copy of the training weights is on two devices
    ((1, 8, 1), 8, 'use one of 1, 2, 4'),
  ],
)
def test_decode_mesh_errors(sizes, tensor, message):
  with pytest.raises(ValueError, match=message):
    decode_mesh(make_mesh(*sizes), 8, 4, tensor)


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device as `decode_mesh` sees it."""

  id: int
  process_index: int
  slice_index: int
  platform: str


@pytest.mark.parametrize(
  ('platform', 'per_process', 'per_slice', 'tensor'),
  [
    ('gpu', 2, 4, 2),  # nodes of two
    ('gpu', 1, 4, 4),  # a process per GPU: nothing is known of nodes
    ('tpu', 1, 2, 2),  # the network between two slices is slow
    ('tpu', 1, 4, 4),
  ],
)
def test_groups_stay_where_devices_are_connected(platform, per_process, per_slice, tensor):
  chips = np.empty((1, 4, 1), object)
  chips.flat = [Chip(i, i // per_process, i // per_slice, platform) for i in range(4)]
  mesh = Mesh(chips, AXES, axis_types=(AxisType.Auto,) * 3)
  assert decode_mesh(mesh, 4, 4).shape['tensor'] == tensor
  assert decode_mesh(mesh, 4, 4, tensor=4).shape['tensor'] == 4  # slower, and legal


def test_an_axis_may_lie_on_a_part_of_an_axis_of_the_slice(monkeypatch):
  """A slice of 4x4x8 has no axes whose product is 2, and `jax.make_mesh` refuses it."""

  def refuse(*_, **__):
    raise NotImplementedError('Failed to find assignment for logical_axis_index 2 of size 2')

  monkeypatch.setattr(jax, 'make_mesh', refuse)
  mesh = make_mesh(1, -1, 2)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': len(jax.devices()) // 2, 'tensor': 2}
  assert set(mesh.devices.flat) == set(jax.devices())
  assert mesh.axis_types == (AxisType.Auto,) * 3
