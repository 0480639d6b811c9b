"""The Python API, ``import smolconv``: each command calls the function with its name.

Sources are folders or ``hf://owner/name[/subfolder][@revision]``, as strings or paths. Errors are the classes of
``smolconv.errors``, whose ``exit_code`` is the command's. Nothing here prints. Functions that take seconds report
progress to ``bar``; ``on_progress(callback)`` makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from smolconv.checkpoint import Checkpoint, OptimizerState, Topology, TrainingProgress
from smolconv.errors import BadCheckpoint, NotInstalled, UsageError, pip_install
from smolconv.files import require_place
from smolconv.models.spec import ModelSpec
from smolconv.progress import Bar, no_bar
from smolconv.tensors.dtypes import DTYPE_WORDS
from smolconv.tensors.lazy import LazyTensor, column_slice, reshape, row_slice

if TYPE_CHECKING:
    import numpy as np
    import torch

    from smolconv.continual_pretraining.evaluation.evaluate import Evaluation
    from smolconv.conversion import ConversionPlan, ConversionResult
    from smolconv.verification.compare import VerifyOptions, VerifyReport
    from smolconv.verification.proof import Proof

Source = str | PathLike[str]
#: Gates of ``verify`` whose limits can be given.
_GATES: tuple[Literal["max_abs", "kl", "top1"], ...] = ("max_abs", "kl", "top1")
#: numpy has no such dtypes; ml_dtypes adds them.
_OF_ML_DTYPES = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


class Tensor:
    """A tensor in files. Shape and dtype are known; ``numpy()`` and ``torch()`` read the bytes.

    Indexing the first two dimensions by an integer or a slice of step 1 gives a ``Tensor`` that reads only its own
    rows; columns are read with the rest of their rows if that is faster. Instances hold no open file, can be pickled,
    and can be read from several threads at once.
    """

    __slots__ = ("_lazy", "name")

    def __init__(self, name: str, lazy: LazyTensor) -> None:
        self.name = name
        self._lazy = lazy

    @property
    def shape(self) -> tuple[int, ...]:
        return self._lazy.shape

    @property
    def dtype(self) -> str:
        """torch's name, such as ``bfloat16``."""
        return self._lazy.dtype

    @property
    def nbytes(self) -> int:
        return self._lazy.nbytes

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a scalar has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Tensor({self.name!r}, shape={self.shape}, dtype={self.dtype!r})"

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> Tensor:
        """Raises ``IndexError`` beyond the shape, ``TypeError`` for anything but integers and slices of step 1."""
        indices = index if isinstance(index, tuple) else (index,)
        if len(indices) > min(2, len(self.shape)):
            most = min(2, len(self.shape))
            raise IndexError(
                f"{self.name} has shape {self.shape}: index its first {most} dimensions, not {len(indices)}."
            )
        lazy, kept = self._lazy, list(self.shape)
        for axis, (each, cut) in enumerate(zip(indices, (row_slice, _columns))):
            start, stop = _range(each, kept[axis], self.name)
            lazy, kept[axis] = cut(lazy, start, stop), stop - start
        dropped = {axis for axis, each in enumerate(indices) if not isinstance(each, slice)}
        shape = tuple(size for axis, size in enumerate(kept) if axis not in dropped)
        return Tensor(self.name, lazy if shape == lazy.shape else reshape(lazy, shape))

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    def numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Read all elements into memory, in the tensor's own dtype.

        bfloat16 and float8 are types of ml_dtypes: raises ``NotInstalled`` if that package is not installed.
        Raises ``CorruptFile`` if a file ends early, and ``MissingFile`` if it no longer exists.
        """
        import numpy

        if self.dtype not in _OF_ML_DTYPES:
            return self._lazy.numpy().view(numpy.dtype(self.dtype))
        try:
            import ml_dtypes  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            raise NotInstalled(
                f"{self.name} is {self.dtype}, which numpy does not have.\n"
                f"Install it ({pip_install(['ml_dtypes'])}), or use .torch()."
            ) from None
        return self._lazy.numpy().view(numpy.dtype(getattr(ml_dtypes, self.dtype)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        if copy is False:
            raise ValueError(f"{self.name} lies in a file: an array of it is always a copy.")
        found = self.numpy()
        return found if dtype is None else found.astype(dtype)

    def torch(self) -> torch.Tensor:
        """Read all elements, on the CPU, in the tensor's own dtype. Raises ``NotInstalled`` without torch."""
        try:
            from smolconv.verification.forward import to_torch

            return to_torch(self._lazy)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise NotInstalled(f"{self.name}.torch() needs torch: {pip_install(['torch'])}.") from None


