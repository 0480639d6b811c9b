"""Tokenises text into token files with datatrove, on this machine or as a Slurm job array.

Differences from datatrove alone: the EOS is always an explicit choice, unreadable input is an error instead of a line
in a log, and the output folder appears only when every task is done.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shlex
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smolconv.continual_pretraining.tokens.eos import choose_eos
from smolconv.continual_pretraining.tokens.files import TokenFolder
from smolconv.continual_pretraining.tokens.inputs import (
    KINDS,
    NO_SEPARATOR,
    NO_TEXT,
    HeldOut,
    HoldOut,
    Inputs,
    Texts,
    find_inputs,
    kind_of,
    parse_share,
)
from smolconv.continual_pretraining.tokens.tokenizer import (
    find_tokenizer,
    load_tokenizer,
    tokenizer_of_model,
    tokenizing_needs,
)
from smolconv.errors import BadCheckpoint, CorruptFile, MachineError, NotInstalled, UsageError, counted
from smolconv.files import file_size
from smolconv.processes import safe_children, usable_cores
from smolconv.progress import Bar, no_bar
from smolconv.storage.atomic import JOURNAL, OutputFolder, refuse_existing, refuse_nested, sync_file

#: Input per task unless --tasks is given. It depends on the input alone, so every machine writes the same files.
TASK_BYTES = 100_000_000
DOCUMENTS_PER_BATCH = 1000


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions:
    """How text is read and token files are written."""

    tokenizer: str | None = None  #: folder, tokenizer.json, or owner/name on the Hub
    model: str | None = None  #: instead: a checkpoint of any layout, local or on the Hub, with a tokenizer
    format: str | None = None  #: one of ``KINDS``, overrides the suffixes
    hold_out: str | None = None  #: share of the documents, such as 0.5%
    hold_out_target: Path | None = None  #: None: next to the output
    eos: str | None = None  #: a token; None: the tokenizer's own
    no_eos: bool = False
    text_key: str = "text"
    separator: str | None = None  #: divides a .txt file into documents; None: a file is a document
    shuffle_seed: int | None = 0  #: None: documents stay in order
    max_tokens_per_file: int | None = None
    tasks: int | None = None  #: None: one per 100 MB of input, at most one per file


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """Settings of the job array."""

    partition: str
    time: str = "24:00:00"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 2
    qos: str | None = None
    account: str | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizePlan:
    """Everything that determines the bytes written."""

    found: Inputs
    input_bytes: int
    target: Path
    held_out: Path | None  #: folder for the held-out documents
    tokenizer: Path
    vocab_size: int  #: with added tokens
    token_bytes: int  #: 2 for at most 65536 entries, else 4
    eos_token: str | None
    eos_token_id: int | None
    eos_from: str  #: the option or file that chose it, for messages
    tasks: int
    options: TokenizeOptions

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Input files, in the order in which they are split among tasks."""
        return self.found.files

    def kind_of(self, path: Path) -> str:
        kind = kind_of(path, self.options.format)
        assert kind is not None  # find_inputs returns no others
        return kind

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
            "format": self.options.format,
            "read": dict(self.found.read),
            "passed_over": dict(self.found.passed_over),
            "target": str(self.target),
            "hold_out": self.options.hold_out,
            "hold_out_target": None if self.held_out is None else str(self.held_out),
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
    """The contents of the finished folder."""

    files: tuple[str, ...]
    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    seconds: float
    warnings: tuple[str, ...]


