"""Benchmarks: our answers to lm-eval against asking each question alone, and the paper's ten tasks."""

import json
import random
import shutil
import sys
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import tiktoken
import torch
from conftest import train_osp

pytest.importorskip("lm_eval")

from data.tokenizer import JsonTokenizer, json_from_encoding, tokenizer
from model import Config, Transformer
from quantize import Recipe, quantize
from tools import evaluate, export
from tools.harness import PAPER, Answers, find_tasks
from tools.loading import load
from tools.report import in_short, scores

BYTES = tokenizer("bytes")


@pytest.fixture(scope="module")
def merging():
    """An encoding that merges: " b", "ab", "abc", " blue", "..." and an end-of-text token, 267."""
    words = ["ab", "abc", " b", "bl", "ue", " blue", "blue", "..", "...", " a", "  "]
    ranks = {bytes([i]): i for i in range(256)} | {w.encode(): 256 + i for i, w in enumerate(words)}
    pattern = r" ?\w+|[^\w\s]+|\s+(?!\S)|\s+"
    return tiktoken.Encoding("merging", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 267})


@pytest.fixture(scope="module")
def model():
    """Random and small, with all that OSP adds. In fp64 sums do not depend on a batch's shape."""
    torch.manual_seed(0)
    config = Config(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=320, norm="ss", embproj=True)
    model = Transformer(config).double().eval().requires_grad_(False)
    model.head.weight.mul_(20)  # far from even
    return model


def answers(model, encoding=BYTES, seq_len=48, batch_size=2, end_ids=(0,)):
    return Answers(SimpleNamespace(encoding=encoding, end_ids=end_ids), model, seq_len, batch_size)


def requests(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def write_after(model, *prompts, encoding=BYTES, until=(), n=8, follow=None, **how):
    """What the model writes; or, with `follow`, one that continues each letter of it (all different) with the next."""
    ours, logits = answers(model, encoding, **how), torch.zeros(320, 320)
    if follow:
        logits[list(follow[:-1].encode()), list(follow[1:].encode())] = 20
        logits[:, 300] = 30  # an id without a token
        ours.logits = lambda tokens, places, cache: logits[tokens[:, -1]]
    return ours.generate_until(requests(*((prompt, dict(until=list(until), max_gen_toks=n)) for prompt in prompts)))


def alone(model, encoding, context, choice, seq_len):
    """(log p of a choice, whether it is the likeliest), by the rules, without batches or padding."""
    while context and context[-1].isspace():
        context, choice = context[:-1], context[-1] + choice
    whole, n = encoding.encode_ordinary(context + choice), len(encoding.encode_ordinary(context))
    if n >= len(whole):
        n = len(whole) - 1
    before, after = whole[:n], whole[n:]
    if not before:
        before = [0 if encoding.name == "bytes" else encoding.eot_token]
    ids = (before + after)[-(seq_len + 1) :]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([ids[:-1]]))[0].float(), dim=-1)
    places = range(len(ids) - len(after), len(ids))
    likeliest = all(int(log_p[t - 1].argmax()) == ids[t] for t in places)
    return sum(log_p[t - 1, ids[t]].item() for t in places), likeliest


# Likelihood


@pytest.mark.parametrize("seq_len", [12, 48])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_scores_as_each_choice_alone(model, merging, seq_len, batch_size):
    """Quantized too: every token is rounded by itself."""
    quantized = quantize(model, Recipe("4-4-4", "had"))
    rng = random.Random(0)
    pieces = ["ab", "c", "abc", " ", "  ", " blue", "...", "..", "\n", "x", ":", " b", "é"]
    pairs = [tuple("".join(rng.choices(pieces, k=rng.randint(*size))) for size in ((0, 12), (1, 2))) for _ in range(60)]
    for model, encoding in ((model, merging), (model, BYTES), (quantized, BYTES)):
        want = [alone(model, encoding, *pair, seq_len) for pair in pairs]
        got = answers(model, encoding, seq_len, batch_size).loglikelihood(requests(*pairs))
        assert [log_p for log_p, _ in got] == pytest.approx([log_p for log_p, _ in want], abs=1e-4)
        assert [likeliest for _, likeliest in got] == [likeliest for _, likeliest in want]
    assert not model.at_head._forward_hooks