def _range(index: object, size: int, name: str) -> tuple[int, int]:
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step != 1:
            raise TypeError(f"{name} is sliced with step {step}; only step 1 is read from a file.")
        return start, max(start, stop)
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"{name} is indexed by integers and slices, not by {type(index).__name__}.")
    at = index.__index__()
    if not -size <= at < size:
        raise IndexError(f"{name}: index {at} is outside a dimension of {size}.")
    at %= size
    return at, at + 1


def _columns(lazy: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Slice the second dimension; further ones stay complete."""
    inner = lazy.shape[2:]
    width = lazy.width // lazy.shape[1] if lazy.shape[1] else 1
    flat = reshape(lazy, (lazy.shape[0], lazy.width))
    return reshape(column_slice(flat, start * width, stop * width), (lazy.shape[0], stop - start, *inner))


class _Tensors(Mapping[str, Tensor]):
    def __init__(self, found: Mapping[str, LazyTensor]) -> None:
        self._found = found

    def __getitem__(self, name: str) -> Tensor:
        try:
            return Tensor(name, self._found[name])
        except KeyError:
            near = get_close_matches(str(name), self._found, 1)
            raise KeyError(f"{name}" + (f" (is it {near[0]}?)" if near else "")) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class OpenCheckpoint(_Tensors):
    """A checkpoint of any layout: a mapping from transformers' parameter names to tensors.

    Only headers have been read. It holds no open file, so there is nothing to close.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.parameters)
        self._checkpoint = checkpoint

    @property
    def layout(self) -> str:
        """``nanotron``, ``huggingface``, ``deepspeed`` or ``gguf``."""
        return self._checkpoint.layout

    @property
    def path(self) -> Path:
        return self._checkpoint.root

    @property
    def spec(self) -> ModelSpec:
        """Sizes, rotary embedding, NoPE layers, tying."""
        return self._checkpoint.spec

    @property
    def topology(self) -> Topology:
        return self._checkpoint.topology

    @property
    def slots(self) -> Mapping[str, Mapping[str, Tensor]]:
        """``parameter`` and, from Adam's state, ``master``, ``exp_avg`` and ``exp_avg_sq``, if they exist, by name."""
        there = self._checkpoint.tensors.items()
        return MappingProxyType({slot.value: _Tensors(found) for slot, found in there if found})

    @property
    def optimizer(self) -> OptimizerState | None:
        """Adam's steps and the groups' hyperparameters; None without Adam's state."""
        return self._checkpoint.optimizer

    @property
    def progress(self) -> TrainingProgress | None:
        """Steps, samples, tokens and data stages of the run; None if the checkpoint does not record them."""
        return self._checkpoint.progress

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._checkpoint.warnings

    def __repr__(self) -> str:
        slots = ", ".join(self.slots)
        return f"OpenCheckpoint({str(self.path)!r}, {self.layout}, {len(self)} parameters; {slots})"


def open_checkpoint(
    source: Source, *, layout: str | None = None, step: int | None = None, config: Source | None = None,
    architecture: str | None = None, optimizer: bool = True,
) -> OpenCheckpoint:  # fmt: skip
    """Open a checkpoint without reading its tensors. One on the Hub is downloaded into the client's cache.

    ``layout``: which one, if the folder holds several; ``step`` of a run's folder (default: the latest); ``config``: a
    model config for a folder without one; ``architecture``: of a nanotron checkpoint whose class several families
    share (``docs/cli.md``); ``optimizer``: False skips Adam's state.

    Raises ``BadCheckpoint`` or a subclass (exit code 3), ``MachineError`` (4) if the Hub cannot be reached.
    """
    checkpoint = _read(
        source, layout=layout, step=step, config=config, architecture=architecture, optimizer=optimizer
    )  # fmt: skip
    return OpenCheckpoint(checkpoint)


