"""The demo's text: Python's own documentation, and a stated reward for it.

Every Python carries some thousand docstrings and the language reference (`pydoc_data.topics`): real
English that needs no download. A prompt is a signature, a topic or a module, the response the
first sentences of its documentation:

    textwrap.dedent(text)\\n  ->  Remove any common leading whitespace from every line in `text`.

`gold` scores a response by rules. In the demo it stands for the human: it ranks the completions
that the reward model learns from, and it is watched, never optimised, while PPO runs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import random
import re
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from rlhf_fast.train.data import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# In every Python from 3.11 to 3.13, and imported without a window, a terminal or a network.
# Written out, so that what is installed beside them changes nothing.
MODULES = """
abc argparse array ast asyncio asyncio.base_events asyncio.coroutines asyncio.events
asyncio.exceptions asyncio.futures asyncio.locks asyncio.mixins asyncio.protocols asyncio.queues
asyncio.runners asyncio.selector_events asyncio.sslproto asyncio.streams asyncio.subprocess
asyncio.taskgroups asyncio.tasks asyncio.threads asyncio.timeouts asyncio.transports
asyncio.trsock atexit base64 bdb binascii bisect builtins bz2 cProfile calendar cmath cmd code
codecs codeop collections collections.abc colorsys compileall concurrent.futures
concurrent.futures.process concurrent.futures.thread configparser contextlib contextvars copy
copyreg csv ctypes ctypes.util ctypes.wintypes dataclasses datetime dbm dbm.dumb decimal difflib
dis email email.base64mime email.charset email.contentmanager email.encoders email.errors
email.feedparser email.generator email.header email.headerregistry email.iterators email.message
email.mime.application email.mime.audio email.mime.base email.mime.image email.mime.message
email.mime.multipart email.mime.nonmultipart email.mime.text email.parser email.policy
email.quoprimime email.utils enum errno faulthandler filecmp fileinput fnmatch fractions ftplib
functools gc genericpath getopt getpass gettext glob graphlib gzip hashlib heapq hmac html
html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib
importlib.abc importlib.machinery importlib.metadata importlib.readers importlib.resources
importlib.resources.abc importlib.resources.readers importlib.resources.simple importlib.simple
importlib.util inspect io ipaddress itertools json json.decoder json.encoder json.scanner
json.tool keyword linecache locale logging logging.config logging.handlers lzma mailbox marshal
math mimetypes mmap modulefinder multiprocessing multiprocessing.connection
multiprocessing.context multiprocessing.dummy multiprocessing.managers multiprocessing.pool
multiprocessing.process multiprocessing.queues multiprocessing.reduction
multiprocessing.shared_memory multiprocessing.sharedctypes multiprocessing.synchronize
multiprocessing.util netrc ntpath numbers operator optparse os pathlib pickle pickletools pkgutil
platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri
random re reprlib runpy sched secrets select selectors shelve shlex shutil signal site smtplib
socket socketserver sqlite3 sqlite3.dump ssl stat statistics string stringprep struct subprocess
symtable sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize
tomllib trace traceback tracemalloc types typing unicodedata unittest unittest.async_case
unittest.case unittest.loader unittest.main unittest.mock unittest.result unittest.runner
unittest.signals unittest.suite unittest.util urllib urllib.error urllib.parse urllib.request
urllib.response urllib.robotparser uuid warnings wave weakref webbrowser wsgiref wsgiref.handlers
wsgiref.headers wsgiref.simple_server wsgiref.types wsgiref.util wsgiref.validate xml xml.dom
xml.dom.minidom xml.dom.pulldom xml.dom.xmlbuilder xml.etree.ElementInclude xml.etree.ElementPath
xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc
xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

MAX_PROMPT = 50  # characters; a token of a vocabulary of 1024 has about 2.5 of them
MAX_RESPONSE = 130
MIN_WORDS = 4
HELD_OUT = 10  # percent


# ----------------------------------------------------------------------------- documentation read


