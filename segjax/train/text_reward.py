"""The scores of a rollout by a reward model that reads text.

`text_scoring` runs the model; rewards and advantages are computed from the scores as ever.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from segjax import processes
from segjax.data.row_forms import Message
from segjax.data.token_texts import token_texts
from segjax.data.tokenizer import ChatTokenizer
from segjax.model import host_memory
from segjax.train.recipe import PPORecipe
from segjax.train.reward_shaping import segment_responses
from segjax.train.rollout import CollectedRollout, response_tokens
from segjax.train.scoring import ModelOutputs
from segjax.train.text_scoring import NOT_READ, TextScorer, character_ends
from segjax.types import Rollout, Segments


@functools.partial(jax.jit, static_argnames='recipe')
def _segments(rollout: Rollout, outputs: ModelOutputs, *, recipe: PPORecipe) -> Segments:
  return segment_responses(rollout, outputs, outputs.score, recipe.segmenter, recipe.compat)


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

  def add_scores(
    self,
    params: dict[str, Any],
    outputs: ModelOutputs,
    collected: CollectedRollout,
    prompts: Sequence[Sequence[Message]],
    recipe: PPORecipe,
  ) -> ModelOutputs:
    """Returns the outputs with raw scores at the last tokens of segments, and of the prompts.

    The segments are those of the policy's tokens, by the outputs of the reference, which this waits
    for. The reward model's passes are dispatched.

    Args:
      params: parameters by name, 'reward' among them.
      outputs: outputs of the other networks.
      collected: the responses.
      prompts: messages of each response's prompt.
      recipe: how responses are segmented.
    """
    end = processes.to_host(_segments(collected.arrays, outputs, recipe=recipe).end)
    ids = response_tokens(collected)
    ends = character_ends(
      ids,
      end,
      collected.response_mask,
      collected.finished | recipe.compat.force_eos,
      self._split,
    )
    # The score of the prompt, in front of all others; a process model has none.
    first = NOT_READ if self.scorer.marks.tag else 0
    ends = np.pad(ends, ((0, 0), (1, 0)), constant_values=first)
    responses = [self.tokenizer.decode(row) for row in ids]
    size = recipe.ppo.scoring_batch_size
    own = host_memory.to_device(params['reward'])
    score = self.scorer.score(own, prompts, responses, ends, size)
    return outputs._replace(score=score[:, 1:], prompt_score=score[:, 0])
