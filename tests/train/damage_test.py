"""Damaged checkpoints: the newest undamaged step is restored."""

import resource
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from segjax import processes
from segjax.errors import UserError
from segjax.run.stage_record import changed_keys
from segjax.train.checkpoint import Checkpointer, CheckpointMismatchError
from segjax.train.optimizer import TrainState

sys.path.append(str(Path(__file__).resolve().parents[2] / 'tools'))
from benchmarks.checkpoint_damage import DAMAGES

# Orbax leaves coroutines behind where a restore fails.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def _states(step):
  """States that differ from step to step, some of them large enough for chunks of their own."""
  params = {'kernel': jnp.arange(4096, dtype=jnp.float32) * step, 'bias': jnp.ones(3, jnp.bfloat16)}
  state = TrainState(jnp.int32(step), params, {'mu': jnp.full((5, 7), step, jnp.float32)})
  return {'policy': state, 'kl': {'coef': jnp.float32(0.1 * step)}}


def _assert_equal(states, expected):
  jax.tree.map(np.testing.assert_array_equal, states, expected)


@pytest.fixture(scope='module')
def undamaged(tmp_path_factory):
  """A directory with steps 1, 2 and 3."""
  directory = tmp_path_factory.mktemp('checkpoints')
  checkpoints = Checkpointer(directory, keep=3)
  for step in (1, 2, 3):
    checkpoints.save(step, _states(step))
  checkpoints.close()
  return directory


@pytest.fixture
def saved(undamaged, tmp_path):
  """A copy of `undamaged` that a test may damage."""
  return Path(shutil.copytree(undamaged, tmp_path / 'checkpoints'))


# One of each kind: an item, a file, a bit, the metadata, the manifest, an earlier item, a leftover.
_DEFAULT = (
  *('parameters missing', 'manifest missing', 'largest file at half its size'),
  *('one bit of the largest file', '_METADATA missing', 'manifest invalid'),
  *('parameters of the step before', 'leftover of a killed save'),
)


def test_default_damages_exist():
  assert set(_DEFAULT) <= set(DAMAGES)


@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=() if name in _DEFAULT else pytest.mark.campaign) for name in DAMAGES],
)
def test_restores_the_newest_undamaged_step(saved, name):
  DAMAGES[name](saved / '3')
  logged = []
  checkpoints = Checkpointer(saved, keep=3, log_fn=logged.append)
  step, restored = checkpoints.restore(_states(0))
  _assert_equal(restored, _states(step))
  assert step >= 2
  if step == 2:
    assert 'the checkpoint of step 3 is damaged' in logged[0]
    assert (saved / 'damaged-3').is_dir()
  # The next step can be saved; before it is, leftovers are removed.
  checkpoints.save(step + 1, _states(step + 1))
  checkpoints.close()
  assert not list(saved.glob('*tmp*'))
  _assert_equal(Checkpointer(saved, keep=3).restore(_states(0))[1], _states(step + 1))


def test_one_process_renames_a_damaged_step_for_all(saved, monkeypatch):
  DAMAGES['parameters missing'](saved / '3')
  checkpoints = Checkpointer(saved, keep=3, log_fn=print)
  monkeypatch.setattr(processes, 'is_first', lambda: False)
  assert checkpoints.restore(_states(0))[0] == 2
  assert (saved / '3').is_dir() and not (saved / 'damaged-3').exists()


def test_starts_again_if_every_step_is_damaged(saved):
  for step in (1, 2, 3):
    DAMAGES['parameters missing'](saved / str(step))
  logged = []
  step, restored = Checkpointer(saved, keep=3, log_fn=logged.append).restore(_states(0))
  assert step == 0 and len(logged) == 3
  _assert_equal(restored, _states(0))


def test_checkpoint_of_another_run_raises(tmp_path):
  run = {'settings': {'seed': 0, 'ppo': {'gamma': 1.0}}}
  checkpoints = Checkpointer(tmp_path, keep=1, run=run, differences=changed_keys)
  checkpoints.save(1, _states(1))
  checkpoints.close()
  other = {'settings': {'seed': 0, 'ppo': {'gamma': 0.9}}}
  with pytest.raises(CheckpointMismatchError, match=r'by another run: ppo.gamma differ'):
    Checkpointer(tmp_path, keep=1, run=other, differences=changed_keys).restore(_states(0))
  assert (tmp_path / '1').is_dir()


def test_keeps_the_best_step(tmp_path):
  checkpoints = Checkpointer(tmp_path, keep=1, best='reward')
  for step, reward in enumerate([0.1, 0.9, float('nan'), 0.3], start=1):
    checkpoints.save(step, _states(step), {'reward': reward})
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '4']


@pytest.fixture
def full_disk():
  """Returns a function: fill(True) lets no file grow beyond 1 kB, fill(False) ends that."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)

  def fill(is_full):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 if is_full else before[0], before[1]))

  yield fill
  fill(False)


@pytest.mark.campaign
def test_full_disk_keeps_the_saved_steps(tmp_path, full_disk):
  logged = []
  checkpoints = Checkpointer(tmp_path, keep=2, max_failures=1, log_fn=logged.append)
  checkpoints.save(1, _states(1))
  checkpoints.settle()
  full_disk(True)
  checkpoints.save(2, _states(2))
  checkpoints.settle()
  assert len(logged) == 1
  assert 'step 2 could not be written' in logged[0] and 'step 1 is the last one saved' in logged[0]
  full_disk(False)
  checkpoints.save(3, _states(3))
  checkpoints.settle()
  assert logged[1:] == []
  assert checkpoints.latest() == 3
  full_disk(True)
  checkpoints.save(4, _states(4))
  with pytest.raises(UserError, match=r'step 5 could not be written.*step 3 is the last one saved'):
    for step in (5, 5):
      checkpoints.save(step, _states(step))
  full_disk(False)
  step, restored = Checkpointer(tmp_path, keep=2).restore(_states(0))
  assert step == 3
  _assert_equal(restored, _states(3))


def test_saves_that_fail_at_once_count_in_a_row(tmp_path, monkeypatch):
  def fail(*arguments, **options):
    raise OSError('no space left')

  checkpoints = Checkpointer(tmp_path, keep=2, max_failures=1, log_fn=lambda text: None)
  checkpoints.save(1, _states(1))
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    checkpoints.save(2, _states(2))
    with pytest.raises(UserError, match='step 3 could not be written'):
      checkpoints.save(3, _states(3))
  checkpoints.save(4, _states(4))  # a save that succeeds ends the row
  checkpoints.settle()
  with monkeypatch.context() as patch:
    patch.setattr(ocp.CheckpointManager, 'save', fail)
    checkpoints.save(5, _states(5))
  assert checkpoints.latest() == 4
