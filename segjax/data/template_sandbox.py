"""Renders chat templates in a sandbox with limits.

A template comes with a model and is a program. transformers runs it in a sandbox that keeps it from
files and from Python, but not from loops without end or texts without limit. Here every loop and
macro looks at the clock, and operations that make large values are checked before they run. This
works in any thread and on any platform, unlike signals and limits of the operating system.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox

from segjax.data import template_limits as limits
from segjax.data.template_limits import METER, TemplateLimitError, TemplateTimeError
from segjax.errors import UserError

_MAX_TEMPLATE = 200_000  # characters; compiling takes a second per 100,000
_UNSAFE_METHODS = ('encode', 'format_map', 'translate')


def render(source: str, values: dict[str, Any]) -> str:
  """Returns a template rendered with `values`, which hold the conversation as `messages`.

  Raises:
    UserError: the template is invalid, refuses or fails, or exceeds a limit.
  """
  try:
    return _render(source, values)
  except TemplateTimeError:
    pass  # Python may have collected garbage meanwhile, which takes long in a large process
  try:
    return _render(source, values)
  except TemplateTimeError as error:
    raise UserError(f'the chat template is stopped: {error} See data.chat_template.') from None


def _render(source: str, values: dict[str, Any]) -> str:
  size = sum(len(message['content']) for message in values['messages'])
  token = METER.set(limits.Meter(size))
  try:
    text = _compile(source).render(values)
    text.encode()
    return text
  except UnicodeEncodeError as error:
    reason = f'writes half of a character, \\u{ord(error.object[error.start]):04x}'
  except jinja2.TemplateError as error:
    reason = f'refuses this conversation: {error}'
  except TemplateTimeError:
    raise
  except TemplateLimitError as error:
    reason = f'is stopped: {error}'
  except RecursionError:
    reason = 'fails on this conversation: it calls itself without end, or is nested too deep'
  except Exception as error:  # a template can raise anything, as by 1 / 0
    reason = f'fails on this conversation: {type(error).__name__}: {error}'
  finally:
    METER.reset(token)
  raise UserError(f'the chat template {" ".join(reason.split())[:400]}; see data.chat_template.')


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
  if len(source) > _MAX_TEMPLATE:
    raise TemplateLimitError(f'it has {len(source):,} characters, more than {_MAX_TEMPLATE:,}')
  from transformers.utils import chat_template_utils

  # The environment that transformers renders in, with all its functions and precautions.
  theirs = chat_template_utils._compile_jinja_template('').environment
  environment = theirs.overlay(finalize=_finalize)
  environment.__class__ = _LimitedEnvironment
  environment.concat = _concat
  environment.filters = {name: _limited(name, f) for name, f in theirs.filters.items()}
  environment.tests = {name: _comparing(f) for name, f in theirs.tests.items()}
  environment.globals = {k: v for k, v in theirs.globals.items() if k != 'lipsum'}
  return environment.from_string(source)


class _LimitedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """Checks operators, calls, loops and macros of a template."""

  intercepted_binops = frozenset(('+', '*', '**', '%'))
  # Called by nodes that `_parse` adds.
  tick = staticmethod(lambda: METER.get().tick())
  comparable = staticmethod(limits.comparable)
  join_text = staticmethod(lambda *parts: _concat([_finalize(part) for part in parts]))

  def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
    tree = super()._parse(source, name, filename)
    for node in tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro, jinja2.nodes.CallBlock)):
      node.body.insert(0, jinja2.nodes.ExprStmt(_call('tick', [], node.lineno), lineno=node.lineno))
    for node in tree.find_all(jinja2.nodes.Compare):
      operands = [node, *node.ops]
      for operand in operands[:-1]:
        operand.expr = _call('comparable', [operand.expr], node.lineno)
    return _replace_concat(tree)

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    limits.check_operator(operator, left, right)
    return super().call_binop(context, operator, left, right)

  def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    if function in (self.tick, self.comparable, self.join_text):
      return function(*args)
    METER.get().look()
    # The sandbox wraps the method format.
    receiver = getattr(getattr(function, '__wrapped__', function), '__self__', None)
    if isinstance(receiver, str):
      if function.__name__ == 'join':
        args = [list(items) for items in args]
      limits.check_call(function.__name__, [receiver, *args, *kwargs.values()])
    result = super().call(context, function, *args, **kwargs)
    METER.get().add(limits.size(result))
    return result

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    # Methods of numbers and bytes can pad to any length, and no template needs them.
    is_padding = isinstance(obj, int | float | bytes) or attr in _UNSAFE_METHODS
    return not is_padding and super().is_safe_attribute(obj, attr, value)


def _call(name: str, args: list[Any], line: int) -> jinja2.nodes.Call:
  """Returns the node that calls a function of the environment."""
  function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
  return jinja2.nodes.Call(function, args, [], None, None, lineno=line)


def _replace_concat(node: jinja2.nodes.Node) -> Any:
  """Replaces every `a ~ b`, which cannot be intercepted, by a call."""
  for field, value in list(node.iter_fields()):
    if isinstance(value, jinja2.nodes.Node):
      setattr(node, field, _replace_concat(value))
    elif isinstance(value, list):
      items = [_replace_concat(v) if isinstance(v, jinja2.nodes.Node) else v for v in value]
      setattr(node, field, items)
  if isinstance(node, jinja2.nodes.Concat):
    return _call('join_text', node.nodes, node.lineno).set_environment(node.environment)
  return node


def _limited(name: str, function: Callable) -> Callable:
  """Returns a filter that checks its arguments and counts its result."""
  skipped = int(hasattr(function, 'jinja_pass_arg'))  # the environment or context

  @functools.wraps(function)
  def checked(*args: Any, **kwargs: Any) -> Any:
    if name == 'join':
      args = _join_arguments(*args, **kwargs)
      kwargs = {}
    limits.check_call(name, [*args[skipped:], *kwargs.values()])
    result = function(*args, **kwargs)
    METER.get().add(limits.size(result))
    return result

  return checked


def _join_arguments(context: Any, items: Any, separator: str = '', attribute: Any = None) -> tuple:
  """Returns the arguments of the filter join with its items as a list: a generator has no size."""
  if attribute is not None:
    items = map(jinja2.filters.make_attrgetter(context.environment, attribute), items)
  return context, list(items), separator


def _comparing(function: Callable) -> Callable:
  """Returns a test such as `is eq` that checks what it compares."""

  @functools.wraps(function)
  def checked(*args: Any) -> Any:
    if len(args) > 1:
      limits.comparable(args[0])
    return function(*args)

  return checked


def _finalize(value: Any) -> str:
  """Returns the text of an expression."""
  if type(value) is str:  # almost always
    return value
  if not isinstance(value, str | int | float | None):
    METER.get().add(limits.weigh(value))
  return str(value)


def _concat(parts: Iterable[str]) -> str:
  """Joins the parts of a text: of all output, of a macro or of a `set` block."""
  parts = list(parts)
  METER.get().add(sum(map(len, parts)))
  return ''.join(parts)
