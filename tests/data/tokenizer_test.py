import json

import pytest
from fixtures import tokenizers
from fixtures.tokenizers import assistant, user

from segjax.data import tokenizer as tokenizer_lib
from segjax.data.tokenizer import load_tokenizer
from segjax.data.tokenizer_files import tokenizer_fingerprint

PHI3 = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}'
)


def _tokens(chat, ids):
  return chat.tokenizer.convert_ids_to_tokens(ids)


def test_llama3_prompt_and_response(llama3):
  prompt = llama3.prompt_ids([user('hello')])
  assert llama3.decode(prompt, skip_special=False) == (
    '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n'
  )
  response = llama3.response_ids([user('hello')], 'one two')
  assert llama3.decode(response, skip_special=False) == 'one two<|eot_id|>'
  assert llama3.decode(response) == 'one two'
  assert response[-1] == llama3.stop_ids[0]
  bos = llama3.tokenizer.bos_token_id
  assert prompt.count(bos) == 1
  assert bos not in response


def test_prompt_and_response_are_tokenised_apart(tmp_path):
  # The prompt ends in 'assistant: ': as one text, that space would join the word after it.
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, tokenizers.PLAIN))
  messages = [user('hello')]
  ids = chat.prompt_ids(messages) + chat.response_ids(messages, 'fox')
  text = chat.decode(ids, skip_special=False)
  assert text.endswith('assistant: fox\n<|end_of_text|>')
  assert ids != chat.encode([text])[0]


def test_chatml_newline_after_stop_is_dropped(chatml):
  response = chatml.response_ids([user('hello')], 'one two')
  assert chatml.decode(response, skip_special=False) == 'one two<|im_end|>'
  assert '<|begin_of_text|>' not in _tokens(chatml, chatml.prompt_ids([user('hello')]))


def test_phi3_text_after_the_stop_token_is_dropped(tmp_path):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, PHI3))
  assert _tokens(chat, [chat.stop_ids[0]]) == ['<|im_end|>']
  response = chat.response_ids([user('hello')], 'one')
  assert chat.decode(response, skip_special=False) == 'one<|im_end|>'


def test_template_without_stop_gets_eos(tmp_path):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, tokenizers.PLAIN))
  assert chat.stop_ids == (chat.tokenizer.eos_token_id,)
  response = chat.response_ids([user('hello')], 'one')
  assert chat.decode(response, skip_special=False) == 'one\n<|end_of_text|>'


def test_stop_token_inside_the_words_does_not_truncate(llama3):
  response = llama3.response_ids([user('hello')], 'one<|eot_id|>two')
  assert llama3.decode(response, skip_special=False) == 'one<|eot_id|>two<|eot_id|>'


@pytest.mark.parametrize(
  'generation_eos, expected',
  [
    (None, ['<|eot_id|>', '<|end_of_text|>']),
    ('<|eom_id|>', ['<|eot_id|>', '<|end_of_text|>', '<|eom_id|>']),
    (['<|end_of_text|>', '<|eom_id|>', '<|eot_id|>'],) * 2,
  ],
  ids=['none', 'int', 'list'],
)
def test_stop_ids(tmp_path, generation_eos, expected):
  directory = tokenizers.write_tokenizer(tmp_path)
  ids = load_tokenizer(directory).tokenizer.convert_tokens_to_ids
  if generation_eos is not None:
    (tmp_path / 'generation_config.json').write_text(
      json.dumps({'eos_token_id': ids(generation_eos)})
    )
  chat = load_tokenizer(directory)
  assert _tokens(chat, chat.stop_ids)[0] == '<|eot_id|>'
  assert set(_tokens(chat, chat.stop_ids)) == set(expected)
  assert len(set(chat.stop_ids)) == len(chat.stop_ids)


def test_pad_is_pad_token_else_eos(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path)
  chat = load_tokenizer(directory)
  assert chat.pad_id == chat.tokenizer.eos_token_id
  chat.tokenizer.pad_token = '<|eom_id|>'
  chat.tokenizer.save_pretrained(directory)
  assert _tokens(chat, [load_tokenizer(directory).pad_id]) == ['<|eom_id|>']


