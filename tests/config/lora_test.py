"""Which networks have adapters, their learning rates, and settings that are refused."""

import math

import pytest

from segjax.config import parse, presets
from segjax.config.lora import check_lora, resolve_lora, with_adapter_rates
from segjax.config.settings import Lora, replace
from segjax.config.training_settings import LORA_TARGETS
from segjax.errors import UserError
from segjax.model.llama import LlamaConfig


def settings(**values):
  config = presets.default_config()
  config.update_from_flattened_dict({f'lora.{k.replace("__", ".")}': v for k, v in values.items()})
  return parse.from_config(config)


def test_without_a_rank_all_weights_are_trained():
  s = settings()
  assert {resolve_lora(s, name) for name in ('sft', 'reward', 'policy', 'critic')} == {None}
  assert with_adapter_rates(s) == s


def test_a_network_may_differ_from_the_others():
  s = settings(rank=8, critic__rank=0, reward__targets=('v_proj', 'q_proj'), policy__alpha=16.0)
  assert resolve_lora(s, 'critic') is None
  assert resolve_lora(s, 'sft') == Lora(8, 32.0, LORA_TARGETS)
  assert resolve_lora(s, 'reward').targets == ('q_proj', 'v_proj')  # in the order of the table
  assert resolve_lora(s, 'policy').scale == 2


def test_a_head_is_trained_of_language_models_alone():
  s = settings(rank=8, train_head=True, sft__train_head=False)
  names = ('sft', 'reward', 'dpo', 'policy', 'critic')
  assert [name for name in names if resolve_lora(s, name).train_head] == ['dpo', 'policy']
  assert not hasattr(s.lora.critic, 'train_head') and not hasattr(s.lora.reward, 'train_head')
  with pytest.raises(
    UserError, match=r'config\.lora\.train_head=True, but the embedding of .* set'
  ):
    LlamaConfig(64, 8, 8, 1, 1, 1, 8, tie_word_embeddings=True, lora=resolve_lora(s, 'policy'))
  tied = replace(s, **{'network.tie_word_embeddings': True})
  with pytest.raises(UserError, match='tie_word_embeddings says'):
    check_lora(tied)
  # All weights, and with them the embedding.
  check_lora(replace(tied, **{'lora.dpo.rank': 0, 'lora.policy.rank': 0}))


def test_scale_is_that_of_peft():
  assert Lora(rank=16, alpha=32.0).scale == 2
  assert Lora(rank=16, alpha=32.0, rs=True).scale == 32 / math.sqrt(16)


def test_rates_of_networks_with_adapters_are_multiplied():
  s = settings(rank=8, critic__rank=0, reward__learning_rate_factor=2.0)
  with_rates = with_adapter_rates(s)
  for before, after, factor in (
    (s.sft.optimizer, with_rates.sft.optimizer, 10),
    (s.reward.optimizer, with_rates.reward.optimizer, 2),
    (s.ppo.policy_optimizer, with_rates.ppo.policy_optimizer, 10),
    (s.ppo.critic_optimizer, with_rates.ppo.critic_optimizer, 1),
  ):
    assert after.learning_rate == pytest.approx(factor * before.learning_rate)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'rank': 8, 'targets': ()}, r'config\.lora\.targets is empty, but the sft has adapters of'),
    ({'critic__rank': 8, 'critic__targets': ()}, r'config\.lora\.critic\.targets is empty'),
    (
      {'targets': ('q_proj', 'k')},
      r"config\.lora\.targets='k' is not one of all-linear, q_p",
    ),
    ({'policy__targets': ('lm_head',)}, r"config\.lora\.policy\.targets='lm_head' is not one of"),
    ({'rank': -1}, r'config\.lora\.rank=-1 must be at least 0'),
  ],
)
def test_bad_settings_are_refused(values, message):
  with pytest.raises(UserError, match=message):
    settings(**values)


def test_a_base_cannot_wait_in_the_memory_of_the_host():
  config = presets.default_config()
  config.lora.rank, config.runtime.frozen_params_memory = 8, 'host'
  with pytest.raises(UserError, match=r'frozen_params_memory=host cannot be had with adapters'):
    parse.from_config(config)
