"""Reads what each stage would read before weights; writes and downloads nothing.

A run does so before its first stage starts, and a dry run instead of starting it.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from pathlib import Path

from segjax.config.settings import replace
from segjax.data.limits import NoRowsLeftError
from segjax.jobs.job import LM_REWARD, Input, needs_reward_model
from segjax.jobs.registry import JOBS
from segjax.run import inputs, remote_inputs
from segjax.run.stage import Stage

_FIRST_ROWS = 64
# Inputs in whose place the policy that they are trained from is checked.
_POLICIES = ('policy.path', 'reference.path', LM_REWARD.key)


def _ignore(text: str, name: str) -> None:
  """Logs nothing."""


def check(stages: Sequence[Stage], write_log: Callable[[str, str], None] = _ignore) -> list[str]:
  """Loads networks, tokenizers with their templates and the first rows as each job does.

  A policy that an earlier stage will write is replaced by the one that it is trained from.

  Args:
    stages: the stages of the run, prepared.
    write_log: receives the lines that the jobs log meanwhile, each with the stage's name.

  Returns:
    The inputs of the user that are not on this machine, so that they were not checked.

  Raises:
    UserError: a job would refuse its inputs.
  """
  unchecked = []
  for number, prepared in enumerate(stages):
    stage = dataclasses.replace(prepared, write_log=write_log)
    if JOBS[stage.name].load is not None:
      unchecked += _check_stage(stage, {earlier.name: earlier for earlier in stages[:number]})
  return list(dict.fromkeys(unchecked))


def _check_stage(stage: Stage, earlier: dict[str, Stage]) -> list[str]:
  """Checks one stage; returns the inputs that were not checked."""
  values, unchecked, is_complete = {}, [], True
  for item in JOBS[stage.name].inputs:
    value = operator.attrgetter(item.key)(stage.settings)
    is_complete &= bool(value) or not item.is_required(stage.settings)
    for path in item.paths(value).values():
      if not path or path in item.keywords:
        continue
      local = _find_local(item, path, stage, earlier)
      if local is None:
        is_complete = False
        unchecked += [] if _writer(path, stage, earlier) else [path]
      elif not item.is_list:
        values[item.key] = item.with_path(values.get(item.key, value), path, local)
  if values.get('reward_model.path') == '' and stage.settings.critic.init == 'reward_model':
    values['critic.init'] = 'policy'
  settings = replace(stage.settings, **values)
  if settings != stage.settings:  # what is logged of a stand-in would be wrong of the model
    stage = dataclasses.replace(stage, settings=settings, write_log=_ignore)
  if is_complete:
    _load_first_rows(stage)
  elif values.get('policy.path'):
    inputs.load_chat_tokenizer(Path(values['policy.path']), stage.settings.data)
  return unchecked


def _load_first_rows(stage: Stage) -> None:
  data = stage.settings.data
  first = {'data.max_rows': min(data.max_rows or _FIRST_ROWS, _FIRST_ROWS)}
  try:
    JOBS[stage.name].load(dataclasses.replace(stage, settings=replace(stage.settings, **first)))
  except NoRowsLeftError:  # later rows may be shorter
    JOBS[stage.name].load(stage)


def _find_local(item: Input, path: str, stage: Stage, earlier: dict[str, Stage]) -> str | None:
  """Returns the path to check in place of an input; '' for none, None if it cannot be checked."""
  if writer := _writer(path, stage, earlier):
    if item.key in _POLICIES and writer.settings.policy.path:
      return _find_local(item, writer.settings.policy.path, stage, earlier)
    # Rewards may also come from a function alone.
    return '' if item.is_required is needs_reward_model else None
  if Path(path).expanduser().exists():
    return path
  return None if item.is_rows or '://' in path else remote_inputs.cached_checkpoint(path)


def _writer(path: str, stage: Stage, earlier: dict[str, Stage]) -> Stage | None:
  """Returns the earlier stage of the run that writes a path."""
  workdir = stage.directory.parent
  return next((s for n, s in earlier.items() if Path(path).is_relative_to(workdir / n)), None)
