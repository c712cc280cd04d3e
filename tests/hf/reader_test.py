import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures import hf_models

from segjax.config.settings import Runtime
from segjax.hf import placement, reader, tensor_slices
from segjax.model import heads, sharding
from segjax.model.mesh import make_mesh
from segjax.run import weights

# Float32 on both sides; only the order of sums differs.
TOLERANCE = 1e-4
_LOGITS = jax.jit(heads.logits, static_argnums=2)


def _logits(directory, ids):
  config = reader.load_config(directory)
  params = reader.load_params(directory, config, 'language')
  return np.asarray(_LOGITS(params, jnp.asarray(ids), config))


def _rewrite(source, target, change):
  """Copies `source` to `target` and passes its weights through `change`."""
  shutil.copytree(source, target)
  tensors = change(hf_models.tensors(source))
  safetensors.numpy.save_file(tensors, target / 'model.safetensors', metadata={'format': 'pt'})
  return target


@pytest.mark.parametrize('trained', [False, True])
def test_a_run_keeps_norms_and_heads_in_float32(llama3, trained):
  runtime = Runtime(compute_dtype='bfloat16', param_dtype='bfloat16')
  config = reader.load_config(llama3)
  arguments = llama3, config, 'language', runtime, make_mesh(1, 1, 1, devices=jax.devices()[:1])
  params = weights.load_params(*arguments, trained=trained)
  dtypes = {
    sharding.path_name(path): str(leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }
  wide = ('scale', 'lm_head/kernel') if trained else 'scale'
  assert dtypes == {path: 'float32' if path.endswith(wide) else 'bfloat16' for path in dtypes}


def test_logits_of_a_trained_llama_equal_transformers(shared_files):
  directory = shared_files / 'models' / 'stories260k-hf'
  story = json.loads((directory / 'golden_greedy_200.json').read_text())['ids']
  for ids in ([story[:120]], [[1, 400, 300, 2, 511, 0, 17]], [story[50:58], story[90:98]]):
    ids = np.array(ids, np.int32)
    expected = hf_models.torch_logits(directory, ids)
    np.testing.assert_allclose(_logits(directory, ids), expected, rtol=0, atol=TOLERANCE)


def test_greedy_continuation_of_a_trained_llama(shared_files):
  directory = shared_files / 'models' / 'stories260k-hf'
  golden = json.loads((directory / 'golden_greedy_200.json').read_text())
  ids, start = np.array([golden['ids']], np.int32), len(golden['prompt_ids'])
  choice = _logits(directory, ids).argmax(-1)
  np.testing.assert_array_equal(choice[0, start - 1 : -1], ids[0, start:])


def test_shards_equal_one_file(llama3, tmp_path):
  sharded = hf_models.write(tmp_path, max_shard_size='20KB')
  assert len(list(sharded.glob('*.safetensors'))) > 2
  config = reader.load_config(llama3)
  hf_models.assert_same_params(
    reader.load_params(sharded, config, 'language'), reader.load_params(llama3, config, 'language')
  )


def test_bfloat16_is_cast_or_kept(tmp_path):
  directory = hf_models.write(tmp_path, dtype='bfloat16')
  config = reader.load_config(directory)
  narrow = reader.load_params(directory, config, 'language', dtype='')
  wide = reader.load_params(directory, config, 'language')
  assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype('bfloat16')}
  hf_models.assert_same_params(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow), wide)
  expected = hf_models.torch_logits(directory, hf_models.IDS)
  np.testing.assert_allclose(_logits(directory, hf_models.IDS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize('kind', ['llama32', 'biases'])
def test_eight_devices_equal_one(kind, tmp_path):
  directory = hf_models.write(tmp_path, kind, max_shard_size='20KB')
  config = reader.load_config(directory)
  mesh = make_mesh(2, 2, 2)
  spread = reader.load_params(directory, config, 'language', mesh)
  hf_models.assert_same_params(spread, reader.load_params(directory, config, 'language'))
  for leaf, expected in zip(
    jax.tree.leaves(spread), jax.tree.leaves(sharding.tree_shardings(spread, mesh)), strict=True
  ):
    assert leaf.sharding == expected


@pytest.mark.parametrize('sizes', [(2, 2, 2), (1, 2, 4)])
def test_each_byte_is_requested_once(sizes, llama3, monkeypatch):
  # Devices that hold the same slice share one reading of it.
  readers = []

  class CountingReader(tensor_slices.SliceReader):
    def __init__(self, checkpoint):
      super().__init__(checkpoint)
      readers.append(self)

  monkeypatch.setattr(placement, 'SliceReader', CountingReader)
  config = reader.load_config(llama3)
  reader.load_params(llama3, config, 'language', make_mesh(*sizes))
  assert readers[0].requested == 4 * reader.open_checkpoint(llama3).num_parameters()


@pytest.mark.parametrize('own_memory', [False, True], ids=['host', 'accelerator'])
@pytest.mark.parametrize('spread', [False, True], ids=['one', 'eight'])
def test_loading_in_pieces_is_the_same(own_memory, spread, tmp_path, monkeypatch):
  # On accelerators pieces are written into the device's buffer; here a CPU device acts as one.
  directory = hf_models.write(tmp_path)
  config = reader.load_config(directory)
  mesh = make_mesh(1, 2, 4) if spread else None
  expected = reader.load_params(directory, config, 'language', mesh, dtype='bfloat16')
  monkeypatch.setattr(placement, 'PIECE_BYTES', 1000)
  monkeypatch.setattr(placement, '_has_own_memory', lambda device: own_memory)
  params = reader.load_params(directory, config, 'language', mesh, dtype='bfloat16')
  hf_models.assert_same_params(params, expected)
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
    assert a.sharding == b.sharding


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_not_finite_weights(value, dtype, tmp_path, caplog):
  directory = hf_models.write(tmp_path / 'a', dtype=dtype, max_shard_size='20KB')
  config = reader.load_config(directory)
  checkpoint, entries = reader.open_model(directory, config, 'language')
  assert reader.find_not_finite(checkpoint, entries) == ''
  name = 'model.layers.1.mlp.up_proj.weight'
  file = checkpoint.tensors[name].file
  tensors = safetensors.numpy.load_file(file)
  tensors[name][3, 4] = value
  safetensors.numpy.save_file(tensors, file)
  checkpoint, entries = reader.open_model(directory, config, 'language')
  message = f'NaN or infinity in tensor {name} ({file.name})'
  assert message in reader.find_not_finite(checkpoint, entries)
  params = reader.load_params(directory, config, 'language')
  np.testing.assert_array_equal(params['backbone']['layers']['up']['kernel'][1, 4, 3], value)
  assert message in caplog.text
  with pytest.raises(ValueError, match='NaN or infinity in tensor'):
    reader.load_params(directory, config, 'language', strict=True)


def test_fresh_scalar_head(llama3):
  config = reader.load_config(llama3)
  key = jax.random.key(3)
  params = reader.load_params(llama3, config, 'scalar', key=key)
  spread = reader.load_params(llama3, config, 'scalar', make_mesh(2, 2, 2), key=key)
  hf_models.assert_same_params(params, spread)
  assert 'lm_head' not in params
  kernel = params['scalar_head']['kernel']
  np.testing.assert_array_equal(kernel, jax.random.normal(key, (32, 1)) / 33)
  with pytest.raises(ValueError, match=r'no scalar head.*provide a random key'):
    reader.load_params(llama3, config, 'scalar')


def test_scores_equal_transformers(tmp_path):
  directory = hf_models.write(tmp_path, head='scalar')
  ids = np.maximum(hf_models.IDS, 1)  # 0 is padding
  config = reader.load_config(directory)
  params = reader.load_params(directory, config, 'scalar')
  ours = np.asarray(heads.scores(params, jnp.asarray(ids), config))[:, -1]
  expected = hf_models.torch_scores(directory, ids)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


def test_reward_model_of_another_project(tmp_path):
  # architectures RewardModel, its head under the name that value_head_prefix gives.
  original = hf_models.write(tmp_path / 'a', head='scalar')

  def rename(tensors):
    return {name.replace('score.', 'value_head.'): tensor for name, tensor in tensors.items()}

  renamed = _rewrite(original, tmp_path / 'b', rename)
  raw = json.loads((renamed / 'config.json').read_text())
  raw |= {'architectures': ['RewardModel'], 'value_head_prefix': 'value_head', 'mean': 0.2}
  (renamed / 'config.json').write_text(json.dumps(raw))
  config = reader.load_config(renamed)
  hf_models.assert_same_params(
    reader.load_params(renamed, config, 'scalar'), reader.load_params(original, config, 'scalar')
  )


def test_tied_heads_and_old_buffers_are_ignored(tmp_path):
  tied = hf_models.write(tmp_path / 'a', 'llama32')

  def add(tensors):
    extra = {
      'lm_head.weight': tensors['model.embed_tokens.weight'],
      'model.layers.0.self_attn.rotary_emb.inv_freq': np.ones(8, np.float32),
    }
    return tensors | extra

  more = _rewrite(tied, tmp_path / 'b', add)
  config = reader.load_config(tied)
  hf_models.assert_same_params(
    reader.load_params(more, config, 'language'), reader.load_params(tied, config, 'language')
  )


def _without(name):
  return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (_without('model.norm.weight'), r'lacks tensor model\.norm\.weight of a language model'),
    (_without('lm_head.weight'), r'lacks tensor lm_head\.weight.*tie_word_embeddings'),
    (
      lambda tensors: tensors | {'model.layers.2.mlp.up_proj.weight': np.ones((2, 2), np.float32)},
      r'holds tensor model\.layers\.2\.mlp\.up_proj\.weight that .* number of layers',
    ),
    (
      lambda tensors: tensors | {'score.weight': np.ones((1, 32), np.float32)},
      r'holds tensor score\.weight that a language model',
    ),
    (
      lambda tensors: tensors | {'model.norm.weight': np.ones(31, np.float32)},
      r'model\.safetensors: tensor model\.norm\.weight has shape \[31\].*should be \[32\]',
    ),
  ],
  ids=['missing', 'not-tied', 'too-many-layers', 'other-head', 'shape'],
)
def test_refuses_tensors_that_do_not_fit(llama3, tmp_path, change, message):
  changed = _rewrite(llama3, tmp_path / 'changed', change)
  with pytest.raises(ValueError, match=message):
    reader.load_params(changed, reader.load_config(changed), 'language')


