"""The cuts of `cuts` as slow loops over Python lists, the reference for their tests.

Positions are list indices; a response is `range(begin, stop)` of its content, without the stop
token. Each function returns the first tokens of the segments. No jax here.
"""

import math


def at(content, is_start):
  """The first token, and those after it where `is_start` says so."""
  return [t for t in content if t == content.start or is_start(t)]


def low_probability(content, logprob, threshold):
  """Where the token's probability is below the threshold."""
  return at(content, lambda t: math.exp(logprob[t]) < threshold)


def score_jump(content, score, threshold):
  """Where the score differs from that of the token before by more than the threshold."""
  return at(content, lambda t: abs(score[t] - score[t - 1]) > threshold)


def shuffled(content, starts, draw):
  """The segments of `starts` one after the other, in the order of the draws at their ends."""
  ends = [*(t - 1 for t in starts[1:]), content.stop - 1]
  segments = sorted((draw[end], end - start + 1) for start, end in zip(starts, ends, strict=False))
  first, shuffled_starts = content.start, []
  for _, length in segments:
    shuffled_starts.append(first)
    first += length
  return shuffled_starts


def random(content, starts, draw, min_length):
  """As many segments as `starts`, cut at the tokens of the smallest draws.

  The candidates are the tokens but the first, without the min_length − 1 tokens that every segment
  but the last has to have beyond one: these are put back behind each start.
  """
  num_cuts = max(len(starts) - 1, 0)
  extra = min_length - 1
  candidates = list(content)[1 : len(content) - num_cuts * extra]
  cuts = sorted(sorted(candidates, key=lambda t: draw[t])[:num_cuts])
  moved = [t + extra * number for number, t in enumerate(cuts, 1)]
  return [content.start, *moved] if len(content) else []
