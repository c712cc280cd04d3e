"""The few calls that a notebook needs: load a policy or a reward model, sample, read, score.

Thin: texts are read by `evaluation.annotate`, responses come from `model.generate`. Nothing is
trained here, and nothing written.

A text is a string, which is taken as it stands, after the token that begins texts; or a list of
messages {'role', 'content'}, which the chat template writes, and whose last message, for what is
said about a response, is the assistant's.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from segjax import processes
from segjax.config.parse import check_key, from_config
from segjax.config.settings import Segmentation, SegmentationOverrides, Settings
from segjax.data.batches import pad_rows
from segjax.data.sources import Message, as_conversation
from segjax.data.tokenizer import MissingChatTemplateError
from segjax.errors import UserError
from segjax.evaluation import annotate
from segjax.evaluation.annotate import AnnotatedResponse, Annotator
from segjax.model.generate import GenerationOptions, generate, make_decode_config
from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import make_mesh
from segjax.run.stage import Stage
from segjax.train.rollout import sampling
from segjax.train.segmenter import make_segmenter
from segjax.types import PromptBatch

# Or messages; `Any`, so that something else is answered by the checks here.
Text = str | Any

_MAX_NEW_TOKENS = 128
_ROWS = 8  # texts read at once, at most, but for one per device


@dataclasses.dataclass(frozen=True)
class Response:
  """What a policy said.

  Attributes:
    text: without special tokens.
    tokens: the text of each token, the stop token included where there is one.
    logprob: log π of each token, nats, unfiltered and at temperature 1.
    finished: whether a stop token ended it, not the limit.
  """

  text: str
  tokens: list[str]
  logprob: list[float]
  finished: bool


@dataclasses.dataclass(frozen=True)
class Read:
  """A text as a policy reads it; every list has an entry for each token of the response.

  Attributes:
    tokens: the text of each token, special tokens included.
    logprob: log π(token given what is before it), nats.
    entropy: of the distribution that the token was drawn from, nats.
  """

  tokens: list[str]
  logprob: list[float]
  entropy: list[float]


def load_policy(
  path: str, *, dtype: str = 'float32', chat_template: str = '', mesh: Mesh | None = None
) -> 'Policy':
  """A policy from an HF directory or a hub id.

  Args:
    dtype: of weights and arithmetic, float32 or bfloat16.
    chat_template: Jinja text or a file; '' takes the tokenizer's own. Strings need none.
    mesh: devices; None takes all, the weights split over them.

  Raises:
    ValueError: there is no such checkpoint, or it is none that is read here.
  """
  named = {'policy.path': path, 'runtime.compute_dtype': dtype, 'data.chat_template': chat_template}
  return Policy(*_load('policy', named, mesh))


def load_reward_model(
  path: str,
  *,
  reference: str,
  segmentation: Segmentation | SegmentationOverrides | None = None,
  dtype: str = 'float32',
  chat_template: str = '',
  mesh: Mesh | None = None,
) -> 'RewardModel':
  """A reward model, and the SFT model whose entropies cut its texts.

  Args:
    path: HF directory or hub id; its segment_reward.json says how to cut and to normalise.
    reference: the SFT model, likewise.
    segmentation: fields that are not None replace those of segment_reward.json.
    dtype: see `load_policy`, as for the others.

  Raises:
    ValueError: a checkpoint is not there or has no scalar head, or the tokenizers differ.
  """
  named = {
    'policy.path': reference,
    'reward_model.path': path,
    'reward_model.segmentation': dataclasses.asdict(segmentation or SegmentationOverrides()),
    'runtime.compute_dtype': dtype,
    'data.chat_template': chat_template,
  }
  return RewardModel(*_load('reward', named, mesh))


@dataclasses.dataclass(frozen=True)
class _Model:
  stage: Stage
  reader: Annotator
  has_template: bool

  def _texts(self, texts: Sequence[Text]) -> list[tuple[list[Message], str]]:
    """(prompt, response) of each; the prompt of a string is empty."""
    found = []
    for number, text in enumerate(_listed(texts), 1):
      if isinstance(text, str):
        found.append(([], text))
        continue
      messages = self._messages(text, number)
      if messages[-1]['role'] != 'assistant':
        raise UserError(f'text {number}: the last message is not the assistant’s.')
      found.append((messages[:-1], messages[-1]['content']))
    return found

  def _messages(self, text: Sequence[Message], number: int) -> list[Message]:
    messages = as_conversation({'messages': list(text)}, f'text {number}')
    if not self.has_template:
      raise UserError(
        f'text {number} is a conversation, but the tokenizer has no chat template; give '
        'chat_template=... when the model is loaded, or strings.'
      )
    return messages

  def _annotated(self, reader: Annotator, texts: Sequence[Text]) -> list[AnnotatedResponse]:
    found = self._texts(texts)
    return list(annotate.annotate(self.stage, reader, found, _batch(self.stage.mesh, len(found))))


class Policy(_Model):
  """A language model that answers, reads and cuts. Made by `load_policy`."""

  def sample(
    self, prompts: Sequence[Text], *, samples: int = 1, seed: int = 0, **how: Any
  ) -> list[Response]:
    """Responses to prompts, the `samples` of one prompt next to each other.

    The random numbers of a response depend on the seed, on its prompt's place and on its number
    alone: the same call says the same.

    Args:
      prompts: strings that are continued, or messages that are answered.
      samples: responses per prompt.
      how: fields of `settings.Rollout`: temperature (0 for the likeliest token), top_k, top_p,
        min_new_tokens, max_new_tokens (128 here), slots.

    Raises:
      ValueError: an unknown field, or a prompt that is empty or leaves no room for a response.
    """
    prompts = _listed(prompts)
    how = {'max_new_tokens': _MAX_NEW_TOKENS} | how
    rollout = _settings({f'rollout.{key}': value for key, value in how.items()}).rollout
    if samples < 1:
      raise UserError(f'samples={samples} must be at least 1.')
    if not prompts:
      return []
    ids = [self._prompt_ids(prompt, number) for number, prompt in enumerate(prompts, 1)]
    length = np.array([len(row) for row in ids], np.int32)
    padded, _ = pad_rows(ids, int(length.max()), self.reader.tokenizer.pad_id)
    tokenizer, mesh = self.reader.tokenizer, self.stage.mesh
    config = self.reader.configs['policy']
    found = generate(
      self.reader.params['policy'],
      PromptBatch(padded, length),
      jax.random.key(seed),
      decoder=make_decode_config(config, sampling(rollout), tokenizer.stop_ids, mesh),
      mesh=mesh,
      options=GenerationOptions(rollout.max_concurrent, samples),
    )
    if found.non_finite.any():
      row = int(np.argmax(found.non_finite)) // samples + 1
      raise UserError(f'prompt {row}: logits are not finite; the weights of the policy are spoilt.')
    return [self._response(found, row) for row in range(len(found.response_ids))]

  def logprobs(self, texts: Sequence[Text]) -> list[Read]:
    """Log-probs and entropies of each text's tokens, of a conversation its last message's.

    Raises:
      ValueError: a text that is too long, or a conversation that does not end in an answer.
    """
    texts, found = self._texts(texts), []
    size = _batch(self.stage.mesh, len(texts))
    for batch in annotate.batches(self.stage, self.reader, texts, size):
      arrays = processes.to_host(
        _logprobs(self.reader.params['policy'], batch.sequences.ids, self.reader.configs['policy'])
      )
      for row, (ids, span) in enumerate(zip(batch.responses, batch.spans, strict=True)):
        tokens = [self.reader.tokenizer.decode([i], skip_special=False) for i in ids]
        found.append(Read(tokens, *([float(v) for v in x[row, span]] for x in arrays)))
    return found

  def segment(self, texts: Sequence[Text], **how: Any) -> list[AnnotatedResponse]:
    """Each text cut where this model is unsure what comes next, with its tokens' entropies.

    Args:
      how: fields of `settings.Segmentation`: entropy_threshold (2 nats), granularity, cut, ...

    Raises:
      ValueError: an unknown field, or a text as in `logprobs`.
    """
    named = {f'reward.segmentation.{key}': value for key, value in how.items()}
    cutter = make_segmenter(_settings(named).reward.segmentation, self.reader.tokenizer)
    return self._annotated(dataclasses.replace(self.reader, cutter=cutter), texts)

  def _prompt_ids(self, prompt: Text, number: int) -> list[int]:
    tokenizer = self.reader.tokenizer
    if not isinstance(prompt, str):
      return tokenizer.prompt_ids(self._messages(prompt, number))
    begin = tokenizer.tokenizer.bos_token_id
    ids = ([] if begin is None else [begin]) + tokenizer.encode([prompt])[0]
    if not ids:
      raise UserError(
        f'prompt {number} is empty, and the tokenizer has no token that begins texts.'
      )
    return ids

  def _response(self, found: Any, row: int) -> Response:
    at = found.response_mask[row]
    ids, decode = found.response_ids[row][at], self.reader.tokenizer.decode
    return Response(
      text=decode(ids),
      tokens=[decode([i], skip_special=False) for i in ids],
      logprob=[float(x) for x in found.logprob[row][at]],
      finished=bool(found.finished[row]),
    )


class RewardModel(_Model):
  """A segment reward model with the model that cuts for it. Made by `load_reward_model`."""

  def score(self, texts: Sequence[Text]) -> list[AnnotatedResponse]:
    """The segments of each text: `score` as it comes from the network, `reward` normalised.

    `reward` is None where segment_reward.json has no normaliser.

    Raises:
      ValueError: a text that is too long, or a conversation that does not end in an answer.
    """
    return self._annotated(self.reader, texts)


def _load(name: str, named: dict[str, Any], mesh: Mesh | None) -> tuple[Stage, Annotator, bool]:
  stage = annotate.stage_of(name, _settings(named), mesh or make_mesh())
  with jax.set_mesh(stage.mesh):
    try:
      return stage, annotate.load(stage), True
    except MissingChatTemplateError:
      named = named | {'data.chat_template': annotate.PLAIN}
      stage = dataclasses.replace(stage, settings=_settings(named))
      return stage, annotate.load(stage), False


def _settings(named: dict[str, Any]) -> Settings:
  """The defaults with dotted keys replaced, checked as those of a config are."""
  values = dataclasses.asdict(Settings(stages=('chat',)))
  for key, value in named.items():
    check_key(key)
    *sections, last = key.split('.')
    functools.reduce(dict.__getitem__, sections, values)[last] = value
  return from_config(ConfigDict(values))


def _listed(texts: Sequence[Text]) -> list[Text]:
  """The texts, if they are a list of them and not one."""
  if isinstance(texts, str) or (texts and isinstance(texts[0], dict)):
    raise UserError('give a list of texts; this is a single one: put it in brackets.')
  return list(texts)


def _batch(mesh: Mesh, texts: int) -> int:
  """Rows at once: few for few texts, and as many as divide over the devices."""
  rows = min(_ROWS, 1 << max(texts - 1, 0).bit_length())
  return -(-rows // mesh.size) * mesh.size


@functools.partial(jax.jit, static_argnums=2)
def _logprobs(params: Any, ids: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
  return token_logprobs(params, ids, config)