def test_refuses_a_classifier_of_two_labels(llama3, tmp_path):
  def two(tensors):
    return tensors | {'score.weight': np.ones((2, 32), np.float32)}

  changed = _rewrite(llama3, tmp_path / 'two', two)
  with pytest.raises(ValueError, match=r'score\.weight has shape \[2, 32\].*\(num_labels 1\)'):
    reader.load_params(changed, reader.load_config(changed), 'scalar')


def test_refuses_mixed_layers_only_when_their_dtype_is_kept(llama3, tmp_path):
  name = 'model.layers.1.mlp.up_proj.weight'

  def mix(tensors):
    return tensors | {name: tensors[name].astype(np.float16)}

  mixed = _rewrite(llama3, tmp_path / 'mixed', mix)
  config = reader.load_config(mixed)
  reader.load_params(mixed, config, 'language')
  with pytest.raises(ValueError, match=r'up_proj\.weight have dtypes F16, F32.*set the dtype'):
    reader.load_params(mixed, config, 'language', dtype='')


def test_refuses_unknown_dtype_and_head(llama3):
  config = reader.load_config(llama3)
  with pytest.raises(ValueError, match=r"dtype='int8' is not one of float64, float32"):
    reader.load_params(llama3, config, 'language', dtype='int8')
  with pytest.raises(ValueError, match="head='value' is not one of"):
    reader.load_params(llama3, config, 'value')
