"""The notebook API agrees with the networks and with the tools."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import runs

import segjax
from segjax import rl
from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.model.heads import scores, token_logprobs
from segjax.types import Normalizer

QUESTION = [{'role': 'user', 'content': 'what is the otter like'}]
CONVERSATION = [*QUESTION, {'role': 'assistant', 'content': 'experts call its hearing dull.'}]
NORMALIZER = Normalizer(w_mean=0.1, b_mean=-0.2, w_std=0.3, b_std=0.8)
# Nats. An untrained network is uncertain everywhere, so responses have several segments.
SEGMENTATION = Segmentation(entropy_threshold=4.5)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return runs.policy(tmp_path_factory.mktemp('language'))


@pytest.fixture(scope='module')
def policy(model):
  return segjax.load_policy(str(model), mesh=runs.one_device())


@pytest.fixture(scope='module')
def judge(model, tmp_path_factory):
  path = runs.reward_model(model, tmp_path_factory.mktemp('r') / 'm', NORMALIZER, SEGMENTATION)
  mesh = runs.one_device()
  return segjax.load_reward_model(str(path), reference=str(model), mesh=mesh)


def test_import_is_light_and_every_listed_name_exists():
  script = (
    'import sys, segjax\n'
    'print(*[m for m in ("jax", "numpy", "absl", "ml_collections") if m in sys.modules])\n'
    'segjax.rl; assert "transformers" not in sys.modules and "flax" not in sys.modules\n'
    'print(*[n for n in segjax.__all__ if n not in dir(segjax) or not getattr(segjax, n)])\n'
    'assert segjax.__version__'
  )
  process = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )
  assert process.stdout.split() == []
  with pytest.raises(AttributeError, match='load_polcy'):
    segjax.load_polcy  # noqa: B018


def test_public_functions_of_the_method():
  assert sorted(rl.__all__) == rl.__all__
  for name in rl.__all__:
    value = getattr(rl, name)
    assert isinstance(value, dict) or value.__module__.startswith('segjax.rl.'), name
    assert isinstance(value, dict) or value.__doc__, name
  # A name that hides a module of the package would break `from segjax.rl import module`.
  modules = {name.rpartition('.')[2] for name in sys.modules if name.startswith('segjax.rl.')}
  assert not modules & set(rl.__all__)


@pytest.mark.campaign
def test_sampling_depends_on_the_seed_and_the_position_alone(policy):
  prompts = [QUESTION, 'its hearing']
  answers = policy.sample(prompts, samples=2, seed=3, max_new_tokens=8)
  assert len(answers) == 4
  assert policy.sample(prompts, samples=2, seed=3, max_new_tokens=8) == answers
  assert policy.sample([QUESTION, 'its'], samples=2, seed=3, max_new_tokens=8)[:2] == answers[:2]
  assert policy.sample(prompts, samples=2, seed=4, max_new_tokens=8) != answers
  for answer in answers:
    assert 1 <= len(answer.tokens) == len(answer.logprob) <= 8
    assert answer.finished or len(answer.tokens) == 8
    assert all(x < 0 for x in answer.logprob)


@pytest.mark.campaign
def test_responses_end_with_the_positions_by_default(policy):
  (answer,) = policy.sample([QUESTION], seed=3)  # 128 new tokens would leave none for the prompt
  prompt = policy.annotator.tokenizer.prompt_ids(QUESTION)
  assert len(answer.tokens) <= 128 - len(prompt)


def test_logprobs_are_those_of_the_network(policy):
  answer, plain, empty = policy.logprobs([CONVERSATION, 'experts call its hearing dull.', ''])
  tokenizer = policy.annotator.tokenizer
  prompt = tokenizer.prompt_ids(QUESTION)
  ids = tokenizer.response_ids(QUESTION, 'experts call its hearing dull.')
  expected = token_logprobs(
    policy.annotator.params['reference'],
    jnp.asarray([prompt + ids]),
    policy.annotator.reference,
  )
  for name, values in zip(('logprob', 'entropy'), expected, strict=True):
    values = np.asarray(values)[0, len(prompt) :]
    np.testing.assert_allclose(getattr(answer, name), values, atol=2e-4)  # padding's rounding
  assert len(answer.tokens) == len(ids)
  assert ''.join(plain.tokens).replace(' ', '') == 'expertscallitshearingdull.'
  assert (empty.tokens, empty.logprob, empty.entropy) == ([], [], [])


def test_segments_follow_the_threshold(policy):
  few, many = (policy.segment([CONVERSATION], entropy_threshold=t)[0] for t in (9.0, 0.0))
  assert len(few.segments) == 1
  assert len(many.segments) == sum(len(s.tokens) for s in few.segments)
  assert [s.entropy for s in many.segments] == [[x] for s in few.segments for x in s.entropy]
  assert (few.prompt, few.response) == (QUESTION, 'experts call its hearing dull.')
  assert policy.segment([]) == []


def test_scores_are_raw_and_normalised(judge):
  (response,) = judge.score([CONVERSATION])
  annotator = judge.annotator
  prompt = annotator.tokenizer.prompt_ids(QUESTION)
  ids = prompt + annotator.tokenizer.response_ids(QUESTION, 'experts call its hearing dull.')
  raw = np.asarray(scores(annotator.params['reward'], jnp.asarray([ids]), annotator.reward))[0]
  end, count = len(prompt), len(response.segments)
  assert count > 1
  for k, segment in enumerate(response.segments):
    end += len(segment.tokens)
    np.testing.assert_allclose(segment.score, raw[end - 1], atol=2e-4)
    log_p = np.log((k + 1) / count)  # Mean(p) = w ln p + b, and Std(p) likewise
    mean, std = 0.1 * log_p - 0.2, max(0.3 * log_p + 0.8, 0.01 * 0.8)
    z = (segment.score - mean) / std
    np.testing.assert_allclose(segment.normalized_score, z, rtol=1e-3, atol=1e-3)


def test_without_a_normaliser_there_are_scores_and_no_rewards(model, tmp_path):
  path = runs.reward_model(model, tmp_path / 'r', None, SEGMENTATION)
  judge = segjax.load_reward_model(
    str(path),
    reference=str(model),
    segmentation=Segmentation(granularity='bandit'),
    mesh=runs.one_device(),
  )
  (segment,) = judge.score(['experts call its hearing dull.'])[0].segments
  assert segment.score is not None and segment.normalized_score is None


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda p: p.sample('its hearing'), 'expected a list of texts, got a single text'),
    (lambda p: p.segment(CONVERSATION), 'expected a list of texts, got a single text'),
    (lambda p: p.sample(['x'], temprature=1), '^temprature is not an option; did you mean temper'),
    (lambda p: p.sample(['x'], top_p=0.0), '^top_p=0.0 must be above 0'),
    (lambda p: p.sample(['x'], max_new_tokens=0), '^max_new_tokens=0 must be at least 1'),
    (
      lambda p: p.sample(['x'], samples=3, max_concurrent=2),
      '^samples_per_prompt=3 is more than max_',
    ),
    (lambda p: p.sample(['x'], max_concurrent='4'), "^max_concurrent='4' must be of type int"),
    (lambda p: p.sample(['x'], samples=0), 'samples=0 must be at least 1'),
    (lambda p: p.sample(['its ' * 200]), r'prompt \d has \d+ tokens; with max_new_tokens=1 '),
    (
      lambda p: p.segment(['x'], granularity='word'),
      "^granularity='word' is not one of segment, token, bandit",
    ),
    (lambda p: p.sample(['x', '<|begin_of_text|>x']), '^prompt 2: the text begins with'),
    (lambda p: p.logprobs(['x', '<|begin_of_text|>x']), '^text 2: the text begins with'),
    (
      lambda p: p.sample([[{'role': 'user', 'content': '<|start_header_id|>user x'}]]),
      '^prompt 1: the text of the user begins with .* written it already',
    ),
    (
      lambda p: p.logprobs([[*QUESTION, {'role': 'assistant', 'content': 'x<|eot_id|>'}]]),
      r"^text 1: .* already ends in '<\|eot_id\|>'",
    ),
    (lambda p: p.segment([QUESTION]), 'text 1: the last message is not the assistant’s'),
    (lambda p: p.logprobs(['x', [{'role': 'user'}]]), 'text 2: message 1 of `messages` must be'),
    (
      lambda p: p.logprobs(['x', 'its ' * 200]),
      r'text 2 has \d+ tokens, but the networks have 128 position',
    ),
  ],
)
def test_wrong_calls_name_the_argument_and_the_fix(policy, call, message):
  with pytest.raises(UserError, match=message) as caught:
    call(policy)
  assert 'config.' not in str(caught.value)


def test_wrong_models_are_refused(model):
  mesh = runs.one_device()
  with pytest.raises(ValueError, match=r"^path='/nowhere': no directory /nowhere"):
    segjax.load_policy('/nowhere', mesh=mesh)
  with pytest.raises(UserError, match=r"^reference='/nowhere': no directory /nowhere"):
    segjax.load_reward_model(str(model), reference='/nowhere', mesh=mesh)
  with pytest.raises(UserError, match=r"^segmentation.granularity='word' is not one of"):
    wrong = Segmentation(granularity='word')
    segjax.load_reward_model(str(model), reference=str(model), segmentation=wrong, mesh=mesh)
  with pytest.raises(ValueError, match=r"^dtype='f32' is not one of float32, bfloat16"):
    segjax.load_policy(str(model), dtype='f32', mesh=mesh)
  with pytest.raises(ValueError, match='has no scalar head, so it is not a reward model'):
    segjax.load_reward_model(str(model), reference=str(model), mesh=mesh)


@pytest.mark.devices
def test_eight_devices_agree_with_one(policy, model):
  wide = segjax.load_policy(str(model))
  assert wide.annotator.mesh.size == len(jax.devices()) == 8
  texts = [CONVERSATION, 'experts call its hearing dull.', 'a']
  for single, sharded in zip(policy.logprobs(texts), wide.logprobs(texts), strict=True):
    assert single.tokens == sharded.tokens
    np.testing.assert_allclose(single.logprob, sharded.logprob, atol=2e-4)


def test_a_tokenizer_without_template_accepts_strings_only(shared_files):
  path = shared_files / 'models' / 'stories260k-hf'
  plain = segjax.load_policy(str(path), mesh=runs.one_device())
  (story,) = plain.logprobs(['Once upon a time, there was'])
  assert sum(story.logprob) > -3  # a network of such stories expects these words
  with pytest.raises(ValueError, match='text 1 is a conversation, but the tokenizer has no chat t'):
    plain.sample([QUESTION])


def test_api_and_tool_give_the_same_segments(policy):
  """Segments are those of evaluation.annotate, which tools/show_segments.py prints."""
  text = (QUESTION, 'experts call its hearing dull.')
  direct = annotate.annotate(policy.annotator, [text], 1)
  assert policy.segment([CONVERSATION]) == list(direct)
