import errno
import json
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import transformers
from fixtures import hf_models

from segjax import storage
from segjax.errors import UserError
from segjax.hf import convert, imported, orbax_stream, reader, shards
from segjax.model import heads
from segjax.model.mesh import make_mesh
from segjax.train.checkpoint import Checkpointer

# A chat template that contains the beginning of the text.
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


def _rewrite(source, target, change):
  shutil.copytree(source, target)
  tensors = change(hf_models.tensors(source))
  safetensors.numpy.save_file(tensors, target / 'model.safetensors', metadata={'format': 'pt'})
  return target


def _names(directory):
  return sorted(file.name for file in directory.iterdir())


@pytest.mark.parametrize('piece_bytes', [1 << 25, 1000], ids=['whole', 'pieces'])
@pytest.mark.parametrize(
  ('kind', 'role', 'dtype'),
  [
    ('llama3', 'policy', 'float16'),
    ('llama31', 'policy', 'bfloat16'),
    ('llama32', 'policy', 'float32'),
    ('biases', 'policy', 'bfloat16'),
    ('biases', 'reward', 'float32'),
    ('linear', 'critic', 'bfloat16'),
  ],
)
def test_import_then_export_is_bit_equal(kind, role, dtype, piece_bytes, tmp_path):
  source = hf_models.write(tmp_path / 'a', kind, imported.HEADS[role], dtype)
  (source / 'tokenizer.json').write_bytes(b'{}\r\n')
  calls = []

  def progress(done, total):
    calls.append((done, total))

  stored = convert.import_checkpoint(
    source, tmp_path / 'b', role=role, piece_bytes=piece_bytes, progress=progress
  )
  out = convert.export_checkpoint(stored, tmp_path / 'c', progress=progress)
  hf_models.assert_same_tensors(source, out)
  total = sum(tensor.nbytes for tensor in hf_models.tensors(source).values())
  assert sum(done for done, _ in calls) == 2 * total and {t for _, t in calls} == {total}
  assert (out / 'tokenizer.json').read_bytes() == b'{}\r\n'
  assert reader.load_config(out) == reader.load_config(source)
  assert _names(tmp_path) == ['a', 'b', 'c']


