"""Templates without end or limit are stopped; sound ones write what transformers writes."""

import resource
import time

import pytest
from fixtures import tokenizers
from fixtures.tokenizers import assistant, system, user

from segjax.data import chat_template, template_limits, template_sandbox
from segjax.data.tokenizer import load_tokenizer
from segjax.errors import UserError

VALUES = {'messages': [user('hello'), assistant('x' * 1000)], 'add_generation_prompt': True}
REPEAT = (
  '{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}'
)
GROW = REPEAT.replace('START', '[1]').replace('NEXT', '[ns.x, ns.x]')
DOUBLE = REPEAT.replace('START', "'aa'")
TIME, SIZE, LIST = (
  'seconds; is there a loop',
  'more than 20,000,000 characters',
  'a list of more than',
)

HOSTILE = {
  'division by zero': ('{{ 1 / 0 }}', 'ZeroDivisionError: division by zero'),
  'recursion': ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'calls itself without end'),
  'recursive loop': ('{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}', 'without end'),
  'tree': (
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}',
    TIME,
  ),
  'include': ("{% include 'x' %}", 'no loader'),
  'import': ("{% import 'x' as x %}", 'no loader'),
  'extends': ("{% extends 'x' %}", 'no loader'),
  'loops': (
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
    TIME,
  ),
  'loops that skip': (
    '{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}',
    TIME,
  ),
  'filters in loops': (
    "{% for i in range(9999) %}{{ range(99999)|select('odd')|list|length }}{% endfor %}",
    TIME,
  ),
  'range': ('{% for i in range(10**9) %}{% endfor %}', 'OverflowError: Range too big'),
  'repeated text': ("{{ 'a' * 10**10 }}", SIZE),
  'repeated list': ('{% set x = [0] * 10**9 %}', SIZE),
  'power': ('{{ 9 ** (9 ** 9) }}', 'more than 100,000 bits'),
  'doubled by ~': (DOUBLE.replace('NEXT', 'ns.x ~ ns.x'), SIZE),
  'doubled by +': (DOUBLE.replace('NEXT', 'ns.x + ns.x'), SIZE),
  'doubled by %': (DOUBLE.replace('NEXT', "'%s%s' % (ns.x, ns.x)"), SIZE),
  'doubled by format': (DOUBLE.replace('NEXT', "'{0}{0}'.format(ns.x)"), SIZE),
  'doubled by join': (DOUBLE.replace('NEXT', '[ns.x, ns.x] | join'), SIZE),
  'doubled by replace': (DOUBLE.replace('NEXT', "ns.x | replace('a', 'aa')"), SIZE),
  'doubled by set': (
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    '{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}',
    SIZE,
  ),
  'shared list': (GROW + '{{ ns.x }}', LIST),
  'shared list as JSON': (GROW + '{{ ns.x | tojson }}', LIST),
  'shared list as string': (GROW + '{{ ns.x | string }}', LIST),
  'shared list formatted': (GROW + "{{ '{}'.format(ns.x) }}", LIST),
  'shared lists compared': (GROW + GROW.replace('ns', 'm') + '{{ ns.x == m.x }}', LIST),
  'shared lists tested': (GROW + GROW.replace('ns', 'm') + '{{ ns.x is eq(m.x) }}', LIST),
  'namespace': (GROW + '{{ ns }}', 'a namespace into text'),
  'center': ("{{ 'a' | center(10**10) }}", SIZE),
  'method': ("{{ 'a'.ljust(10**10) }}", SIZE),
  'indent': (r"{{ ('a\n' * 99999) | indent(99999) }}", SIZE),
  'indent of JSON': ('{{ [1, [2]] | tojson(indent=10**10) }}', SIZE),
  'width': ("{{ '%09999999999d' % 1 }}", SIZE),
  'width of format': ("{{ '{:>9999999999}'.format(1) }}", SIZE),
  'width as argument': ("{{ '{:{w}}'.format(1, w=10**10) }}", SIZE),
  'replace': ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", SIZE),
  'replace nothing': ("{{ ('a' * 99999) | replace('', 'b' * 99999) }}", SIZE),
  'join': ("{{ range(4000) | join('b' * 99999) }}", SIZE),
  'join method': ("{{ ('b' * 99999).join(['a'] * 4000) }}", SIZE),
  'translate': ("{{ ('a' * 99999).translate({97: 'x' * 99999}) }}", 'unsafe'),
  'bytes of a number': ("{{ (5).to_bytes(10**10, 'big') }}", 'unsafe'),
  'lipsum': ('{{ lipsum(n=10**6) }}', "'lipsum' is undefined"),
  'batch': ('{{ [1] | batch(10**10, 0) | list }}', SIZE),
  'rounding': ("{{ 1.5 | round(10**9, 'ceil') }}", SIZE),
  'long template': ('{{ a }}' * 40_000, '280,000 characters'),
  'brackets': ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', 'nested too deep'),
  'blocks': ('{% for i in [1] %}' * 30 + '{% endfor %}' * 30, 'nested blocks'),
  'escape': ("{{ ''.__class__.__mro__ }}", 'unsafe'),
  'undefined': ('{{ a.b }}', "'a' is undefined"),
  'syntax': ('{% if %}', 'Expected an expression'),
  'half of a character': (r"{{ '\ud83d' }}", r'half of a character, \ud83d'),
  'refusal of two lines': (r"{{ raise_exception('a\nb') }}", 'refuses this conversation: a b;'),
}


