"""The constants of a PPO run or an evaluation, as one static argument of the jitted steps."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from segjax.config.settings import PPO, Compat, RewardShaping
from segjax.model.llama import LlamaConfig
from segjax.train.segmenter import Segmenter


@dataclasses.dataclass(frozen=True)
class RewardSource:
  """A reward model of config.rewards, beside that of `PPORecipe.reward`.

  Attributes:
    name: of its part in the reward.
    key: of its network, among those of a recipe.
    network: the network.
    segmenter: where its scores are read.
    spread: a name in `rl.spreads.SPREADS`.
    weight: factor in the sum of all rewards.
    reads_text: it reads text, see `text_scoring`.
  """

  name: str
  key: str
  network: LlamaConfig
  segmenter: Segmenter
  spread: str
  weight: float
  reads_text: bool = False


@dataclasses.dataclass(frozen=True)
class PPORecipe:
  """The networks, how responses are segmented, how scores become rewards, how PPO learns.

  Attributes:
    reward: the reward model that reads the policy's tokens; None without one.
    reward_lm: the language model that rewards tokens as `shaping.lm_reward` says; None without one.
    critic: the critic; None if `ppo.has_critic` is False.
    spread: a name in `rl.spreads.SPREADS`.
    recompute_logprob: takes `old_logprob` from a full forward pass instead of the decode loop.
    one_base: networks that add adapters to the reference's weights, and itself; they are scored in
      one pass over these weights. () where none does.
    samples_per_prompt: responses to one prompt, in adjacent rows of a rollout.
    rewards: further reward models; there are none without a first one.
    reads_text: scores come from a reward model that reads text, see `text_scoring`; `reward` is
      None then.
  """

  policy: LlamaConfig
  reference: LlamaConfig
  reward: LlamaConfig | None
  critic: LlamaConfig | None
  segmenter: Segmenter
  spread: str
  shaping: RewardShaping
  ppo: PPO
  compat: Compat = dataclasses.field(default_factory=Compat)
  recompute_logprob: bool = False
  reward_lm: LlamaConfig | None = None
  one_base: tuple[str, ...] = ()
  samples_per_prompt: int = 1
  rewards: tuple[RewardSource, ...] = ()
  reads_text: bool = False

  @property
  def has_scores(self) -> bool:
    """Whether there is a reward model."""
    return self.reward is not None or self.reads_text

  def network(self, name: str) -> LlamaConfig:
    """Returns a network by its name: a field of the recipe, or the key of one of `rewards`."""
    return {source.key: source.network for source in self.rewards}.get(name) or getattr(self, name)

  def groups(self, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Returns the networks of these names in groups of those that are run together."""
    together = tuple(name for name in names if name in self.one_base)
    alone = [(name,) for name in names if name not in self.one_base]
    return [together, *alone] if together else alone

  def own_params(self, params: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters by name, with the backbone of a shared base in the reference alone."""
    others = [name for name in self.one_base if name in params and name != 'reference']
    return params | {
      name: {part: tree for part, tree in params[name].items() if part != 'backbone'}
      for name in others
    }

  def with_base(self, name: str, params: dict[str, Any]) -> Any:
    """Returns the parameters of a network out of `own_params`."""
    if name not in self.one_base:
      return params[name]
    return params['reference'] | params[name]
