"""Responses in the tokens of a policy or reference, scored by a reward model that reads text.

`text_scoring` runs the model; rewards and advantages are computed from the scores as ever.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from segjax import processes
from segjax.config.settings import Compat
from segjax.data.row_forms import Message
from segjax.data.token_texts import token_texts
from segjax.data.tokenizer import ChatTokenizer
from segjax.model import host_memory
from segjax.train.recipe import PPORecipe
from segjax.train.reward_scoring import SegmentScorer, reference_signal
from segjax.train.reward_shaping import segment_responses
from segjax.train.rollout import CollectedRollout
from segjax.train.scoring import ModelOutputs
from segjax.train.segmenter import Segmenter, segment_batch
from segjax.train.text_scoring import NOT_READ, TextScorer, character_ends
from segjax.types import PreferenceBatch, Rollout, Segments, Sequences


class CutResponses(NamedTuple):
  """Responses in the policy's tokens, on the host, and where their segments end.

  Attributes:
    ids: token ids, those of a prompt may be among them.
    mask: True on the tokens of the response.
    end: True on the last token of each segment.
    finished: whether the last token of a response is a stop token.
  """

  ids: Int[np.ndarray, 'B T']
  mask: Bool[np.ndarray, 'B T']
  end: Bool[np.ndarray, 'B T']
  finished: Bool[np.ndarray, 'B']


class TextResponses(NamedTuple):
  """The same as text, without special tokens.

  Attributes:
    texts: the responses.
    ends: the characters that each segment ends behind, at its last token, as in
      `TextScorer.tokenize`; NOT_READ at other tokens.
  """

  texts: list[str]
  ends: Int[np.ndarray, 'B T']


@dataclasses.dataclass(frozen=True)
class TextReward:
  """A reward model that reads the responses of a policy as text.

  Attributes:
    scorer: the reward model.
    tokenizer: of the policy.
  """

  scorer: TextScorer
  tokenizer: ChatTokenizer

  @functools.cached_property
  def _known(self) -> dict[int, str]:
    return {}

  def _split(self, ids: Sequence[int]) -> list[str]:
    return token_texts(ids, self.tokenizer.decode, self._known)

  def carry_over(self, responses: CutResponses) -> TextResponses:
    """Returns the responses as text, the same for all models that read those of this policy."""
    ids = [row[mask] for row, mask in zip(responses.ids, responses.mask, strict=True)]
    ends = character_ends(ids, responses.end, responses.mask, responses.finished, self._split)
    return TextResponses([self.tokenizer.decode(row) for row in ids], ends)

  def score(
    self,
    params: Any,
    prompts: Sequence[Sequence[Message]],
    responses: TextResponses,
    batch_size: int = 0,
  ) -> tuple[Float[Array, 'B T'], Float[Array, 'B']]:
    """Returns raw scores at the last tokens of segments, 0 elsewhere, and of the prompts.

    The passes are dispatched; nothing waits for them. A model that reads tags has no score of a
    prompt: it is 0.

    Args:
      params: of the reward model, on the devices or in host memory.
      prompts: messages of each response's prompt; empty for plain text.
      responses: of `carry_over`.
      batch_size: texts at once; 0 for all.

    Raises:
      UserError: the reward model's chat template refuses a prompt.
    """
    # The score of the prompt, in front of all others; a process model has none.
    first = NOT_READ if self.scorer.marks.tag else 0
    ends = np.pad(responses.ends, ((0, 0), (1, 0)), constant_values=first)
    own = host_memory.to_device(params)
    score = self.scorer.score(own, prompts, responses.texts, ends, batch_size)
    return score[:, 1:], score[:, 0]


def cut_responses(
  collected: CollectedRollout,
  outputs: ModelOutputs,
  segmenter: Segmenter | None,
  compat: Compat,
) -> CutResponses:
  """Returns the responses of a rollout, with segments as `reward_shaping` finds them.

  Args:
    collected: the responses.
    outputs: of the networks that read the policy's tokens; this waits for them.
    segmenter: how to segment; None to end a segment at every token, a stop token too.
    compat: with force_eos the last token of every response is a stop token.
  """
  mask, end = collected.response_mask, collected.response_mask
  if segmenter is not None:
    segments = _segments(collected.arrays, outputs, segmenter=segmenter, compat=compat)
    end = processes.to_host(segments.end)
  return CutResponses(collected.response_ids, mask, end, collected.finished | compat.force_eos)


@functools.partial(jax.jit, static_argnames=('segmenter', 'compat'))
def _segments(
  rollout: Rollout, outputs: ModelOutputs, *, segmenter: Segmenter, compat: Compat
) -> Segments:
  return segment_responses(rollout, outputs, outputs.score, segmenter, compat)


def add_text_scores(
  texts: Mapping[str, TextReward],
  params: dict[str, Any],
  outputs: ModelOutputs,
  collected: CollectedRollout,
  prompts: Sequence[Sequence[Message]],
  recipe: PPORecipe,
) -> ModelOutputs:
  """Returns the outputs with the scores of the reward models that read text.

  Responses are cut once for all models that are read at the same segments.

  Args:
    texts: these models, by the names of their networks.
    params: parameters by name.
    outputs: outputs of the other networks, which this waits for.
    collected: the responses.
    prompts: messages of each response's prompt.
    recipe: how responses are segmented.
  """
  sources = {source.key: source for source in recipe.rewards}
  cuts: dict[Segmenter, TextResponses] = {}
  for name, text in texts.items():
    source, segmenter = sources.get(name), recipe.segmenter
    if source is not None and recipe.shaping.mix == 'token':
      segmenter = source.segmenter
    if segmenter not in cuts:
      cuts[segmenter] = text.carry_over(cut_responses(collected, outputs, segmenter, recipe.compat))
    batch_size = recipe.ppo.scoring_batch_size
    score, of_prompt = text.score(params[name], prompts, cuts[segmenter], batch_size)
    if source is None:
      outputs = outputs._replace(score=score, prompt_score=of_prompt)
    else:
      outputs = outputs._replace(scores=(outputs.scores or {}) | {source.name: score})
  return outputs


@dataclasses.dataclass(frozen=True)
class TextSegments:
  """Segments of rows of data in the tokens of a reference, scored by a model that reads text.

  Attributes:
    reward: the reward model, and the tokenizer of the reference.
    scorer: the reference, and how responses are segmented; its reward model is not run.
  """

  reward: TextReward
  scorer: SegmentScorer

  def add_scores(
    self,
    params: Any,
    reference: Any,
    sequences: Sequences,
    prompts: Sequence[Sequence[Message]],
  ) -> Sequences:
    """Returns the sequences with what their boundaries read, and the scores of their segments.

    `reward_scoring` computes from them what it does from a reward model of the same tokenizer.

    Args:
      params: of the reward model.
      reference: parameters of the reference; None where it is not run.
      sequences: prompts and responses.
      prompts: messages of each prompt.

    Raises:
      UserError: the reward model's chat template refuses a prompt.
    """
    signal, end = _cut(reference, sequences, scorer=self.scorer)
    return self._read(params, dataclasses.replace(sequences, ref_signal=signal), prompts, end)

  def _read(
    self,
    params: Any,
    sequences: Sequences,
    prompts: Sequence[Sequence[Message]],
    end: Bool[Array, 'B S'],
  ) -> Sequences:
    arrays = processes.to_host((sequences.ids, sequences.response_mask, end, sequences.finished))
    score, _ = self.reward.score(params, prompts, self.reward.carry_over(CutResponses(*arrays)))
    return dataclasses.replace(sequences, score=score)

  def add_pair_scores(
    self,
    params: Any,
    reference: Any,
    pairs: PreferenceBatch,
    prompts: Sequence[Sequence[Message]],
  ) -> PreferenceBatch:
    """Returns the pairs with those of both sides; arguments as in `add_scores`."""
    chosen, rejected = (
      self.add_scores(params, reference, side, prompts) for side in (pairs.chosen, pairs.rejected)
    )
    return dataclasses.replace(pairs, chosen=chosen, rejected=rejected)

  def option_reader(
    self, messages: Callable[[int], Sequence[Message]]
  ) -> Callable[[dict[str, Any], Sequences, np.ndarray, Array], Sequences]:
    """Returns `best_of_n.Search.read_text` for prompts that `messages` returns by their number.

    A tag stands behind each segment of an option, and behind the part so far of one that goes on.
    """

    def read(params, options, numbers, end):
      prompts = [messages(int(number)) for number in numbers]
      return self._read(params['reward'], options, prompts, end)

    return read


@functools.partial(jax.jit, static_argnames='scorer')
def _cut(
  reference: Any, sequences: Sequences, *, scorer: SegmentScorer
) -> tuple[Float[Array, 'B S'], Bool[Array, 'B S']]:
  """Returns (what boundaries read of the reference, where segments end)."""
  signal = reference_signal(reference, sequences, scorer)
  mask, finished = sequences.response_mask, sequences.finished
  return signal, segment_batch(sequences.ids, mask, finished, signal, scorer.segmenter).end
