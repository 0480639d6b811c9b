"""Runs in lighteval's environment, which has no smolconv: ``lighteval_child.py ASKED.json``; it writes the results.

Written for lighteval 0.13.0. Comments mark what is specific to that version.
"""

import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# lighteval imports a package named evaluate; a module of that name next to this script must not shadow it.
if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]


def _plain_config(name: str, task: dict[str, Any]) -> Any:
    """A task of lighteval's for a JSONL of questions, choices and the right choice's number."""
    from lighteval.metrics.metrics import Metrics
    from lighteval.tasks.lighteval_task import LightevalTaskConfig
    from lighteval.tasks.requests import Doc

    def prompt(line: dict[str, Any], task_name: str) -> Any:
        choices = [f" {choice}" for choice in line[task["choices"]]]
        return Doc(task_name=task_name, query=line[task["text"]], choices=choices, gold_index=line[task["target"]])

    return LightevalTaskConfig(
        name=name, prompt_function=prompt, hf_repo=task["folder"], hf_subset="default",
        hf_avail_splits=["test"], evaluation_splits=["test"], metrics=[Metrics.loglikelihood_acc],
    )  # fmt: skip


def _registered(asked: dict[str, Any]) -> ModuleType:
    """Our tasks as a module; if all tasks are ours, without lighteval's, whose import downloads a pickle."""
    from lighteval.tasks.registry import Registry

    if len(asked["plain"]) == len(asked["tasks"]):
        Registry._load_from_files = staticmethod(lambda files, module_prefix: {})
        Registry._load_from_subdirs = staticmethod(lambda subdirs: {})
    module = ModuleType("smolconv_tasks")
    module.TASKS_TABLE = [  # type: ignore[attr-defined]
        _plain_config(name, task) for name, task in asked["plain"].items()
    ]
    return module


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numeric entries of a mapping."""
    kept = {}
    for name, value in values.items():
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, (bool, int, float)) and math.isfinite(value):
            kept[str(name)] = float(value)
    return kept


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.models.transformers.transformers_model import TransformersModelConfig
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    module = _registered(asked)
    run = Pipeline(
        tasks=",".join(name if "|" in name else f"{name}|0" for name in asked["tasks"]),
        pipeline_parameters=PipelineParameters(
            launcher_type=ParallelismManager.NONE, custom_tasks_directory=module, max_samples=asked["limit"]
        ),
        evaluation_tracker=EvaluationTracker(output_dir=asked["work"], save_details=False),
        # By default it applies a chat template if the tokenizer has one, which lowers the scores of base models.
        model_config=TransformersModelConfig(
            model_name=asked["model"], dtype=asked["dtype"], batch_size=asked["batch_size"], device=asked["device"],
            override_chat_template=False,
        ),
    )  # fmt: skip
    run.evaluate()
    results = run.get_results()["results"]
    found = {}
    for full, details in run.get_details().items():
        name = full.rpartition("|")[0] if full.endswith("|0") else full
        values = _numbers(results[full.replace("|", ":")])  # results and details spell names in two ways
        by_sample: dict[str, dict[str, float]] = {}
        for number, detail in enumerate(details):
            for metric, value in _numbers(detail.metric).items():
                by_sample.setdefault(metric, {})[str(number)] = value
        found[name] = {
            "metrics": {metric: value for metric, value in values.items() if not metric.endswith("_stderr")},
            "stderr": {
                metric.removesuffix("_stderr"): value for metric, value in values.items() if metric.endswith("_stderr")
            },
            "samples": len(details),
            "by_sample": by_sample,
            "higher_is_better": dict.fromkeys(by_sample, True),
        }
    Path(asked["answer"]).write_text(json.dumps({"tasks": found}), encoding="utf-8")


if __name__ == "__main__":
    main()
