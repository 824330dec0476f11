"""The command line. A script's options are the fields of a dataclass, each with its help beside it:

    @dataclass
    class Options:
        steps: int = option(None, "optimizer steps in all")

    @command
    def main(argv=None):
        opt = parse(Options, __doc__, argv)

A user's mistake ends with one line: exit code 2 for options (fail), 1 for files and failed runs (command). Nothing here
imports torch, which takes seconds: the scripts of data/ do without it, and the others call answer_before_torch() first.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = r"\n\n(?:Glossary|Words used here|Deviations|Read it top to bottom)"  # a docstring's part for readers of the code


def is_first() -> bool:
    """Of torchrun's processes, is this the one that talks?"""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str):
    """End the program: one line, exit code 2."""
    if is_first():
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def option(default, help: str, *, group=None, choices=None, low=None, high=None, many=False, positional=False,
           metavar=None, required=False, **facts):
    """A field of an options dataclass. Its annotation is the type: int, float, str, Path or bool.

    Args:
        default: None means "not given", for the script to fill in.
        group: heading that begins here in --help, for this option and those after it.
        low, high: a number must be at least low (without it, above 0) and below high (without it, an int below 2^31).
        many: takes a list of values. positional: given without its name. required: must be given.
        facts: whatever else the script wants to know of its options, kept in the field's metadata.
    """
    given = dict(help=help, group=group, choices=choices, low=low, high=high, many=many, positional=positional,
                 metavar=metavar, required=required, **facts)
    return dataclasses.field(default=default, metadata=given)


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch_size for --batch-size, names the nearest option for a misspelt one, and is brief."""

    def error(self, message):
        fail(message)


def flag(name: str) -> str:
    """As typed: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def build_parser(options: type, docstring: str) -> Parser:
    """argparse's parser for an options dataclass. Inherited options come last. --help begins with the docstring, up to
    its notes on the code, and ends with the dataclass's `after_help`, if it has that."""
    parser = Parser(description=re.split(NOTES, docstring)[0], epilog=getattr(options, "after_help", None),
                    allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for field in sorted(dataclasses.fields(options), key=lambda f: f.name not in options.__annotations__):
        facts, kwargs = field.metadata, dict(default=argparse.SUPPRESS, help=field.metadata["help"])
        if field.default is not None and field.default is not False and "(default" not in facts["help"]:
            kwargs["help"] += f" (default: {field.default})"
        if facts["group"]:
            add = parser.add_argument_group(facts["group"]).add_argument
        if field.type is bool:  # --name, and --no-name where "not given" is a third answer
            kwargs["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        else:
            kwargs |= dict(type=field.type, choices=facts["choices"], metavar=facts["metavar"])
            at_least_one = facts["required"] or not facts["positional"]
            kwargs |= dict(nargs="+" if at_least_one else "*") if facts["many"] else {}
            kwargs |= dict(required=True) if facts["required"] and not facts["positional"] else {}
        add(field.name if facts["positional"] else flag(field.name), **kwargs)
    return parser


def parse(options: type, docstring: str, argv=None):
    """An instance of the dataclass `options`, from `argv` or else from sys.argv. Ends the program for a mistake.
    `given` in it: the names of what was given; `began`: when that was, by time.perf_counter()."""
    parser, argv = build_parser(options, docstring), sys.argv[1:] if argv is None else argv
    for before, word in zip(["an argument", *argv], argv):
        if word == "" or word.startswith("--") and word.endswith("="):
            fail(f"{word[:-1] or before} is empty")

    def dashes(word):
        name, *value = word.split("=", 1)
        return "=".join([name.replace("_", "-"), *value]) if word.startswith("--") else word

    args, unknown = parser.parse_known_args([dashes(word) for word in argv])
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        problem = "unknown option" if unknown[0].startswith("-") else "unexpected word"
        fail(f"{problem} {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
    opt = options(**vars(args))  # which has only what was given
    opt.given = set(vars(args))
    opt.began = time.perf_counter()
    check_ranges(opt)
    return opt


def door(name: str, module: str):
    """If `name` is "__main__": go on with main() of the module that holds this script's command line, and end. Called
    before the script imports torch, so that --help is answered at once. The module imports the script again, as a
    library, and nothing imports the module: so imports go one way."""
    if name == "__main__":
        importlib.import_module(module).main()
        sys.exit()


def begin(main, *modules: str):
    """Run a script's main(), or that of the first of `modules` whose option was given: --dry-run for tools.dry_run."""
    given = [word.replace("_", "-") for word in sys.argv[1:]]
    for module in modules:
        if flag(module.split(".")[-1]) in given:
            door("__main__", module)
    main()


def answer_before_torch(script: str, options: type, check=lambda opt: None):
    """If `script` is the program that runs: answer --help and report mistakes in its options now, before the import of
    torch, which takes seconds. Until command() takes over, Ctrl-C ends it at once. Also tells torch's threads to give up
    their cores soon while they wait for each other. By default they spin for milliseconds, and take the cores from those
    they wait for: beside another run a step of `tiny` took four to forty times as long. Not to spin at all
    (GOMP_SPINCOUNT=0) is a third faster beside another run, but alone takes 1.7 times as long, because every short
    operation waits for a thread to wake."""
    main = sys.modules["__main__"]
    if Path(getattr(main, "__file__", None) or "").resolve() == ROOT / script:
        if "OMP_WAIT_POLICY" not in os.environ:  # the user's word, which ours would overrule
            os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of GNU's OpenMP, which torch brings on Linux
        signal.signal(signal.SIGINT, exit_at_once)
        check(parse(options, main.__doc__))


def interrupted() -> int:
    """Say that Ctrl-C was pressed. Returns the exit code."""
    if is_first():
        os.write(2, b"interrupted\n")  # print() must not be interrupted by itself
    return 130


def exit_at_once(*_):
    """Ctrl-C while packages are imported or kernels compile: an exception might get lost in there."""
    with contextlib.suppress(RuntimeError):  # it may be in the middle of printing
        sys.stdout.flush()
    os._exit(interrupted())


def as_if_given(opt, values: dict):
    """Treat options as if they had these values on the command line, unless they are there with others."""
    for name in values.keys() - opt.given:
        setattr(opt, name, values[name])
    opt.given |= values.keys()


def changed(opt, names) -> list[str]:
    """Those of the options `names` that do not have the value they have when left out."""
    default = {field.name: field.default for field in dataclasses.fields(opt)}
    return [name for name in names if getattr(opt, name) != default[name]]


def fill(opt, **defaults):
    """Give options that are None their defaults."""
    for name, value in defaults.items():
        if getattr(opt, name) is None:
            setattr(opt, name, value)


def check_ranges(opt):
    """End the program at the first number that is out of its range."""
    for field in dataclasses.fields(opt):
        value, low, high = getattr(opt, field.name), field.metadata["low"], field.metadata["high"]
        if type(value) not in (int, float):
            continue
        high = high or (2**31 if type(value) is int else math.inf)
        enough = value > 0 if low is None else value >= low  # false for nan
        if not enough or value >= high:
            bound = "above 0" if low is None else f"at least {low}"
            fail(f"{flag(field.name)} {value} is out of range: it must be {bound} and below {high}")


def command(main):
    """Decorates a script's main(argv): what a user can cause ends in one line, without a traceback."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            if signal.getsignal(signal.SIGINT) is exit_at_once:
                signal.signal(signal.SIGINT, signal.default_int_handler)
            main(argv)
            sys.stdout.flush()
        except KeyboardInterrupt:
            sys.exit(interrupted())
        except BrokenPipeError:  # a pipe into `head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its exit
            sys.exit(1)
        except (ValueError, OSError, ArithmeticError, ImportError) as error:
            if isinstance(error, OSError) and error.filename and error.strerror:
                error = f"{error.filename}: {error.strerror}"
            sys.exit(f"error: {error}" if is_first() else f"error on rank {os.environ['RANK']}: {error}")
        except (RuntimeError, MemoryError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            if "without overflow" in first_line:  # for which float32 is too small
                sys.exit("error: a number became too large for float32: try a lower --lr")
            if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or re.search("allocate|overflow", first_line):
                sys.exit(f"error: not enough memory ({first_line}); use a smaller --micro-batch-size (eval.py: "
                         "--batch-size), model or --seq-len")
            if "RANK" in os.environ and re.search("(?i)gloo|nccl|connection", first_line):
                sys.exit("error: another rank stopped" if is_first() else 1)
            raise

    return run
