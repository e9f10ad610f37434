"""The study: from a config to the table, and the numbers it must show."""

import json
import pathlib

import pytest

from configs import digits
from experiments.studies import runner as study, summary as study_report
from experiments.training import trainer as train


def test_a_study_end_to_end(make_config, tmp_path, monkeypatch):
  config = make_config()
  summary = study.run_study(config, tmp_path / "study")
  assert list(summary["runs"]) == [
    "reference",
    "sgd",
    "grad_mimic",
    "retrained_grad_mimic",
  ]
  (detection,) = summary["detection"]["grad_mimic"]
  assert detection["clean_fraction"] == pytest.approx(0.5, abs=1e-3)
  assert 0.9 < detection["auroc"] <= 1
  for path in summary["figures"]:
    assert pathlib.Path(path).read_bytes().startswith(b"\x89PNG")
  assert "Remove" in pathlib.Path(summary["report"]).read_text()
  stored = json.loads((tmp_path / "study" / "summary.json").read_text())
  assert stored == summary
  assert "grad_mimic" in study_report.table(summary)

  # Finished parts are not repeated, wherever the folder lies by now.
  (tmp_path / "study").rename(tmp_path / "moved")
  monkeypatch.setattr(train.Run, "to_the_end", None)
  again = study.run_study(config, tmp_path / "moved")
  assert again["runs"] == summary["runs"]


def test_a_method_that_is_not_there_stops_a_study_at_once(
  make_config, tmp_path
):
  config = make_config(**{"study.methods": ("sgd", "grad_mimick")})
  with pytest.raises(ValueError, match="expected one of sgd, grad_mimic"):
    study.run_study(config, tmp_path / "study")
  assert not (tmp_path / "study").exists()


def test_a_study_of_nothing(make_config, tmp_path):
  with pytest.raises(ValueError, match="expected at least one of each"):
    study.run_study(make_config(**{"study.seeds": ()}), tmp_path / "study")


@pytest.mark.slow
def test_a_study_of_resized_images(make_config, tmp_path):
  """What is kept is of the images that were trained on, at their size."""
  config = make_config(
    **{"data.image_size": 6, "study.methods": ("grad_mimic",)}
  )
  summary = study.run_study(config, tmp_path / "study")
  (kept,) = summary["runs"]["retrained_grad_mimic"]
  assert 0 < kept["train_samples"] < 1437


@pytest.mark.slow
@pytest.mark.parametrize(
  ("rate", "sgd", "grad_mimic"), [(0.4, 0.88, 0.97), (0.6, 0.70, 0.95)]
)
def test_the_numbers_on_digits(tmp_path, digits_dir, rate, sgd, grad_mimic):
  config = digits.get_config(f"rate={rate}").unlock()
  config.data.data_dir = digits_dir
  summary = study.run_study(config.lock(), tmp_path / "study")

  def mean(entries, key):
    return sum(entry[key] for entry in entries) / len(entries)

  runs, found = summary["runs"], summary["detection"]["grad_mimic"]
  assert mean(runs["sgd"], "test_accuracy") == pytest.approx(sgd, abs=0.05)
  assert mean(runs["grad_mimic"], "test_accuracy") >= grad_mimic
  assert mean(found, "auroc") >= 0.99
  assert mean(found, "f1") >= 0.95
