"""Sizes of the Llama family, and the published models by hub id.

The sizes are what the demo builds, and what is counted where a checkpoint is not at hand.
"""

# SFT model and segment reward models ({} is the granularity) of Yin et al. 2025.
HUB = {
  'llama3_8b_sft': {
    'policy': 'RLHFlow/LLaMA3-SFT-v2',
    'reward_model': 'yyqoni/rlhflow-llama-3-sft-8b-v2-{}-rm-700k',
  },
  'llama31_8b_instruct': {
    'policy': 'meta-llama/Llama-3.1-8B-Instruct',
    'reward_model': 'yyqoni/meta-llama-3.1-instruct-8b-{}-rm-700k',
  },
}


# How a job of 8B or 70B models is laid out on a slice: settings by job and topology, over those of
# the recipe, which they change in nothing but rounding. `tools/plan.py` shows that they fit.
_PPO_8B = {'ppo.micro_batch_size': 16, 'ppo.scoring_batch_size': 64, 'rollout.max_concurrent': 512}
TOPOLOGIES = {
  ('ppo', '8b'): {
    'v5p:2x2x2': _PPO_8B,
    'v6e:4x4': _PPO_8B | {'rollout.max_concurrent': 256},
    'v5e:8x8': _PPO_8B | {'ppo.micro_batch_size': 64, 'rollout.max_concurrent': 256},
    'cuda:8xH100-80GB': _PPO_8B | {'ppo.micro_batch_size': 8, 'rollout.max_concurrent': 256},
  },
  ('ppo', '70b'): {
    'v5p:4x4x8': {
      'ppo.micro_batch_size': 128,
      'ppo.scoring_batch_size': 128,
      'rollout.max_concurrent': 512,
    },
  },
  ('reward', '8b'): {
    'v5p:2x2x2': {'reward.micro_batch_size': 16},
    'v6e:4x4': {'reward.micro_batch_size': 16},
    'v5e:8x8': {'reward.micro_batch_size': 64},
    'cuda:8xH100-80GB': {'reward.micro_batch_size': 8},
  },
  ('reward', '70b'): {'v5p:4x4x8': {'reward.micro_batch_size': 128}},
}


def lay_out(config, job: str, name: str, topology: str) -> None:
  """Assigns what that job of a model of HUB or SIZES needs on the topology."""
  if topology:
    config.update_from_flattened_dict(TOPOLOGIES[job, _size(name)][topology])


def topologies(job: str, name: str) -> tuple[str, ...]:
  """Those that the job has a layout for, with a model of that name."""
  return tuple(TOPOLOGIES.get((job, _size(name)), ()))


def _size(name: str) -> str:
  return '70b' if '70b' in name else '8b'


def tiny() -> dict:
  """The demo's network; its vocabulary is that of the demo's tokenizer."""
  return {
    'vocab_size': 0,
    'hidden_size': 64,
    'intermediate_size': 192,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 256,
    'initializer_range': 0.1,  # a narrow network needs wider weights than N(0, 0.02)
  }


def llama3_8b() -> dict:
  """Llama-3 8B, and RLHFlow/LLaMA3-SFT-v2, which has its sizes."""
  return {
    'vocab_size': 128_256,
    'hidden_size': 4096,
    'intermediate_size': 14_336,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'max_position_embeddings': 8192,
  }


def llama31_8b() -> dict:
  """Llama-3.1 8B: as Llama-3, with a longer context."""
  return llama3_8b() | {'max_position_embeddings': 131_072}


def llama32_1b() -> dict:
  """Llama-3.2 1B, embeddings tied."""
  return llama31_8b() | {
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 16,
    'tie_word_embeddings': True,
  }


def llama3_70b() -> dict:
  """Llama-3 70B."""
  return llama3_8b() | {
    'hidden_size': 8192,
    'intermediate_size': 28_672,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
  }


SIZES = {'llama3_8b_sft': llama3_8b, 'llama31_8b_instruct': llama31_8b, 'llama3_70b': llama3_70b}
