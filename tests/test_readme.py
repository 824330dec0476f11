import re
from pathlib import Path

import eval as evaluation
import quantize
import train
from data import benchmarks, corpus, prepare
from results.tables import TABLES, filled

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text()


def test_every_table_of_the_readme_is_what_the_logs_say():
    assert filled(README) == README, "run python results/tables.py"
    assert set(re.findall(r"<!-- table (\S+) -->", README)) == set(TABLES)


def test_a_changed_digit_would_be_noticed():
    loss = re.search(r"nats|\d\.\d{4}", README[README.index("<!-- table first_minute") :]).group()
    assert filled(README.replace(loss, "0.0001")) != README.replace(loss, "0.0001")


def test_every_option_and_file_the_readme_names_exists():
    parsers = (train, evaluation, quantize, prepare, corpus, benchmarks)
    options = {name for script in parsers for name in script.build_parser()._option_string_actions}
    options |= {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--local-dir"}  # of torchrun, of hf
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", re.sub(r"<!--.*?-->", "", README))) <= options
    for name in re.findall(r"\]\(([^)#:]+)\)|`(results/[^`]+?)`", README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_figures_are_small():
    for path in (ROOT / "assets").glob("*.png"):
        assert path.stat().st_size < 200_000, path