def test_the_file_is_the_same_byte_for_byte(llama3, tmp_path):
  stored = convert.import_checkpoint(llama3, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c')
  for name in ('model.safetensors', 'generation_config.json'):
    assert (out / name).read_bytes() == (llama3 / name).read_bytes()


def test_many_files_are_read_by_several_threads(tmp_path):
  source = hf_models.write(tmp_path / 'a', 'biases', max_shard_size='6KB')
  assert len(list(source.glob('*.safetensors'))) > 8
  stored = convert.import_checkpoint(source, tmp_path / 'b', piece_bytes=500)
  hf_models.assert_same_tensors(source, convert.export_checkpoint(stored, tmp_path / 'c'))


def test_dtypes_are_kept_tensor_by_tensor_or_cast(llama3, tmp_path):
  def mix(tensors):
    narrow = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    return narrow | {'model.norm.weight': tensors['model.norm.weight']}

  mixed = _rewrite(llama3, tmp_path / 'a', mix)
  stored = convert.import_checkpoint(mixed, tmp_path / 'b')
  hf_models.assert_same_tensors(mixed, convert.export_checkpoint(stored, tmp_path / 'c'))
  exported = convert.export_checkpoint(stored, tmp_path / 'd', dtype='float32')
  widened = convert.import_checkpoint(mixed, tmp_path / 'e', dtype='float32')
  expected = {name: t.astype(np.float32) for name, t in hf_models.tensors(mixed).items()}
  for out in (exported, convert.export_checkpoint(widened, tmp_path / 'f')):
    for name, tensor in hf_models.tensors(out).items():
      assert tensor.dtype == np.float32
      np.testing.assert_array_equal(tensor, expected[name])


def test_shards_on_export(llama3, tmp_path):
  stored = convert.import_checkpoint(llama3, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c', max_shard_bytes=20_000)
  files = sorted(out.glob('*.safetensors'))
  assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors' and len(files) > 2
  hf_models.assert_same_tensors(llama3, out)
  np.testing.assert_array_equal(
    hf_models.torch_logits(out, hf_models.IDS), hf_models.torch_logits(llama3, hf_models.IDS)
  )


@pytest.mark.parametrize('piece_bytes', [1 << 25, 1000], ids=['whole', 'pieces'])
def test_plain_orbax_restores_it_onto_another_mesh(piece_bytes, tmp_path):
  source = hf_models.write(tmp_path / 'a', 'biases', dtype='bfloat16')
  stored = convert.import_checkpoint(source, tmp_path / 'b', piece_bytes=piece_bytes)
  mesh = make_mesh(2, 2, 2)
  config = reader.load_config(source)
  expected = reader.load_params(source, config, 'language', mesh, dtype='')
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected
  )
  with ocp.CheckpointManager(stored / 'params') as manager:
    assert manager.latest_step() == orbax_stream.STEP
    restored = manager.restore(orbax_stream.STEP, args=ocp.args.StandardRestore(target))
  hf_models.assert_same_params(restored, expected)
  for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
    assert a.sharding == b.sharding


def test_exports_what_plain_orbax_saved(tmp_path):
  """Compressed, in chunks of eight devices: the params of a training state."""
  source = hf_models.write(tmp_path / 'a')
  config = reader.load_config(source)
  params = reader.load_params(source, config, 'language', make_mesh(1, 4, 2))
  state = {'params': params, 'step': jnp.zeros((), jnp.int32), 'opt_state': [params]}
  saved = Checkpointer(tmp_path / 'checkpoints', keep=1)
  saved.save(7, {'policy': state, 'critic': state})
  saved.close()
  with pytest.raises(ValueError, match=r'has no segjax\.json.*--source and --role'):
    convert.export_checkpoint(tmp_path / 'checkpoints', tmp_path / 'b')
  flags = {'source': source, 'role': 'policy'}
  with pytest.raises(ValueError, match=r'name one of the items in it: critic, policy'):
    convert.export_checkpoint(tmp_path / 'checkpoints', tmp_path / 'b', **flags)
  out = convert.export_checkpoint(
    tmp_path / 'checkpoints' / '7' / 'policy', tmp_path / 'b', **flags
  )
  hf_models.assert_same_tensors(source, out)
  with pytest.raises(ValueError, match='not those of this scalar model: lm_head/kernel is not one'):
    convert.export_checkpoint(
      tmp_path / 'checkpoints' / '7' / 'policy', tmp_path / 'c', source=source, role='reward'
    )


def test_reward_model_keeps_its_spec_and_scores(tmp_path):
  source = hf_models.write(tmp_path / 'a', head='scalar')
  renamed = _rewrite(
    source,
    tmp_path / 'b',
    lambda tensors: {name.replace('score.', 'value_head.'): t for name, t in tensors.items()},
  )
  raw = json.loads((source / 'config.json').read_text())
  raw |= {'architectures': ['RewardModel'], 'value_head_prefix': 'value_head'}
  raw |= {'mean': 0.2089, 'std': 4.29}
  (renamed / 'config.json').write_text(json.dumps(raw))
  spec = b'{"version": 2, "granularity": "segment"}\r\n'
  (renamed / 'segment_reward.json').write_bytes(spec)
  stored = convert.import_checkpoint(renamed, tmp_path / 'c', role='reward')
  out = convert.export_checkpoint(stored, tmp_path / 'd')
  hf_models.assert_same_tensors(source, out)
  assert (out / 'segment_reward.json').read_bytes() == spec
  written = json.loads((out / 'config.json').read_text())
  assert written['architectures'] == ['LlamaForSequenceClassification']
  assert (written['mean'], written['std'], written['value_head_prefix']) == (0.2089, 4.29, 'score')
  ids = np.maximum(hf_models.IDS, 1)  # 0 is padding
  config = reader.load_config(renamed)
  params = reader.load_params(renamed, config, 'scalar')
  ours = np.asarray(heads.scores(params, jnp.asarray(ids), config))[:, -1]
  np.testing.assert_allclose(hf_models.torch_scores(out, ids), ours, rtol=0, atol=1e-5)
  # A critic starts from the reward model, but its scores are values.
  critic = convert.import_checkpoint(renamed, tmp_path / 'e', role='critic')
  assert not (convert.export_checkpoint(critic, tmp_path / 'f') / 'segment_reward.json').exists()


def test_a_critic_draws_its_head_by_seed_and_a_reward_model_does_not(llama3, tmp_path):
  exported = []
  for name, seed in (('b', 1), ('c', 1), ('d', 2)):
    stored = convert.import_checkpoint(llama3, tmp_path / name, role='critic', seed=seed)
    exported.append(hf_models.tensors(convert.export_checkpoint(stored, tmp_path / (name + name))))
  assert (exported[0]['score.weight'] == exported[1]['score.weight']).all()
  assert (exported[0]['score.weight'] != exported[2]['score.weight']).any()
  assert 'lm_head.weight' not in exported[0]
  with pytest.raises(ValueError, match='no scalar head, so it is not a reward model'):
    convert.import_checkpoint(llama3, tmp_path / 'e', role='reward')
  assert not (tmp_path / 'e').exists()


@pytest.mark.campaign
def test_the_published_snippet_works_on_an_exported_policy(shared_files, tmp_path):
  source = tmp_path / 'a'
  shutil.copytree(shared_files / 'models' / 'stories260k-hf', source)
  (source / 'chat_template.jinja').write_text(TEMPLATE)
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c')
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  hf_models.assert_same_tensors(source, out)

  model = transformers.AutoModelForCausalLM.from_pretrained(str(out), trust_remote_code=True)
  tokenizer = transformers.AutoTokenizer.from_pretrained(str(out))
  formatted = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'Tell me a story.'}], tokenize=False, add_generation_prompt=True
  )
  inputs = tokenizer(formatted, return_tensors='pt', add_special_tokens=False)
  outputs = model.generate(inputs['input_ids'], max_new_tokens=50)
  text = tokenizer.decode(outputs[0], skip_special_tokens=True)
  assert outputs.shape[1] <= inputs['input_ids'].shape[1] + 50
  assert 'Tell me a story.' in text and len(text) > len(formatted)
  # And so does the snippet of the card itself.
  snippet = (out / 'README.md').read_text().split('```python\n')[1].split('```')[0]
  assert 'apply_chat_template' in snippet
  exec(snippet.replace('"c"', repr(str(out))), {})


