"""A template that reads the clock renders one date, and keeps it where the template is kept."""

import datetime

from fixtures import tokenizers
from fixtures.tokenizers import user

from segjax.data.batches import split_holdout
from segjax.data.limits import Limits
from segjax.data.sources import Rows
from segjax.data.template_clock import fix_date, today
from segjax.data.tokenize import tokenize_conversations, tokenize_pairs, tokenize_prompts
from segjax.data.tokenizer import load_tokenizer

# As in Llama-3.2's template: white space control, an `is defined`, a literal percent sign.
DATED = (
  '{{- bos_token }}\n{%- if not date_string is defined %}\n  {%- if strftime_now is defined %}\n'
  '    {%- set date_string = strftime_now("%d %b %Y") %}\n  {%- endif %}\n{%- endif %}\n'
  '  {% if true %}\n 100%d on {{ date_string }} {% endif %}{{ strftime_now("%H:%M") }}\n'
)


def _render(directory, template):
  tokenizer = load_tokenizer(directory).tokenizer
  tokenizer.chat_template = template
  return tokenizer.apply_chat_template([user('a')], tokenize=False)


def test_a_fixed_date_renders_as_the_present_one_did(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path)
  fixed = _render(directory, fix_date(DATED, '2024-07-26T09:05'))
  assert '26 Jul 2024 09:05' in fixed
  now = datetime.datetime.now()
  expected = _render(directory, DATED.replace('strftime_now("%H:%M")', "'09:05'"))
  assert fixed.replace('26 Jul 2024', now.strftime('%d %b %Y')) == expected


def test_the_date_stays_fixed():
  fixed = fix_date(DATED, '2024-07-26')
  assert fix_date(fixed, '2030-01-01') == fixed
  assert fix_date(DATED) == fix_date(DATED, today())
  assert fix_date(tokenizers.LLAMA3, '2024-07-26') == tokenizers.LLAMA3


def test_the_tokenizer_has_the_date_in_its_template(tmp_path):
  template = tokenizers.LLAMA31.replace('26 Jul 2024', '{{ strftime_now("%d %b %Y") }}')
  directory = tokenizers.write_tokenizer(tmp_path, template)
  chat = load_tokenizer(directory, date='2024-07-26')
  assert chat.prompt_text([user('a')]).startswith(
    '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n'
  )
  again = load_tokenizer(directory, chat.chat_template, '2030-01-01')
  assert again.prompt_text([user('a')]) == chat.prompt_text([user('a')])


def test_the_date_does_not_decide_what_is_held_out(tmp_path):
  template = tokenizers.LLAMA31.replace('26 Jul 2024', '{{ strftime_now("%d %b %Y") }}')
  directory = tokenizers.write_tokenizer(tmp_path, template)
  rows = [{'prompt': f'hello {i}', 'chosen': 'one', 'rejected': 'two'} for i in range(40)]
  source, limits = Rows(rows, 'rows.jsonl'), Limits(512, 256)
  held_out = {}
  for date in ('2024-07-26', '2024-07-27'):
    chat = load_tokenizer(directory, date=date)
    held_out[date] = [
      split_holdout(read(source, chat, limits), 0.2, 0)[1].group.tolist()
      for read in (tokenize_pairs, tokenize_prompts, tokenize_conversations)
    ]
  assert held_out['2024-07-26'] == held_out['2024-07-27']
  # All three read the same prompts, so they hold out the same ones.
  assert held_out['2024-07-26'][0] == held_out['2024-07-26'][1] == held_out['2024-07-26'][2]
