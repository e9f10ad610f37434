"""What a run carries besides parameters: statistics, keys and an average.

References are loops as Flax's own guides write them, all gradients one by one,
and NumPy.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import own_models
import pytest
from flax import nnx
from ml_collections import ConfigDict

import gradmimic_jax as gm
from configs import classification as config_lib, score as score_config
from experiments import methods, models
from experiments.runtime import checkpoint
from experiments.tasks.classification import losses
from experiments.training import (
  optimizer,
  scoring,
  steps,
  trainer,
)
from tests.experiments import tiny

SHAPE, CLASSES, BATCH, RATE = (4, 4, 1), 3, 6, 0.3
BOTH = "norm='batch', rate=0.5"
MASKED = "norm='layer', rate=0.5"


def mimic_config(**fields):
  config = config_lib.get_config().mimic.copy_and_resolve_references().unlock()
  config.update(
    {
      "weighting": "softmax",
      "temperature": 0.2,
      "check_independence": False,  # takes a compilation
      **fields,
    }
  )
  return config


class Case:
  """A model of the user's own, its steps and their batches."""

  def __init__(self, options, name="Net", **fields):
    self.options, self.name = options, name
    section = {"name": f"own_models:{name}", "options": options, **fields}
    self.apply, self.params = models.create(
      ConfigDict(section), input_shape=SHAPE, num_classes=CLASSES, seed=0
    )
    self.losses_fn = losses.make_losses_fn(self.apply)
    self.outputs = losses.make_outputs(
      losses.make_outputs_fn(self.apply), self.apply
    )
    self.tx = optax.sgd(RATE)

  def state(self, seed=0, *, average=False):
    params, statistics = jax.tree.map(
      jnp.copy, (self.params, self.apply.statistics)
    )
    model_state = steps.make_model_state(self.outputs, statistics, seed)
    return steps.init_state(params, self.tx, model_state, average=average)

  def step(self, method="sgd", average=0.0, out_shardings=None, **fields):
    config = mimic_config(**fields)
    return steps.make_train_step(
      self.losses_fn,
      self.tx,
      methods.create(method, config),
      config,
      self.outputs,
      average=average,
      out_shardings=out_shardings,
    )

  def reference(self):
    return jax.tree.map(lambda x: x + jnp.cos(7 * x), self.params)


make_case = functools.cache(Case)


def batches(count, size=BATCH):
  rng = np.random.default_rng(0)
  return [
    {
      "image": jnp.asarray(rng.normal(1, 2, (size, *SHAPE)), jnp.float32),
      "label": jnp.asarray(rng.integers(0, CLASSES, size), jnp.int32),
      "mask": jnp.ones(size, bool),
    }
    for _ in range(count)
  ]


def close(found, expected, rtol=1e-5, atol=1e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    found,
    expected,
  )


def cross_entropy(logits, batch):
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])


