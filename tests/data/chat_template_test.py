"""The system turn that a template inserts; other rendering is tested with the tokenizer."""

import pytest
from fixtures import tokenizers
from fixtures.tokenizers import user

from segjax.data import chat_template
from segjax.data.tokenizer import load_tokenizer


def test_preamble_is_the_turn_that_the_template_inserts(tmp_path, llama3, llama31, chatml):
  header = '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n'
  block = header + 'Today: 26 Jul 2024\n\n<|eot_id|>'
  assert llama31.preamble == block
  turn = '<|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>'
  assert llama31.prompt_text([user('hello')]).startswith(block + turn)
  assert llama3.preamble == chatml.preamble == ''  # BOS alone is not a turn
  directory = tokenizers.write_tokenizer(tmp_path)
  injected = load_tokenizer(directory, tokenizers.CHATML_SYSTEM)
  assert injected.preamble == '<|im_start|>system\nBe kind.<|im_end|>\n'
  # Without a stop token in the template the end of a turn is not recognised.
  assert load_tokenizer(directory, "{{ 'Be kind.\n' }}" + tokenizers.PLAIN).preamble == ''
  # A template that leaves out the user's words.
  silent = "{% for m in messages %}{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}"
  assert load_tokenizer(directory, silent + '<|eot_id|>{% endfor %}').preamble == ''


def test_preamble_where_bos_is_the_stop_token(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path, tokenizers.LLAMA3, eos='<|begin_of_text|>')
  template = tokenizers.LLAMA3.replace('<|eot_id|>', '<|begin_of_text|>')
  chat = load_tokenizer(directory, template)
  assert chat.turn_end == '<|begin_of_text|>'
  assert chat.preamble == ''


def test_a_template_file_that_is_not_text(tmp_path):
  (tmp_path / 'bytes.jinja').write_bytes(b'\xff\xfe{{ a }}')
  (tmp_path / 'device.jinja').symlink_to('/dev/zero')
  with pytest.raises(ValueError, match='is not UTF-8 text'):
    chat_template.load_template(str(tmp_path / 'bytes.jinja'), None)
  with pytest.raises(ValueError, match='is not a file; give a file with Jinja text'):
    chat_template.load_template(str(tmp_path / 'device.jinja'), None)
