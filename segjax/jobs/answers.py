"""Samples a checkpoint's answers to the questions of a public judge, in the judge's file format."""

import collections
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from segjax import processes
from segjax.config.settings import RolloutSettings
from segjax.data.batches import Prompts, eval_batches
from segjax.data.judge_formats import Answer, JudgeFormat, Question, conversation, read_questions
from segjax.data.sources import Rows
from segjax.data.tokenize import tokenize_prompts
from segjax.data.tokenizer import ChatTokenizer
from segjax.evaluation.segment_records import Segment
from segjax.jobs.job import COMMON, TRAINED_POLICY, Job, data_input
from segjax.model.llama import LlamaConfig
from segjax.report.console import track
from segjax.report.response_log import ResponseRecord, write_records
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.run.weights import Weights
from segjax.storage import make_directory, write_text_atomically
from segjax.train.rollout import RolloutSampler, rollout

DIRECTORY = 'answers'  # in the stage's directory


class Turn(NamedTuple):
  """An answer: its text without special tokens, its tokens, whether it ended in a stop token."""

  text: str
  tokens: int
  finished: bool


Answers = dict[int, list[Turn]]  # the turns of each question


@dataclasses.dataclass(frozen=True)
class AnswerModel:
  """The model that answers, loaded on the mesh of `stage`."""

  stage: Stage
  network: LlamaConfig
  tokenizer: ChatTokenizer
  rollout: RolloutSettings
  params: Any


class Loaded(NamedTuple):
  """The directory of the policy, its network and tokenizer, the judge's questions."""

  path: Path
  network: LlamaConfig
  tokenizer: ChatTokenizer
  name: str
  judge: JudgeFormat
  questions: list[Question]


def load(stage: Stage) -> Loaded:
  """Loads all but weights."""
  s = stage.settings
  path = inputs.resolve_checkpoint(s.policy.path, 'policy.path')
  network = models.load_network_config(path, s.runtime, stage.mesh, stage.log)
  tokenizer = inputs.load_chat_tokenizer(path, s.data)
  tokenizer = tokenizer.for_networks({'policy': network})
  rows = inputs.load_config_rows(s.data)
  return Loaded(path, network, tokenizer, rows.name, *read_questions(rows))


