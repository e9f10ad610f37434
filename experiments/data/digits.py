"""The handwritten digits bundled with scikit-learn, as a TFDS data set."""

import contextlib
import io
import tempfile

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

NAME = "digits"
_TEST_SIZE = 360
_SPLIT_SEED = 0


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 real 8x8 images of digits, written without TensorFlow or a network.

  The pixels come as whole numbers 0..16 and are stored as
  `round(pixel * 255 / 16)`, so black stays 0 and white becomes 255. The split
  is stratified by class and fixed: 1,437 images to train on, 360 to test.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First version."}  # noqa: RUF012 (TFDS's own form)
  # Nothing is downloaded. Left to itself, TFDS looks for a file of checksums,
  # which takes a package (importlib_resources) that it doesn't install.
  url_infos = None

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Handwritten digits bundled with scikit-learn, 8x8 pixels.",
      homepage="https://archive.ics.uci.edu/dataset/80",
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(num_classes=10),
        }
      ),
      supervised_keys=("image", "label"),
      # Keeps the records in the order of their ids.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    from sklearn.datasets import load_digits  # slow to import
    from sklearn.model_selection import train_test_split

    del dl_manager  # Nothing to download.
    digits = load_digits()
    labels = digits.target
    train, test = train_test_split(
      np.arange(len(labels)),
      test_size=_TEST_SIZE,
      stratify=labels,
      random_state=_SPLIT_SEED,
    )
    return {
      "train": self._generate_examples("train", digits, train),
      "test": self._generate_examples("test", digits, test),
    }

  def _generate_examples(self, split, digits, rows):
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    for position, row in enumerate(rows):
      # An encoded file goes to disk as it is; TFDS would ask TensorFlow to
      # encode an array.
      png = io.BytesIO()
      Image.fromarray(pixels[row]).save(png, format="PNG")
      png.seek(0)
      yield (
        position,
        {
          "id": f"{split}_{position:05d}",
          "image": png,
          "label": int(digits.target[row]),
        },
      )


def _is_prepared(data_dir: str) -> bool:
  """True if a finished set is there; it is renamed into place as a whole."""
  version = tfds.core.Path(data_dir) / NAME / str(Digits.VERSION)
  return (version / "dataset_info.json").exists()


def prepare(data_dir: str) -> None:
  """Writes the data set under `data_dir` unless it is there already.

  Several processes may prepare the same folder at once: each writes under a
  name of its own and renames the whole, and the first to finish wins.

  Args:
    data_dir: The folder that holds TFDS data sets.

  Raises:
    OSError: If `data_dir` can't be written.
  """
  if _is_prepared(data_dir):
    return
  builder = Digits(data_dir=data_dir, file_format="array_record")
  try:
    with (
      tempfile.TemporaryDirectory() as downloads,
      # TFDS announces a download that there is none of.
      contextlib.redirect_stdout(io.StringIO()),
      contextlib.redirect_stderr(io.StringIO()),
    ):
      builder.download_and_prepare(
        download_dir=downloads,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except OSError as error:
    # The rename fails where another process has put a finished set meanwhile.
    if not _is_prepared(data_dir):
      raise OSError(
        f"could not write the data set {NAME!r} under {data_dir}: {error}; "
        "pass a data_dir that can be written, or set TFDS_DATA_DIR"
      ) from error
  logging.info("Prepared %s in %s.", NAME, data_dir)
