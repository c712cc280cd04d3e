"""Weights of a run: one base for all networks that add adapters to it."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures import hf_models, models

from segjax.config.settings import Lora, Runtime
from segjax.errors import UserError
from segjax.hf import reader
from segjax.run.weights import Weights, base_directory, check_adapter, names_on_one_base

KIND = Lora(rank=4, alpha=8.0, targets=('q_proj', 'v_proj', 'down_proj'))
KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def directories(language, tmp_path_factory):
  """A checkpoint, an adapter of it, one with a scalar head, one with a head to the vocabulary."""
  root, base = tmp_path_factory.mktemp('adapters'), language / 'model'
  return {
    'base': base,
    'adapter': hf_models.write_adapter(root / 'adapter', base),
    'scored': hf_models.write_adapter(root / 'scored', base, 'scalar'),
    'headed': hf_models.write_adapter(root / 'headed', base, modules_to_save=['lm_head']),
  }


@pytest.fixture
def weights():
  return Weights(Runtime(), models.mesh(1))


def _network(directory, lora=None):
  return dataclasses.replace(reader.load_config(directory), lora=lora)


def test_networks_share_the_arrays_of_their_base(weights, directories):
  reference = weights.frozen(directories['base'], _network(directories['base']), 'language')
  policy = weights.trained(
    directories['base'], _network(directories['base'], KIND), 'language', KEY
  )
  critic = weights.trained(directories['base'], _network(directories['base'], KIND), 'scalar', KEY)
  scored = reader.load_config(directories['scored'])
  reward = weights.frozen(directories['scored'], scored, 'scalar')
  for tree in (policy.base, critic.base, reward):
    same = jax.tree.map(lambda a, b: a is b, tree['backbone'], reference['backbone'])
    assert all(jax.tree.leaves(same))
  assert set(policy.params) == {'adapter'}
  assert set(critic.params) == {'adapter', 'scalar_head'}
  assert set(reward) == {'backbone', 'adapter', 'scalar_head'}
  # A step donates what it trains: two networks have no array of it in common.
  arrays = [id(x) for tree in (policy, critic) for x in jax.tree.leaves(tree.params)]
  assert len(set(arrays)) == len(arrays)
  assert not any(id(x) in arrays for x in jax.tree.leaves(reference))
  assert '(' in policy.describe() and 'beside a base of' in policy.describe()


def test_an_adapter_is_trained_further(weights, directories):
  config = reader.load_config(directories['adapter'])
  network = weights.trained(directories['adapter'], config, 'language', KEY)
  frozen = weights.frozen(directories['adapter'], config, 'language')
  jax.tree.map(np.testing.assert_array_equal, network.params['adapter'], frozen['adapter'])
  # The policy of a reward model's adapter leaves its head, a critic keeps it.
  config = reader.load_config(directories['scored'])
  critic = weights.trained(directories['scored'], config, 'scalar', KEY)
  reward = weights.frozen(directories['scored'], config, 'scalar')
  jax.tree.map(np.testing.assert_array_equal, critic.params['scalar_head'], reward['scalar_head'])


def test_a_head_is_trained_beside_adapters(weights, directories):
  kind = dataclasses.replace(KIND, train_head=True)
  base, headed = directories['base'], directories['headed']
  network = weights.trained(base, _network(base, kind), 'language', KEY)
  assert set(network.params) == {'adapter', 'lm_head'}
  # A step donates it, and the base's stays; the first policy is the reference.
  ours, theirs = network.params['lm_head']['kernel'], network.base['lm_head']['kernel']
  assert ours is not theirs and ours.unsafe_buffer_pointer() != theirs.unsafe_buffer_pointer()
  np.testing.assert_array_equal(ours, theirs)
  narrow = Weights(Runtime(compute_dtype='bfloat16'), models.mesh(1))
  trained = narrow.trained(base, _network(base, kind), 'language', KEY)
  assert trained.params['lm_head']['kernel'].dtype == 'float32'
  # One that was trained is a frozen network's, and goes on; a critic leaves it.
  config = reader.load_config(headed)
  assert config.lora == kind
  own = hf_models.tensors(headed)['base_model.model.lm_head.weight'].T
  for params in (
    weights.frozen(headed, config, 'language'),
    weights.trained(headed, config, 'language', KEY).params,
  ):
    np.testing.assert_array_equal(params['lm_head']['kernel'], own)
  assert narrow.frozen(headed, config, 'language')['lm_head']['kernel'].dtype == 'bfloat16'
  critic = weights.trained(headed, _network(headed, KIND), 'scalar', KEY)
  assert set(critic.params) == {'adapter', 'scalar_head'}
  assert set(critic.base) == {'backbone'}


def test_all_weights_of_a_checkpoint_are_trained(weights, directories):
  network = weights.trained(directories['base'], _network(directories['base']), 'scalar', KEY)
  assert network.base == {} and set(network.params) == {'backbone', 'scalar_head'}
  assert network.describe().endswith(' parameters')


@pytest.mark.parametrize(
  ('lora', 'message'),
  [
    (
      None,
      r'is an adapter, and config\.lora\.policy trains all weights; .* --config\.lora\.policy\.'
      r'rank=4 .*alpha=8\.0 .*targets=q_proj,v_proj,down_proj .*, or merge it: segjax conv',
    ),
    (
      dataclasses.replace(KIND, rank=8),
      r'asks for another one; .* set --config\.lora\.policy\.rank=4,',
    ),
    (dataclasses.replace(KIND, rs=True), r'set --config\.lora\.policy\.rs=False, or merge it'),
  ],
)
def test_an_adapter_of_another_kind_is_refused(directories, lora, message):
  with pytest.raises(UserError, match=message):
    check_adapter(directories['adapter'], KIND, lora, 'policy')
  check_adapter(directories['adapter'], KIND, KIND, 'policy')
  check_adapter(directories['base'], None, lora, 'policy')


def test_an_adapter_may_get_a_head_and_not_lose_one(directories):
  headed = dataclasses.replace(KIND, train_head=True)
  check_adapter(directories['adapter'], KIND, headed, 'policy')
  with pytest.raises(UserError, match=r'set --config\.lora\.policy\.train_head=True, or merge it'):
    check_adapter(directories['headed'], headed, KIND, 'policy')


def test_which_networks_are_on_one_base(directories):
  base, adapter, scored, _ = directories.values()
  assert base_directory(adapter) == base_directory(base) == base.resolve()
  plain, with_adapter = _network(base), _network(base, KIND)
  paths = {'policy': base, 'reference': base, 'reward': scored, 'critic': base}
  configs = dict.fromkeys(paths, with_adapter) | {'reference': plain}
  assert names_on_one_base(paths, configs) == ('policy', 'reference', 'reward', 'critic')
  assert names_on_one_base(paths, configs | {'critic': plain}) == ('policy', 'reference', 'reward')
  assert names_on_one_base(paths, dict.fromkeys(paths, plain)) == ()
