"""Finds and loads the head of a reward model that others have trained.

Forms of heads that are read as a score:

  scalar   ...ForSequenceClassification and ...ForTokenClassification with one label: `score.weight`
           [1, D], with or without `score.bias`
  labels   classifiers of two labels or more, at every token: ...ForTokenClassification; also with
           a layer and a ReLU in front (`score.0`, `score.2`), the form of Qwen2.5-Math's process
           models
  tokens   language models that answer by one of two tokens, as '+' and '-' in the form of
           Math-Shepherd's process models
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from segjax.config.settings import RewardModelSettings
from segjax.data.tokenizer_files import load_fast_tokenizer
from segjax.errors import UserError
from segjax.hf.adapter import is_adapter
from segjax.hf.checkpoint import CONFIG, Checkpoint, open_checkpoint, read_json, without_wrapper
from segjax.hf.config import head_name
from segjax.hf.tensor_slices import SliceReader, describe_not_finite
from segjax.model.lora import HEAD, place
from segjax.model.score_head import ScoreHead


def find_score_head(
  directory: Path, how: RewardModelSettings, key: str = 'config.reward_model.'
) -> tuple[ScoreHead | None, str]:
  """Returns (the head that the settings name, what the score is, or '').

  By the headers alone. None for a scalar head without a bias, or no head, which `reader` reads.

  Args:
    directory: of the reward model.
    how: `head`, `positive` and `negative` are read.
    key: what errors write in front of the names of these settings.

  Raises:
    UserError: the checkpoint has no such head, or which logits make the score is not known.
  """
  if is_adapter(directory):
    if how.head in ('labels', 'tokens'):
      raise UserError(
        f'{key}head={how.head}: {directory} is an adapter; merge it: segjax convert merge '
        f'{directory} OUT.'
      )
    return None, ''
  checkpoint = without_wrapper(open_checkpoint(directory))
  raw = read_json(checkpoint.directory / CONFIG)
  if how.head == 'tokens':
    return _of_tokens(directory, checkpoint, how, key)
  module, hidden = _layers(checkpoint, raw)
  if f'{module}.weight' not in checkpoint.tensors:
    if how.head == 'labels':
      raise UserError(
        f'{key}head=labels: {directory} has no classifier, {module}.weight; use head=tokens '
        'for a language model.'
      )
    return None, ''
  rows = checkpoint.tensors[f'{module}.weight'].shape[0]
  has_bias = f'{module}.bias' in checkpoint.tensors
  if rows == 1:
    _check_unused(how, f'{directory} has one label', key)
    is_plain = not has_bias and not hidden
    return None if is_plain else ScoreHead(module, 1, has_bias=has_bias, hidden=hidden), ''
  labels = _labels(raw, rows)
  positive, negative = _choose(directory, labels, how, key)
  head = ScoreHead(module, rows, labels.index(positive), labels.index(negative), has_bias, hidden)
  return head, f'the score is the logit of label {positive!r} less that of {negative!r}'


def _layers(checkpoint: Checkpoint, raw: dict[str, Any]) -> tuple[str, str]:
  """Returns HF's names of the layer that has the logits, and of one in front of it, or ''."""
  module = head_name(raw)
  if f'{module}.2.weight' in checkpoint.tensors:
    return f'{module}.2', f'{module}.0'
  return module, ''


def check_trainable_head(directory: Path, key: str) -> None:
  """Checks by the headers that a network with a scalar head can be trained from a checkpoint.

  It can from a scalar head without a bias, or no head, in whose place one is drawn.

  Args:
    directory: of the first weights.
    key: the config key that names it.

  Raises:
    UserError: the checkpoint has another head.
  """
  if is_adapter(directory):
    return
  checkpoint = without_wrapper(open_checkpoint(directory))
  module, hidden = _layers(checkpoint, read_json(checkpoint.directory / CONFIG))
  header = checkpoint.tensors.get(f'{module}.weight')
  has_bias = f'{module}.bias' in checkpoint.tensors
  if header is None or (header.shape[0] == 1 and not has_bias and not hidden):
    return
  rows = '1 label' if header.shape[0] == 1 else f'{header.shape[0]} labels'
  parts = [' and a bias'] * has_bias + [' behind another layer'] * bool(hidden)
  raise UserError(
    f'{key}: the head of {directory} has {rows}{"".join(parts)}, and one that is '
    'trained has one label and no bias; name a language model, or a reward model of that form.'
  )


def _labels(raw: dict[str, Any], rows: int) -> list[str]:
  """Returns the labels of config.json, where transformers leaves out the default ones of two."""
  names = raw.get('id2label')
  names = names if isinstance(names, dict) else {}
  return [str(names.get(str(row), f'LABEL_{row}')) for row in range(rows)]


