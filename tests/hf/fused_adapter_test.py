"""Adapters of a base whose files fuse matrices, in peft's form: `peft_test` compares with it."""

import json

import numpy as np
import pytest
import safetensors.numpy
from fixtures import hf_models, tokenizers

from segjax.config.settings import Lora
from segjax.config.training_settings import LORA_TARGETS
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.hf import adapter, adapter_writer, convert, merge, model_card, reader
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import make_mesh

FUSED = ['qkv_proj', 'o_proj', 'gate_up_proj', 'down_proj']


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """A Phi-3 checkpoint with a tokenizer; tests must not change it."""
  directory = hf_models.write(tmp_path_factory.mktemp('phi3'), 'phi3', vocab_size=320)
  tokenizers.write_tokenizer(directory)
  return directory


@pytest.fixture(scope='module', params=[False, True], ids=['lora', 'rslora'])
def shared(request, base, tmp_path_factory):
  """An adapter as peft trains it, the parts of a matrix sharing A; tests must not change it."""
  directory = tmp_path_factory.mktemp('adapters') / 'shared'
  fields = {'target_modules': FUSED, 'use_rslora': request.param}
  return hf_models.write_adapter(directory, base, **fields)


@pytest.fixture(scope='module')
def blocks(shared, base, tmp_path_factory):
  """The same adapter as it is saved here."""
  directory = tmp_path_factory.mktemp('adapters') / 'blocks'
  config = reader.load_config(shared)
  trained = adapter.load_trained(adapter.read_adapter(shared), config, 'language', None)
  save = {'base': str(base), 'source': base, 'card': model_card.Card()}
  tokenizer = load_tokenizer(str(base))
  adapter_writer.save_adapter(directory, trained, config, 'language', tokenizer=tokenizer, **save)
  return directory


def _merged(directory, base):
  """HF's weights W + s B A, matrix by matrix, with the ranks and scales of adapter_config.json."""
  raw = json.loads((directory / adapter.CONFIG).read_text())
  weights, own = hf_models.tensors(base), hf_models.tensors(directory)
  for name in weights:
    module = name.removesuffix('.weight')
    key, kind = f'base_model.model.{module}.lora', module.rpartition('.')[2]
    if f'{key}_A.weight' in own:
      rank = raw.get('rank_pattern', {}).get(kind, raw['r'])
      alpha = raw.get('alpha_pattern', {}).get(kind, raw['lora_alpha'])
      b, a = (own[f'{key}_{x}.weight'].astype(np.float64) for x in 'BA')
      assert a.shape[0] == b.shape[1] == rank
      scale = alpha / (rank**0.5 if raw['use_rslora'] else rank)
      weights[name] = weights[name].astype(np.float64) + scale * b @ a
  return weights


def test_merged(shared, blocks, base, tmp_path):
  """Both forms are the same change of every matrix, as peft computes it from the files."""
  expected = _merged(shared, base)
  for name, weight in _merged(blocks, base).items():
    np.testing.assert_allclose(weight, expected[name], rtol=0, atol=1e-6, err_msg=name)
  for number, own in enumerate((shared, blocks)):
    found = hf_models.tensors(merge.merge_adapter(own, tmp_path / f'{number}'))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
      np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-6, err_msg=name)


def test_what_is_saved_is_read_again(shared, blocks):
  first, second = (
    adapter.load_trained(adapter.read_adapter(own), reader.load_config(own), 'language', None)
    for own in (shared, blocks)
  )
  hf_models.assert_same_params(first, second)
  assert adapter.read_adapter(shared).lora == adapter.read_adapter(blocks).lora
  assert adapter.read_adapter(blocks).lora.targets == LORA_TARGETS


def test_refuses_what_mixes_the_parts(blocks, tmp_path):
  tensors = hf_models.tensors(blocks)
  name = next(name for name in tensors if 'qkv_proj.lora_B' in name)
  tensors[name][0, -1] = 1  # of query, from A of value
  (tmp_path / adapter.CONFIG).write_bytes((blocks / adapter.CONFIG).read_bytes())
  safetensors.numpy.save_file(tensors, tmp_path / adapter.WEIGHTS)
  config = reader.load_config(tmp_path)
  with pytest.raises(UserError, match='is block-diagonal, but other elements are not 0'):
    adapter.load_trained(adapter.read_adapter(tmp_path), config, 'language', None)
  with pytest.raises(UserError, match='is block-diagonal'):
    merge.merge_adapter(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'rank_pattern': {'qkv_proj': 4}}, 'rank_pattern=.* asks for ranks that differ'),
    ({'rank_pattern': {'qkv_proj': 12, 'gate_up_proj': 8}}, 'asks for ranks that differ'),
    (
      {'target_modules': ['q_proj', 'k_proj', 'v_proj']},
      'holds tensors .*gate_up_proj.* not in it',
    ),
  ],
)
def test_refuses(fields, message, base, tmp_path):
  own = hf_models.write_adapter(tmp_path / 'a', base, target_modules=FUSED)
  raw = json.loads((own / adapter.CONFIG).read_text()) | fields
  (own / adapter.CONFIG).write_text(json.dumps(raw))
  with pytest.raises(UserError, match=message):
    adapter.open_weights(adapter.read_adapter(own), reader.load_config(own))


def test_a_part_of_a_fused_matrix_is_refused():
  lora = Lora(4, 8.0, ('q_proj', 'v_proj'))
  with pytest.raises(UserError, match='targets=q_proj,v_proj lacks k_proj of qkv_proj'):
    LlamaConfig(320, 32, 48, 2, 4, 2, 8, family='phi3', lora=lora)


def test_an_adapter_of_separate_matrices_has_no_patterns(llama3, tmp_path):
  """A Llama's adapter does not fit a fused base, and says so."""
  own = hf_models.write_adapter(tmp_path / 'a', llama3)
  assert not adapter.read_adapter(own).blocks
  phi3 = hf_models.write(tmp_path / 'phi3', 'phi3')
  raw = json.loads((own / adapter.CONFIG).read_text()) | {'base_model_name_or_path': str(phi3)}
  (own / adapter.CONFIG).write_text(json.dumps(raw))
  with pytest.raises(UserError, match=r'lacks k_proj of qkv_proj'):
    reader.load_config(own)


def test_parts_are_read_by_the_devices_that_hold_them(base):
  """Slices over fsdp and tensor of query, key, value, gate and up are rows of fused tensors."""
  config = reader.load_config(base)
  whole = reader.load_params(base, config, 'language')
  split = reader.load_params(base, config, 'language', make_mesh(1, 2, 4))
  hf_models.assert_same_params(whole, split)


def test_a_shard_holds_whole_tensors(base, tmp_path):
  stored = convert.import_checkpoint(base, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c', max_shard_bytes=1)
  sizes = [len(safetensors.numpy.load_file(file)) for file in out.glob('*.safetensors')]
  assert sizes == [1] * len(hf_models.tensors(base))
  hf_models.assert_same_tensors(base, out)
