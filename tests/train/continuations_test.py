"""Credit from continuations: equal to the true credit of the writer, shared prefixes asked once."""

import dataclasses

import jax
import numpy as np
from fixtures import models, training

from segjax.data import study_languages
from segjax.data.batches import eval_batches
from segjax.data.demo_language import split_clauses
from segjax.train.continuations import Prefix, continuation_credit, prefix_values
from segjax.types import PromptBatch

PROMPTS = (
  'tell coat skill luck of the otter of the coast',
  'tell food weather weight of the heron of the valley',
)


def test_credit_is_the_difference_of_values_and_shared_prefixes_are_asked_once():
  ids = np.array([[5, 6, 7, 8, 0], [5, 6, 9, 0, 0], [5, 6, 7, 0, 0], [4, 0, 0, 0, 0]])
  ids[2] = [5, 6, 7, 8, 9]  # up to the limit
  ends = np.zeros((4, 5), bool)
  ends[0, [1, 3]] = ends[1, [1, 2]] = ends[2, [2, 4]] = True
  asked = []

  def value(prefixes):
    asked.extend(prefixes)
    return [prefix.prompt + len(prefix.ids) for prefix in prefixes]

  credit = continuation_credit(np.array([0, 0, 1, 1]), ids, ends, [10.0, 20.0, 30.0, 40.0], value)
  assert credit == [[2, 2], [2, 1], [3, 26], []]  # 30 for all of the third
  first = [Prefix(0, ids) for ids in ((), (5, 6), (5, 6, 7, 8), (5, 6, 9))]
  assert asked == [*first, Prefix(1, ()), Prefix(1, (5, 6, 7))]


def test_many_continuations_of_the_writer_give_its_true_credit():
  language, rng = study_languages.LANGUAGES['requests'], np.random.default_rng(0)
  rows = np.arange(4) % 2
  responses = [split_clauses(language.respond(PROMPTS[row], rng)) for row in rows]
  words = sorted({clause for response in responses for clause in response})
  ids = np.array([[words.index(c) for c in r] + [0] * (4 - len(r)) for r in responses])
  ends = np.array([[place < len(r) for place in range(4)] for r in responses])

  def value(prefixes):
    golds = [
      [
        study_languages.gold(prompt, language.respond(prompt, rng, [words[i] for i in prefix.ids]))
        for _ in range(250)
      ]
      for prefix in prefixes
      for prompt in [PROMPTS[prefix.prompt]]
    ]
    return np.mean(golds, 1)

  gold = [
    study_languages.gold(PROMPTS[r], ' '.join(c)) for r, c in zip(rows, responses, strict=True)
  ]
  credit = continuation_credit(rows, ids, ends, gold, value)
  for row, response, values in zip(rows, responses, credit, strict=True):
    expected = language.true_credit(PROMPTS[row], ' '.join(response))
    np.testing.assert_allclose(values, expected, atol=0.2)  # 4 standard errors


def test_greedy_continuations_of_a_greedy_response_are_its_rest():
  params = training.network('policy', models.mesh(1))
  greedy = dataclasses.replace(training.ROLLOUT, temperature=0.0)
  collected = training.sample(params, settings=greedy)
  responses = [
    ids[mask].tolist()
    for ids, mask in zip(collected.response_ids, collected.response_mask, strict=True)
  ]
  prefixes = [
    Prefix(row, tuple(ids[:size]))
    for row, ids in enumerate(responses)
    for size in range(0, len(ids), 3)
  ]
  seen = []

  def gold(rows, responses):
    seen.extend(zip(rows, responses, strict=True))
    return [float(sum(ids)) for ids in responses]

  values = prefix_values(
    params,
    lambda rows: PromptBatch(
      training.PROMPTS.prompt_ids[rows], training.PROMPTS.prompt_length[rows]
    ),
    prefixes,
    gold,
    key=jax.random.key(1),
    sampler=training.rollout_sampler(settings=greedy, samples_per_prompt=2),
    batches=eval_batches(len(prefixes), 4),
  )
  np.testing.assert_array_equal(values, [sum(responses[prefix.prompt]) for prefix in prefixes])
  assert len(seen) == 2 * len(prefixes)  # not of the padding
