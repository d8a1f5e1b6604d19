"""Pictures that explain: the map of every label, and what the network's channels respond to."""

import dataclasses
from pathlib import Path

import cv2
import numpy as np

from dicomai import durable
from dicomai.analyze import Scorer
from dicomai.errors import Rejected
from dicomai.infer import features
from dicomai.infer.network import NetworkWithMaps
from dicomai.prepare import geometry
from dicomai.report.overlay import draw
from dicomai.study import Analysis, Model, UInt8

CHANNELS = 6
CAPTION = 22  # pixels


def write_label_maps(done: Analysis, scorer: Scorer, out: Path) -> list[Path]:
    """out/SOP_INSTANCE_UID.FRAME.LABEL.png for every label of every analyzed image."""
    written = []
    found = {item.frame.source.sop_instance_uid: item.frame.source for item in done.findings}
    instances = tuple(found.values())
    for instance, prepared in zip(instances, scorer.prepare(instances), strict=True):
        if isinstance(prepared, Rejected):
            continue
        pictures = {frame.number: frame for frame in prepared[1:]}
        for item in done.findings:
            if item.frame.source.sop_instance_uid != instance.sop_instance_uid:
                continue
            frame = pictures[item.frame.number]
            heat = geometry.spread(item.cells, frame.letterbox)
            picture = draw(dataclasses.replace(item, frame=frame), heat, scorer.algorithm)
            name = f"{instance.sop_instance_uid}.{frame.number}.{item.label.key}.png"
            written.append(_write(out / name, picture))
    return written


def write_channels(network: NetworkWithMaps, model: Model, out: Path) -> list[Path]:
    """out/MODEL.VERSION.LABEL.channels.png: above what speaks for the label, below against it."""
    written = []
    for index, label in enumerate(model.labels):
        chosen = features.strongest_channels(network, index, CHANNELS)
        pictures = features.respond_to(network, [number for number, _ in chosen], model.channels)
        tiles = [
            _caption(np.rint(picture * 255).astype(np.uint8), f"{number}: {weight:+.4f}")
            for picture, (number, weight) in zip(pictures, chosen, strict=True)
        ]
        half = CHANNELS // 2
        sheet: UInt8 = np.vstack([np.hstack(tiles[:half]), np.hstack(tiles[half:])])
        name = f"{model.name}.{model.version}.{label.key}.channels.png"
        written.append(_write(out / name, np.stack([sheet] * 3, -1)))
    return written


def _caption(picture: UInt8, text: str) -> UInt8:
    strip = np.zeros((CAPTION, picture.shape[1]), np.uint8)
    cv2.putText(strip, text, (3, CAPTION - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 255, 1, cv2.LINE_AA)
    return np.vstack([picture, strip])


def _write(path: Path, rgb: UInt8) -> Path:
    encoded = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1]
    durable.write(path, [encoded.data])
    return path
