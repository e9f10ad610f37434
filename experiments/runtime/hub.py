"""Published files: on this machine, or fetched from a hub when asked for."""

import contextlib
import pathlib
from collections.abc import Sequence

HUB = "hf://"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"


def find(
  source: str | pathlib.Path,
  names: Sequence[str] = (WEIGHTS,),
  beside: Sequence[str] = (CONFIG, PREPROCESSOR),
) -> pathlib.Path:
  """Finds the file that `source` names.

  Args:
    source: a safetensors file, a folder with one of the names, or
      `"hf://owner/name"` (`"hf://owner/name@revision"`), which alone is
      fetched, or taken from the cache, with huggingface_hub.
    names: names of such a file, the likeliest first.
    beside: small files to fetch with it where there are any.

  Returns:
    The path of the `.safetensors` file; one of the hub's is fetched first.

  Raises:
    FileNotFoundError: there is no such file.
    ImportError: a hub's name, without huggingface_hub.
    OSError: the hub can't give the file.
  """
  if str(source).startswith(HUB):
    return _fetch(str(source).removeprefix(HUB), names, beside)
  path = pathlib.Path(source)
  for file in [path / name for name in names] if path.is_dir() else [path]:
    if file.is_file():
      return file
  if path.is_dir():
    there = ", ".join(sorted(x.name for x in path.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
      f"no {' or '.join(names)} in {path} (there is {there}); name a"
      " .safetensors file, or a folder with a file of that name."
    )
  raise FileNotFoundError(
    f"no file or folder {path}; to fetch weights from the Hugging Face Hub,"
    f' write "{HUB}owner/name".'
  )


def _fetch(name, names, beside):
  """Fetches weights and small files beside them, or finds them in the cache."""
  try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
  except ImportError as error:
    raise ImportError(
      f"{HUB}{name} needs huggingface_hub: `pip install huggingface_hub`, or"
      f" download {names[0]} yourself and name the file."
    ) from error
  name, _, revision = name.partition("@")
  options = {"repo_id": name, "revision": revision or None}
  try:
    for other in names[:-1]:
      with contextlib.suppress(EntryNotFoundError):
        file = hf_hub_download(filename=other, **options)
        break
    else:
      file = hf_hub_download(filename=names[-1], **options)
    for optional in beside:
      with contextlib.suppress(EntryNotFoundError):
        hf_hub_download(filename=optional, **options)
  except Exception as error:  # whatever its versions and their clients raise
    raise OSError(
      f"{' or '.join(names)} of {HUB}{name} can't be fetched: {error} Check the"
      " name and the connection, or download the file yourself and name it."
    ) from error
  return pathlib.Path(file)