def run(stage: Stage, loaded: Loaded) -> dict[str, Any]:
  """Samples one answer of config.policy.path to each question of config.data, turn by turn.

  Writes `answers/model_outputs.json` for AlpacaEval, `answers/NAME.jsonl` for MT-Bench and
  Arena-Hard. config.rollout sets how answers are sampled. Conversations that are too long follow
  config.data.overlong_policy; a question that is dropped at one turn has no answer.

  Raises:
    UserError: config.data is not a file of a known judge.
  """
  s = stage.settings
  path, network, tokenizer, source, judge, questions = loaded
  networks = {'policy': network}
  rollout_settings = inputs.fit_rollout(s.rollout, networks, stage.log)
  limits = inputs.prompt_limits(s.data, networks, rollout_settings.max_new_tokens, stage.log)
  stage.log(f'{len(questions)} questions of {judge.name}')
  counts = collections.Counter()
  answers: Answers = {number: [] for number in range(len(questions))}
  model = None
  for turn in range(max(len(question.turns) for question in questions)):
    open_questions = [number for number in answers if len(questions[number].turns) > turn]
    prompts = tokenize_prompts(_rows(source, questions, answers, open_questions), tokenizer, limits)
    counts.update(prompts.counts)
    inputs.log_dataset(prompts, stage.log)
    if model is None:  # not before the first prompts are validated: loading takes minutes
      params = Weights(s.runtime, stage.mesh).frozen(path, network, 'language')
      model = AnswerModel(stage, network, tokenizer, rollout_settings, params)
    new_answers = _answer(model, prompts, [questions[i] for i in open_questions], turn)
    for row, number in enumerate(open_questions):
      if row in new_answers:
        answers[number].append(new_answers[row])
      else:
        del answers[number]
  name = model_name(s.answers.model_name, s.policy.path)
  file = stage.directory / DIRECTORY / judge.file_name(name)
  if processes.is_first():
    texts = {i: Answer(*list(zip(*turns, strict=True))[:2]) for i, turns in answers.items()}
    write(file, judge, [(questions[i], texts[i]) for i in texts], name, _time_written(path))
    chosen = list(answers)[:: -(-len(answers) // max(s.report.eval_responses, 1)) or 1]
    write_records(
      stage.directory, [_record(questions[i], answers[i], i, name) for i in chosen if answers[i]]
    )
  stage.log(f'answers for {judge.name} in {file}')
  return _figures(judge, questions, answers, counts)


def model_name(name: str, path: str) -> str:
  """Returns the model's name for the judge: `name`, or its path with - between its parts."""
  return name or re.sub(r'[^\w.]+', '-', path).strip('-.')


def write(
  file: Path, judge: JudgeFormat, answers: list[tuple[Question, Answer]], name: str, time: float
) -> None:
  """Writes the judge's file; the same answers give the same bytes."""
  make_directory(file.parent)
  records = [judge.write(question, answer, name, time) for question, answer in answers]
  if judge.is_list:
    text = json.dumps(records, indent=2, ensure_ascii=False) + '\n'
  else:
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in records)
  write_text_atomically(file, text)


def _rows(name: str, questions: list[Question], answers: Answers, numbers: list[int]) -> Rows:
  """Returns the conversations so far, each with the next turn's question."""
  texts = [[turn.text for turn in answers[number]] for number in numbers]
  pairs = zip(numbers, texts, strict=True)
  return Rows([{'messages': conversation(questions[i], texts)} for i, texts in pairs], name)


def _answer(
  model: AnswerModel, prompts: Prompts, questions: list[Question], turn: int
) -> dict[int, Turn]:
  """Returns the answers by the prompt's row.

  Random numbers depend on row and turn alone.
  """
  s, answers = model.stage.settings, {}
  temperatures = np.full(len(prompts), model.rollout.temperature)
  if s.answers.category_temperatures:
    temperatures = np.array([questions[row].temperature for row in prompts.row])
  for temperature in np.unique(temperatures):
    settings = dataclasses.replace(model.rollout, temperature=float(temperature))
    members = np.flatnonzero(temperatures == temperature)
    total = -(-len(members) // s.answers.batch_size)
    batches = eval_batches(len(members), s.answers.batch_size)
    for indices, num_real in track(model.stage.name, batches, total, f'turn {turn + 1}'):
      rows = members[indices]
      ids, mask, finished = _sample(model, prompts, rows, settings, turn)
      for i, row in enumerate(prompts.row[rows[:num_real]]):
        content = ids[i][mask[i]][: int(mask[i].sum()) - int(finished[i])]
        text = model.tokenizer.decode(content).strip()
        answers[int(row)] = Turn(text, len(content), bool(finished[i]))
  return answers


def _sample(
  model: AnswerModel, prompts: Prompts, rows: np.ndarray, settings: RolloutSettings, turn: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns (ids, mask, whether finished) of one batch, on the host."""
  stage, batch = model.stage, prompts.gather(rows, np.asarray)
  sampler = RolloutSampler(
    model.network, settings, model.tokenizer.stop_ids, stage.mesh, log=stage.log
  )
  responses = rollout(model.params, batch, stage.key(f'turn {turn}'), sampler, prompts.row[rows])
  return responses.response_ids, responses.response_mask, responses.finished


def _time_written(directory: Path) -> float:
  """Returns when the checkpoint's weights were written, in seconds since 1970.

  The judge's time stamp: the time of sampling would make the files of equal runs differ.
  """
  return max((file.stat().st_mtime for file in directory.glob('*.safetensors')), default=0.0)


def _record(question: Question, turns: list[Turn], number: int, model: str) -> ResponseRecord:
  """Returns the last answer to a question for report.html; what came before it is its prompt."""
  *earlier, last = turns
  prompt = conversation(question, [turn.text for turn in earlier])
  segment = Segment(last.text, [last.text], [None], None)
  totals = {'length': last.tokens, 'finished': last.finished}
  return ResponseRecord(0, model, prompt, [segment], totals, pair=number)


def _figures(
  judge: JudgeFormat,
  questions: list[Question],
  answers: Answers,
  counts: collections.Counter,
) -> dict[str, Any]:
  turns = [turn for turns in answers.values() for turn in turns]
  return {
    'judge': judge.name,
    'questions': len(questions),
    'answered': len(answers),
    'truncated_prompts': counts['truncated'],
    'dropped_prompts': counts['dropped_overlong'] + counts['dropped_empty'],
    'tokens_per_answer': float(np.mean([turn.tokens for turn in turns])) if turns else 0.0,
    'unfinished': sum(not turn.finished for turn in turns),
  }


JOB = Job(
  name='answers',
  load=load,
  run=run,
  sections=(*COMMON, 'policy', 'rollout', 'answers'),
  inputs=(TRAINED_POLICY, data_input('pairs')),
  outputs=(DIRECTORY,),
  batch_keys=('answers.batch_size',),
  summary=('answered', 'truncated_prompts', 'unfinished'),
)
