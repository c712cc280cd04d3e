import pytest
from fixtures import tokenizers
from fixtures.tokenizers import assistant, user

from segjax.data.tokenizer import load_tokenizer

MESSAGES = [user(' hello '), assistant('one'), user('two')]


@pytest.mark.parametrize('name, template', [('llama3', tokenizers.LLAMA3)])
def test_llama3(tmp_path, name, template):
  directory = tokenizers.write_tokenizer(tmp_path, '')
  chat, expected = load_tokenizer(directory, name), load_tokenizer(directory, template)
  assert chat.prompt_text(MESSAGES) == expected.prompt_text(MESSAGES)
  assert chat.stop_ids == expected.stop_ids


def test_chatml(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path, '')
  chat, expected = load_tokenizer(directory, 'chatml'), load_tokenizer(directory, tokenizers.CHATML)
  assert chat.prompt_text(MESSAGES) == '<|begin_of_text|>' + expected.prompt_text(MESSAGES)
  assert chat.stop_ids == expected.stop_ids
  chat.tokenizer.bos_token = '<|im_start|>'  # as SmolLM2's
  chat.tokenizer.save_pretrained(directory)
  chat = load_tokenizer(directory, 'chatml')
  assert chat.prompt_text(MESSAGES) == expected.prompt_text(MESSAGES)


@pytest.mark.parametrize('name', ['llama3', 'chatml'])
def test_a_tokenizer_without_their_tokens_ends_turns_by_its_own(shared_files, name):
  chat = load_tokenizer(str(shared_files / 'models' / 'stories260k-hf'), name)
  assert chat.stop_ids == (2,)
  assert chat.turn_close == '</s>'
  assert chat.response_ids([user('a')], 'there was').count(2) == 1
