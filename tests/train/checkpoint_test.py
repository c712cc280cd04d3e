"""Checkpoints: resuming on the same mesh and on another one."""

import math

import jax
import numpy as np
import pytest
from fixtures import models, training

from segjax.model.mesh import make_mesh
from segjax.train.checkpoint import Checkpointer
from segjax.train.sft_step import sft_step


def step(state, count, mesh=None, losses=None):
  for _ in range(count):
    state, metrics = sft_step(
      state,
      training.conversations(mesh),
      config=models.CONFIG,
      settings=training.FINE_TUNING,
      total_steps=training.TOTAL,
    )
    if losses is not None:
      losses.append(float(metrics['loss']))
  return state


@pytest.mark.campaign
def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
  uninterrupted = training.copied(step(training.state('policy'), 3))
  checkpoints = Checkpointer(tmp_path, keep=2)
  assert checkpoints.latest() is None
  state = step(training.state('policy'), 2)
  checkpoints.save(2, {'policy': state})
  step(state, 1)  # donates the state that was saved
  checkpoints.close()
  checkpoints = Checkpointer(tmp_path, keep=2)
  restored_step, states = checkpoints.restore({'policy': training.state('policy')})
  assert restored_step == 2
  state = states['policy']
  checkpoints.close()
  assert int(state.step) == 2
  jax.tree.map(np.testing.assert_array_equal, training.copied(step(state, 1)), uninterrupted)


@pytest.mark.devices
def test_eight_devices_then_four_then_one(tmp_path):
  """Each mesh restores what the previous one saved and takes a step, as one device takes all."""
  expected, losses = [], []
  uninterrupted = training.copied(step(training.state('policy'), 3, losses=expected))
  for done, shape in enumerate([(2, 2, 2), (1, 4, 1), (1, 1, 1)]):
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    with jax.set_mesh(mesh):
      checkpoints = Checkpointer(tmp_path, keep=1)
      saved_step, states = checkpoints.restore({'policy': training.state('policy', mesh)})
      assert saved_step == done
      state = step(states['policy'], 1, mesh, losses)
      checkpoints.save(done + 1, {'policy': state})
      checkpoints.close()
  np.testing.assert_allclose(losses, expected, rtol=1e-5)  # float32
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6),
    training.copied(state.params),
    uninterrupted.params,
  )


@pytest.mark.campaign
def test_restores_onto_another_mesh_and_keeps_the_last(tmp_path):
  checkpoints = Checkpointer(tmp_path, keep=2)
  states = {'policy': training.state('policy'), 'critic': training.state('critic')}
  for saved_step in (1, 2, 3):
    checkpoints.save(saved_step, states)
  mesh = models.mesh(8)
  with jax.set_mesh(mesh):
    like = {name: training.state(name, mesh) for name in states}
    _, restored = checkpoints.restore(like)
  checkpoints.close()
  assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 3]
  jax.tree.map(np.testing.assert_array_equal, training.copied(restored), training.copied(states))
  for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
