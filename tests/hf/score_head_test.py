"""Heads of reward models of others: scores against the logits of transformers."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from fixtures import hf_models, models, tokenizers

from segjax.config.settings import RewardModelSettings, Runtime
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.hf import reader
from segjax.hf.score_head import check_trainable_head, find_score_head
from segjax.model.heads import scores
from segjax.run.models import load_network_configs
from segjax.run.weights import Weights
from segjax.train.text_scoring import StepMarks, TextScorer

# Float32 on both sides; only the order of sums differs.
TOLERANCE = 1e-4
MESH = models.mesh(1)


def write(directory, labels=2, family='Llama', **fields):
  """Writes a random token classifier, whose bias is random too."""
  torch.manual_seed(1)
  kind = {'Llama': 'llama3', 'Qwen2': 'qwen2'}[family]
  sizes = hf_models._SIZES | (hf_models.KINDS.get(kind) or hf_models.FAMILIES[kind][1])
  config = getattr(transformers, f'{family}Config')(**sizes | fields, num_labels=labels)
  model = getattr(transformers, f'{family}ForTokenClassification')(config)
  with torch.no_grad():
    model.score.bias.copy_(torch.randn(labels))
  model.save_pretrained(directory)
  return model.eval()


def torch_logits(model, ids):
  with torch.no_grad():
    return model(torch.from_numpy(np.asarray(ids, np.int64))).logits.numpy()


def our_scores(directory, ids, lines=None, **how):
  """Returns scores at every token, read as a run reads them."""
  settings, runtime = RewardModelSettings(**how), Runtime()
  log = (lines if lines is not None else []).append
  config = load_network_configs({'reward': directory}, runtime, MESH, log, {'reward': settings})[
    'reward'
  ]
  params = Weights(runtime, MESH).frozen(directory, config, 'scalar')
  own = jax.jit(functools.partial(scores, config=config))
  return np.asarray(own(params, jnp.asarray(ids)))


@pytest.mark.parametrize('family', ['Llama', 'Qwen2'])
def test_a_token_classifier_of_one_label_is_a_reward_model(tmp_path, family):
  model = write(tmp_path, 1, family)
  expected = torch_logits(model, hf_models.IDS)[..., 0]
  np.testing.assert_allclose(our_scores(tmp_path, hf_models.IDS), expected, atol=TOLERANCE)
  with pytest.raises(UserError, match=r"positive='x' has no effect: .* has one label"):
    find_score_head(tmp_path, RewardModelSettings(positive='x'))


def test_two_labels_give_the_log_odds(tmp_path):
  model = write(tmp_path, 2)
  logits = torch_logits(model, hf_models.IDS)
  p = torch.softmax(torch.from_numpy(logits), -1).numpy()
  for positive in (0, 1):
    lines = []
    found = our_scores(tmp_path, hf_models.IDS, lines, positive=f'LABEL_{positive}')
    expected = np.log(p[..., positive]) - np.log(p[..., 1 - positive])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    names = [f"'LABEL_{label}'" for label in (positive, 1 - positive)]
    text = 'the score is the logit of label {} less that of {}'.format(*names)
    assert lines == [f'{tmp_path}: {text}']


def test_labels_have_the_names_of_the_config(tmp_path):
  names = {0: 'neutral', 1: 'bad', 2: 'good'}
  model = write(tmp_path, 3)
  config = json.loads((tmp_path / 'config.json').read_text())
  config['id2label'] = names
  (tmp_path / 'config.json').write_text(json.dumps(config))
  logits = torch_logits(model, hf_models.IDS)
  found = our_scores(tmp_path, hf_models.IDS, positive='good', negative='bad')
  np.testing.assert_allclose(found, logits[..., 2] - logits[..., 1], atol=TOLERANCE)
  for how, message in (
    ({}, 'classifier of 3 labels, neutral, bad, good, and which of them is that of a good step is'),
    (
      {'positive': 'good'},
      r'^config.reward_model.negative is empty: .* that of a bad step is not',
    ),
    ({'positive': 'fine'}, r"positive='fine' is not a label: .* neutral, bad, good; name one"),
    ({'positive': 'bad', 'negative': 'bad'}, 'both'),
  ):
    with pytest.raises(UserError, match=message) as error:
      find_score_head(tmp_path, RewardModelSettings(**how))
    assert '\n' not in str(error.value)


def test_a_layer_in_front_of_the_labels(tmp_path):
  """The form of Qwen2.5-Math's process models: score = Linear, ReLU, Linear."""
  model = write(tmp_path, 2, 'Qwen2')
  head = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
  tensors = {k: v for k, v in hf_models.tensors(tmp_path).items() if not k.startswith('score.')}
  own = {f'score.{name}': value.detach().numpy() for name, value in head.state_dict().items()}
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors | own, file, metadata={'format': 'pt'})
  with torch.no_grad():
    hidden = model.model(torch.from_numpy(hf_models.IDS.astype(np.int64))).last_hidden_state
    logits = head(hidden).numpy()
  found = our_scores(tmp_path, hf_models.IDS, positive='LABEL_1')
  np.testing.assert_allclose(found, logits[..., 1] - logits[..., 0], atol=TOLERANCE)


