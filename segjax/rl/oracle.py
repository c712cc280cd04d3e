"""The method as slow loops over Python lists, the reference for tests of the array functions.

Positions are list indices; a response is `range(begin, stop)`, stop token included. No jax here.
"""

import math
import statistics


def run_of(mask):
  """(begin, stop) of the one run of True; (0, 0) if there is none."""
  real = [t for t, is_real in enumerate(mask) if is_real]
  return (real[0], real[-1] + 1) if real else (0, 0)


def segment_ends(
  entropy_after, mask, finished, granularity, threshold, min_length=1, stop_inside=False
):
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
    ends = list(range(begin, last))
  else:
    ends, length = [], 0
    for j in range(begin, last + 1):
      length += 1
      if j < len(entropy_after) and entropy_after[j] > threshold and length >= min_length:
        ends.append(j)
        length = 0
    if not ends:
      ends.append(last - 1)
    elif ends[-1] == last:
      if len(ends) > 1 and ends[-2] == last - 1:
        ends.pop()
      else:
        ends[-1] = last - 1
    elif ends[-1] < last - 1:
      ends.append(last - 1)
  if stop_inside and finished:
    ends[-1] = last
  return ends


def spans(ends, begin):
  """(first, last) token of each segment."""
  return [(ends[i - 1] + 1 if i else begin, end) for i, end in enumerate(ends)]


def sequence_score(scores, aggregation, temperature=1.0):
  """One score out of those of the segments."""
  if not scores:
    return 0.0
  if aggregation == 'softmax':
    weights = [math.exp((x - max(scores)) / temperature) for x in scores]
    return sum(w * x for w, x in zip(weights, scores, strict=True)) / sum(weights)
  total = sum(scores)
  return {
    'mean': total / len(scores),
    'sum': total,
    'min': min(scores),
    'max': max(scores),
    'last': scores[-1],
  }[aggregation]


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


def spread(z, ends, mask, kind, aggregation='mean', temperature=1.0):
  """One reward per token from one z per segment."""
  begin, stop = run_of(mask)
  reward = [0.0] * len(mask)
  if kind == 'bandit':
    if z:
      reward[stop - 1] = sequence_score(z, aggregation, temperature)
    return reward
  for z_t, (first, last) in zip(z, spans(ends, begin), strict=True):
    for t in range(first, last + 1):
      if kind == 'even_split':
        reward[t] = z_t / (last - first + 1)
      elif kind == 'repeat' or t == last:
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


def red(score, prompt_score, ends, baseline):
  """What each segment adds to the score of the text, at its last token."""
  reward = [0.0] * len(score)
  before = prompt_score if baseline == 'prompt' else 0.0
  for end in ends:
    reward[end] = score[end] - before
    before = score[end]
  return reward


def end_penalty(dense, mask, finished, kind, value):
  """Unfinished responses are penalised at every token or at the last."""
  begin, stop = run_of(mask)
  penalised = list(dense)
  for t in range(begin, stop):
    if not finished and kind == 'per_token':
      penalised[t] = value
    if not finished and kind == 'at_eos' and t == stop - 1:
      penalised[t] += value
  return penalised


def length_penalty(dense, mask, kind, value, threshold):
  """Long responses are penalised at every token, or at those beyond the threshold."""
  begin, stop = run_of(mask)
  penalised = list(dense)
  for t in range(begin, stop):
    if kind == 'threshold' and stop - begin > threshold:
      penalised[t] = value
    if kind == 'linear' and t - begin >= threshold:
      penalised[t] += value
  return penalised


def shaped_reward(dense, kl, mask, kl_coef, clip=10.0):
  """Clamped, then less the KL penalty."""
  return [
    min(max(r, -clip), clip) - max(kl_coef, 0) * k if m else 0.0
    for r, k, m in zip(dense, kl, mask, strict=True)
  ]


def gae(reward, value, mask, gamma, gae_lambda):
  """Advantages, from the last masked token back to the first."""
  advantage = [0.0] * len(mask)
  next_value = next_advantage = 0.0
  for t in reversed(range(len(mask))):
    if mask[t]:
      delta = reward[t] + gamma * next_value - value[t]
      advantage[t] = delta + gamma * gae_lambda * next_advantage
      next_value, next_advantage = value[t], advantage[t]
  return advantage


