"""Jobs around the library: data, models, training loops, studies."""

import gc
import os
import signal
import sys

if sys.argv[:1] == ["-m"]:  # `python -m experiments.<job>`
  # All that imports make stays, so that looking for garbage in it, again and
  # again as it grows, finds none. `cli.run` goes on with it.
  gc.disable()
  from experiments.runtime import renamed

  if _LINE := renamed.find(sys.orig_argv[1:]):
    print(f"error: {_LINE}", file=sys.stderr)
    sys.exit(2)
  if hasattr(signal, "SIGTERM"):
    # A job imports for seconds, before there is anything to save, and until
    # `cli.run` listens.
    _STATUS = os.environ.get("GRADMIMIC_STATUS_OF_SIGTERM", "0")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(int(_STATUS)))
