"""The ten benchmarks, from their original files to the task files that eval.py --tasks scores.

    python data/benchmarks.py all --hub --out tasks        fetch and convert all of them
    python data/benchmarks.py piqa FILE --out tasks        convert a .parquet or .jsonl(.gz, .xz)
    python data/benchmarks.py gsm8k FILE --train FILE --out tasks      with solved examples

Prompts, splits and numbers of solved examples are those of the paper's evaluation, in its
lighteval_tasks.py and tasks.txt. Three of its details are odd. They are only kept with --osp-exact,
which a comparison with the paper needs:
 1. HellaSwag: endings follow the context after two blanks. Here: one.
 2. TriviaQA: the answers of the solved examples are bare (lower case, no punctuation) and follow
    "Answer:" without a blank. Here: as in the dataset, after a blank.
 3. TriviaQA: an accepted answer that begins with another one is dropped. Here: all are accepted.

FILEs are as the datasets on the Hugging Face hub have them. tools/tasks.py describes task files.
Parquet and --hub need requirements-extra.txt.
"""

import json
import re
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run from any directory

from tqdm import tqdm

from data.sources import download
from nanoosp.files import DAMAGED, opened, require, write_text
from nanoosp.options import command, fail, option, parse

# Converters: a row of the dataset -> a question. exact: with the paper's oddities.


def mc(context: str, texts: list[str], gold: int, blank=" ", **more) -> dict:
    choices = [blank + text for text in texts]
    if not 0 <= gold < len(choices):
        raise ValueError(f"answer {gold} of {len(choices)} choices (a split without answers?)")
    return dict(type="mc", context=context, choices=choices, gold=gold, **more)


def arc(row, exact):
    labels, texts = row["choices"]["label"], row["choices"]["text"]  # labels are A to E, or 1 to 5
    return mc(f"Question: {row['question']}\nAnswer:", texts, labels.index(row["answerKey"]))


def commonsense_qa(row, exact):
    return mc(row["question"], row["choices"]["text"], "ABCDE".index(row["answerKey"].strip()))


def gsm8k(row, exact):
    number = re.search(r"#### (-?[0-9.,]+)", row["answer"])[1].replace(",", "")
    context = f"Question: {row['question']}\nAnswer:"
    return dict(type="gen", context=context, answers=[number], target=" " + row["answer"])


def hellaswag(row, exact):
    def clean(text):  # wikiHow's marks
        text = re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).replace("  ", " ")
        return text if exact else text.strip()

    context = clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()} ")
    return mc(context, [clean(ending) for ending in row["endings"]], int(row["label"]))


def mmlu(row, exact):
    subject = row["subject"].replace("_", " ")
    context = f"The following are questions about {subject}.\nQuestion: {row['question']}\nAnswer:"
    return mc(context, row["choices"], int(row["answer"]), group=row["subject"])


def openbook_qa(row, exact):
    right = "ABCDE".index(row["answerKey"].strip())
    return mc(row["question_stem"], row["choices"]["text"], right)


def piqa(row, exact):
    return mc(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], int(row["label"]))


