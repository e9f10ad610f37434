"""Jobs around the library: data, models, training loops, studies."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and hasattr(signal, "SIGTERM"):
  # `python -m experiments.<job>` imports for seconds, before there is anything
  # to save, and until `cli.run` listens.
  _STATUS = os.environ.get("GRADMIMIC_STATUS_OF_SIGTERM", "0")
  signal.signal(signal.SIGTERM, lambda *_: os._exit(int(_STATUS)))
