"""Loading the networks of a run."""

import shutil

import numpy as np
import pytest
import safetensors.numpy
from fixtures import runs

from segjax.config.settings import Segmentation
from segjax.errors import UserError
from segjax.run import models, weights
from segjax.types import Normalizer


@pytest.mark.parametrize('head', ['language', 'scalar'])
def test_weights_that_are_not_finite_are_refused(small, language, one_device, tmp_path, head):
  directory, runtime = tmp_path / 'spoilt', small('ppo').runtime
  if head == 'scalar':
    runs.reward_model(language / 'model', directory, Normalizer(), Segmentation())
  else:
    shutil.copytree(language / 'model', directory)
  tensors = safetensors.numpy.load_file(directory / 'model.safetensors')
  tensors['model.norm.weight'] = tensors['model.norm.weight'] * np.float32(np.nan)
  safetensors.numpy.save_file(tensors, directory / 'model.safetensors')
  config = models.load_network_config(directory, runtime, one_device, print, head=head)
  with pytest.raises(UserError, match=r'spoilt: NaN or infinity in tensor model\.norm\.weight'):
    weights.load_params(directory, config, head, runtime, one_device)
