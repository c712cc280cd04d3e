"""Adapters in peft's form, without peft: `peft_test` compares with it."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from fixtures import hf_models, tokenizers

from segjax.config.settings import Data, Lora
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.hf import adapter, adapter_writer, cli, inspect, merge, model_card, reader
from segjax.model import heads, lora
from segjax.model.mesh import make_mesh
from segjax.run import inputs

TARGETS = ('q_proj', 'v_proj', 'down_proj')


@pytest.fixture(scope='module')
def small(llama3, tmp_path_factory):
  """An adapter of the llama3 checkpoint; tests must not change it."""
  return hf_models.write_adapter(tmp_path_factory.mktemp('adapters') / 'small', llama3)


@pytest.fixture(scope='module')
def scored(llama3, tmp_path_factory):
  """An adapter with a scalar head; tests must not change it."""
  directory = tmp_path_factory.mktemp('adapters') / 'scored'
  return hf_models.write_adapter(directory, llama3, 'scalar', use_rslora=True)


@pytest.fixture(scope='module')
def headed(llama3, tmp_path_factory):
  """An adapter with a head to the vocabulary; tests must not change it."""
  directory = tmp_path_factory.mktemp('adapters') / 'headed'
  return hf_models.write_adapter(directory, llama3, modules_to_save=['lm_head'])


def _change(source, target, change=lambda tensors: tensors, **fields):
  """Copies an adapter with other fields and changed weights."""
  shutil.copytree(source, target)
  raw = json.loads((target / adapter.CONFIG).read_text()) | fields
  (target / adapter.CONFIG).write_text(json.dumps(raw))
  safetensors.numpy.save_file(change(hf_models.tensors(target)), target / adapter.WEIGHTS)
  return target


def _refuse(function, *parts):
  with pytest.raises(UserError) as error:
    function()
  for part in parts:
    assert part in str(error.value)


def _merged(directory, base, scale):
  """HF's weights W + s B A, matrix by matrix."""
  weights, own = hf_models.tensors(base), hf_models.tensors(directory)
  for name in weights:
    key = f'base_model.model.{name.removesuffix(".weight")}.lora'
    if f'{key}_A.weight' in own:
      b, a = (own[f'{key}_{x}.weight'].astype(np.float64) for x in 'BA')
      weights[name] = weights[name].astype(np.float64) + scale * b @ a
  return weights


def test_parameters_are_those_of_base_and_adapter(small, llama3):
  config = reader.load_config(small)
  assert config == dataclasses.replace(
    reader.load_config(llama3), lora=Lora(4, 8.0, TARGETS, False)
  )
  params = reader.load_params(small, config, 'language')
  hf_models.assert_same_params(
    {k: v for k, v in params.items() if k != 'adapter'},
    reader.load_params(llama3, config, 'language'),
  )
  own = hf_models.tensors(small)
  for layer in range(2):
    stem = f'base_model.model.model.layers.{layer}.mlp.down_proj'
    pair = {x: params['adapter']['layers']['down'][x][layer] for x in 'ab'}
    np.testing.assert_array_equal(pair['a'], own[f'{stem}.lora_A.weight'].T)
    np.testing.assert_array_equal(pair['b'], own[f'{stem}.lora_B.weight'].T)
  assert set(params['adapter']['layers']) == {'query', 'value', 'down'}


def test_devices_hold_their_part(scored):
  config, mesh = reader.load_config(scored), make_mesh(1, 2, 4)
  description = adapter.read_adapter(scored)
  whole = adapter.load_trained(description, config, 'scalar', None)
  assert set(whole) == {'adapter', 'scalar_head'}
  spread = adapter.load_trained(description, config, 'scalar', mesh)
  hf_models.assert_same_params(spread, whole)
  placed = lora.place(whole, mesh)
  assert jax.tree.map(lambda x: x.sharding, spread) == jax.tree.map(lambda x: x.sharding, placed)


def test_a_scalar_head_is_the_adapters(scored, small, llama3, tmp_path):
  config = reader.load_config(scored)
  assert config.lora.scale == 4.0 and reader.has_scalar_head(scored, config)
  head = reader.load_params(scored, config, 'scalar')['scalar_head']['kernel']
  np.testing.assert_array_equal(
    head[:, 0], hf_models.tensors(scored)['base_model.model.score.weight'][0]
  )
  _refuse(lambda: reader.open_headers(scored, config, 'language'), 'scalar head of a reward model')
  # Of an adapter without one it is the base's, or drawn.
  config = reader.load_config(small)
  assert not reader.has_scalar_head(small, config)
  _refuse(lambda: reader.load_params(small, config, 'scalar'), 'no scalar head')
  drawn = reader.load_params(small, config, 'scalar', key=jax.random.key(3))
  assert set(drawn) == {'backbone', 'scalar_head', 'adapter'}
  base = hf_models.write(tmp_path / 'base', head='scalar')
  plain = hf_models.write_adapter(tmp_path / 'plain', base)
  config = reader.load_config(plain)
  assert reader.has_scalar_head(plain, config)
  head = reader.load_params(plain, config, 'scalar')['scalar_head']['kernel']
  np.testing.assert_array_equal(head[:, 0], hf_models.tensors(base)['score.weight'][0])


