"""Reference text of `segjax help studies`: what is compared, and what was found."""

STUDIES = """\
A study compares arms, which are settings, over seeds at equal KL: `segjax study:granularity ...`,
normalizer, spread, threshold, redistribution, estimator or all. The docstring of configs/study.py
says how it runs and how an arm is added. `segjax credit ...` ranks methods without PPO: how well
their rewards agree with the true credit of each clause.

What was found in the language requests, whose prompts ask for contents, each to be said once: gold
reward of a network of 0.1 million parameters after 30 steps of PPO on the reward model's segments.
Each arm has the best of four trials of learning rate, kl_coef and clip range on other seeds (two,
of estimator one). Means [95 %] over seeds 0 to 4; in parentheses how many reached 2 nats, if not
all; nats: KL at the end. README has granularity, over 10 seeds.

  normalizer            at 2 nats              at the end          less the first        nats
    regression          0.23 [0.13, 0.37]      0.27 [0.10, 0.49]                         4.2
    none                0.25 [0.12, 0.39]      0.27 [0.14, 0.48]   0.00 [-0.08, 0.07]    7.0
    global              0.22 [0.12, 0.39]      0.29 [0.11, 0.51]   0.02 [-0.02, 0.07]    4.2
    last                0.23 [0.12, 0.36]      0.26 [0.11, 0.48]   -0.01 [-0.04, 0.03]   4.0
    scalar              0.24 [0.16, 0.37]      0.28 [0.10, 0.50]   0.01 [-0.02, 0.05]    5.0

  spread                at 2 nats              at the end          less the first        nats
    even_split          0.23 [0.13, 0.37]      0.27 [0.10, 0.49]                         4.2
    end_only            0.39 [0.22, 0.61] (4)  0.40 [0.20, 0.60]   0.13 [0.07, 0.22]     2.3
    repeat              0.21 [0.09, 0.38]      0.16 [0.01, 0.32]   -0.11 [-0.20, 0.00]   7.7
    entropy_weighted    0.22 [0.13, 0.35]      0.31 [0.11, 0.55]   0.04 [0.00, 0.09]     4.6
    min_credit          0.12 (2)               0.22 [0.09, 0.38]   -0.05 [-0.15, 0.06]   1.7

  estimator             at 2 nats              at the end          less the first        nats
    gae_token           0.23 [0.13, 0.37]      0.27 [0.10, 0.49]                         4.2
    gae_segment         0.39 [0.22, 0.62] (4)  0.38 [0.18, 0.58]   0.11 [0.05, 0.19]     2.3
    gae_border          0.24 [0.14, 0.39]      0.28 [0.12, 0.50]   0.01 [-0.03, 0.05]    4.0
    gae_adaptive        0.10 [-0.04, 0.23]     0.22 [0.02, 0.40]   -0.05 [-0.12, 0.04]   3.9
    rloo                0.24 [0.09, 0.36]      0.28 [0.11, 0.48]   0.01 [-0.03, 0.05]    3.8
    group_norm          0.37 [0.24, 0.48]      0.42 [0.26, 0.51]   0.15 [-0.01, 0.30]    3.9
    dr_grpo             0.37 [0.23, 0.49]      0.37 [0.23, 0.49]   0.09 [-0.02, 0.17]    3.5
    reinforce_plus_plus 0.17 [0.07, 0.31]      0.22 [0.07, 0.41]   -0.05 [-0.10, 0.00]   3.9
    learn_on_entropy    -0.02 [-0.10, 0.11] (4) -0.01 [-0.10, 0.10] -0.28 [-0.45, -0.15]  3.0
    learn_on_starts     -0.10 (2)              -0.04 [-0.11, 0.03] -0.31 [-0.49, -0.17]  1.3

In two languages the constants are those of requests, and seeds 0 to 5:

  delayed: the worth of a clause depends on an earlier one; reward of
    segments            0.20 [0.09, 0.32]      0.16 [0.02, 0.31]                         3.1
    tokens              0.12 [0.04, 0.21]      0.19 [0.04, 0.34]   0.04 [-0.05, 0.16]    4.8
    whole responses     (0)                    0.14 [-0.01, 0.25]  -0.02 [-0.09, 0.09]   1.5

  bifurcation: a single clause decides; reward of
    segments            0.19 [0.03, 0.34] (4)  0.18 [0.06, 0.29]                         3.8
    tokens              0.17 [0.09, 0.26]      0.14 [0.01, 0.29]   -0.03 [-0.18, 0.07]   9.0
    whole responses     (0)                    0.15 [0.03, 0.28]   -0.03 [-0.18, 0.09]   1.1

Random signs of five differences give p of at least 0.06, which after Holm is 0.25 to 0.56 for the
intervals that exclude 0: none of these claims holds among all comparisons of its study.

* Normalisers are not told apart.
* The score of a segment at its last token is worth 0.13 more than evenly spread, at 2 nats 0.14
  [0.05, 0.23] (here the last token decides a clause); repeated at each token, 0.11 less.
* GAE over segments is worth 0.11 more than over tokens. Whether a group of eight responses beats a
  critic is not settled: 0.15 [-0.01, 0.30].
* Learning on tokens of high entropy, or on the first of each segment, is worth 0.3 less.
* Where the worth of a clause comes late, or one clause decides, dense rewards are not told apart
  from the reward of whole responses, and move the policy 2 to 8 times as far (KL, means).
"""
