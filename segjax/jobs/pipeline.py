"""Runs the jobs of config.stages in turn, each from the last one's output.

A finished stage is reused where its settings, the content of its inputs and its own output are
what they were: `done.json` in the stage's directory remembers.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from segjax import settings as typed
from segjax.jobs import demo, evaluate, normalizer, ppo, reward, sft
from segjax.jobs.stage import Stage
from segjax.report.console import say
from segjax.settings import Settings
from segjax.train.segment_reward import FILE as SEGMENT_REWARD


@dataclasses.dataclass(frozen=True)
class Job:
  """A job, the settings it reads, the paths among them, and what it leaves (by stage directory)."""

  run: Callable[[Stage], dict[str, Any]]
  sections: tuple[str, ...]
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]


_COMMON = ('seed', 'max_bad_steps', 'mesh', 'runtime', 'data')
JOBS = {
  'demo': Job(demo.run, ('seed', 'demo', 'network'), (), ('model', 'rows')),
  'sft': Job(sft.run, (*_COMMON, 'policy', 'sft'), ('policy.path', 'data.path'), ('model',)),
  'reward': Job(
    reward.run,
    (*_COMMON, 'policy', 'reference', 'reward'),
    ('policy.path', 'reference.path', 'data.path'),
    ('model',),
  ),
  'normalizer': Job(
    normalizer.run,
    (*_COMMON, 'policy', 'reference', 'reward_model', 'normalizer'),
    ('policy.path', 'reference.path', 'reward_model.path', 'data.path'),
    (),
  ),
  'ppo': Job(
    ppo.run,
    (*_COMMON, 'policy', 'reference', 'reward_model', 'critic', 'rollout', 'ppo'),
    ('policy.path', 'reference.path', 'reward_model.path', 'critic.init', 'data.path'),
    ('model', 'critic'),
  ),
  'evaluate': Job(
    evaluate.run,
    (*_COMMON, 'policy', 'reference', 'reward_model', 'rollout', 'ppo', 'evaluate'),
    ('policy.path', 'reference.path', 'reward_model.path', 'data.path'),
    ('results.json',),
  ),
}


def run(settings: Settings, workdir: Path, mesh: Mesh, started: float) -> dict[str, Any]:
  """Runs the stages; returns their results by name.

  Args:
    started: time.time() of the process's start, for `wall_seconds` of the demo's results.json.
  """
  results = {}
  with jax.set_mesh(mesh):
    for name in settings.stages:
      stage = Stage(name, wire(name, settings, workdir), workdir / name, mesh)
      results[name] = run_stage(stage)
  if 'demo' in results and 'evaluate' in results:
    _write_results(settings, workdir, results, started)
  return results


def wire(name: str, settings: Settings, workdir: Path) -> Settings:
  """The settings of a stage: paths left empty are filled with what earlier stages of the run left.

  Where the built-in language is among the stages, it gives each stage its rows.
  """
  stages = settings.stages
  before = stages[: stages.index(name)]
  made = {stage: str(workdir / stage / 'model') for stage in before if JOBS[stage].outputs}
  policy = made.get('sft') or made.get('demo', '')
  wired = {
    'policy.path': made.get('ppo', policy) if name == 'evaluate' else policy,
    'reference.path': policy if name != 'sft' else '',
    'reward_model.path': made.get('reward', ''),
  }
  if 'demo' in stages:
    rows = {'sft': 'sft', 'ppo': 'prompts', 'evaluate': 'held_out'}.get(name, 'pairs')
    wired['data.path'] = str(workdir / 'demo' / 'rows' / f'{rows}.jsonl.gz')
  missing = {
    key: value
    for key, value in wired.items()
    if value and not getattr(settings, key.split('.')[0]).path
  }
  return typed.replace(settings, **missing)


def run_stage(stage: Stage) -> dict[str, Any]:
  """Runs one stage, or reuses what it left before."""
  job = JOBS[stage.name]
  done = stage.directory / 'done.json'
  key = {'settings': _sections(stage.settings, job), 'inputs': _input_hashes(stage.settings, job)}
  if done.exists():
    before = json.loads(done.read_text(encoding='utf-8'))
    if before['key'] == json.loads(json.dumps(key)) and before['outputs'] == _outputs(stage, job):
      say(f'{stage.name}: reused from {stage.directory}; settings and inputs are the same')
      return before['results']
    done.unlink()
  say(f'{stage.name}: starting')
  begun = time.monotonic()
  stage.directory.mkdir(parents=True, exist_ok=True)
  results = job.run(stage)
  results['seconds'] = time.monotonic() - begun
  say(f'{stage.name}: done in {results["seconds"]:.1f} s')
  text = {'key': key, 'results': results, 'outputs': _outputs(stage, job)}
  done.write_text(json.dumps(text, indent=2) + '\n', encoding='utf-8')
  return results


def _sections(settings: Settings, job: Job) -> dict[str, Any]:
  values = dataclasses.asdict(settings)
  return {name: values[name] for name in job.sections}


def _input_hashes(settings: Settings, job: Job) -> dict[str, str]:
  """Content of the local files and directories that the settings point at."""
  found = {}
  for key in job.inputs:
    section, _, name = key.partition('.')
    path = getattr(getattr(settings, section), name)
    if path and Path(path).exists():
      # The normalizer job writes segment_reward.json into its own input.
      skip = SEGMENT_REWARD if job.run is normalizer.run else ''
      found[key] = content_hash(Path(path), skip)
  return found


def _outputs(stage: Stage, job: Job) -> dict[str, str]:
  paths = {name: stage.directory / name for name in job.outputs}
  skip = SEGMENT_REWARD
  if job.run is normalizer.run:
    name = f'{stage.settings.reward_model.path}/{SEGMENT_REWARD}'
    paths, skip = {name: Path(name)}, ''
  return {name: content_hash(path, skip) for name, path in paths.items() if path.exists()}


def content_hash(path: Path, skip: str = '') -> str:
  """SHA-256 over names and bytes of a file or a directory's files, but those named `skip`."""
  digest = hashlib.sha256()
  files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
  for file in files:
    if file.name == skip:
      continue
    digest.update(f'{file.relative_to(path)}\0{file.stat().st_size}\0'.encode())
    with file.open('rb') as stream:
      while block := stream.read(1 << 20):
        digest.update(block)
  return digest.hexdigest()


