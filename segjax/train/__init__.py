"""Jitted steps and what feeds them; `segjax.train(config, workdir)`, a call, runs jobs.

See `segjax.jobs.launch.train` for the arguments.
"""

import sys
import types
from typing import Any


class _CallableModule(types.ModuleType):
  """The package, which shares its name with the function of the API."""

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    from segjax.jobs import launch

    return launch.train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