def _choose(
  directory: Path, labels: list[str], how: RewardModelSettings, key: str
) -> tuple[str, str]:
  """Returns the two labels whose logits make the score."""
  described = f'{directory} is a classifier of {len(labels)} labels, {", ".join(labels)}'
  for name in ('positive', 'negative'):
    value = getattr(how, name)
    if value and value not in labels:
      raise UserError(f'{key}{name}={value!r} is not a label: {described}; name one of them.')
  others = [label for label in labels if label != how.positive]
  negative = how.negative or (others[0] if len(labels) == 2 else '')
  if not how.positive or not negative:
    missing, kind = ('negative', 'bad') if how.positive else ('positive', 'good')
    raise UserError(
      f'{key}{missing} is empty: {described}, and which of them is that of a {kind} step is not '
      'known; set it to its label: the score is the logit of positive less that of negative.'
    )
  if negative == how.positive:
    raise UserError(f'{key}positive and negative are both {negative!r}; name two labels.')
  return how.positive, negative


def _check_unused(how: RewardModelSettings, reason: str, key: str) -> None:
  for name in ('positive', 'negative'):
    if value := getattr(how, name):
      raise UserError(
        f'{key}{name}={value!r} has no effect: {reason}; leave it out, or set head=tokens for a '
        'language model.'
      )


def _of_tokens(
  directory: Path, checkpoint: Checkpoint, how: RewardModelSettings, key: str
) -> tuple[ScoreHead, str]:
  """Returns the head of a language model, of which two tokens are read."""
  if not how.positive or not how.negative:
    raise UserError(
      f'{key}head=tokens: which tokens of {directory} say that a step is good or bad is not '
      "known; set positive='+' and negative='-', or whatever it was trained with: the score is the "
      'logit of positive less that of negative.'
    )
  tokenizer = load_fast_tokenizer(str(directory))
  ids = [
    _token_id(tokenizer, directory, f'{key}{name}', getattr(how, name))
    for name in ('positive', 'negative')
  ]
  if ids[0] == ids[1]:
    raise UserError(
      f'{key}positive={how.positive!r} and negative={how.negative!r} are one token of '
      f'{directory}; name two.'
    )
  module = 'lm_head' if 'lm_head.weight' in checkpoint.tensors else 'model.embed_tokens'
  header = checkpoint.tensors.get(f'{module}.weight')
  if header is None or max(ids) >= header.shape[0]:
    raise UserError(f'{directory} has no logits of tokens {ids[0]} and {ids[1]}; check its files.')
  words = [
    f'{token!r} ({number})'
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
  ]
  head = ScoreHead(module, header.shape[0], *ids)
  return head, f'the score is the logit of token {words[0]} less that of {words[1]}'


def _token_id(tokenizer: Any, directory: Path, key: str, text: str) -> int:
  """Returns the token that a text is, or the entry of the vocabulary of that name."""
  ids = tokenizer(text, add_special_tokens=False)['input_ids']
  if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
    return ids[0]
  known = tokenizer.get_vocab().get(text)
  if known is None:
    raise UserError(
      f'{key}={text!r} is {len(ids)} tokens of {directory}, '
      f'{tokenizer.convert_ids_to_tokens(ids)}; name one token.'
    )
  return known


def load_score_head(checkpoint: Checkpoint, head: ScoreHead, mesh: Mesh | None) -> dict[str, Any]:
  """Returns the parameters of 'scalar_head', float32: kernel [D, 1], bias [1], and those of hidden.

  Raises:
    UserError: a weight is not finite.
  """
  files = SliceReader(checkpoint)

  def read(name: str) -> np.ndarray:
    rows = [head.positive] if head.negative is None else [head.positive, head.negative]
    parts = [files.rows(f'{head.module}.{name}', slice(row, row + 1)) for row in rows]
    return parts[0] if head.negative is None else parts[0] - parts[1]

  params: dict[str, Any] = {'kernel': read('weight').T}
  if head.has_bias:
    params['bias'] = read('bias')
  if head.hidden:
    weight, bias = (files.rows(f'{head.hidden}.{name}') for name in ('weight', 'bias'))
    params['hidden'] = {'kernel': weight.T, 'bias': bias}
  if files.not_finite:
    raise UserError(f'{describe_not_finite(files.not_finite)}; use an earlier checkpoint.')
  if mesh is None:
    return jax.tree.map(jnp.asarray, params)
  return place({HEAD: params}, mesh)[HEAD]
