import re
from pathlib import Path

import pytest

import eval as evaluation
import quantize
import train
from data import benchmarks, corpus, prepare
from results.tables import PAGES, TABLES, filled

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_table_is_what_the_logs_say():
    pages = [path.read_text(encoding="utf-8") for path in PAGES]
    assert [filled(page) for page in pages] == pages, "run python results/tables.py"
    assert sorted(re.findall(r"<!-- table (\S+) -->", "".join(pages))) == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_digit_would_be_noticed(name):
    page = next(text for path in PAGES if f"<!-- table {name} -->" in (text := path.read_text(encoding="utf-8")))
    table = re.search(rf"<!-- table {name} -->\n(.*?)<!-- end -->", page, re.S).group(1)
    last = list(re.finditer(r"\d", table))[-1]
    digit = str((int(last.group()) + 1) % 10)
    changed = page.replace(table, table[: last.start()] + digit + table[last.end() :])
    assert changed != page and filled(changed) == page


def test_every_option_and_file_the_readme_names_exists():
    parsers = (train, evaluation, quantize, prepare, corpus, benchmarks)
    options = {name for script in parsers for name in script.build_parser()._option_string_actions}
    options |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--local-dir"}  # torchrun's, hf's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", re.sub(r"<!--.*?-->", "", README))) <= options
    for name in re.findall(r"\]\(([^)#:]+)\)|`(results/[^`]+?)`", README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_figures_are_small():
    for path in (ROOT / "results/figures").glob("*.png"):
        assert path.stat().st_size < 200_000, path
