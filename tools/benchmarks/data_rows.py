"""Writes synthetic rows of UltraFeedback's lengths, and a tokenizer like Llama-3's.

They are preference pairs, or responses whose steps have labels.
"""

import json
import re
from pathlib import Path

import numpy as np

_WORDS = 40_000  # distinct words, drawn by Zipf's law
_TOKENS_PER_WORD = 1.42  # about what the tokenizer makes of them, punctuation included
_SPLIT = (  # Llama-3's
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def _draw_words(rng: np.random.Generator) -> np.ndarray:
  """Returns distinct words of one to four syllables, the frequent ones short."""
  syllables = [a + b + c for a in 'bcdfghlmnprstvw' for b in 'aeiou' for c in ('', 'n', 'r', 's')]
  words: dict[str, None] = {}
  while len(words) < _WORDS:
    count = 1 + min(3, len(words) // 1500 + rng.integers(2))
    words[''.join(rng.choice(syllables, count))] = None
  return np.array(list(words), object)


def write_pairs(path: Path, count: int, seed: int = 0) -> None:
  """Writes `count` pairs as JSON lines: `chosen` and `rejected` are lists of two messages.

  Prompts and responses have 179 and 403 tokens on average, as those of UltraFeedback: log-normal,
  clipped at 1,024.
  """
  rng = np.random.default_rng(seed)
  words, text = _draw_words(rng), _Text(rng)
  prompts = np.clip(rng.lognormal(np.log(130), 0.9, count), 20, 1024)
  responses = np.clip(rng.lognormal(np.log(330), 0.7, (count, 2)), 5, 1024)
  with path.open('w', encoding='utf-8') as file:
    for prompt, pair in zip(prompts, responses, strict=True):
      question = {'role': 'user', 'content': text.draw(words, prompt)}
      sides = {
        side: [question, {'role': 'assistant', 'content': text.draw(words, length)}]
        for side, length in zip(('chosen', 'rejected'), pair, strict=True)
      }
      file.write(json.dumps({'prompt': question['content'], **sides}) + '\n')


def write_rows(path: Path, count: int, form: str) -> None:
  """Writes `count` rows of a form, 'pairs' or 'steps'; the responses of steps are those of pairs.

  Sentences are the steps; every other one is labelled as good.
  """
  write_pairs(path, count)
  if form == 'pairs':
    return
  with path.open(encoding='utf-8') as file:
    rows = [json.loads(line) for line in file]
  with path.open('w', encoding='utf-8') as file:
    for row in rows:
      text = row['chosen'][-1]['content']
      ends = [match.end() for match in re.finditer(r'\.|[^.]$', text)]
      steps = [[end, number % 2] for number, end in enumerate(ends)]
      file.write(json.dumps({'messages': row['chosen'], 'steps': steps}) + '\n')


class _Text:
  """Draws text of a number of tokens, in sentences and paragraphs."""

  def __init__(self, rng: np.random.Generator):
    self._rng = rng
    weight = 1 / (np.arange(_WORDS) + 3)
    self._cumulative = np.cumsum(weight / weight.sum())

  def draw(self, words: np.ndarray, tokens: float) -> str:
    """Returns about `tokens` tokens of text."""
    count = max(1, round(tokens / _TOKENS_PER_WORD))
    drawn = words[np.searchsorted(self._cumulative, self._rng.random(count) * 0.999999)]
    ends = np.cumsum(self._rng.integers(5, 18, count // 5 + 1))
    for end in ends[ends < count]:
      drawn[end] += '.\n\n' if end % 7 == 0 else '.'
    return ' '.join(drawn).replace('\n ', '\n')


def write_tokenizer(directory: Path, rows: Path, vocabulary: int = 32_000) -> None:
  """Trains a byte-level BPE on the first rows; its special tokens and template are Llama-3's."""
  from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  from segjax.data.named_templates import make_template

  core = Tokenizer(models.BPE(ignore_merges=True))
  core.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_SPLIT), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  core.decoder = decoders.ByteLevel()
  names = ('begin_of_text', 'end_of_text', 'start_header_id', 'end_header_id', 'eot_id')
  special = [AddedToken(f'<|{name}|>', special=True, normalized=False) for name in names]
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  with rows.open(encoding='utf-8') as file:
    first = [json.loads(line) for line, _ in zip(file, range(2000), strict=False)]
  sides = ('chosen', 'rejected', 'messages')
  texts = [row[side][-1]['content'] for row in first for side in sides if side in row]
  core.train_from_iterator(texts, trainer)
  core.add_special_tokens(special)
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token='<|begin_of_text|>', eos_token='<|end_of_text|>'
  )
  tokenizer.chat_template = make_template('llama3', tokenizer)
  tokenizer.save_pretrained(directory)
