"""Answers of a checkpoint to the questions of a public judge, in the form its tool reads."""

import collections
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from segjax import processes
from segjax.config.settings import RolloutSettings
from segjax.data.batches import Prompts, eval_batches
from segjax.data.judge_formats import Answer, JudgeFormat, Question, conversation, read_questions
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.model.llama import LlamaConfig
from segjax.report.console import track
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.train.rollout import RolloutSampler, rollout

DIRECTORY = 'answers'  # in the stage's own


@dataclasses.dataclass(frozen=True)
class AnswerModel:
  """The model that is asked."""

  stage: Stage
  network: LlamaConfig
  tokenizer: ChatTokenizer
  params: Any


def run(stage: Stage) -> dict[str, Any]:
  """Asks config.policy.path the questions of config.data, turn by turn; one answer to each.

  Writes `answers/model_outputs.json` for AlpacaEval, `answers/NAME.jsonl` for MT-Bench and
  Arena-Hard. config.rollout says how answers are sampled; too long a conversation is treated as
  config.data.overlong_policy says, and a question that is left out at one turn has no answer.

  Raises:
    ValueError: config.data is no judge's file.
  """
  s = stage.settings
  path = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  rows = inputs.load_config_rows(s.data)
  judge, questions = read_questions(rows)
  network = models.load_network_config(path, s.runtime, stage.mesh, stage.log)
  tokenizer = load_tokenizer(str(path), s.data.chat_template)
  limits = inputs.prompt_limits(
    s.data,
    {'policy': network},
    s.rollout.max_new_tokens,
    'rollout.max_new_tokens',
    stage.log,
  )
  stage.log(f'{len(questions)} questions of {judge.name}')
  counts = collections.Counter()
  said: dict[int, list[tuple[str, int]]] = {number: [] for number in range(len(questions))}
  speaker = None
  for turn in range(max(len(question.turns) for question in questions)):
    asked = [number for number in said if len(questions[number].turns) > turn]
    prompts = tokenize_prompts(_rows(rows.name, questions, said, asked), tokenizer, limits)
    counts.update(prompts.counts)
    inputs.log_dataset(prompts, stage.log)
    if speaker is None:  # after the first prompts, so that what is wrong with them is told before
      params = models.load_params(path, network, 'language', s.runtime, stage.mesh)
      speaker = AnswerModel(stage, network, tokenizer, params)
    found = _answer(speaker, prompts, [questions[i] for i in asked], turn)
    for at, number in enumerate(asked):
      if at in found:
        said[number].append(found[at])
      else:
        del said[number]
  name = model_name(s.answers.model_name, s.policy.path)
  file = stage.directory / DIRECTORY / judge.file_name(name)
  if processes.is_first():
    answers = [(questions[i], Answer(*zip(*said[i], strict=True))) for i in said]
    write(file, judge, answers, name, _written(path))
  stage.log(f'answers for {judge.name} in {file}')
  return _figures(judge, questions, said, counts)


def model_name(given: str, path: str) -> str:
  """What the judge calls the model: the given name, or its path with - between its parts."""
  return given or re.sub(r'[^\w.]+', '-', path).strip('-.')


def write(
  file: Path, judge: JudgeFormat, answers: list[tuple[Question, Answer]], name: str, time: float
) -> None:
  """The judge's file; the same answers give the same bytes."""
  file.parent.mkdir(parents=True, exist_ok=True)
  found = [judge.write(question, answer, name, time) for question, answer in answers]
  if judge.is_list:
    text = json.dumps(found, indent=2, ensure_ascii=False) + '\n'
  else:
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in found)
  file.write_text(text, encoding='utf-8')


def _rows(
  name: str, questions: list[Question], said: dict[int, list[tuple[str, int]]], asked: list[int]
) -> Rows:
  """The conversations so far, each with the next turn's question."""
  texts = [[text for text, _ in said[number]] for number in asked]
  both = zip(asked, texts, strict=True)
  return Rows([{'messages': conversation(questions[i], answers)} for i, answers in both], name)


def _answer(
  speaker: AnswerModel, prompts: Prompts, questions: list[Question], turn: int
) -> dict[int, tuple[str, int]]:
  """(text, tokens) of the answers, by the prompt's row; random numbers are by row and turn."""
  s, found = speaker.stage.settings, {}
  temperatures = np.full(len(prompts), s.rollout.temperature)
  if s.answers.category_temperatures:
    temperatures = np.array([questions[row].temperature for row in prompts.row])
  for temperature in np.unique(temperatures):
    settings = dataclasses.replace(s.rollout, temperature=float(temperature))
    members = np.flatnonzero(temperatures == temperature)
    total = -(-len(members) // s.answers.batch_size)
    batches = eval_batches(len(members), s.answers.batch_size)
    for at, real in track(speaker.stage.name, batches, total, f'turn {turn + 1}'):
      rows = members[at]
      ids, mask, finished = _sample(speaker, prompts, rows, settings, turn)
      for i, row in enumerate(prompts.row[rows[:real]]):
        content = ids[i][mask[i]][: int(mask[i].sum()) - int(finished[i])]
        found[int(row)] = speaker.tokenizer.decode(content).strip(), len(content)
  return found


def _sample(
  speaker: AnswerModel, prompts: Prompts, rows: np.ndarray, settings: RolloutSettings, turn: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(ids, mask, whether finished) of one batch, on the host."""
  stage, batch = speaker.stage, prompts.gather(rows, np.asarray)
  sampler = RolloutSampler(
    speaker.network, settings, speaker.tokenizer.stop_ids, stage.mesh, log=stage.log
  )
  responses = rollout(speaker.params, batch, stage.key(f'turn {turn}'), sampler, prompts.row[rows])
  return responses.response_ids, responses.response_mask, responses.finished


def _written(directory: Path) -> float:
  """When the checkpoint's weights were written, seconds since 1970: the answers' time stamp.

  The time at which they are sampled would make each run's file another.
  """
  return max((file.stat().st_mtime for file in directory.glob('*.safetensors')), default=0.0)


def _figures(
  judge: JudgeFormat,
  questions: list[Question],
  said: dict[int, list[tuple[str, int]]],
  counts: collections.Counter,
) -> dict[str, Any]:
  tokens = [count for answers in said.values() for _, count in answers]
  return {
    'judge': judge.name,
    'questions': len(questions),
    'answered': len(said),
    'truncated_prompts': counts['truncated'],
    'dropped_prompts': counts['dropped_overlong'] + counts['dropped_empty'],
    'tokens_per_answer': float(np.mean(tokens)) if tokens else 0.0,
  }