def siqa(row, exact):
    choices = [row["answer" + letter] for letter in "ABC"]
    return mc(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def trivia_qa(row, exact):
    answers, target = row["answer"]["aliases"], " " + row["answer"]["value"]
    if exact:
        starts = []
        for alias in sorted(answers):
            if not starts or not alias.startswith(starts[-1]):
                starts.append(alias)
        drop = str.maketrans("", "", string.punctuation)
        answers = [alias.lower().translate(drop) for alias in starts]
        target = answers[0]
    context = f"Question: {row['question']}\nAnswer:"
    return dict(type="gen", context=context, answers=answers, target=target)


def winogrande(row, exact):
    before, _, after = row["sentence"].partition("_")  # a blank stays at its end
    choices = [f"{row[option]} {after.strip()}" for option in ("option1", "option2")]
    return mc(before, choices, int(row["answer"]) - 1, blank="")


class Origin(NamedTuple):
    """Where a task comes from on the hub, and how it is asked."""

    benchmark: str  # the paper's name for its column
    convert: Callable
    dataset: str
    subset: str
    split: str
    rows: int | None  # in that split, as a check
    settings: dict = {}


STOP = ["Question:", "Question"]
ORIGINS = {
    "arc_easy": Origin("ARC", arc, "allenai/ai2_arc", "ARC-Easy", "test", 2376),
    "arc_challenge": Origin("ARC", arc, "allenai/ai2_arc", "ARC-Challenge", "test", 1172),
    "commonsense_qa": Origin("CSQA", commonsense_qa, "tau/commonsense_qa", "default",
                             "validation", 1221),
    "gsm8k": Origin("GSM8K", gsm8k, "openai/gsm8k", "main", "test", 1319,
                    dict(shots=8, max_new=256, stop=STOP, match="number")),
    "hellaswag": Origin("HS", hellaswag, "Rowan/hellaswag", "default", "validation", 10042),
    "mmlu": Origin("MMLU", mmlu, "cais/mmlu", "all", "test", 14042),
    "openbook_qa": Origin("OBQA", openbook_qa, "allenai/openbookqa", "main", "validation", 500),
    "piqa": Origin("PIQA", piqa, "ybisk/piqa", "plain_text", "validation", 1838),
    "siqa": Origin("SIQA", siqa, "lighteval/siqa", "default", "validation", 1954),
    "trivia_qa": Origin("TQA", trivia_qa, "mandarjoshi/trivia_qa", "rc.nocontext", "validation",
                        None, dict(shots=5, max_new=20, stop=STOP, match="alias")),
    "winogrande": Origin("WG", winogrande, "allenai/winogrande", "winogrande_xl", "validation",
                         1267),
}

# Files


def read_rows(path: Path):
    """The rows of a file, one by one, as dicts. Raises OSError, ValueError and ImportError."""
    if path.suffix.lower() == ".parquet":
        for batch in require("pyarrow.parquet", path.name).ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    else:
        with opened(path) as file:
            yield from (json.loads(line) for line in file if line.strip())


def fetch(origin: Origin, split: str) -> Path:
    """Download one split, once. The hub keeps a parquet copy of every dataset, in the same layout.
    Raises what download() does."""
    file = f"{origin.subset}/{split}/0000.parquet"
    return download(origin.dataset, file, revision="refs/convert/parquet")


def convert(task: str, files: list[Path], exact: bool) -> list[str]:
    """The questions in `files`, as lines. Raises ValueError, with file and row, for a row that does
    not fit."""
    questions = []
    for path in files:
        before = len(questions)
        try:
            for row in tqdm(read_rows(path), task, leave=False, disable=None):
                line = json.dumps(ORIGINS[task].convert(row, exact), ensure_ascii=False)
                line.encode("utf-8")  # half of a surrogate pair cannot be written
                questions.append(line)
        except (*DAMAGED, LookupError, TypeError, AttributeError, RecursionError) as error:
            row = len(questions) - before + 1
            raise ValueError(f"{path}, row {row}, does not fit {task}: {error!r}") from error
    if not questions:
        raise ValueError(f"{', '.join(map(str, files))}: no rows")
    return questions


def write_lines(path: Path, lines: list[str]):
    """Write a file whole or not at all. If that fails, remove the folders that were made for it."""
    new_folders = [folder for folder in (path.parent, path.parent.parent) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_text(path, "\n".join([*lines, ""]))
    except BaseException:
        for folder in new_folders:
            folder.rmdir()
        raise


@dataclass
class Options:
    task: str = option(None, f"one of {', '.join(ORIGINS)}; or all, with --hub", positional=True,
                       choices=[*ORIGINS, "all"], metavar="TASK")
    files: Path = option(None, "the split that is scored, as downloaded", positional=True,
                         many=True, metavar="FILE")
    train: Path = option(None, "the training split, where the solved examples of gsm8k and "
                         "trivia_qa come from", many=True, metavar="FILE")
    hub: bool = option(False, "fetch the files from the Hugging Face hub instead (once: it is "
                       "cached)")
    out: Path = option(None, "where TASK.jsonl goes, and shots/TASK.jsonl", metavar="DIR",
                       required=True)
    osp_exact: bool = option(False, "keep the three oddities, for numbers that can be compared "
                             "with the paper's")


@command
def main(argv=None):
    opt = parse(Options, __doc__, argv)
    if opt.hub == bool(opt.files) or opt.task == "all" and not opt.hub:
        fail("name a TASK and its FILEs, or a TASK (or all) and --hub")
    for task in ORIGINS if opt.task == "all" else [opt.task]:
        origin = ORIGINS[task]
        source = f"{origin.dataset} {origin.subset} {origin.split}" + ", osp-exact" * opt.osp_exact
        settings = dict(task=task, benchmark=origin.benchmark, **origin.settings, source=source)
        shots = []
        if "shots" in settings:
            settings["shots_from"] = f"shots/{task}.jsonl"
            if not (opt.train or opt.hub):
                fail(f"{task} is asked with {settings['shots']} solved examples: add --train FILE")
            train = [fetch(origin, "train")] if opt.hub else opt.train
            shots = convert(task, train, opt.osp_exact)
        files = [fetch(origin, origin.split)] if opt.hub else opt.files
        questions = convert(task, files, opt.osp_exact)
        if shots:
            write_lines(opt.out / settings["shots_from"], shots)
        write_lines(opt.out / f"{task}.jsonl", [json.dumps(settings), *questions])
        n = len(questions)
        note = f" (the paper's split has {origin.rows:,})" if origin.rows not in (n, None) else ""
        print(f"{opt.out / task}.jsonl: {n:,} questions{note}")


if __name__ == "__main__":
    main()
