"""Texts cut into segments as the models see them: entropies, cuts, and what each segment earns."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from segjax import processes
from segjax.config.settings import Segmentation
from segjax.config.training_settings import resolve_std_floor_ratio
from segjax.data.batches import pad_rows
from segjax.data.sources import Message, Rows, as_conversation
from segjax.data.tokenizer import ChatTokenizer, load_tokenizer
from segjax.errors import UserError
from segjax.model.heads import scores, token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.report.response_log import AnnotatedResponse, make_segments, token_texts
from segjax.rl.normalizer import normalize
from segjax.run import inputs, models
from segjax.run.stage import Stage
from segjax.train import reward_spec
from segjax.train.segmenter import Segmenter, make_segmenter, segment_batch
from segjax.types import Normalizer, Segments, Sequences

# Plain text is read without a template, but a tokenizer is only read with one.
PLAIN = '{% for message in messages %}{{ message.content }}{% endfor %}'
_LEAST = 64  # tokens that rows are padded to, or twice, four times, ... as many


@dataclasses.dataclass(frozen=True)
class Annotator:
  """The models that read, and how they cut.

  Attributes:
    configs: by name: 'policy', and 'reward' if there is one.
    params: the same.
    normalizer: of the scores; None where it is not known.
  """

  tokenizer: ChatTokenizer
  configs: dict[str, LlamaConfig]
  params: dict[str, Any]
  cutter: Segmenter
  normalizer: Normalizer | None


def load(stage: Stage) -> Annotator:
  """config.policy.path cuts; config.reward_model.path, where given, scores.

  The segmentation is that of the reward model's segment_reward.json, if it has one, overruled field
  by field by config.reward_model.segmentation.
  """
  s = stage.settings
  paths = {'policy': inputs.resolve_checkpoint(s.policy.path, 'policy.path')}
  stored = None
  if s.reward_model.path:
    paths['reward'] = inputs.resolve_checkpoint(s.reward_model.path, 'reward_model.path')
    stored = reward_spec.read_spec(paths['reward'])
    reward_spec.check_tokenizer(paths['policy'], paths['reward'])
  base = stored.segmentation if stored else Segmentation()
  segmentation = reward_spec.override(base, s.reward_model.segmentation)
  tokenizer = load_tokenizer(str(paths['policy']), s.data.chat_template)
  configs = models.load_network_configs(paths, s.runtime, stage.mesh, stage.log)
  heads = {'policy': 'language', 'reward': 'scalar'}
  return Annotator(
    tokenizer=tokenizer,
    configs=configs,
    params={
      name: models.load_params(path, configs[name], heads[name], s.runtime, stage.mesh)
      for name, path in paths.items()
    },
    cutter=make_segmenter(segmentation, tokenizer),
    normalizer=stored.normalizer if stored else None,
  )


def of_rows(rows: Rows) -> Iterator[tuple[list[Message], str]]:
  """(prompt, response) of conversations or of the chosen side of preferences.

  Raises:
    ValueError: a row whose last message is not the assistant's.
  """
  for index, row in enumerate(rows):
    messages = as_conversation(row, rows.location(index))
    if messages[-1]['role'] != 'assistant':
      raise UserError(f'{rows.location(index)}: the last message is not the assistant’s.')
    yield messages[:-1], messages[-1]['content']


def annotate(
  stage: Stage, reader: Annotator, texts: Sequence[tuple[list[Message], str]], batch: int = 8
) -> Iterator[AnnotatedResponse]:
  """The texts in their order, so many at a time.

  Args:
    texts: (prompt, response); an empty prompt stands for plain text, without a chat template.

  Raises:
    ValueError: a text longer than the networks' positions.
  """
  for group in batches(stage, reader, texts, batch):
    found = _read_batch(stage, reader, group.sequences)
    for row, (text, ids, span) in enumerate(
      zip(group.texts, group.responses, group.spans, strict=True)
    ):
      yield _annotated(reader, *text, ids, [x[row, span] for x in found])


class Batch(NamedTuple):
  """Texts as token ids.

  Attributes:
    texts: (prompt, response) of each.
    responses: token ids of each response.
    spans: where in its row each response stands.
    sequences: the rows on the mesh, padded to one of few sizes; there may be more than texts.
  """

  texts: Sequence[tuple[list[Message], str]]
  responses: list[list[int]]
  spans: list[slice]
  sequences: Sequences


def batches(
  stage: Stage, reader: Annotator, texts: Sequence[tuple[list[Message], str]], batch: int
) -> Iterator[Batch]:
  """The texts as `annotate` takes them, `batch` rows at a time.

  Raises:
    ValueError: a text longer than the networks' positions.
  """
  most = min(config.max_position_embeddings for config in reader.configs.values())
  for begin in range(0, len(texts), batch):
    chunk = texts[begin : begin + batch]
    encoded = [_encode(reader.tokenizer, *text) for text in chunk]
    for number, (prompt, response) in enumerate(encoded, begin + 1):
      if len(prompt) + len(response) > most:
        raise UserError(
          f'text {number} has {len(prompt) + len(response)} tokens, the networks {most} positions.'
        )
    spans = [slice(len(prompt), len(prompt) + len(response)) for prompt, response in encoded]
    responses = [response for _, response in encoded]
    yield Batch(chunk, responses, spans, _sequences(stage, reader, encoded, batch, most))


def _encode(tokenizer: ChatTokenizer, prompt: list[Message], response: str) -> list[list[int]]:
  """Token ids of (prompt, response); plain text follows the token that begins texts."""
  if not prompt:
    begin = tokenizer.tokenizer.bos_token_id
    return [[] if begin is None else [begin], tokenizer.encode([response])[0]]
  return [tokenizer.prompt_ids(prompt), tokenizer.response_ids(prompt, response)]


def _sequences(
  stage: Stage, reader: Annotator, encoded: list[list[list[int]]], batch: int, most: int
) -> Sequences:
  longest = max(len(prompt) + len(response) for prompt, response in encoded)
  size = min(most, max(_LEAST, 1 << (longest - 1).bit_length()))
  pairs = [*encoded, *[([], [])] * (batch - len(encoded))]
  rows = [prompt + response for prompt, response in pairs]
  ids, is_real = pad_rows(rows, size, reader.tokenizer.pad_id)
  prompt_length = np.array([len(prompt) for prompt, _ in pairs])
  mask = is_real & (np.arange(size) >= prompt_length[:, None])
  stop_ids = reader.tokenizer.stop_ids
  finished = np.array([bool(r) and r[-1] in stop_ids for _, r in pairs])
  return Sequences(*map(stage.to_device, (ids, mask, finished)))


def _read_batch(stage: Stage, reader: Annotator, sequences: Sequences) -> list[np.ndarray]:
  """(entropy, segment id, score, reward) at every token, [batch, S] each, on the host."""
  entropy, segments, score, reward = processes.to_host(
    _read(
      reader.params,
      sequences,
      reader.normalizer or Normalizer(),
      policy=reader.configs['policy'],
      reward=reader.configs.get('reward'),
      cutter=reader.cutter,
      std_floor_ratio=resolve_std_floor_ratio(stage.settings.reward_shaping),
    )
  )
  return [entropy, segments.segment_id, score, reward]


@functools.partial(jax.jit, static_argnames=('policy', 'reward', 'cutter', 'std_floor_ratio'))
def _read(
  params: dict[str, Any],
  sequences: Sequences,
  normalizer: Normalizer,
  *,
  policy: LlamaConfig,
  reward: LlamaConfig | None,
  cutter: Segmenter,
  std_floor_ratio: float | None,
) -> tuple[jax.Array, Segments, jax.Array, jax.Array]:
  ids, mask = sequences.ids, sequences.response_mask
  _, entropy = token_logprobs(params['policy'], ids, policy)
  segments = segment_batch(ids, mask, sequences.finished, entropy, cutter)
  score = entropy * 0 if reward is None else scores(params['reward'], ids, reward)
  z = jax.vmap(functools.partial(normalize, std_floor_ratio=std_floor_ratio), (0, 0, None))
  return entropy, segments, score, z(score, segments, normalizer)


def _annotated(
  reader: Annotator,
  prompt: list[Message],
  text: str,
  ids: list[int],
  found: list[np.ndarray],
) -> AnnotatedResponse:
  entropy, segment_id, score, reward = found
  has_reward = 'reward' in reader.configs
  ends = [np.flatnonzero(segment_id == k)[-1] for k in range(int(segment_id.max(initial=-1)) + 1)]
  segments = make_segments(
    token_texts(ids, reader.tokenizer),
    segment_id,
    entropy,
    score if has_reward else None,
    normalized_score=reward[ends] if has_reward and reader.normalizer else None,
  )
  return AnnotatedResponse(prompt, text, segments)


def stage_of(stage_name: str, settings: Any, mesh: Any) -> Stage:
  """A stage that writes nothing, for reading alone."""
  return Stage(stage_name, settings, Path('.'), mesh)