def test_a_head_to_the_vocabulary_is_the_adapters(headed, tmp_path):
  config, own = reader.load_config(headed), hf_models.tensors(headed)
  assert config.lora == Lora(4, 8.0, TARGETS, train_head=True)
  kernel = own['base_model.model.lm_head.weight'].T
  params = reader.load_params(headed, config, 'language')
  np.testing.assert_array_equal(params['lm_head']['kernel'], kernel)
  assert set(reader.load_params(headed, config, 'scalar', key=jax.random.key(0))) == {
    *('backbone', 'adapter', 'scalar_head')
  }
  merged = hf_models.tensors(merge.merge_adapter(headed, tmp_path / 'merged'))
  np.testing.assert_array_equal(merged['lm_head.weight'], kernel.T)
  assert 'vocabulary    a head of its own' in inspect.inspect(headed).splitlines()
  tied = hf_models.write(tmp_path / 'tied', 'llama32')
  bad = _change(headed, tmp_path / 'bad', base_model_name_or_path=str(tied))
  _refuse(lambda: reader.load_config(bad), "modules_to_save=['lm_head'], but the embedding of")


def test_a_head_to_the_vocabulary_is_saved(tmp_path):
  base = hf_models.write(tmp_path / 'base', vocab_size=320)
  tokenizers.write_tokenizer(base)
  own = hf_models.write_adapter(tmp_path / 'own', base, modules_to_save=['lm_head'])
  config, out = reader.load_config(own), tmp_path / 'out'
  trained = adapter.load_trained(adapter.read_adapter(own), config, 'language', None)
  save = {'source': base, 'card': model_card.Card(), 'tokenizer': load_tokenizer(str(base))}
  adapter_writer.save_adapter(out, trained, config, 'language', base=str(base), **save)
  hf_models.assert_same_tensors(out, own)
  assert adapter.read_adapter(out) == adapter.Adapter(out, str(base), config.lora, False)
  assert json.loads((out / adapter.CONFIG).read_text())['modules_to_save'] == ['lm_head']


@pytest.mark.parametrize('wrapper', ['raw', 'bare'])
def test_names_of_other_savers(wrapper, scored, tmp_path):
  """A state of the whole wrapper has the adapter's name; a backbone without a head no `model.`."""

  def rename(tensors):
    if wrapper == 'bare':
      return {k.replace('model.model.layers', 'model.layers'): v for k, v in tensors.items()}
    tensors = {k.replace('.weight', '.default.weight'): v for k, v in tensors.items()}
    return {k.replace('score.', 'score.modules_to_save.'): v for k, v in tensors.items()}

  other = _change(scored, tmp_path / 'a', rename)
  config = reader.load_config(scored)
  first, second = (
    adapter.load_trained(adapter.read_adapter(path), config, 'scalar', None)
    for path in (other, scored)
  )
  hf_models.assert_same_params(first, second)


def test_what_is_saved_is_read_again(scored, llama3, tmp_path):
  base = tmp_path / 'base'
  shutil.copytree(llama3, base)
  tokenizers.write_tokenizer(base)
  (base / 'LICENSE').write_text('L')
  config = reader.load_config(scored)
  config = dataclasses.replace(config, vocab_size=320)  # of the tokenizer
  trained = adapter.load_trained(adapter.read_adapter(scored), config, 'scalar', make_mesh(1, 2, 4))
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'config.json').write_text('{}')  # a checkpoint, which is replaced
  save = {'base': str(base), 'source': base, 'card': model_card.Card(stage='reward')}
  tokenizer = load_tokenizer(str(base))
  adapter_writer.save_adapter(out, trained, config, 'scalar', tokenizer=tokenizer, **save)
  assert not (out / 'config.json').exists() and (out / 'LICENSE').read_text() == 'L'
  hf_models.assert_same_tensors(out, scored)
  description = adapter.read_adapter(out)
  assert description == adapter.Adapter(out, str(base), config.lora, True)
  raw = json.loads((out / adapter.CONFIG).read_text())
  assert (raw['r'], raw['lora_alpha'], raw['use_rslora']) == (4, 8, True)
  assert (raw['task_type'], raw['modules_to_save']) == ('SEQ_CLS', ['score'])
  card = (out / 'README.md').read_text()
  assert 'library_name: "peft"' in card and 'num_labels=1' in card
  policy = {'adapter': trained['adapter']}
  adapter_writer.save_adapter(out, policy, config, 'language', tokenizer=tokenizer, **save)
  assert not adapter.read_adapter(out).has_score
  assert (out / 'generation_config.json').is_file()
  _refuse(
    lambda: adapter_writer.save_adapter(out, policy, config, 'scalar', tokenizer=tokenizer, **save),
    'scalar_head/kernel is missing',
  )


