"""Reads config.rewards: reward models and functions beside reward_model and reward_fn.

A line is 'NAME path=DIR KEY=VALUE ...' for a reward model, 'NAME fn=module:function weight=W' for a
function. What a line of a reward model leaves out is that of the model's own segment_reward.json,
or, where it has none, of config.reward_model; and of config.reward_shaping.spread.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from segjax.config import conflicts
from segjax.config.choices import CHOICES, MINIMUMS
from segjax.config.field_checks import check_choice, check_minimum, typed
from segjax.config.lines import parse_value, read_lines, split_words
from segjax.config.settings import RewardModelSettings, SegmentationOverrides, Settings
from segjax.errors import UserError
from segjax.rl.normalizer import PUBLISHED

# Parts of the reward that are no lines of config.rewards.
REWARD_MODEL, REWARD_FN, LM_REWARD, DISAGREEMENT = _OWN_PARTS = (
  'reward_model',
  'reward_fn',
  'lm_reward',
  'disagreement',
)
_SEGMENTATION = (
  'granularity',
  'boundary',
  'entropy_threshold',
  'segment_length',
  'delimiters',
  'min_segment_length',
  'aggregation',
)
_READING = ('reads', 'head', 'positive', 'negative', 'step_tag', 'step_delimiter')
_OF_MODELS = ('path', 'weight', 'normalizer', 'spread', *_SEGMENTATION, *_READING)
_OF_FUNCTIONS = ('fn', 'weight')


@dataclasses.dataclass(frozen=True)
class RewardLine:
  """A line of config.rewards; '' and None are left out.

  Attributes:
    name: of its part in metrics, on the page and in chat.
    weight: factor in the sum of all rewards.
    path: directory or hub id of a reward model; '' for a function.
    fn: 'module:function', as reward_shaping.reward_fn; '' for a reward model.
    normalizer: of the scores, as reward_model.normalizer.
    spread: of the rewards, as reward_shaping.spread.
    segmentation: where the scores are read.
    reads: as reward_model.reads; so are head, positive, negative, step_tag and step_delimiter.
  """

  name: str
  weight: float = 1.0
  path: str = ''
  fn: str = ''
  normalizer: str = ''
  spread: str = ''
  segmentation: SegmentationOverrides = dataclasses.field(default_factory=SegmentationOverrides)
  reads: str = 'auto'
  head: str = 'auto'
  positive: str = ''
  negative: str = ''
  step_tag: str = ''
  step_delimiter: str | None = None

  @property
  def key(self) -> str:
    """Names the line's path or function in errors, after 'config.'."""
    return f'rewards: {self.name}: {"path" if self.path else "fn"}'

  @property
  def network(self) -> str:
    """Name of its network beside 'reward', that of config.reward_model."""
    return f'reward.{self.name}'

  def model_settings(self) -> RewardModelSettings:
    """Returns what the line sets of a reward model."""
    reading = {name: getattr(self, name) for name in _READING}
    return RewardModelSettings(self.path, self.segmentation, self.normalizer, **reading)

  def own_density(self) -> dict[str, Any]:
    """Returns what it sets of where scores are read and how they are spread."""
    values = {'spread': self.spread or None} | vars(self.segmentation)
    return {key: value for key, value in values.items() if value is not None}


def parse_rewards(lines: Iterable[str]) -> list[RewardLine]:
  """Returns the lines of config.rewards.

  Raises:
    UserError: a name occurs twice or is taken, a key does not exist, a value is wrong, or a line
      names neither a reward model nor a function, or both.
  """
  return [_parse(name, words) for name, words in read_lines(lines, 'rewards').items()]


def reward_models(lines: Iterable[str]) -> list[RewardLine]:
  """Returns the lines that name a reward model."""
  return [line for line in parse_rewards(lines) if line.path]


def reward_functions(lines: Iterable[str]) -> list[RewardLine]:
  """Returns the lines that name a function."""
  return [line for line in parse_rewards(lines) if line.fn]


def key_prefix(network: str) -> str:
  """Returns what errors write in front of the settings of a reward model.

  Args:
    network: the name of its network: `RewardLine.network`, or that of config.reward_model.
  """
  line = network.partition('.')[2]
  return f'config.rewards: {line}: ' if line else 'config.reward_model.'


def with_paths(lines: Iterable[str], paths: Mapping[str, str]) -> tuple[str, ...]:
  """Returns the lines with other paths of their reward models, by the present ones."""

  def word(text):
    key, _, value = text.partition('=')
    path = paths.get(str(parse_value(value))) if key == 'path' else None
    if path is None:
      return text
    return f'path={path if split_words(path) == [path] else repr(path)}'

  return tuple(' '.join(map(word, split_words(line))) for line in lines)


