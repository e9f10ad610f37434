"""Text, some sequences of which are no prose."""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from configs import language as language_config
from experiments.models import decoder
from experiments.runtime import (
  checkpoint,
  distributed,
  workdir as workdir_lib,
)
from experiments.tasks import evaluation
from experiments.tasks.base import (
  Headline,
  Reference,
  Rows,
  Samples,
  Task,
  Truth,
  finished_run,
)
from experiments.tasks.language import data as data_lib, losses

# Fields of a reference's config that must be the learner's too: its tokens.
_SAME = ("tokenizer", "length")


class Language(Task):
  """Next-token prediction; every sequence's loss is its own."""

  configs = language_config
  methods = (
    "sgd",
    "grad_mimic",
    "grad_mimic_weights",
    "grad_mimic_outputs",
    "output_agreement",
    "rho",
    "rho_topk",
    "grand",
    "random",
    "distillation",
  )
  headline = Headline("held_out_loss", "held_out_accuracy")

  def __init__(
    self,
    config: config_dict.ConfigDict,
    devices: distributed.Devices,
    *,
    direction: str | None = None,
  ):
    """Loads text, and makes the model.

    Args:
      config: as `configs/language.py` describes it.
      devices: the devices to compute on.
      direction: of the run's method, which changes nothing here.

    Raises:
      ValueError: a name, a filter, text or sizes that don't fit.
      FileNotFoundError: text that is not there.
    """
    del direction
    self.config, self.devices = config, devices
    self.data = data_lib.load(config)
    self.batches = iter(self.data.batches)
    self.steps_per_epoch = self.data.batches.steps_per_epoch
    apply, params = _model(config, self.data.tokenizer)
    self.params = devices.place(params)
    self.fingerprints = {"data": self.data.fingerprint}
    self.data_fingerprints = {}
    padding = self.data.tokenizer.padding
    self.losses_fn = losses.make_losses_fn(apply, padding=padding)
    self.outputs = losses.make_outputs(apply, padding=padding)
    self._eval_step = evaluation.make_eval_step(self.losses_fn)

  @classmethod
  def load_samples(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> Samples:
    """See `Task`. A page shows the text of each sequence."""
    del folder, ledger
    data = data_lib.load(config)
    tokenizer, sequences = data.tokenizer, data.train
    special = (tokenizer.padding, tokenizer.start)
    captions = []
    for row, kind in zip(sequences.tokens, sequences.kind, strict=True):
      text = tokenizer.decode(row[~np.isin(row, special)])
      # What is wrong comes first: long texts are cut off. Half a character at
      # a window's edge is no Unicode.
      text = text.encode(errors="replace").decode()
      captions.append(f"[{kind or 'clean'}] {text}")
    facts = {
      "text": config.data.path or "what ships with Python",
      "sequences": len(captions),
      "not prose": f"{np.mean(sequences.kind != ''):.1%}",
      "model": config.model.name,
    }
    return Samples(
      "language", facts, {"ids": sequences.ids, "captions": captions}
    )

  @property
  def samples(self) -> int:
    """See `Task`."""
    return len(self.data.train.ids)

  def take(self, batch: dict[str, np.ndarray]) -> Rows:
    """See `Task`."""
    return Rows(
      batch["uid"],
      batch["mask"],
      {key: batch[key] for key in ("tokens", "mask")},
    )

  def passes(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """See `Task`."""
    batches = iter(self._in_order(self.data.train, self.config.batch_size))
    for _ in range(first):
      next(batches)
    return batches

  def evaluate(self, params: Any, **variables: Any) -> dict[str, float]:
    """See `Task`."""
    del variables  # there are none
    size = self.devices.divided(
      min(self.config.eval_batch_size, len(self.data.held_out.ids))
    )
    batches = (
      self.devices.put(self.take(batch).seen)
      for batch in self._in_order(self.data.held_out, size)
    )
    found = evaluation.evaluate(self._eval_step, params, batches)
    return {f"held_out_{name}": value for name, value in found.items()}

  def check_batch(self) -> Any:
    """See `Task`. Sequences drawn by the seed, the same in all processes."""
    rows = np.random.default_rng(self.config.seed).permutation(self.samples)
    rows = rows[: self.config.mimic.check_samples]
    return self.devices.place_rows({"tokens": self.data.train.tokens[rows]})

  def load_reference(self, direction: str) -> Reference:
    """See `Task`. Logits are computed with each batch: too many to keep."""
    if direction not in ("weights", "outputs"):
      raise ValueError(
        f"config.mimic.direction is {direction!r}; expected 'weights' or"
        " 'outputs'."
      )
    where = finished_run(self.config)
    if direction == "weights":
      params = checkpoint.load_params(where, self.params)
      return Reference(checkpoint.fingerprint(params), params, lambda _: params)
    file = where / workdir_lib.CONFIG_FILE
    theirs = config_dict.ConfigDict(
      workdir_lib.read_json(file, dict.fromkeys(("model", "data"), dict))
    )
    for field in _SAME:
      if theirs.data.get(field) != self.config.data[field]:
        raise ValueError(
          f"the reference in {where} has config.data.{field}"
          f" {theirs.data.get(field)!r} ({workdir_lib.CONFIG_FILE}) and the"
          f" learner {self.config.data[field]!r}; expected the same."
        )
    apply, like = _model(theirs, self.data.tokenizer)
    params = checkpoint.load_params(where, self.devices.place(like))
    of = jax.jit(losses.make_outputs(apply, padding=0).of)

    def for_batch(batch):
      return of(params, self.devices.put({"tokens": batch["tokens"]}))

    return Reference(checkpoint.fingerprint(params), None, for_batch)

  def facts(self) -> dict[str, Any]:
    """See `Task`."""
    return {
      "train_samples": self.data.train_size,
      "noise_rate": float(np.mean(self.data.train.kind != "")),
    }

  @classmethod
  def load_truth(
    cls, config: config_dict.ConfigDict, folder: pathlib.Path
  ) -> Truth:
    """See `Task`."""
    del folder
    sequences = data_lib.load(config).train
    return Truth(sequences.ids, sequences.kind)

  def _in_order(self, sequences, batch_size):
    return data_lib.make_batches(
      sequences,
      batch_size=batch_size,
      seed=None,
      num_epochs=1,
      drop_last=False,
      process=self.devices.process,
    )


def _model(config, tokenizer):
  return decoder.create(
    config.model,
    vocab_size=tokenizer.vocab_size,
    context_length=config.data.length,
    seed=config.get("seed", 0),
  )
