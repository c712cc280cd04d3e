"""Reference texts of `segjax help TOPIC`."""

from segjax.config.reward_topics import FUNCTIONS, REWARD_MODELS, REWARDS
from segjax.config.study_topics import STUDIES

ROWS = """\
data.path names a .jsonl, .json (either may be .gz) or .parquet file, a directory saved by
`datasets`, a directory with a file per split (train.jsonl, or shards train-00000-of-00002.jsonl),
or a hub id; or several of them, joined by commas: 'a.jsonl*2,shards/*.jsonl,owner/name*0.5'. A
number after * says how often each row is read. In a run of several stages sft.data.path,
reward.data.path, dpo.data.path, ... and their data.split replace data.path for one stage.

A row has one of these forms; other keys are for reward functions (`segjax help functions`):

  conversations   messages [{role, content}, ...]; conversations [{from, value}, ...] as in ShareGPT
                  (sft trains on the assistant's turns; ppo leaves out the last answer)
  prompts         prompt (text or messages); question; query; instruction with input;
                  context_messages. `system` and `history` are put before all but `messages`.
  answers (sft)   completion, response, output or answer, beside a prompt
  plain text      text (sft trains on all of it)
  pairs           chosen and rejected: texts beside a prompt; messages that share all but the last;
                  or texts of whole dialogues, '\\n\\nHuman: ...\\n\\nAssistant: ...'; optional
                  chosen_rating and rejected_rating
  steps (reward)  an answer as for sft, and steps: [[end, label], ...] or [{end, label}, ...], ends
                  in characters of the answer, labels from 0 (bad) to 1; or, as in TRL, a prompt,
                  completions (the texts of the steps) and labels. Alone or among pairs; the other
                  jobs on pairs leave them out

Roles are system, user, assistant and tool; human, gpt, bot, model and the like are read as these.
Columns of other names: --config.data.columns.prompt=input; each row needs those of its own form.
data.split takes slices, as train[:90%] and train[100:200]; data.max_rows limits what is read. A row
that cannot be read ends the run; with data.bad_rows=drop such rows are left out and counted.

Tokens of data of 16 MiB or more are kept in ~/.cache/segjax/tokens (--token_cache_dir, or
SEGJAX_TOKEN_CACHE_DIR; empty: nowhere): a later run with the same files, tokenizer, template and
limits reads them, and not the rows. The directory may be removed at any time; what was not used for
30 days is removed when other tokens are written.
"""

MEMORY = """\
Memory of a device in training, and the settings that reduce it. `segjax plan JOB:PRESET`
computes what a run needs, without the devices. A run takes 92 % of a GPU's memory at its start;
XLA_CLIENT_MEM_FRACTION=0.5 makes that half.
  lora.rank
      trains adapters of that rank beside a frozen base, which all networks of the same directory
      share; gradients and moments exist for the adapters alone.
  sft.micro_batch_tokens, reward.micro_batch_tokens, dpo.micro_batch_tokens, ppo.micro_batch_tokens
      split a batch into parts of at most that many tokens per device, whose accumulated gradients
      equal those of the whole batch; micro_batch_size counts their rows instead.
  ppo.scoring_batch_size
      limits the sequences that are scored at once; with ppo.packing_length the pieces above do.
  runtime.remat
      full recomputes each layer in the backward pass from its input, none keeps all activations,
      and names (hidden, query, key, value, attention, residual, gate, up) keep those.
  runtime.offload_activations
      moves the named activations to the host's memory.
  runtime.param_dtype=bfloat16 and moments_dtype=bfloat16 of the optimizers
      halve weights and moments, except those of norms and heads, which stay in float32. Weights are
      rounded stochastically, so that updates below the gap between two bfloat16 numbers still add
      up; at PPO's rates the noise of the rounding is as large as what is learned.
  runtime.frozen_params_memory=host
      keeps reference and reward model in the host's memory while they are not used.
  rollout.max_concurrent
      limits the responses that are decoded at once, and with them the pages of keys and values; by
      default these take what the other arrays leave.
"""

