"""The sizes of the network that a run is about, where they are known before anything is loaded."""

import dataclasses
import json
import tempfile
from pathlib import Path

from segjax.config.settings import Settings
from segjax.data import demo_rows
from segjax.data.languages import make_language
from segjax.hf import reader
from segjax.hf.adapter_config import is_local
from segjax.model.llama import LlamaConfig, make_config


def find_network_config(settings: Settings) -> LlamaConfig | None:
  """Returns the network of the policy, or of the reward model where there is no policy.

  Reads it from a local directory, otherwise from config.network; downloads nothing. None if the
  sizes are unknown.
  """
  path = settings.policy.path or settings.reward_model.path
  if path and is_local(Path(path).expanduser()):
    return reader.load_config(Path(path).expanduser())
  network = settings.network
  if not network.vocab_size and 'demo' in settings.stages:
    network = dataclasses.replace(network, vocab_size=_demo_vocab_size(settings.demo.language))
  return make_config(network) if network.vocab_size else None


def _demo_vocab_size(language: str) -> int:
  words = make_language(language, 1, 1).words
  with tempfile.TemporaryDirectory() as directory:
    demo_rows.write_tokenizer(Path(directory), words)
    tokenizer = json.loads((Path(directory) / 'tokenizer.json').read_text(encoding='utf-8'))
  return len(tokenizer['model']['vocab'])
