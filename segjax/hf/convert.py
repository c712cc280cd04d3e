"""HF checkpoints to and from Orbax, and a look at what a checkpoint holds.

An imported checkpoint is a directory with params/ (Orbax), hf/ (config.json and tokenizer files of
the source, byte for byte) and segjax.json (the head). Memory holds the whole model.
"""

import json
import os
import shutil
from pathlib import Path

from segjax.hf import headers

DESCRIPTION = 'segjax.json'
_PARAMS, _SOURCE = 'params', 'hf'


def import_checkpoint(
  source: str | Path, out: str | Path, *, head: str = 'language', dtype: str = '', seed: int = 0
) -> Path:
  """Converts an HF checkpoint (directory or hub id) to Orbax.

  Args:
    dtype: of the parameters; '' keeps the file's, so that an export gives the same bits.
    seed: for a scalar head that the source does not have.

  Raises:
    ValueError: where `out` exists, or the checkpoint is not one we read.
  """
  import jax
  import orbax.checkpoint as ocp

  from segjax.hf import reader, writer

  out = _new(out)
  origin = headers.resolve(source)
  config = reader.load_config(origin)
  params = reader.load_params(origin, config, head, dtype=dtype, key=jax.random.key(seed))
  partial = out.with_name(f'.{out.name}.partial-{os.getpid()}')
  try:
    (partial / _SOURCE).mkdir(parents=True)
    shutil.copyfile(origin / headers.CONFIG, partial / _SOURCE / headers.CONFIG)
    writer.copy_tokenizer(origin, partial / _SOURCE)
    (partial / DESCRIPTION).write_text(json.dumps({'head': head}) + '\n', encoding='utf-8')
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(partial / _PARAMS, params)
    partial.rename(out)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return out


def export_checkpoint(checkpoint: str | Path, out: str | Path, *, dtype: str = '') -> Path:
  """Converts what `import_checkpoint` wrote back to an HF checkpoint.

  Raises:
    ValueError: where `out` is no place to write to, or `checkpoint` is not an imported one.
  """
  import jax
  import orbax.checkpoint as ocp

  from segjax.hf import reader, writer

  checkpoint = Path(checkpoint).expanduser().absolute()
  head = headers.read_json(checkpoint / DESCRIPTION).get('head')
  if not isinstance(head, str) or not (checkpoint / _PARAMS).is_dir():
    raise ValueError(f'{checkpoint} is not an imported checkpoint: no head or no {_PARAMS}/.')
  config = reader.load_config(checkpoint / _SOURCE)
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with ocp.StandardCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(checkpoint / _PARAMS).item_metadata
    target = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), dict(metadata)
    )
    params = checkpointer.restore(checkpoint / _PARAMS, target)
  return writer.save_checkpoint(out, params, config, head, dtype=dtype, source=checkpoint / _SOURCE)


def inspect_checkpoint(source: str | Path) -> str:
  """Names, dtypes and shapes of an HF checkpoint's tensors, then its size and RoPE type.

  Reads headers only and does not import jax.
  """
  checkpoint = headers.open_checkpoint(headers.resolve(source))
  raw = headers.read_json(checkpoint.directory / headers.CONFIG)
  width = max(map(len, checkpoint.tensors))
  lines = [
    f'{name:{width}}  {tensor.dtype:4}  {list(tensor.shape)}'
    for name, tensor in checkpoint.tensors.items()
  ]
  files = len({tensor.file for tensor in checkpoint.tensors.values()})
  rope = headers.rope_parameters(raw)
  architecture = ', '.join(raw.get('architectures') or ['no architecture'])
  lines += [
    '',
    f'{raw.get("model_type")} ({architecture}), rope {rope["rope_type"]}, '
    f'theta {rope["rope_theta"]:g}',
    f'{checkpoint.num_parameters():,} parameters in {len(checkpoint.tensors)} tensors, '
    f'{files} file{"s" if files > 1 else ""}',
  ]
  return '\n'.join(lines)


def _new(out: str | Path) -> Path:
  path = Path(out).expanduser().absolute()
  if path.exists():
    raise ValueError(f'{path} exists; name a new directory for the checkpoint.')
  return path
