"""Image-text pairs, some of whose captions may be wrong."""

import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import config_dict

from configs import contrastive as contrastive_config
from experiments.models import clip
from experiments.models.pretrained import clip as clip_pretrained
from experiments.runtime import checkpoint, distributed
from experiments.tasks.base import (
  Headline,
  Reference,
  Rows,
  Samples,
  Task,
  Truth,
)
from experiments.tasks.contrastive import (
  data as data_lib,
  evaluation,
  losses,
  reference as reference_lib,
)


class Contrastive(Task):
  """Contrastive learning; a pair's loss depends on its batch mates."""

  configs = contrastive_config
  methods = (
    "sgd",
    "grad_mimic",
    "grad_mimic_weights",
    "grad_mimic_outputs",
    "output_agreement",
    "rho",
    "rho_topk",
    "random",
  )
  headline = Headline("held_out_loss", "zero_shot_accuracy@1")
  more_metrics = ("image_to_text@1", "text_to_image@1")
  size = "train_pairs"
  reference_score = "CLIP score of the reference"
  instead = "output_agreement or grad_mimic_outputs"
  last = losses.keep_logit_scale()

  def __init__(
    self,
    config: config_dict.ConfigDict,
    devices: distributed.Devices,
    *,
    direction: str | None = None,
    data: data_lib.Data | None = None,
  ):
    """Loads data, and makes the model.

    Args:
      config: as `configs/contrastive.py` describes it.
      devices: the devices to compute on.
      direction: of the run's method, which changes nothing here.
      data: as `data.load` gave it for this config; None loads it.

    Raises:
      ValueError: a budget, a filter, a tokenizer or weights that don't fit.
      FileNotFoundError: shards or weights that are not there.
    """
    del direction
    config = config.copy_and_resolve_references().unlock()
    self.config, self.devices = config, devices
    self.data = data_lib.load(config) if data is None else data
    self.batches = iter(self.data.batches)
    self.steps_per_epoch = getattr(self.data.batches, "steps_per_epoch", None)
    size = config.data.image_size
    apply, self.params = clip_pretrained.create(
      config.model,
      input_shape=(size, size, 3),
      seed=config.seed,
      place=devices.place,
    )
    self.fingerprints = {"data": self.data.fingerprint}
    if config.model.pretrained is not None:
      self.fingerprints["initial"] = checkpoint.fingerprint(self.params)
    memory = self.data.memory
    self.data_fingerprints = (
      {} if memory is None else data_lib.fingerprints(memory.truth)
    )
    if config.mimic.engine == "auto":
      config.mimic.engine = "forward"  # no other can do it
    config.mimic.layers = clip.mimic_layers(config.mimic.layers, self.params)
    self._apply = evaluation.scaled(apply, config.data.mean, config.data.std)
    self.losses_fn = losses.make_losses_fn(
      self._apply, config.loss, sharding=devices.rows
    )
    self.outputs = losses.make_outputs(
      self._apply, config.loss, sharding=devices.rows
    )
    self._evaluation = evaluation.Evaluation(
      self._apply,
      self.data,
      devices,
      loss=config.loss,
      batch_size=config.eval_batch_size,
    )

  @classmethod
  def load_fingerprints(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> dict[str, str]:
    """See `Task`. Shards have none: a filter of theirs is for any pool."""
    del folder, ledger
    if config.data.name != data_lib.SHAPES:
      return {}
    return data_lib.fingerprints(data_lib.train_pairs(config))

  @classmethod
  def load_samples(
    cls,
    config: config_dict.ConfigDict,
    folder: pathlib.Path,
    ledger: Mapping[str, str],
  ) -> Samples:
    """See `Task`. Pairs in shards are not read again."""
    del folder, ledger
    model = {"model": f"CLIP {config.model.size}"}
    if config.data.name != data_lib.SHAPES:
      about = "not shown: they are in shards, which a page doesn't read"
      return Samples(
        f"{config.data.name}, image-text pairs",
        {"data set": config.data.name, "images and captions": about, **model},
      )
    pairs = data_lib.train_pairs(config)
    title = config.data.name
    if pairs.is_noisy.any():
      title += f", {pairs.is_noisy.mean():.3g} of the pairs mis-captioned"
    facts = {
      "data set": config.data.name,
      "pairs": len(pairs),
      "mis-captioned": f"{pairs.is_noisy.mean():.1%}",
      **model,
    }
    dataset = {
      "ids": pairs.uids,
      "images": pairs.images,
      # The kind of noise comes first, as long captions are cut off.
      "captions": [
        f"[{kind or 'clean'}] {caption}"
        for kind, caption in zip(pairs.noise_kind, pairs.captions, strict=True)
      ],
    }
    return Samples(title, facts, dataset)

  @classmethod
  def score_by_reference(
    cls, config: config_dict.ConfigDict
  ) -> tuple[np.ndarray, np.ndarray]:
    """See `Task`. Scores are similarities of image and caption in memory."""
    memory = data_lib.pool(config)
    found = reference_lib.compute_pool_features(
      config,
      reference_lib.load_model(config),
      memory,
      distributed.Devices.alone(),
    )
    image, text = map(np.asarray, found.pair)
    return memory.truth.uids, np.sum(image * text, axis=1)

  @property
  def samples(self) -> int | None:
    """See `Task`."""
    return None if self.data.memory is None else len(self.data.memory.images)

  def take(self, batch: dict[str, np.ndarray]) -> Rows:
    """See `Task`."""
    return Rows(
      batch["uid"],
      batch["mask"],
      {key: batch[key] for key in ("image", "text", "mask")},
    )

  def passes(self, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """See `Task`."""
    batches = iter(self.data.one_pass())
    for _ in range(first):
      next(batches)
    return batches

  def evaluate(self, params: Any, **variables: Any) -> dict[str, float]:
    """See `Task`."""
    del variables  # there are none
    return self._evaluation(params)

  def check_losses_fn(self) -> Callable[..., Any]:
    """See `Task`."""
    return losses.make_losses_fn(self._apply, self.config.loss)

  def check_batch(self) -> Any:
    """See `Task`. Pairs of the first batch, the same in all processes."""
    batch = self.data.first()
    rows = batch["mask"].nonzero()[0][: self.config.mimic.check_samples]
    return self.devices.place_whole(
      distributed.from_first(
        {key: batch[key][rows] for key in ("image", "text")}
      )
    )

  def load_reference(self, direction: str) -> Reference:
    """See `Task`."""
    return reference_lib.load(
      self.config, direction, self.params, self.data, self.devices
    )

  def facts(self) -> dict[str, Any]:
    """See `Task`."""
    statistics = getattr(self.batches, "statistics", None)
    return {
      "samples_seen": self.total_steps * self.config.batch_size,
      "train_pairs": self.data.train_pairs,
      # Counts of samples in the shards, broken ones too.
      "shards": None if statistics is None else statistics.as_dict(),
    }

  def close(self) -> None:
    """See `Task`."""
    self.batches.close()

  @classmethod
  def check_study(cls, config: config_dict.ConfigDict) -> None:
    """See `Task`."""
    if config.data.name != data_lib.SHAPES:
      raise ValueError(
        f"config.data.name is {config.data.name!r}; a study needs to know which"
        " captions are wrong: expected 'shapes'. For shards, give"
        " experiments.train and experiments.select one by one."
      )

  @classmethod
  def seed_overrides(cls, seed: int) -> dict[str, Any]:
    """See `Task`."""
    return {"data.seed": seed}

  @classmethod
  def reference_overrides(
    cls, config: config_dict.ConfigDict, seed: int
  ) -> dict[str, Any]:
    """See `Task`."""
    sizes = config.study.reference
    fields = {
      f"model.clip.{tower}_{name}": sizes[name]
      for name in ("width", "depth")
      for tower in ("image", "text")
    }
    return {
      **super().reference_overrides(config, seed),
      **{field: value for field, value in fields.items() if value},
    }

  @classmethod
  def load_truth(
    cls, config: config_dict.ConfigDict, folder: pathlib.Path
  ) -> Truth | None:
    """See `Task`."""
    del folder
    if config.data.name != data_lib.SHAPES:
      return None
    pairs = data_lib.train_pairs(config)
    return Truth(pairs.uids, pairs.noise_kind)
