"""Models in HF form, small and untrained, for tests of what a user calls."""

import shutil
from pathlib import Path

import jax

from segjax import checks, presets
from segjax.data.tokenizer import fingerprint
from segjax.hf import reader
from segjax.hf.writer import save_checkpoint
from segjax.jobs import pipeline
from segjax.model.heads import init_params
from segjax.model.sharding import make_mesh
from segjax.settings import Segmentation
from segjax.train import segment_reward
from segjax.train.segment_reward import SegmentReward
from segjax.types import Normalizer

TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
  '{% if add_generation_prompt %}assistant: {% endif %}'
)


SIZES = {  # of a run so small that compiling is all it costs
  'network.hidden_size': 16,
  'network.intermediate_size': 32,
  'network.num_hidden_layers': 1,
  'network.num_attention_heads': 2,
  'network.num_key_value_heads': 1,
  'network.max_position_embeddings': 128,
  'demo.sft_rows': 32,
  'demo.pairs': 32,
}


def one_device():
  """A mesh of one of the eight devices."""
  return make_mesh(devices=jax.devices()[:1])


def policy(workdir: Path) -> Path:
  """The built-in language's network, random, with its tokenizer; its rows are beside it."""
  config = presets.default_config()
  config.stages = ('demo',)
  config.update_from_flattened_dict(SIZES)
  stages = pipeline.prepare(checks.from_config(config), workdir, one_device())
  pipeline.run(stages, workdir, 0.0)
  return workdir / 'demo' / 'model'


def with_template(source: Path, target: Path) -> Path:
  """A copy of a checkpoint with a chat template of its own."""
  shutil.copytree(source, target, copy_function=shutil.copyfile)
  (target / 'chat_template.jinja').write_text(TEMPLATE)
  return target


def reward_model(
  source: Path, target: Path, normalizer: Normalizer | None, segmentation: Segmentation
) -> Path:
  """A random reward model with the sizes and the tokenizer of `source`."""
  config = reader.load_config(source)
  params = jax.jit(init_params, static_argnums=(1, 2))(jax.random.key(7), config, 'scalar')
  save_checkpoint(target, params, config, 'scalar', source=source)
  kind = 'regression' if normalizer else ''
  meaning = SegmentReward(segmentation, normalizer, kind, fingerprint(str(source)))
  segment_reward.write(target, meaning)
  return target
