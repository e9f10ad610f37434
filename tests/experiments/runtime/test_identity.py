"""What of a config makes a job what it is, and what may change."""

import subprocess
import sys

import processes
import pytest

from configs import classification, contrastive, score, select
from experiments import tasks
from experiments.runtime import identity, renamed, sweep, workdir

# What may be other in a run that goes on: all that is not its identity.
FREE = (
  "checkpoint.",
  "faults.",
  "log_every",
  "mesh.",
  "metrics_sink",
  "profile_steps",
  "select.",
  "study.",
  "mimic.force",
  # Batches are the same, wherever images live and whoever reads them.
  "data.residence",
  "data.worker_processes",
  "data.workers",
  # Paths; a run's fingerprint has the contents.
  "data.filter",
  "data.held_out_shards",
  "data.max_broken_share",
  "data.num_threads",
  "data.shards",
  "mimic.outputs",
  "mimic.reference",
  "model.pretrained",
  "noise.matrix",
  "noise.path",
)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_field_of_a_run_is_decided(task):
  """A new field is part of what a run is unless this list says otherwise."""
  fields = workdir.flatten(tasks.TASKS[task].configs.get_config())
  for field in fields:
    free = any(
      field.startswith(name) if name.endswith(".") else field == name
      for name in FREE
    )
    assert identity.counts(field, "run") != free, field


@pytest.mark.parametrize(
  ("job", "fixed", "free"),
  [
    ("study", "study.reference.num_steps", "study.seeds"),
    ("study", "noise.rate", "study.layers"),
    ("grid", "probe.num_epochs", "probe.rates"),
    ("grid", "optimizer.learning_rate", "noise.rate"),
    ("cross_fitting", "cross.folds", "cross.proxy"),
    ("cross_fitting", "study.seeds", "study.methods"),
    ("tuning", "method", "study.methods"),
    ("tuning", "noise.kind", "noise.rate"),
    ("score", "mimic.layers", "mimic.reference"),
    ("score", "batch_size", "flush_every"),
    ("selection", "filters", "metadata"),
    ("report", "select.binarize", "gallery"),
    ("selection_cost", "noise_rate", "samples"),
    ("pod", "vit_l.depth", "scaling.devices"),
  ],
)
def test_what_jobs_are(job, fixed, free):
  assert identity.counts(fixed, job)
  assert not identity.counts(free, job)
  assert free not in identity.pick_fields({fixed: 1, free: 2}, job)


def test_no_such_job():
  with pytest.raises(ValueError, match="no job 'train'; expected one of run"):
    identity.counts("seed", "train")


@pytest.mark.parametrize(
  ("fields", "job", "fixed", "free"),
  [
    (classification, "run", ("model.widths", (8,)), ("mesh.fsdp", 2)),
    (contrastive, "run", ("num_samples", 9), ("data.shards", ("a.tar",))),
    (score, "score", ("split", "test"), ("learner", "elsewhere")),
    (select, "selection", ("filters", ("random5",)), ("run", "elsewhere")),
  ],
)
def test_a_workdir_is_of_one_config(tmp_path, fields, job, fixed, free):
  def config(*changes):
    made = fields.get_config().unlock()
    made.update_from_flattened_dict(dict(changes))
    return made.lock()

  folder = workdir.claim(tmp_path / "run", config(), fields, job=job)
  assert workdir.read_config(folder) == workdir.as_dict(config())
  workdir.claim(folder, config(free), fields, job=job)
  with pytest.raises(ValueError, match=f"config: {fixed[0]} is .* there and"):
    workdir.check(folder, config(free, fixed), fields, job=job)
  with pytest.raises(ValueError, match=f"another job: '{job}' there and 'swee"):
    workdir.check(folder, config(), fields, job="sweep")
  prints = [
    workdir.config_fingerprint(c, job)
    for c in (config(), config(free), config(fixed))
  ]
  assert prints[0] == prints[1] != prints[2]
  found = workdir.read_json(folder / workdir.CONFIG_FILE)
  del found["job"]
  workdir.write_json(folder / workdir.CONFIG_FILE, found, sealed=True)
  with pytest.raises(ValueError, match="run was made by an earlier release"):
    workdir.check(folder, config(), fields, job=job)


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    (["-m", "experiments.clip_train"], "is now python -m experiments.train, w"),
    (["-mexperiments.clip_filters"], "is now python -m experiments.select --c"),
    (["--config=configs/clip_shapes.py:ess=0.5"], "is now configs/shapes.py."),
    (["--config", "/x/configs/common.py"], "is now configs/classification.py."),
    (["--config.samples_seen=9"], "is now config.num_samples."),
    (
      ["--config.checkpoint.keep_every", "2"],
      "config.checkpoint.keep_every_",
    ),
  ],
)
def test_old_names_are_told_the_new_ones(arguments, expected):
  line = renamed.find(["-m", "experiments.train", "--workdir=x", *arguments])
  assert line is not None
  assert expected in line
  assert "\n" not in line


def test_names_of_today_are_no_old_ones():
  assert all(renamed.command(name) is None for name in ("train", "study"))
  for name in renamed.CONFIGS.values():
    assert (processes.ROOT / "configs" / name).exists(), name
    assert renamed.find([f"--config=configs/{name}:seeds=1"]) is None
  known = {
    field
    for task in tasks.TASKS.values()
    for field in workdir.flatten(task.configs.get_config())
  }
  for old, new in renamed.FIELDS.items():
    assert old not in known
    assert new.split()[0] in known
    assert renamed.find([f"--config.{new.split()[0]}=1"]) is None
  assert renamed.find(["--config.mimic.layers=configs/clip.py"]) is None


def test_an_old_command_ends_with_one_line():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.clip_train", "--workdir=x"],
    cwd=processes.ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert not done.stdout
  assert done.stderr == (
    "error: python -m experiments.clip_train is now python -m"
    " experiments.train, with the same --config.\n"
  )


def test_a_sweeps_old_job_is_told_the_new_one():
  with pytest.raises(ValueError, match=r"It is now experiments\.train"):
    sweep.parse(["one: clip_train --config=configs/shapes.py"])
