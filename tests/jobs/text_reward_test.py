"""PPO and evaluation with a reward model of another tokenizer or chat template."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixtures import models, rollouts, runs, tokenizers, training

from segjax.config.settings import Segmentation
from segjax.data.token_texts import token_texts
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.hf.writer import save_checkpoint
from segjax.jobs import evaluate
from segjax.model.heads import init_params, scores
from segjax.run.models import load_models
from segjax.run.weights import Weights
from segjax.train import text_reward
from segjax.train.experience import make_experience
from segjax.train.recipe import RewardSource
from segjax.train.reward_mixing import ListedRewards
from segjax.train.reward_shaping import segment_responses
from segjax.train.rollout_scoring import score
from segjax.train.segmenter import Segmenter
from segjax.train.text_reward import TextReward, add_text_scores
from segjax.train.text_scoring import StepMarks, TextScorer
from segjax.types import Normalizer

NETWORK = runs.FOREIGN
WORDS = ['hello there, how are you?', 'the quick brown fox', 'é 日本', '']


@pytest.fixture(scope='module')
def other(tmp_path_factory):
  """A reward model with a byte-level tokenizer and ChatML."""
  directory = tmp_path_factory.mktemp('other')
  return runs.foreign_reward_model(directory / 'model', Normalizer(b_mean=0.5, b_std=2.0))


@pytest.fixture
def inputs(language, other):
  return {
    **dict.fromkeys(('policy.path', 'reference.path'), str(language / 'model')),
    'reward_model.path': str(other),
    'data.path': str(language / 'rows' / 'prompts.jsonl.gz'),
    'data.max_rows': 8,
    'reward_model.segmentation.include_eos': True,
  }


@pytest.mark.parametrize('include_eos', [pytest.param(False, marks=pytest.mark.campaign), True])
def test_the_policys_own_tokenizer_gives_the_scores_of_its_tokens(tmp_path, include_eos):
  tokenizer = load_tokenizer(tokenizers.write_tokenizer(tmp_path))
  prompts = [[tokenizers.user(text)] for text in ('one', 'two 日本', 'three', 'hello')]
  collected = rollouts.by_hand(tokenizer, prompts, WORDS)
  mesh = models.mesh(1)
  params = {name: training.network(name, mesh, NETWORK) for name in ('policy', 'reference')}
  params['reward'] = training.network('reward', mesh, NETWORK)
  cut = Segmentation(boundary='fixed_length', segment_length=3, include_eos=include_eos)
  ppo = dataclasses.replace(training.PPO_SETTINGS, estimator='reinforce_plus_plus')
  by_tokens = dataclasses.replace(
    training.recipe(ppo=ppo),
    **dict.fromkeys(('policy', 'reference', 'reward'), NETWORK),
    segmenter=Segmenter(cut),
  )
  by_text = dataclasses.replace(by_tokens, reward=None, reads_text=True)
  normalizer = jax.tree.map(jnp.float32, Normalizer(b_mean=0.3, b_std=0.7))
  expected = score(params, collected.arrays, collected.length, recipe=by_tokens)
  outputs = score(params, collected.arrays, collected.length, recipe=by_text)
  assert not np.asarray(outputs.score).any()
  text = {'reward': TextReward(TextScorer(NETWORK, tokenizer, mesh), tokenizer)}
  outputs = add_text_scores(text, params, outputs, collected, prompts, by_text)
  experience, _ = make_experience(
    collected.arrays, outputs, normalizer, jnp.float32(0.1), recipe=by_text
  )
  plain, _ = make_experience(
    collected.arrays, expected, normalizer, jnp.float32(0.1), recipe=by_tokens
  )
  end = np.asarray(plain.segments.end)
  assert end.any(axis=1).tolist() == [True, True, True, False]  # the stop token alone is no segment
  np.testing.assert_allclose(experience.score[end], plain.score[end], atol=1e-5)
  assert not np.asarray(experience.score)[~end].any()
  np.testing.assert_allclose(outputs.prompt_score, expected.prompt_score, atol=1e-5)
  np.testing.assert_allclose(experience.reward, plain.reward, atol=1e-5)


@pytest.mark.parametrize('mix', [pytest.param('token', marks=pytest.mark.campaign), 'segment'])
def test_listed_models_that_read_text_give_the_scores_of_their_tokens(tmp_path, mix, monkeypatch):
  tokenizer = load_tokenizer(tokenizers.write_tokenizer(tmp_path))
  prompts = [[tokenizers.user(text)] for text in ('one', 'two 日本', 'three', 'hello')]
  collected = rollouts.by_hand(tokenizer, prompts, WORDS)
  mesh = models.mesh(1)
  params = {name: training.network(name, mesh, NETWORK) for name in ('policy', 'reference')}
  params['reward'] = training.network('reward', mesh, NETWORK)
  params['reward.second'] = training.network('critic', mesh, NETWORK)
  cuts = [Segmentation(boundary='fixed_length', segment_length=n) for n in (3, 6)]
  second = RewardSource('second', 'reward.second', NETWORK, Segmenter(cuts[1]), 'even_split', 0.5)
  ppo = dataclasses.replace(training.PPO_SETTINGS, estimator='reinforce_plus_plus')
  by_tokens = training.recipe(ppo=ppo)
  by_tokens = dataclasses.replace(
    by_tokens,
    **dict.fromkeys(('policy', 'reference', 'reward'), NETWORK),
    segmenter=Segmenter(cuts[0]),
    shaping=dataclasses.replace(by_tokens.shaping, mix=mix),
    rewards=(second,),
  )
  one = dataclasses.replace(by_tokens, rewards=(dataclasses.replace(second, reads_text=True),))
  both = dataclasses.replace(one, reward=None, reads_text=True)
  counted, shipped = [], text_reward.character_ends
  monkeypatch.setattr(
    text_reward, 'character_ends', lambda *arguments: counted.append(1) or shipped(*arguments)
  )
  rewards = []
  for recipe, names in (
    (by_tokens, ()),
    (one, ('reward.second',)),
    (both, ('reward', 'reward.second')),
  ):
    outputs = score(params, collected.arrays, collected.length, recipe=recipe)
    assert (outputs.scores is None) == ('reward.second' in names)
    texts = {name: TextReward(TextScorer(NETWORK, tokenizer, mesh), tokenizer) for name in names}
    counted.clear()
    outputs = add_text_scores(texts, params, outputs, collected, prompts, recipe)
    # Responses are cut once for all models that are read at the same segments.
    assert len(counted) == min(len(names), 1 if mix == 'segment' else 2)
    normalizer = jax.tree.map(jnp.float32, Normalizer(b_mean=0.3, b_std=0.7))
    listed = ListedRewards({'second': normalizer}, {})
    experience, _ = make_experience(
      collected.arrays, outputs, normalizer, jnp.float32(0.1), None, listed, recipe=recipe
    )
    assert np.asarray(experience.parts['second']).any()
    rewards.append(np.asarray(experience.reward))
  for reward in rewards[1:]:
    np.testing.assert_allclose(reward, rewards[0], atol=1e-5)


def test_listed_models_that_read_text_are_found(small, make_stage, inputs, other):
  lines = (f'second path={other} weight=0.5',)
  loaded = evaluate.load_collector(
    make_stage('evaluate', small('evaluate', **inputs, rewards=lines))
  )
  assert set(loaded.models.texts) == set(loaded.collector.texts) == {'reward', 'reward.second'}
  (source,) = loaded.collector.recipe.rewards
  assert source.reads_text and source.network.vocab_size == NETWORK.vocab_size


@pytest.mark.campaign
def test_a_listed_model_that_reads_tags(tmp_path):
  """Beside one that reads no tags, at the same segments."""
  tokenizer, tag = load_tokenizer(tokenizers.write_tokenizer(tmp_path)), '<|eom_id|>'
  prompts = [[tokenizers.user(text)] for text in ('one', 'two', 'three', 'hello')]
  answers = ['hello there, how are you?', 'the quick brown fox', 'one two  three', '']
  collected = rollouts.by_hand(tokenizer, prompts, answers)
  mesh = models.mesh(1)
  params = {name: training.network(name, mesh, NETWORK) for name in ('policy', 'reference')}
  params |= {name: training.network('reward', mesh, NETWORK) for name in ('reward', 'reward.steps')}
  segmenter = Segmenter(Segmentation(boundary='fixed_length', segment_length=4))
  ppo = dataclasses.replace(training.PPO_SETTINGS, estimator='reinforce_plus_plus')
  recipe = training.recipe(ppo=ppo)
  source = RewardSource('steps', 'reward.steps', NETWORK, segmenter, 'even_split', 1.0, True)
  recipe = dataclasses.replace(
    recipe,
    **dict.fromkeys(('policy', 'reference'), NETWORK),
    reward=None,
    reads_text=True,
    segmenter=segmenter,
    shaping=dataclasses.replace(recipe.shaping, mix='segment'),
    rewards=(source,),
  )
  texts = {
    name: TextReward(TextScorer(NETWORK, tokenizer, mesh, StepMarks(own)), tokenizer)
    for name, own in (('reward', ''), ('reward.steps', tag))
  }
  outputs = score(params, collected.arrays, collected.length, recipe=recipe)
  outputs = add_text_scores(texts, params, outputs, collected, prompts, recipe)
  segments = segment_responses(collected.arrays, outputs, outputs.score, segmenter, recipe.compat)
  end, found = np.asarray(segments.end), np.asarray(outputs.scores['steps'])
  assert end.sum() > 4 and not found[~end].any()
  for row, prompt in enumerate(prompts):
    ids, ends = collected.response_ids[row][collected.response_mask[row]], np.flatnonzero(end[row])
    expected = rollouts.step_scores(
      params['reward'], NETWORK, (tokenizer, tokenizer), prompt, ids.tolist(), ends, tag
    )
    np.testing.assert_allclose(found[row, ends], expected, atol=1e-5)
  assert np.abs(np.asarray(outputs.score) - found)[end].min() > 1e-3


def test_the_tags_of_a_line(small, make_stage, inputs, language, other, tmp_path):
  line = f"steps path={other} step_tag=' hello' step_delimiter='\\n' boundary=delimiter"

  def load(line):
    settings = small('evaluate', **inputs, rewards=(line,))
    return evaluate.load_collector(make_stage('evaluate', settings)).collector

  collector = load(line)
  assert collector.texts['reward.steps'].scorer.marks == StepMarks(' hello', '\n')
  assert collector.texts['reward'].scorer.marks == StepMarks()
  (source,) = collector.recipe.rewards
  assert source.segmenter.segmentation.boundary == 'delimiter' and source.reads_text
  words = runs.reward_model(language / 'model', tmp_path / 'words', Normalizer(), Segmentation())
  with pytest.raises(UserError, match=r"^config.rewards: steps: step_tag='ки' is not in the voc"):
    load(f'steps path={words} step_tag=ки')


@pytest.mark.campaign
def test_a_line_of_a_model_that_answers_by_two_tokens_at_tags(
  small, make_stage, one_device, inputs, tmp_path
):
  """The form of Math-Shepherd's: '+' against '-' behind each step."""
  tag, model = '<|eom_id|>', tmp_path / 'steps'
  init = jax.jit(functools.partial(init_params, config=NETWORK, head='language'))
  save_checkpoint(model, init(jax.random.key(3)), NETWORK, 'language')
  tokenizers.write_tokenizer(model)
  line = (
    f'steps path={model} head=tokens positive=+ negative=- step_tag={tag} boundary=fixed_length '
    'segment_length=2 granularity=segment normalizer=none spread=end_only weight=0.5'
  )
  stage = make_stage('evaluate', small('evaluate', **inputs, rewards=(line,)))
  resolved, tokenizer, collector = evaluate.load_collector(stage)
  params = load_models(
    resolved, tuple(resolved.frozen), Weights(stage.settings.runtime, one_device)
  )
  e = collector.collect(params, np.arange(8), jax.random.key(0), jnp.float32(0.1)).experience
  scorer, read = resolved.texts['reward.steps'].scorer, 0
  for row in range(8):
    ids = np.asarray(e.rollout.response_ids[row])[np.asarray(e.rollout.response_mask[row])].tolist()
    content = len(ids) - int(e.rollout.finished[row])
    ends = sorted({*range(1, content, 2), content - 1} - {-1})
    expected = rollouts.step_scores(
      *(params['reward.steps'], scorer.network, (tokenizer, scorer.tokenizer)),
      *(collector.prompts.messages(row), ids, ends, tag),
    )
    part = np.asarray(e.parts['steps'][row])
    np.testing.assert_allclose(part[ends], expected / 2, atol=1e-5)
    assert np.count_nonzero(part) == len(ends)
    read += len(ends)
  assert read > 16


