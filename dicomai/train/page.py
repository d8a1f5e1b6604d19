"""One HTML file that shows a training: self-contained, without scripts and without network."""

import base64
import html
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dicomai import durable
from dicomai.analyze import local
from dicomai.infer import features
from dicomai.infer.network import NetworkWithMaps
from dicomai.study import Float32, UInt8
from dicomai.train import charts
from dicomai.train.dataset import Data
from dicomai.train.evaluate import Array, Interval
from dicomai.train.gate import Comparison, Decision
from dicomai.train.judge import Evaluation, Figures, most_confident_mistakes
from dicomai.train.loop import Epoch, normal
from dicomai.train.recipe import Recipe

MISTAKES, CHANNELS = 12, 6
SIDE = 224  # pixels of a picture
SHOWN = ("auc", "average_precision", "accuracy", "balanced_accuracy", "sensitivity", "specificity")
if TYPE_CHECKING:
    from dicomai.train.search import Trial

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6b7c; --line: #d9e0e7; --paper: #ffffff;
  --back: #f4f6f8; --new: #1261a0; --old: #b0651a; --good: #1d7a46; --bad: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 20px 24px; margin: 16px 0; }
h1 { font-size: 26px; margin: 8px 0 4px; } h2 { font-size: 18px; margin: 0 0 12px; }
p { margin: 4px 0 10px; } .soft { color: var(--soft); }
.verdict { border-left: 6px solid var(--bad); } .verdict.yes { border-left-color: var(--good); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
td small { color: var(--soft); display: block; white-space: nowrap; }
.row { display: flex; flex-wrap: wrap; gap: 24px; } .row > figure { flex: 1 1 270px;
  max-width: 460px; }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
img { width: 100%; border-radius: 4px; display: block; background: #000; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2px; }
pre { background: var(--back); padding: 12px; border-radius: 6px; overflow-x: auto;
  font-size: 13px; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True, slots=True)
class Story:
    """All that the page tells. before: what the active model says of the test images (N, K)."""

    run: int
    name: str
    version: str
    parent: str
    recipe: Recipe
    epochs: tuple[Epoch, ...]
    data: Data
    test: Data
    left_out: Counter[str]
    evaluation: Evaluation
    before: Array
    decision: Decision
    dry_run: bool
    network: NetworkWithMaps
    trials: Sequence["Trial"]


def write(path: Path, story: Story) -> Path:
    """Write the page, all or nothing."""
    durable.write(path, [render(story).encode()])
    return path


def render(story: Story) -> str:
    """The page as HTML."""
    sections = [
        _verdict(story),
        _section("What was learnt from", _data(story)),
        _section("How it went", _curves(story)),
        *(_label(story, index) for index in range(len(story.recipe.keys))),
        _section("Subgroups of the test images", _groups(story)),
        _section("Candidate and active model, in the same resamples", _comparisons(story)),
        _section("The most confident mistakes", _mistakes(story)),
        _section("What the last stage's channels respond to", _channels(story)),
        *([_section("Recipes that were tried", _trials(story))] if story.trials else []),
        _section("The recipe", f"<pre>{_text(_recipe(story.recipe))}</pre>"),
    ]
    title = f"{story.name} {story.version}: training {story.run}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<main>{''.join(sections)}</main></body></html>"
    )


def _text(words: object) -> str:
    return html.escape(str(words))


def _section(title: str, body: str, kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{_text(title)}</h2>{body}</section>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _interval(value: Interval, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    return f"{value.value:{form}}<small>{value.low:{form}} to {value.high:{form}}</small>"


def _verdict(story: Story) -> str:
    decision = story.decision
    if story.dry_run:
        words = "It would be promoted." if decision.promoted else "It would not be promoted."
        words += " This was a dry run: nothing was changed."
    elif decision.promoted:
        words = f"It was promoted and takes the place of version {story.parent}."
    else:
        words = f"It was kept as a candidate; version {story.parent} stays active."
    reasons = "".join(f"<li>{_text(reason)}</li>" for reason in decision.reasons)
    return (
        f"<h1>{_text(story.name)} {_text(story.version)}</h1>"
        f'<p class="soft">Training {story.run}. Research software, not a medical device. '
        f"Figures in small print are 95 % bootstrap intervals over resamples of patients.</p>"
        f'<section class="verdict {"yes" if decision.promoted else ""}"><h2>{_text(words)}</h2>'
        f"<ul>{reasons}</ul></section>"
    )


def _data(story: Story) -> str:
    rows = []
    for split in ("train", "val", "test"):
        part = story.data.of(split)
        counts = []
        for index in range(len(story.recipe.keys)):
            target = part.targets[:, index]
            known = int((target == 1).sum()), int((target == 0).sum()), int(np.isnan(target).sum())
            counts.append("{} with, {} without<small>{} not known</small>".format(*known))
        patients = len(set(part.patients))
        rows.append([split, f"{len(part):,}", f"{patients:,}", *counts])
    head = ["split", "images", "patients", *story.recipe.keys]
    sources = Counter(story.data.sources.tolist())
    told = ", ".join(f"{_text(name)} {count:,}" for name, count in sorted(sources.items()))
    left = "".join(f"<li>{count:,} {_text(why)}</li>" for why, count in story.left_out.items())
    gone = f"<p>Left out:</p><ul>{left}</ul>" if left else "<p>Nothing was left out.</p>"
    return f"{_table(head, rows)}<p>Sources: {told}.</p>{gone}"


def _curves(story: Story) -> str:
    epochs = story.epochs
    across = list(range(1, len(epochs) + 1))
    starts = [i for i, e in enumerate(epochs, 1) if e.number == 1 and i > 1]
    losses = charts.lines(
        {
            "training": (across, [e.loss for e in epochs]),
            "validation": (across, [e.val_loss for e in epochs]),
        },
        "epoch",
        "loss (nats)",
        marks=starts,
    )
    areas = charts.lines(
        {"validation": (across, [e.auc for e in epochs])}, "epoch", "AUC", marks=starts
    )
    best = min(epochs, key=lambda e: e.val_loss)
    rate = np.mean([e.images_per_second for e in epochs])
    seconds = sum(e.seconds for e in epochs)
    words = (
        f"{len(epochs)} epochs in {seconds / 60:.1f} minutes, {rate:.0f} images/s on average. "
        f"The best is epoch {best.number} of phase {best.phase + 1}: validation loss "
        f"{best.val_loss:.4f}, AUC {best.auc:.3f}. Training loss is weighted and "
        "smoothed, validation loss is not."
    )
    return (
        f'<div class="row">{_figure(losses, "Loss; a line where a phase begins")}'
        f"{_figure(areas, 'AUC, the mean over labels and sources')}</div><p>{words}</p>"
    )


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{_text(caption)}</figcaption></figure>"


def _label(story: Story, index: int) -> str:
    key = story.recipe.keys[index]
    known = ~np.isnan(story.test.targets[:, index])
    truth = story.test.targets[known, index].astype(np.float64)
    after, before = story.evaluation.scores[known, index], story.before[known, index]
    models = {"candidate": after} | ({} if np.isnan(before).any() else {"active": before})
    roc = charts.lines(
        {name: charts.roc(truth, scores) for name, scores in models.items()},
        "1 - specificity",
        "sensitivity",
        square=True,
        diagonal=True,
    )
    recall = charts.lines(
        {name: charts.precision_recall(truth, scores) for name, scores in models.items()},
        "sensitivity",
        "precision",
        square=True,
    )
    (calibration,) = (c for c in story.evaluation.calibration if c.label == key)
    bins = calibration.diagram
    diagram = charts.lines(
        {"candidate": ([x for x, _, _ in bins], [y for _, y, _ in bins])},
        "mean probability",
        "share with the label",
        square=True,
        diagonal=True,
        dots=True,
    )
    threshold = story.evaluation.thresholds[key]
    figures = [item for item in story.evaluation.whole if item.label == key]
    table = _table(["", *(name.replace("_", " ") for name in SHOWN)], [_row(f) for f in figures])
    return _section(
        f"{key} on {int(known.sum()):,} test images",
        f'{table}<div class="row">{_figure(roc, "ROC")}{_figure(recall, "Precision and recall")}'
        f"{_figure(diagram, 'Reliability, bins of equal count')}</div>"
        f"<p>Expected calibration error {calibration.before:.3f} before and "
        f"{calibration.after:.3f} after calibration (logits divided by "
        f"{calibration.temperature:.2f}, plus {calibration.bias:.2f}).</p>"
        f"{_confusion(truth, after, threshold)}",
    )


def _row(item: Figures) -> list[str]:
    return [
        f"{_text(item.group)}<small>{item.images:,} images, {item.patients:,} patients, "
        f"{item.positive:,} with it</small>",
        *(_interval(item.figures[name]) for name in SHOWN),
    ]


def _confusion(truth: Array, score: Array, threshold: float) -> str:
    called, there = score >= threshold, truth > 0.5
    rows = [
        [word, f"{int((called & is_it).sum()):,}", f"{int((~called & is_it).sum()):,}"]
        for word, is_it in (("label present", there), ("label absent", ~there))
    ]
    return f"<p>At the threshold {threshold:g}:</p>" + _table(
        ["", "called positive", "called negative"], rows
    )


def _groups(story: Story) -> str:
    if not story.evaluation.groups:
        return "<p>No subgroup has enough patients of both classes.</p>"
    head = ["", *(name.replace("_", " ") for name in SHOWN)]
    several = len(story.recipe.keys) > 1
    rows = []
    for item in story.evaluation.groups:
        first, *rest = _row(item)
        rows.append([f"{_text(item.label)}, {first}" if several else first, *rest])
    return _table(head, rows)


def _comparisons(story: Story) -> str:
    def row(item: Comparison) -> list[str]:
        name = f"{_text(item.label)}, {_text(item.group)}<small>{item.images:,} images</small>"
        return [name, f"{item.before:.3f}", f"{item.after:.3f}", _interval(item.gain, signed=True)]

    gain = _interval(story.decision.gain, signed=True)
    mean = f"<p>Gain in AUC, the mean over labels and sources: {gain}</p>"
    head = ["", "active", "candidate", "difference in AUC"]
    return mean + _table(head, [row(item) for item in story.decision.comparisons])


def _mistakes(story: Story) -> str:
    found = most_confident_mistakes(story.evaluation, story.test, story.recipe, MISTAKES)
    tiles = []
    for image, label, probability in found:
        index = story.recipe.keys.index(label)
        truth = "present" if story.test.targets[image, index] > 0.5 else "absent"
        grey = story.test.images[image]
        caption = f"{label} is {truth}, probability {probability:.2f}; {story.test.sources[image]}"
        pair = _picture(grey) + _picture(_map(story, grey, index))
        tiles.append(f'<figure><div class="pair">{pair}</div>'
                     f"<figcaption>{_text(caption)}</figcaption></figure>")  # fmt: skip
    words = "Each with the map of the label: red is where the candidate sees it, blue where not."
    return f'<p>{words}</p><div class="tiles">{"".join(tiles)}</div>'


@torch.inference_mode()
def _map(story: Story, grey: UInt8, index: int) -> UInt8:
    """The image in grey under its local probabilities."""
    inputs = torch.from_numpy(grey.copy())[None, None].float() / 255
    _, maps = story.network(normal(inputs, story.recipe.channels))
    biases = story.network.head.bias.numpy()
    cells = local(maps[0].numpy(), biases, story.recipe.activation)[index]
    rows, columns = grey.shape
    heat = cv2.resize(cells, (columns, rows), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap(np.rint(heat * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    under = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    return np.asarray(cv2.addWeighted(under, 0.6, colours, 0.4, 0), np.uint8)


def _channels(story: Story) -> str:
    parts = []
    for index, key in enumerate(story.recipe.keys):
        chosen = features.strongest_channels(story.network, index, CHANNELS)
        pictures: Float32 = features.respond_to(
            story.network, [number for number, _ in chosen], story.recipe.channels
        )
        tiles = "".join(
            f"<figure>{_picture(np.rint(picture * 255).astype(np.uint8))}"
            f"<figcaption>channel {number}, weight {weight:+.4f}</figcaption></figure>"
            for picture, (number, weight) in zip(pictures, chosen, strict=True)
        )
        half = CHANNELS // 2
        words = f"{key}: the first {half} speak for it, the others against it."
        parts.append(f'<p>{_text(words)}</p><div class="tiles">{tiles}</div>')
    return "".join(parts)


def _picture(image: NDArray[np.uint8]) -> str:
    side = (SIDE, SIDE)
    small = cv2.resize(image, side, interpolation=cv2.INTER_AREA) if len(image) > SIDE else image
    encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return (
        f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}">'
    )


def _trials(story: Story) -> str:
    ended = [t for t in story.trials if t.val_loss is not None]
    names = list(ended[0].values)
    rows = [
        [
            str(trial.number),
            "given up" if trial.val_loss is None else f"{trial.val_loss:.4f}",
            *(f"{trial.values[name]:.3g}" for name in names),
        ]
        for trial in story.trials
    ]
    words = (
        "The first is the recipe as it was given. Learning rate, weight decay (l2) and "
        "augmentation are multiples of its own. The smallest validation loss decides; nobody looks "
        "at the test images."
    )
    return f"<p>{words}</p>{_table(['trial', 'validation loss', *names], rows)}"


def _recipe(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json"), indent=1)
