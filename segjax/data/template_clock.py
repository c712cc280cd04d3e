"""Fixes the date that a chat template reads from the clock.

Templates such as Llama-3.2's write the present date by `strftime_now`. A model would then be
trained, continued and used on other prompts each day. A macro of that name, put in front of the
template, writes a fixed date instead; it is part of the template, so it is kept wherever the
template is.
"""

import datetime
import re

_FUNCTION = 'strftime_now'
_MACRO = '{% macro strftime_now(format) %}'
_DIRECTIVE = re.compile(r'(?<!\{)%[-_0^#]?[A-Za-z]')


def fix_date(template: str, date: str = '') -> str:
  """Returns a template that writes a fixed date where `template` asks for the present one.

  A template whose date is fixed already stays as it is, so that all stages of a run read the date
  of the first one.

  Args:
    template: Jinja text.
    date: ISO date, with a time where the template writes one; '' is today.
  """
  if _FUNCTION not in template or template.startswith(_MACRO):
    return template
  time = datetime.datetime.fromisoformat(date or today())
  values = ''.join(
    f" | replace('{directive}', '{time.strftime(directive)}')"
    for directive in sorted(set(_DIRECTIVE.findall(template)))
  )
  # The newline keeps the template's first line a first line; transformers drops it on rendering.
  return f'{_MACRO}{{{{ format{values} }}}}{{% endmacro %}}\n{template}'


def today() -> str:
  """Returns today's ISO date."""
  return datetime.date.today().isoformat()
