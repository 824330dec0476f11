"""vLLM itself, on a CPU, beside transformers: what vllm_cpu.py says, in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import train_osp
from test_huggingface import from_transformers, greedy

from tools import export

ENV = Path(os.environ.get("VLLM_ENV", ""))
PROMPTS = [list(text.encode()) for text in ("abc def", "bad cafe a", "jig", "hide a bee")]
DIRECTORIES = {"plain": [], "rows": ["--bits", "4-16-16", "--method", "gptq"],
               "g128": ["--bits", "4-16-16", "--method", "quarot", "--w-group", "128"],
               "g32": ["--bits", "4-16-16", "--method", "rtn", "--w-group", "32"]}


@torch.no_grad()
def by_transformers(directory) -> list[dict]:
    theirs = from_transformers(directory)
    results = []
    for ids in PROMPTS:
        logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        known = logprobs[torch.arange(len(ids) - 1), ids[1:]]
        results.append(dict(ids=greedy(theirs, ids, 20), logprobs=known.tolist()))
    return results


def difference(a, b) -> float:
    """The largest between logarithms of probabilities."""
    return max((torch.tensor(x["logprobs"]) - torch.tensor(y["logprobs"])).abs().max().item() for x, y in zip(a, b))


@pytest.mark.skipif(not os.environ.get("VLLM_ENV"), reason="VLLM_ENV names no environment of vllm_cpu.py")
def test_vllm_writes_what_transformers_writes(dataset_dir, tmp_path):
    run = train_osp(tmp_path / "run", dataset_dir, n_layer=2, n_embd=128, seq_len=64, steps=60)
    for name, options in DIRECTORIES.items():
        export.main([str(run), "--hf", str(tmp_path / name), *options, "--device", "cpu"])
    cases = [("plain", "float32"), *((name, "float16") for name in DIRECTORIES)]  # int4 has no kernel in float32
    jobs = [dict(directory=str(tmp_path / name), dtype=dtype, prompts=PROMPTS) for name, dtype in cases]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_cpu.py")
    done = subprocess.run([ENV / "bin/python", script, tmp_path / "jobs.json", tmp_path / "results.json"],
                          capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CPUWNA16LinearKernel for CompressedTensorsWNA16" in done.stdout + done.stderr
    expected = {name: by_transformers(tmp_path / name) for name in DIRECTORIES}
    for (name, dtype), got in zip(cases, json.loads((tmp_path / "results.json").read_text())):
        ours = difference(got, expected[name])
        others = [difference(got, expected[other]) for other in DIRECTORIES if other != name]
        same = sum(a["ids"] == b["ids"] for a, b in zip(got, expected[name]))
        print(f"{name} {dtype}: {same} of {len(PROMPTS)} texts, largest difference {ours:.1e}, "
              f"to another directory {min(others):.1e}")
        assert ours < (1e-5 if dtype == "float32" else 3e-2) and ours < min(others) / 3
        assert same == len(PROMPTS) or dtype == "float16"  # in which the likeliest may be two