def test_padding_and_truncation_in_the_file_are_ignored(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path)
  before = load_tokenizer(directory).encode(['hello there', 'one'])
  content = json.loads((tmp_path / 'tokenizer.json').read_text())
  content['truncation'] = {
    'direction': 'Right',
    'max_length': 2,
    'strategy': 'LongestFirst',
    'stride': 0,
  }
  (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
  assert load_tokenizer(directory).encode(['hello there', 'one']) == before


def test_template_override_text_and_file(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path / 'tokenizer', '')
  (tmp_path / 'chat.jinja').write_text(tokenizers.CHATML)
  by_file = load_tokenizer(directory, str(tmp_path / 'chat.jinja'))
  by_text = load_tokenizer(directory, tokenizers.CHATML)
  assert by_file.prompt_text([user('a')]) == by_text.prompt_text([user('a')])
  assert by_text.stop_ids == by_file.stop_ids


def test_no_template_names_directory_and_key(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path, '')
  with pytest.raises(ValueError, match=r'data\.chat_template') as error:
    load_tokenizer(directory)
  assert directory in str(error.value)


@pytest.mark.parametrize(
  'template, message',
  [
    ('no/such.jinja', 'neither Jinja text nor a file'),
    ("{% for m in messages %}{{ m['role'] }}{% endfor %}", 'leaves out'),
    ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", 'rewrites'),
    ('{{ bos_token }}' + tokenizers.LLAMA3, 'twice'),
    ("{{ raise_exception('no') }}", 'refuses this conversation: no'),
    ('{% if %}', 'refuses this conversation'),
  ],
  ids=['no_file', 'no_words', 'rewrites', 'two_bos', 'refuses', 'syntax'],
)
def test_invalid_template(tmp_path, template, message):
  directory = tokenizers.write_tokenizer(tmp_path)
  with pytest.raises(ValueError, match=message):
    load_tokenizer(directory, template)


def test_no_stop_at_all(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path, tokenizers.PLAIN, eos='')
  with pytest.raises(ValueError, match='no token ends a turn'):
    load_tokenizer(directory)


def test_missing_tokenizer(tmp_path):
  with pytest.raises(ValueError, match=r'no tokenizer\.json'):
    load_tokenizer(str(tmp_path))
  with pytest.raises(ValueError, match=r'no tokenizer\.json'):
    tokenizer_fingerprint(str(tmp_path))


def test_turn_texts_join_to_the_template(chatml):
  messages = [user('a'), assistant('b'), user('c'), assistant('d'), user('e')]
  pieces = chatml.turn_texts(messages)
  assert [text for text, is_trained in pieces if is_trained] == ['b<|im_end|>', 'd<|im_end|>']
  rendered = chatml.tokenizer.apply_chat_template(messages[:-1], tokenize=False)
  assert ''.join(text for text, _ in pieces) == rendered.removesuffix('\n')


def test_turn_texts_of_phi3_and_of_an_opening_assistant(tmp_path):
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, PHI3))
  messages = [assistant('hi'), user('a'), assistant('b'), user('c'), assistant('d')]
  pieces = chat.turn_texts(messages)
  assert [text for text, is_trained in pieces if is_trained] == ['b<|im_end|>', 'd<|im_end|>']
  assert '<|end_of_text|>' not in ''.join(text for text, _ in pieces)


def test_turn_texts_refuse_a_rewritten_history(tmp_path):
  # Only the last message keeps its words, so the first turn is gone once there is a second.
  template = tokenizers.CHATML.replace(
    "{{ m['content'] }}", "{{ m['content'] if loop.index > messages | length - 2 }}"
  )
  chat = load_tokenizer(tokenizers.write_tokenizer(tmp_path, template))
  with pytest.raises(ValueError, match='rewrites earlier turns'):
    chat.turn_texts([user('a'), assistant('b'), user('c'), assistant('d')])


def _edit(directory, change):
  file = directory / 'tokenizer.json'
  content = json.loads(file.read_text())
  change(content)
  file.write_text(json.dumps(content))


def _drop_merge(content):
  content['model']['merges'].pop()


def _rename_entry(content):
  vocab = content['model']['vocab']
  vocab['zzz'] = vocab.pop(content['model']['merges'][-1][0])


def _prefix_space(content):
  content['pre_tokenizer']['add_prefix_space'] = True


def _normalize(content):
  content['normalizer'] = {'type': 'NFC'}


def _add_token(content):
  content['added_tokens'].append(dict(content['added_tokens'][-1], id=999, content='<|new|>'))


