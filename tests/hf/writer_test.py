import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from fixtures import hf_models

from segjax.errors import UserError
from segjax.hf import reader, writer
from segjax.hf.model_card import Card
from segjax.model import heads
from segjax.model.mesh import make_mesh


def _load(directory, head='language', **kwargs):
  config = reader.load_config(directory)
  return config, reader.load_params(directory, config, head, **kwargs)


@pytest.mark.parametrize('kind', hf_models.KINDS)
def test_round_trip_is_bit_equal(kind, tmp_path):
  source = hf_models.write(tmp_path / 'a', kind)
  config, params = _load(source)
  out = writer.save_checkpoint(tmp_path / 'b', params, config, 'language', source=source)
  hf_models.assert_same_tensors(source, out)
  assert reader.load_config(out) == config
  np.testing.assert_array_equal(
    hf_models.torch_logits(out, hf_models.IDS), hf_models.torch_logits(source, hf_models.IDS)
  )


def test_round_trip_of_a_trained_llama(shared_files, tmp_path):
  source = shared_files / 'models' / 'stories260k-hf'
  config, params = _load(source)
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language', source=source)
  hf_models.assert_same_tensors(source, out)
  for name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json'):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert model.config.eos_token_id == 2
  assert not (out / 'golden_greedy_200.json').exists()


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_round_trip_of_narrow_files(dtype, tmp_path):
  source = hf_models.write(tmp_path / 'a', dtype=dtype)
  config, params = _load(source, dtype='')
  narrow = writer.save_checkpoint(tmp_path / 'b', params, config, 'language')
  hf_models.assert_same_tensors(source, narrow)
  assert json.loads((narrow / 'config.json').read_text())['torch_dtype'] == dtype
  config, params = _load(source)
  cast = writer.save_checkpoint(tmp_path / 'c', params, config, 'language', dtype=dtype)
  hf_models.assert_same_tensors(source, cast)


def test_file_equals_that_of_the_safetensors_library(llama3, tmp_path):
  config, params = _load(llama3)
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language')
  name = 'model.safetensors'
  assert (out / name).read_bytes() == (llama3 / name).read_bytes()


def test_mixed_dtypes_stay_aligned(llama3, tmp_path):
  config, params = _load(llama3, dtype='bfloat16')
  params['backbone']['norm']['scale'] = params['backbone']['norm']['scale'].astype(jnp.float32)
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language')
  tensors = reader.open_checkpoint(out).tensors
  assert {tensor.dtype for tensor in tensors.values()} == {'F32', 'BF16'}
  assert all(t.offset % (4 if t.dtype == 'F32' else 2) == 0 for t in tensors.values())
  hf_models.assert_same_params(_load(out, dtype='')[1], params)
  hf_models.torch_logits(out, hf_models.IDS)


def test_shards(llama3, tmp_path):
  config, params = _load(llama3)
  limit = 20_000
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language', max_shard_bytes=limit)
  files = sorted(out.glob('*.safetensors'))
  assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors'
  assert len(files) > 2
  assert all(file.stat().st_size < limit + 4000 for file in files)  # and its header
  hf_models.assert_same_tensors(llama3, out)
  index = json.loads((out / 'model.safetensors.index.json').read_text())
  assert index['metadata']['total_size'] == 4 * reader.open_checkpoint(out).num_parameters()
  np.testing.assert_array_equal(
    hf_models.torch_logits(out, hf_models.IDS), hf_models.torch_logits(llama3, hf_models.IDS)
  )


def test_from_eight_devices_and_from_numpy(llama3, tmp_path):
  config, params = _load(llama3, mesh=make_mesh(2, 2, 2))
  spread = writer.save_checkpoint(tmp_path / 'a', params, config, 'language')
  hf_models.assert_same_tensors(llama3, spread)
  host = jax.tree.map(np.asarray, params)
  hf_models.assert_same_tensors(
    llama3, writer.save_checkpoint(tmp_path / 'b', host, config, 'language')
  )


@pytest.mark.parametrize('kind', ['llama3', 'llama32'])
def test_reward_model(kind, tmp_path):
  source = hf_models.write(tmp_path / 'a', kind)
  config, params = _load(source, 'scalar', key=jax.random.key(0))
  out = writer.save_checkpoint(
    tmp_path / 'b', params, config, 'scalar', source=source, extra_config={'mean': 0.5}
  )
  ids = np.maximum(hf_models.IDS, 1)  # 0 is padding
  ours = np.asarray(heads.scores(params, jnp.asarray(ids), config))[:, -1]
  np.testing.assert_allclose(hf_models.torch_scores(out, ids), ours, rtol=0, atol=1e-5)
  hf_models.assert_same_params(_load(out, 'scalar')[1], params)
  raw = json.loads((out / 'config.json').read_text())
  assert raw['architectures'] == ['LlamaForSequenceClassification']
  assert (raw['mean'], raw['value_head_prefix']) == (0.5, 'score')
  again = writer.save_checkpoint(tmp_path / 'c', params, config, 'scalar', source=out)
  hf_models.assert_same_tensors(out, again)
  assert json.loads((again / 'config.json').read_text())['mean'] == 0.5


