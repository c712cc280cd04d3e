"""Computes the implicit rewards of responses by DPO, from the log-probs of policy and reference."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float

from segjax.model.heads import token_logprobs
from segjax.model.llama import LlamaConfig
from segjax.model.packed import run_packed
from segjax.rl.lm_rewards import implicit_reward
from segjax.train.reward_scoring import PairScorer, interleave
from segjax.types import PackingSlots, PreferenceBatch


@dataclasses.dataclass(frozen=True)
class ImplicitScorer(PairScorer):
  """Scores a response by β Σ_t (log π - log π_ref).

  Attributes:
    policy: the trained network, π.
    reference: π_ref.
    beta: β.
  """

  policy: LlamaConfig
  reference: LlamaConfig
  beta: float

  @property
  def networks(self) -> dict[str, LlamaConfig]:
    """The networks by name."""
    return {'policy': self.policy, 'reference': self.reference}

  def score_pairs(
    self, params: Any, reference: Any, pairs: PreferenceBatch, slots: PackingSlots | None = None
  ) -> tuple[Float[Array, 'B 2'], dict[str, Float[Array, 'B']]]:
    """Returns (implicit rewards of chosen and rejected, both again for the metrics)."""
    sequences = interleave(pairs)
    logprob, _ = run_packed(token_logprobs, params, sequences.ids, self.policy, slots)
    frozen, _ = run_packed(token_logprobs, reference, sequences.ids, self.reference, slots)
    reward = implicit_reward(
      logprob, jax.lax.stop_gradient(frozen), sequences.response_mask, self.beta
    ).reshape(-1, 2)
    return reward, {'chosen_reward': reward[:, 0], 'rejected_reward': reward[:, 1]}
