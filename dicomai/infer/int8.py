"""A network in 8 bits, made by NNCF from what it sees; the only place that imports it."""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import openvino

from dicomai.errors import Misuse
from dicomai.infer import vino  # which keeps the telemetry of both out
from dicomai.infer.network import NetworkWithMaps
from dicomai.infer.package import INT8
from dicomai.study import Float32

NO_WORK = {"Constant", "Convert", "Parameter", "Result"}


def require_nncf() -> None:
    """Raise Misuse where it is not installed."""
    if importlib.util.find_spec("nncf") is None:
        raise Misuse("nncf is not installed: install dicomai[compress]")


def make(
    network: NetworkWithMaps,
    channels: int,
    size: int,
    images: Sequence[Float32],
    whole: int,
    folder: Path,
) -> tuple[tuple[float, ...], ...]:
    """Write int8.xml and int8.bin into a folder; returns what they say of vino.fixed_images().

    images: each (channels, size, size), that the ranges of 8 bits are fitted to
    whole: how many of the first convolutions stay in full precision
    """
    plain = vino.converted(network, channels, size)
    small = _quantized(plain, images, whole)
    openvino.save_model(small, folder / INT8[0], compress_to_fp16=False)
    logits, _ = vino.opened(folder / INT8[0])(vino.fixed_images(channels, size))
    return tuple(tuple(round(float(value), 4) for value in row) for row in logits)


def _quantized(plain: openvino.Model, images: Sequence[Float32], whole: int) -> openvino.Model:
    # It warns of compilers and devices, which nobody asked for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level(logging.ERROR)
    # Means of ranges, its default, cut off what stands out most in an image, and that is a finding.
    # Its corrections of biases move a ResNet50's logits by half as much again as rounding does. Its
    # fix gives the first layers 7 bits, where what is lost is lost for all others; without VNNI a
    # sum of two products may then saturate, and what that does is part of what is compared.
    parameters = AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        disable_bias_correction=True,
        overflow_fix=OverflowFix.DISABLE,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it draws bars
        return nncf.quantize(
            plain,
            nncf.Dataset(images, lambda image: image[None]),
            subset_size=len(images),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=nncf.IgnoredScope(names=_kept_whole(plain, whole)),
            advanced_parameters=parameters,
        )


def _kept_whole(plain: openvino.Model, whole: int) -> list[str]:
    """What stays in full precision: the first convolutions, and what is after the features.

    The maps cost no time. Of the first convolution neither: for one channel OpenVINO has no 8 bits.
    """
    nodes = [node for node in plain.get_ordered_ops() if node.get_type_name() not in NO_WORK]
    kinds = [node.get_type_name() for node in nodes]
    first = [node for node in nodes if node.get_type_name() == "Convolution"][:whole]
    features = len(kinds) - kinds[::-1].index("Relu")
    return [node.get_friendly_name() for node in (*first, *nodes[features:])]
