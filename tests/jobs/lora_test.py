"""The pipeline with adapters: every stage on one base, resumed to the same bits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from segjax.hf import adapter_config, reader
from segjax.hf.writer import save_checkpoint
from segjax.jobs import ppo_trainer
from segjax.model.heads import init_params

pytestmark = pytest.mark.campaign

RANK = {'lora.rank': 2, 'lora.alpha': 4.0, 'lora.learning_rate_factor': 1.0}
HEADED = {'lora.train_head': True}
STAGES = ('sft', 'reward', 'normalizer', 'ppo', 'evaluate')


@pytest.fixture
def values(small, language):
  rows = language / 'rows'
  paths = {
    'policy.path': str(language / 'model'),
    'sft.data.path': str(rows / 'sft.jsonl.gz'),
    'reward.data.path': str(rows / 'pairs.jsonl.gz'),
    'normalizer.data.path': str(rows / 'pairs.jsonl.gz'),
    'ppo.data.path': str(rows / 'prompts.jsonl.gz'),
    'evaluate.data.path': str(rows / 'held_out.jsonl.gz'),
    'ppo.policy_optimizer.learning_rate': 1e-2,
    'ppo.critic_optimizer.learning_rate': 1e-2,
    'checkpoint.every_steps': 1,
    'ppo.max_steps': 3,
  }
  return lambda **more: small(*STAGES, **(paths | RANK | more))


def _tensors(directory):
  return safetensors.numpy.load_file(directory / adapter_config.WEIGHTS)


def _items(directory):
  """Returns the paths of the arrays in a training state."""
  record = json.loads((directory / '_METADATA').read_text())
  return list(record['tree_metadata'])


@pytest.mark.parametrize('more', [{}, HEADED], ids=['adapters', 'headed'])
def test_every_stage_adds_adapters_to_one_base(
  more, values, run, language, tmp_path, monkeypatch, capsys
):
  seen, step = [], ppo_trainer.Trainer.step

  def watched(self, states, number):
    params = self._params(states)
    seen.append(
      all(
        params[name]['backbone']['embedding'] is params['reference']['backbone']['embedding']
        for name in ('policy', 'critic', 'reward')
      )
    )
    return step(self, states, number)

  with monkeypatch.context() as patch:
    patch.setattr(ppo_trainer.Trainer, 'step', watched)
    run(values(**more), tmp_path / 'a')
  assert seen == [True] * 3
  out = capsys.readouterr().out
  assert 'parameters' in out and 'beside a base of' in out
  base = str((language / 'model').absolute())
  for name in ('sft/model', 'reward/model', 'ppo/model', 'ppo/critic'):
    directory = tmp_path / 'a' / name
    adapter = adapter_config.read_adapter(directory)
    assert adapter.base == base and adapter.lora.rank == 2
    assert adapter.has_score == (name in ('reward/model', 'ppo/critic'))
    assert adapter.lora.train_head == (bool(more) and not adapter.has_score)
    assert not (directory / 'config.json').exists()
  # The base counts as an input, and is read once for all adapters.
  inputs = json.loads((tmp_path / 'a' / 'ppo' / 'stage.json').read_text())['key']['inputs']
  assert [name for name in inputs if name.startswith('base of ')] == ['base of policy.path']
  # PPO has gone on with the adapter of SFT, not begun a second one.
  before, after = (_tensors(tmp_path / 'a' / name) for name in ('sft/model', 'ppo/model'))
  assert before.keys() == after.keys()
  assert any(np.any(before[name] != after[name]) for name in before)
  assert json.loads((tmp_path / 'a' / 'evaluate' / 'results.json').read_text())


def test_adapters_of_a_base_whose_files_fuse_matrices(values, run, language, tmp_path):
  source, base = language / 'model', tmp_path / 'phi3'
  config = dataclasses.replace(reader.load_config(source), family='phi3')
  params = init_params(jax.random.key(7), config, 'language')
  save_checkpoint(base, params, config, 'language', source=source)
  run(values(**{'policy.path': str(base)}), tmp_path / 'a')
  for name in ('sft/model', 'reward/model', 'ppo/model', 'ppo/critic'):
    adapter = adapter_config.read_adapter(tmp_path / 'a' / name)
    assert adapter.blocks and adapter.lora.rank == 2
  before, after = (_tensors(tmp_path / 'a' / name) for name in ('sft/model', 'ppo/model'))
  assert before.keys() == after.keys()
  assert any(np.any(before[name] != after[name]) for name in before if 'qkv_proj' in name)


def test_a_resumed_run_gives_the_same_bits(values, run, tmp_path, monkeypatch, capsys):
  run(values(**HEADED), tmp_path / 'whole')
  step = ppo_trainer.Trainer.step

  def interrupted(self, states, number):
    if number == 2:
      raise KeyboardInterrupt
    return step(self, states, number)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ppo_trainer.Trainer, 'step', interrupted)
    run(values(**HEADED), tmp_path / 'stopped')
  saved = sorted((tmp_path / 'stopped' / 'ppo' / 'checkpoints').glob('*/policy'))
  assert saved
  names = _items(saved[-1])
  assert names and all('adapter' in name or 'lm_head' in name for name in names)
  assert any('lm_head' in name for name in names)
  capsys.readouterr()
  run(values(**HEADED), tmp_path / 'stopped')
  assert 'resuming from step' in capsys.readouterr().out
  for name in ('model', 'critic'):
    first, second = (_tensors(tmp_path / d / 'ppo' / name) for d in ('whole', 'stopped'))
    assert first.keys() == second.keys()
    for key in first:
      np.testing.assert_array_equal(first[key], second[key])
