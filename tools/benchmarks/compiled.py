"""Compiles the programs of PPO for chips that the machine need not have, and reads them.

Prints, for each topology: of decode, programs a rollout, bytes that a step copies and moves,
temporaries, collectives, and the tokens per second that 85 % of the memory bandwidth would give;
of the updates and of scoring what `compiled_phases` says. Nothing is run: the time of the host is
not in it, nor in decode that of collectives. Weights are in bfloat16. The JSON line also has, for
GPUs, the conditions of each program of decode that the host waits for.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import compiled_phases

from segjax.config.choices import ROLLOUT_WEIGHTS
from segjax.errors import UserError
from segjax.model import decode_sizes
from segjax.model.chips import GIB
from segjax.model.generate import make_decode_config
from segjax.model.llama import LlamaConfig
from segjax.model.mesh import decode_mesh, make_mesh
from segjax.model.sampling import Sampling
from segjax.plan import abstract_arrays, cuda_compiler, hlo, topologies
from segjax.plan.decode_programs import DecodePrograms, decode_programs
from segjax.plan.hlo_traffic import TrafficReader
from segjax.plan.phases import lower_phase
from segjax.plan.topologies import Topology
from segjax.report.console import log, table

TOPOLOGIES = ('cuda:1xH100-80GB', 'cuda:8xH100-80GB', 'v5p:2x2x2', 'v5e:8x8')
SIZES = {  # vocabulary, width, MLP, layers, heads, key heads, head size
  'small': (4096, 1024, 2048, 4, 8, 8, 128),
  '8b': (128256, 4096, 14336, 32, 32, 8, 128),
  '70b': (128256, 8192, 28672, 80, 64, 8, 128),
}
PHASES = ('decode', *compiled_phases.PHASES)
ROOFLINE = 0.85  # of the bandwidth, which a good program reaches


def add_flags(command: argparse.ArgumentParser) -> None:
  """Adds the flags of `run`."""
  flag = command.add_argument
  flag('--topologies', dest='names', type=_names, default=list(TOPOLOGIES))
  flag('--phases', type=_phases, default=list(PHASES), help='of ' + ', '.join(PHASES))
  flag('--model', choices=SIZES, default='8b')
  flag('--layers', type=int, default=0, help='of the network; 0: as the model has')
  flag('--weights', choices=ROLLOUT_WEIGHTS, default=ROLLOUT_WEIGHTS[0], help='as in rollouts')
  flag('--batch', type=int, default=128, help='responses at once per copy of the weights')
  flag('--live', type=int, default=460, help='positions that a row has on average')
  flag('--limit', type=int, default=2048, help='positions of the longest row, half of them prompt')


def _names(text: str) -> list[str]:
  for name in text.split(','):
    try:
      topologies.parse(name)
    except UserError as error:
      raise argparse.ArgumentTypeError(error) from None
  return text.split(',')


def _phases(text: str) -> list[str]:
  for name in text.split(','):
    if name not in PHASES:
      raise argparse.ArgumentTypeError(f'{name!r} is not one of {", ".join(PHASES)}.')
  return text.split(',')


def run(names: list[str], phases: list[str], **sizes: Any) -> dict[str, Any]:
  """Prints tables; returns the fields of the JSON line.

  Args:
    names: of topologies.
    phases: some of PHASES.
    sizes: the other flags.
  """
  if len(names) > 1:
    records = [_in_a_process(name, phases, sizes) for name in names]
  else:
    records = [_measure(names[0], phases, _Sizes(**sizes))]
  for record in records:
    if 'missing' in record:
      log(record['missing'])
  _print([record for record in records if 'moved_bytes' in record], _Sizes(**sizes))
  compiled_phases.print_records(records)
  return sizes | {'phases': phases, 'topologies': records}


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """The flags that are the same for all topologies."""

  model: str
  layers: int
  weights: str
  batch: int
  live: int
  limit: int

  @property
  def config(self) -> LlamaConfig:
    config = LlamaConfig(*SIZES[self.model], dtype='bfloat16', max_position_embeddings=self.limit)
    return dataclasses.replace(config, num_hidden_layers=self.layers or config.num_hidden_layers)


def _in_a_process(topology: str, phases: list[str], sizes: dict[str, Any]) -> dict[str, Any]:
  """Returns the record of one topology; a process can describe the chips of one."""
  bench = Path(__file__).resolve().parents[1] / 'bench.py'
  command = [sys.executable, str(bench), 'compiled', f'--topologies={topology}']
  command += [f'--{key}={value}' for key, value in sizes.items()]
  command += [f'--phases={",".join(phases)}']
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise ValueError(f'{topology} could not be measured; its message is above.')
  return json.loads(done.stdout.splitlines()[-1])['topologies'][0]


def _measure(name: str, phases: list[str], sizes: _Sizes) -> dict[str, Any]:
  """Returns the record of one topology, in bytes and seconds, each per device."""
  topology = topologies.parse(name)
  record = {'topology': name, 'devices': topology.count}
  try:
    topologies.prepare(topology)
  except UserError as error:
    return record | {'missing': str(error)}
  if 'decode' in phases:
    record |= _measure_decode(topology, sizes)
  others = [phase for phase in phases if phase != 'decode']
  return record | {'updates': compiled_phases.measure(topology, sizes.model, sizes.config, others)}


def _measure_decode(topology: Topology, sizes: _Sizes) -> dict[str, Any]:
  began = time.monotonic()
  rollout = _programs(topology, sizes)
  shape = dict(rollout.mesh.shape)
  log(f'{topology.name}: attention by {rollout.decoder.paged_attention}, mesh {shape}')
  compiled = {}
  for phase in rollout.phases:
    lowered = lower_phase(phase, rollout.mesh)
    compiled[phase.name] = abstract_arrays.compile_program(lowered)
  record = {
    'mesh': shape,
    'attention': rollout.decoder.paged_attention,
    'programs': rollout.count,
    'compile_seconds': round(time.monotonic() - began, 1),
    'temporaries': {
      key: program.memory_analysis().temp_size_in_bytes for key, program in compiled.items()
    },
  }
  if topology.is_cuda:
    record['host_waits'] = {
      key: hlo.host_waits(hlo.parse(program.as_text())) for key, program in compiled.items()
    }
  nodes = [device.process_index if topology.is_cuda else 0 for device in rollout.mesh.devices.flat]
  cache = cuda_compiler.TARGETS[topology.chip.name].cache if topology.is_cuda else 0
  reader = TrafficReader(
    compiled['decode chunk'].as_text(), nodes, rollout.bytes_read(sizes.live), cache
  )
  step = reader.step()
  # What a chunk does before and after its steps is a part of each of them.
  around = reader.outside()
  steps = rollout.decoder.chunk
  moved = step.moved + around.moved // steps
  seconds = moved / (ROOFLINE * topology.chip.bandwidth)
  return record | {
    'copied_bytes': step.copied + around.copied // steps,
    'moved_bytes': moved,
    'cached_bytes': step.cached,
    'collectives': [dataclasses.asdict(c) for c in step.collectives],
    'step_milliseconds': round(1e3 * seconds, 2),
    'tokens_per_second': round(rollout.size.slots / seconds),
  }


def _programs(topology: Topology, sizes: _Sizes) -> DecodePrograms:
  config, longest = sizes.config, sizes.limit // 2
  mesh = make_mesh(devices=topologies.devices(topology))
  sampling = Sampling(max_new_tokens=sizes.limit - longest)
  decoder = make_decode_config(config, sampling, stop_ids=(0,), mesh=mesh)
  decoder = dataclasses.replace(decoder, weights_dtype=sizes.weights)
  params = abstract_arrays.params(config, 'language', config.dtype, mesh)
  mesh = decode_mesh(mesh, config.num_attention_heads, config.num_key_value_heads)
  groups = mesh.shape['data']
  pool = decode_sizes.full_pool(sizes.batch * groups, groups, longest, decoder)
  return decode_programs(decoder, mesh, params, pool, longest)


def _print(records: list[dict[str, Any]], sizes: _Sizes) -> None:
  if not records:
    return
  rows = []
  for record in records:
    temporaries = max(record['temporaries'].values()) / GIB
    rows.append(
      (
        record['topology'],
        str(record['programs']),
        f'{record["compile_seconds"]:.0f}',
        f'{record["copied_bytes"] / 1e9:.1f}',
        f'{record["moved_bytes"] / 1e9:.1f}',
        f'{temporaries:.2f}',
        f'{record["step_milliseconds"]:.1f}',
        f'{record["tokens_per_second"]:,}',
      )
    )
  columns = ('programs', 'compile s', 'GB copied', 'GB moved', 'temporaries GiB', 'ms', 'tokens/s')
  title = (
    f'{sizes.model}, {sizes.batch} rows of {sizes.live} positions per copy of the weights, '
    f'{sizes.config.num_hidden_layers} layers in {sizes.weights}: a step of one device; '
    f'ms and tokens/s of all at {ROOFLINE:.0%} of the memory bandwidth, without exchanges'
  )
  table(title, ('topology', *columns), rows)
  _print_collectives(records)


def _print_collectives(records: list[dict[str, Any]]) -> None:
  rows = [
    (
      record['topology'],
      collective['kind'],
      str(collective['number']),
      f'{collective["bytes"] / 2**20:.2f}',
      'yes' if collective['crosses_nodes'] else 'no',
    )
    for record in records
    for collective in record['collectives']
  ]
  if rows:
    columns = ('topology', 'collective', 'number', 'MiB', 'between nodes')
    table('What a step exchanges, per device', columns, rows)
