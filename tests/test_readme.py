"""README.md, docs/ and the pages of results/: their tables, links, options and files are real."""

import re
import subprocess
from pathlib import Path

import pytest
from count import FIVE

import train
from data import corpus, prepare
from nanoosp.options import build_parser
from results.ffn_hidden import trace
from results.rounding.measure import RoundingOptions
from results.small.documents import DocumentsOptions
from results.tables import OVERVIEWS, PAGES, TABLES, filled, kind
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
    """The anchors that GitHub makes of a page's headings: a title's second one ends in -1."""
    titles = re.findall(r"(?m)^#+ +(.+)$", re.sub(r"(?ms)^```.*?^```", "", page))
    anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return {f"{anchor}-{n}" if (n := anchors[:i].count(anchor)) else anchor
            for i, anchor in enumerate(anchors)}


def links(page: str) -> list[str]:
    """Where a page's links and pictures lead, in Markdown and in HTML; those in code are none."""
    text = re.sub(r"^```.*?^```|^    [^\n]*$|`[^`]*`", "", page, flags=re.M | re.S)
    inline = re.findall(r"\]\(\s*<?([^)\s>]*)", text)
    html = re.findall(r"(?:href|src)=[\"']([^\"']+)", text)
    return inline + html + re.findall(r"(?m)^\[[^\]]+\]: *(\S+)", text)


def local_target(path: Path, link: str) -> tuple[Path | None, str]:
    """The file that a link on the page `path` leads to, and the anchor; None for the web."""
    if re.match(r"[a-z]+:", link):
        return None, ""
    file, _, anchor = link.partition("#")
    return (path.parent / file).resolve() if file else path, anchor


def test_the_front_page_is_short():
    readme = TEXTS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150
    assert len(readme.split()) <= 1500


@pytest.mark.parametrize("name, words", [("results/README.md", 3000), ("docs/scale.md", 1800)])
def test_a_page_that_had_grown_stays_short(name, words):
    assert len(TEXTS[ROOT / name].split()) <= words


def test_every_experiment_has_a_page():
    folders = {path.parent for path in (ROOT / "results").glob("*/*.json*")}
    assert len(folders) > 10 and {folder / "README.md" for folder in folders} <= set(PAGES)


def test_every_page_is_checked_here():
    written = {ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("results/**/*.md")}
    assert written == set(PAGES)


def test_every_table_is_what_the_logs_say():
    for path, page in TEXTS.items():
        assert filled(page) == page, f"{path.name}: run python results/tables.py"


def test_every_table_stands_on_exactly_one_page_besides_the_overviews():
    pages = "".join(text for path, text in TEXTS.items() if path not in OVERVIEWS)
    assert sorted(re.findall(r"<!-- table (\S+) -->", pages)) == sorted(TABLES)


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
    for link in links(TEXTS[path]):
        assert link, f"{path.name}: a link to nothing"
        target, anchor = local_target(path, link)
        if target is not None:
            assert target.exists() and ROOT in [target, *target.parents], f"{path.name}: {link}"
        if anchor:
            assert anchor in headings(TEXTS[target]), f"{path.name}: {link}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_every_file_that_a_page_links_to_goes_with_the_repository():
    files = {local_target(path, link)[0] for path, text in TEXTS.items() for link in links(text)}
    names = sorted(str(file.relative_to(ROOT)) for file in files - {None} if file.is_file())
    asked = ["git", "check-ignore", "--no-index", *names]
    assert names and not subprocess.run(asked, cwd=ROOT, capture_output=True, text=True).stdout


def test_links_are_found_in_all_their_forms():
    page = """    [p](q.md)
[a](b.md#c) ![d](e.png "title") [f
g](h.md) <img src="i.png"> [j]: k.md `[l](m.md)`
[n]: o.md
"""
    assert links(page) == ["b.md#c", "e.png", "h.md", "i.png", "o.md"]
    assert headings("# A b\n## A b\n## C\n# A, b\n") == {"a-b", "a-b-1", "c", "a-b-2"}


def test_every_page_is_two_clicks_from_the_front_page():
    near = {ROOT / "README.md"}
    for _ in range(2):
        near |= {local_target(path, link)[0] for path in near & set(PAGES) for link in links(TEXTS[path])}
    assert set(PAGES) <= near


def test_every_page_that_the_code_names_exists():
    code = [path for folder in (".", "nanoosp", "tools", "data", "results/*") for path in ROOT.glob(f"{folder}/*.py")]
    named = {name for path in code
             for name in re.findall(r"\b((?:docs|results)/[\w/]*\.md)\b", path.read_text(encoding="utf-8"))}
    assert named and all((ROOT / name) in TEXTS for name in named)


def test_the_output_that_the_front_page_shows_was_printed():
    blocks = re.findall(r"(?ms)^```text\n(.*?)^```", TEXTS[ROOT / "README.md"])
    for log, shown in zip(("tiny-adam", "sample"), blocks, strict=True):
        printed = (ROOT / f"results/first_minute/{log}.txt").read_text().splitlines()
        assert set(shown.splitlines()) <= set(printed)


def test_every_figure_is_shown_on_a_page():
    shown = {local_target(path, link)[0] for path, text in TEXTS.items() for link in links(text)}
    assert set((ROOT / "results/figures").glob("*")) <= shown


def test_the_front_page_counts_the_lines_that_there_are():
    readme, lines = TEXTS[ROOT / "README.md"], {}
    for path in FIVE:
        lines[path.name] = len(path.read_text(encoding="utf-8").splitlines())
        said = re.search(rf"\({path.name}\) \| (\d+) \|", readme)
        assert abs(int(said[1]) - lines[path.name]) <= 15, lines
    said = int(re.search(r"([\d,]+) in five files", readme)[1].replace(",", ""))
    assert abs(said - sum(lines.values())) <= 40, lines


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