ADAPTERS = """\
With lora.rank=16 every trained network is its first weights, frozen, and adapters of rank 16 beside
their matrices: y = x W + (alpha / rank) x A B. lora.sft, lora.reward, lora.dpo, lora.policy and
lora.critic change rank, alpha, targets, rs and learning_rate_factor of one network; rank=0 trains
it in full. A scalar head is trained with them, the head to the vocabulary with
lora.train_head=True.

  base          The frozen weights are loaded once, in runtime.compute_dtype, for all networks of a
                run that have the same ones: policy, reference, critic and a reward model that was
                trained by adapters. They are scored in one pass over these weights.
  rates         Learning rates of networks with adapters are multiplied by
                lora.learning_rate_factor, 10: the presets' are those of full training.
  what is kept  Training states hold adapters, trained heads and their moments. A finished model is
                a directory in the form of peft, adapter_model.safetensors and adapter_config.json,
                whose README.md says how transformers loads it; base_model_name_or_path is the base,
                a directory or hub id, and may be changed there after it was moved.
  where         Any path of a checkpoint may be such a directory, of peft too. A network that is
                trained from one goes on with it, so that rank, alpha, targets and rs must be its
                own, and a trained head is trained on; the result is one adapter of the same base.
  without       `segjax convert merge ADAPTER OUT` writes a plain checkpoint, W + (alpha / rank) A B
                in the dtype of the base: bfloat16 rounds away what is below 1/256 of a weight.
  sampling      Adapters are carried beside the weights, and not merged, for the same reason.
  a laptop      SmolLM2-135M-Instruct, rank 16, short rows, two cores: data.max_length=256,
                data.max_prompt_length=160, runtime.remat=none, and of reward and ppo
                packing_length=256, micro_batch_size=4. reward: batch_size=16, num_epochs=2,
                optimizer.learning_rate=5e-5, threshold_search.target_segment_length=2. normalizer:
                kind=global, max_pairs=96. ppo: max_steps=10, rollout_batch_size=32,
                minibatch_size=8, policy_optimizer.learning_rate=5e-5,
                critic_optimizer.learning_rate=3e-5, and rollout.max_new_tokens=64.
"""

PACKING = """\
With packing_length of sft, reward, dpo or ppo set, several sequences share a row of about that many
tokens. An update then costs its real tokens instead of the longest sequence times the batch size.
Losses and gradients equal those of padded rows. perf/packing_efficiency is the share of real
tokens. `python tools/bench.py train` measures the gain.

micro_batch_tokens says how much goes through the network at once: at most that many tokens per
device, the devices of the tensor axis included. A batch is cut into as few pieces as that allows,
all of which have about the same number of tokens, in rows that are as narrow as the tokens fit in;
some 92 % of them are real. Widths are multiples of packing_length / 8, and batches of similar
lengths share 2 to 6 of them; each is a program that is compiled once. A row holds the longest
sequence, so a batch must have several sequences for each device that splits rows: where it has
not, set mesh.tensor.

micro_batch_size counts packed rows of exactly packing_length tokens instead. Other lengths then
need no new compilation.
"""