@pytest.fixture
def quick(monkeypatch):
  """Lower limits, whose checks take less of the tests' time."""
  monkeypatch.setattr(template_limits, '_SECONDS', 0.2)
  monkeypatch.setattr(template_limits, '_MAX_ELEMENTS', 5000)


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_templates_end_in_one_line(kind, quick):
  template, part = HOSTILE[kind]
  template_sandbox.render('', VALUES)  # imports transformers
  start, memory = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(UserError) as error:
    template_sandbox.render(template, VALUES)
  assert time.thread_time() - start < 1.5
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10
  message = str(error.value)
  assert message.startswith('the chat template ') and part in message
  assert '\n' not in message and len(message) < 500


@pytest.mark.parametrize('kind', ['loops', 'shared list'])
def test_the_limits_are_below_a_second(kind):
  start = time.thread_time()
  with pytest.raises(UserError):
    template_sandbox.render(HOSTILE[kind][0], VALUES)
  assert time.thread_time() - start < 1.5


SOUND = {
  'llama3': tokenizers.LLAMA3,
  'llama31': tokenizers.LLAMA31,
  'chatml': tokenizers.CHATML_SYSTEM,
  'functions': (
    "{%- macro header(role, end='\\n') -%}<|{{ role ~ '|' + '>' }}{{ end }}{%- endmacro -%}\n"
    '{%- set ns = namespace(n=0, last=none) -%}\n'
    '{%- if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif -%}\n'
    '{% for m in messages if m.content != "skip" %}\n'
    '  {%- set ns.n = ns.n + 1 -%}\n'
    "  {%- if m['role'] == 'system' %}{% continue %}{% endif -%}\n"
    "  {{- header(m.role) }}{{ m.content.split('</think>')[-1].lstrip('\\n') | trim }}\n"
    "  {%- if loop.last and m.role in ['user', 'tool'] and not false %}{% break %}{% endif %}\n"
    "  {% generation %}{{ '%s-%03d' % (m.role | upper, ns.n ** 2 % 7) }}{% endgeneration %}\n"
    '{% endfor %}'
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | join('+', 'role') }}"
    "{{ ', '.join(messages | map(attribute='role')) }}{{ '{:>8}|{}'.format('a', 1) }}"
    "{{ messages | tojson }}{{ {'a': [1, 2.5, none, true]} }}{{ messages[1:] | length }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 3 * 'ab' ~ 2 ** 10 }}"
    "{{ 'a' | center(9) }}{{ 'x y' | title | replace('X', 'é') }}{{ 7 / 2 }}{{ -7 // 2 }}{{ no }}"
    '{% set text %}{% filter upper %}block{% endfilter %}{% endset %}{{ text }}{{ [[1] * 3] * 2 }}'
    '{% macro box() %}[{{ caller() }}]{% endmacro %}{% call box() %}b{% endcall %}'
    '{{ bos_token }}{{ dict(a=1).items() | list }}'
  ),
}


@pytest.mark.parametrize('kind', SOUND)
@pytest.mark.parametrize('has_header', [True, False])
def test_sound_templates_write_what_transformers_writes(kind, has_header, tmp_path):
  tokenizer = load_tokenizer(tokenizers.write_tokenizer(tmp_path)).tokenizer
  tokenizer.chat_template = SOUND[kind]
  answer = assistant('<think>\nb</think>\n\nc')
  messages = [system('s\n'), user(' a '), answer, user('skip'), user('d')]
  expected = tokenizer.apply_chat_template(
    messages, tokenize=False, add_generation_prompt=has_header
  )
  assert chat_template.render(tokenizer, messages, has_header) == expected


def test_long_conversations_are_rendered():
  """Limits grow with the conversation, also where a template adds it up piece by piece."""
  messages = [user('a' * 250), assistant('b' * 250)] * 2000
  template = (
    "{% set ns = namespace(text='') %}{% for m in messages %}{% if m['role'] in ['user'] %}"
    "{% set ns.text = ns.text ~ m['content'] | trim %}{% endif %}{{ m['content'].strip() }}"
    '{% endfor %}{{ messages | tojson | length }}'
  )
  text = template_sandbox.render(template, {'messages': messages[:400]})
  assert text.startswith('a' * 250 + 'b' * 250)
  text = template_sandbox.render(tokenizers.LLAMA3, {'messages': messages})
  assert text.count('<|eot_id|>') == 4000