def test_merged(small, llama3, tmp_path):
  assert cli.main(['merge', str(small), str(tmp_path / 'a')]) == 0
  found, expected = hf_models.tensors(tmp_path / 'a'), _merged(small, llama3, 2.0)
  assert found.keys() == expected.keys()
  for name, weight in expected.items():
    np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-6, err_msg=name)
  config = reader.load_config(small)
  params = lora.merge(reader.load_params(small, config, 'language'), config.lora)
  plain = dataclasses.replace(config, lora=None)
  for x, y in zip(
    jax.tree.leaves(params),
    jax.tree.leaves(reader.load_params(tmp_path / 'a', plain, 'language')),
    strict=True,
  ):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)
  _refuse(lambda: merge.merge_adapter(small, tmp_path / 'a'), 'is not empty')
  _refuse(lambda: merge.merge_adapter(small, llama3, overwrite=True), 'is also the source')


def test_merged_in_bfloat16_is_rounded_once(tmp_path):
  base = hf_models.write(tmp_path / 'base', dtype='bfloat16', vocab_size=320)
  tokenizers.write_tokenizer(base)
  own = hf_models.write_adapter(tmp_path / 'own', base, 'scalar')
  (own / 'segment_reward.json').write_text('{}')
  (own / 'segjax_config.json').write_text('{"stage": "reward"}')
  out = merge.merge_adapter(own, tmp_path / 'out')
  found = hf_models.tensors(out)
  for name, weight in _merged(own, base, 2.0).items():
    if name != 'lm_head.weight':
      assert found[name].dtype == ml_dtypes.bfloat16
      error = np.abs(found[name].astype(np.float64) - weight)
      assert (error <= 2**-8 * np.abs(weight) * 1.001 + 1e-9).all(), name
  np.testing.assert_array_equal(
    found['score.weight'], hf_models.tensors(own)['base_model.model.score.weight']
  )
  for name in ('segment_reward.json', 'tokenizer.json', 'segjax_config.json'):
    assert (out / name).is_file()
  assert 'Stage: reward' in (out / 'README.md').read_text()
  wide = merge.merge_adapter(own, tmp_path / 'wide', dtype='float32')
  assert {x.dtype.name for x in hf_models.tensors(wide).values()} == {'float32'}


