"""Scores against NumPy: over all predicted steps, in the units that they say."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config import ModelConfig
from training.data.sequences import DataSet, Item, Split
from training.model import RecurrentModel
from training.scores import score


def constant(config: ModelConfig, *head: float) -> RecurrentModel:
    """A model whose head gives the same numbers at every step."""
    model = RecurrentModel(config)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor(head)
    return model


def test_errors_of_values_are_in_deviations_and_each_in_its_own_unit(tiny: DataSet) -> None:
    """Two outputs of different scales, sequences of different lengths, steps that are not asked about."""
    rng = np.random.default_rng(0)

    def item(steps: int) -> Item:
        return (
            rng.normal(size=(steps, 1)).astype(np.float32),
            (rng.normal(size=(steps, 2)) * [1, 30] + [5, 100]).astype(np.float32),
            rng.random(steps) < 0.6,
        )

    items = [item(steps) for steps in (9, 4, 13)]
    error = np.concatenate([targets[asked] for _, targets, asked in items]).astype(np.float64) - [5.5, 97]
    info = replace(tiny.info, task="forecast", outputs=(("a", "m"), ("b", "")))
    for head, values in (("regression", (0.25, -0.1)), ("gaussian", (0.25, -0.1, 0.3, -0.2))):
        model = constant(ModelConfig("gru", 1, 2, head, hidden=2), *values)
        model.y_mean, model.y_std = torch.tensor([5.0, 100.0]), torch.tensor([2.0, 30.0])
        found = {
            metric.name: (metric.value, metric.unit)
            for metric in score(model, DataSet(info, {"test": Split(items)}), "test")
        }
        standard = error / [2, 30]
        expected = {
            "mae": (np.abs(standard).mean(), "std"),
            "rmse": (np.sqrt(np.square(standard).mean()), "std"),
            "mae a": (np.abs(error[:, 0]).mean(), "m"),
            "mae b": (np.abs(error[:, 1]).mean(), "1"),
        }
        for name, (value, unit) in expected.items():
            assert found[name] == (pytest.approx(value, rel=1e-5), unit)
        assert ("nll" in found) == (head == "gaussian")


def test_of_characters_nats_bits_and_perplexity_are_one_score(tiny: DataSet) -> None:
    """And accuracy is the part of the steps at which the likeliest one came."""
    ids = [np.array([0, 1, 2, 1]), np.array([1, 1])]
    items = [(one, one, np.arange(len(one)) > 0) for one in ids]
    model = constant(
        ModelConfig("gru", 2, 3, "categorical", hidden=2, vocabulary=3), *np.log([0.25, 0.5, 0.25]).tolist()
    )
    info = replace(tiny.info, task="next_token", head="categorical")
    found = {metric.name: metric.value for metric in score(model, DataSet(info, {"test": Split(items)}), "test")}
    bits = (1 + 2 + 1 + 1) / 4
    expected = {"nll": bits * np.log(2), "bits": bits, "perplexity": 2**bits, "accuracy": 3 / 4}
    assert found == pytest.approx(expected)
