"""Labels of steps in the job reward: which settings they go with, and their held-out figures."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from segjax import processes
from segjax.config.settings import Columns, RewardTraining
from segjax.data.batches import Steps
from segjax.data.pairs_and_steps import PairsAndSteps
from segjax.data.row_forms import STEPS, STEPWISE, describe_keys
from segjax.data.rows import NoRowsLeftError, Rows
from segjax.model.llama import LlamaConfig
from segjax.run.stage import Stage
from segjax.train.step_label_step import label_sums

_OF_PAIRS = (
  'margin',
  'rating_margin_coef',
  'label_smoothing',
  'entropy_cache_dir',
  'threshold_search',
)


class MissingFormError(NoRowsLeftError):
  """No row has the form that a setting is for."""


def check_settings(settings: RewardTraining, data: PairsAndSteps, name: str) -> None:
  """Raises MissingFormError if a setting is for pairs or for labels that the data do not have.

  Args:
    settings: config.reward.
    data: the rows.
    name: of their source, for the error.
  """
  defaults = RewardTraining()
  for key in _OF_PAIRS if data.pairs is None else ():
    if getattr(settings, key) != getattr(defaults, key):
      raise MissingFormError(
        f'config.reward.{key} is for pairs, and {name} has labels of `steps` alone; leave it out, '
        'or train on pairs too.'
      )
  if len(data.parts) == 1 and settings.steps_weight != defaults.steps_weight:
    has = 'labels of `steps`' if data.pairs is None else 'pairs'
    raise MissingFormError(
      f'config.reward.steps_weight={settings.steps_weight} weighs labels of `steps` beside pairs, '
      f'and {name} has {has} alone; leave it out, or add rows of the other form.'
    )


def check_columns(columns: Columns, data: PairsAndSteps, rows: Rows) -> None:
  """Raises MissingFormError if columns of labelled steps are named, and no row has them."""
  if data.steps is not None:
    return
  row = rows[int(data.pairs.row[0])]
  for key in (STEPS, *STEPWISE):
    if name := getattr(columns, key):
      raise MissingFormError(
        f'config.data.columns.{key}={name!r} is for labelled steps, and {rows.name} has pairs '
        f'alone; correct it, or leave it out. Of the first pair {describe_keys(row)}.'
      )


def evaluate(
  stage: Stage,
  params: Any,
  steps: Steps,
  config: LlamaConfig,
  batches: Iterable[tuple[np.ndarray, int]],
) -> dict[str, float]:
  """Returns loss and accuracy on labelled responses, means over their steps.

  Args:
    stage: the stage.
    params: parameters of the reward model.
    steps: the responses.
    config: the reward model.
    batches: `data.batches.eval_batches` over them.
  """
  totals = {'loss': 0.0, 'accuracy': 0.0, 'steps': 0.0}
  for rows, num_real in batches:
    batch = stage.gather(steps, rows)
    sums = processes.to_host(label_sums(params, batch, np.int32(num_real), config=config))
    totals = {name: total + float(sums[name]) for name, total in totals.items()}
  return {name: totals[name] / max(totals['steps'], 1.0) for name in ('loss', 'accuracy')}
