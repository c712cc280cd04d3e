"""The sizes of published models."""

import pytest

from configs import dpo, ppo, reward
from configs.shared import model_sizes, topologies
from segjax.config import parse
from segjax.config.settings import Network
from segjax.config.validate import longest_sequence
from segjax.data.sources import is_hub_id
from segjax.model.llama import make_config, num_parameters
from segjax.plan.topologies import parse as parse_topology


@pytest.mark.parametrize(
  'size, parameters',
  # From their model cards: 8.03 B, 1.24 B and 3.21 B with tied embeddings, 3.8 B; 135 M, 362 M and
  # 0.49 B below.
  [
    (model_sizes.llama3_8b, 8_030_261_248),
    (model_sizes.llama31_8b, 8_030_261_248),
    (model_sizes.llama32_1b, 1_235_814_400),
    (model_sizes.llama32_3b, 3_212_749_824),
    (model_sizes.phi3_mini, 3_821_079_552),
    (model_sizes.qwen25_05b, 494_032_768),
    (model_sizes.smollm2_360m, 361_821_120),
    (model_sizes.smollm2_135m, 134_515_008),
  ],
)
def test_sizes(size, parameters):
  assert num_parameters(make_config(Network(**size()))) == parameters


PLANS = [
  (job, {'8b': 'llama3_8b_sft', '70b': 'llama3_70b'}.get(size, size), topology)
  for job, size in topologies.TOPOLOGIES
  for topology in topologies.TOPOLOGIES[job, size]
]
LADDER_PLANS = [plan for plan in PLANS if plan[1] in model_sizes.LADDER]
MODULES = {'ppo': ppo, 'reward': reward}


def test_the_ladder_is_complete():
  """Each model has sizes, a hub id and both jobs on a GPU and on a host of eight small TPUs."""
  names = list(model_sizes.LADDER)
  assert names == [name for name in model_sizes.SIZES if name in names]
  sizes = [num_parameters(make_config(Network(**model_sizes.SIZES[name]()))) for name in names]
  assert sizes == sorted(sizes)
  assert {(job, name) for job, name, _ in LADDER_PLANS} == {
    (job, name) for job in ('ppo', 'reward') for name in names
  }
  assert len(LADDER_PLANS) == 2 * 2 * len(names)
  assert {topology for *_, topology in LADDER_PLANS} == {'cuda:1xH100-80GB', 'v5e:2x4'}
  assert all(is_hub_id(model_sizes.HUB[name]['policy']) for name in names)


@pytest.mark.parametrize('job, name, topology', LADDER_PLANS)
def test_a_preset_of_the_ladder(job, name, topology):
  s = parse.from_config(MODULES[job].get_config(f'{name},{topology}'))
  assert s.stages == (job,)
  assert s.policy.path == model_sizes.HUB[name]['policy']
  assert s.runtime.compute_dtype == 'bfloat16'
  if job == 'ppo':
    assert s.data.path == 'argilla/ultrafeedback-binarized-preferences-cleaned'
    # segment_reward.json of the reward model that the user trains says how it reads segments.
    assert (s.reward_model.path, s.reward_model.normalizer) == ('', '')
    assert s.reward_model.segmentation.granularity is None
  else:
    assert s.data.path == 'hendrydong/preference_700K'
    assert s.reward.segmentation.granularity == 'segment'


@pytest.mark.parametrize('job, name, topology', PLANS)
def test_settings_of_a_topology(job, name, topology):
  s = parse.from_config(MODULES[job].get_config(f'{name},{topology}'))
  section, (longest, _) = getattr(s, job), longest_sequence(s, job)
  # A piece holds the longest sequence, for which the network has positions.
  assert longest <= section.packing_length <= section.micro_batch_tokens * s.mesh.tensor
  assert longest <= s.network.max_position_embeddings
  # Batches divide over the devices, and rows of heads over those that share rows.
  assert s.network.num_key_value_heads % s.mesh.tensor == 0
  groups = parse_topology(topology).count // s.mesh.tensor
  sizes = [s.reward.batch_size]
  if job == 'ppo':
    sizes = [s.ppo.rollout_batch_size, s.ppo.minibatch_size, s.ppo.scoring_batch_size]
  assert not any(size % groups for size in sizes)
  assert job != 'ppo' or s.ppo.rollout_batch_size % s.ppo.scoring_batch_size == 0


def test_smaller_models_have_larger_rates():
  names = [*model_sizes.LADDER, 'llama3_8b_sft']
  settings = [parse.from_config(ppo.get_config(name)) for name in names]
  for rates in (
    [s.ppo.policy_optimizer.learning_rate for s in settings],
    [s.ppo.critic_optimizer.learning_rate for s in settings],
    [parse.from_config(reward.get_config(name)).reward.optimizer.learning_rate for name in names],
    [parse.from_config(dpo.get_config(name)).dpo.optimizer.learning_rate for name in names],
  ):
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(5 * rates[-1])
