"""The paper's ten benchmarks: what its harness, lighteval 0.9.2, does and YAML cannot say."""

import json
import random
import string
from pathlib import Path

from datasets import Dataset
from huggingface_hub import hf_hub_download
from lm_eval.api.task import ConfigurableTask
from pyarrow.parquet import read_table


class Questions(ConfigurableTask):
    """A task whose rows stand in TASK_SPLIT.jsonl beside its YAML, or else on the hub. All are
    checked before any model is asked: a ValueError says which row does not fit."""

    def __init__(self, config):
        del config["class"]
        super().__init__(config=config)

    def download(self, dataset_kwargs=None):
        self.prompt = None  # lm-eval sets it later, but reads it to fill in the YAML
        docs = self.checked(self.config.test_split)
        if n := self.config.metadata.get("shots"):
            solved = [doc["solved"] for doc in self.checked("train")]
            rng, order = random.Random(42), docs.copy()
            rng.shuffle(order)  # as lighteval does, before it draws shots for each question
            for doc in order:
                doc["shots"] = "".join(rng.sample(solved, n))
        self.dataset = {self.config.test_split: Dataset.from_list(docs)}

    def checked(self, split):
        folder, docs = Path(self.config.metadata["config_source"]).parent, []
        file = folder / f"{self.config.task}_{split}.jsonl"
        if file.exists():
            rows = file.read_bytes().splitlines()
        else:  # the hub has a copy of every dataset in this form
            file = f"{self.config.dataset_name}/{split}/0000.parquet"
            form = dict(repo_type="dataset", revision="refs/convert/parquet")
            rows = read_table(hf_hub_download(self.config.dataset_path, file, **form)).to_pylist()
        for i, row in enumerate(rows, 1):
            try:
                doc = (json.loads(row) if isinstance(row, bytes) else row) | {"shots": ""}
                self.features = list(doc)
                answer, text = self.doc_to_target(doc), self.doc_to_text(doc)
                if self.OUTPUT_TYPE == "multiple_choice":
                    n = len(self.doc_to_choice(doc))
                    if answer not in range(n):
                        raise ValueError(f"{answer!r} is none of its {n} choices, 0 to {n - 1}")
                else:
                    shown = self.doc_to_target(doc, self.fewshot_cfg.doc_to_target)
                    shown = shown if isinstance(shown, str) else shown[0]
                    doc["solved"] = f"{text}{self.config.target_delimiter}{shown}\n\n"
                docs.append(doc)
            except Exception as error:  # templates raise many kinds
                raise ValueError(f"{file}, line {i}: the row does not fit: {error!r}") from error
        if not docs:
            raise ValueError(f"{file} has no questions")
        return docs


def aliases(doc):
    """The accepted answers. One that begins with another one is dropped, as lighteval does."""
    kept = []
    for alias in sorted(doc["answer"]["aliases"]):
        if not kept or not alias.startswith(kept[-1]):
            kept.append(alias)
    drop = str.maketrans("", "", string.punctuation)
    return [alias.lower().translate(drop) for alias in kept]
