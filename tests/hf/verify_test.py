import dataclasses
import json
import sys

import numpy as np
import pytest
import safetensors.numpy
from fixtures import hf_models

from segjax.hf import convert, verify
from segjax.hf.verify import Difference, Verification


@pytest.mark.parametrize(
  'kind',
  [
    'llama31',
    *(pytest.param(k, marks=pytest.mark.campaign) for k in ('llama3', 'llama32', 'linear')),
  ],
)
def test_language_models(kind, tmp_path):
  source = hf_models.write(tmp_path, kind)
  result = verify.verify(source)
  assert result.passed, result
  assert result.compared == 'logits'
  assert result.max_abs <= result.tolerance < 1e-3
  assert 0 < result.mean_abs <= result.max_abs
  assert [(d.length, d.last) for d in result.sequences] == [(64, 63)]


def long_model(directory, kind):
  """Writes a model of 131,072 positions whose attention is sharp, so that angles matter."""
  rope = {'rope_type': 'default', 'rope_theta': 5e5}
  if kind != 'plain':
    rope = hf_models.KINDS[kind]['rope_parameters']
  if kind == 'llama31':
    rope = rope | {'original_max_position_embeddings': 8192}
  return hf_models.write(
    directory,
    max_position_embeddings=131072,
    rope_parameters=rope,
    hidden_size=128,
    num_attention_heads=2,
    num_key_value_heads=1,
    initializer_range=0.1,
  )


@pytest.mark.parametrize('kind', ['plain', 'llama31', 'linear'])
def test_long_contexts(kind, tmp_path):
  """Frequencies in float64 gave logits that differ by 0.006, 0.004 and 0.0004."""
  result = verify.verify(long_model(tmp_path, kind))
  assert (result.sequences[1].length, result.sequences[1].last) == (512, 131071)
  assert result.max_abs < 2e-5
  assert result.passed


@pytest.mark.campaign
def test_contexts_of_a_moderate_length_are_compared_token_by_token(tmp_path):
  result = verify.verify(hf_models.write(tmp_path, 'llama31', max_position_embeddings=1024))
  assert [(d.length, d.last) for d in result.sequences] == [(64, 63), (1024, 1023)]
  assert result.passed, result


@pytest.mark.campaign
def test_a_wrong_context_is_detected(tmp_path, monkeypatch):
  source = hf_models.write(tmp_path, 'llama31')
  result = verify.verify(source, length=70)
  assert [(d.length, d.last) for d in result.sequences] == [(70, 69)]
  original = verify.config_from_hf

  def wrong(*args, **runtime):
    config = original(*args, **runtime)
    scaling = dataclasses.replace(config.rope_scaling, original_max_position_embeddings=32)
    return dataclasses.replace(config, rope_scaling=scaling)

  monkeypatch.setattr(verify.reader, 'config_from_hf', wrong)
  assert not verify.verify(source).passed


@pytest.mark.campaign
def test_narrow_dtypes_and_provided_tokens(tmp_path):
  source = hf_models.write(tmp_path, dtype='bfloat16')
  ids = [[1, 2, 3], [63, 0]]
  result = verify.verify(source, ids=ids)
  assert result.passed
  assert result.tolerance < 1e-3
  assert [difference.length for difference in result.sequences] == [3, 2]
  narrow = verify.verify(source, ids=ids, dtype='bfloat16')
  assert narrow.passed, narrow
  assert narrow.max_abs > 10 * result.max_abs
  assert not verify.verify(source, ids=ids, tolerance=0.0).passed


@pytest.mark.campaign
def test_imported_checkpoints(tmp_path):
  source = hf_models.write(tmp_path / 'a', 'llama31')
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  result = verify.verify(source, stored)
  assert result.passed, result
  assert result.tolerance < 1e-3
  rounded = verify.verify(
    source, convert.import_checkpoint(source, tmp_path / 'c', dtype='float16')
  )
  assert rounded.passed, rounded
  assert rounded.max_abs > 1e-4  # more than with equal weights
  critic = verify.verify(source, convert.import_checkpoint(source, tmp_path / 'd', role='critic'))
  assert critic.passed, critic
  assert critic.compared == 'hidden states'


def test_different_weights_fail(tmp_path):
  source = hf_models.write(tmp_path / 'a')
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  tensors = hf_models.tensors(source)
  tensors['model.layers.1.self_attn.k_proj.weight'][0, 0] += 0.5
  safetensors.numpy.save_file(tensors, source / 'model.safetensors', metadata={'format': 'pt'})
  result = verify.verify(source, stored)
  assert not result.passed
  assert 'FAILED: logits differ' in str(result)


def test_reward_models(tmp_path):
  source = hf_models.write(tmp_path / 'a', 'llama32', 'scalar')
  result = verify.verify(source, convert.import_checkpoint(source, tmp_path / 'b', role='reward'))
  assert result.passed, result
  assert result.compared == 'scores'
  tensors = hf_models.tensors(source)
  tensors['value_head.weight'] = tensors.pop('score.weight')
  safetensors.numpy.save_file(tensors, source / 'model.safetensors', metadata={'format': 'pt'})
  raw = json.loads((source / 'config.json').read_text())
  raw |= {'architectures': ['RewardModel'], 'value_head_prefix': 'value_head'}
  (source / 'config.json').write_text(json.dumps(raw))
  renamed = verify.verify(source)
  assert renamed.passed, renamed
  assert renamed.compared == 'scores'


def test_nan_does_not_pass():
  nan = Verification('logits', (Difference(2, 1, np.nan, np.nan),), np.nan, np.nan, 1e-4)
  assert not nan.passed
  assert dataclasses.replace(nan, max_abs=1e-4).passed


def test_refuses(llama3, tmp_path, monkeypatch):
  source = llama3
  with pytest.raises(ValueError, match=r"dtype='int8' is not one of float32"):
    verify.verify(source, dtype='int8')
  for ids in ([[64]], [[-1]]):
    with pytest.raises(ValueError, match='not all in the vocabulary of 64'):
      verify.verify(source, ids=ids)
  for ids in ([], [[]]):
    with pytest.raises(ValueError, match='at least one token id'):
      verify.verify(source, ids=ids)
  with pytest.raises(ValueError, match='no directory'):
    verify.verify(source, tmp_path / 'none')
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  (tmp_path / 'b' / 'hf' / 'config.json').write_text(
    json.dumps(json.loads((source / 'config.json').read_text()) | {'vocab_size': 65})
  )
  with pytest.raises(ValueError, match=r'backbone/embedding should be \[65, 32\]; found shape'):
    verify.verify(source, stored)
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ValueError, match='pip install torch'):
    verify.verify(source)
