"""The constants of a PPO run or an evaluation, as one static argument of the jitted steps."""

import dataclasses
from collections.abc import Iterable

from segjax.config.settings import PPO, Compat, RewardShaping
from segjax.model.llama import LlamaConfig
from segjax.train.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class PPORecipe:
  """The networks, how responses are segmented, how scores become rewards, how PPO learns.

  Attributes:
    reward: the reward model; None where rewards come from a custom reward alone.
    critic: the critic; not read where no values are computed, as in an evaluation.
    spread: a name in `rl.rewards.SPREADS`.
    recompute_logprob: takes `old_logprob` from a full forward pass instead of the decode loop.
    one_base: networks that add adapters to one base, and are scored in one pass over its weights.
  """

  policy: LlamaConfig
  reference: LlamaConfig
  reward: LlamaConfig | None
  critic: LlamaConfig
  segmenter: Segmenter
  spread: str
  shaping: RewardShaping
  ppo: PPO
  compat: Compat = dataclasses.field(default_factory=Compat)
  recompute_logprob: bool = False
  one_base: tuple[str, ...] = ()

  def groups(self, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the networks of these names in groups of those that are run together."""
    together = tuple(name for name in names if name in self.one_base)
    alone = [(name,) for name in names if name not in self.one_base]
    return [together, *alone] if together else alone
