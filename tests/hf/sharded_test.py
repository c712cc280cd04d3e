"""Loading onto eight devices, in a separate process whose memory is measured."""

import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from segjax.hf import tensor_names
from segjax.hf.config import config_from_hf

TOOL = Path(__file__).resolve().parents[2] / 'tools' / 'benchmarks' / 'load_sharded.py'
RAW = {
  'model_type': 'llama',
  'vocab_size': 32000,
  'hidden_size': 1024,
  'intermediate_size': 6144,
  'num_hidden_layers': 4,
  'num_attention_heads': 16,
  'num_key_value_heads': 8,
  'tie_word_embeddings': True,
}


@pytest.mark.devices
@pytest.mark.parametrize('dtype', ['', 'float32'])
def test_loading_needs_little_memory_beyond_the_arrays(dtype, tmp_path):
  spec = importlib.util.spec_from_file_location('sharded', TOOL)
  sharded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(sharded)
  (tmp_path / 'config.json').write_text(json.dumps(RAW))
  entries = tensor_names.tensor_mappings(config_from_hf(RAW), 'language')
  shapes = {name: entry.hf_shape for entry in entries for name in entry.hf_names()}
  tensors = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
  safetensors.numpy.save_file(tensors, tmp_path / 'model.safetensors')
  measured = sharded.measure(tmp_path, dtype)
  assert measured['requested'] == 1
  assert measured['bytes'] == sum(tensor.nbytes for tensor in tensors.values()) > 2e8
  # Replicated norms may or may not share memory; nothing else is held twice.
  assert measured['arrays'] == pytest.approx(measured['bytes'] * (2 if dtype else 1), rel=1e-3)
  # A copy of the largest stack has 50 MB in bfloat16 and 100 MB in float32.
  assert measured['beyond'] < 3e7
