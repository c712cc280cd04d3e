"""The updates of a network on preference pairs, on labels of steps, or on both."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax.config.settings import PairTraining
from segjax.data.batches import Pairs, Steps, eval_batches
from segjax.data.pairs_and_steps import PairsAndSteps
from segjax.data.tokenizer import ChatTokenizer
from segjax.evaluation.pair_scores import score_pairs, scored_pair_metrics
from segjax.jobs import step_training
from segjax.model.llama import LlamaConfig
from segjax.report.timing import time_evaluation
from segjax.run import training_loop
from segjax.run.labelled_rows import labelled_at_once
from segjax.run.stage import Stage
from segjax.train import throughput
from segjax.train.mixed_step import MixedBatch, MixedPacking, mixed_step
from segjax.train.optimizer import TrainState
from segjax.train.preference_step import FrozenParams, preference_step
from segjax.train.reward_scoring import PairScorer
from segjax.train.step_label_step import step_label_step
from segjax.types import PackingPlan

Batches = Callable[[int], Iterable[tuple[np.ndarray, int]]]


class Network(NamedTuple):
  """The network that is trained.

  Attributes:
    source: directory of its first weights.
    config: the network.
    head: 'language' or 'scalar'.
    tokenizer: that it is trained with.
    group: its metrics are named `group/...`.
  """

  source: Path
  config: LlamaConfig
  head: str
  tokenizer: ChatTokenizer
  group: str


class _Batch(NamedTuple):
  """A batch on the devices, how it is packed, and tokens of its sequences."""

  arrays: Any
  packing: PackingPlan | None
  efficiency: dict[str, float]
  lengths: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trainer:
  """The steps of training.

  Attributes:
    frozen: parameters of the base, and of the reference where it is run.
    train_set: what is trained on.
    eval_subset: held-out rows for eval/*.
    num_steps: of the learning rate's schedule.
  """

  stage: Stage
  network: Network
  scorer: PairScorer
  frozen: FrozenParams
  train_set: PairsAndSteps
  eval_subset: PairsAndSteps
  num_steps: int

  def step(
    self, states: training_loop.TrainStates, step: int
  ) -> tuple[training_loop.TrainStates, dict[str, Any]]:
    """Updates the network on a batch."""
    stage, s = self.stage, stage_settings(self.stage)
    piece = labelled_at_once(s, stage.mesh)
    rows = self.train_set.batch_rows(s.batch_size, piece, stage.settings.seed, step)
    pairs = self._batch(self.train_set.pairs, rows[0])
    steps = self._batch(self.train_set.steps, rows[1])
    state, metrics = self._update(states[stage.name], pairs, steps)
    metrics = training_loop.prefix_metrics(self.network.group, metrics)
    metrics |= self._work(pairs, steps)
    if s.eval_every and (step + 1) % s.eval_every == 0:
      params = self.frozen.base | state.params
      metrics |= time_evaluation(lambda: self._evaluate(params), step=metrics)
    return {stage.name: state}, metrics

  def _batch(self, dataset: Pairs | Steps | None, rows: np.ndarray | None) -> _Batch | None:
    if dataset is None:
      return None
    sides = [dataset.tokens] if isinstance(dataset, Steps) else [dataset.chosen, dataset.rejected]
    lengths = np.stack([side.lengths[rows] for side in sides], axis=1).reshape(-1)
    packing, efficiency = training_loop.plan_packing_for(
      stage_settings(self.stage),
      lengths,
      self.stage.mesh,
      self.network.config,
      group=len(sides),
    )
    return _Batch(self.stage.gather(dataset, rows), packing, efficiency, lengths)

  def _update(
    self, state: TrainState, pairs: _Batch | None, steps: _Batch | None
  ) -> tuple[TrainState, dict[str, Any]]:
    settings, total = stage_settings(self.stage), self.num_steps
    if pairs is None:
      return step_label_step(
        state,
        steps.arrays,
        steps.packing,
        self.frozen.base,
        config=self.network.config,
        settings=_pair_settings(settings),
        total_steps=total,
      )
    options = {'scorer': self.scorer, 'settings': settings, 'total_steps': total}
    if steps is None:
      return preference_step(state, self.frozen, pairs.arrays, pairs.packing, **options)
    batch = MixedBatch(pairs.arrays, steps.arrays)
    packing = MixedPacking(pairs.packing, steps.packing)
    return mixed_step(state, self.frozen, batch, packing, **options)

  def _work(self, pairs: _Batch | None, steps: _Batch | None) -> dict[str, float]:
    """Returns tokens and FLOPs of an update, and the packing efficiency."""
    config, head = self.network.config, self.network.head
    reference = self.scorer.reference if self.frozen.reference else None
    parts = [(pairs, reference), (steps, None)]
    work = [
      throughput.update(batch.lengths, config, head, frozen) | batch.efficiency
      for batch, frozen in parts
      if batch is not None
    ]
    return work[0] if len(work) == 1 else throughput.add(*work)

  def _evaluate(self, params: Any) -> dict[str, float]:
    size = stage_settings(self.stage).batch_size
    figures = held_out_figures(
      self, params, self.eval_subset, lambda num_rows: eval_batches(num_rows, size)
    )
    return training_loop.prefix_metrics('eval', figures)


def held_out_figures(
  trainer: Trainer, params: Any, data: PairsAndSteps, batches: Batches
) -> dict[str, float]:
  """Returns `rl.preference_metrics` of pairs, and loss and accuracy of labelled steps.

  Beside pairs the latter two are named step_loss and step_accuracy.

  Args:
    trainer: of the network.
    params: parameters of the network.
    data: held-out rows.
    batches: number of rows -> `data.batches.eval_batches` over them.
  """
  figures, stage = {}, trainer.stage
  if data.pairs is not None:
    scored = score_pairs(
      params,
      trainer.frozen.reference,
      data.pairs,
      trainer.scorer,
      batches(len(data.pairs)),
      stage.gather,
    )
    figures |= scored_pair_metrics(scored)
  if data.steps is not None:
    config, rows = trainer.network.config, batches(len(data.steps))
    of_steps = step_training.evaluate(stage, params, data.steps, config, rows)
    prefix = 'step_' if data.pairs is not None else ''
    figures |= {f'{prefix}{name}': value for name, value in of_steps.items()}
  return figures


def stage_settings(stage: Stage) -> PairTraining:
  """Returns the section of the settings that has the stage's name."""
  return getattr(stage.settings, stage.name)


def _pair_settings(settings: PairTraining) -> PairTraining:
  """Returns what training on labels reads: other segments need no other program."""
  return PairTraining(**{name: getattr(settings, name) for name in vars(PairTraining())})
