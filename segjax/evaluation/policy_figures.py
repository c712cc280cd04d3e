"""Figures of responses that a model has sampled, and win rates over those of another model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from segjax.data.tokenizer import ChatTokenizer
from segjax.evaluation import repetition
from segjax.evaluation.intervals import clustered_interval
from segjax.evaluation.win_rates import length_controlled, outcomes, win_rate
from segjax.rl.segmentation import content_mask
from segjax.types import Experience


class EvaluatedResponses(NamedTuple):
  """The responses of one model, N of them.

  Attributes:
    experience: the arrays of `train.collect`, on the host.
    score: aggregated score of each response, [N]; None without a reward model.
    prompt: the index of each response's prompt, [N].
    prompts: the last message of each response's prompt.
    texts: the responses.
    gold: gold reward of each response, [N]; None without a gold reward.
  """

  experience: Experience
  score: np.ndarray | None
  prompt: np.ndarray
  prompts: list[str]
  texts: list[str]
  gold: np.ndarray | None


def response_figures(responses: EvaluatedResponses) -> dict[str, Any]:
  """Returns the figures of one model, means over its responses.

  kl_nats is Σ_t (log π - log π_ref); length counts the stop token, the repetition metrics do not;
  part/NAME is what a source of config.rewards adds to the reward, where there are any.
  """
  e = responses.experience
  mask = e.rollout.response_mask
  difference = np.where(mask, e.rollout.old_logprob - e.ref_logprob, 0)
  figures = {
    'kl_nats': float(difference.sum(1).mean()),
    'length': float(mask.sum(1).mean()),
    'segments': float(e.segments.num_segments.mean()),
    'eos_rate': float(e.rollout.finished.mean()),
    **repetition.repetition_metrics(_content(e)),
  }
  for name, x in (e.parts or {}).items():
    figures[f'part/{name}'] = clustered_interval(x.sum(1), responses.prompt)
  if responses.score is not None:
    figures['score'] = clustered_interval(responses.score, responses.prompt)
  if responses.gold is not None:
    figures['gold'] = clustered_interval(responses.gold, responses.prompt)
  return figures


def by_response(sampled: dict[str, EvaluatedResponses]) -> dict[str, Any]:
  """Returns length, score and gold reward of every response by model, and its prompt's index.

  Scores and gold rewards only where there are any.
  """
  columns: dict[str, Any] = {}
  for name, responses in sampled.items():
    columns['prompt'] = responses.prompt.tolist()
    values = {
      'length': responses.experience.rollout.response_mask.sum(1),
      'score': responses.score,
      'gold': responses.gold,
    }
    columns[name] = {k: np.round(x, 6).tolist() for k, x in values.items() if x is not None}
  return columns


def _content(e: Experience) -> list[np.ndarray]:
  """Returns the tokens of each response, without the stop token."""
  rows = zip(e.rollout.response_ids, e.rollout.response_mask, e.rollout.finished, strict=True)
  return [ids[mask][: int(mask.sum()) - int(finished)] for ids, mask, finished in rows]


def pairwise_win_rates(
  after: EvaluatedResponses, before: EvaluatedResponses, seed: int
) -> dict[str, Any]:
  """Returns win rates of `after` over `before`, by score and by gold reward.

  The i-th response to a prompt is compared with the i-th of the other model, which had the same
  random numbers: equal models tie. `win_rate_score` compares scores of the reward model,
  `win_rate_gold` gold rewards; `lc_win_rate_*` are length-controlled, see `evaluation.win_rates`.
  """
  rates = {}
  after_length, before_length = (
    np.array([len(text) for text in responses.texts]) for responses in (after, before)
  )
  for judge in ('score', 'gold'):
    values = getattr(after, judge)
    if values is not None:
      outcome = outcomes(values, getattr(before, judge))
      rates[f'win_rate_{judge}'] = win_rate(outcome, after.prompt, seed)
      rates[f'lc_win_rate_{judge}'] = length_controlled(
        outcome, after_length, before_length, after.prompt, seed
      )
  return rates


def gains(after: EvaluatedResponses, before: EvaluatedResponses) -> dict[str, Any]:
  """Returns `score_gain` and `gold_gain`: mean difference of the i-th responses to a prompt.

  Paired, so that its interval is narrower than those of the two means.
  """
  return {
    f'{judge}_gain': clustered_interval(
      getattr(after, judge) - getattr(before, judge), after.prompt
    )
    for judge in ('score', 'gold')
    if getattr(after, judge) is not None
  }


def boundary_f1(
  experience: Experience, tokenizer: ChatTokenizer, is_boundary: Callable[[str], bool]
) -> float:
  """Returns F1 of segment ends against true ends, over content tokens.

  The last content token of a response is excluded: it ends a segment by definition.
  """
  rollout = experience.rollout
  content = np.asarray(
    jax.vmap(content_mask)(jnp.asarray(rollout.response_mask), jnp.asarray(rollout.finished))
  )
  position = np.arange(content.shape[1])
  inner = content & (position < (content * position).max(1, keepdims=True))
  # One call per distinct token: the user's function may be slow.
  by_id = {}
  for token in np.unique(rollout.response_ids):
    by_id[token] = is_boundary(tokenizer.decode([token]))
  true = np.vectorize(by_id.get)(rollout.response_ids).astype(bool) & inner
  predicted = experience.segments.end & inner
  return float(2 * (true & predicted).sum() / max(true.sum() + predicted.sum(), 1))
