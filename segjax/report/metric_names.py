"""Names of metrics, results and stages as a person reads them, for report.html.

What a metric means and which values are healthy is in `metric_docs`.
"""

import re

STAGES = {
  'demo': 'Demo data',
  'sft': 'Supervised fine-tuning',
  'reward': 'Reward model',
  'normalizer': 'Reward normaliser',
  'dpo': 'Direct preference optimization',
  'credit': 'Credit of dense rewards',
  'ppo': 'PPO',
  'evaluate': 'Evaluation',
  'sample': 'Samples',
  'evaluate_reward': 'Evaluation of the reward model',
  'answers': 'Answers for a judge',
  'study': 'Study',
}

PART = 'part/'  # of results: what a source of config.rewards adds to the reward

# By the part of a metric's name before the first slash.
GROUPS = {
  'critic': 'Critic',
  'dpo': 'Direct preference optimization',
  'eval': 'Held-out data, during training',
  'objective': 'Reward and KL',
  'other': 'Other',
  'perf': 'Speed and memory',
  'policy': 'Policy updates',
  'response': 'Responses',
  'reward': 'Rewards of segments and tokens',
  'reward_model': 'Reward model',
  'rollout': 'Sampling',
  'segments': 'Segments',
  'sft': 'Supervised fine-tuning',
  'timing': 'Seconds of a step',
}

# Groups that are measured on the data that is trained on.
_OF_DATA = ('objective', 'response', 'segments', 'reward', 'reward_model', 'dpo', 'sft')

# A metric's name, and where it matters the unit; * in a key stands for {} in the name.
METRICS = {
  'objective/reward': 'Reward before KL, per response',
  'objective/rlhf_reward': 'Reward after KL, per response',
  'objective/non_score_reward': 'KL penalty, per response',
  'objective/scores': 'Reward-model score at segment ends',
  'objective/kl': 'KL to the reference, nats per response',
  'objective/kl_coef': 'KL coefficient',
  'objective/kl_token_max': 'Largest KL of a token, nats',
  'objective/lm_reward': 'Reward by the language model, per response',
  'objective/reward_std': 'Reward before KL, standard deviation over responses',
  'objective/advantage_abs_max': 'Largest absolute advantage of a token',
  'objective/entropy': 'Surprisal of the responses, nats per response',
  'objective/ref_entropy': 'Entropy of the reference, nats per token',
  'reward/segment_mean': 'Reward of a segment before KL',
  'reward/token_abs_max': 'Largest absolute reward of a token',
  'reward/clipped': 'Share of token rewards that are clipped',
  'reward/failed_calls': 'Responses without a reward by a function',
  'reward/part/*': 'Reward by {}, per response',
  'reward/disagreement': 'Disagreement of the reward models about a segment',
  'reward/by_position/*': 'Normalised score, tenth {} of a response',
  'response/length_mean': 'Response length, tokens',
  'response/length_max': 'Longest response, tokens',
  'response/eos_rate': 'Share of responses that end by themselves',
  'segments/per_response': 'Segments per response',
  'segments/one_token': 'Segments of one token, per response',
  'segments/length_mean': 'Tokens per segment',
  'policy/loss': 'Policy loss',
  'policy/entropy': 'Entropy of the policy, nats per token',
  'policy/learned_share': 'Share of tokens that the policy is trained on',
  'policy/approx_kl': 'KL of the update, nats per token',
  'policy/clipfrac': 'Share of tokens at the clip',
  'policy/dual_clipfrac': 'Share of tokens at the dual clip',
  'policy/ratio_mean': 'Probability ratio, mean',
  'policy/ratio_max_deviation': 'Probability ratio, largest deviation from 1',
  'policy/initial_ratio_deviation': 'Probability ratio, deviation before the first update',
  'policy/importance_mean': 'Importance weight, mean',
  'policy/importance_clipfrac': 'Share of tokens at the bound of importance weights',
  'policy/kl': 'KL to the reference in the loss',
  '*/grad_norm': 'Gradient norm',
  '*/weight_norm': 'Weight norm',
  'critic/loss': 'Critic loss',
  'critic/error': 'Error of the values',
  'critic/mean': 'Mean value',
  'critic/return_mean': 'Mean return',
  'critic/return_abs_max': 'Largest absolute return of a token',
  'critic/clipfrac': 'Share of values at the clip',
  'critic/explained_variance': 'Explained variance',
  'rollout/logprob_mismatch': 'Log-prob mismatch, mean, nats per token',
  'rollout/logprob_mismatch_max': 'Log-prob mismatch, largest, nats',
  'rollout/carried_responses': 'Responses carried into the step',
  'rollout/carried_tokens': 'Tokens carried into the step',
  'rollout/older_share': 'Share of tokens that older policies drew',
  'rollout/age_mean': 'Age of the responses, mean, steps',
  'rollout/age_max': 'Age of the responses, largest, steps',
  'eval/reward': 'Reward before KL, per response',
  'eval/gold': 'Gold reward',
  'eval/kl': 'KL to the reference, nats per response',
  'eval/length_mean': 'Response length, tokens',
  'eval/accuracy': 'Accuracy',
  'eval/loss': 'Loss',
  'eval/entropy': 'Entropy, nats per token',
  'eval/margin': 'Margin of the scores',
  'eval/length_baseline_accuracy': 'Accuracy of preferring the longer response',
  'eval/ece': 'Calibration error (ECE)',
  'eval/step_loss': 'Loss of labelled steps, nats per step',
  'eval/step_accuracy': 'Accuracy on labelled steps',
  'sft/loss': 'Loss, nats per token',
  'sft/entropy': 'Entropy, nats per token',
  'reward_model/loss': 'Loss',
  'reward_model/accuracy': 'Accuracy',
  'reward_model/margin': 'Margin of the scores',
  'reward_model/segments': 'Segments per response',
  'reward_model/step_loss': 'Loss of labelled steps, nats per step',
  'reward_model/step_accuracy': 'Accuracy on labelled steps',
  'reward_model/one_token_segments': 'Segments of one token, per response',
  'dpo/loss': 'Loss',
  'dpo/accuracy': 'Accuracy of the implicit reward',
  'dpo/margin': 'Margin of the implicit rewards',
  'dpo/chosen_reward': 'Implicit reward of the chosen response',
  'dpo/rejected_reward': 'Implicit reward of the rejected response',
  'timing/generate': 'Sampling',
  'timing/score': 'Scoring',
  'timing/update': 'Updates',
  'timing/evaluate': 'Held-out evaluation',
  'timing/between_steps': 'Between steps',
  'timing/compile': 'Compiling',
  'timing/step': 'Step',
  'perf/tokens_per_second': 'Tokens per second',
  'perf/mfu': 'Share of the peak FLOP/s (MFU)',
  'perf/num_compiles': 'Programs compiled so far',
  'perf/peak_memory_gib': 'Peak memory, GiB',
  'perf/packing_efficiency': 'Share of tokens without padding',
  'skipped_updates': 'Skipped updates',
}

