"""Determines from a chat template how an assistant's turn ends, and by which tokens."""

from typing import Any, NamedTuple

from segjax.data import chat_template as templates
from segjax.errors import UserError


class TurnEnd(NamedTuple):
  """The end of an assistant's turn.

  Attributes:
    stop_ids: tokens that end a response; the first is the one that closes a turn.
    text: text that the template writes after an assistant's words.
    close: beginning of `text`, up to and including the stop token, that a response keeps.
  """

  stop_ids: tuple[int, ...]
  text: str
  close: str


def find_turn_end(tokenizer: Any, generation_stops: list[int]) -> TurnEnd:
  """Renders a short conversation and determines from it how an assistant's turn ends.

  Args:
    tokenizer: tokenizer with the chat template.
    generation_stops: ids that end a response by generation_config.json.

  Raises:
    ValueError: no token ends a turn, or the template changes earlier turns.
  """
  messages = [{'role': 'user', 'content': 'Hello'}]
  prompt = templates.render(tokenizer, messages, True)
  _check_bos(tokenizer, prompt)
  answered = templates.render(
    tokenizer, [*messages, {'role': 'assistant', 'content': templates.PROBE}], False
  )
  if not answered.startswith(prompt):
    raise UserError(templates.template_rewrites_error(prompt, answered))
  _, probe, turn_end = answered[len(prompt) :].rpartition(templates.PROBE)
  if not probe:
    raise UserError("the chat template leaves out the assistant's words; check data.chat_template.")
  eos = tokenizer.eos_token_id
  candidates = {*tokenizer.added_tokens_decoder, *generation_stops, eos}
  ids = tokenizer(turn_end, add_special_tokens=False)['input_ids'] if turn_end else []
  stop = next((i for i in ids if i in candidates), None)
  if stop is not None:
    token = tokenizer.convert_ids_to_tokens(stop)
    turn_close = turn_end[: turn_end.index(token) + len(token)]
  elif eos is not None:
    stop, turn_close = eos, turn_end + tokenizer.eos_token
  else:
    raise UserError(
      'no token ends a turn: the chat template writes none and the tokenizer has no eos_token; set '
      'data.chat_template to one that closes the turn.'
    )
  others = [i for i in (eos, *generation_stops) if i is not None]
  return TurnEnd(tuple(dict.fromkeys([stop, *others])), turn_end, turn_close)


def _check_bos(tokenizer: Any, prompt: str) -> None:
  ids = tokenizer(prompt, add_special_tokens=False)['input_ids']
  bos = tokenizer.bos_token_id
  if bos is not None and ids[:2] == [bos, bos]:
    raise UserError(
      f'the chat template begins with {tokenizer.bos_token!r} twice; set data.chat_template to one '
      'that writes it once.'
    )