def test_a_listed_model_of_two_labels(small, make_stage, inputs, other, tmp_path):
  model = shutil.copytree(other, tmp_path / 'two')
  path = model / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  both = np.concatenate([tensors['score.weight'], -tensors['score.weight']])
  safetensors.numpy.save_file(tensors | {'score.weight': both}, path)
  line = f'second path={model} weight=0.5'

  def load(line):
    settings = small('evaluate', **inputs, rewards=(line,))
    return evaluate.load_collector(make_stage('evaluate', settings)).collector

  message = '^config.rewards: second: positive is empty: .* is a classifier of 2 labels, .*; set it'
  with pytest.raises(UserError, match=message):
    load(line)
  (source,) = load(f'{line} positive=LABEL_0').recipe.rewards
  assert (source.network.score.positive, source.network.score.negative) == (0, 1)


@pytest.mark.campaign
def test_evaluation_with_a_listed_model_that_reads_text(small, run, inputs, other, tmp_path):
  lines = (f'second path={other} weight=0.5',)
  run(small('evaluate', **inputs, rewards=lines, **{'reward_shaping.mix': 'segment'}))
  records = [json.loads(x) for x in (tmp_path / 'evaluate' / 'samples.jsonl').open()]
  for record in records:  # the same model, with half the weight
    parts = record['totals']['parts']
    assert parts['second'] == pytest.approx(parts['reward_model'] / 2, abs=1e-3)


