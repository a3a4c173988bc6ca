"""What an experiment's records say, for a person: tables beside the papers' figures, and one picture.

Its one rule: a number is a record's or a paper's; a run that has no record is "not run here". It must not know how
anything is trained.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.checkpoint import replace
from training.experiments import RISING, Arm, Experiment
from training.reproduce import Choice, Record, answers, remaining

HEAD = ("unit", "hidden", "parameters", "of gru's", "test", "valid", "seeds", "epochs", "best", "s a run")


def write(folder: Path, name: str, experiment: Experiment, records: Sequence[Record]) -> list[Path]:
    """`name`.md and, where there are records, `name`.png; returns what was written."""
    page, picture = folder / f"{name}.md", folder / f"{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    if records:
        plot(picture, experiment, records)
    replace(page, describe(name, experiment, records, picture.name if records else None))
    return [page, picture] if records else [page]


def describe(name: str, experiment: Experiment, records: Sequence[Record], picture: str | None) -> str:
    """The report as Markdown."""
    lines = [f"# {experiment.title}", "", experiment.differs, ""]
    lines += [
        "Scores are of the epoch with the best valid loss (`best`, of the `epochs` that were run): mean and, behind ±, "
        "deviation over seeds. Parameters are those of the recurrent layer.",
        "",
    ]
    if picture:
        lines += [f"![{experiment.title}]({picture})", ""]
    for key, arm in experiment.arms.items():
        lines += [f"## {arm.title}", "", how(arm), ""]
        mine = [record for record in records if record.arm == key]
        if mine:
            lines += table(arm, mine)
        else:
            lines += ["Not run here."]
        if short := [one for one in mine if one.limit < arm.train.max_epochs]:
            units = ", ".join(dict.fromkeys(one.cell for one in short))
            limit = max(one.train["max_epochs"] for one in short)
            lines += ["", f"**Reduced**: at most {limit} epochs instead of {arm.train.max_epochs} ({units})."]
        lines += missing(name, key, experiment, records)
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def how(arm: Arm) -> str:
    """The arm's settings in a line."""
    train = arm.train
    return (
        f"{arm.metric}, {'higher' if arm.metric in RISING else 'lower'} is better. {train.optimiser}, rate "
        f"{train.rate:g}, batches of {train.batch_size}, L2 {train.weight_decay:g}, norm clip {train.clip:g}, at most "
        f"{train.max_epochs} epochs, patience {train.patience}."
    )


def missing(name: str, key: str, experiment: Experiment, records: Sequence[Record]) -> list[str]:
    """Which runs of the table have no record, and the command that makes them."""
    known = {record.key: record for record in records}
    todo = [
        one for one in Choice(arms=(key,)).of(experiment) if not answers(known.get((key, one[1], one[2].seed)), one[2])
    ]
    if not todo:
        return []
    left = remaining(experiment, todo, known).removeprefix("; ").removesuffix(" left")
    words = f"{name.removesuffix('-quick')} --quick" if name.endswith("-quick") else name
    return [
        "",
        f"{len(todo)} runs of the table are left ({left} on one core): `latch-train reproduce {words} --arms {key}`.",
    ]


def spread(values: Sequence[float]) -> str:
    """`8.560 ± 0.021`, or without a deviation where there is one value."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def span(values: Sequence[int]) -> str:
    """`30 to 47`, or `60` where all are."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def table(arm: Arm, records: Sequence[Record]) -> list[str]:
    """Ours beside the papers', a row for each unit and for each of the papers' other models."""
    units = {cell: [record for record in records if record.cell == cell] for cell in arm.hidden}
    whole = next((mine[0].parameters for cell, mine in units.items() if cell == "gru" and mine), None)
    rows = [[*HEAD, *arm.papers], ["---"] * (len(HEAD) + len(arm.papers))]
    for cell, mine in units.items():
        row = [f"`{cell}`", str(arm.hidden[cell])]
        if mine:
            row += [
                f"{mine[0].parameters:,}",
                f"{mine[0].parameters / whole:.2f}" if whole else "",
                f"**{spread([record.test for record in mine])}**",
                spread([record.valid for record in mine]),
                str(len(mine)),
                span([record.epochs for record in mine]),
                span([record.best_epoch for record in mine]),
                f"{mean(record.seconds for record in mine):.0f}",
            ]
        else:
            row += ["", "", "not run here", "", "0", "", "", ""]
        rows.append([*row, *(figure(arm, paper, cell) for paper in arm.papers.values())])
    others = dict.fromkeys(one for paper in arm.papers.values() for one in paper if one not in arm.hidden)
    rows += [
        [one, *[""] * (len(HEAD) - 1), *(figure(arm, paper, one) for paper in arm.papers.values())] for one in others
    ]
    return ["| " + " | ".join(row) + " |" for row in rows]