@pytest.mark.parametrize(
  ('fields', 'parts'),
  [
    ({'peft_type': 'ADALORA'}, ["peft_type='ADALORA' is not LORA", 'merge_and_unload']),
    ({'rank_pattern': {'q_proj': 8}}, ["rank_pattern={'q_proj': 8}", 'ranks that differ']),
    ({'alpha_pattern': {'q_proj': 8}}, ['alpha_pattern=', 'scales that differ']),
    ({'use_dora': True}, ['use_dora=True', 'DoRA']),
    ({'bias': 'lora_only'}, ["bias='lora_only'"]),
    ({'lora_bias': True}, ['lora_bias=True']),
    ({'fan_in_fan_out': True}, ['fan_in_fan_out=True']),
    ({'layers_to_transform': [0]}, ['layers_to_transform=[0]']),
    ({'layer_replication': [[0, 2]]}, ['layer_replication=']),
    ({'trainable_token_indices': [3]}, ['trainable_token_indices=[3]']),
    ({'target_parameters': ['x']}, ['target_parameters=']),
    ({'alora_invocation_tokens': [1]}, ['alora_invocation_tokens=[1]', 'aLoRA']),
    ({'use_newlora': True}, ['use_newlora=True', 'not known here']),
    ({'new_config': {'a': 1}}, ['new_config=']),
    ({'init_lora_weights': 'pissa'}, ["init_lora_weights='pissa'", 'path_initial_model']),
    ({'init_lora_weights': 'loftq'}, ["init_lora_weights='loftq'"]),
    ({'modules_to_save': ['score', 'lm_head']}, ["['score', 'lm_head']", 'score or lm_head alone']),
    ({'modules_to_save': 'score'}, ["modules_to_save='score'"]),
    ({'target_modules': ['q_proj', 'lm_head']}, ["target_modules has 'lm_head'"]),
    ({'target_modules': ['model.embed_tokens']}, ["'model.embed_tokens'", 'q_proj, k_proj']),
    ({'target_modules': '.*_proj'}, ["target_modules='.*_proj' is a regular expression"]),
    ({'target_modules': None}, ['target_modules=None']),
    ({'target_modules': []}, ['target_modules=[]']),
    ({'r': None}, ['r=None', 'rank from 1']),
    ({'r': True}, ['r=True']),
    ({'r': 2.5}, ['r=2.5']),
    ({'lora_alpha': 0}, ['lora_alpha=0']),
    ({'lora_alpha': 'x'}, ["lora_alpha='x'"]),
    ({'use_rslora': 'false'}, ["use_rslora='false'"]),
    ({'base_model_name_or_path': None}, ['base_model_name_or_path=None']),
    ({'base_model_name_or_path': 'a/b', 'revision': 'v2'}, ["revision='v2' of a/b"]),
  ],
)
def test_descriptions_that_are_not_read(fields, parts, small, tmp_path):
  (tmp_path / adapter.CONFIG).write_text(
    json.dumps(json.loads((small / adapter.CONFIG).read_text()) | fields)
  )
  _refuse(lambda: adapter.read_adapter(tmp_path), str(tmp_path / adapter.CONFIG), *parts)


@pytest.mark.parametrize(
  'fields',
  [
    {'target_modules': 'all-linear'},
    {'target_modules': [f'model.layers.{i}.mlp.up_proj' for i in range(2)]},
    {'init_lora_weights': 'eva', 'eva_config': {'rho': 2.0}},
    {'lora_dropout': 0.1, 'revision': 'main', 'new_size': 3},
    {'auto_mapping': {'parent_library': 'x'}, 'task_type': None},
  ],
)
def test_descriptions_that_are_read(fields, small, tmp_path):
  (tmp_path / adapter.CONFIG).write_text(
    json.dumps(json.loads((small / adapter.CONFIG).read_text()) | fields)
  )
  targets = adapter.read_adapter(tmp_path).lora.targets
  assert len(targets) == {'a': 7, 'm': 1}.get(fields.get('target_modules', ' ')[0][0], 3)


def _bad_weights(name):
  """Returns what changes the weights of an adapter."""
  first = 'base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight'

  def change(tensors):
    if name == 'missing':
      del tensors[first]
    elif name == 'layer':
      tensors[first.replace('layers.1', 'layers.2')] = tensors[first]
    elif name == 'embedding':
      tensors['base_model.model.model.embed_tokens.weight'] = np.zeros((4, 4), np.float32)
    elif name == 'twice':
      tensors[first.replace('A.weight', 'A.default.weight')] = tensors[first]
    else:
      tensors[first] = {
        'shape': tensors[first][:, :-2].copy(),
        'empty': np.zeros(0, np.float32),
        'dtype': tensors[first].astype(np.int8),
        'nan': tensors[first] * np.nan,
      }[name]
    return tensors

  return change


@pytest.mark.parametrize(
  ('name', 'parts'),
  [
    ('missing', ['lacks tensor model.layers.1.self_attn.q_proj.lora_A.weight', 'the base']),
    ('layer', ['holds tensor model.layers.2.self_attn.q_proj.lora_A.weight', 'the base']),
    ('embedding', ['holds tensor model.embed_tokens.weight']),
    ('twice', ['several adapters']),
    ('shape', ['an adapter for another base', 'shape [4, 30]', 'should be [4, 32]']),
    ('empty', ['shape [0]', 'should be [4, 32]']),
    ('dtype', ['has dtype I8']),
    ('nan', ['NaN or infinity in tensor model.layers.1.self_attn.q_proj.lora_A.weight']),
  ],
)
def test_weights_that_are_not_read(name, parts, small, llama3, tmp_path):
  bad = _change(small, tmp_path / 'bad', _bad_weights(name))
  config, description = reader.load_config(bad), adapter.read_adapter(bad)
  load = functools.partial(adapter.load_trained, description, config, 'language', None)
  _refuse(load, str(bad), *parts)
  if name != 'nan':
    _refuse(lambda: reader.open_headers(bad, config, 'language'), str(bad), *parts)