@pytest.mark.campaign
@pytest.mark.parametrize('redistribute', ['none', 'red'])
def test_rollouts_are_scored_as_text(small, make_stage, one_device, inputs, redistribute):
  settings = small('evaluate', **inputs, **{'reward_shaping.redistribute': redistribute})
  stage = make_stage('evaluate', settings)
  resolved, tokenizer, collector = evaluate.load_collector(stage)
  assert set(resolved.paths) == {'policy', 'reference'}
  weights = Weights(settings.runtime, one_device)
  params = load_models(resolved, ('policy', 'reference', 'reward'), weights)
  collected = collector.collect(params, np.arange(8), jax.random.key(0), jnp.float32(0.1))
  own = load_tokenizer(str(resolved.text_model.path))
  plain = jax.jit(functools.partial(scores, config=resolved.text_model.scorer.network))
  e, read = collected.experience, 0

  def slow(messages, text):
    """The score after a text, whose last token completes it."""
    ids = [*own.prompt_ids(messages), *own.encode([text])[0]]
    tokens = np.zeros((1, 128), np.int32)
    tokens[0, : len(ids)] = ids
    return float(plain(params['reward'], jnp.asarray(tokens))[0, len(ids) - 1])

  for row in range(8):
    mask = np.asarray(e.rollout.response_mask[row])
    ids = np.asarray(e.rollout.response_ids[row])[mask].tolist()
    ends, texts = np.asarray(e.segments.end[row])[mask], token_texts(ids, tokenizer.decode)
    messages = collector.prompts.messages(row)
    for last in np.flatnonzero(ends):
      text = ''.join(texts[: last + 1])
      if last == len(ids) - 1 and e.rollout.finished[row]:
        text += own.turn_close
      # A prefix may be tokenized differently from the text that it is cut from.
      whole = own.encode([''.join(texts)])[0]
      if own.encode([text])[0] == whole[: len(own.encode([text])[0])] or text == ''.join(texts):
        assert float(e.score[row][mask][last]) == pytest.approx(slow(messages, text), abs=1e-5)
        read += 1
  assert read >= 8
  assert np.isfinite(np.asarray(e.reward)).all()