def _read(
    source: Source, *, layout: str | None, step: int | None = None, config: Source | None = None,
    architecture: str | None = None, headers_only: bool = False, **read: Any,
) -> Checkpoint:  # fmt: skip
    from smolconv.hub.download import open_source
    from smolconv.layouts.layout import ReadOptions
    from smolconv.layouts.registry import read_checkpoint

    path = None if config is None else Path(config)
    folder = open_source(fspath(source), headers_only=headers_only, step=step, layout=layout, config=path)
    return read_checkpoint(
        folder, ReadOptions(config=path, step=step, layout=layout, architecture=architecture, **read)
    )  # fmt: skip


def inspect(
    source: Source, *, tensors: bool = False, check: bool = False, layout: str | None = None, step: int | None = None,
    config: Source | None = None, architecture: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The document that ``smolconv inspect --json`` prints: layout, spec, dtypes, topology, progress.

    ``tensors`` lists every tensor. ``check`` reads all bytes and compares the digests recorded for them; raises
    ``DigestMismatch`` if one differs.
    """
    from smolconv.hub.published import with_published_progress
    from smolconv.inspection import check_checkpoint, inspect_checkpoint

    read = _read(
        source, layout=layout, step=step, config=config, architecture=architecture, headers_only=not check,
        check_sidecar=check,
    )  # fmt: skip
    checkpoint = with_published_progress(read, fspath(source))
    document = inspect_checkpoint(checkpoint, tensors=tensors)
    if check:
        from smolconv.conversion import default_workers

        found = check_checkpoint(checkpoint, workers=default_workers())
        document["checked"] = found.checked
        document["unchecked"] = [{"path": str(path), "reason": reason} for path, reason in found.unchecked.items()]
    return document


def diff(
    a: Source, b: Source, *, layout_a: str | None = None, layout_b: str | None = None, architecture: str | None = None
) -> dict[str, Any]:
    """The document that ``smolconv diff --json`` prints: specs, and tensors by name, shape and dtype."""
    from smolconv.inspection import diff_checkpoints

    left, right = (
        _read(each, layout=layout, architecture=architecture, headers_only=True, check_sidecar=False)
        for each, layout in ((a, layout_a), (b, layout_b))
    )
    return diff_checkpoints(left, right)


def plan_conversion(
    source: Source, target: Source, *, to: str, headers_only: bool = False, **options: Any
) -> ConversionPlan:
    """Plan what ``convert`` would write, file by file, without writing anything.

    ``options`` are the fields of ``smolconv.conversion.ConvertOptions``: ``tp``, ``pp``, ``dp``, ``zero_stage``,
    ``world_size``, ``universal``, ``dtype``, ``optimizer`` and so on, as the options of ``smolconv convert``.
    ``headers_only``: download no tensor of a source on the Hub; such a plan cannot be run.

    Raises ``UsageError`` for options that contradict each other or the source, ``BadCheckpoint`` or a subclass.
    """
    from smolconv.conversion import ConvertOptions
    from smolconv.conversion import plan_conversion as plan

    known = {each.name for each in fields(ConvertOptions)} - {"to"}
    for name in options.keys() - known:
        near = get_close_matches(name, known, 1)
        raise UsageError(f"convert has no option {name!r}." + (f" Is it {near[0]!r}?" if near else ""))
    if isinstance(options.get("dtype"), str):
        options["dtype"] = DTYPE_WORDS.get(options["dtype"], options["dtype"])
    return plan(fspath(source), Path(target), ConvertOptions(to=to, **options), headers_only=headers_only)


def run_conversion(
    plan: ConversionPlan, *, verify: bool = False, resume: bool = False, overwrite: bool = False,
    workers: int | None = None, max_memory_bytes: int | None = None, check_source: bool = False, bar: Bar = no_bar,
    verify_bar: Bar | None = None,
) -> ConversionResult:  # fmt: skip
    """Run a plan. The target appears only once it is complete.

    ``verify`` verifies the result before publishing it, and raises ``ParityFailed`` if it differs. ``max_memory_bytes``
    limits the buffers of all ``workers``. ``verify_bar``: another bar for the verification, because ``bar`` counts
    bytes. Raises ``DigestMismatch`` or ``SourceChanged`` if the source is damaged or changes meanwhile, and
    ``MachineError`` if disk space is missing; the target does not appear then.
    """
    from contextlib import ExitStack

    from smolconv.conversion import run_conversion as run

    if verify:
        from smolconv.verification.logits import require_torch

        require_torch()
    with ExitStack() as shown:

        def verified(plan: ConversionPlan, folder: Path) -> Mapping[str, Any]:
            shown.close()  # the conversion's bar; the verification has its own
            return _verified(plan, folder, verify_bar or bar)

        told = shown.enter_context(bar(f"{plan.source.layout} -> {plan.layout}", plan.bytes_written))
        return run(
            plan, resume=resume, overwrite=overwrite, workers=workers, max_memory_bytes=max_memory_bytes,
            progress=told, verifier=verified if verify else None, check_source=check_source,
        )  # fmt: skip


def _verified(plan: ConversionPlan, folder: Path, bar: Bar) -> Mapping[str, Any]:
    """Compare, and write the card of proof where others can repeat it from the source as it is stored."""
    from smolconv.layouts.layout import ReadOptions
    from smolconv.verification.compare import CONVERSION_POSITIONS, AsStored, VerifyOptions, verify_conversion

    options = plan.options
    as_stored = plan.prepared.parameters == plan.source.parameters and plan.prepared.spec == plan.source.spec
    read = ReadOptions(
        config=options.config, step=options.step, architecture=options.architecture, layout=options.source_layout
    )  # fmt: skip
    source = AsStored(folder=plan.source.root, options=read)
    report = verify_conversion(plan.prepared, folder, source=source if as_stored else None, bar=bar)
    if not (report.passed and as_stored):
        return {**report.to_json(), "proof": None}
    optimizer = plan.prepared.has_optimizer and plan.prepared.tensors == plan.source.tensors
    if not optimizer:
        report = replace(report, optimizer=None, optimizer_differences=())
    asked = VerifyOptions(optimizer=optimizer, length=CONVERSION_POSITIONS)
    return {**report.to_json(), "proof": _conversion_card(plan, folder, report, asked, bar)}


def _conversion_card(
    plan: ConversionPlan, folder: Path, report: VerifyReport, asked: VerifyOptions, bar: Bar
) -> str | None:
    """The card's name, written into ``folder``; None where ``verify`` would read another model on either side.

    It has no ``--step``, ``--base`` or ``--rope-scaling``.
    """
    from smolconv.layouts.layout import ReadOptions
    from smolconv.layouts.registry import read_checkpoint
    from smolconv.storage.manifest import PROOF
    from smolconv.verification.proof import reading_words, write_proof

    options, source = plan.options, plan.source
    read = ReadOptions(config=options.config, architecture=options.architecture, layout=options.source_layout)
    try:
        again = read_checkpoint(source.root, read)
    except BadCheckpoint:
        return None
    written = read_checkpoint(folder)
    if (again.spec, again.parameters) != (source.spec, source.parameters) or written.spec != source.spec:
        return None
    words = reading_words((options.source_layout, None), (options.config, None), options.architecture)
    card = _card(report, asked, (source, written), (plan.uri, plan.target), bar, words)
    write_proof(card, folder / PROOF)
    return PROOF


def convert(
    source: Source, target: Source, *, to: str, verify: bool = False, resume: bool = False, overwrite: bool = False,
    workers: int | None = None, max_memory_bytes: int | None = None, check_source: bool = False, bar: Bar = no_bar,
    **options: Any,
) -> ConversionResult:  # fmt: skip
    """Convert a checkpoint: ``plan_conversion`` and ``run_conversion``, which document the arguments."""
    return run_conversion(
        plan_conversion(source, target, to=to, **options), verify=verify, resume=resume, overwrite=overwrite,
        workers=workers, max_memory_bytes=max_memory_bytes, check_source=check_source, bar=bar,
    )  # fmt: skip


def verify(
    a: Source, b: Source, *, logits: bool = True, optimizer: bool = False, layout_a: str | None = None,
    layout_b: str | None = None, config: Source | None = None, config_b: Source | None = None,
    architecture: str | None = None, text: Source | None = None, tokens: Source | None = None,
    length: int = 2048, documents: int = 1, compute: str = "float32", device: str = "cpu",
    engine: str = "ours", gates: Mapping[str, float | None] = MappingProxyType({}), proof: Source | None = None,
    bar: Bar = no_bar,
) -> VerifyReport:  # fmt: skip
    """Compare two checkpoints: spec, tensors bit for bit, and logits of two independent forward passes.

    The report's ``passed`` is the verdict, ``reason`` explains it, and ``first_divergence`` names the first module that
    differs; ``to_json()`` is what ``smolconv verify --json`` prints. ``logits=False`` needs no torch. ``gates``: the
    largest ``max_abs`` and ``kl`` and the smallest ``top1`` that pass, instead of gates from the noise floor.
    ``proof``: a file to write the card of docs/proof.md to. Other arguments are the command's options.

    Raises ``NotInstalled`` without torch or transformers, ``UsageError``, ``BadCheckpoint`` or a subclass.
    """
    from smolconv.verification.compare import VerifyOptions

    if proof is not None and (text is not None or tokens is not None):
        raise UsageError(
            "a proof uses the text that ships with smolconv, so that others can repeat it.\n"
            "Leave out --text and --tokens."
        )
    if unknown := gates.keys() - _GATES:
        raise UsageError(f"there is no gate {min(unknown)!r} to set; there are {', '.join(_GATES)}.")
    if proof is not None:
        require_place("--proof", Path(proof))
    options = VerifyOptions(
        logits=logits, optimizer=optimizer, text=None if text is None else Path(text),
        tokens=None if tokens is None else Path(tokens), length=length, documents=documents,
        compute=DTYPE_WORDS.get(compute, compute), device=device, engine=engine,
        gates={**dict.fromkeys(_GATES), **gates},
    )  # fmt: skip
    report, sides = _compared(
        a, b, options, layouts=(layout_a, layout_b), configs=(config, config_b), architecture=architecture, bar=bar
    )  # fmt: skip
    if proof is not None:
        from smolconv.verification.proof import reading_words, write_proof

        words = reading_words((layout_a, layout_b), (config, config_b), architecture)
        card = _card(report, options, sides, (a, b), bar, words)
        write_proof(card, Path(proof))
    return report


def _compared(
    a: Source, b: Source, options: VerifyOptions, *, layouts: tuple[str | None, str | None],
    configs: tuple[Source | None, Source | None], architecture: str | None, bar: Bar,
) -> tuple[VerifyReport, tuple[Checkpoint, Checkpoint]]:  # fmt: skip
    from smolconv.hub.download import open_source
    from smolconv.layouts.layout import ReadOptions
    from smolconv.layouts.registry import read_checkpoint
    from smolconv.verification.compare import AsStored, verify_checkpoints

    if options.logits:
        from smolconv.verification.logits import require_device, require_torch

        require_torch()
        require_device(options.device)
    at = []
    for uri, override, layout in zip((a, b), configs, layouts):
        path = None if override is None else Path(override)
        with_adam = options.optimizer or options.engine == "deepspeed"
        read = ReadOptions(config=path, layout=layout, architecture=architecture, optimizer=with_adam)
        at.append(AsStored(folder=open_source(fspath(uri), layout=layout, config=path), options=read))
    left, right = (read_checkpoint(side.folder, side.options) for side in at)
    return verify_checkpoints(left, right, options, stored=(at[0], at[1]), bar=bar), (left, right)


def _card(
    report: VerifyReport, options: VerifyOptions, sides: tuple[Checkpoint, Checkpoint], uris: tuple[Source, Source],
    bar: Bar, words: Sequence[str] = (),
) -> Proof:  # fmt: skip
    from smolconv.hub.address import is_hub_uri
    from smolconv.verification.proof import make_proof

    names = [uri if is_hub_uri(uri := fspath(given)) else Path(uri).resolve().name for given in uris]
    sets = [each.tensors.values() if options.optimizer else [each.parameters] for each in sides]
    with bar("digests of the tensors", sum(len(found) for side in sets for found in side)) as advance:
        return make_proof(report, options, sides, names, words=words, advance=advance)


@dataclass(frozen=True, kw_only=True)
class ProofCheck:
    """Whether a card holds for two checkpoints.

    ``differences`` are its contradictions and what was found to be different. ``weaknesses`` is what a reader should
    know of a card that holds: limits that were asked for, a tier that was left out.
    """

    differences: tuple[str, ...]
    weaknesses: tuple[str, ...]
    report: VerifyReport

    @property
    def holds(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1, "holds": self.holds, "differences": list(self.differences),
            "weaknesses": list(self.weaknesses), "report": self.report.to_json(),
        }  # fmt: skip


def check_proof(
    proof: Source, a: Source, b: Source, *, layout_a: str | None = None, layout_b: str | None = None,
    config: Source | None = None, config_b: Source | None = None, architecture: str | None = None,
    device: str = "cpu", bar: Bar = no_bar,
) -> ProofCheck:  # fmt: skip
    """Repeat a card's verification with the card's options, and compare the results.

    Raises ``CorruptFile`` if it is not a card, and what ``verify`` raises.
    """
    from smolconv.verification.compare import VerifyOptions
    from smolconv.verification.proof import read_proof
    from smolconv.verification.proof_check import differences, doubts, weaknesses

    card = read_proof(Path(proof))
    asked = card.options
    options = VerifyOptions(
        logits=asked.logits, optimizer=asked.optimizer, length=asked.length, documents=asked.documents,
        compute=asked.compute, engine=asked.engine, device=device,
        gates={name: asked.gates.get(name) for name in _GATES},
    )  # fmt: skip
    report, sides = _compared(
        a, b, options, layouts=(layout_a, layout_b), configs=(config, config_b), architecture=architecture, bar=bar
    )  # fmt: skip
    again = _card(report, options, sides, (a, b), bar)
    found = (*doubts(card), *differences(card, again))
    return ProofCheck(differences=found, weaknesses=tuple(weaknesses(card)), report=report)


def evaluate(checkpoints: Sequence[Source], *, bar: Bar = no_bar, **options: Any) -> Evaluation:
    """Measure checkpoints of any layout on tasks and held-out tokens, and compare each with the first.

    ``options`` are the fields of ``EvaluateOptions`` in ``smolconv.continual_pretraining.evaluation.evaluate``:
    ``tasks`` (names, run by lm-eval), ``held_out`` (folders of token files), ``limit`` and so on. The result's
    ``to_json()`` is what ``smolconv evaluate --json`` prints.
    """
    from smolconv.continual_pretraining.evaluation.evaluate import EvaluateOptions
    from smolconv.continual_pretraining.evaluation.evaluate import evaluate as measure

    known = {each.name for each in fields(EvaluateOptions)}
    for name in options.keys() - known:
        near = get_close_matches(name, known, 1)
        raise UsageError(f"evaluate has no option {name!r}." + (f" Is it {near[0]!r}?" if near else ""))
    for name in ("held_out", "tasks"):
        if isinstance(options.get(name), (str, PathLike)):
            raise UsageError(f"{name} is a list, not one name: {options[name]!r}.")
    options["held_out"] = [Path(each) for each in options.get("held_out", ())]
    if isinstance(options.get("dtype"), str):
        options["dtype"] = DTYPE_WORDS.get(options["dtype"], options["dtype"])
    given = EvaluateOptions(**options)
    if given.device != "cpu":
        from smolconv.verification.logits import require_device

        require_device(given.device)
    return measure([fspath(each) for each in checkpoints], given, bar)


def on_progress(callback: Callable[[str, int, int], object]) -> Bar:
    """Make a ``bar`` that calls ``callback`` with the title, the amount done and the total.

    The unit is bytes for a conversion, and steps of a forward pass for ``verify`` and ``evaluate``. The callback may be
    called from writing threads, one at a time; an exception from it ends the work.
    """

    @contextmanager
    def told(title: str, total: int) -> Iterator[Callable[[int], None]]:
        done, lock = 0, Lock()

        def advance(more: int) -> None:
            nonlocal done
            with lock:
                done += more
                callback(title, done, total)

        yield advance

    return told
