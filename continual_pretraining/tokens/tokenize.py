"""Text becomes token files: datatrove does the work, on this machine or as a Slurm job array.

What is added to datatrove: nothing is left to its default of documents without EOS, input that cannot be read is an
error instead of a line in a log, and the folder gets its name only when every task is done.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smolconv.errors import BadCheckpoint, CorruptFile, MachineError, MissingFile, NotInstalled, UsageError, some_of
from smolconv.processes import safe_children, usable_cores
from smolconv.storage.atomic import JOURNAL, OutputFolder, refuse_existing, refuse_nested, sync_file

#: What each kind of input needs besides datatrove and tokenizers, which datatrove does not declare itself.
KINDS = {"jsonl": ("orjson",), "parquet": ("pyarrow",), "txt": ()}
_SUFFIX = re.compile(r"\.(jsonl|parquet|txt)(\.gz|\.zst)?$")
#: Ends of documents in the pretraining data of SmolLM2 and of SmolLM3 (Llama 3's tokenizer). Their instruct
#: tokenizers name another token as eos, the end of a chat turn.
PRETRAINING_ENDS = ("<|endoftext|>", "<|end_of_text|>")
#: Input of a task unless --tasks is given: a function of the input alone, so that every machine writes the same files.
TASK_BYTES = 100_000_000
DOCUMENTS_PER_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """How text is read and token files are written."""

    tokenizer: str  #: folder, tokenizer.json, or owner/name on the Hub
    eos: str | None = None  #: a token; None: the tokenizer's own
    no_eos: bool = False
    text_key: str = "text"
    separator: str | None = None  #: divides a .txt file into documents; None: a file is a document
    shuffle_seed: int | None = 0  #: None: documents stay in order
    max_tokens_per_file: int | None = None
    tasks: int | None = None  #: None: one per 100 MB of input, at most one per file


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """The job array's own lines."""

    partition: str
    time: str = "24:00:00"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 2
    qos: str | None = None
    account: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizePlan:
    """Everything that decides which bytes are written."""

    inputs: tuple[Path, ...]  #: files, in the order in which tasks share them out
    input_bytes: int
    target: Path
    tokenizer: Path
    vocab_size: int  #: with added tokens
    token_bytes: int  #: 2 for at most 65536 entries, else 4
    eos_token: str | None
    eos_token_id: int | None
    eos_from: str  #: who chose it, for people
    tasks: int
    options: TokenizeOptions

    @property
    def logs(self) -> Path:
        """datatrove's logs, statistics and list of finished tasks; removed after success on this machine."""
        return self.target.with_name(self.target.name + ".logs")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), default=str, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "inputs": [str(path) for path in self.inputs],
            "input_bytes": self.input_bytes,
            "target": str(self.target),
            "tokenizer": str(self.tokenizer),
            "vocab_size": self.vocab_size,
            "token_bytes": self.token_bytes,
            "eos_token": self.eos_token,
            "eos_token_id": self.eos_token_id,
            "eos_from": self.eos_from,
            "shuffle_seed": self.options.shuffle_seed,
            "max_tokens_per_file": self.options.max_tokens_per_file,
            "tasks": self.tasks,
        }


@dataclass(frozen=True, kw_only=True)
class TokenizeResult:
    """What lies in the finished folder."""

    files: tuple[str, ...]
    documents: int
    tokens: int
    seconds: float
    warnings: tuple[str, ...]