def test_every_context_begins_as_the_tokenizer_says():
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer.from_str(json_from_encoding(BYTES))
    library.add_special_tokens(["<s>", "</s>"])
    bos = library.token_to_id("<s>")
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    ours = answers(None, JsonTokenizer(library.to_str()))
    for context, choice in (("a b", " c d"), ("a  ", "b"), ("", "ab")):
        ids, n = ours.encode_pair(context, choice)
        assert ids == library.encode(context + choice).ids and ids[0] == bos == ours.first
        assert n == len(ids) - len(library.encode(context.rstrip()).ids)


def test_what_cannot_be_asked_or_answered_is_said(model):
    with pytest.raises(ValueError, match="a choice of 49 tokens, where 1 to 48 fit"):
        answers(model).loglikelihood(requests(("q", "b" * 49)))
    cut = answers(model, seq_len=8)
    cut.loglikelihood(requests(("x" * 8, "y"), ("x" * 7, "y"), ("x" * 8, "yz")))
    cut.generate_until(requests(("x" * 8, dict(max_gen_toks=2)), ("x" * 6, dict(max_gen_toks=2))))
    assert cut.cut == 2 and "2 texts cut at the left" in in_short(dict(cut=cut.cut))
    broken = deepcopy(model)
    broken.head.weight[0].fill_(float("nan"))
    for ask in (answers(broken).loglikelihood, answers(broken).generate_until):
        with pytest.raises(ArithmeticError, match="not finite"):
            ask(requests(("q", "a") if "likelihood" in ask.__name__ else ("q", {})))


# Generation


def test_the_model_continues_each_prompt_as_it_would_alone(model):
    texts, seen = ["abc", "x", "xyz", "long prompt", "cba"], []
    watched = model.at_embed.register_forward_hook(lambda m, i, x: seen.append(tuple(x.shape[:2])))
    got = write_after(model, *texts, n=6)
    watched.remove()
    for prompt, text in zip(texts, got):
        ids = list(prompt.encode())
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1, :256].argmax()))
        want = ids[len(prompt) :]
        want = want[: want.index(0)] if 0 in want else want
        assert text == BYTES.decode(want)
    assert len(set(got)) > 1 and (3, 3) in seen and (3, 1) in seen  # equal lengths together, then a token at a time


def test_writing_stops_at_a_stop_string_an_end_or_the_limit_and_writes_no_id_without_a_token(model, merging):
    write = partial(write_after, model, follow="abcdefghij")
    assert write("a", until=["ef"]) == ["bcd"] and write("a", until=["gh", "d"]) == ["bc"]
    assert write("a", "c", n=3) == ["bcd", "def"] and write("a", seq_len=4) == ["bcd"]
    assert write("a", end_ids=[ord("f")]) == ["bcde"] and write("a", encoding=merging, n=3) == ["bcd"]


# The paper's ten tasks: made-up rows in the layout of each dataset, and what is asked of the model


def choices(*texts, labels="ABCDE"):
    return {"text": list(texts), "label": list(labels[: len(texts)])}


