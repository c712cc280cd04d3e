"""Lines of config.rewards, and the one line of error for each wrong one."""

import ast
import dataclasses

import pytest

from segjax.config import command_line, parse
from segjax.config.load import load_settings
from segjax.config.reward_lines import parse_rewards, reward_functions, reward_models, with_paths
from segjax.errors import UserError

LINES = (
  'helpful path=org/rm weight=0.5 granularity=token normalizer=none spread=end_only',
  'steps path=/rm entropy_threshold=1',
  'brief fn=module:function weight=-2',
)
SEGMENT, PENALTY = {'reward_shaping.mix': 'segment'}, {'reward_shaping.disagreement_coef': 0.5}


def test_a_line_is_a_reward_model_or_a_function():
  helpful, steps, brief = parse_rewards(LINES)
  assert (helpful.name, helpful.path, helpful.weight) == ('helpful', 'org/rm', 0.5)
  assert (helpful.normalizer, helpful.spread, helpful.fn) == ('none', 'end_only', '')
  assert helpful.segmentation.granularity == 'token' and helpful.network == 'reward.helpful'
  assert steps.own_density() == {'entropy_threshold': 1.0} and steps.weight == 1.0
  assert (brief.fn, brief.weight, brief.key) == ('module:function', -2.0, 'rewards: brief: fn')
  assert [reward_models(LINES), reward_functions(LINES)] == [[helpful, steps], [brief]]
  assert parse_rewards(()) == []


def test_paths_are_replaced_in_their_lines_alone():
  lines = with_paths(LINES, {'/rm': '/local', 'module:function': 'x'})
  assert lines == (LINES[0], LINES[1].replace('/rm', '/local'), LINES[2])


def test_values_in_quotes_hold_spaces_and_line_ends():
  line = r"""steps path='/a b' step_tag=' ки' step_delimiter="\n" delimiters='\n' weight=1"""
  (steps,) = parse_rewards([line])
  assert (steps.path, steps.step_tag, steps.step_delimiter) == ('/a b', ' ки', '\n')
  assert steps.segmentation.delimiters == '\n'
  assert steps.model_settings().step_tag == ' ки'
  (empty,) = parse_rewards(["a path=/it's step_tag=<x> step_delimiter='' negative='\\x2c'"])
  assert (empty.path, empty.step_delimiter, empty.negative) == ("/it's", '', ',')
  (none,) = parse_rewards(['a path=x step_tag=1 step_delimiter=None'])
  assert (none.step_tag, none.step_delimiter) == ('1', None)
  (line_end,) = parse_rewards(["a path=x step_tag=t step_delimiter='\n'"])  # as in a config file
  assert line_end.step_delimiter == '\n'
  moved = with_paths([line], {'/a b': '/c  d'})
  assert parse_rewards(moved) == [dataclasses.replace(steps, path='/c  d')]
  settings, _ = load_settings({'rewards': (line,)}, {})
  assert parse_rewards(settings.rewards) == [steps]


def test_settings_hold_the_lines():
  settings, _ = load_settings({'rewards': ','.join(LINES)}, {})
  assert settings.rewards == LINES
  assert parse.changed_values(settings) == {'rewards': LINES}


def test_lines_on_the_command_line_need_no_quotes_of_their_own():
  arguments = ['segjax', '--config.rewards=a path=x weight=1,b fn=m:f', '--config.seed=1']
  quoted = command_line._with_quoted_lines(arguments)
  assert ast.literal_eval(quoted[1].partition('=')[2]) == ('a path=x weight=1', 'b fn=m:f')
  assert [quoted[0], quoted[2]] == [arguments[0], arguments[2]]
  assert command_line._with_quoted_lines(quoted) == quoted


@pytest.mark.parametrize(
  ('lines', 'changes', 'message'),
  [
    (('a fn=m:f', 'a path=x'), {}, "config.rewards has 'a' twice"),
    (('a',), {}, 'a: it has neither path nor fn; write path=DIR'),
    (('a path=x fn=m:f',), {}, 'a: it has both path and fn'),
    (('a path=',), {}, 'a: path is empty'),
    (('a path=x weight',), {}, "a: 'weight' has no value; write KEY=VALUE"),
    (('a path=x weight=1 weight=2',), {}, 'a: weight is given twice'),
    (('a path=x weight=high',), {}, "a: weight='high' must be of type float"),
    (('a path=x nrmalizer=none',), {}, "'nrmalizer' is not one of .* did you mean 'normalizer'"),
    (('a path=x normalizer=published:x',), {}, "normalizer='published:x' is not one of none, publ"),
    (('a path=x spread=end',), {}, "a: spread='end' is not one of auto, even_split"),
    (('a path=x segment_length=0',), {}, 'a: segment_length=0 must be at least 1'),
    (('a path=x granularity=token boundary=delimiter',), {}, 'a: boundary=delimiter has no effect'),
    (
      ('a path=x granularity=bandit normalizer=published:llama3_8b_sft/token',),
      {},
      'a: normalizer=published:llama3_8b_sft/token: regression depends on the position',
    ),
    (('a path=x step_tag=y reads=tokens',), {}, "a: step_tag='y' is put into text, and reads=tok"),
    (("a path=x step_delimiter=''",), {}, "a: step_delimiter='' has no effect without step_tag"),
    (('a path=x head=scalar positive=+',), {}, r"a: positive='\+' has no effect with head=scalar"),
    (('a path=x granularity=None boundary=function',), {}, "a: boundary='function' is not one of"),
    (('a path=x boundary=function',), {}, "a: boundary='function' is not one of entropy"),
    (('a fn=m:f spread=end_only',), {}, "a: key='spread' is not one of fn, weight"),
    (('path=x weight=1',), {}, "'path=x' is not a name; begin each line with one"),
    (('reward_model path=x',), {}, "'reward_model' is the name of another part"),
    (
      ('a path=x',),
      {'reward_shaping.reward_model_weight': 0.0},
      'a: path=x is beside config.reward_model, and there is none; set config.reward_model.path',
    ),
    (('a path=x',), {'reward_shaping.redistribute': 'red'}, 'redistribute=red distributes the sco'),
    ((), SEGMENT, 'mix=segment needs two or more reward models, and the run has 1'),
    (('a fn=m:f',), SEGMENT | PENALTY, 'disagreement_coef=0.5 needs two or more reward models'),
    (('a path=x',), PENALTY, 'disagreement_coef=0.5 compares .* set config.reward_shaping.mix=seg'),
    (('a path=x weight=-1',), SEGMENT | PENALTY, 'needs weights of at least 0'),
    (
      ('a path=x spread=repeat',),
      SEGMENT,
      'a: spread=repeat has no effect with',
    ),
    (
      ('a fn=m:f weight=0',),
      {
        'stages': ('ppo',),
        'reward_shaping.reward_model_weight': 0.0,
        'reward_shaping.reward_fn_weight': 0.0,
      },
      'which leaves no reward; set one of them, or a weight in config.rewards',
    ),
  ],
)
def test_wrong_lines_are_refused_in_one_line(lines, changes, message):
  with pytest.raises(UserError, match=message) as error:
    load_settings({'rewards': lines} | changes, {})
  assert '\n' not in str(error.value)
