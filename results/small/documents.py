"""Make a text of documents, and a held-out text, out of the files whose names stdin has, line by line.

    find usr/share/doc -name '*.html' | python results/small/documents.py docs

It writes text/train/docs.txt and text/held/docs.txt, with a line <|endoftext|> after every document.
HTML becomes plain text. Left out are files of less than 1,000 bytes or of less than 40 % letters, those
with lines of 5,000 bytes, those that say at their beginning that a program wrote them, and repetitions
(white space aside). One document in a hundred is held out, by its hash. Once the held-out text has
2 MB, further ones go into neither.
"""

import hashlib
import os
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that it runs from any directory

from tqdm import tqdm  # noqa: E402 (it and the rest need the line above)

from nanoosp.options import command, option, parse  # noqa: E402

HELD_BYTES = 2_000_000
HTML = [  # what to replace, one after the other: page furniture, cells, ends of lines, tags, entities
    (r"(?s)<(head|script|style|nav)\b.*?</\1>", ""), (r"(?s)\A.*?(?=<h[1-5])", ""),
    (r'(?s)<div class="(sphinxsidebar|footer|related).*', ""), (r"</t[dh]>", " "),
    (r"(?s)<(br|/(p|div|li|tr|pre|h\d|d[dt]))\b.*?>", "\n"), (r"(?s)<.*?>", ""),
    ("&lt;", "<"), ("&gt;", ">"), ("&(quot|[lr]dquo);", '"'), ("&[lr]squo;", "'"),
    (r"&#(\d+);", lambda match: chr(int(match[1]))), (r"&(?!amp;)\w+;", " "), ("&amp;", "&")]
HTML = [(re.compile(pattern), new) for pattern, new in HTML]
LETTERS = string.ascii_letters.encode()
GENERATED = re.compile(rb"(?i)generated (by|from)|do not (edit|modify)")


@dataclass
class DocumentsOptions:
    name: str = option(None, "what to call the text", positional=True, required=True, metavar="NAME")
    out: Path = option(Path("text"), "where to write (default: text)", metavar="DIR")


def document(path: str) -> bytes | None:
    """The text of a file, tidied; None if it is left out."""
    try:
        text = Path(path).read_bytes().decode()
        for pattern, new in HTML if path.endswith("html") else ():
            text = pattern.sub(new, text)
        text = re.sub(r"\n{3,}", "\n\n", re.sub(r"(?m)[ \t\r]+$", "", text)).encode()
    except (ValueError, OverflowError):  # not UTF-8, or &#...; names no character
        return None
    letters = len(text) - len(text.translate(None, LETTERS))
    odd = len(text) < 1000 or letters < 0.4 * len(text) or re.search(rb"(?m)^.{5000}", text)
    return None if odd or GENERATED.search(text[:1000]) else text


@command
def main(argv=None):
    opt = parse(DocumentsOptions, __doc__, argv)
    train, held = (opt.out / split / f"{opt.name}.txt" for split in ("train", "held"))
    seen = set()  # digests
    for path in (train, held):
        path.parent.mkdir(parents=True, exist_ok=True)
    paths = sorted(sys.stdin.read().splitlines(), key=os.fsencode)  # in the same order everywhere
    with train.open("wb") as train_file, held.open("wb") as held_file:
        for path in tqdm(paths, opt.name, disable=None):
            text = document(path)
            if text is None:
                continue
            digest = hashlib.md5(re.sub(rb"\s+", b"", text)).digest()
            if digest in seen:
                continue
            seen.add(digest)
            is_held = int.from_bytes(digest[:4], "big") % 100 == 0
            if not is_held or held_file.tell() < HELD_BYTES:
                (held_file if is_held else train_file).write(text + b"\n<|endoftext|>\n")
    print(f"{opt.name}: {len(seen):,} documents")


if __name__ == "__main__":
    main()
