"""README.md, docs/ and results/README.md: their tables, links, options and files are real."""

import re
import subprocess
from pathlib import Path

import pytest

import train
from data import corpus, prepare
from nanoosp.options import build_parser
from results.ffn_hidden import trace
from results.rounding.measure import RoundingOptions
from results.small.documents import DocumentsOptions
from results.tables import PAGES, TABLES, filled, kind
from tools import evaluate, export

ROOT = Path(train.__file__).parent
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
ALL_TEXT = re.sub(r"<!--.*?-->", "", "\n".join(TEXTS.values()))

OPTIONS = (train.Options, evaluate.Options, export.Options, prepare.Options, corpus.Options,
           trace.TraceOptions, RoundingOptions, DocumentsOptions)
PARSERS = [build_parser(options, "") for options in OPTIONS]
FOREIGN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--local-dir",
           "--additional-suffix", "--exclude", "--model", "--model-args", "--include-path", "--include",
           "--enforce-eager", "--max-model-len", "--outtype"}


def headings(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"(?m)^#+ +(.+)$", re.sub(r"(?ms)^```.*?^```", "", page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_front_page_is_short():
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    assert len(readme.split()) <= 1500


def test_every_page_is_checked_here():
    written = {ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")}
    assert written == set(PAGES)


def test_every_table_is_what_the_logs_say():
    for path, page in TEXTS.items():
        assert filled(page) == page, f"{path.name}: run python results/tables.py"


def test_every_table_stands_on_exactly_one_page():
    assert sorted(re.findall(r"<!-- table (\S+) -->", "".join(TEXTS.values()))) == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_digit_would_be_noticed(name):
    page = next(text for text in TEXTS.values() if f"<!-- table {name} -->" in text)
    table = re.search(rf"<!-- table {name} -->\n(.*?)<!-- end -->", page, re.S).group(1)
    last = list(re.finditer(r"\d", table))[-1]
    digit = str((int(last.group()) + 1) % 10)
    changed = page.replace(table, table[: last.start()] + digit + table[last.end() :])
    assert changed != page and filled(changed) == page


def test_every_option_the_pages_name_exists():
    options = FOREIGN.union(*(parser._option_string_actions for parser in PARSERS))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", ALL_TEXT)) <= options


def test_every_file_the_pages_name_exists():
    scripts = re.findall(r"(?:python|torchrun [^`\n]*?) ([a-z_/]+\.py)", ALL_TEXT)
    folders = r"(?:results|docs|data|tools|nanoosp|tests)"
    paths = re.findall(rf"`({folders}/[\w./-]+?\.\w+)`|`(results/[^`]+?)`", ALL_TEXT)
    assert "train.py" in scripts and len(paths) > 10
    for name in {*scripts, *(a or b for a, b in paths)}:
        assert (ROOT / name).exists(), name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_what_the_commands_write_stays_out_of_git_status():
    """All that the pages' commands name after --plot, --hf, --out and --local-dir, but DIR and FILE."""
    written = set(re.findall(r"--(?:plot|hf|out|local-dir) ([\w./-]*[a-z0-9])(?![\w-])", ALL_TEXT))
    assert {"figures", "my-llama", "osp-4bit.pt", "osp"} <= written
    for path in {*written, "tokenizer.json", ".cache"}:
        asked = ["git", "check-ignore", path, f"{path}/file"]  # as a file or as a folder
        assert subprocess.run(asked, cwd=ROOT, capture_output=True).returncode == 0, path


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_local_link_resolves(path):
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[path]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists() and ROOT in [target, *target.parents], f"{path.name}: {link}"
        if anchor:
            assert anchor in headings(TEXTS[target]), f"{path.name}: {link}"


def test_the_output_that_the_front_page_shows_was_printed():
    blocks = re.findall(r"(?ms)^```text\n(.*?)^```", TEXTS[ROOT / "README.md"])
    for log, shown in zip(("tiny-adam", "sample"), blocks, strict=True):
        printed = (ROOT / f"results/first_minute/{log}.txt").read_text().splitlines()
        assert set(shown.splitlines()) <= set(printed)


def test_figures_are_small():
    for path in (ROOT / "results/figures").glob("*.png"):
        assert path.stat().st_size < 200_000, path


def test_kernels_are_told_apart_by_their_names():
    names = [  # as torch 2.11 has them on an H100
        ("matrix products", "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"),
        ("attention",
         "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128"),
        ("loss",
         "triton_red_fused__log_softmax__to_copy__unsafe_view_prepare_softmax_online_view_3"),
        ("SwiGLU", "triton_poi_fused__unsafe_view_mul_silu_silu_backward_view_1"),
        ("norms and residual stream",
         "triton_red_fused__fused_rms_norm__to_copy__unsafe_view_add_mul_4"),
        ("norms and residual stream", "triton_poi_fused__unsafe_view_add_7"),
        ("RoPE and layout of heads", "triton_poi_fused__to_copy_add_cat_mul_neg_slice_3"),
        ("RoPE and layout of heads", "triton_poi_fused_clone_transpose_3"),
        ("weight casts, sums of gradients", "triton_poi_fused__to_copy_t_5"),
        ("weight casts, sums of gradients",
         "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, 3>"),
        ("sums over GPUs",
         "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"),
        ("other", "void at::native::sum_and_scatter<float, long>(long const*, float*, long)"),
        ("other", "Memset (Device)"),
    ]
    assert [(kind(name), name) for _, name in names] == names