def _write_results(settings: Settings, workdir: Path, results: dict[str, Any], started: float):
  """results.json of the whole demo, the figures by which it is judged."""
  before, after = results['evaluate']['before'], results['evaluate']['after']
  held_out = json.loads((workdir / 'reward' / 'held_out.json').read_text(encoding='utf-8'))

  def both(key):
    return {'before': before[key], 'after': after[key]}

  text = {
    'seed': settings.seed,
    'wall_seconds': time.time() - started,
    'gold': both('gold'),
    'kl_nats': after['kl_nats'],
    'eos_rate': both('eos_rate'),
    'length': both('length'),
    'segments': both('segments'),
    'boundary_f1': before['boundary_f1'],
    'reward_accuracy': {
      'held_out': results['reward']['held_out_accuracy'],
      'best_possible': demo.best_possible_accuracy(workdir / 'demo' / 'rows', held_out),
    },
  }
  (workdir / 'results.json').write_text(json.dumps(text, indent=2) + '\n', encoding='utf-8')
  accuracy = text['reward_accuracy']
  say(
    f'\nreward model, held-out pairs: accuracy {accuracy["held_out"]:.3f}, best possible under the '
    f'known labels {accuracy["best_possible"]:.3f}\n'
    f'policy after PPO: {workdir}/ppo/model   figures: {workdir}/results.json   '
    f'{text["wall_seconds"]:.0f} s in all'
  )
