"""Rows of data read by a reward model of another tokenizer: normalizer, evaluate_reward, chat, API.

The reference has the tokenizer of the built-in language, the reward model a byte-level one.
"""

import builtins
import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import runs, tokenizers
from fixtures.rollouts import step_scores

import segjax
from segjax.config.settings import Segmentation
from segjax.data.sources import load_rows
from segjax.data.token_texts import token_texts
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.hf import reader
from segjax.hf.writer import save_checkpoint
from segjax.jobs import evaluate, sample
from segjax.model.heads import init_params, scores
from segjax.run.models import load_models
from segjax.run.weights import Weights
from segjax.train import reward_spec
from segjax.train.best_of_n import nothing_found, search
from segjax.types import Normalizer

ROWS = 6
EVERY_3 = Segmentation(boundary='fixed_length', segment_length=3)


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
  directory = tmp_path_factory.mktemp('foreign') / 'model'
  return runs.foreign_reward_model(directory, Normalizer(b_mean=0.5, b_std=2.0))


@pytest.fixture(scope='module')
def rows(language, tmp_path_factory):
  """Pairs of the built-in language."""
  path = tmp_path_factory.mktemp('rows') / 'pairs.jsonl'
  listed = list(load_rows(str(language / 'rows' / 'pairs.jsonl.gz'), limit=ROWS))
  path.write_text(''.join(json.dumps(row) + '\n' for row in listed))
  return path


@pytest.fixture(scope='module')
def bytes_reference(tmp_path_factory):
  """A language model with the byte-level tokenizer, and another template than `foreign`."""
  directory = tmp_path_factory.mktemp('bytes') / 'model'
  init = jax.jit(functools.partial(init_params, config=runs.FOREIGN, head='language'))
  save_checkpoint(directory, init(jax.random.key(1)), runs.FOREIGN, 'language')
  tokenizers.write_tokenizer(directory)
  return directory


@pytest.fixture(scope='module')
def slow_scores(foreign):
  """Returns a function of (messages, text): the score behind every segment of three tokens."""
  own = load_tokenizer(str(foreign))
  params = reader.load_params(foreign, reader.load_config(foreign), 'scalar')
  plain = jax.jit(functools.partial(scores, config=reader.load_config(foreign)))

  def score(language, messages, text):
    ids = language.response_ids(messages, text)[:-1]  # the stop token is outside
    texts = token_texts(ids, language.decode)
    before, after = own.prompt_ids(messages), own.encode([text + own.turn_close])[0]
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, : len(before) + len(after)] = [*before, *after]
    at_token = np.asarray(plain(params, jnp.asarray(tokens)))[0]
    found = []
    for end in [*range(3, len(ids), 3), len(ids)]:
      read = ''.join(texts[:end])
      # The first of its tokens after which the model has read the text.
      count = next(n for n in range(len(after) + 1) if own.decode(after[:n]).startswith(read))
      found.append(at_token[len(before) + count - 1])
    return np.array(found)

  return score


@pytest.mark.campaign
def test_the_normaliser_of_a_model_that_reads_text(
  small, run, make_stage, foreign, rows, language, slow_scores, tmp_path
):
  model = shutil.copytree(foreign, tmp_path / 'model')
  paths = {'reference.path': str(language / 'model'), 'reward_model.path': str(model)}
  values = paths | {'data.path': str(rows), 'normalizer.kind': 'global'}
  results = run(small('normalizer', **values | {'normalizer.batch_size': 4}))['normalizer']
  own = load_tokenizer(str(language / 'model'))
  expected = np.concatenate(
    [
      slow_scores(own, row['messages'], row[side])
      for row in load_rows(str(rows))
      for side in ('chosen', 'rejected')
    ]
  )
  assert results['segments'] == len(expected)
  np.testing.assert_allclose(results['b_mean'], expected.mean(), atol=1e-5)
  np.testing.assert_allclose(results['b_std'], expected.std(), atol=1e-5)
  stored = reward_spec.read_spec(model)
  assert stored.normalizer_kind == 'global' and stored.segmentation == EVERY_3
  prompts = {'data.path': str(language / 'rows' / 'prompts.jsonl.gz'), 'data.max_rows': 4}
  policy = {'policy.path': paths['reference.path']}
  loaded = evaluate.load_collector(
    make_stage('evaluate', small('evaluate', **paths, **prompts, **policy))
  )
  assert loaded.models.text_model is not None
  np.testing.assert_allclose(loaded.collector.normalizer.b_mean, results['b_mean'], rtol=1e-6)