def _parse(name: str, words: dict[str, str]) -> RewardLine:
  prefix = f'config.rewards: {name}: '
  if not re.fullmatch(r'[A-Za-z][\w-]*', name):
    raise UserError(
      f'config.rewards: {name!r} is not a name; begin each line with one of letters, digits, - and '
      "_, as in 'brief fn=module:function'."
    )
  if name in _OWN_PARTS:
    raise UserError(
      f'config.rewards: {name!r} is the name of another part of the reward; rename the line.'
    )
  if ('path' in words) == ('fn' in words):
    has = 'both path and fn' if words.get('fn') else 'neither path nor fn'
    raise UserError(
      f'{prefix}it has {has}; write path=DIR for a reward model, or fn=module:function.'
    )
  valid = _OF_MODELS if 'path' in words else _OF_FUNCTIONS
  for key in words:
    check_choice(f'{prefix}key', key, valid)
  kinds = typing.get_type_hints(RewardLine) | typing.get_type_hints(SegmentationOverrides)
  values = {key: _value(f'{prefix}{key}', key, text, kinds[key]) for key, text in words.items()}
  own = {key: values.pop(key) for key in _SEGMENTATION if key in values}
  return RewardLine(name, segmentation=SegmentationOverrides(**own), **values)


def _value(label: str, key: str, text: str, kind: Any) -> Any:
  if not text:
    raise UserError(f'{label} is empty; give a value, or leave it out.')
  value, kinds = parse_value(text), (kind, *typing.get_args(kind))
  if str in kinds and type(value) not in (str, *kinds):
    value = text
  value = typed(label, value, kind)
  if value is None:
    return None
  section = {'spread': 'reward_shaping'} | dict.fromkeys(('normalizer', *_READING), 'reward_model')
  own = f'{section.get(key, "reward_model.segmentation")}.{key}'
  if own in CHOICES:
    # A boundary by a function needs a key of its own, by which the function's source is hashed.
    check_choice(label, value, tuple(x for x in CHOICES[own] if x not in ('', 'function')))
  if own in MINIMUMS:
    check_minimum(label, value, MINIMUMS[own])
  return value


def has_first_model(s: Settings) -> bool:
  """Returns whether config.reward_model names a reward model, or an earlier stage trains it."""
  weight = s.reward_shaping.reward_model_weight
  return bool(weight or s.reward_model.path or 'reward' in s.stages)


def check_rewards(s: Settings) -> None:
  """Raises UserError if a line of config.rewards is wrong, or the rewards cannot be mixed."""
  parse_rewards(s.rewards)
  shaping, models = s.reward_shaping, reward_models(s.rewards)
  for line in models:
    conflicts.check_segmentation(line.segmentation, f'config.rewards: {line.name}')
    conflicts.check_reading(line.model_settings(), key_prefix(line.network))
    if line.normalizer.startswith('published:') and PUBLISHED[line.normalizer[10:]].w_mean:
      key = f'config.rewards: {line.name}: normalizer={line.normalizer}:'
      conflicts.check_normalizer('regression', line.segmentation.granularity or '', key)
  if models and not has_first_model(s):
    raise UserError(
      f'config.rewards: {models[0].name}: path={models[0].path} is beside config.reward_model, and '
      'there is none; set config.reward_model.path to one of the reward models, and '
      'reward_shaping.reward_model_weight.'
    )
  if models and shaping.redistribute != 'none':
    raise UserError(
      f'config.reward_shaping.redistribute={shaping.redistribute} distributes the score of one '
      f'reward model, and config.rewards names {models[0].name} too; set redistribute=none.'
    )
  _check_mix(s, models)


def _check_mix(s: Settings, models: list[RewardLine]) -> None:
  shaping, count = s.reward_shaping, len(models) + has_first_model(s)
  key = 'config.reward_shaping'
  for name, is_set in (
    (f'disagreement_coef={shaping.disagreement_coef:g}', shaping.disagreement_coef),
    ('mix=segment', shaping.mix == 'segment'),
  ):
    if is_set and count < 2:
      raise UserError(
        f'{key}.{name} needs two or more reward models, and the run has {count}; name another '
        'in config.rewards, or leave it out.'
      )
  if shaping.disagreement_coef and shaping.mix != 'segment':
    raise UserError(
      f'{key}.disagreement_coef={shaping.disagreement_coef:g} compares reward models at the same '
      f'segments; set {key}.mix=segment.'
    )
  if (
    shaping.disagreement_coef
    and min([shaping.reward_model_weight, *(line.weight for line in models)]) < 0
  ):
    raise UserError(
      f'{key}.disagreement_coef={shaping.disagreement_coef:g} needs weights of at least 0: of a '
      'reward model of negative weight, more is worse; set it to 0.'
    )
  for line in models if shaping.mix == 'segment' else ():
    for name, value in line.own_density().items():
      raise UserError(
        f'config.rewards: {line.name}: {name}={value} has no effect with reward_shaping.mix='
        'segment, which reads all reward models at the segments of the first; leave it out, or set '
        'mix=token.'
      )
