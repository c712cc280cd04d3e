"""reward_shaping.std_floor_ratio=0 is no floor wherever segments are normalised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from segjax.config.ppo_settings import resolve_std_floor_ratio
from segjax.config.settings import Network, RewardShaping, Segmentation
from segjax.data import demo_rows
from segjax.data.batches import eval_batches
from segjax.data.span_annotations import TokenizedSpans
from segjax.data.tokenizer import load_tokenizer
from segjax.evaluation import annotate, span_auc
from segjax.model.llama import make_config
from segjax.run.scorers import load_annotator
from segjax.train import reward_scoring
from segjax.train.segmenter import Segmenter
from segjax.types import Normalizer

# Std(p) = ln p + 0.1 is negative below p = 0.905.
NORMALIZER = Normalizer(w_mean=0.0, w_std=1.0, b_mean=0.0, b_std=0.1)
NETWORK = make_config(Network(vocab_size=64))
TOKENS = Segmenter(Segmentation('token'))
NUM_TOKENS = 4


@pytest.fixture(autouse=True)
def networks_of_ones(monkeypatch):
  """Every entropy and score is 1."""
  ones = lambda params, ids, *_, **__: jnp.ones(ids.shape)  # noqa: E731
  monkeypatch.setattr(annotate, 'scores', ones)
  monkeypatch.setattr(annotate, 'token_logprobs', lambda *args: (ones(*args), ones(*args)))
  monkeypatch.setattr(reward_scoring, 'scores', ones)


@pytest.fixture(params=[0.0, 0.5], ids=['no floor', 'floor'])
def ratio(request):
  return request.param


@pytest.fixture
def floor(ratio):
  return resolve_std_floor_ratio(RewardShaping(std_floor_ratio=ratio))


def expected(ratio, num_tokens):
  """Returns z = 1 / Std(p) at p = k / num_tokens."""
  std = np.log(np.arange(1, num_tokens + 1) / num_tokens) + 0.1
  return 1 / (np.maximum(std, ratio * 0.1) if ratio else std)


def test_annotate(one_device, ratio, floor, tmp_path):
  demo_rows.write_tokenizer(tmp_path / 'model')
  tokenizer = load_tokenizer(str(tmp_path / 'model'), annotate.PLAIN_TEMPLATE)
  params = {'reference': None, 'reward': None}
  annotator = annotate.Annotator(
    tokenizer, NETWORK, NETWORK, params, TOKENS, NORMALIZER, floor, one_device
  )
  (response,) = annotate.annotate(annotator, [([], 'dull dull')], 8)
  scores = [segment.normalized_score for segment in response.segments]
  np.testing.assert_allclose(scores, expected(ratio, len(scores)), rtol=1e-4)


def test_span_auc(ratio, floor):
  response = TokenizedSpans(list(range(NUM_TOKENS + 1)), 1, False, np.zeros(0, int), ())
  score = functools.partial(
    reward_scoring.segment_rewards,
    None,
    None,
    normalizer=NORMALIZER,
    scorer=reward_scoring.SegmentScorer(NETWORK, NETWORK, TOKENS),
    std_floor_ratio=floor,
  )
  ((reward, _),) = span_auc.segment_rewards_by_token(
    [response], score, NETWORK.max_position_embeddings, eval_batches(1, 8), jnp.asarray
  )
  np.testing.assert_allclose(reward, expected(ratio, NUM_TOKENS), rtol=1e-4)


def test_loaded_annotators_follow_the_settings(language, small, one_device, ratio, floor):
  settings = small('sft', **{'reward_shaping.std_floor_ratio': ratio})
  with jax.set_mesh(one_device):
    annotator = load_annotator(language / 'model', None, settings, one_device, print)
  assert annotator.std_floor_ratio == floor
