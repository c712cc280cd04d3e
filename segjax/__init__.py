"""segjax: segment-level RLHF for Llama-3 in JAX and Flax."""
