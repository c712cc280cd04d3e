"""A tiny byte-level tokenizer and chat templates, built on the spot."""

import json
from pathlib import Path

LLAMA3 = (
  '{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}'
  "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
  '{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n'
  '{% endif %}'
)
# As Llama-3.1's, it writes a system turn of its own, into which the conversation's goes.
LLAMA31 = (
  "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set own = messages[0]['content'] %}"
  "{% set messages = messages[1:] %}{% else %}{% set own = '' %}{% endif %}"
  '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n{{ own }}<|eot_id|>'
) + LLAMA3.replace('{% if loop.first %}{{ bos_token }}{% endif %}', '')
CHATML = (
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
# As Qwen's, it writes a system turn where there is none.
CHATML_SYSTEM = (
  "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
  + CHATML
)
PLAIN = (
  "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
  '{% if add_generation_prompt %}assistant: {% endif %}'
)

SPECIAL = (
  '<|begin_of_text|>',
  '<|end_of_text|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
  '<|eot_id|>',
  '<|eom_id|>',
  '<|im_start|>',
  '<|im_end|>',
)
_TEXT = [
  'user assistant system',
  'hello there, how are you?',
  'the quick brown fox',
  'one two three',
]


def write_tokenizer(
  directory: Path, template: str = LLAMA3, generation_eos=None, eos: str = '<|end_of_text|>'
) -> str:
  """Writes tokenizer.json, its config and perhaps generation_config.json; returns the directory."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
  from transformers import PreTrainedTokenizerFast

  core = Tokenizer(models.BPE())
  core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  core.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  core.train_from_iterator(_TEXT, trainer)
  core.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
  tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, bos_token='<|begin_of_text|>', eos_token=eos or None
  )
  tokenizer.chat_template = template or None
  tokenizer.save_pretrained(directory)
  if generation_eos is not None:
    content = json.dumps({'eos_token_id': generation_eos})
    (Path(directory) / 'generation_config.json').write_text(content)
  return str(directory)


def system(text: str) -> dict[str, str]:
  return {'role': 'system', 'content': text}


def user(text: str) -> dict[str, str]:
  return {'role': 'user', 'content': text}


def assistant(text: str) -> dict[str, str]:
  return {'role': 'assistant', 'content': text}