ROLLOUTS = """\
rollout.max_concurrent responses are decoded at once (continuous batching): when a response ends,
the next prompt takes its slot. By default there are as many slots as the free memory has room for,
counted with the mean prompt and half of rollout.max_new_tokens. Keys and values lie in pages of 64
positions, and a response has those of its tokens alone. Where no page is free, the youngest
response waits, and is read again later. On GPUs and TPUs a step reads the pages in use; on CPUs it
costs what the longest response needs. The rollout.samples_per_prompt responses of a prompt share
one prefill and its full pages.

The random numbers of a response depend on the seed, the step, the index of the prompt and the index
of the sample alone; the number of slots or devices does not change the responses.

old_logprob, which the ratio and the KL penalty use, is unfiltered and at temperature 1. Its
distance from the log-prob that the token was sampled with is rollout/logprob_mismatch.
It is that of the decode loop in float32. In bfloat16 the two programs round differently, as far
apart as an update moves the policy, and it comes from a forward pass over the packed rows of the
update, whose first ratios then are 1; rollout.recompute_logprob sets one of them.

ppo.importance_clip=2 multiplies a token's policy loss by min(π_old / π drawn from, 2): truncated
importance sampling (TIS, in other frameworks a rollout correction), which makes up for a mismatch.

rollout.weights_dtype=int8 rounds the matrices of the layers, with a scale for each output channel,
in the rollouts of PPO alone: a decode step moves 16.8 GB instead of 23.8 (8B on an H100, 128 rows
of 460 tokens). What is drawn from is then some hundredths of a nat from the policy, so set
ppo.importance_clip too; old log-probs come from a full forward pass. On CPUs it is slower.

Decoding lays the devices out in groups of its own: rollout.tensor devices hold one copy of the
policy's weights, split by heads, and decode rows that no other group has. A group sums activations
in every layer of every step, so it is by default as large as the key heads and the mesh's fsdp and
tensor axes allow without leaving a process (on TPU, a slice). Smaller groups exchange less, and
hold more of the weights on each device.

With rollout.carry=True a rollout ends as soon as ppo.rollout_batch_size responses have ended, and
no device waits for the longest. The others go on in the next step, under the policy that it has
then, before new prompts are read. Each token keeps the log-probs that it was drawn with, so that
ratio and KL penalty are those of the policies that drew it; rollout.recompute_logprob computes them
before that policy changes. A response is max_concurrent / rollout_batch_size steps old on average
(rollout/age_mean). The first steps learn from shorter responses, as the long ones end later; those
that are unfinished at the end of the run are not learned from. The random numbers depend on the
position of the prompt in the order of all steps, in place of step and index. Which responses a step
has depends on max_concurrent, and where that is 0 on the free memory: set it for runs that have to
repeat the same bits. `python tools/bench.py carry` counts the steps of decoding that this saves.

`python tools/bench.py decode` measures the speed against transformers.
"""

BUCKETS = """\
--workdir=gs://bucket/run keeps a run on a bucket (pip install -e '.[gcs]'). The run works in a
local copy (--local_copy, by default under ~/.cache/segjax/runs), which is made equal to the bucket
at the start; only files that differ are downloaded. Metrics are copied to the bucket before each
checkpoint, models at the end of a stage, and training states are written from the devices to the
bucket directly.

The bucket alone is enough to resume: the same command on a new machine continues from the last
checkpoint, with the same bits. A second run is refused while the first one writes its lock.json.
The lock of a run that was killed is taken over: at once in the same local copy, after 35 s without
a change elsewhere. Buckets have no real locks: this protects against mistakes only.

config.checkpoint.directory puts the training states alone on a bucket.
"""

HUB = """\
--push_to=OWNER/NAME uploads the model of the last stage that writes one to the Hugging Face hub,
when the run has finished: the files of RUN/STAGE/model, its model card among them, and
RUN/report.html and RUN/results.json, in one commit. Nothing is uploaded without the flag. A new
repository is private; --push_public makes it public. The report holds prompts and responses, and
the card the command and all settings with their paths.

Before the run starts, the name, the token (`hf auth login` or HF_TOKEN) and its right to write are
checked. --dry_run prints what would be uploaded. If the upload fails, the run has lost nothing: the
same command uploads again, as all stages are reused, and so does the line that it ends with:

  segjax convert push RUN/STAGE/model OWNER/NAME [--public] [--dry_run]

Weights of another name in the repository, such as shards of an earlier model, are removed; other
files of the repository stay. An adapter names its base by the path that it was trained with: give
the base by its hub id, or others cannot load it.
"""

HOSTS = """\
Start the same command on every host. All hosts must see the same --workdir (NFS, Filestore), and
the first process writes. On a Cloud TPU slice and under SLURM the processes find each other:

  gcloud compute tpus tpu-vm ssh NAME --worker=all --command='cd segjax && segjax ppo:local ...'
  srun --ntasks-per-node=1 segjax ppo:local ...

Elsewhere give the address of the first process, the number of processes and the index of each:

  segjax ppo:local --coordinator=HOST:PORT --num_processes=4 --process_id=0 ...

A process that does not join within --join_timeout seconds is named. If one is lost later, the
others stop within a minute; the same command resumes from the last checkpoint. A signal to one
process saves and stops all of them.
"""

