"""What a model scores on a split, in the units of the papers.

Its one rule: a mean is over all predicted steps of the split, never a mean of batch means. It must not know training.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from training.data.sequences import DataSet, collate
from training.model import RecurrentModel


@dataclass(frozen=True)
class Metric:
    """One number of the manifest's `metrics`."""

    name: str
    split: str
    value: float
    unit: str

    def as_dict(self) -> dict[str, Any]:
        """As the manifest writes it; 6 digits are more than seeds leave significant."""
        return asdict(self) | {"value": float(f"{self.value:.6g}")}


@torch.no_grad()
def score(model: RecurrentModel, data: DataSet, split: str) -> list[Metric]:
    """NLL in nats for the probabilistic heads; accuracy for classes; MAE and RMSE for values.

    Over all features together errors are in standard deviations of the training split; each feature's MAE is also
    given in its own unit.
    """
    model.eval()
    info = data.info
    head, sums, count = model.config.head, defaultdict[str, float](float), 0
    apart = torch.zeros(len(info.outputs), dtype=torch.float64)
    for inputs, target, predicted in DataLoader(data.splits[split], batch_size=64, collate_fn=collate):
        raw, _ = model(inputs, predicted=predicted)
        asked = target[predicted]
        count += len(asked)
        if head != "regression":
            sums["nats"] += model.loss(raw, asked).sum(dtype=torch.float64).item()
        if head == "categorical":
            sums["right"] += (raw.argmax(-1) == asked).sum().item()
        if head in ("gaussian", "regression"):
            errors = (model.predict(raw)[0] - asked).double()
            standard = errors / model.y_std
            sums["mae"] += standard.abs().mean(1).sum().item()
            sums["mse"] += standard.square().mean(1).sum().item()
            apart += errors.abs().sum(0)
    nats = sums["nats"] / count
    found: list[tuple[str, float, str]] = []
    if head != "regression":
        found.append(("nll", nats, "nats/frame" if head == "bernoulli" else "nats/step"))
    if info.task == "next_token":
        found += [("bits", nats / math.log(2), "bits/step"), ("perplexity", math.exp(nats), "1")]
    if head == "categorical":
        found.append(("accuracy", sums["right"] / count, "fraction"))
    if head in ("gaussian", "regression"):
        found += [("mae", sums["mae"] / count, "std"), ("rmse", math.sqrt(sums["mse"] / count), "std")]
        for (feature, unit), value in zip(info.outputs, (apart / count).tolist(), strict=True):
            found.append((f"mae {feature}", value, unit or "1"))
    return [Metric(name, split, value, unit) for name, value, unit in found]


def score_all(model: RecurrentModel, data: DataSet) -> list[Metric]:
    """The scores of a model: on the valid split, by which it was chosen, and on the test split."""
    return [metric for split in ("valid", "test") for metric in score(model, data, split)]