def _modules() -> Iterator[tuple[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in MODULES.split():
            with contextlib.suppress(ImportError):  # not on this platform, or left out of the build
                module = importlib.import_module(name)
                for public in getattr(module, "__all__", ()):
                    getattr(module, public, None)  # some names are there once they were asked for
                yield name, module


def _belongs(value: Any, module: str) -> bool:
    """True if `value` is documented as a part of `module`, not of one that it was taken from."""
    home = getattr(value, "__module__", None) or module
    return home in (module, "_" + module, "posix", "nt") or home.startswith(module + ".")


def _objects() -> Iterator[tuple[str, Any, str]]:
    """(name, object, raw docstring) of modules, classes, functions, methods and properties."""
    for name, module in _modules():
        if module.__doc__:
            yield name, module, module.__doc__
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            if not _belongs(value, name) or key.endswith("hook"):  # hooks are there to be replaced
                continue
            path = key if name == "builtins" else f"{name}.{key}"
            yield path, value, value.__doc__ or ""
            for method, raw in sorted(vars(value).items()) if inspect.isclass(value) else ():
                function = getattr(raw, "__func__", raw)
                documented = inspect.isroutine(function) or isinstance(function, property)
                if method.startswith("_") or not documented or not _belongs(function, name):
                    continue  # the last: libraries patch methods into logging.Logger and others
                yield f"{path}.{method}", function, function.__doc__ or ""


def _signature(name: str, value: Any, doc: str) -> str:
    """`name(a, b, ...)` with at most four parameters, as short as a prompt must be."""
    if inspect.ismodule(value) or isinstance(value, property):
        return name
    try:
        found = list(inspect.signature(value).parameters)
    except Exception:  # none (C code often has one in its docstring), or in 3.13 one that fails
        match = re.match(r"[\w.]+\(([^()]*)\)", doc)
        if inspect.isclass(value) or match is None:
            return name if inspect.isclass(value) else name + "()"
        found = re.findall(r"[A-Za-z]\w*", re.sub(r"=[^,]*", "", match[1]))
    bound = ("self", "cls") if "." in getattr(value, "__qualname__", "") else ("self",)
    parameters = [key for key in found if not key.startswith("_") and key not in bound]
    if inspect.isclass(value) and parameters in (["args", "kwargs"], ["args", "kwds"]):
        return name
    return f"{name}({', '.join(parameters[:4])}{', ...' if len(parameters) > 4 else ''})"


_SIGNATURE = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)( *->.*| --? .*)?$")


def _paragraphs(doc: str) -> list[str]:
    """The prose of a docstring, one line a paragraph: no signatures, code, tables, grammars."""
    found = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.split("\n")
        while lines and _SIGNATURE.match(lines[0]):
            _, dash, rest = lines[0].partition(") - ")
            lines = [rest, *lines[1:]] if dash else lines[1:]
        paragraph = " ".join(" ".join(lines).replace("``", "`").split())
        letters = sum(c.isalpha() or c == " " for c in paragraph)
        prose = paragraph.isascii() and letters > 0.85 * len(paragraph)
        marked = re.search(r"::|>>>|->|^\W|(.)\1{3}|\w=\w", paragraph)
        if prose and not marked and paragraph.count(" ") + 1 >= MIN_WORDS:
            found.append(paragraph)
    return found


def _response(doc: str) -> str:
    """The first sentences of the first paragraph, as many as fit; "" if none does."""
    first = next(iter(_paragraphs(doc)), "")
    kept = ""
    for sentence in re.split(r"(?<=[.!?]) +(?=[A-Z])", first):
        if len(kept) + 1 + len(sentence) > MAX_RESPONSE:
            break
        kept = f"{kept} {sentence}".strip()
    return kept if kept.count(" ") + 1 >= MIN_WORDS and kept[-1] not in ":,;" else ""


def _topics() -> Iterator[tuple[str, str]]:
    """(name, text without its title) of the language reference."""
    with contextlib.suppress(ImportError):  # Debian's minimal Python is without it
        topics = importlib.import_module("pydoc_data.topics").topics
        for name, body in sorted(topics.items()):
            yield name, re.sub(r"\A.*\n\*+\n", "", body)


@functools.cache
def _entries() -> tuple[tuple[str, str, str], ...]:
    """(prompt, response, all prose) of everything documented; the response may be ""."""
    found = []
    for name, value, doc in _objects():
        if isinstance(doc, str):
            prose = "\n".join(_paragraphs(doc))
            found.append((_signature(name, value, doc) + "\n", _response(doc), prose))
    for name, body in _topics():
        blocks = _paragraphs(textwrap.dedent(body))
        found.append((f"{name}\n", _response("\n\n".join(blocks)), "\n".join(blocks)))
    return tuple(found)


# ----------------------------------------------------------------------------- records and text


def _words(text: str) -> list[str]:
    """What stands between spaces, in lower case and without the punctuation around it."""
    return [word.strip(".,;:!?()[]{}<>*'\"`") for word in text.lower().split()]


def _name(prompt: str) -> str:
    return re.split(r"[(\n]", prompt.strip(), maxsplit=1)[0]


def _opening(text: str) -> str:
    return " ".join(_words(text)[:6])


@functools.cache
def _split() -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    train: list[Record] = []
    held_out: list[Record] = []
    seen: set[str] = set()
    for prompt, response, _ in _entries():
        key = " ".join(_words(response))
        if not response or len(prompt) > MAX_PROMPT or key in seen or prompt in seen:
            continue
        seen |= {key, prompt}
        # Methods of one name have nearly one docstring (str.lower, bytes.lower): one side for all.
        last = _name(prompt).rpartition(".")[2].lower()
        side = held_out if zlib.crc32(last.encode()) % 100 < HELD_OUT else train
        side.append(Record(prompt, (response,)))
    openings = {_opening(record.best) for record in train}
    return tuple(train), tuple(r for r in held_out if _opening(r.best) not in openings)


def records(seed: int = 0) -> tuple[list[Record], list[Record]]:
    """(train, held-out) records: about 3300 and 370, each with one completion.

    The split is fixed, by a hash of the last part of the name; no held-out response begins with the
    first six words of a train response. `seed` orders the records.
    """
    sides = [list(side) for side in _split()]
    for side in sides:
        random.Random(seed).shuffle(side)
    return sides[0], sides[1]


@functools.cache
def text() -> str:
    """Prose for the pretraining gradient and the tokenizer, one paragraph a line, about 1 MB.

    The language reference and the docstrings in full, without those of the held-out records.
    """
    held_out = {record.best for record in _split()[1]}
    prose = (prose for _, response, prose in _entries() if prose and response not in held_out)
    return "\n".join(dict.fromkeys(prose))


# ----------------------------------------------------------------------------- the gold reward


@functools.cache
def _known() -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Words and pairs of neighbouring words that two or more of the documents have."""
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for document in dict.fromkeys(prose for _, _, prose in _entries()):
        found = _words(document)
        words.update(set(found))
        pairs.update(set(itertools.pairwise(found)))
    return (
        frozenset(word for word, n in words.items() if n > 1),
        frozenset(pair for pair, n in pairs.items() if n > 1),
    )


def _parts(text: str) -> set[str]:
    """Words of at least three letters in names and prose: `readline_fd`, `readFd` -> read.., fd."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower()
    return set(re.findall(r"[a-z]{3,}", spaced))


def _mentioned(prompt: str, response: str) -> int:
    said = _parts(response)
    stems = {part[:5] for part in _parts(prompt)}
    return sum(any(word.startswith(stem) for word in said) for stem in stems)


def gold(prompt: str, response: str, finished: bool) -> float:
    """How good a docstring `response` is for `prompt`, in [0, 1], by rules.

        gold = 0.10 finished + 0.10 stop + 0.05 capital + 0.15 length + 0.35 language + 0.25 topic

    finished: it ended by itself. stop: it ends with a full stop. capital: it begins with a capital.
    length:   1 for 6 to 20 distinct words, linear from 0 at none, and to 0 at 40.
    language: known^2 * fluent * distinct, shares of the words that the documentation has, of the
              pairs of neighbours that it has, and of the pairs that are not repeated.
    topic:    words of the signature that the response takes up, 1 for two of them.

    An empty response scores 0. No part is a yes or no that decides alone, so that completions of a
    weak model rank; repeating a good phrase costs language and length, and a phrase that fits every
    prompt misses the topic.

    Means over the held-out prompts, finished: the real response 0.80, "Return the name of the file
    object." for all 0.77, another prompt's response 0.64, the real one's words shuffled 0.52, the
    prompt again 0.38, "Return the value." 8 times 0.37, "the" 20 times 0.13; unfinished: half of
    the real response 0.45, 40 random tokens 0.16.
    """
    words = [word for word in _words(response) if word]
    if not words:
        return 0.0
    vocabulary, pairs_known = _known()
    pairs = list(itertools.pairwise(words))
    known = sum(word in vocabulary for word in words) / len(words)
    fluent = sum(pair in pairs_known for pair in pairs) / max(len(pairs), 1)
    distinct = len(set(pairs)) / max(len(pairs), 1)
    n = len(set(words))
    length = min(1.0, n / 6, max(0.0, (40 - n) / 20))
    topic = min(1.0, _mentioned(prompt, response) / 2)
    body = response.strip()
    return (
        0.10 * finished
        + 0.10 * body.endswith(".")
        + 0.05 * body[0].isupper()
        + 0.15 * length
        + 0.35 * known**2 * fluent * distinct
        + 0.25 * topic
    )


# ----------------------------------------------------------------------------- the tokenizer

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def tokenizer(texts: Iterable[str], vocabulary: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens trained on `texts`; any text decodes as it was.

    It has <pad>, <bos> and <eos>, each its own, and adds none of them when it encodes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, BOS, EOS]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(special) + len(alphabet):
        raise ValueError(
            f"vocabulary: expected at least {len(special) + len(alphabet)}, got {vocabulary}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
