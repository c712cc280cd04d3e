"""Identifies the content of inputs that are not local: hub repositories, files on buckets.

Nothing is downloaded. '' where the content cannot be identified, for example without a network.
"""

import contextlib
import hashlib
from pathlib import Path

import fsspec

from segjax.data.sources import is_hub_id
from segjax.hf.adapter_config import is_adapter
from segjax.hf.checkpoint import open_checkpoint

_TIMEOUT = 10.0  # seconds


def identify(path: str, is_rows: bool) -> str:
  """Returns the commit of a hub id, or a hash of the listing of a bucket's files.

  Args:
    path: a hub id 'owner/name', or a URL.
    is_rows: whether the hub id is that of a dataset, not of a model.
  """
  if '://' in path:
    return _list_files(path)
  return _find_commit(path, is_rows) if is_hub_id(path) else ''


def _list_files(url: str) -> str:
  """Returns a hash of names, sizes, times and checksums as the bucket lists them."""
  try:
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    listing = sorted((name, str(info)) for name, info in files.find(root, detail=True).items())
  except Exception:  # each kind of bucket raises its own; reading the rows names the reason
    return ''
  return hashlib.sha256(repr(listing).encode()).hexdigest() if listing else ''


def _find_commit(name: str, is_rows: bool) -> str:
  """Returns the commit that would be read now: the hub's, without an answer that of the cache."""
  import huggingface_hub
  from huggingface_hub import constants

  kind = 'dataset' if is_rows else 'model'
  with contextlib.suppress(Exception):  # no network, hub down, gated: classes of several libraries
    return huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=_TIMEOUT).sha or ''
  folder = f'{kind}s--{name.replace("/", "--")}'
  with contextlib.suppress(OSError):
    return (Path(constants.HF_HUB_CACHE) / folder / 'refs' / 'main').read_text().strip()
  return _prepared_dataset(name) if is_rows else ''


def cached_checkpoint(name: str) -> str | None:
  """Returns the directory of a hub id in the cache, None if it is not complete there."""
  import huggingface_hub

  with contextlib.suppress(Exception):  # not there, or a part of it is missing
    directory = huggingface_hub.snapshot_download(name, local_files_only=True)
    if not is_adapter(Path(directory)):
      open_checkpoint(directory)
    if (Path(directory) / 'tokenizer.json').exists():
      return directory
  return None


def _prepared_dataset(name: str) -> str:
  """Returns the commit of the newest copy that `datasets` keeps, by the name of its directory."""
  import datasets

  # OWNER___NAME/CONFIG/VERSION/COMMIT
  cache = Path(datasets.config.HF_DATASETS_CACHE)
  copies = [path for path in cache.glob(f'{name.replace("/", "___")}/*/*/*') if path.is_dir()]
  return max(copies, key=lambda path: path.stat().st_mtime).name if copies else ''