@pytest.mark.campaign
@pytest.mark.parametrize('carry', [False, True])
def test_ppo_and_evaluation(small, run, inputs, tmp_path, carry):
  values = {'rollout.carry': carry, 'rollout.max_concurrent': 8, 'ppo.scoring_batch_size': 4}
  run(small('ppo', 'evaluate', **inputs, **values))
  figures = json.loads((tmp_path / 'evaluate' / 'results.json').read_text())
  assert 'score_gain' in figures['after'], figures['after']
  lines = (tmp_path / 'ppo' / 'metrics.jsonl').read_text().splitlines()
  assert all(np.isfinite(json.loads(line)['objective/reward']) for line in lines)


def test_what_reads_text(small, make_stage, language, other, tmp_path, monkeypatch):
  """Another tokenizer, or another template; one template for all is set by config.data."""
  same = runs.reward_model(language / 'model', tmp_path / 'same', Normalizer(), Segmentation())
  template = runs.with_template(same, tmp_path / 'template')
  own = (language / 'model' / 'chat_template.jinja').read_text()
  for path, values, expected in (
    (same, {}, False),
    (same, {'reward_model.reads': 'text'}, True),
    (template, {}, True),
    (template, {'data.chat_template': own}, False),
    (template, {'reward_model.reads': 'tokens'}, False),
    (other, {}, True),
    (other, {'data.chat_template': own}, True),
  ):
    paths = dict.fromkeys(('policy.path', 'reference.path'), str(language / 'model'))
    paths |= {'reward_model.path': str(path)}
    rows = {'data.path': str(language / 'rows' / 'prompts.jsonl.gz'), 'data.max_rows': 4}
    loaded = evaluate.load_collector(
      make_stage('evaluate', small('evaluate', **paths, **rows | values))
    )
    assert (loaded.models.text_model is not None) == expected, (path, values)
    assert ('reward' in loaded.models.paths) != expected
    assert loaded.collector.recipe.has_scores
  assert loaded.models.text_model.scorer.tokenizer.turn_close == '<|im_end|>'