def macro_gae(reward, value, action_start, mask, gamma, gae_lambda):
  """Advantages of runs of tokens: each run is made one step, and its tokens get what it gets."""
  actions = []
  for t, is_real in enumerate(mask):
    if is_real and (action_start[t] or not actions):
      actions.append([t])
    elif is_real:
      actions[-1].append(t)
  rewards = [sum(reward[t] for t in action) for action in actions]
  values = [value[action[0]] for action in actions]
  advantage = [0.0] * len(mask)
  for action, a in zip(
    actions, gae(rewards, values, [True] * len(actions), gamma, gae_lambda), strict=True
  ):
    for t in action:
      advantage[t] = a
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


def batch_mean(rows, masks, mean='sequence'):
  """Mean over all real tokens, or over non-empty sequences of the mean over their tokens."""
  terms = []
  for row, mask in zip(rows, masks, strict=True):
    real = [x for x, m in zip(row, mask, strict=True) if m]
    if mean == 'token':
      terms += real
    elif real:
      terms.append(sum(real) / len(real))
  return sum(terms) / len(terms) if terms else 0.0


def policy_loss(
  logprob, old_logprob, advantage, mask, low, high=None, dual_clip=None, mean='sequence'
):
  """(loss, mean ratio, share of tokens beyond the clip) of PPO's clipped surrogate.

  Its parameters, more than seven, are those of `losses.policy_loss`.
  """
  high = low if high is None else high
  ratios, surrogates, beyond = [], [], []
  for new_row, old_row, advantage_row in zip(logprob, old_logprob, advantage, strict=True):
    ratio = [math.exp(new - old) for new, old in zip(new_row, old_row, strict=True)]
    surrogate = []
    for rho, a in zip(ratio, advantage_row, strict=True):
      term = min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
      if dual_clip is not None and a < 0:
        term = max(term, dual_clip * a)
      surrogate.append(term)
    ratios.append(ratio)
    surrogates.append(surrogate)
    beyond.append([float(not 1 - low <= rho <= 1 + high) for rho in ratio])
  loss = -batch_mean(surrogates, mask, mean)
  return loss, batch_mean(ratios, mask, mean), batch_mean(beyond, mask, mean)


def importance_weights(old_logprob, sample_logprob, clip):
  """min(π_old / q, clip) of each token."""
  rows = zip(old_logprob, sample_logprob, strict=True)
  return [[min(math.exp(p - q), clip) for p, q in zip(*row, strict=True)] for row in rows]


def value_loss(value, old_value, return_, mask, clip_eps, mean='sequence'):
  """Half the larger of the clipped and the unclipped squared error."""
  errors = []
  for rows in zip(value, old_value, return_, strict=True):
    row = []
    for v, old, target in zip(*rows, strict=True):
      error = (v - target) ** 2
      if clip_eps is not None:
        clipped = old + min(max(v - old, -clip_eps), clip_eps)
        error = max(error, (clipped - target) ** 2)
      row.append(error)
    errors.append(row)
  return 0.5 * batch_mean(errors, mask, mean)


def preference_metrics(chosen, rejected, chosen_length, rejected_length):
  """Accuracy, calibration and the like of the scores of pairs, the first one preferred."""

  def wins(first, second):
    return 0.5 if first == second else float(first > second)

  pairs = list(zip(chosen, rejected, strict=True))
  correct = [wins(*pair) for pair in pairs]
  bins = [[] for _ in range(10)]
  for (c, r), is_correct in zip(pairs, correct, strict=True):
    p = 1 / (1 + math.exp(r - c))
    confidence = max(p, 1 - p)
    bins[min(int((confidence - 0.5) * 20), 9)].append((is_correct, confidence))
  gaps = []
  for inside in filter(None, bins):
    accuracy, confidence = (statistics.fmean(column) for column in zip(*inside, strict=True))
    gaps.append(len(inside) / len(pairs) * abs(accuracy - confidence))
  lengths = zip(chosen_length, rejected_length, strict=True)
  return {
    'accuracy': sum(correct) / len(pairs),
    'margin': sum(c - r for c, r in pairs) / len(pairs),
    'loss': sum(math.log(1 + math.exp(r - c)) for c, r in pairs) / len(pairs),
    'ece': sum(gaps),
    'length_baseline_accuracy': sum(wins(*pair) for pair in lengths) / len(pairs),
  }


def logprob_and_entropy(logits, target):
  """Log-prob of the target and entropy of softmax(logits)."""
  log_total = math.log(sum(math.exp(x) for x in logits))
  logprobs = [x - log_total for x in logits]
  return logprobs[target], -sum(math.exp(x) * x for x in logprobs)
