"""reward_shaping.std_floor_ratio=0 is no floor wherever segments are normalised."""

import jax.numpy as jnp
import numpy as np
import pytest

from segjax.config.settings import Network, Segmentation
from segjax.data import demo_rows
from segjax.data.span_annotations import TokenizedSpans
from segjax.data.tokenizer import load_tokenizer
from segjax.evaluation import annotate, span_auc
from segjax.model.llama import make_config
from segjax.run.stage import Stage
from segjax.train import reward_step
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
  monkeypatch.setattr(reward_step, 'scores', ones)


@pytest.fixture(params=[0.0, 0.5], ids=['no floor', 'floor'])
def ratio(request):
  return request.param


@pytest.fixture
def stage(small, one_device, tmp_path, ratio):
  settings = small('sft', **{'reward_shaping.std_floor_ratio': ratio})
  return Stage('evaluate', settings, tmp_path, one_device)


def expected(ratio, num_tokens):
  """Returns z = 1 / Std(p) at p = k / num_tokens."""
  std = np.log(np.arange(1, num_tokens + 1) / num_tokens) + 0.1
  return 1 / (np.maximum(std, ratio * 0.1) if ratio else std)


def test_annotate(stage, ratio, tmp_path):
  demo_rows.write_tokenizer(tmp_path / 'model')
  tokenizer = load_tokenizer(str(tmp_path / 'model'), annotate.PLAIN)
  networks = {'policy': NETWORK, 'reward': NETWORK}
  annotator = annotate.Annotator(tokenizer, networks, dict.fromkeys(networks), TOKENS, NORMALIZER)
  (response,) = annotate.annotate(stage, annotator, [([], 'dull dull')], 8)
  scores = [segment.normalized_score for segment in response.segments]
  np.testing.assert_allclose(scores, expected(ratio, len(scores)), rtol=1e-4)


def test_span_auc(stage, ratio):
  response = TokenizedSpans(list(range(NUM_TOKENS + 1)), 1, False, np.zeros(0, int), ())
  scorer = reward_step.SegmentScorer(NETWORK, NETWORK, TOKENS)
  ((reward, _),) = span_auc.segment_rewards_by_token(
    stage, None, None, [response], scorer, NORMALIZER
  )
  np.testing.assert_allclose(reward, expected(ratio, NUM_TOKENS), rtol=1e-4)