def nnx_loop(case, taken):
  """Steps of a model with BatchNorm as Flax's guide has them."""
  net = own_models.Net(num_classes=CLASSES, input_shape=SHAPE, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(net, case.tx, wrt=nnx.Param)
  net.train()
  for batch in taken:
    grads = nnx.grad(
      lambda net, batch: cross_entropy(net(batch["image"]), batch).mean()
    )(net, batch)
    optimizer.update(net, grads)
  net.eval()
  params, statistics, _ = nnx.state(net, nnx.Param, nnx.BatchStat, ...)
  return (
    nnx.to_pure_dict(params),
    nnx.to_pure_dict(statistics),
    net(taken[0]["image"]),
  )


def linen_loop(case, taken):
  """The same by Linen and optax."""
  net = own_models.LinenNet(num_classes=CLASSES)
  images = taken[0]["image"]
  variables = net.init(jax.random.key(0), images[:2], train=False)
  params, kept = variables["params"], {"batch_stats": variables["batch_stats"]}
  opt_state = case.tx.init(params)
  for batch in taken:

    def loss(params, kept=kept, batch=batch):
      logits, new = net.apply(
        {"params": params, **kept},
        batch["image"],
        train=True,
        mutable=["batch_stats"],
      )
      return cross_entropy(logits, batch).mean(), new

    grads, kept = jax.grad(loss, has_aux=True)(params)
    updates, opt_state = case.tx.update(grads, opt_state)
    params = optax.apply_updates(params, updates)
  return (
    params,
    kept,
    net.apply({"params": params, **kept}, images, train=False),
  )


@functools.cache
def averaging_step(case):
  return case.step(average=0.8)


@pytest.mark.parametrize(
  ("name", "loop"),
  [
    ("Net", nnx_loop),
    pytest.param("LinenNet", linen_loop, marks=pytest.mark.slow),
  ],
)
def test_batch_norm_trains_and_evaluates_as_flaxs_own_loop(name, loop):
  """Two steps, to float32 rounding: rtol 1e-5."""
  case, taken = make_case("", name), batches(2)
  state, step = case.state(average=True), averaging_step(case)
  for batch in taken:
    state, _ = step(state, None, batch)
  params, variables = steps.evaluated(state._replace(average=()))
  expected = jax.jit(lambda taken: loop(case, taken))(taken)
  close(params, expected[0])
  close(variables["statistics"], expected[1])
  assert not np.allclose(
    *map(jax.tree.leaves, (variables["statistics"], case.apply.statistics))
  )
  logits = case.apply(params, taken[0]["image"], **variables)
  np.testing.assert_allclose(logits, expected[2], rtol=1e-4, atol=1e-5)


def test_the_average_is_numpys_and_is_what_is_evaluated():
  case, decay = make_case(""), 0.8
  state, step = case.state(average=True), averaging_step(case)
  seen = []
  taken = batches(4)
  taken[1]["image"] = taken[1]["image"].at[0, 0].set(jnp.nan)
  for batch in taken:
    state, output = step(state, None, batch)
    seen.append(jax.device_get((state.params, state.model_state.statistics)))
    assert int(output.metrics["skipped"]) == (len(seen) == 2)
  weights = decay ** np.arange(4)[::-1]
  params, variables = steps.evaluated(state)
  expected = jax.tree.map(
    lambda *xs: np.average(np.stack(xs), axis=0, weights=weights), *seen
  )
  close((params, variables["statistics"]), expected)
  # A step that is skipped leaves all as it was.
  jax.tree.map(np.testing.assert_array_equal, seen[0], seen[1])


@pytest.mark.slow
def test_scores_with_batch_norm_are_those_of_all_gradients_one_by_one():
  case, (batch,) = make_case(""), batches(1)
  step = case.step("grad_mimic", engine="forward")
  reference = case.reference()
  state, output = step(case.state(), reference, batch)

  def losses_of(params):
    logits, statistics = case.apply.forward(
      params, case.apply.statistics, batch["image"], jax.random.key(0)
    )
    return cross_entropy(logits, batch), statistics

  rows, statistics = jax.jit(jax.jacrev(losses_of, has_aux=True))(case.params)
  gap = jax.tree.map(lambda r, p: r - p, reference, case.params)
  norm = optax.tree.norm(gap)
  along = jax.tree.map(
    lambda row, g: np.tensordot(row, g, np.ndim(g)), rows, gap
  )
  scores = -sum(jax.tree.leaves(along)) / norm
  np.testing.assert_allclose(output.samples["score"], scores, rtol=1e-4)
  close(state.model_state.statistics, statistics)
  weights = jax.nn.softmax(scores / 0.2)
  close(
    state.params,
    jax.tree.map(
      lambda p, row: p - RATE * np.tensordot(weights, row, 1),
      case.params,
      rows,
    ),
    rtol=1e-4,
    atol=1e-5,
  )


def test_dropout_goes_by_seed_and_step():
  case, (batch,) = make_case(MASKED), batches(1)
  reference = case.reference()
  step = case.step("grad_mimic", engine="forward")
  whole = step(case.state(), reference, batch)
  later = case.state()._replace(step=whole[0].step)
  found = [
    step(state, reference, batch)[1].samples["loss"]
    for state in (case.state(), later, case.state(seed=1))
  ]
  np.testing.assert_array_equal(found[0], whole[1].samples["loss"])
  for other in found[1:]:
    assert np.all(np.abs(found[0] - other) > 1e-4)


def test_nothing_is_random_and_nothing_moves_where_a_batch_is_scored():
  case, (batch,) = make_case(BOTH), batches(1)
  config = mimic_config()
  statistics = jax.tree.map(lambda x: x + 0.5, case.apply.statistics)
  found = steps.make_score_step(
    case.losses_fn,
    methods.create("grad_mimic", config),
    config,
    case.outputs,
  )(case.params, case.reference(), batch, statistics=statistics)
  logits = case.apply(case.params, batch["image"], statistics)
  np.testing.assert_allclose(
    found["loss"], cross_entropy(logits, batch), rtol=1e-5
  )


@pytest.mark.parametrize(
  ("method", "fields"),
  [
    ("sgd", {"microbatch_size": 2}),
    ("grand", {}),
    ("grad_mimic", {"engine": "per_sample"}),
    ("grad_mimic", {"engine": "ghost"}),
    ("grad_mimic", {"microbatch_size": 2}),
  ],
)
def test_batch_norm_is_refused_where_samples_are_shown_alone(method, fields):
  case = make_case("")
  with pytest.raises(
    ValueError,
    match=r"own_models:Net has statistics of batches \(norm/mean, norm/var\)"
    ".*engine='forward' and config.mimic.microbatch_size=None",
  ):
    case.step(method, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgd", "distillation"])
def test_microbatches_give_the_whole_batchs_gradient(method):
  """In float64, with padding, and of a size that is no divisor."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(4, CLASSES))), "b": jnp.ones(3)}

    def apply(params, images):
      return jnp.tanh(images @ params["w"]) + params["b"]

    whole = {
      "image": jnp.asarray(rng.normal(size=(7, 4))),
      "label": jnp.asarray(rng.integers(0, CLASSES, 7)),
      "mask": jnp.arange(7) < 6,
    }
    broken = {**whole, "image": whole["image"].at[2, 1].set(jnp.nan)}
    reference = jnp.asarray(rng.normal(size=(7, CLASSES)))
    tx = optax.sgd(1.0)
    outputs = losses.make_outputs(losses.make_outputs_fn(apply))

    def objective(params):
      logits = apply(params, whole["image"][:6])
      if method == "sgd":
        return jnp.mean(cross_entropy(logits, {"label": whole["label"][:6]}))
      return jnp.mean(losses.divergences(reference[:6], logits))

    def run(size, batch):
      config = mimic_config(microbatch_size=size)
      step = steps.make_train_step(
        losses.make_losses_fn(apply),
        tx,
        methods.create(method, config),
        config,
        outputs,
      )
      state = steps.init_state(jax.tree.map(jnp.copy, params), tx)
      state, output = step(state, reference, batch)
      left = jax.tree.map(lambda p, q: p - q, params, state.params)
      return left, output.metrics

    found, metrics = run(3, whole)
    close(found, jax.jit(jax.grad(objective))(params), rtol=1e-12, atol=1e-14)
    assert int(metrics["nonfinite"]) == 0
    close(run(3, broken), run(None, broken), rtol=1e-12)


def section(**fields):
  config = config_lib.get_config().optimizer.copy_and_resolve_references()
  config = config.unlock()
  config.update(
    {"name": "sgd", "schedule": "constant", "learning_rate": 1.0, **fields}
  )
  return config


PARAMS = {
  "body": {"kernel": np.full((2, 2), 2, np.float32)},
  "head": {"b": np.ones(2, np.float32)},
}


@pytest.mark.parametrize(
  ("decaying", "expected"),
  [("all", (1, 1)), ("matrices", (1, 0)), ("^head/", (0, 1))],
)
def test_weights_decay_by_the_pattern_of_their_paths(decaying, expected):
  tx = optimizer.create(
    section(decaying=decaying, weight_decay=0.5), total_steps=9
  )
  zeros = jax.tree.map(np.zeros_like, PARAMS)
  updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
  close(updates["body"]["kernel"], -0.5 * 2 * expected[0] * np.ones((2, 2)))
  close(updates["head"]["b"], -0.5 * expected[1] * np.ones(2))


def test_a_gradient_is_scaled_down_to_the_norm_and_never_up():
  tx = optimizer.create(section(clip_norm=0.5, weight_decay=0.0), total_steps=9)
  for size in (3.0, 0.1):
    grads = jax.tree.map(lambda x, size=size: np.full_like(x, size), PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    factor = min(1, 0.5 / np.sqrt(6 * size**2))
    close(updates, optax.tree.scale(-factor, grads))


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      {"decaying": "matrix"},
      "decaying is 'matrix'; expected 'all', 'mat",
    ),
    ({"decaying": "("}, "is not a regular expression"),
    ({"clip_norm": -1.0}, "clip_norm is -1.0; expected the largest norm"),
    ({"average": 1.0}, "average is 1.0; expected a decay such as 0.999"),
  ],
)
def test_an_optimizers_fields_that_make_no_sense(fields, message):
  def make(config):
    optimizer.create(config, total_steps=9).init(PARAMS)
    optimizer.read_average(config)

  with pytest.raises(ValueError, match=message):
    make(section(**fields))


@pytest.mark.slow
def test_devices_share_the_step_and_draw_the_same_masks():
  """Eight of them: statistics are of the whole batch, as on a single one."""
  case, (batch,) = make_case(BOTH), batches(1, size=16)
  mesh = jax.make_mesh(
    (4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2
  )
  expected = case.step(average=0.9)(case.state(average=True), None, batch)
  state = case.state(average=True)
  shardings = steps.make_shardings(state, mesh)
  state = jax.device_put(state, shardings[0])
  rows = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(("data", "fsdp"))
  )
  found = case.step(average=0.9, out_shardings=shardings)(
    state, None, jax.device_put(batch, rows)
  )
  close(found, expected)


@pytest.mark.slow
def test_a_run_with_all_of_it_goes_on_bit_for_bit(make_config, tmp_path):
  """BatchNorm, dropout and the average; killed, resumed, scored, built on."""
  fields = {
    "model.name": "own_models:Net",
    "model.options": BOTH,
    "optimizer.average": 0.9,
    "optimizer.clip_norm": 1.0,
    "method": "grad_mimic",
    "mimic.reference": str(tmp_path / "reference"),
    "mimic.force": True,  # it is no guide
  }
  with tiny.nudged():
    trainer.train_and_evaluate(
      make_config(**{**fields, "method": "sgd", "noise.rate": 0.0}),
      tmp_path / "reference",
    )
  config = make_config(**fields)
  result = trainer.train_and_evaluate(config, tmp_path / "whole")
  assert result["evaluated"] == "average"
  with tiny.interrupted(8):
    trainer.train_and_evaluate(config, tmp_path / "parts")
  again = trainer.train_and_evaluate(config, tmp_path / "parts")
  assert {**again, "seconds": 0} == {**result, "seconds": 0}
  task = trainer.Run(config, tmp_path / "unused").task
  states = []
  for folder in (tmp_path / "whole", tmp_path / "parts"):
    for averaged in (True, False):
      states.append(
        (
          checkpoint.load_params(folder, task.params, averaged=averaged),
          checkpoint.load_statistics(
            folder, task.statistics, averaged=averaged
          ),
        )
      )
  jax.tree.map(np.testing.assert_array_equal, states[:2], states[2:])
  averaged = task.evaluate(states[0][0], statistics=states[0][1])
  own = task.evaluate(states[1][0], statistics=states[1][1])
  assert averaged["test_loss"] == result["test_loss"] != own["test_loss"]
  # What is built on the run takes what was evaluated.
  pretrained = make_config(
    **{**fields, "model.pretrained": str(tmp_path / "whole")}
  )
  started = trainer.Run(pretrained, tmp_path / "unused").task
  jax.tree.map(np.testing.assert_array_equal, started.statistics, states[0][1])
  np.testing.assert_array_equal(
    started.params["layer"]["kernel"], states[0][0]["layer"]["kernel"]
  )
  # Scores are of the step's own parameters.
  job = score_config.get_config(f"learner={tmp_path / 'whole'}").unlock()
  job.mimic.reference = str(tmp_path / "reference")
  job.steps, job.mesh.data = (18,), 1
  scoring.score_dataset(job.lock(), tmp_path / "scores")
  _, found = gm.ScoreLedger(tmp_path / "scores/ledger").matrix("loss")
  batch = next(iter(task.passes()))
  seen = task.expand(task.take(batch).seen, task.resident)
  expected, _ = task.losses_fn(states[1][0], seen, statistics=states[1][1])
  np.testing.assert_allclose(
    found[: len(expected), 0], expected, rtol=1e-4, atol=1e-6
  )
  assert json.loads((tmp_path / "whole/result.json").read_text())["evaluated"]
