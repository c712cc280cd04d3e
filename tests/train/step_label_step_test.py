"""Labels of steps: rows, loss, and the training step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import models, tokenizers, training

from segjax.config.settings import PairTraining
from segjax.data.batches import select, split_holdout
from segjax.data.limits import Limits
from segjax.data.sources import Rows
from segjax.data.step_labels import as_labelled_response, has_step_labels
from segjax.data.tokenize import tokenize_steps
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError
from segjax.model import sharding
from segjax.model.heads import scores
from segjax.rl import oracle_step_labels
from segjax.rl.losses import step_label_loss
from segjax.train.step_label_step import label_sums, step_label_step

TEXT = 'the fox é.\n日本😀 one\ntwo'
STEPS = [[11, 1], {'end': 14, 'label': 0.25}, [18, False], [22, 0]]


def row(steps=STEPS, text=TEXT, prompt='one'):
  return {'prompt': prompt, 'response': text, 'steps': steps}


def stepwise(completions, labels):
  return {'prompt': 'one', 'completions': completions, 'labels': labels}


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return load_tokenizer(tokenizers.write_tokenizer(tmp_path_factory.mktemp('tokenizer')))


def test_a_label_lies_at_the_token_that_completes_its_step(tokenizer):
  rows = [row(), row([[4, 1]], 'the fox', 'two'), row([])]
  steps = tokenize_steps(Rows(rows, 'r.jsonl'), tokenizer, Limits(100, 50))
  assert len(steps) == 2 and steps.counts['dropped_empty'] == 1 and steps.row.tolist() == [0, 1]
  for index, listed in ((0, [(11, 1.0), (14, 0.25), (18, 0.0), (22, 0.0)]), (1, [(4, 1.0)])):
    prompt = tokenizer.prompt_ids([tokenizers.user(rows[index]['prompt'])])
    ids, labels = steps.tokens[index].tolist(), steps.labels[index]
    expected = np.full(len(ids), np.nan)
    text = rows[index]['response']
    assert ids == [*prompt, *tokenizer.response_ids([tokenizers.user('one')], text)]
    for end, label in listed:
      count = len(prompt)
      while not tokenizer.decode(ids[len(prompt) : count + 1]).startswith(text[:end]):
        count += 1
      expected[count] = label
    np.testing.assert_array_equal(labels, expected.astype(np.float32))
  batch = steps.gather(np.array([1, 0]))
  assert batch.ids.shape == batch.label.shape == (2, steps.length)
  assert np.nansum(batch.label, axis=1).tolist() == [1.0, 1.25]


def test_an_answer_of_several_turns(tokenizer):
  """Ends count characters of the last answer, whatever comes before it."""
  earlier = [tokenizers.user('two'), {'role': 'assistant', 'content': 'the fox'}]
  prompt = [{'role': 'system', 'content': 'one'}, *earlier, tokenizers.user('one')]
  answer = {'role': 'assistant', 'content': TEXT}
  forms = (
    {'messages': [*prompt, answer]},
    {'prompt': prompt, 'completion': [answer]},
    {'messages': prompt, 'response': TEXT},
  )
  rows = [form | {'steps': STEPS} for form in forms]
  steps = tokenize_steps(Rows(rows, 'r'), tokenizer, Limits(200, 150))
  plain = tokenize_steps(Rows([row()], 'r'), tokenizer, Limits(200, 150))
  start = len(tokenizer.prompt_ids(prompt))
  own = len(tokenizer.prompt_ids([tokenizers.user('one')]))
  for ids, labels in ((steps.tokens[i], steps.labels[i]) for i in range(3)):
    assert ids[:start].tolist() == list(tokenizer.prompt_ids(prompt))
    assert np.isnan(labels[:start]).all()
    np.testing.assert_array_equal(labels[start:], plain.labels[0][own:])
  assert len(set(steps.group.tolist())) == 1


def test_stepwise_supervision_is_labels_at_the_ends_of_its_texts(tokenizer):
  texts = ['the fox é.', 'one two', '日本😀']
  stepwise = {'prompt': 'one', 'completions': texts, 'labels': [True, 0, 0.5]}
  found = as_labelled_response(stepwise)
  assert found.response == 'the fox é.\none two\n日本😀'
  assert [(found.response[:end].split('\n')[-1], label) for end, label in found.steps] == [
    ('the fox é.', 1.0),
    ('one two', 0.0),
    ('日本😀', 0.5),
  ]
  ours = row([list(step) for step in found.steps], found.response)
  both = tokenize_steps(Rows([stepwise, ours], 'r'), tokenizer, Limits(100, 50))
  np.testing.assert_array_equal(both.tokens[0], both.tokens[1])
  np.testing.assert_array_equal(both.labels[0], both.labels[1])


def test_a_truncated_response_keeps_the_labels_of_its_beginning(tokenizer):
  rows = Rows([row()], 'r.jsonl')
  whole = tokenize_steps(rows, tokenizer, Limits(200, 100))
  length = len(whole.tokens[0]) - 4
  cut = tokenize_steps(
    rows, tokenizer, Limits(length, len(tokenizer.prompt_ids([tokenizers.user('one')])))
  )
  assert cut.counts['truncated'] == 1
  np.testing.assert_array_equal(cut.labels[0], whole.labels[0][:length])
  with pytest.raises(UserError, match=r'exceed data\.max_length'):
    tokenize_steps(rows, tokenizer, Limits(20, 10, 'error'))


@pytest.mark.parametrize(
  'values, message',
  [
    (row([[99, 1]]), r'r, row 3: the step \[99, 1\] must be .* with an end from 1 to 22'),
    (row([[1, 2]]), 'a label from 0 to 1'),
    (row([[1, float('nan')]]), 'must be'),
    (row([[True, 1]]), 'must be'),
    (row([[2]]), 'must be'),
    (row([{'end': 2}]), 'must be'),
    (row([[5, 1], [5, 0]]), 'do not increase'),
    (row('5'), r"`steps` is '5'; write a list of \[end, label\]"),
    ({'text': 'no prompt', 'steps': []}, 'there is none'),
    (stepwise(['a', 'b'], [1]), '2 `completions` but 1 `labels`; write a label for each'),
    (stepwise(['a'], 'yes'), "1 `completions` but 'yes' `labels`"),
    (stepwise(['a', ' '], [1, 1]), r"texts, none of them blank, not \['a', ' '\]"),
    (stepwise('a', [1]), "none of them blank, not 'a'"),
    (stepwise(['a', 'b'], [1, -1]), '-1 in `labels` must be 0, 1, true, false, or between'),
    (stepwise(['a'], ['+']), r"'\+' in `labels` must be"),
    ({'completions': ['a'], 'labels': [1]}, 'no prompt in'),
  ],
)  # fmt: skip
def test_bad_steps_are_one_line(values, message):
  with pytest.raises(UserError, match=message) as error:
    as_labelled_response(values, 'r, row 3')
  assert '\n' not in str(error.value)


def test_rows_with_steps_are_told_by_the_first():
  assert has_step_labels(Rows([row(), {'prompt': 'x'}], 'r'))
  assert not has_step_labels(Rows([{'prompt': 'x', 'chosen': 'a', 'rejected': 'b'}, row()], 'r'))


@pytest.mark.parametrize('count', [None, 7.0])
def test_the_loss_is_that_of_a_slow_loop(count):
  label = training.labelled_steps().label
  score = np.random.default_rng(4).normal(0, 3, label.shape).astype(np.float32)
  mask = ~np.isnan(label)
  listed = [[None if np.isnan(y) else float(y) for y in row] for row in label]
  expected = oracle_step_labels.step_label_loss(score.tolist(), listed, count or mask.sum())
  divisor = None if count is None else jnp.float32(count)
  found = step_label_loss(*map(jnp.asarray, (score, label, mask)), count=divisor)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  grad = jax.grad(lambda s: step_label_loss(s, jnp.asarray(label), jnp.asarray(mask)))
  slope = np.asarray(grad(jnp.asarray(score)))
  sigmoid = 1 / (1 + np.exp(-score))
  np.testing.assert_allclose(slope, np.where(mask, sigmoid - label, 0) / mask.sum(), atol=1e-6)


def test_sums_over_the_first_rows():
  mesh = models.mesh(1)
  params = training.network('reward', mesh)
  batch = training.labelled_steps(3)
  placed = sharding.place_batch(batch, mesh)
  score = np.asarray(jax.jit(functools.partial(scores, config=models.CONFIG))(params, placed.ids))
  mask = ~np.isnan(batch.label)
  sums = label_sums(params, placed, np.int32(5), config=models.CONFIG)
  first = mask & (np.arange(models.BATCH) < 5)[:, None]
  right = ((score > 0) == (batch.label > 0.5))[first].sum()
  assert float(sums['steps']) == first.sum() and float(sums['accuracy']) == right
  expected = np.sum(np.logaddexp(0, score[first]) - batch.label[first] * score[first])
  np.testing.assert_allclose(sums['loss'], expected, rtol=1e-4)


@pytest.mark.campaign
def test_training_learns_the_labels():
  mesh, settings = (
    models.mesh(1),
    PairTraining(optimizer=dataclasses.replace(training.OPTIMIZER, learning_rate=1e-2)),
  )
  batch = sharding.place_batch(training.labelled_steps(5), mesh)
  state, losses = training.state('reward'), []
  options = {'config': models.CONFIG, 'settings': settings, 'total_steps': 30}
  for _ in range(30):
    state, metrics = step_label_step(state, batch, **options)
    losses.append(float(metrics['loss']))
  assert losses[-1] < 0.5 * losses[0] and float(metrics['accuracy']) > 0.9
  pieces = dataclasses.replace(settings, micro_batch_size=2)
  (_, whole), (_, split) = (
    step_label_step(training.state('reward'), batch, **options | {'settings': s})
    for s in (settings, pieces)
  )
  for name in ('loss', 'accuracy', 'grad_norm'):
    np.testing.assert_allclose(split[name], whole[name], rtol=1e-5, err_msg=name)


def test_held_out_rows_keep_their_prompts_together(tokenizer):
  rows = [row(prompt=f'prompt {i // 2}') for i in range(10)]
  steps = tokenize_steps(Rows(rows, 'r'), tokenizer, Limits(100, 50))
  train, held_out = split_holdout(steps, 0.3, 0)
  assert not {*train.group.tolist()} & {*held_out.group.tolist()} and len(held_out) == 4
  assert len(select(steps, np.arange(3)).labels.lengths) == 3
