"""A user's script, which type checkers read against the installed wheel."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa

import gradmimic_jax as gm

Batch = dict[str, jax.Array]
Params = dict[str, jax.Array]


def losses_fn(params: Params, batch: Batch) -> jax.Array:
  return jnp.square(batch["x"] @ params["w"] - batch["y"][:, None]).sum(1)


params: Params = {"w": jnp.zeros((2, 2))}
reference: Params = {"w": jnp.eye(2)}
batch: Batch = {"x": jnp.eye(2), "y": jnp.array([0, 1])}

step = gm.mimic_value_and_grad(losses_fn, weighting=gm.ess_softmax(0.3))
(loss, info), grads = step(params, reference, batch)
rows: jax.Array = info.scores
optimizer = gm.mimic(optax.sgd(0.1), reference)
chain = optax.chain(gm.reweight_by_mimic_score(reference), optax.sgd(0.1))
state = optimizer.init(params)
found_scores: gm.MimicScores = gm.mimic_scores(losses_fn)(
  params, reference, batch
)
report: gm.ReferenceReport = gm.check_reference(
  losses_fn, params, reference, batch
)
print(report, report.verdict, report.to_arrow())
weighting: gm.Weighting = gm.warmup(gm.softmax(0.5), steps=3)
for one in (gm.top_fraction(0.3), gm.positive(), gm.uniform()):
  print(gm.effective_sample_size(one(rows, jnp.ones(2, bool))))
direction: gm.Direction = gm.toward_outputs(lambda p, b: b["x"] @ p["w"])
gm.toward_weights()
gm.toward_clean_gradient(losses_fn)
gm.excess_loss(lambda outputs, batch: outputs)
gm.output_agreement(lambda outputs, batch: outputs)
gm.random_score()
gm.check_independence(losses_fn, params, batch)

with gm.ScoreLedger("scores", fingerprints={"data": "d"}) as ledger:
  ledger.append([7, 3], [0.5, -1.0], step=1, epoch=0)
ids, values = ledger.matrix("score")
table: pa.Table = ledger.table()
selection: gm.Selection = gm.select(ledger)
keep: np.ndarray = selection.keep
quality: gm.DatasetQuality = gm.dataset_quality(selection)
curve: gm.RemovalCurve = gm.removal_curve(selection)
print(quality.clean_fraction + curve.recommended, selection.kept_fraction)
frame = selection.to_pandas()
arrow: pa.Table = selection.to_arrow()
issues: np.ndarray = gm.find_label_issues(values)
scores: np.ndarray = gm.label_quality_scores(values)
members: gm.Membership = gm.discover_members(selection)
best = gm.subset(selection, 0.5)
classes: pa.Table = gm.class_table(selection, [0, 1])
mine = gm.filters.Filter([1, 2], "mine", pool=range(9))
both: gm.filters.Filter = mine & ~gm.filters.of_selection(selection)
kept: np.ndarray = gm.filters.compose("a & b", {"a": mine, "b": selection})
overlap: pa.Table = gm.filters.overlap({"a": mine, "b": [1]})
path: pathlib.Path = gm.export.write_filter("kept.npy", both)
again = gm.export.read_filter(path)
gm.export.write_parquet("s.parquet", selection)
gm.export.write_csv("s.csv", gm.export.read_parquet("s.parquet"))
page: pathlib.Path = gm.report(ledger, selection, "report.html")
area: float = gm.metrics.auroc(values[:, 0], [True, False])
ax = gm.plots.removal_curve(curve)
ax.set_title("mine")
gm.plots.scores_by_group(values, [0, 1], ax=ax)
gm.plots.quality_interval(quality)
gm.plots.learning_curves({"a": [([0, 1], [2.0, 1.0])]})
steps: float | None = gm.metrics.steps_to([0, 1], [2.0, 1.0], 1.5)
head: Any = gm.linear_head.scores
omp = gm.matching.omp(0.3)
version: str = gm.__version__


def train(model: Any, other: Any) -> Any:
  fn = gm.nnx.mimic_value_and_grad(losses_fn, weighting=gm.uniform())
  (loss, info), grads = fn(model, other, batch)
  print(loss + info.scores.sum())
  return grads


issue_type: type = gm.cleanlab.register()
