"""The credit job with a reward model that reads text."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from fixtures import rollouts, runs, tokenizers
from fixtures.rollouts import step_scores

from segjax.config.settings import Segmentation
from segjax.data.tokenizer import load_tokenizer
from segjax.hf.writer import save_checkpoint
from segjax.jobs import credit
from segjax.jobs.credit_methods import METHODS, SHAPLEY, make_methods, make_scorer
from segjax.model.heads import init_params
from segjax.run.models import load_models
from segjax.run.weights import Weights
from segjax.train.reward_shaping import segment_responses
from segjax.types import Normalizer

PROMPTS = ['one', 'two 日本', 'three', 'hello']
# In ASCII: of a segment that ends inside a character, a text is read up to the character.
ANSWERS = ['hello. there, how. are you?', 'the quick. brown fox', 'e, oui. one', 'two. three. 2+2']
TAG = '<|eom_id|>'
# What reads inside a reward model at the tokens of the policy.
BY_TOKENS = {
  'cut: score jumps',
  *(f'{how}: {unit}' for how in ('gradient', 'attention') for unit in ('segments', 'tokens')),
}


def clause_credit(prompt, response):
  """Returns the number of vowels of each clause, less 3."""
  clauses = response.removesuffix('.').split('.')
  return [sum(clause.count(vowel) for vowel in 'aeiou') - 3.0 for clause in clauses]


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """A policy, and a reward model with its tokenizer."""
  directory = tmp_path_factory.mktemp('models')
  init = jax.jit(functools.partial(init_params, config=runs.FOREIGN, head='language'))
  save_checkpoint(directory / 'policy', init(jax.random.key(1)), runs.FOREIGN, 'language')
  tokenizers.write_tokenizer(directory / 'policy')
  segmentation = Segmentation(entropy_threshold=5.5)
  normalizer = Normalizer(b_mean=0.3, b_std=0.7)
  runs.reward_model(directory / 'policy', directory / 'reward', normalizer, segmentation)
  rows = ''.join(json.dumps({'prompt': prompt}) + '\n' for prompt in PROMPTS)
  (directory / 'prompts.jsonl').write_text(rows)
  return directory


@pytest.fixture
def load(small, make_stage, models):
  """Returns a function to load the credit job, whose responses are `ANSWERS`."""

  def make(reward='reward', **values):
    paths = dict.fromkeys(('policy.path', 'reference.path'), str(models / 'policy'))
    paths |= {'data.path': str(models / 'prompts.jsonl')}
    paths |= {'reward_model.path': str(reward if '/' in str(reward) else models / reward)}
    functions = {'evaluate.credit_fn': f'{__name__}:clause_credit'}
    functions['evaluate.boundary_fn'] = 'segjax.data.demo_language:is_boundary'
    lines = []
    stage = make_stage('credit', small('credit', **paths, **functions, **values))
    stage.directory.mkdir(exist_ok=True)
    stage = dataclasses.replace(stage, write_log=lambda line, name: lines.append(line))
    loaded = credit.load(stage)
    tokenizer = load_tokenizer(str(models / 'policy'))
    prompts = [[tokenizers.user(text)] for text in PROMPTS]
    answers = rollouts.by_hand(tokenizer, prompts, ANSWERS)
    collector = dataclasses.replace(loaded.collector, sample=lambda *arguments: answers)
    return stage, loaded._replace(collector=collector), lines

  return make


@pytest.mark.campaign
def test_a_model_read_as_text_gives_the_credit_of_its_tokens(load, monkeypatch):
  rewards, shipped = [], credit.clause_figures

  def figures_of(reward, *arguments):
    rewards.append(reward)
    return shipped(reward, *arguments)

  monkeypatch.setattr(credit, 'clause_figures', figures_of)
  found = {}
  for reads in ('tokens', 'text'):
    stage, loaded, _ = load(**{'reward_model.reads': reads})
    results = credit.run(stage, loaded)
    assert results['clauses'] == 10
    found[reads] = dict(zip(results['methods'], rewards, strict=True))
    rewards.clear()
  assert set(found['tokens']) - set(found['text']) == {SHAPLEY, *BY_TOKENS}
  for name, reward in found['text'].items():
    assert reward.any()
    np.testing.assert_allclose(reward, found['tokens'][name], atol=1e-5, err_msg=name)


def test_methods_that_read_tokens_are_left_out(load):
  for values, left_out in (
    ({'reward_model.reads': 'tokens'}, set()),
    ({'reward_model.reads': 'text'}, {SHAPLEY, *BY_TOKENS}),
    # Parts of one score, and a process model scores steps.
    ({'reward_model.step_tag': TAG}, {SHAPLEY, *BY_TOKENS, 'red: segments', 'red: tokens'}),
  ):
    stage, loaded, lines = load(**values)
    assert set(make_methods(stage, loaded)) == set(METHODS) - left_out
    assert {
      line.partition(' is left out: ')[0] for line in lines if ' left out' in line
    } == left_out


@pytest.mark.campaign
def test_tags_stand_where_a_method_cuts(load):
  stage, loaded, _ = load(**{'reward_model.step_tag': TAG})
  collector, network = loaded.collector, loaded.models.text_model.scorer.network
  params = load_models(
    loaded.models, tuple(loaded.models.frozen), Weights(stage.settings.runtime, stage.mesh)
  )
  prompts = [[tokenizers.user(text)] for text in PROMPTS]
  answers, own = collector.sample(), loaded.tokenizer
  outputs = make_scorer(params, answers, collector.recipe, collector.texts['reward'], prompts)

  methods, cuts = make_methods(stage, loaded), []
  for name in ('as configured', 'cut: 4 tokens', 'cut: sentences', 'cut: none'):
    recipe = methods[name].recipe
    scored = outputs(recipe)
    segments = segment_responses(
      answers.arrays, scored, scored.score, recipe.segmenter, recipe.compat
    )
    cuts.append(np.asarray(segments.end))
    for row, prompt in enumerate(prompts):
      mask = answers.response_mask[row]
      ids, ends = answers.response_ids[row][mask].tolist(), np.flatnonzero(cuts[-1][row])
      expected = step_scores(params['reward'], network, (own, own), prompt, ids, ends, TAG)
      np.testing.assert_allclose(scored.score[row, ends], expected, atol=1e-5)
  assert len({end.tobytes() for end in cuts}) == 4