@pytest.mark.parametrize(
  'values, message',
  [
    ({'critic.init': 'reward_model'}, 'init=reward_model, but .* reads text'),
    ({'reward_shaping.redistribute': 'gradient', 'reward_model.normalizer': 'none'},
     'reads text, .*redistribute=gradient reads inside'),
    ({'reward_model.segmentation.boundary': 'score_jump'}, 'reads text, .*score_jump cuts by'),
    ({'reward_model.reads': 'tokens'}, 'the tokenizers of .* differ; segments'),
  ],
)  # fmt: skip
def test_what_needs_the_policys_tokens_is_refused(small, run, inputs, values, message):
  with pytest.raises(UserError, match=message):
    run(small('ppo', **inputs | values))


@pytest.mark.parametrize('job', ['ppo', 'reward'])
def test_a_head_of_another_form_is_not_trained_further(small, run, language, tmp_path, job):
  """A bias is read of a frozen reward model, and what is trained has none."""
  policy = str(language / 'model')
  model = runs.reward_model(language / 'model', tmp_path / 'm', Normalizer(), Segmentation())
  path = model / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  safetensors.numpy.save_file(tensors | {'score.bias': np.ones(1, np.float32)}, path)
  paths = {'policy.path': policy, 'reference.path': policy}
  if job == 'ppo':
    rows = {'data.path': str(language / 'rows' / 'prompts.jsonl.gz'), 'data.max_rows': 8}
    values = {'reward_model.path': str(model), **paths, **rows}
    with pytest.raises(
      UserError, match=r'^config.critic.init=reward_model, but the score of .*/m '
    ):
      run(small('ppo', **values, **{'critic.init': 'reward_model'}))
    with pytest.raises(UserError, match=r'^config.critic.init: the head of .*/m has 1 label and a'):
      run(small('ppo', **values, **{'critic.init': str(model)}))
  else:
    paths['policy.path'] = str(model)
    rows = {'data.path': str(language / 'rows' / 'pairs.jsonl.gz')}
    with pytest.raises(UserError, match=r'^config.policy.path: the head of .*/m has 1 label and a'):
      run(small('reward', **paths, **rows))


