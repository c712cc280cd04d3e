"""What stands beside weights is what the model was trained with: template, stop and pad ids."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from fixtures import models, tokenizers
from fixtures.tokenizers import assistant, user

from segjax.config.settings import Network
from segjax.data.tokenizer import load_tokenizer
from segjax.hf import writer
from segjax.hf.model_card import Card
from segjax.model.llama import make_config

OTHER = tokenizers.LLAMA3.replace('<|start_header_id|>', 'From ')
MESSAGES = [user('hello'), assistant('one two')]


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """Returns a function to write an untrained model with a tokenizer: sources(template)."""

  def write(template=tokenizers.LLAMA3, stops=('<|eom_id|>',), vocab_size=0):
    directory = tmp_path_factory.mktemp('source')
    tokenizers.write_tokenizer(directory, template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    sizes = {'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1}
    config = make_config(Network(**sizes, vocab_size=vocab_size or len(tokenizer)))
    params = models.params(config)
    writer.save_checkpoint(directory / 'model', params, config, 'language')
    for file in [*(directory / 'model').iterdir()]:
      shutil.move(file, directory / file.name)
    ids = tokenizer.convert_tokens_to_ids(list(stops))
    (directory / 'generation_config.json').write_text(
      json.dumps({'eos_token_id': ids, 'do_sample': False, 'temperature': 0.6})
    )
    return directory, params, config

  return write


def _export(tmp_path, source, head='language', template='', params=None, card=None):
  directory, language, config = source
  if params is None and head == 'scalar':
    params = models.params(config, 'scalar')
  chat = load_tokenizer(str(directory), template, '2024-07-26')
  out = writer.save_checkpoint(
    tmp_path / 'model',
    params or language,
    config,
    head,
    source=directory,
    tokenizer=chat,
    card=card,
  )
  return out, chat


def _json(file):
  return json.loads(file.read_text())


def _assert_same_texts(out, chat):
  theirs = transformers.AutoTokenizer.from_pretrained(out)
  rendered = theirs.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
  assert rendered == chat.prompt_text(MESSAGES[:1])
  again = load_tokenizer(str(out))
  assert again.prompt_text(MESSAGES[:1]) == rendered
  assert again.stop_ids == chat.stop_ids


@pytest.mark.parametrize('own', ['', tokenizers.LLAMA3])
def test_the_template_of_the_training_is_exported(tmp_path, sources, own):
  out, chat = _export(tmp_path, sources(own), template=OTHER)
  assert (out / 'chat_template.jinja').read_text() == OTHER
  _assert_same_texts(out, chat)


def test_a_fixed_date_is_exported(tmp_path, sources):
  dated = '{{ strftime_now("%d %b %Y") }}' + tokenizers.LLAMA3
  out, chat = _export(tmp_path, sources(dated))
  assert chat.prompt_text(MESSAGES[:1]).startswith('26 Jul 2024<|begin_of_text|>')
  _assert_same_texts(out, chat)


def test_templates_at_other_places_are_replaced(tmp_path, sources):
  source = sources('')
  directory = source[0]
  config = _json(directory / 'tokenizer_config.json')
  named = [{'name': name, 'template': tokenizers.LLAMA3} for name in ('default', 'tool_use')]
  (directory / 'tokenizer_config.json').write_text(json.dumps(config | {'chat_template': named}))
  (directory / 'additional_chat_templates').mkdir()
  (directory / 'additional_chat_templates' / 'rag.jinja').write_text('rag')
  (directory / 'chat_template.jinja').write_text(tokenizers.LLAMA3)
  out, chat = _export(tmp_path, source, template=OTHER)
  _assert_same_texts(out, chat)
  assert not (out / 'additional_chat_templates').exists()
  assert 'chat_template' not in _json(out / 'tokenizer_config.json')


def test_files_that_say_it_already_stay_as_they_are(tmp_path, sources):
  source = sources()
  first, chat = _export(tmp_path / 'a', source)
  second = writer.save_checkpoint(
    tmp_path / 'b', *source[1:], 'language', source=first, tokenizer=chat
  )
  for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
    assert (second / name).read_bytes() == (source[0] / name).read_bytes()
  for name in ('generation_config.json', 'config.json'):
    assert (second / name).read_bytes() == (first / name).read_bytes()


def test_special_ids_of_a_language_model(tmp_path, sources):
  out, chat = _export(tmp_path, sources())
  names = ['<|eot_id|>', '<|end_of_text|>', '<|eom_id|>']
  stops = chat.tokenizer.convert_tokens_to_ids(names)
  assert list(chat.stop_ids) == stops  # those that end a response of a rollout
  ids = {
    'bos_token_id': chat.tokenizer.bos_token_id,
    'eos_token_id': stops,
    'pad_token_id': chat.pad_id,
  }
  config, generation = _json(out / 'config.json'), _json(out / 'generation_config.json')
  assert {name: config[name] for name in ids} == ids
  assert {name: generation[name] for name in ids} == ids
  assert generation['temperature'] == 0.6  # the other fields are the source's
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert model.generation_config.eos_token_id == stops


def test_ids_that_the_network_does_not_have_are_left_out(tmp_path, sources):
  out, _ = _export(tmp_path, sources(vocab_size=300))
  config = _json(out / 'config.json')
  assert [config[f'{name}_token_id'] for name in ('bos', 'eos', 'pad')] == [None] * 3
  transformers.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize('pad', [None, '<|eot_id|>', '<|eom_id|>', '<|im_start|>'])
def test_a_batch_has_the_scores_of_single_texts(tmp_path, sources, pad):
  source = sources(stops=())
  tokenizer = transformers.AutoTokenizer.from_pretrained(source[0])
  tokenizer.pad_token = pad
  tokenizer.save_pretrained(source[0])
  out, chat = _export(tmp_path, source, 'scalar')
  config = _json(out / 'config.json')
  assert config['pad_token_id'] is not None
  assert config['pad_token_id'] not in chat.stop_ids
  model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  texts = ['hello there, how are you?<|eot_id|>', 'one<|eot_id|>']
  single = [model(tokenizer(t, return_tensors='pt')['input_ids']).logits.item() for t in texts]
  batch = tokenizer(texts, return_tensors='pt', padding=True, return_token_type_ids=False)
  np.testing.assert_allclose(model(**batch).logits[:, 0].tolist(), single, atol=1e-6)
  # The tokenizer gives every text the same ids as before.
  assert load_tokenizer(str(out)).encode(texts) == chat.encode(texts)


def _says(params, config, token):
  """Returns parameters of a model that says one token only, whatever it reads."""
  params = jax.tree.map(jnp.zeros_like, params)
  params['backbone']['embedding'] = jnp.ones_like(params['backbone']['embedding'])
  params['backbone']['norm']['scale'] = jnp.ones_like(params['backbone']['norm']['scale'])
  kernel = params['lm_head']['kernel'].at[:, token].set(1.0)
  return params | {'lm_head': {'kernel': kernel}}


@pytest.mark.parametrize('stop', ['<|eot_id|>', '<|eom_id|>'])
def test_the_code_of_the_model_card_ends_at_a_stop_token(tmp_path, sources, stop, monkeypatch):
  source = sources('')  # whose template comes from the training
  _, params, config = source
  token = transformers.AutoTokenizer.from_pretrained(source[0]).convert_tokens_to_ids(stop)
  out, _ = _export(
    tmp_path, source, template='llama3', params=_says(params, config, token), card=Card(stage='sft')
  )
  (code,) = re.findall(r'```python\n(.*?)```', (out / 'README.md').read_text(), re.DOTALL)
  assert 'apply_chat_template' in code
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(code, names)
  outputs, inputs = names['outputs'], names['inputs']
  assert outputs.shape[1] == inputs['input_ids'].shape[1] + 1
  assert outputs[0, -1] == token