# Results of stages, in stage.json.
_RESULTS = {
  'steps': 'Steps',
  'rows': 'Rows',
  'loss': 'Loss, training, last step',
  'parameters': 'Parameters',
  'pairs': 'Preference pairs',
  'sft_rows': 'Rows for fine-tuning',
  'held_out_pairs': 'Held-out pairs',
  'held_out_steps': 'Held-out labelled steps',
  'held_out_rows': 'Held-out rows',
  'kind': 'Kind',
  'segments': 'Segments',
  'w_mean': 'Mean(p): slope w',
  'b_mean': 'Mean(p): offset b',
  'w_std': 'Std(p): slope w',
  'b_std': 'Std(p): offset b',
  'r2_mean': 'Mean(p): R²',
  'r2_std': 'Std(p): R²',
  'rms_mean': 'Mean(p): RMS error',
  'rms_std': 'Std(p): RMS error',
  'num_bins': 'Bins of the position p',
  'pairs_read': 'Pairs read',
  'responses_read': 'Responses with marked errors read',
  'judge': 'Judge',
  'questions': 'Questions',
  'answered': 'Answered',
  'unfinished': 'Answers cut at the length limit',
  'truncated_prompts': 'Prompts truncated',
  'dropped_prompts': 'Prompts dropped',
  'tokens_per_answer': 'Tokens per answer',
}
_HELD_OUT = 'held_out_'  # begins results that are named as the metrics eval/...
_PPO_RESULTS = {
  'reward': 'Reward before KL, training, last step',
  'kl': 'KL to the reference, training, last step',
  'length': 'Response length, training, last step',
  'segments': 'Segments per response, training, last step',
}


def stage_name(key: str) -> str:
  """Returns the name of a stage, such as 'Reward model'."""
  return STAGES.get(key, _readable(key))


def group_name(prefix: str) -> str:
  """Returns the name of a group of metrics."""
  return GROUPS.get(prefix, _readable(prefix))


def metric_name(key: str) -> str:
  """Returns the name of a metric; made from its key if it has none here."""
  if key in METRICS:
    return METRICS[key]
  for pattern, name in METRICS.items():
    start, star, end = pattern.partition('*')
    if star and key.startswith(start) and key.endswith(end):
      return name.format(key[len(start) : len(key) - len(end)])
  return _readable(key.partition('/')[2] or key)


def result_name(stage: str, key: str) -> str:
  """Returns the name of a result of a stage."""
  if key.startswith(PART):
    return f'Reward by {key.removeprefix(PART)}'
  names = _RESULTS | (_PPO_RESULTS if stage == 'ppo' else {})
  metric = f'eval/{key.removeprefix(_HELD_OUT)}'
  if key.startswith(_HELD_OUT) and key not in names and metric in METRICS:
    return f'{METRICS[metric]}, held-out {_data(stage)}'
  return names.get(key, _readable(key))


def metric_scope(stage: str, key: str) -> str:
  """Returns what a metric was measured on: training or held-out data; '' if on neither."""
  prefix = key.partition('/')[0]
  if prefix in ('perf', 'timing') or key.endswith(('grad_norm', 'weight_norm')):
    return ''
  if prefix == 'eval':
    return f'held-out {_data(stage)}, during training'
  return f'training {_data(stage)}' if prefix in _OF_DATA else ''


def _data(stage: str) -> str:
  """Returns what a stage is trained on."""
  return {'sft': 'rows', 'reward': 'pairs', 'dpo': 'pairs'}.get(stage, 'prompts')


def _readable(key: str) -> str:
  words = re.sub(r'[_/]+', ' ', key).strip()
  return words[:1].upper() + words[1:]