@pytest.mark.campaign
def test_pairs_and_spans_judged_by_a_model_that_reads_text(
  small, run, foreign, rows, language, slow_scores, tmp_path
):
  first = load_rows(str(rows))[0]
  span = {'start': 2, 'end': 5, 'type': 'slip'}
  row = {'messages': first['messages'], 'response': first['chosen'], 'spans': [span]}
  (tmp_path / 'spans.jsonl').write_text(json.dumps(row) + '\n')
  values = {
    'reference.path': str(language / 'model'),
    'reward_model.path': str(foreign),
    'evaluate_reward.pairs': str(rows),
    'evaluate_reward.spans': str(tmp_path / 'spans.jsonl'),
    'evaluate_reward.batch_size': 4,
  }
  results = run(small('evaluate_reward', **values))['evaluate_reward']
  own = load_tokenizer(str(language / 'model'))
  chosen, rejected = (
    np.array([slow_scores(own, row['messages'], row[side]).mean() for row in load_rows(str(rows))])
    for side in ('chosen', 'rejected')
  )
  figures = results['pairs']['all']
  np.testing.assert_allclose(figures['margin'], (chosen - rejected).mean(), atol=1e-5)
  assert figures['accuracy']['mean'] == pytest.approx((chosen > rejected).mean())
  assert results['spans']['types']['slip']['spans'] == 1
  # Without a reference it is read by its own tokens: there is nothing to carry over.
  del values['reference.path'], values['evaluate_reward.spans']
  assert 'pairs' in run(small('evaluate_reward', **values), tmp_path / 'own')['evaluate_reward']


