"""Saves low-rank adapters in peft's form: adapter_model.safetensors and adapter_config.json.

Tensors are named by `adapter`; whole models are saved by `writer`.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from segjax import storage
from segjax.data.tokenizer import ChatTokenizer
from segjax.hf import adapter as adapters
from segjax.hf import model_card as cards
from segjax.hf import process_shares, shards, tensor_names, tokenizer_writer, writer
from segjax.hf.adapter_config import CONFIG, LM_HEAD, SCORE, WEIGHTS, block_patterns, fused_targets
from segjax.hf.tensor_slices import transpose_into
from segjax.model.llama import LlamaConfig
from segjax.model.sharding import path_name

_TASKS = {'language': 'CAUSAL_LM', 'scalar': 'SEQ_CLS'}


def save_adapter(
  directory: Path,
  trained: dict[str, Any],
  config: LlamaConfig,
  head: str,
  *,
  base: str,
  source: Path,
  card: cards.Card,
  tokenizer: ChatTokenizer,
) -> None:
  """Writes an adapter that peft loads, atomically.

  All processes must call it; the first one writes. A checkpoint or adapter in `directory` is
  replaced, a directory with other files is not. Takes eight parameters: four define the adapter.

  Args:
    directory: to write.
    trained: {'adapter': ...}, and {'scalar_head': ...} of a scalar model, {'lm_head': ...} of a
      language model with `lora.train_head`; may be sharded.
    config: the network, with `lora`.
    head: 'language' or 'scalar'.
    base: directory or hub id of the base, for adapter_config.json.
    source: checkpoint or adapter whose tokenizer files and licence are copied.
    card: fields of README.md; missing base model and licence are those of `source`.
    tokenizer: that the model was trained with.

  Raises:
    UserError: `trained` and config do not agree, or `directory` must not be replaced.
  """
  directory = Path(directory).expanduser().absolute()
  for read in (source, Path(base)):  # a hub id is no directory, and differs from each
    storage.check_target(directory, writer.REPLACEABLE, overwrite=True, source=read)
  entries = adapters.tensor_mappings(config, config.lora, SCORE if head == 'scalar' else '')
  flat = jax.tree_util.tree_flatten_with_path(trained)[0]
  leaves = {path_name(path): leaf for path, leaf in flat}
  writer.check_tensors(leaves, entries, head)
  card = cards.merge(cards.from_source(base, source), card)
  hosts: dict[Any, np.ndarray] = {}
  tensors = [(entry, lambda entry=entry: leaves[entry.path]) for entry in entries]
  process_shares.write_shares(tensors, hosts.__setitem__, writers=1)
  if not jax.process_index():
    with storage.atomic_directory(directory) as partial:
      _write_weights(partial / WEIGHTS, hosts)
      _write_tokenizer(partial, config, head, source, tokenizer)
      has_template = tokenizer_writer.has_template(partial)
      cards.write_card(
        partial, card, name=directory.name, head=head, with_template=has_template, base=base
      )
      shards.write_json(partial / CONFIG, _description(config, head, base))
  process_shares.barrier('saved')


def _description(config: LlamaConfig, head: str, base: str) -> dict[str, Any]:
  """Returns the fields of peft's LoraConfig; those that are left out have its defaults."""
  lora, fused = config.lora, tensor_names.fuses(config)
  whole = [SCORE] if head == 'scalar' else [LM_HEAD] if lora.train_head else None
  return {
    'base_model_name_or_path': base,
    'bias': 'none',
    'fan_in_fan_out': False,
    'inference_mode': True,
    'init_lora_weights': True,
    'lora_alpha': int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
    'lora_dropout': 0.0,
    'modules_to_save': whole,
    'peft_type': 'LORA',
    'r': lora.rank,
    'target_modules': fused_targets(lora.targets) if fused else list(lora.targets),
    'task_type': _TASKS[head],
    'use_rslora': lora.rs,
    **(block_patterns(lora) if fused else {}),
  }


def _write_weights(file: Path, hosts: dict[Any, np.ndarray]) -> None:
  tensors = {}
  for entry, host in hosts.items():
    for layer, name in enumerate(entry.hf_names()):
      # Zeros: each of our tensors is a block of that of a fused matrix.
      out = tensors.setdefault(adapters.PREFIX + name, np.zeros(entry.hf_shape, np.float32))
      transpose_into(host[layer] if entry.stacked else host, out[entry.part])
  safetensors.numpy.save_file(tensors, file, metadata={'format': 'pt'})


def _write_tokenizer(
  directory: Path, config: LlamaConfig, head: str, source: Path, tokenizer: ChatTokenizer
) -> None:
  """Writes the tokenizer as `writer.write_metadata` does, without a config.json."""
  tokenizer_writer.copy_tokenizer(source, directory)
  tokenizer_writer.write_template(directory, tokenizer.chat_template)
  ids = tokenizer_writer.special_ids(tokenizer, config.vocab_size, head)
  if head == 'language':
    tokenizer_writer.write_generation_config(directory, ids)
  else:
    tokenizer_writer.write_pad_token(directory, tokenizer, ids['pad_token_id'])
