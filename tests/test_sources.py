"""Every place in our sources where a file could bring code along is known, and has a reason to be harmless."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("smolconv", "commands", "continual_pretraining", "benchmarks")
#: What reads a file, or runs a text, in a way that may execute what is in it: the end of a dotted name.
_READS = re.compile(
    r"(^|\.)(torch\.load|torch\.serialization\.load|jit\.load|load_state_dict_from_url|torch\.hub\.\w+|add_safe_globals"
    r"|pickle\.(load|loads|Unpickler)|_?Unpickler|np\.load|numpy\.load|np\.fromregex|yaml\.\w*load\w*|\w*Loader"
    r"|read_pickle|from_pretrained|pipeline|load_checkpoint|load_weights|trust_remote_code|eval|exec|compile"
    r"|runpy\.\w+|run_module|run_path|import_module|__import__|spec_from_file_location|exec_module|os\.system|os\.popen)$"
)
#: Modules whose import alone has to be accounted for.
_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "imp", "code", "codeop"}
#: (file, what is named there): why nothing of a checkpoint's, a recipe's or a data file's is executed.
ACCOUNTED = {
    **{
        ("smolconv/models/registry.py", name): "our own modules, by the names in a tuple beside it"
        for name in ("import_module", "importlib.import_module")
    },
    ("smolconv/__init__.py", "importlib.import_module"): "modules of our own, by __all__",
    ("smolconv/storage/torch_archive/legacy.py", "import pickle"): "the number of an instruction",
    ("smolconv/storage/torch_archive/pickle.py", "import pickle"): "the numbers of its instructions; it writes",
    ("smolconv/storage/torch_archive/unpickle.py", "import pickle"): "the numbers of its instructions",
    ("smolconv/storage/torch_archive/unpickle.py", "_Unpickler"): "our own, of an allow-list; it imports nothing",
    (
        "smolconv/verification/hf.py",
        "torch.load",
    ): "weights_only=True, after our reader has read all of it",
    (
        "smolconv/verification/hf.py",
        "transformers.AutoConfig.from_pretrained",
    ): "trust_remote_code=False, a local folder",
    (
        "continual_pretraining/evaluation/models.py",
        "transformers.AutoTokenizer.from_pretrained",
    ): "trust_remote_code=False, copies of its files",
    ("smolconv/verification/inputs.py", "np.load"): "allow_pickle=False",
    ("smolconv/verification/engines/start.py", "np.load"): "allow_pickle=False; what a process of ours wrote",
    ("smolconv/verification/engines/deepspeed.py", "np.load"): "allow_pickle=False; what a process of ours wrote",
    ("smolconv/verification/engines/nanotron.py", "np.load"): "allow_pickle=False; what a process of ours wrote",
    (
        "smolconv/verification/engines/deepspeed.py",
        "engine.load_checkpoint",
    ): "by our CheckpointEngine, never universal",
    ("smolconv/verification/engines/nanotron.py", "nanotron.serialize.load_weights"): "reads safetensors and JSON",
    ("continual_pretraining/run/trainer.py", "self.engine.load_checkpoint"): "by our CheckpointEngine, never universal",
    ("smolconv/parsing.py", "yaml.load"): "by the safe loader",
    ("smolconv/layouts/gguf/reader.py", "importlib.import_module"): "a name of our own: gguf, tokenizers",
    ("continual_pretraining/launchers/registry.py", "importlib.import_module"): "our own, by the recipe's Literal",
    ("continual_pretraining/watch/plot.py", "importlib.import_module"): "a name of our own: cairosvg",
    ("smolconv/bootstrap/run_module.py", "import runpy"): "runs a module of ours by its name",
    ("smolconv/bootstrap/run_module.py", "runpy.run_module"): "runs a module of ours by its name",
    ("continual_pretraining/recipe/files.py", "_Loader"): "a safe loader of our own",
    ("continual_pretraining/recipe/files.py", "yaml.SafeLoader"): "it makes plain values",
    ("smolconv/parsing.py", "yaml.SafeLoader"): "it makes plain values",
    ("continual_pretraining/recipe/schema.py", "compile"): "a field of the recipe",
    ("continual_pretraining/run/trainer.py", "recipe.model.compile"): "a field of the recipe, true or false",
    ("benchmarks/demo.py", "AutoModelForCausalLM.from_pretrained"): "the demonstration's own model",
    ("benchmarks/resume_check.py", "torch.load"): "weights_only=True; what the benchmark wrote",
    ("benchmarks/train_peers.py", "AutoModelForCausalLM.from_pretrained"): "the benchmark's own model",
    ("benchmarks/demo.py", "AutoTokenizer.from_pretrained"): "the demonstration's own tokenizer",
}
#: Keywords without which the call is another.
NEEDED = {
    "torch.load": ("weights_only", "True"),
    "np.load": ("allow_pickle", "False"),
    "transformers.AutoConfig.from_pretrained": ("trust_remote_code", "False"),
    "transformers.AutoTokenizer.from_pretrained": ("trust_remote_code", "False"),
}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def named(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What the source names: calls and references by their dotted names, and imports."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in _MODULES:
                    yield f"import {alias.name}", node
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            if (node.module or "").split(".")[0] in _MODULES:
                yield f"import {node.module}", node
            yield from ((name, node) for name in whole if _READS.search(name))
        elif isinstance(node, (ast.Name, ast.Attribute)) and id(node) not in inner and _READS.search(dotted(node)):
            yield dotted(node), node


def found() -> dict[tuple[str, str], list[int]]:
    places: dict[tuple[str, str], list[int]] = {}
    for path in sources():
        for name, node in named(parsed(path)):
            key = (str(path.relative_to(ROOT)), name)
            places.setdefault(key, []).append(getattr(node, "lineno", 0))
    return places


#: Names that look alike, and read nothing.
HARMLESS = re.compile(
    r"^(re\.compile|torch\.compile|[\w.]*\.eval|layer\.compile|model\.compile|archive\.read_pickle|\.read_pickle)$"
)


def test_every_place_that_could_execute_a_file_is_accounted_for():
    places = {key: lines for key, lines in found().items() if not HARMLESS.match(key[1])}
    new = {f"{file}:{lines} {name}" for (file, name), lines in places.items() if (file, name) not in ACCOUNTED}
    assert not new, "say in ACCOUNTED why nothing that comes from outside is executed there, or read it otherwise"
    assert not set(ACCOUNTED) - set(places), "these are gone: take them out of ACCOUNTED"


@pytest.mark.parametrize("name", NEEDED)
def test_the_keywords_that_make_a_call_safe_are_there(name):
    keyword, value = NEEDED[name]
    calls = [
        (path, node)
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and dotted(node.func) == name
    ]
    assert calls
    for path, node in calls:
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        assert given.get(keyword) == value, f"{path}:{node.lineno}"


def test_no_engine_of_ours_asks_for_a_universal_checkpoint_or_another_checkpoint_engine():
    """DeepSpeed's universal loading, Nebula and its parallel writers read files past our CheckpointEngine."""
    keys = (
        "load_universal",
        "nebula",
        "datastates",
        "nvme",
        "init_inference",
        "zero_to_fp32",
        "load_universal_checkpoint",
    )
    named_keys = [
        (path.name, node.value)
        for path in sources()
        if path.parts[-2] != "benchmarks" and "layouts" not in path.parts
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Constant) and node.value in keys
    ]
    assert named_keys == []


def test_deepspeed_is_changed_in_one_module_alone():
    changed = {
        path.name
        for path in sources()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Assign) and path.parts[-2] != "benchmarks"
        for target in node.targets
        if re.match(r"(self\.)?engine\.|deepspeed\.", ast.unparse(target))
    }
    assert changed == {"patches.py"}


def test_no_process_of_ours_is_started_by_python_m_or_c_in_the_users_folder():
    """``sys.executable`` begins the words of ``smolconv.processes``, and of a script that lies in a folder of its own."""
    allowed = {
        "smolconv/processes.py": "the bootstrap",
        "continual_pretraining/evaluation/lighteval_engine.py": "works in the bootstrap's empty folder",
        "smolconv/doctor.py": "works in the bootstrap's empty folder",
        "continual_pretraining/tokens/tokenize.py": "only the folder that it lies in, for PATH",
    }
    places = {
        str(path.relative_to(ROOT))
        for path in sources()
        if path.parts[len(ROOT.parts)] != "benchmarks"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and dotted(node) == "sys.executable"
    }
    assert places == set(allowed)


def test_every_test_that_the_security_page_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))
    assert len(named) > 25
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{test}"
