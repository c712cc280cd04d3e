"""The jobs, in the order of the stages of a run; a new job is one line in `JOBS`."""

import difflib

from segjax.errors import UserError
from segjax.jobs import (
  answers,
  chat,
  credit,
  demo,
  dpo,
  evaluate,
  evaluate_reward,
  normalizer,
  ppo,
  reward,
  sample,
  selfcheck,
  sft,
  study,
)
from segjax.plan.phases import JobPlan

JOBS = {
  job.name: job
  for job in (
    demo.JOB,
    sft.JOB,
    reward.JOB,
    normalizer.JOB,
    dpo.JOB,
    credit.JOB,
    ppo.JOB,
    evaluate.JOB,
    evaluate_reward.JOB,
    sample.JOB,
    answers.JOB,
    selfcheck.JOB,
    chat.JOB,
    study.JOB,
  )
}


def check_stages(stages: tuple[str, ...]) -> None:
  """Checks that config.stages names jobs, each at most once and in the order of `JOBS`.

  Raises:
    UserError: a name is unknown or repeated, or the order is another.
  """
  names = ', '.join(JOBS)
  if not stages:
    raise UserError(f'config.stages is empty; use names out of {names}.')
  for stage in stages:
    if stage not in JOBS:
      near = difflib.get_close_matches(stage, JOBS, n=1)
      hint = f'; did you mean {near[0]!r}?' if near else '.'
      raise UserError(f'config.stages={stage!r} is not one of {names}{hint}')
  in_order = tuple(name for name in JOBS if name in stages)
  if stages != in_order:
    raise UserError(
      f'config.stages={",".join(stages)} is not in the order of the jobs; use {",".join(in_order)}.'
    )


def find_plan(name: str) -> JobPlan:
  """Returns the plan of a job.

  Raises:
    UserError: there is no such job, or it has no plan.
  """
  if name not in JOBS or JOBS[name].plan is None:
    names = ', '.join(job.name for job in JOBS.values() if job.plan)
    raise UserError(f'config.stages={name!r} has no plan; use one of {names}.')
  return JOBS[name].plan
