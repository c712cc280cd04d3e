"""The method once more, as slow loops over Python lists, to hold the shipped arrays against.

Positions are list indices; a response is `range(begin, stop)`, stop token included. No jax here.
"""

import math


def run_of(mask):
  """(begin, stop) of the one run of True; (0, 0) if there is none."""
  real = [t for t, is_real in enumerate(mask) if is_real]
  return (real[0], real[-1] + 1) if real else (0, 0)


def segment_ends(entropy_after, mask, finished, granularity, threshold):
  """Last tokens of the segments, by the scan of the paper's code.

  `entropy_after[j]` is of the distribution predicted AT j, for token j + 1. The scan runs up to
  `last`, the stop token; an unfinished response is followed by one in thought.
  """
  begin, stop = run_of(mask)
  last = stop - 1 if finished else stop
  if last <= begin:
    return []
  if granularity == 'bandit':
    return [stop - 1]
  if granularity == 'token':
    return list(range(begin, last))
  ends = []
  for j in range(begin, last + 1):
    if j < len(entropy_after) and entropy_after[j] > threshold:
      ends.append(j)
  if not ends:
    return [last - 1]
  if ends[-1] == last:
    if len(ends) > 1 and ends[-2] == last - 1:
      ends.pop()
    else:
      ends[-1] = last - 1
  elif ends[-1] < last - 1:
    ends.append(last - 1)
  return ends


def spans(ends, begin):
  """(first, last) token of each segment."""
  return [(ends[i - 1] + 1 if i else begin, end) for i, end in enumerate(ends)]


def mean_std(p, normalizer, std_floor=None):
  """Mean and Std at position p; the normaliser is (w_mean, w_std, b_mean, b_std)."""
  w_mean, w_std, b_mean, b_std = normalizer
  log_p = math.log(p + 1e-10)
  mean, std = w_mean * log_p + b_mean, w_std * log_p + b_std
  if std_floor is not None:
    std = max(std, std_floor)
  return mean, std


def segment_z(score, ends, normalizer, std_floor=None):
  """Normalised reward of each segment."""
  z = []
  for index, end in enumerate(ends):
    mean, std = mean_std((index + 1) / len(ends), normalizer, std_floor)
    z.append((score[end] - mean) / std)
  return z


def spread(z, ends, mask, how):
  """One reward per token from one z per segment."""
  begin, stop = run_of(mask)
  reward = [0.0] * len(mask)
  if how == 'bandit':
    if z:
      reward[stop - 1] = sum(z) / len(z)
    return reward
  for z_t, (first, last) in zip(z, spans(ends, begin), strict=True):
    for t in range(first, last + 1):
      if how == 'even_split':
        reward[t] = z_t / (last - first + 1)
      elif how == 'repeat' or t == last:
        reward[t] = z_t
  return reward


def bin_moments(position, score):
  """{key: (count, mean, std)} by the position printed with three decimals."""
  bins = {}
  for p, value in zip(position, score, strict=True):
    bins.setdefault(f'{p:.3f}', []).append(value)
  moments = {}
  for key, values in sorted(bins.items()):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    moments[key] = (len(values), mean, math.sqrt(variance))
  return moments


def gae(reward, value, mask, gamma, gae_lambda):
  """Advantages, by their definition as a discounted sum of temporal differences."""
  begin, stop = run_of(mask)
  advantage = [0.0] * len(mask)
  for t in range(begin, stop):
    for k in range(t, stop):
      next_value = value[k + 1] if k + 1 < stop else 0.0
      delta = reward[k] + gamma * next_value - value[k]
      advantage[t] += (gamma * gae_lambda) ** (k - t) * delta
  return advantage


def whiten(rows, masks):
  """Rows shifted and scaled together to mean 0 and variance 1."""
  pairs = [pair for row in zip(rows, masks, strict=True) for pair in zip(*row, strict=True)]
  real = [x for x, is_real in pairs if is_real]
  if not real:
    return [[0.0] * len(row) for row in rows]
  mean = sum(real) / len(real)
  variance = max(sum((x - mean) ** 2 for x in real) / len(real), 1e-8)
  return [
    [(x - mean) / math.sqrt(variance) if m else 0.0 for x, m in zip(row, mask, strict=True)]
    for row, mask in zip(rows, masks, strict=True)
  ]


def mean_of_means(rows, masks):
  """Mean over non-empty sequences of the mean over their tokens."""
  means = []
  for row, mask in zip(rows, masks, strict=True):
    real = [x for x, m in zip(row, mask, strict=True) if m]
    if real:
      means.append(sum(real) / len(real))
  return sum(means) / len(means) if means else 0.0


def policy_loss(logprob, old_logprob, advantage, mask, clip_eps):
  """(loss, mean ratio) of PPO's clipped surrogate."""
  ratios, surrogates = [], []
  for new_row, old_row, advantage_row in zip(logprob, old_logprob, advantage, strict=True):
    ratio = [math.exp(new - old) for new, old in zip(new_row, old_row, strict=True)]
    ratios.append(ratio)
    surrogates.append(
      [
        min(rho * a, min(max(rho, 1 - clip_eps), 1 + clip_eps) * a)
        for rho, a in zip(ratio, advantage_row, strict=True)
      ]
    )
  return -mean_of_means(surrogates, mask), mean_of_means(ratios, mask)


def value_loss(value, old_value, return_, mask, clip_eps):
  """Half the larger of the clipped and the unclipped squared error."""
  errors = []
  for rows in zip(value, old_value, return_, strict=True):
    row = []
    for v, old, target in zip(*rows, strict=True):
      clipped = old + min(max(v - old, -clip_eps), clip_eps)
      row.append(max((v - target) ** 2, (clipped - target) ** 2))
    errors.append(row)
  return 0.5 * mean_of_means(errors, mask)


def logprob_and_entropy(logits, target):
  """Log-prob of the target and entropy of softmax(logits)."""
  log_total = math.log(sum(math.exp(x) for x in logits))
  logprobs = [x - log_total for x in logits]
  return logprobs[target], -sum(math.exp(x) * x for x in logprobs)
