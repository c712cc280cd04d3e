"""Packaging. Lower bounds only: pip picks the newest jax that the Python version allows."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
  """Copies configs/ to segjax/_shipped/configs, from where `--config=configs/ppo.py` finds it."""

  def run(self):
    super().run()
    if not self.editable_mode:  # an editable install reads configs/ of the checkout
      target = Path(self.build_lib) / 'segjax' / '_shipped' / 'configs'
      ignore = shutil.ignore_patterns('__pycache__')
      shutil.copytree(ROOT / 'configs', target, ignore=ignore, dirs_exist_ok=True)


setup(
  name='segjax',
  version='0.1.0',
  description='Segment-level RLHF for Llama-3 in JAX/Flax',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='MIT',
  python_requires='>=3.11',
  cmdclass={'build_py': BuildWithConfigs},
  packages=find_packages(include=['segjax', 'segjax.*']),
  # With '.' an editable install puts the checkout on sys.path. Otherwise it uses an import hook,
  # which comes after the path: in the directory that holds a checkout named segjax, that directory
  # would be imported as an empty namespace package.
  package_dir={'': '.'},
  package_data={'segjax.report': ['template/*']},
  install_requires=[
    'absl-py',  # command line flags
    'datasets>=4',  # hub, parquet and Arrow sources of rows
    'flax>=0.12',  # the network (Linen)
    'etils[epath]',  # paths on buckets; orbax brings it
    'fsspec',  # files on buckets; datasets brings it
    'huggingface_hub',  # checkpoints and tokenizers by hub id
    'jax>=0.10.1',
    'jaxtyping',  # array shapes in signatures
    'jinja2',  # chat templates, which transformers does not pull in, and report.html
    'matplotlib',  # curves in report.html and in model cards
    'ml_collections>=1.1',  # configs
    'ml_dtypes',  # bfloat16 in numpy
    'numpy',
    'optax>=0.2.8',  # optimizers
    'orbax-checkpoint>=0.12',  # training checkpoints
    'pyarrow',  # parquet files
    'pyyaml',  # the header of model cards
    'safetensors>=0.6',  # HF weights; older ones do not list tensors by offset
    'scipy',  # quantiles for the intervals of studies; jax brings it
    'tensorboardX',  # metric curves
    'tensorstore',  # arrays of training checkpoints, streamed
    'tokenizers',  # the tokenizer of the built-in demo
    'tqdm',  # progress bars
    'transformers>=5',  # tokenizers and chat templates; no torch needed
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'plan': [  # compile for chips that the machine does not have
      'libtpu',
      # The CUDA plugin of this jax without the libraries of CUDA, and what assembles its kernels.
      # The same plugin as that of `cuda`: jax cannot load two.
      'jax[cuda13-local]; sys_platform == "linux"',
      'nvidia-cuda-nvcc>=13; sys_platform == "linux"',
      'nvidia-nvvm>=13; sys_platform == "linux"',
    ],
    'wandb': ['wandb'],
    'gcs': ['gcsfs'],  # working directories and checkpoints on gs://
    'test': [
      'beartype',  # checks the shape annotations while testing
      'hypothesis',
      'peft',  # parity of adapters
      'pytest',
      'pytest-xdist',  # tests in several processes
      'ruff',
      'scikit-learn',  # parity of the Huber fit
      'torch==2.13.0',  # parity with transformers
    ],
  },
  entry_points={'console_scripts': ['segjax=segjax.main:cli']},
)