ROWS = {
    "arc_easy": dict(id="x1", question="What melts?", choices=choices("ice", "rock", "fog"), answerKey="A"),
    "arc_challenge": dict(id="x2", question="What falls?", choices=choices("up", "rain", labels="1234"), answerKey="2"),
    "commonsense_qa": dict(id="c", question="Where do hats hang?", question_concept="hat", answerKey="E",
                           choices=choices("sea", "sky", "pan", "sock", "hook")),
    "gsm8k": dict(question="Two bags of 617 nuts?", answer="2 * 617 = <<2*617=1234>>1234\n#### 1,234"),
    "hellaswag": dict(ind=4, activity_label="Baking", ctx_a="A cook [substeps] opens a door.", ctx_b="the Oven",
                      ctx="unused", endings=["[header] is hot [title] Fine", "is  cold"], label="1", split_type="z"),
    "mmlu": dict(question="Which is odd?", subject="small_number_theory", choices=["2", "3", "4", "6"], answer=1),
    "openbook_qa": dict(id="7-1", question_stem="Frost comes from", choices=choices("fire", "cold", "jam", "wool"),
                        answerKey=" B "),
    "piqa": dict(goal="Open a jar", sol1="turn the lid", sol2="paint the lid", label=0),
    "siqa": dict(context="Kim lent Bo a pen.", question="What will Bo do?", answerA="write", answerB="swim",
                 answerC="fly", label="3"),
    "trivia_qa": dict(question="Who drew the map?", question_id="q", answer=dict(
        value="New York", aliases=["New York City", "N.Y.", "New York"], type="x")),
    "winogrande": dict(sentence="The cup missed the box because the _ was too small. ", option1="cup", option2="box",
                       answer="2"),
}
GSM8K = "Question: Two bags of 617 nuts?\nAnswer:"
TRIVIA = "Question: Who drew the map?\nAnswer:"
ASKED = {  # context, choices after it or the shots before it, the right one or ones
    "arc_easy": ("Question: What melts?\nAnswer:", [" ice", " rock", " fog"], 0),
    "arc_challenge": ("Question: What falls?\nAnswer:", [" up", " rain"], 1),
    "commonsense_qa": ("Where do hats hang?", [" sea", " sky", " pan", " sock", " hook"], 4),
    "gsm8k": (8 * f"{GSM8K} {ROWS['gsm8k']['answer']}\n\n" + GSM8K, [], "1,234"),
    "hellaswag": ("Baking: A cook opens a door. The oven ", ["  is hot. Fine", " is cold"], 1),
    "mmlu": ("The following are questions about small number theory.\nQuestion: Which is odd?\nAnswer:",
             [" 2", " 3", " 4", " 6"], 1),
    "openbook_qa": ("Frost comes from", [" fire", " cold", " jam", " wool"], 1),
    "piqa": ("Question: Open a jar\nAnswer:", [" turn the lid", " paint the lid"], 0),
    "siqa": ("Kim lent Bo a pen. What will Bo do?", [" write", " swim", " fly"], 2),
    "trivia_qa": (5 * f"{TRIVIA}ny\n\n" + TRIVIA, [], ["ny", "new york"]),
    "winogrande": ("The cup missed the box because the ", ["cup was too small.", "box was too small."], 1),
}
TEST = ("arc_easy", "arc_challenge", "gsm8k", "mmlu")


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The paper's tasks with nine rows each beside them."""
    folder = shutil.copytree(PAPER, tmp_path_factory.mktemp("tasks") / "osp", ignore=shutil.ignore_patterns("*.jsonl"))
    for name, row in ROWS.items():
        write(folder / f"osp_{name}_{'test' if name in TEST else 'validation'}.jsonl", *[row] * 3)
        write(folder / f"osp_{name}_train.jsonl", *[row] * 9)
    return folder


@pytest.fixture(scope="module")
def tasks(folder):
    return find_tasks([str(folder)])


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_dataset_becomes_a_question(tasks, name):
    context, wanted, right = ASKED[name]
    task = tasks["tasks"][f"osp_{name}"]
    task.build_all_requests(limit=1)
    asked = [request.args for request in task.instances]
    assert {ask[0] for ask in asked} == {context} and [ask[1] for ask in asked if wanted] == wanted
    assert task.doc_to_target(task.task_docs[0]) == right
    assert wanted or asked[0][1]["until"] == ["Question:", "Question"]
    assert wanted or asked[0][1]["max_gen_toks"] == dict(gsm8k=256, trivia_qa=20)[name]


@pytest.mark.parametrize("name, texts", [
    ("gsm8k", {" #### 1234": 1, "x\n#### 1,234 #### 5": 1, "#### 1234.": 0, "1234": 0, "#### 5": 0, "": 0}),
    ("trivia_qa", {" New York\n\n": 1, "n.y.": 1, "N Y": 0, "New York City": 0, "New York, NY": 0, "": 0}),
])
def test_written_answers_are_judged_by_the_papers_rules(tasks, name, texts):
    for text, right in texts.items():
        task = tasks["tasks"][f"osp_{name}"]
        task.build_all_requests(limit=1)
        task.instances[0].resps = [text]
        task.apply_filters()
        (judged,) = task.instances[0].filtered_resps.values()
        assert task.process_results(task.task_docs[0], [judged])["exact_match"] == right, text