def test_files_that_are_missing(small, tmp_path):
  bad = _change(small, tmp_path / 'bad')
  config, description = reader.load_config(bad), adapter.read_adapter(bad)
  (bad / adapter.WEIGHTS).rename(bad / 'adapter_model.bin')
  load = functools.partial(adapter.load_trained, description, config, 'language', None)
  _refuse(
    load,
    'adapter_model.bin is a pickle',
    'from peft import AutoPeftModelForCausalLM',
  )
  (bad / 'adapter_model.bin').unlink()
  _refuse(load, f'no {adapter.WEIGHTS}')


def test_where_the_base_is(small, llama3, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'models').symlink_to(llama3.parent)
  relative = f'models/{llama3.name}'
  own = _change(small, tmp_path / 'own', base_model_name_or_path=relative)
  assert adapter.base_directory(adapter.read_adapter(own)).samefile(llama3)
  beside = _change(small, tmp_path / 'beside', base_model_name_or_path=f'../{relative}')
  assert adapter.base_directory(adapter.read_adapter(beside)).samefile(llama3)
  for base, part in (
    ('/nowhere', 'no directory /nowhere'),
    ('~nosuchuser/x', 'cannot be looked up'),
  ):
    lost = _change(small, tmp_path / part, base_model_name_or_path=base)
    _refuse(lambda lost=lost: reader.load_config(lost), str(lost / adapter.CONFIG), part, 'Set')
  chain = _change(small, tmp_path / 'chain', base_model_name_or_path=str(own))
  _refuse(lambda: reader.load_config(chain), 'is an adapter itself', f'merge {own} OUT')


def test_an_adapter_without_a_tokenizer_has_its_bases(small, tmp_path):
  base = tokenizers.write_tokenizer(tmp_path)
  own = _change(small, tmp_path / 'own', base_model_name_or_path=base)
  loaded = inputs.load_chat_tokenizer(own, Data())
  assert loaded.prompt_ids([{'role': 'user', 'content': 'hello'}])
  assert adapter.tokenizer_directory(own) == tmp_path
  shutil.copy(tmp_path / 'tokenizer.json', own)
  assert adapter.tokenizer_directory(own) == own


def test_inspected_and_refused_by_other_conversions(scored, llama3, tmp_path, capsys):
  lines = inspect.inspect(scored).splitlines()
  assert 'adapter       rank 4 of q_proj, v_proj, down_proj' in lines
  assert 'scale         alpha 8 / √rank = 4' in lines
  out = str(tmp_path / 'a')
  for arguments in (
    ['import', str(scored), out],
    ['export', str(tmp_path), out, f'--source={scored}', '--role=reward'],
    ['verify', str(scored)],
  ):
    assert cli.main(arguments) == 1
    assert f'segjax convert merge {scored} OUT' in capsys.readouterr().err


@pytest.mark.campaign  # compiles two networks in float64
def test_gradients_are_the_projections_of_the_full_models(headed):
  """dA = s dW Bᵀ and dB = s Aᵀ dW, with dW the gradient of the merged network; of a head dW."""
  with jax.enable_x64(True):
    config = dataclasses.replace(reader.load_config(headed), dtype='float64', vocab_chunk=64)
    params = jax.tree.map(
      lambda x: x.astype(jnp.float64), reader.load_params(headed, config, 'language')
    )
    trained = {name: params.pop(name) for name in ('adapter', 'lm_head')}

    def loss(network, config):
      return -jnp.sum(heads.token_logprobs(network, jnp.asarray(hf_models.IDS), config)[0])

    grads = jax.jit(jax.grad(lambda own: loss(params | own, config)))(trained)
    plain = dataclasses.replace(config, lora=None)
    merged = lora.merge(params | trained, config.lora)
    full = jax.jit(jax.grad(lambda network: loss(network, plain)))(merged)
    of_head = full['lm_head']['kernel']
    np.testing.assert_allclose(grads['lm_head']['kernel'], of_head, rtol=1e-6, atol=1e-6)
    scale = config.lora.scale
    for name, pair in trained['adapter']['layers'].items():
      weight = full['backbone']['layers'][name]['kernel']
      expected = {
        'a': scale * jnp.einsum('lio,lro->lir', weight, pair['b']),
        'b': scale * jnp.einsum('lir,lio->lro', pair['a'], weight),
      }
      for key, gradient in grads['adapter']['layers'][name].items():
        assert np.abs(gradient).max() > 1e-3
        np.testing.assert_allclose(gradient, expected[key], rtol=1e-6, atol=1e-6)
