"""Rewards from log-probs as slow loops over Python lists, see `oracle`. No jax here."""

import math


def implicit_reward(logprobs, ref_logprobs, mask, beta):
  """Reward of one response: beta times the log of how much likelier π makes it."""
  total = 0.0
  for logprob, ref_logprob, is_response in zip(logprobs, ref_logprobs, mask, strict=True):
    if is_response:
      total += logprob - ref_logprob
  return beta * total


def dpo_loss(chosen, rejected, margin=0.0, label_smoothing=0.0):
  """Cross-entropy of the preference, which is right with probability 1 - label_smoothing."""
  probability = 1 / (1 + math.exp(-(chosen - rejected - margin)))
  wrong = label_smoothing * math.log(1 - probability) if label_smoothing else 0.0
  return -(1 - label_smoothing) * math.log(probability) - wrong


def token_rewards(logprobs, others, mask, coef, clip=None):
  """Rewards of tokens; `others` are of the reference, or of the policy for a teacher."""
  rewards = []
  for logprob, other, is_response in zip(logprobs, others, mask, strict=True):
    reward = coef * (logprob - other) if is_response else 0.0
    if clip is not None:
      reward = min(max(reward, -clip), clip)
    rewards.append(reward)
  return rewards


def pooled(rewards, spans):
  """Sums over the segments, each at its last token; `spans` are (first, last) tokens."""
  sums = [0.0] * len(rewards)
  for first, last in spans:
    for t in range(first, last + 1):
      sums[last] += rewards[t]
  return sums
