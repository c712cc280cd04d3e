"""Sizes of networks, and the published models by hub id.

The demo builds a network of these sizes; --dry_run and plan use them if there is no checkpoint.
"""

# SFT model and segment reward models ({} is the granularity) of Yin et al. 2025. For the models of
# the ladder none were published: `segjax reward:NAME` trains one.
HUB = {
  'llama3_8b_sft': {
    'policy': 'RLHFlow/LLaMA3-SFT-v2',
    'reward_model': 'yyqoni/rlhflow-llama-3-sft-8b-v2-{}-rm-700k',
  },
  'llama31_8b_instruct': {
    'policy': 'meta-llama/Llama-3.1-8B-Instruct',
    'reward_model': 'yyqoni/meta-llama-3.1-instruct-8b-{}-rm-700k',
  },
  'phi3_mini': {
    'policy': 'microsoft/Phi-3-mini-4k-instruct',
    'reward_model': 'yyqoni/Phi-3-mini-4k-instruct-{}-rm-700k',
  },
  'smollm2_135m': {'policy': 'HuggingFaceTB/SmolLM2-135M-Instruct'},
  'smollm2_360m': {'policy': 'HuggingFaceTB/SmolLM2-360M-Instruct'},
  'qwen25_05b': {'policy': 'Qwen/Qwen2.5-0.5B-Instruct'},
  'llama32_1b': {'policy': 'meta-llama/Llama-3.2-1B-Instruct'},
  'llama32_3b': {'policy': 'meta-llama/Llama-3.2-3B-Instruct'},
}

# The ladder between the demo and 8B, and by how much the published learning rates of 8B are
# multiplied: as the rates of GPT-3 of these sizes to that of its 6.7B (Brown et al. 2020, table
# 2.1, https://arxiv.org/abs/2005.14165). A rule for a first run, not tuned.
LADDER = {
  'smollm2_135m': 5.0,
  'smollm2_360m': 2.5,
  'qwen25_05b': 2.5,
  'llama32_1b': 1.7,
  'llama32_3b': 1.3,
}


def tiny() -> dict:
  """Returns the sizes of the demo's network; its vocabulary is that of the demo's tokenizer."""
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
  """Returns the sizes of Llama-3 8B, and RLHFlow/LLaMA3-SFT-v2."""
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
  """Returns the sizes of Llama-3.1 8B: as Llama-3, with a longer context."""
  return llama3_8b() | {'max_position_embeddings': 131_072}


def llama32_1b() -> dict:
  """Returns the sizes of Llama-3.2 1B, embeddings tied."""
  return llama31_8b() | {
    'hidden_size': 2048,
    'intermediate_size': 8192,
    'num_hidden_layers': 16,
    'tie_word_embeddings': True,
  }


def llama32_3b() -> dict:
  """Returns the sizes of Llama-3.2 3B, embeddings tied."""
  return llama31_8b() | {
    'hidden_size': 3072,
    'intermediate_size': 8192,
    'num_hidden_layers': 28,
    'num_attention_heads': 24,
    'tie_word_embeddings': True,
  }


def smollm2_135m() -> dict:
  """Returns the sizes of SmolLM2-135M-Instruct, a Llama; 9 heads, which no mesh.tensor divides."""
  return {
    'vocab_size': 49_152,
    'hidden_size': 576,
    'intermediate_size': 1536,
    'num_hidden_layers': 30,
    'num_attention_heads': 9,
    'num_key_value_heads': 3,
    'max_position_embeddings': 8192,
    'rope_theta': 100_000.0,
    'tie_word_embeddings': True,
  }


def smollm2_360m() -> dict:
  """Returns the sizes of SmolLM2-360M-Instruct, a Llama."""
  return smollm2_135m() | {
    'hidden_size': 960,
    'intermediate_size': 2560,
    'num_hidden_layers': 32,
    'num_attention_heads': 15,
    'num_key_value_heads': 5,
  }


def qwen25_05b() -> dict:
  """Returns the sizes of Qwen2.5-0.5B-Instruct, embeddings tied."""
  return {
    'family': 'qwen2',
    'vocab_size': 151_936,
    'hidden_size': 896,
    'intermediate_size': 4864,
    'num_hidden_layers': 24,
    'num_attention_heads': 14,
    'num_key_value_heads': 2,
    'max_position_embeddings': 32_768,
    'rope_theta': 1_000_000.0,
    'tie_word_embeddings': True,
  }


def llama3_70b() -> dict:
  """Returns the sizes of Llama-3 70B."""
  return llama3_8b() | {
    'hidden_size': 8192,
    'intermediate_size': 28_672,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
  }


def phi3_mini() -> dict:
  """Returns the sizes of Phi-3-mini-4k, with the positions of its sliding window."""
  return {
    'family': 'phi3',
    'vocab_size': 32_064,
    'hidden_size': 3072,
    'intermediate_size': 8192,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 32,
    'max_position_embeddings': 2047,
    'rope_theta': 10_000.0,
  }


SIZES = {
  'smollm2_135m': smollm2_135m,
  'smollm2_360m': smollm2_360m,
  'qwen25_05b': qwen25_05b,
  'llama32_1b': llama32_1b,
  'llama32_3b': llama32_3b,
  'llama3_8b_sft': llama3_8b,
  'llama31_8b_instruct': llama31_8b,
  'llama3_70b': llama3_70b,
  'phi3_mini': phi3_mini,
}


def entropy_threshold(name: str) -> float:
  """Returns the threshold of the paper's runs with a model, in nats."""
  return 1.75 if name == 'phi3_mini' else 2.0
