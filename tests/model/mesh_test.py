import pytest

from segjax.model.mesh import batch_devices, check_heads, make_mesh


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
