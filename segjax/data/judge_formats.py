"""Reads questions of public judges and writes answers in the form that the judges' tools read.

Answers are sampled by `segjax.jobs.answers`. Sources of the formats:

  AlpacaEval   https://github.com/tatsu-lab/alpaca_eval (README, "model_outputs"): a JSON list of
               {instruction, output, generator}, with the question's `dataset` copied
  MT-Bench     https://github.com/lm-sys/FastChat/blob/main/fastchat/llm_judge/gen_model_answer.py
               and common.py: JSON lines of {question_id, answer_id, model_id, choices: [{index,
               turns: [text]}], tstamp}, in a file named after the model
  Arena-Hard   https://github.com/lmarena/arena-hard-auto, v0.1 (gen_answer.py, gen_judgment.py):
               the same with turns: [{content, token_len}]
"""

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from segjax.data.json_rows import Row
from segjax.data.sources import Rows
from segjax.errors import UserError, excerpt

_NAMESPACE = uuid.UUID('b9f0a6f2-54d3-5a55-9e47-0c9f4a3b2d11')  # of answer ids

# FastChat's temperatures by category of MT-Bench; others there are sampled at 0.7.
TEMPERATURES = {
  **{'writing': 0.7, 'roleplay': 0.7, 'stem': 0.1, 'humanities': 0.1},
  **{'extraction': 0.0, 'math': 0.0, 'coding': 0.0, 'reasoning': 0.0},
}
OTHER_TEMPERATURE = 0.7


@dataclasses.dataclass(frozen=True)
class Question:
  """The turns of a question; `id` is the judge's, `row` the published row."""

  id: Any
  turns: tuple[str, ...]
  row: Row

  @property
  def temperature(self) -> float:
    """FastChat's temperature for the question's category."""
    return TEMPERATURES.get(self.row.get('category'), OTHER_TEMPERATURE)


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answers to a question's turns, and the number of tokens of each."""

  texts: tuple[str, ...]
  tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class JudgeFormat:
  """The file formats of a public judge.

  Attributes:
    name: name of the judge.
    keys: keys of its questions, for errors.
    read: row -> (id, turns), or None if the row is not in this format.
    write: (question, answer, model's name, time) -> the answer as a row.
    is_list: answers are one JSON list in `model_outputs.json`, else JSON lines in NAME.jsonl.
  """

  name: str
  keys: str
  read: Callable[[Row], tuple[Any, list[str]] | None]
  write: Callable[[Question, Answer, str, float], dict[str, Any]]
  is_list: bool = False

  def file_name(self, model: str) -> str:
    """Returns the file name that the judge's tool expects."""
    return 'model_outputs.json' if self.is_list else f'{model}.jsonl'


def _read_alpaca_eval(row: Row) -> tuple[Any, list[str]] | None:
  instruction = row.get('instruction')
  return (instruction, [instruction]) if _is_text(instruction) else None


def _read_mt_bench(row: Row) -> tuple[Any, list[str]] | None:
  turns, number = row.get('turns'), row.get('question_id')
  is_complete = (
    number is not None and isinstance(turns, list) and turns and all(map(_is_text, turns))
  )
  return (number, turns) if is_complete else None


def _read_arena_hard(row: Row) -> tuple[Any, list[str]] | None:
  if row.get('uid') is not None and _is_text(row.get('prompt')):
    return row['uid'], [row['prompt']]
  turns, number = row.get('turns'), row.get('question_id')
  if number is None or not isinstance(turns, list) or not turns:
    return None
  texts = [turn.get('content') if isinstance(turn, dict) else None for turn in turns]
  return (number, texts) if all(map(_is_text, texts)) else None


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _write_alpaca_eval(question: Question, answer: Answer, model: str, time: float):
  copied = {key: question.row[key] for key in ('dataset', 'datasplit') if question.row.get(key)}
  text = answer.texts[0]
  return copied | {'instruction': question.turns[0], 'output': text, 'generator': model}


def _write_mt_bench(question: Question, answer: Answer, model: str, time: float):
  return _with_choice(question, answer, model, time, list(answer.texts))


def _write_arena_hard(question: Question, answer: Answer, model: str, time: float):
  pairs = zip(answer.texts, answer.tokens, strict=True)
  turns = [{'content': text, 'token_len': tokens} for text, tokens in pairs]
  return _with_choice(question, answer, model, time, turns)


def _with_choice(question: Question, answer: Answer, model: str, time: float, turns: list[Any]):
  return {
    'question_id': question.id,
    'answer_id': answer_id(question, answer, model),
    'model_id': model,
    'choices': [{'index': 0, 'turns': turns}],
    'tstamp': time,
  }


JUDGE_FORMATS = (
  JudgeFormat('AlpacaEval', 'instruction', _read_alpaca_eval, _write_alpaca_eval, is_list=True),
  JudgeFormat('MT-Bench', 'question_id and turns (texts)', _read_mt_bench, _write_mt_bench),
  JudgeFormat('Arena-Hard', 'uid and prompt', _read_arena_hard, _write_arena_hard),
)


def answer_id(question: Question, answer: Answer, model: str) -> str:
  """Returns an id that is the same whenever the same model gives the same answer."""
  parts = [model, str(question.id), *question.turns, *answer.texts]
  return uuid.uuid5(_NAMESPACE, '\x1f'.join(parts)).hex


def read_questions(rows: Rows) -> tuple[JudgeFormat, list[Question]]:
  """Returns (the judge's format, its questions); the first row's fields determine the judge.

  Raises:
    ValueError: the first row is not in a judge's format, another row differs from it, or two rows
      share an id.
  """
  judge = next((judge for judge in JUDGE_FORMATS if judge.read(rows[0]) is not None), None)
  if judge is None:
    formats = '; '.join(f'{judge.name}: {judge.keys}' for judge in JUDGE_FORMATS)
    raise UserError(
      f'{rows.location(0)}: not a question of a known judge ({formats}); its keys are '
      f'{", ".join(rows[0]) or "(none)"}.'
    )
  questions, row_of_id = [], {}
  for index, row in enumerate(rows):
    content = judge.read(row)
    location = rows.location(index)
    if content is None:
      raise UserError(
        f'{location}: {excerpt(row)} is not a question of {judge.name} ({judge.keys}), as the '
        'first row is; remove it, or give each judge a file of its own.'
      )
    question_id, turns = content
    if question_id in row_of_id and not judge.is_list:
      first = row_of_id[question_id]
      raise UserError(f'{location}: id {question_id!r} is already that of row {first}; change it.')
    row_of_id[question_id] = index + 1
    questions.append(Question(question_id, tuple(turns), dict(row)))
  return judge, questions


def conversation(question: Question, answers: Sequence[str]) -> list[dict[str, str]]:
  """Returns the prompt of the turn that follows `answers`: all earlier turns, then its question."""
  messages = []
  for turn, answer in zip(question.turns, answers, strict=False):
    messages.append({'role': 'user', 'content': turn})
    messages.append({'role': 'assistant', 'content': answer})
  return [*messages, {'role': 'user', 'content': question.turns[len(answers)]}]