def test_tokenizer_files_are_copied_and_others_are_not(llama3, tmp_path):
  config, params = _load(llama3)
  source = tmp_path / 'source'
  (source / 'additional_chat_templates').mkdir(parents=True)
  names = ('chat_template.jinja', 'tokenizer.json', 'additional_chat_templates/tool.jinja')
  for name in (*names, 'segment_reward.json', 'model.safetensors', 'code.py'):
    (source / name).write_bytes(b'\xff\r\n' + name.encode())
  (source / 'config.json').write_bytes((llama3 / 'config.json').read_bytes())
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language', source=source)
  assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
  assert not (out / 'segment_reward.json').exists()
  assert not (out / 'code.py').exists()
  hf_models.assert_same_tensors(llama3, out)


def test_card_and_generation_config(llama3, tmp_path):
  config, params = _load(llama3)
  card = Card(base_model='owner/base', stage='sft', metrics={'loss': 1.5})
  how = {'card': card, 'extra_config': {'eos_token_id': [2, 5]}}
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language', **how)
  assert huggingface_hub.ModelCard.load(out / 'README.md').data.base_model == 'owner/base'
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert model.generation_config.eos_token_id == [2, 5]
  again = writer.save_checkpoint(
    tmp_path / 'again', params, config, 'language', source=out, card=Card(stage='ppo')
  )
  data = huggingface_hub.ModelCard.load(again / 'README.md').data
  assert (data.base_model, data.stage) == ('owner/base', 'ppo')
  assert data.eval_results is None
  plain = writer.save_checkpoint(tmp_path / 'plain', params, config, 'language', source=out)
  assert not (plain / 'README.md').exists()


def test_replaces_a_checkpoint_and_leaves_nothing_behind(llama3, tmp_path):
  config, params = _load(llama3)
  out = tmp_path / 'out'
  writer.save_checkpoint(out, params, config, 'language', max_shard_bytes=20_000)
  writer.save_checkpoint(out, params, config, 'language')
  names = ['config.json', 'generation_config.json', 'model.safetensors']
  assert sorted(file.name for file in out.iterdir()) == names
  assert [file.name for file in tmp_path.iterdir()] == ['out']


def test_a_failure_leaves_the_old_checkpoint(llama3, tmp_path, monkeypatch):
  config, params = _load(llama3)
  out = writer.save_checkpoint(tmp_path / 'out', params, config, 'language')

  def fail(*args):
    raise OSError('disk full')

  monkeypatch.setattr(writer.shards, 'write_json', fail)
  with pytest.raises(UserError, match='disk full'):
    writer.save_checkpoint(out, params, config, 'language', dtype='float16')
  assert [file.name for file in tmp_path.iterdir()] == ['out']
  hf_models.assert_same_tensors(llama3, out)


def test_refuses_to_replace_what_is_not_a_checkpoint(llama3, tmp_path):
  config, params = _load(llama3)
  (tmp_path / 'thesis.tex').write_text('')
  with pytest.raises(ValueError, match=r'holds thesis\.tex.*write to a new directory'):
    writer.save_checkpoint(tmp_path, params, config, 'language')
  with pytest.raises(ValueError, match='is a file'):
    writer.save_checkpoint(tmp_path / 'thesis.tex', params, config, 'language')
  with pytest.raises(ValueError, match='is also the source'):
    writer.save_checkpoint(llama3, params, config, 'language', source=llama3)


def test_refuses_params_of_another_model(llama3, tmp_path):
  config, params = _load(llama3)
  with pytest.raises(ValueError, match='scalar model: lm_head/kernel is not one of them'):
    writer.save_checkpoint(tmp_path / 'a', params, config, 'scalar')
  with pytest.raises(ValueError, match="dtype='int4' is not one of"):
    writer.save_checkpoint(tmp_path / 'a', params, config, 'language', dtype='int4')
  del params['lm_head']
  with pytest.raises(ValueError, match='language model: lm_head/kernel is missing'):
    writer.save_checkpoint(tmp_path / 'a', params, config, 'language')
  params['lm_head'] = {'kernel': jnp.zeros((32, 63))}
  with pytest.raises(ValueError, match=r'lm_head/kernel is float32\[32, 63\].*\[32, 64\]'):
    writer.save_checkpoint(tmp_path / 'a', params, config, 'language')
  assert not (tmp_path / 'a').exists()