@pytest.fixture(scope='module', params=['llama3', 'llama32'])  # untied, and tied
def language(request, tmp_path_factory):
  """A language model with a tokenizer that knows '+' and '-'."""
  directory = tmp_path_factory.mktemp(request.param)
  hf_models.write(directory, request.param, vocab_size=320, max_position_embeddings=128)
  tokenizers.write_tokenizer(directory)
  return directory


def test_two_tokens_of_a_language_model(language):
  tokenizer = load_tokenizer(str(language)).tokenizer
  plus, minus = (tokenizer(text)['input_ids'][0] for text in '+-')
  lines = []
  how = {'head': 'tokens', 'positive': '+', 'negative': '-'}
  logits = hf_models.torch_logits(language, hf_models.IDS)
  found = our_scores(language, hf_models.IDS, lines, **how)
  np.testing.assert_allclose(found, logits[..., plus] - logits[..., minus], atol=TOLERANCE)
  assert lines == [
    f"{language}: the score is the logit of token '+' ({plus}) less that of '-' ({minus})"
  ]
  for values, message in (
    ({'negative': ''}, r"^config.reward_model.head=tokens: which tokens of .*; set positive='\+'"),
    ({'positive': 'zebra'}, r"positive='zebra' is 4 tokens of"),
    ({'positive': '-'}, 'one token'),
    ({'head': 'labels'}, 'has no classifier, score.weight; use head=tokens'),
  ):
    with pytest.raises(UserError, match=message):
      find_score_head(language, RewardModelSettings(**how | values))
    with pytest.raises(UserError) as error:
      find_score_head(language, RewardModelSettings(**how | values), 'config.rewards: steps: ')
    assert str(error.value).startswith('config.rewards: steps: ')
    assert 'config.reward_model' not in str(error.value)
  with pytest.raises(UserError, match=r'^config.reward_model.path: .* has no .*set head=tokens if'):
    our_scores(language, hf_models.IDS)


def test_scores_of_steps_at_their_tags(language):
  """As a process model of Math-Shepherd's form: tags behind steps, two tokens' logits there."""
  how = RewardModelSettings(head='tokens', positive='+', negative='-')
  config = load_network_configs({'reward': language}, Runtime(), MESH, print, {'reward': how})[
    'reward'
  ]
  params = Weights(Runtime(), MESH).frozen(language, config, 'scalar')
  tokenizer = load_tokenizer(str(language))
  scorer = TextScorer(config, tokenizer, MESH, StepMarks(' ки', '\n'))
  response = 'Step 1: 2 + 2 = 4.\n\nStep 2: é = 日本.\nSo 4'
  ends = np.array([[20, -1, 35, len(response)]])
  prompt = [tokenizers.user('2 + 2?')]
  found = np.asarray(scorer.score(params, [prompt], [response], ends))[0]
  text = 'Step 1: 2 + 2 = 4. ки\nStep 2: é = 日本. ки\nSo 4 ки'
  ids = [*tokenizer.prompt_ids(prompt), *tokenizer.encode([text])[0]]
  logits = hf_models.torch_logits(language, np.array([ids], np.int32))[0]
  plus, minus = (tokenizer.tokenizer(sign)['input_ids'][0] for sign in '+-')
  tag = tokenizer.encode([' ки'])[0]
  at = [i + len(tag) - 1 for i in range(len(ids)) if list(ids[i : i + len(tag)]) == list(tag)]
  assert len(at) == 3
  expected = (logits[:, plus] - logits[:, minus])[at]
  np.testing.assert_allclose(found, [expected[0], 0.0, *expected[1:]], atol=TOLERANCE)


def test_weights_that_are_not_finite(tmp_path):
  write(tmp_path, 1)
  tensors = hf_models.tensors(tmp_path)
  tensors['score.bias'] = np.array([np.nan], np.float32)
  file = tmp_path / 'model.safetensors'
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})
  with pytest.raises(UserError, match=r'score\.bias'):
    our_scores(tmp_path, hf_models.IDS)


def test_one_head_without_a_bias_is_as_it_was(tmp_path):
  hf_models.write(tmp_path, head='scalar')
  assert find_score_head(tmp_path, RewardModelSettings()) == (None, '')
  config = reader.load_config(tmp_path)
  assert config.score is None and dataclasses.replace(config, score=None) == config
  found = our_scores(tmp_path, hf_models.IDS)
  np.testing.assert_allclose(
    found[..., -1],
    hf_models.torch_scores(tmp_path, hf_models.IDS).reshape(found.shape[0], -1)[:, -1],
    atol=TOLERANCE,
  )


@pytest.mark.parametrize('labels, has', [(1, '1 label and a bias'), (2, '2 labels and a bias')])
def test_heads_that_are_not_trained_further(tmp_path, labels, has):
  write(tmp_path, labels)
  with pytest.raises(
    UserError, match=rf'^config.critic.init: the head of .* has {has}, and'
  ) as error:
    check_trainable_head(tmp_path, 'config.critic.init')
  assert '\n' not in str(error.value) and 'name a language model' in str(error.value)


@pytest.mark.parametrize('head', ['scalar', 'language'])
def test_heads_that_are_trained_further(tmp_path, head):
  hf_models.write(tmp_path, head=head)
  check_trainable_head(tmp_path, 'config.policy.path')