PUBLISHED_RUNS = """\
  segjax reward:llama3_8b_sft         or llama3_8b_sft,token and llama3_8b_sft,bandit
  segjax ppo:llama3_8b_sft            or llama31_8b_instruct, phi3_mini

These presets hold the published hyper-parameters, models and data by hub id (Yin et al. 2025,
https://arxiv.org/abs/2501.02790). No whole run of 8B was made with segjax. The name of a topology
after the preset, as in ppo:llama3_8b_sft,v5p:2x2x2, sets sizes of batches and mesh that fit it.

Between the demo and 8B: smollm2_135m, smollm2_360m, qwen25_05b, llama32_1b and llama32_3b, each for
cuda:1xH100-80GB and v5e:2x4, on the same data. No reward models were published for them: `segjax
help ppo` shows how one is trained. Their learning rates follow a rule, and are not tuned. PPO of
llama32_3b trains adapters, and so does phi3_mini on v5e:2x4; on cuda:8xH100-80GB it trains all
weights. `segjax plan PRESET` compiles a run for its topology and says what it needs of a device.

--config.reference_exact=True computes as the paper's code does, mistakes included: attention masked
by the first row of a micro-batch, a forced stop token, no floor of Std(p), and more.
`segjax settings compat` lists the switches; all are off by default.
"""

PEERS = """\
segjax                                   OpenRLHF                   TRL (PPOConfig)
policy.path                              --pretrain                 sft_model_path
reward_model.path                        --reward_pretrain          reward_model_path
data.path                                --prompt_data
ppo.rollout_batch_size                   --rollout_batch_size
ppo.minibatch_size                       --train_batch_size         num_mini_batches (their number)
ppo.micro_batch_size, micro_batch_tokens --micro_train_batch_size   per_device_train_batch_size
ppo.scoring_batch_size                   --micro_rollout_batch_size local_rollout_forward_batch_size
rollout.samples_per_prompt               --n_samples_per_prompt
rollout.max_new_tokens                   --generate_max_len         response_length
ppo.num_ppo_epochs                       --max_epochs               num_ppo_epochs
ppo.kl_coef                              --init_kl_coef             kl_coef
ppo.kl_target                            --kl_target
ppo.clip_eps, ppo.value_clip_eps         --eps_clip, --value_clip   cliprange, cliprange_value
ppo.gae_lambda, ppo.gamma                --lambd, --gamma           lam, gamma
ppo.estimator                            --advantage_estimator
reward_shaping.reward_fn, rewards        --remote_rm_url (a file)
lora.rank, lora.alpha, lora.targets      --lora_rank, --lora_alpha, LoraConfig
                                         --target_modules

New here: how text is cut (segjax settings reward), what a segment earns (segjax settings
reward_shaping), the jobs normalizer, credit and study.
"""

ERRORS = """\
A wrong input ends in one line; SEGJAX_TRACEBACK=1 shows where it was raised. What to do:

  config.KEY is empty, and the JOB job needs it
      Set that path; a stage of the same command may write it.
  config.KEY=PATH lies in DIRECTORY, which this run writes
      Use another --workdir, or move the input out of it.
  DIRECTORY: no tokenizer.json there
      AutoTokenizer.from_pretrained(OLD).save_pretrained(DIRECTORY)
  the tokenizer has no chat template
      --config.data.chat_template=chatml, or a file
  the tokenizers of A and B differ
      Use models that were trained from one base model; `segjax help reward-models`.
  DIRECTORY has no segment_reward.json
      Run `segjax normalizer:local` on the reward model.
  DIRECTORY is an adapter, and config.lora.policy trains all weights
      Train it further with the settings that the line names, or merge it; `segjax help adapters`.
  DIRECTORY has no scalar head
      It is a language model; train a reward model with `segjax reward:local`.
  out of memory
      See `segjax help memory`.
  non-finite steps
      The last finite state is saved. Lower the learning rate or inspect the rows of the step, and
      resume; config.max_skipped_steps allows more such steps in a row.
  exit code 75
      The run was interrupted and saved; the same command resumes it.
"""

TOPICS = {
  'rows': ROWS,
  'functions': FUNCTIONS,
  'rewards': REWARDS,
  'memory': MEMORY,
  'adapters': ADAPTERS,
  'reward-models': REWARD_MODELS,
  'packing': PACKING,
  'rollouts': ROLLOUTS,
  'buckets': BUCKETS,
  'hub': HUB,
  'hosts': HOSTS,
  'studies': STUDIES,
  'published-runs': PUBLISHED_RUNS,
  'openrlhf': PEERS,
  'errors': ERRORS,
}