def figure(arm: Arm, paper: dict[str, float], name: str) -> str:
    """A paper's figure as it stands there, or nothing."""
    return f"{paper[name]:{'.2f' if arm.metric == 'nll' else '.4g'}}" if name in paper else ""


def plot(path: Path, experiment: Experiment, records: Sequence[Record]) -> None:
    """A row for each arm that was run: scores by unit, score over parameters, learning curves; the axis first."""
    arms = {key: arm for key, arm in experiment.arms.items() if any(one.arm == key for one in records)}
    cells = dict.fromkeys(cell for arm in arms.values() for cell in arm.hidden)
    colours = {cell: f"C{index}" if index < 10 else "black" for index, cell in enumerate(cells)}
    extra = 1 if experiment.along and len(arms) > 1 else 0
    picture = Figure(figsize=(15, 3.8 * (len(arms) + extra)), layout="constrained")
    grid = picture.add_gridspec(len(arms) + extra, 3)
    if extra:
        plot_axis(picture.add_subplot(grid[0, :]), experiment, arms, records, colours)
    for row, (key, arm) in enumerate(arms.items(), start=extra):
        mine = {cell: [one for one in records if (one.arm, one.cell) == (key, cell)] for cell in arm.hidden}
        mine = {cell: found for cell, found in mine.items() if found}
        bars, cloud, curves = (picture.add_subplot(grid[row, column]) for column in range(3))
        plot_units(bars, arm, mine, colours)
        plot_parameters(cloud, arm, mine, colours)
        for cell, found in mine.items():
            for index, one in enumerate(found):
                label, epochs = cell if index == 0 else None, range(1, len(one.curve) + 1)
                # The dot at its end is all that there is of a curve of one epoch.
                curves.plot(epochs, one.curve, ".-", color=colours[cell], linewidth=0.8, markevery=[-1], label=label)
        settled = [value for found in mine.values() for one in found for value in one.curve[len(one.curve) // 5 :]]
        if settled:
            edge = (max(settled) - min(settled)) * 0.05 or 0.1
            curves.set_ylim(min(settled) - edge, max(settled) + edge)
        curves.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        curves.set(xlabel="epoch", ylabel="valid loss", title="learning curves")
        curves.legend(fontsize=7, ncols=2)
    picture.savefig(path, dpi=80, metadata={"Software": None})


def centre(found: Sequence[Record]) -> tuple[float, float]:
    """Mean and deviation (0 of one) of the test scores."""
    values = [one.test for one in found]
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def plot_units(axes: Axes, arm: Arm, mine: dict[str, list[Record]], colours: dict[str, str]) -> None:
    """Ours with their deviations, the papers' as marks in the same column."""
    for place, (cell, found) in enumerate(mine.items()):
        value, deviation = centre(found)
        axes.errorbar(place, value, deviation, fmt="o", color=colours[cell], capsize=4)
    for mark, (paper, scores) in zip("x+^v", arm.papers.items(), strict=False):
        known = [(place, scores[cell]) for place, cell in enumerate(mine) if cell in scores]
        if known:
            places, values = zip(*known, strict=True)
            axes.scatter(places, values, marker=mark, color="black", label=paper, zorder=3)
    axes.set_xticks(range(len(mine)), list(mine), rotation=45)
    axes.set(ylabel=f"test {arm.metric}", title=arm.title)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def plot_parameters(axes: Axes, arm: Arm, mine: dict[str, list[Record]], colours: dict[str, str]) -> None:
    """What the variants are for: the score that is left with a part of the parameters."""
    for cell, found in mine.items():
        value, deviation = centre(found)
        axes.errorbar(found[0].parameters, value, deviation, fmt="o", color=colours[cell], capsize=4)
        axes.annotate(cell, (found[0].parameters, value), fontsize=8, xytext=(5, 4), textcoords="offset points")
    axes.set(xlabel="parameters of the recurrent layer", ylabel=f"test {arm.metric}", title="score over parameters")
    axes.set_xlim(left=0)


def plot_axis(
    axes: Axes, experiment: Experiment, arms: dict[str, Arm], records: Sequence[Record], colours: dict[str, str]
) -> None:
    """Each unit's score along the arms."""
    for cell, colour in colours.items():
        points = []
        for key, arm in arms.items():
            found = [one for one in records if (one.arm, one.cell) == (key, cell)]
            if found:
                points.append((arm.at if arm.at is not None else math.nan, *centre(found)))
        if points:
            places, values, deviations = zip(*points, strict=True)
            axes.errorbar(places, values, deviations, color=colour, marker="o", capsize=3, label=cell)
    axes.set(
        xlabel=experiment.along, ylabel=f"test {next(iter(arms.values())).metric}", xscale="log", title="all units"
    )
    ticks = [arm.at for arm in arms.values() if arm.at is not None]
    axes.set_xticks(ticks, [f"{place:g}" for place in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8, ncols=2)