def test_a_prompt_that_the_reward_model_cannot_read(small, run, foreign, language, tmp_path):
  rows = [
    {'prompt': prompt, 'chosen': 'a badger .', 'rejected': 'a fox .'}
    for prompt in ('which animal ?', '<|im_start|>user\nwhich animal ?')
  ]
  (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  values = {'reference.path': str(language / 'model'), 'reward_model.path': str(foreign)}
  for job in ('normalizer', 'evaluate_reward'):
    with pytest.raises(UserError, match=r'p\.jsonl, row 2.*begins with'):
      run(small(job, **values, **{'data.path': str(tmp_path / 'p.jsonl')}))


@pytest.mark.parametrize('name', ['words', 'bytes'])
def test_the_api_scores_texts_by_the_models_own_tokenizer(
  foreign, language, bytes_reference, slow_scores, name
):
  reference = language / 'model' if name == 'words' else bytes_reference
  judge = segjax.load_reward_model(str(foreign), reference=str(reference), mesh=runs.one_device())
  own = load_tokenizer(str(reference))
  # The tokens of the reference end inside characters, too.
  text = 'the badger of the island is dull .' if name == 'words' else 'é 日本 the 👩‍👩‍👧 fox'
  for messages in ([tokenizers.user('describe')], [tokenizers.user('the badger')]):
    (found,) = judge.score([[*messages, tokenizers.assistant(text)]])
    expected = slow_scores(own, messages, text)
    assert len(expected) > 2
    np.testing.assert_allclose([s.score for s in found.segments], expected, atol=1e-4)
    z = [s.normalized_score for s in found.segments]
    np.testing.assert_allclose(z, (expected - 0.5) / 2, atol=1e-4)
  (plain,) = judge.score(['the badger 日本'])  # follows BOS
  assert plain.segments and all(np.isfinite(s.score) for s in plain.segments)


def test_how_a_model_is_read_is_an_argument(foreign, language):
  with pytest.raises(UserError, match=r'^step is not an option; did you mean'):
    segjax.load_reward_model(str(foreign), reference=str(language / 'model'), step='#')
  with pytest.raises(UserError, match='differ'):
    segjax.load_reward_model(str(foreign), reference=str(language / 'model'), reads='tokens')


def talk(run, settings, directory, monkeypatch, capsys, *lines):
  pending = iter(lines)

  def type_line(prompt):
    for line in pending:
      return line
    raise EOFError

  monkeypatch.setattr(builtins, 'input', type_line)
  run(settings, directory)
  return capsys.readouterr().out


@pytest.mark.campaign
def test_chat_with_a_model_that_reads_text(
  small, run, foreign, language, tmp_path, monkeypatch, capsys
):
  paths = {'policy.path': str(language / 'model'), 'reward_model.path': str(foreign)}
  values = {'rollout.max_new_tokens': 8, **paths}
  lines = ('describe the badger', '/segments', '/best 2 segments', 'and the fox', '/again')
  out = talk(run, small('chat', **values), tmp_path, monkeypatch, capsys, *lines)
  assert 'reads text, by its own tokenizer' in out
  assert re.search(r'score [+-]\d', out)
  assert 'the worst segment is' in out
  (best,) = re.findall(r'\(score ([-+.\d]+)\)', out)
  ((first, word, second),) = re.findall(r'\(score ([-+.\d]+)( -> |, not above )([-+.\d]+)', out)
  # What the search has found is what the whole answer has.
  assert float(first if '>' in word else second) == pytest.approx(float(best), abs=2e-3)
  # Beside other sources of rewards, segments have the part of each.
  second = runs.reward_model(language / 'model', tmp_path / 'second', Normalizer(), EVERY_3)
  lines_of = (f'second path={second} weight=0.5', f'third path={foreign} weight=0.5')
  listed = {'rewards': lines_of}
  out = talk(run, small('chat', **values | listed), tmp_path, monkeypatch, capsys, *lines[:2])
  assert all(name in out for name in ('reward_model', 'second', 'third'))


@pytest.mark.campaign
def test_the_best_segments_by_a_model_that_reads_text(small, run, foreign, language, tmp_path):
  values = {
    **dict.fromkeys(('policy.path', 'reference.path'), str(language / 'model')),
    'reward_model.path': str(foreign),
    'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
    'data.max_rows': 4,
    'sample.search': 'segment',
    'sample.samples_per_prompt': 4,
    'sample.batch_size': 16,
    'sample.segment_tokens': 4,
  }
  assert run(small('sample', **values))['sample']['responses'] == 4
  for line in (tmp_path / 'sample' / 'responses.jsonl').open():
    row = json.loads(line)
    mean = np.mean([segment['score'] for segment in row['segments']])
    assert row['score'] == pytest.approx(mean, abs=1e-3)


@pytest.mark.campaign
@pytest.mark.parametrize('segment_tokens', [2, 4])
def test_tags_stand_behind_what_a_search_keeps(
  small, make_stage, one_device, foreign, language, segment_tokens
):
  """Behind each segment of three tokens, and behind the part so far of the last one."""
  tag = '<|eom_id|>'
  values = {
    **dict.fromkeys(('policy.path', 'reference.path'), str(language / 'model')),
    **{'reward_model.path': str(foreign), 'reward_model.step_tag': tag},
    **{'data.path': str(language / 'rows' / 'prompts.jsonl.gz'), 'data.max_rows': 2},
    **{'sample.search': 'segment', 'sample.segment_tokens': segment_tokens},
  }
  stage = make_stage('sample', small('sample', **values))
  resolved, tokenizer, collector = sample.load(stage)
  params = load_models(
    resolved, tuple(resolved.frozen), Weights(stage.settings.runtime, one_device)
  )
  sampler = dataclasses.replace(collector.sampler, samples_per_prompt=3)
  how = sample._make_search(stage.settings, collector, sampler)
  batch = collector.prompts.gather(np.arange(2), np.asarray)
  found = nothing_found(2, 8, tokenizer.stop_ids[0])
  rounds = list(search(params, batch, jax.random.key(3), how, found))
  scorer, partial = resolved.text_model.scorer, 0
  for kept in rounds:
    for row, mask in enumerate(kept.responses.response_mask):
      ids = kept.responses.response_ids[row][mask].tolist()
      content = len(ids) - kept.responses.finished[row]
      ends = [*range(2, content - 1, 3), content - 1]
      partial += content % 3 > 0
      expected = step_scores(
        *(params['reward'], scorer.network, (tokenizer, scorer.tokenizer)),
        *(collector.prompts.messages(row), ids, ends, tag),
      )
      assert kept.score[row] == pytest.approx(expected.mean(), abs=1e-4)
  assert len(rounds) > 2 and partial