def test_overwrite(llama3, tmp_path):
  stored = convert.import_checkpoint(llama3, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c', max_shard_bytes=20_000)
  with pytest.raises(ValueError, match='b is not empty; name a new directory, or use --overwrite'):
    convert.import_checkpoint(llama3, stored)
  with pytest.raises(ValueError, match='c is not empty'):
    convert.export_checkpoint(stored, out)
  convert.import_checkpoint(llama3, stored, dtype='float16', overwrite=True)
  convert.export_checkpoint(stored, out, overwrite=True)
  assert len(list(out.glob('*.safetensors'))) == 1
  assert {t.dtype for t in hf_models.tensors(out).values()} == {np.dtype('float16')}
  (out / 'thesis.tex').write_text('')
  with pytest.raises(ValueError, match=r'holds thesis\.tex, so it is more than a checkpoint'):
    convert.export_checkpoint(stored, out, overwrite=True)
  with pytest.raises(ValueError, match='is also the source'):
    convert.import_checkpoint(llama3, llama3, overwrite=True)
  with pytest.raises(ValueError, match='more than a checkpoint'):
    convert.import_checkpoint(llama3, out, overwrite=True)
  assert _names(tmp_path) == ['b', 'c']


def test_an_empty_directory_may_be_written_to(llama3, tmp_path):
  (tmp_path / 'b').mkdir()
  assert _names(convert.import_checkpoint(llama3, tmp_path / 'b')) == [
    'hf',
    'params',
    'segjax.json',
  ]


def test_refuses(llama3, tmp_path):
  with pytest.raises(ValueError, match=r"role='teacher' is not one of policy, reward, critic"):
    convert.import_checkpoint(llama3, tmp_path / 'b', role='teacher')
  with pytest.raises(ValueError, match="dtype='int8' is not one of"):
    convert.import_checkpoint(llama3, tmp_path / 'b', dtype='int8')
  with pytest.raises(ValueError, match='no directory'):
    convert.export_checkpoint(tmp_path / 'nowhere', tmp_path / 'b')
  with pytest.raises(ValueError, match=r'has no segjax\.json, so it is not an imported checkpoint'):
    convert.export_checkpoint(llama3, tmp_path / 'b')
  assert _names(tmp_path) == []
  stored = convert.import_checkpoint(llama3, tmp_path / 'b')
  with pytest.raises(ValueError, match=r"role='critic' contradicts .*, which is a policy"):
    convert.export_checkpoint(stored, tmp_path / 'c', role='critic')
  shutil.rmtree(stored / 'params' / '0' / 'default')
  with pytest.raises(ValueError, match='is not a complete Orbax checkpoint'):
    convert.export_checkpoint(stored, tmp_path / 'c')
  (stored / 'segjax.json').write_text('{"version": 9, "role": "policy"}')
  with pytest.raises(ValueError, match=r'segjax\.json: version 9'):
    convert.export_checkpoint(stored, tmp_path / 'c')
  assert _names(tmp_path) == ['b']


def test_nan_is_logged_or_refused(llama3, tmp_path, caplog):
  def add_nan(tensors):
    weight = tensors['model.layers.1.mlp.up_proj.weight'].copy()
    weight[3, 4] = np.nan
    return tensors | {'model.layers.1.mlp.up_proj.weight': weight}

  source = _rewrite(llama3, tmp_path / 'a', add_nan)
  with pytest.raises(ValueError, match=r'NaN or infinity in tensor model\.layers\.1\.mlp\.up_proj'):
    convert.import_checkpoint(source, tmp_path / 'b', strict=True)
  assert _names(tmp_path) == ['a']
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  assert 'NaN or infinity in tensor model.layers.1.mlp.up_proj.weight' in caplog.text
  hf_models.assert_same_tensors(source, convert.export_checkpoint(stored, tmp_path / 'c'))


def _import(source, target):
  convert.import_checkpoint(source, target, piece_bytes=1000)


BOTH_WAYS = pytest.mark.parametrize('convert_checkpoint', [_import, convert.export_checkpoint])


def _prepare(convert_checkpoint, llama3, directory):
  """Returns the input of `convert_checkpoint`."""
  if convert_checkpoint is _import:
    return llama3
  return convert.import_checkpoint(llama3, directory)


@BOTH_WAYS
def test_a_full_disk_leaves_no_output(convert_checkpoint, llama3, tmp_path):
  """The system limits the size of files, which fails while weights are written."""
  source = _prepare(convert_checkpoint, llama3, tmp_path / 'b')
  (tmp_path / 'w').mkdir()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
  try:
    with pytest.raises(UserError, match='File too large'):
      convert_checkpoint(source, tmp_path / 'w' / 'out')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert _names(tmp_path / 'w') == []
  convert_checkpoint(source, tmp_path / 'w' / 'out')
  assert _names(tmp_path / 'w') == ['out']


@BOTH_WAYS
def test_too_small_a_disk_is_refused_before_anything_is_written(
  convert_checkpoint, llama3, tmp_path, monkeypatch
):
  source = _prepare(convert_checkpoint, llama3, tmp_path / 'b')
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
  monkeypatch.setattr(storage.shutil, 'disk_usage', lambda path: usage)
  monkeypatch.setattr(storage, 'atomic_directory', None)
  with pytest.raises(ValueError, match=r'needs 0\.00 GB, and 0\.00 GB are free on its disk'):
    convert_checkpoint(source, tmp_path / 'w' / 'out')
  assert not (tmp_path / 'w').exists()


def test_no_space_left_keeps_the_earlier_checkpoint(llama3, tmp_path, monkeypatch):
  stored = convert.import_checkpoint(llama3, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c')
  calls = []

  def full(file, data, offset):
    calls.append(offset)
    if len(calls) > 9:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return len(data)

  monkeypatch.setattr(shards.os, 'pwrite', full)
  with pytest.raises(UserError, match=r'c cannot be written \(No space left.*make room'):
    convert.export_checkpoint(stored, out, overwrite=True, dtype='float16')
  monkeypatch.undo()
  assert len(calls) > 9
  hf_models.assert_same_tensors(llama3, out)
  assert _names(tmp_path) == ['b', 'c']


def test_provenance_is_copied(llama3, tmp_path):
  source = tmp_path / 'a'
  shutil.copytree(llama3, source)
  record = b'{"stage": "ppo",\r\n "recipe": "configs/ppo.py:local", "metrics": {"kl": 1.5}}'
  (source / 'segjax_config.json').write_bytes(record)
  (source / 'curves.png').write_bytes(b'\x89PNG')
  stored = convert.import_checkpoint(source, tmp_path / 'b')
  out = convert.export_checkpoint(stored, tmp_path / 'c')
  assert (out / 'segjax_config.json').read_bytes() == record
  assert (out / 'curves.png').read_bytes() == b'\x89PNG'
  card = (out / 'README.md').read_text()
  assert 'Recipe: `configs/ppo.py:local`' in card and '| kl | 1.5 |' in card
  assert '](curves.png)' in card
  # A model trained from it has a record of its own or none.
  item = convert.export_checkpoint(
    stored / 'params' / '0' / 'default', tmp_path / 'd', source=source, role='policy'
  )
  assert not (item / 'segjax_config.json').exists() and not (item / 'curves.png').exists()