def plan_tokenization(inputs: list[Path], target: Path, options: TokenizeOptions) -> TokenizePlan:
    """Find the input files and choose the EOS. Needs tokenizers but not datatrove, and writes nothing.

    Raises ``UsageError`` for invalid inputs and options, and if the EOS must be chosen by hand; ``MissingFile`` and
    ``CorruptFile`` for the tokenizer and for inputs that are not files; ``NotInstalled``.
    """
    if options.max_tokens_per_file is not None and options.shuffle_seed is None:
        # datatrove 0.10.1 splits only while it shuffles, and ignores the limit otherwise.
        raise UsageError("--max-tokens-per-file needs shuffling: datatrove splits files only while it shuffles.")
    if options.separator == "":
        raise UsageError("--separator is empty. Expected the text between two documents, such as '\\n\\n\\n'.")
    found = find_inputs(inputs, options.format)
    files = found.files
    if options.separator is not None and "txt" not in {kind_of(path, options.format) for path in files}:
        raise UsageError("--separator divides .txt files, and there is none among the inputs.")
    held_out = _held_out_target(target, options)
    for path in inputs:
        refuse_nested(path, target)
        if held_out is not None:
            refuse_nested(path, held_out)
    size = sum(file_size(path) for path in files)
    tasks = options.tasks or max(1, min(len(files), size // TASK_BYTES))
    if tasks > len(files):
        raise UsageError(f"--tasks {tasks}: there are {len(files)} input files, and a task reads whole files.")
    path, tokenizer = _tokenizer(options)
    for switch in ("truncation", "padding"):
        # encode_batch applies them, so documents would be truncated, or padded to the longest of a batch.
        if getattr(tokenizer, switch) is not None:
            raise UsageError(f'{path} applies {switch} to every text. Set "{switch}" to null in a copy, and use that.')
    eos, eos_from = (None, "--no-eos") if options.no_eos else choose_eos(tokenizer, path, options.eos)
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
    return TokenizePlan(
        found=found, input_bytes=size, target=target.absolute(), held_out=held_out, tokenizer=path,
        vocab_size=vocab_size,
        token_bytes=2 if vocab_size <= 65536 else 4, eos_token=eos,
        eos_token_id=None if eos is None else tokenizer.token_to_id(eos), eos_from=eos_from, tasks=tasks,
        options=options,
    )  # fmt: skip


def _held_out_target(target: Path, options: TokenizeOptions) -> Path | None:
    if options.hold_out is None:
        if options.hold_out_target is not None:
            raise UsageError("--hold-out-output needs --hold-out with a share, such as --hold-out 0.5%.")
        return None
    parse_share(options.hold_out)
    held_out = (options.hold_out_target or target.with_name(f"{target.name}-held-out")).absolute()
    refuse_nested(target, held_out)
    return held_out


def _tokenizer(options: TokenizeOptions) -> tuple[Path, Any]:
    """The tokenizer's path and the tokenizer. Raises ``UsageError`` if it is larger than the model's embedding."""
    if options.model is None:
        if options.tokenizer is None:
            raise UsageError("no tokenizer given. Pass --tokenizer T, or --model SRC for that of a checkpoint.")
        path = find_tokenizer(options.tokenizer)
        return path, load_tokenizer(path)
    if options.tokenizer is not None:
        raise UsageError("--tokenizer and --model both choose the tokenizer. Pass only one of them.")
    path, rows = tokenizer_of_model(options.model)
    tokenizer = load_tokenizer(path)
    if (entries := tokenizer.get_vocab_size(with_added_tokens=True)) > rows:
        raise UsageError(
            f"{path} has {entries} entries, but the embedding of {options.model} has {rows} rows.\n"
            "The model would fail on higher ids. Check that the tokenizer is this model's, or pass --tokenizer T."
        )
    return path, tokenizer


def run_local(
    plan: TokenizePlan, *, workers: int | None = None, overwrite: bool = False, resume: bool = False,
    show: bool = False, bar: Bar = no_bar,
) -> TokenizeResult:  # fmt: skip
    """Tokenise in processes on this machine. ``show`` passes datatrove's log on to stderr.

    ``resume`` keeps finished tasks if the plan is the same. Raises ``CorruptFile`` for input that cannot be read;
    datatrove's log is then in ``plan.logs``.
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
        # Its workers are started with `python -c`, which would import from the working folder.
        with (
            bar("tokenizing", plan.tasks) as advance, _watched(plan.logs, advance),
            safe_children(RAYON_NUM_THREADS=threads), _quiet(console), _input_errors(plan),
        ):  # fmt: skip
            executor.run()
        result = _finish(plan, folder, overwrite=overwrite)
    shutil.rmtree(plan.logs)
    return replace(result, seconds=time.monotonic() - started)


def submit_to_slurm(
    plan: TokenizePlan, slurm: SlurmOptions, *, workers: int | None = None, overwrite: bool = False,
    resume: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Queue a job array and a final job that publishes the folder. Returns job ids and the paths of script and logs.

    ``plan.logs/tokenize/launch_script.slurm`` is the submitted script. ``workers`` limits how many tasks run at once.
    """
    _require_datatrove(plan)
    if shutil.which("sbatch") is None:
        raise NotInstalled("--executor slurm needs sbatch, which is not on the PATH. Submit from a login node.")
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # datatrove would run a task instead of submitting
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
    """The only step of the final job."""

    plan: TokenizePlan
    overwrite: bool

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        with _output(self.plan, overwrite=self.overwrite, resume=True) as folder:
            _finish(self.plan, folder, overwrite=self.overwrite)


# --- datatrove -------------------------------------------------------------------------------------------------------


def _require_datatrove(plan: TokenizePlan) -> None:
    needed = ["datatrove", "tokenizers"]
    for kind in sorted({plan.kind_of(path) for path in plan.inputs}):
        needed += KINDS[kind]
    if any(path.name.endswith(".zst") for path in plan.inputs):
        needed.append("zstandard")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise tokenizing_needs(missing)


def _pipeline(plan: TokenizePlan, folder: Path) -> list[Any]:
    """A reader for each kind of input, then the tokenizer. The lists of files are in the logs folder."""
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers.processors import TemplateProcessing

    steps: list[Any] = []
    for kind in KINDS:
        files = [path for path in plan.inputs if plan.kind_of(path) == kind]
        if not files:
            continue
        listing = plan.logs / f"inputs-{kind}.txt"
        listing.write_text("".join(f"{path}\n" for path in files), encoding="utf-8")
        steps.append(
            Texts(
                paths_file=str(listing), kind=kind, text_key=plan.options.text_key, separator=plan.options.separator
            )
        )  # fmt: skip
    seed = plan.options.shuffle_seed

    def tokenizer(target: Path) -> Any:
        made = DocumentTokenizer(
            str(target), str(plan.tokenizer), eos_token=plan.eos_token, shuffle_documents=seed is not None, seed=seed,
            max_tokens_per_file=plan.options.max_tokens_per_file, batch_size=DOCUMENTS_PER_BATCH,
        )  # fmt: skip
        if plan.eos_token is None:
            # Otherwise the tokenizer's template would add a BOS to every document, if it has one (Llama 3's does).
            made.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        return made

    if plan.options.hold_out is None:
        return [*steps, tokenizer(folder)]
    apart = str(plan.logs)
    return [
        *steps, HoldOut(folder=apart, share=parse_share(plan.options.hold_out)), tokenizer(folder),
        HeldOut(folder=apart), tokenizer(folder / _HELD_OUT),
    ]  # fmt: skip


#: In OUTPUT.partial: the held-out files, and their folder's name once they were copied to their target.
_HELD_OUT, _HELD_OUT_COPIED = "held-out", "held-out-copied"
#: Suffixes of the files in a token folder.
_TOKEN_FILES = (".ds", ".ds.index", ".ds.metadata", ".ds.loss")


def lost_with_tokens(target: Path) -> str | None:
    """What else than token files would be lost if ``target`` were replaced; completes a sentence that starts "it"."""
    if not target.is_dir():
        return "is not a folder"
    others = sorted(entry.name for entry in os.scandir(target) if not entry.name.endswith(_TOKEN_FILES))
    return f"also holds {', '.join(others[:3])}" if others else None


@contextmanager
def _output(plan: TokenizePlan, *, overwrite: bool, resume: bool) -> Iterator[OutputFolder]:
    """Hold the lock on OUTPUT.partial, together with its list of finished tasks."""
    refuse_existing(plan.target, overwrite, lost_with_tokens)
    partial = plan.target.with_name(plan.target.name + ".partial")
    resume = resume and (partial / JOURNAL).exists()
    if plan.held_out is not None and not (resume and not (partial / _HELD_OUT).exists()):
        refuse_existing(plan.held_out, overwrite, lost_with_tokens)
    with OutputFolder(plan.target, plan.digest, resume=resume, overwrite=overwrite, loses=lost_with_tokens) as folder:
        if not resume:
            for name in ("tokenize", "finish"):
                shutil.rmtree(plan.logs / name, ignore_errors=True)
        plan.logs.mkdir(exist_ok=True)
        if plan.held_out is not None and not resume:
            (folder.partial / _HELD_OUT).mkdir()
        yield folder


def _finish(plan: TokenizePlan, folder: OutputFolder, *, overwrite: bool) -> TokenizeResult:
    """Check what the tasks wrote, and publish the folders, the held-out one first."""
    done = len(list((plan.logs / "tokenize" / "completions").glob("*")))
    if done < plan.tasks:
        raise BadCheckpoint(f"{plan.target}: {done} of {plan.tasks} tasks are done. See {plan.logs}, then --resume.")
    warnings = _warnings(plan)
    written = _whole(plan, folder.partial)
    if written is None:
        kept = any(path.stat().st_size for path in (folder.partial / _HELD_OUT).glob("*.ds"))
        raise UsageError(
            f"none of the {len(plan.inputs)} input files has a document with text under {plan.options.text_key!r}"
            + (f" besides those that --hold-out {plan.options.hold_out} keeps. Give more text." if kept else ".")
        )
    held_out = None if plan.held_out is None else _publish_held_out(plan, plan.held_out, folder, overwrite=overwrite)
    if plan.held_out is not None and held_out is None:
        warnings += (
            f"--hold-out {plan.options.hold_out} selected 0 of {written.documents or 0:,} documents: {plan.held_out} "
            "was not written. Raise --hold-out, or give more text.",
        )
    folder.publish()
    return TokenizeResult(
        files=tuple(sorted(file.path.name for file in written.files)), documents=written.documents or 0,
        tokens=written.tokens, held_out_documents=0 if held_out is None else held_out.documents or 0,
        held_out_tokens=0 if held_out is None else held_out.tokens, seconds=0.0, warnings=warnings,
    )  # fmt: skip


def _whole(plan: TokenizePlan, folder: Path) -> TokenFolder | None:
    """Check a folder's token files and sync them to disk; None if there are no tokens."""
    for path in folder.glob("*.ds"):
        # A task without documents writes an empty file, and so does a split after the last document.
        if path.stat().st_size == 0:
            for companion in folder.glob(f"{path.name}*"):
                companion.unlink()
    if not any(folder.glob("*.ds")):
        return None
    found = TokenFolder.open(folder, 1, vocab_size=plan.vocab_size)
    for path in folder.iterdir():
        if path.is_file():
            sync_file(path)
    return found


def _publish_held_out(plan: TokenizePlan, target: Path, folder: OutputFolder, *, overwrite: bool) -> TokenFolder | None:
    """Publish the held-out folder; None if nothing is held out. --resume works after a kill at any point.

    The folder in OUTPUT.partial shows how far an earlier attempt came: while it exists, nothing was published.
    """
    inner, copied = folder.partial / _HELD_OUT, folder.partial / _HELD_OUT_COPIED
    first = inner.exists()
    if first and _whole(plan, inner) is None:
        shutil.rmtree(inner)
        return None
    if first or target.with_name(target.name + ".partial").exists():
        with OutputFolder(target, plan.digest, resume=not first, overwrite=overwrite, loses=lost_with_tokens) as held:
            if first:  # copied, not renamed: the target may be on another disk
                for path in sorted(inner.iterdir()):
                    shutil.copyfile(path, held.partial / path.name)
                    sync_file(held.partial / path.name)
                inner.rename(copied)
            held.publish()
    shutil.rmtree(copied, ignore_errors=True)
    return TokenFolder.open(target, 1, vocab_size=plan.vocab_size) if target.is_dir() else None


def _warnings(plan: TokenizePlan) -> tuple[str, ...]:
    """Warnings of the tasks, which are in their logs."""
    paths = sorted((plan.logs / "tokenize" / "logs").glob("task_*.log"))
    logs = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    found = list[str]()
    if empty := sum(NO_TEXT in log for log in logs):
        found.append(f"documents with empty text were skipped (found by {counted(empty, 'task')})")
    if whole := sum(NO_SEPARATOR in log for log in logs):
        found.append(
            f"--separator {plan.options.separator!r:.60} occurs in no .txt file of {counted(whole, 'task')}: each file "
            "is one document. A shell passes line breaks as $'\\n\\n', and files may end their lines in '\\r\\n'."
        )
    return tuple(found)


@contextmanager
def _watched(logs: Path, advance: Callable[[int], None]) -> Iterator[None]:
    """Report each finished task, from a thread: datatrove's processes create a file for each."""
    done, ended = logs / "tokenize" / "completions", threading.Event()

    def watch() -> None:
        told, last = 0, False
        while not last:
            last = ended.wait(0.25)
            with suppress(OSError):
                found = len(os.listdir(done))
                advance(found - told)
                told = found

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _input_errors(plan: TokenizePlan) -> Iterator[None]:
    """Convert the exceptions that readers raise for a broken file."""
    # ValueError: also JSON's and Arrow's.
    unreadable = [EOFError, ValueError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile]
    if "zstandard" in sys.modules:
        unreadable.append(sys.modules["zstandard"].ZstdError)
    try:
        yield
    except (OSError, *unreadable) as error:
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile) and error.errno is not None:
            raise  # a machine's error. Arrow raises OSError without errno for pages that it cannot decode
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
            f"sbatch ended with {error.returncode}: {said[-1] if said else 'it printed nothing'}\n"
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