@pytest.mark.parametrize(
  'change', [_drop_merge, _rename_entry, _prefix_space, _normalize, _add_token]
)
def test_fingerprint_depends_on_what_changes_ids(tmp_path, change):
  directory = tokenizers.write_tokenizer(tmp_path)
  before = tokenizer_fingerprint(directory)
  _edit(tmp_path, change)
  assert tokenizer_fingerprint(directory) != before


def _merges_as_strings(content):
  content['model']['merges'] = [' '.join(pair) for pair in content['model']['merges']]


def _other_sections(content):
  content.update(padding={'x': 1}, truncation={'y': 2}, post_processor={'type': 'ByteLevel'})


@pytest.mark.parametrize('change', [_merges_as_strings, _other_sections])
def test_fingerprint_ignores_the_rest(tmp_path, change):
  directory = tokenizers.write_tokenizer(tmp_path)
  before = tokenizer_fingerprint(directory)
  _edit(tmp_path, change)
  assert tokenizer_fingerprint(directory) == before


def test_ids_ending_in_a_delimiter(tmp_path):
  directory = tokenizers.write_tokenizer(tmp_path)
  chat = load_tokenizer(directory)
  chat.tokenizer.add_tokens(['. ', '.\n  ', 'e.g', ' .. '])
  chat.tokenizer.add_special_tokens({'additional_special_tokens': ['<|odd|>.']})
  delimiters = ('.', '!', '?', '\n')
  ids = chat.ids_ending_in(delimiters)
  # The string of all four is the same as the four.
  assert chat.ids_ending_in('.!?\n') == ids == tuple(sorted(ids))
  texts = {i: chat.decode([i], skip_special=False) for i in range(len(chat.tokenizer))}
  assert {texts[i] for i in ids} >= {'.', '!', '?', '\n', '. ', '.\n  ', ' .. '}
  special = set(chat.tokenizer.all_special_ids) | set(chat.encode(list(tokenizers.SPECIAL))[0])
  for i, text in texts.items():
    ends = text.rstrip(' ').endswith(delimiters)
    assert (i in ids) == (ends and not text.startswith('<|') and i not in special)
  assert any(text.endswith('|>.') for text in texts.values())
  # A newline is not a space: a text that ends in one does not end in the character before it.
  assert chat.encode(['.\n  '])[0][0] not in chat.ids_ending_in(['.'])


def test_no_token_ends_in_the_delimiter(llama3):
  # Three bytes, none of them the character.
  message = r"segmentation\.delimiters=\['。'\]: .*boundary to 'entropy'"
  with pytest.raises(ValueError, match=message):
    llama3.ids_ending_in(['。'])
  with pytest.raises(ValueError, match='no token ends in one of'):
    llama3.ids_ending_in([])


def test_fingerprint_ignores_template_and_pad_token(tmp_path):
  first = tokenizers.write_tokenizer(tmp_path / 'a')
  chat = load_tokenizer(first, tokenizers.CHATML)
  chat.tokenizer.pad_token = '<|eom_id|>'
  chat.tokenizer.save_pretrained(tmp_path / 'b')
  assert tokenizer_fingerprint(first) == tokenizer_fingerprint(str(tmp_path / 'b'))
  assert load_tokenizer(str(tmp_path / 'b')).turn_end == '<|im_end|>\n'


def test_real_tokenizer(shared_files):
  directory = str(shared_files / 'models' / 'stories260k-hf')
  with pytest.raises(ValueError, match=r'data\.chat_template'):
    load_tokenizer(directory)
  chat = load_tokenizer(
    directory, '{{ bos_token }}' + tokenizers.CHATML.replace('<|im_end|>', '</s>')
  )
  assert chat.stop_ids == (2,)
  assert chat.preamble == ''
  ends = [chat.decode([i]) for i in chat.ids_ending_in('.!?\n')]
  assert {'.', '!', '?', '\n'} <= set(ends) and not any(text[-1:].isalpha() for text in ends)
  assert chat.prompt_ids([user('Once upon a time')])[0] == 1
  assert chat.response_ids([user('a')], 'there was')[-1] == 2
  assert chat.decode(chat.response_ids([user('a')], 'there was')) == 'there was'


def test_modules_stay_free_of_jax():
  for name in ('tokenizer', 'chat_template', 'sources', 'files'):
    text = (tokenizer_lib.epath.Path(tokenizer_lib.__file__).parent / f'{name}.py').read_text()
    assert 'import jax' not in text
    assert 'from jax' not in text