def test_a_prompt_that_the_reward_model_cannot_read(small, run, inputs, tmp_path):
  rows = [{'prompt': 'which animal ?'}, {'prompt': '<|im_start|>user\nwhich animal ?'}]
  (tmp_path / 'p.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  values = inputs | {'data.path': str(tmp_path / 'p.jsonl')}
  with pytest.raises(UserError, match=r'p\.jsonl, row 2.*begins with'):
    run(small('ppo', **values))


@pytest.mark.parametrize(
  'job, values, message',
  [
    ('evaluate', {'step_tag': '日', 'reads': 'tokens'}, 'step_tag=.日. is put into text'),
    ('evaluate', {'step_delimiter': '\n'}, 'has no effect without step_tag'),
    ('evaluate', {'positive': '+', 'head': 'scalar'}, 'has no effect with head=scalar'),
    ('evaluate', {'head': 'tokens'}, r'which tokens of .* is not known; set'),
    ('evaluate', {'positive': 'LABEL_1'}, 'has one label'),
    ('normalizer', {'step_tag': '日', 'reads': 'tokens'}, 'step_tag=.日. is put into text'),
    ('evaluate_reward', {'reads': 'tokens'}, 'the tokenizers of .* differ'),
  ],
)
def test_what_a_process_model_reads_is_known(small, run, inputs, language, job, values, message):
  if job != 'evaluate':
    pairs = str(language / 'rows' / 'pairs.jsonl.gz')
    inputs |= {'data.path': pairs, 'reference.path': str(language / 'model')}
  with pytest.raises(UserError, match=message) as error:
    values = {f'reward_model.{name}': value for name, value in values.items()}
    run(small(job, **inputs | values))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('head', ['scalar', 'tokens'])
def test_a_process_model_by_its_settings(small, make_stage, inputs, head, tmp_path):
  how = {'step_tag': ' hello', 'step_delimiter': '\n', 'head': head}
  if head == 'tokens':
    how |= {'positive': '+', 'negative': '-'}
  values = {f'reward_model.{name}': value for name, value in how.items()}
  lines = []
  stage = dataclasses.replace(
    make_stage('evaluate', small('evaluate', **inputs | values)),
    write_log=lambda line, name: lines.append(line),
  )
  if head == 'tokens':
    with pytest.raises(UserError, match=r'holds tensor score\.weight'):  # it is no language model
      evaluate.load_collector(stage)
    return
  scorer = evaluate.load_collector(stage).models.text_model.scorer
  assert (scorer.marks.tag, scorer.marks.delimiter) == (' hello', '\n')
  assert any("the score of a step is read at ' hello' behind it" in line for line in lines)