def plan_tokenization(inputs: list[Path], target: Path, options: TokenizeOptions) -> TokenizePlan:
    """Find the input files and settle the EOS. Needs tokenizers, not datatrove, and writes nothing.

    Raises ``UsageError`` for inputs and options that make no sense, and where the EOS has to be chosen by hand;
    ``MissingFile`` and ``CorruptFile`` for the tokenizer; ``NotInstalled``.
    """
    if options.max_tokens_per_file is not None and options.shuffle_seed is None:
        # datatrove 0.10.1 splits only while it shuffles, and ignores the limit otherwise.
        raise UsageError("--max-tokens-per-file needs shuffling: datatrove splits a file when it writes it shuffled.")
    if options.separator == "":
        raise UsageError("--separator is empty. Expected the text between two documents, such as '\\n\\n\\n'.")
    files = _find_inputs(inputs)
    if options.separator is not None and "txt" not in {_kind(path) for path in files}:
        raise UsageError("--separator divides .txt files, and there is none among the inputs.")
    for path in inputs:
        refuse_nested(path, target)
    size = sum(path.stat().st_size for path in files)
    tasks = options.tasks or max(1, min(len(files), size // TASK_BYTES))
    if tasks > len(files):
        raise UsageError(f"--tasks {tasks}: there are {len(files)} input files, and a task reads whole files.")
    path = find_tokenizer(options.tokenizer)
    tokenizer = load_tokenizer(path)
    for switch in ("truncation", "padding"):
        # encode_batch obeys them, so documents would be cut, or filled up to the longest of a batch.
        if getattr(tokenizer, switch) is not None:
            raise UsageError(f'{path} asks for {switch} of every text. Set "{switch}" to null in a copy, and use that.')
    eos, eos_from = (None, "--no-eos") if options.no_eos else _choose_eos(tokenizer, path, options.eos)
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    return TokenizePlan(
        inputs=tuple(files), input_bytes=size, target=target.absolute(), tokenizer=path, vocab_size=vocab_size,
        token_bytes=2 if vocab_size <= 65536 else 4, eos_token=eos,
        eos_token_id=None if eos is None else tokenizer.token_to_id(eos), eos_from=eos_from, tasks=tasks,
        options=options,
    )  # fmt: skip


def run_local(
    plan: TokenizePlan, *, workers: int | None = None, overwrite: bool = False, resume: bool = False, show: bool = False
) -> TokenizeResult:
    """Tokenise in processes of this machine. ``show`` lets datatrove's own log through to stderr.

    ``resume`` keeps the tasks that are done if the plan is the same one. Raises ``CorruptFile`` for input that cannot
    be read; then ``plan.logs`` has datatrove's log.
    """
    _require_datatrove(plan)
    from datatrove.executor.local import LocalPipelineExecutor

    started = time.monotonic()
    cpus = usable_cores()
    workers = min(workers or cpus, plan.tasks)
    # Each worker's tokenizer would start a thread per core.
    threads = os.environ.get("RAYON_NUM_THREADS", str(max(1, cpus // workers)))
    with _output(plan, overwrite=overwrite, resume=resume) as folder:
        console = None if show else plan.logs / "console.log"
        executor = LocalPipelineExecutor(
            _pipeline(plan, folder.partial), tasks=plan.tasks, workers=workers, logging_dir=str(plan.logs / "tokenize")
        )
        # Its workers are started by `python -c`, which would import from the working folder.
        with safe_children(RAYON_NUM_THREADS=threads), _quiet(console), _input_errors(plan):
            executor.run()
        result = _finish(plan, folder)
    shutil.rmtree(plan.logs)
    return replace(result, seconds=time.monotonic() - started)


def submit_to_slurm(
    plan: TokenizePlan,
    slurm: SlurmOptions,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Queue a job array, and a job after it that names the folder; returns their ids and where script and logs are.

    ``plan.logs/tokenize/launch_script.slurm`` is what was submitted. ``workers`` bounds how many tasks run at once.
    """
    _require_datatrove(plan)
    if shutil.which("sbatch") is None:
        raise NotInstalled("--executor slurm needs sbatch, which is not on the PATH. Submit from a login node.")
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # where datatrove would run a task instead of submitting
        raise UsageError("--executor slurm cannot be used within a job array. Submit from a login node.")
    from datatrove.executor.slurm import SlurmPipelineExecutor

    options: dict[str, Any] = {
        "time": slurm.time,
        "partition": slurm.partition,
        "mem_per_cpu_gb": slurm.mem_per_cpu_gb,
        "qos": slurm.qos or "",
        "env_command": f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH PYTHONSAFEPATH=1",
        "sbatch_args": {"kill-on-invalid-dep": "yes"} | ({"account": slurm.account} if slurm.account else {}),
    }
    with _output(plan, overwrite=overwrite, resume=resume) as folder:
        array = SlurmPipelineExecutor(
            _pipeline(plan, folder.partial), tasks=plan.tasks, workers=workers or -1, job_name="smolconv-tokenize",
            cpus_per_task=slurm.cpus_per_task, logging_dir=str(plan.logs / "tokenize"), **options,
        )  # fmt: skip
        finish = SlurmPipelineExecutor(
            [FinishJob(plan=plan, overwrite=overwrite)], tasks=1, job_name="smolconv-tokenize-finish",
            logging_dir=str(plan.logs / "finish"), depends=array, **options,
        )  # fmt: skip
        with _submission_errors(plan), _quiet(plan.logs / "console.log"):
            finish.run()
    return {
        "jobs": {"tokenize": None if array.job_id == -1 else array.job_id, "finish": finish.job_id},
        "script": str(plan.logs / "tokenize" / "launch_script.slurm"),
        "logs": str(plan.logs),
    }


@dataclass(frozen=True, kw_only=True)
class FinishJob:
    """The last job's only step."""

    plan: TokenizePlan
    overwrite: bool

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        with _output(self.plan, overwrite=self.overwrite, resume=True) as folder:
            _finish(self.plan, folder)


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """datatrove has no reader of plain text: a file is a document, or several divided by ``separator``.

    ``paths_file`` lists the files; blank documents are left out.
    """

    paths_file: str
    separator: str | None

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        from datatrove.data import Document
        from datatrove.io import get_shard_from_paths_file, open_file

        yield from data or ()
        for path in get_shard_from_paths_file(self.paths_file, rank, world_size):
            with open_file(path, "rt", encoding="utf-8", compression="infer", newline="") as file:
                try:
                    text = file.read()
                except UnicodeDecodeError as error:
                    raise CorruptFile(f"{path} is not UTF-8: {error}. Convert it, or leave it out.") from None
            for number, part in enumerate([text] if self.separator is None else text.split(self.separator)):
                if part.strip():
                    yield Document(text=part, id=f"{path}/{number}")


# --- input -----------------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str | None:
    found = _SUFFIX.search(path.name)
    return None if found is None or (found[1] == "parquet" and found[2]) else found[1]


def _find_inputs(inputs: list[Path]) -> list[Path]:
    """Files in the order of the inputs, a folder's sorted by path. Hidden files and other suffixes are passed over."""
    expected = "Expected .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt or a folder of them."
    files: list[Path] = []
    for given in inputs:
        if not given.exists():
            raise UsageError(f"{given} is not there. {expected}")
        if given.is_dir():
            found = [path for path in sorted(given.rglob("*")) if path.is_file() and not path.name.startswith(".")]
            found = [path for path in found if _kind(path) is not None]
            if not found:
                raise UsageError(f"{given} holds no text that can be read. {expected}")
            files += found
        elif _kind(given) is None:
            raise UsageError(f"{given}: its suffix says nothing about its format. {expected}")
        else:
            files.append(given)
    files = [path.absolute() for path in files]
    twice = [path for path, count in Counter(files).items() if count > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice: its documents would be there twice. Name it once.")
    return files


def _adapt(reader: Any, data: dict[str, Any], path: str, number: int | str) -> dict[str, Any]:
    """A row as the fields of a document, without the metadata that token files cannot hold."""
    if not isinstance(data, dict) or reader.text_key not in data:
        keys = ", ".join(map(str, list(data)[:8])) if isinstance(data, dict) else type(data).__name__
        raise CorruptFile(
            f"/{path.lstrip('/')}: row {number} has no {reader.text_key!r} (it has: {keys}).\n"
            "Pass --text-key with the name of the text, or mend the row."
        )
    text = data[reader.text_key]
    if text is not None and not isinstance(text, str):
        raise CorruptFile(
            f"/{path.lstrip('/')}: row {number} has a {type(text).__name__} under {reader.text_key!r}, not text.\n"
            "Pass --text-key with the name of the text, or mend the row."
        )
    return {"text": text, "id": f"{path}/{number}"}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json of a folder, itself, or that of ``owner/name``, downloaded to the Hub's cache."""
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
        if not path.is_file():
            raise MissingFile(
                f"{path} is not there. Expected a folder with the tokenizer.json of the tokenizers library."
            )
    if path.is_file():
        return path.absolute()
    if not re.fullmatch(r"(hf://)?[\w.-]+/[\w.-]+", name):
        raise UsageError(f"--tokenizer {name}: no such file or folder, and not an owner/name on the Hub.")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise NotInstalled(f'fetching {name} needs huggingface_hub. Install it: pip install "smolconv[hub]"') from None
    repo = name.removeprefix("hf://")
    try:
        path = Path(hf_hub_download(repo, "tokenizer.json"))
        hf_hub_download(repo, "tokenizer_config.json")  # lies beside it, and names the eos
    except Exception as error:  # the client's errors have no common base class
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise MachineError(
            f"--tokenizer {name} is no local file or folder, and could not be fetched from the Hub: {said[0]}\n"
            "Check the name and the network, or give a local folder."
        ) from None
    return path


def load_tokenizer(path: Path) -> Any:
    """Raises ``CorruptFile``, and ``NotInstalled`` without the tokenizers library."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise _not_installed(["tokenizers"]) from None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises the base class itself
        raise CorruptFile(f"{path} is not a tokenizer.json of the tokenizers library ({error}).") from None
    return tokenizer


def _choose_eos(tokenizer: Any, path: Path, asked: str | None) -> tuple[str, str]:
    """The token that ends documents, and who says so."""
    if asked is not None:
        if tokenizer.token_to_id(asked) is None:
            raise UsageError(f"--eos {asked} is not a token of {path}. It has: {_special(tokenizer)}.")
        return asked, "--eos"
    own, said_by = _own_eos(tokenizer, path)
    if own is None:
        raise UsageError(
            f"no file beside {path} says which token ends a document.\n"
            f"Pass --eos TOKEN, one of: {_special(tokenizer)}; or --no-eos."
        )
    others = [token for token in PRETRAINING_ENDS if tokenizer.token_to_id(token) is not None]
    if others and own not in others:
        raise UsageError(
            f"{said_by} names {own} (id {tokenizer.token_to_id(own)}) as eos, as chat tokenizers do, but pretraining "
            f"data usually ends in {others[0]} (id {tokenizer.token_to_id(others[0])}).\n"
            "Where the data's EOS is not the recipe's, positions and attention never restart at a document.\n"
            f"Choose: --eos '{others[0]}' or --eos '{own}'."
        )
    return own, str(said_by)


def _own_eos(tokenizer: Any, path: Path) -> tuple[str | None, Path]:
    for name in ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json"):
        beside = path.with_name(name)
        if not beside.is_file():
            continue
        try:
            document = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorruptFile(f"{beside} is not JSON ({error}).") from None
        token = document.get("eos_token") if isinstance(document, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if token is None and isinstance(document, dict) and isinstance(document.get("eos_token_id"), int):
            token = tokenizer.id_to_token(document["eos_token_id"])
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            return token, beside
    return None, path


def _special(tokenizer: Any) -> str:
    names = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    return some_of(names, 8) or "no special tokens"


# --- datatrove -------------------------------------------------------------------------------------------------------


def _not_installed(missing: list[str]) -> NotInstalled:
    return NotInstalled(f"tokenising this needs {', '.join(missing)}. Install it: pip install 'smolconv[data]'")


def _require_datatrove(plan: TokenizePlan) -> None:
    needed = ["datatrove", "tokenizers"]
    for kind in sorted({_kind(path) or "" for path in plan.inputs}):
        needed += KINDS[kind]
    if any(path.name.endswith(".zst") for path in plan.inputs):
        needed.append("zstandard")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise _not_installed(missing)


def _pipeline(plan: TokenizePlan, folder: Path) -> list[Any]:
    """A reader for each kind of input, then the tokenizer. The lists of files lie with the logs."""
    from datatrove.pipeline.readers import JsonlReader, ParquetReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers.processors import TemplateProcessing

    steps: list[Any] = []
    for kind in KINDS:
        files = [path for path in plan.inputs if _kind(path) == kind]
        if not files:
            continue
        listing = plan.logs / f"inputs-{kind}.txt"
        listing.write_text("".join(f"{path}\n" for path in files), encoding="utf-8")
        if kind == "txt":
            steps.append(TextFiles(paths_file=str(listing), separator=plan.options.separator))
        else:
            reader = JsonlReader if kind == "jsonl" else ParquetReader
            steps.append(reader("/", paths_file=str(listing), text_key=plan.options.text_key, adapter=_adapt))
    seed = plan.options.shuffle_seed
    tokenizer = DocumentTokenizer(
        str(folder), str(plan.tokenizer), eos_token=plan.eos_token, shuffle_documents=seed is not None, seed=seed,
        max_tokens_per_file=plan.options.max_tokens_per_file, batch_size=DOCUMENTS_PER_BATCH,
    )  # fmt: skip
    if plan.eos_token is None:
        # Else the tokenizer's own template stays, which may add a BOS to every document (Llama 3's does).
        tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    return [*steps, tokenizer]


#: How names of files end that a token folder consists of.
_TOKEN_FILES = (".ds", ".ds.index", ".ds.metadata", ".ds.loss")


def lost_with_tokens(target: Path) -> str | None:
    """What would be lost if ``target`` were replaced, beside token files. The answer goes on "it ..."."""
    if not target.is_dir():
        return "is no folder"
    others = sorted(entry.name for entry in os.scandir(target) if not entry.name.endswith(_TOKEN_FILES))
    return f"also holds {', '.join(others[:3])}" if others else None


@contextmanager
def _output(plan: TokenizePlan, *, overwrite: bool, resume: bool) -> Iterator[OutputFolder]:
    """OUTPUT.partial under its lock, with the list of finished tasks that belongs to it."""
    refuse_existing(plan.target, overwrite, lost_with_tokens)
    begun = plan.target.with_name(plan.target.name + ".partial") / JOURNAL
    resume = resume and begun.exists()
    with OutputFolder(plan.target, plan.digest, resume=resume, overwrite=overwrite, loses=lost_with_tokens) as folder:
        if not resume:
            for name in ("tokenize", "finish"):
                shutil.rmtree(plan.logs / name, ignore_errors=True)
        plan.logs.mkdir(exist_ok=True)
        yield folder


def _finish(plan: TokenizePlan, folder: OutputFolder) -> TokenizeResult:
    """Check what the tasks wrote and give the folder its name."""
    from smolconv.continual_pretraining.tokens.files import TokenFolder

    done = len(list((plan.logs / "tokenize" / "completions").glob("*")))
    if done < plan.tasks:
        raise BadCheckpoint(f"{plan.target}: {done} of {plan.tasks} tasks are done. See {plan.logs}; then --resume.")
    warnings = _warnings(plan)
    for path in folder.partial.glob("*.ds"):
        # A task without documents writes one, and so does a split after the very last document.
        if path.stat().st_size == 0:
            for companion in folder.partial.glob(f"{path.name}*"):
                companion.unlink()
    names = tuple(sorted(path.name for path in folder.partial.glob("*.ds")))
    if not names:
        raise UsageError(
            f"none of the {len(plan.inputs)} input files has a document with text under {plan.options.text_key!r}."
        )
    written = TokenFolder.open(folder.partial, 1, vocab_size=plan.vocab_size)
    for path in folder.partial.iterdir():
        sync_file(path)
    folder.publish()
    return TokenizeResult(
        files=names, documents=written.documents or 0, tokens=written.tokens, seconds=0.0, warnings=warnings
    )


def _warnings(plan: TokenizePlan) -> tuple[str, ...]:
    """What datatrove only logs. Raises ``CorruptFile`` when it has passed over input that it could not read."""
    said = Counter(
        line.rpartition(" - ")[2].strip() if "Error when reading" not in line else line.partition(" - ")[2].strip()
        for path in sorted((plan.logs / "tokenize" / "logs").glob("task_*.log"))
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if "| WARNING  |" in line
    )
    unread = {text: count for text, count in said.items() if "Error when reading" in text or "be corrupted" in text}
    if unread:
        raise CorruptFile(
            f"datatrove passed over {sum(unread.values())} places that it could not read. The first:\n"
            f"{next(iter(unread))}\nMend or leave out the file, and repeat the command. See {plan.logs}."
        )
    empty = sum(count for text, count in said.items() if "document without text" in text)
    return (f"documents with empty text were left out ({empty} tasks met some)",) if empty else ()


@contextmanager
def _input_errors(plan: TokenizePlan) -> Iterator[None]:
    """What a broken file makes the readers raise."""
    unreadable = [EOFError, ValueError, zlib.error, gzip.BadGzipFile]  # ValueError: also JSON's and Arrow's
    if "zstandard" in sys.modules:
        unreadable.append(sys.modules["zstandard"].ZstdError)
    try:
        yield
    except (OSError, *unreadable) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
            raise  # the machine's; Arrow raises the class without a number for pages that it cannot decode
        raise CorruptFile(
            f"an input could not be read: {type(error).__name__}: {error}.\nSee {plan.logs} for the file."
        ) from error


@contextmanager
def _submission_errors(plan: TokenizePlan) -> Iterator[None]:
    from subprocess import CalledProcessError

    try:
        yield
    except CalledProcessError as error:
        said = [
            line for line in (plan.logs / "console.log").read_text(errors="replace").splitlines() if "sbatch" in line
        ]
        raise MachineError(
            f"sbatch ended with {error.returncode}: {said[-1] if said else 'it said nothing'}\n"
            f"Its script is {plan.logs}/tokenize/launch_script.slurm."
        ) from None


@contextmanager
def _quiet(log: Path | None) -> Iterator[None]:
    """Send what this process and its children write to stdout and stderr to ``log``; None: leave them."""
    if log is None:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    with open(log, "ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), kept):
            os.dup2(original, descriptor)
            os.close(original)
