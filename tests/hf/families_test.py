"""Families beside Llama: their files, their logits and the limits of what is read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from fixtures import hf_models

from segjax.config.choices import FAMILIES
from segjax.config.settings import Network
from segjax.hf import convert, families, reader, writer
from segjax.hf.config import config_from_hf, config_to_hf
from segjax.model import heads
from segjax.model.llama import make_config

TOLERANCE = 1e-4
_LOGITS = jax.jit(heads.logits, static_argnums=2)
_SCORES = jax.jit(heads.scores, static_argnums=2)

# Beside the one of `hf_models.FAMILIES`, each flag the other way.
VARIANTS = {
  'mistral': ('mistral', {'tie_word_embeddings': True, 'head_dim': None}),
  'mistral, window': ('mistral', {'sliding_window': 16}),
  'qwen2': ('qwen2', {'tie_word_embeddings': False, 'num_key_value_heads': 4}),
  'qwen2, window': ('qwen2', {'use_sliding_window': True, 'sliding_window': 16}),
  'qwen3': ('qwen3', {'tie_word_embeddings': True, 'attention_bias': False, 'head_dim': 12}),
  'phi3': ('phi3', {'tie_word_embeddings': True, 'num_key_value_heads': 4}),
  'phi3, plain': ('phi3', {'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4}}),
  'phi3, window': ('phi3', {'sliding_window': 16}),
}


@pytest.fixture(scope='module', params=hf_models.FAMILIES)
def source(request, tmp_path_factory):
  """A checkpoint of a family; tests must not change it."""
  return hf_models.write(tmp_path_factory.mktemp(request.param), request.param)


def _assert_logits_equal(directory, length=hf_models.IDS.shape[1]):
  config = reader.load_config(directory, remat='none')
  ids = hf_models.IDS[:, :length]
  expected = hf_models.torch_logits(directory, ids)
  assert np.abs(expected).max() > 0.5  # small logits would be equal to anything
  params = reader.load_params(directory, config, 'language')
  found = np.asarray(_LOGITS(params, jnp.asarray(ids), config))
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_the_families_are_those_of_the_settings():
  assert tuple(families.FAMILIES) == FAMILIES
  assert {*hf_models.FAMILIES, 'llama'} == set(FAMILIES)


def test_logits_equal_transformers(source):
  _assert_logits_equal(source)


def test_import_then_export_is_bit_equal(source, tmp_path):
  stored = convert.import_checkpoint(source, tmp_path / 'b', piece_bytes=1000)
  exported = convert.export_checkpoint(stored, tmp_path / 'c', max_shard_bytes=20_000)
  hf_models.assert_same_tensors(source, exported)
  assert config_from_hf(exported) == config_from_hf(source)
  assert (
    type(transformers.AutoConfig.from_pretrained(exported)).model_type
    == config_from_hf(source).family
  )
  assert len(list(exported.glob('*.safetensors'))) > 1


def test_saved_parameters_are_bit_equal(source, tmp_path):
  config = reader.load_config(source)
  params = reader.load_params(source, config, 'language')
  writer.save_checkpoint(tmp_path / 'b', params, config, 'language', source=source)
  hf_models.assert_same_tensors(source, tmp_path / 'b')
  assert config_from_hf(tmp_path / 'b') == config


@pytest.mark.campaign
@pytest.mark.parametrize('variant', VARIANTS)
def test_variants_equal_transformers(variant, tmp_path):
  kind, fields = VARIANTS[variant]
  _assert_logits_equal(hf_models.write(tmp_path, kind, **fields))


@pytest.mark.campaign
@pytest.mark.parametrize('kind', hf_models.FAMILIES)
def test_scores_equal_transformers(kind, tmp_path):
  directory = hf_models.write(tmp_path / 'a', kind, 'scalar', dtype='bfloat16')
  config = reader.load_config(directory, remat='none')
  params = reader.load_params(directory, config, 'scalar')
  found = np.asarray(_SCORES(params, jnp.asarray(hf_models.IDS), config))[:, -1]
  expected = hf_models.torch_scores(directory, hf_models.IDS)
  np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
  stored = convert.import_checkpoint(directory, tmp_path / 'b', role='reward')
  hf_models.assert_same_tensors(directory, convert.export_checkpoint(stored, tmp_path / 'c'))


@pytest.mark.parametrize(
  ('kind', 'in_use'), [('mistral', {}), ('qwen2', {'use_sliding_window': True})]
)
def test_a_window_limits_the_positions(kind, in_use):
  classes, _ = hf_models.FAMILIES[kind]
  raw = json.loads((getattr(transformers, f'{classes}Config')()).to_json_string())
  raw |= {'max_position_embeddings': 64, 'sliding_window': 48, **in_use}
  config = config_from_hf(raw)
  assert config.max_position_embeddings == 48
  written = config_to_hf(config, 'language', base_config=raw)
  assert (written['max_position_embeddings'], written['sliding_window']) == (64, 48)
  assert config_from_hf(written) == config


@pytest.mark.parametrize('kind', hf_models.FAMILIES)
def test_missing_keys_have_the_defaults_of_transformers(kind):
  required = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers')
  sizes = {'num_attention_heads': 64, **dict.fromkeys(required, 512)}
  theirs = getattr(transformers, f'{hf_models.FAMILIES[kind][0]}Config')(**sizes).to_dict()
  ours = config_from_hf({'model_type': kind, **sizes})
  window = theirs.get('sliding_window') or theirs['max_position_embeddings']
  assert ours.max_position_embeddings == min(theirs['max_position_embeddings'], window)
  assert ours.head_dim == (theirs.get('head_dim') or 512 // 64)
  assert ours.rope_theta == theirs['rope_parameters']['rope_theta']
  for key in ('num_key_value_heads', 'rms_norm_eps', 'initializer_range', 'tie_word_embeddings'):
    assert getattr(ours, key) == theirs[key], key


@pytest.mark.parametrize('family', FAMILIES)
def test_a_network_from_settings_survives_its_config_file(family):
  config = make_config(Network(family=family, vocab_size=64))
  assert config_from_hf(config_to_hf(config, 'language')) == config


RAW_LONGROPE = {
  'model_type': 'phi3',
  'vocab_size': 64,
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'max_position_embeddings': 64,
  'original_max_position_embeddings': 16,
  'rope_scaling': {'type': 'su', 'short_factor': [1, 1, 1, 2], 'long_factor': [1, 2, 4, 8]},
}


def test_longrope_has_the_positions_of_its_short_factors():
  config = config_from_hf(RAW_LONGROPE)
  assert config.max_position_embeddings == 16
  # sqrt(1 + ln(64 / 16) / ln 16) = sqrt(1.5)
  assert config.rope_scaling.attention_factor == pytest.approx(1.5**0.5)
  for base in (None, RAW_LONGROPE):
    written = config_to_hf(config, 'language', base_config=base)
    assert config_from_hf(written) == config
    assert (written['max_position_embeddings'], written['rope_scaling']['type']) == (64, 'longrope')
    assert (
      transformers.Phi3Config(**written).rope_parameters['original_max_position_embeddings'] == 16
    )


def test_an_attention_factor_of_its_own_is_kept():
  scaling = RAW_LONGROPE['rope_scaling'] | {'attention_factor': 1.25}
  config = config_from_hf(RAW_LONGROPE | {'rope_scaling': scaling})
  assert config.rope_scaling.attention_factor == 1.25
  assert config_from_hf(config_to_hf(config, 'language')) == config


@pytest.mark.parametrize('value', [None, 'all', [1, 1, 1], [1, 1, 1, 0], [1, 1, 1, '2']])
def test_refuses_factors_of_longrope(value):
  scaling = RAW_LONGROPE['rope_scaling'] | {'short_factor': value}
  with pytest.raises(
    ValueError, match='needs short_factor, 4 positive numbers for a head_dim of 8'
  ):
    config_from_hf(RAW_LONGROPE | {'rope_scaling': scaling})
