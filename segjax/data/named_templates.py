"""Chat templates that data.chat_template names: Llama-3's and ChatML.

Where a tokenizer lacks the token that ends a turn, its own EOS token ends turns instead: written as
text, the end of a turn would be several tokens, none of which can stop a response.
"""

from typing import Any

_LLAMA3 = (
  '{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}'
  "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
  '{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n'
  '{% endif %}'
)
# Some tokenizers with ChatML's tokens have <|im_start|> as BOS; it is written once.
_CHATML = (
  "{% if bos_token is defined and bos_token != '<|im_start|>' %}{{ bos_token }}{% endif %}"
  "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
  '{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
_TEMPLATES = {'llama3': (_LLAMA3, '<|eot_id|>'), 'chatml': (_CHATML, '<|im_end|>')}

NAMES = tuple(_TEMPLATES)


def make_template(name: str, tokenizer: Any) -> str:
  """Returns the template of that name for a tokenizer."""
  template, stop = _TEMPLATES[name]
  if stop in tokenizer.get_vocab() or not tokenizer.eos_token:
    return template
  return template.replace(stop, tokenizer.eos_token)