def test_each_question_gets_shots_of_its_own_in_lightevals_order(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    write(own / "osp_trivia_qa_train.jsonl", *[ROWS["trivia_qa"] | dict(question=f"shot {i}?") for i in range(30)])
    write(own / "osp_trivia_qa_validation.jsonl", *[ROWS["trivia_qa"] | dict(question=f"q {i}?") for i in range(9)])
    task = find_tasks([str(own)])["tasks"]["osp_trivia_qa"]
    rng, order, want = random.Random(42), list(range(9)), {}
    rng.shuffle(order)
    for i in order:
        drawn = rng.sample(range(30), 5)
        want[i] = "".join(f"Question: shot {k}?\nAnswer:ny\n\n" for k in drawn) + f"Question: q {i}?\nAnswer:"
    assert [task.doc_to_text(doc) for doc in task.task_docs] == [want[i] for i in range(9)]


@pytest.mark.parametrize("name, row, words", [
    ("piqa", ROWS["piqa"] | dict(label=-1), "'-1' is none of its 2 choices"),
    ("winogrande", ROWS["winogrande"] | dict(answer="3"), "2 is none of its 2 choices"),
    ("mmlu", ROWS["mmlu"] | dict(answer=4), "4 is none of its 4 choices"),
    ("hellaswag", ROWS["hellaswag"] | dict(label=""), "'' is none of its 2 choices"),
    ("arc_easy", ROWS["arc_easy"] | dict(answerKey=""), "does not fit"),
    ("commonsense_qa", ROWS["piqa"], "'choices' is undefined"),
    ("gsm8k", ROWS["gsm8k"] | dict(answer="no number"), "does not fit"),
    ("trivia_qa", ROWS["trivia_qa"] | dict(answer=dict(aliases=[])), "does not fit"),
    ("piqa", "{broken", "does not fit: JSONDecodeError"),
])
def test_a_row_without_a_right_answer_is_named_before_any_model_is_asked(folder, tmp_path, name, row, words):
    file = tmp_path / f"osp_{name}_{'test' if name in TEST else 'validation'}.jsonl"
    for part in ("_choices_yaml", "_written_yaml", "osp.py", f"osp_{name}.yaml", f"osp_{name}_train.jsonl"):
        shutil.copy(folder / part, tmp_path / part)
    write(file, ROWS[name], row)
    with pytest.raises(ValueError) as error:
        find_tasks([str(tmp_path)])
    assert f"{file}, line 2: " in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_without_local_rows_the_hub_is_asked_for_the_split_and_the_training_split(folder, tmp_path, monkeypatch):
    hub, parquet, asked = pytest.importorskip("huggingface_hub"), pytest.importorskip("pyarrow.parquet"), []
    import pyarrow

    def download(dataset, name, repo_type, revision):
        asked.append((dataset, name, repo_type, revision))
        parquet.write_table(pyarrow.Table.from_pylist([ROWS["trivia_qa"]] * 6), tmp_path / "fetched.parquet")
        return str(tmp_path / "fetched.parquet")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    for part in ("_written_yaml", "osp.py", "osp_trivia_qa.yaml"):
        shutil.copy(folder / part, tmp_path / part)
    task = find_tasks([str(tmp_path)])["tasks"]["osp_trivia_qa"]
    names = [f"rc.nocontext/{split}/0000.parquet" for split in ("validation", "train")]
    assert asked == [("mandarjoshi/trivia_qa", name, "dataset", "refs/convert/parquet") for name in names]
    assert len(task.task_docs) == 6 and task.doc_to_text(task.task_docs[0]) == ASKED["trivia_qa"][0]


# eval.py


@pytest.fixture(scope="module")
def run(dataset_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "osp"
    return train_osp(out, dataset_dir, n_layer=2, n_embd=64, seq_len=256, steps=5)


@pytest.fixture
def own(tmp_path):
    """Two tasks of one's own, in lm-eval's YAML over local JSON lines."""
    folder = tmp_path / "own"
    folder.mkdir()
    write(folder / "mc.jsonl", *[dict(context=f"q {i}", choices=["one", "two", "three"], gold=i % 3) for i in range(9)])
    write(folder / "pages.jsonl", *[dict(page="some words of text " * n) for n in (3, 40)])
    data = dict(dataset_path="json", test_split="test")
    for name, more in (
        ("mc", dict(output_type="multiple_choice", doc_to_text="context", doc_to_choice="choices", doc_to_target="gold")),
        ("pages", dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="page",
                       metric_list=[dict(metric="word_perplexity", aggregation="weighted_perplexity",
                                         higher_is_better=False)]))):
        source = dict(data_files=dict(test=str(folder / f"{name}.jsonl")), cache_dir=str(tmp_path / "cache"))
        write(folder / f"{name}.yaml", dict(task=name, dataset_kwargs=source, **data, **more))  # JSON is YAML
    return folder


def test_eval_scores_a_run_beside_its_quantized_models(run, folder, tasks, capsys):
    command = [str(run), "--tasks", str(folder), "--device", "cpu", "--bits", "4-4-4", "--methods", "rtn,had"]
    evaluate.main([*command, "--json"])
    row = json.loads(capsys.readouterr().out)[0]
    assert "val_loss" not in row and row["cut"] > 0  # eight shots of GSM8K
    benchmarks = row["benchmarks"]
    assert list(benchmarks)[0] == "ARC" and len(benchmarks) == 10 and len(row["tasks"]) == 13
    shares = [share for _, share, _ in benchmarks.values()]
    assert row["average"][1] == pytest.approx(sum(shares) / 10) and 0 < row["average"][1] < 1
    assert benchmarks["ARC"][1] == sum(row["tasks"][f"osp_arc_{part}"]["acc_norm,none"] for part in ("easy", "challenge")) / 2
    for method in ("rtn", "had"):
        assert list(row["quantized"]["4-4-4"][method]["benchmarks"]) == list(benchmarks)


def test_eval_prints_a_line_a_benchmark_and_a_column_a_model(run, own, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("some words of text " * 100)
    command = [str(run), "--tasks", str(own), "--device", "cpu", "--text", str(tmp_path / "t.txt")]
    evaluate.main([*command, "--bits", "4-4-4,8-8-16", "--methods", "rtn"])
    *_, head, mc, pages, average = capsys.readouterr().out.strip().splitlines()
    assert head.split() == "benchmarks, % osp osp 4-4-4 rtn osp 8-8-16 rtn".split()
    assert mc.split()[:4] == ["mc", "33.3", "±", "16.7"] and average.split()[:4] == ["average", "33.3", "±", "16.7"]
    assert pages.split()[0] == "pages" and len(pages.split()) == 4 and float(pages.split()[1]) > 1


def test_results_without_a_standard_error_or_a_share_have_no_average_of_it():
    results = {"a": {"alias": "A", "acc,none": 0.5, "acc_stderr,none": "N/A"}, "g": {"alias": "g"},
               "w": {"alias": "W", "word_perplexity,none": 30.0, "word_perplexity_stderr,none": "N/A"}}
    row = scores(results, {"g": ["a"]})
    assert row["benchmarks"]["W"][:2] == ("word_perplexity", 30.0) and row["average"][1] == 0.5
    assert in_short(row) == "average score 50.0" and "average" not in in_short(scores({"w": results["w"]}, {}))


def test_eval_says_what_is_wrong_in_one_line(run, own, capsys, monkeypatch):
    def fails(argv, code):
        with pytest.raises(SystemExit) as error:
            evaluate.main([str(a) for a in argv])
        assert (error.value.code == 2) == (code == 2)
        message = (capsys.readouterr().err if code == 2 else error.value.code).strip()
        assert "\n" not in message and message.startswith("error: ")
        return message

    assert "--plot" in fails([run, "--tasks", own, "--plot", own], 2)
    assert "--tasks" in fails([run, "--tasks", own, "--prompt", "x"], 2)
    (own / "mc.jsonl").write_text("{broken")
    assert f"--tasks {own}: " in fails([run, "--tasks", own], 1)
    monkeypatch.delitem(sys.modules, "tools.harness")
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert "--tasks needs lm_eval: pip install -r requirements-extra.txt" in fails([run, "--tasks", "osp"], 1)


def test_transformers_scores_the_exported_model_alike(run, folder, own, tmp_path):
    """lm_eval --model hf, on what quantize.py --hf wrote. Pages are scored in windows, too."""
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    export.main([str(run), "--hf", str(tmp_path / "hf"), "--device", "cpu"])
    theirs = HFLM(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32),
                  tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), max_length=256, device="cpu")
    loaded = load(run)
    ours = Answers(loaded, loaded.model, 256, 4)
    found = find_tasks([str(folder), str(own)])["tasks"]
    for name in ("osp_hellaswag", "osp_winogrande", "pages"):
        found[name].build_all_requests(limit=2)
        kind = "loglikelihood_rolling" if name == "pages" else "loglikelihood"
        a, b = [torch.tensor(getattr(lm, kind)(found[name].instances), dtype=torch.float64) for lm in (ours, theirs)]
        assert torch.allclose(a, b, rtol=1e-4), name
    found["osp_trivia_qa"].build_all_requests(limit=1)
    assert ours.generate_until(found["osp_trivia_qa"].instances) == theirs.generate_until(found["osp_trivia_qa"].instances)
