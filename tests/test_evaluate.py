"""``smolconv evaluate``: figures equal a computation by hand, layouts agree, and mistakes are told before a model loads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_cli
import numpy as np
import pytest
import torch
from conftest import Finished, convert
from hf_models import llama, saved

from smolconv.continual_pretraining.evaluation.bootstrap import compare
from smolconv.continual_pretraining.evaluation.held_out import open_held_out, token_bytes
from smolconv.continual_pretraining.evaluation.tasks import SHIPPED, plain_task

#: Of hf_models: 64 tokens, 1 ends a document.
_EOS = 1
_DOCUMENTS = [[5, 9, 9, 33, 1], [7, 1], [1], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 1]]


def tokens(folder: Path, documents: list[list[int]], *, index: bool = True, loss: list[int] | None = None) -> Path:
    """A folder as datatrove writes it, by its format alone."""
    folder.mkdir()
    np.array([each for one in documents for each in one], "<u2").tofile(folder / "a.ds")
    if index:
        np.cumsum([len(one) for one in documents]).astype("<u8").tofile(folder / "a.ds.index")
    if loss is not None:
        np.array(loss, "u1").tofile(folder / "a.ds.loss")
    return folder


def by_hand(model: torch.nn.Module, documents: list[list[int]]) -> tuple[float, int]:
    """Nats and predictions, by transformers' whole forward of each document."""
    total, count = 0.0, 0
    for one in documents:
        if len(one) > 1:
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([one]), use_cache=False).logits[0].double()
            total -= float(logits.log_softmax(-1)[torch.arange(len(one) - 1), one[1:]].sum())
            count += len(one) - 1
    return total, count


def evaluate(*words: object) -> Finished:
    return Finished(*forked_cli.run(["evaluate", *map(str, words)], None, torch=True))


def byte_level_tokenizer(folder: Path) -> Any:
    """One of 64 tokens for the tiny models: letters, words and pieces of an umlaut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<|endoftext|>", "<eos>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ã", "¤", "Ċ"]
    merges = [("Ġ", letter) for letter in "abcdefghijklmnop"]
    vocab = {piece: index for index, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<eos>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "model_max_length": 64})
    )
    return made


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return llama()


@pytest.fixture(scope="module")
def folder(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = saved(model, tmp_path_factory.mktemp("hf") / "model")
    byte_level_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def evaluated(folder: Path, model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run over all layouts, a better and a worse model, and a folder without tokenizer."""
    place = tmp_path_factory.mktemp("evaluated")
    for layout in ("nanotron", "deepspeed"):
        convert(folder, place / layout, layout, **({"tp": 2} if layout == "nanotron" else {}))
    with torch.no_grad():
        worse = llama()
        worse.model.embed_tokens.weight.mul_(3)
    saved(worse, place / "worse")
    held_out = tokens(place / "web", _DOCUMENTS)
    names = [str(folder), *(str(place / name) for name in ("nanotron", "deepspeed", "worse"))]
    done = evaluate(*names, "--held-out", held_out, "--json", "-o", place / "out.json")
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    assert json.loads((place / "out.json").read_text()) == document
    return {"document": document, "worse": worse, "stderr": done.stderr}


def test_perplexity_and_bits_per_byte_equal_a_computation_by_hand(
    evaluated: dict[str, Any], folder: Path, model: torch.nn.Module
) -> None:
    from tokenizers import Tokenizer

    found = evaluated["document"]["checkpoints"][0]["held_out"]["web"]
    total, count = by_hand(model, _DOCUMENTS)
    text = Tokenizer.from_file(str(folder / "tokenizer.json"))
    nbytes = sum(len(text.decode(one[1:], skip_special_tokens=True).encode()) for one in _DOCUMENTS)
    assert (found["documents"], found["tokens"], found["bytes"]) == (3, count, nbytes)
    assert found["nll"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / nbytes, rel=1e-5)


def test_every_layout_gives_the_same_figures(evaluated: dict[str, Any]) -> None:
    first, nanotron, deepspeed, _ = evaluated["document"]["checkpoints"]
    assert [each["layout"] for each in (first, nanotron, deepspeed)] == ["huggingface", "nanotron", "deepspeed"]
    for other in (nanotron, deepspeed):
        assert other["held_out"]["web"] == pytest.approx(first["held_out"]["web"], rel=1e-5)


def test_a_worse_checkpoint_is_told_from_an_equal_one(evaluated: dict[str, Any], model: torch.nn.Module) -> None:
    _, same, worse = evaluated["document"]["comparisons"]
    assert same["verdict"] == "no difference shown"
    assert abs(same["difference"]) < 1e-5
    (before, count), (after, _) = by_hand(model, _DOCUMENTS), by_hand(evaluated["worse"], _DOCUMENTS)
    assert worse["difference"] == pytest.approx((after - before) / count, abs=1e-4)
    assert (worse["metric"], worse["documents"]) == ("nll", 3)


def test_bits_per_byte_are_null_without_a_tokenizer_and_a_note_says_so(evaluated: dict[str, Any]) -> None:
    assert evaluated["document"]["checkpoints"][3]["held_out"]["web"]["bits_per_byte"] is None
    assert any("worse has no tokenizer.json" in note for note in evaluated["document"]["notes"])


def test_a_long_document_is_cut_into_stretches_that_see_only_themselves(
    folder: Path, model: torch.nn.Module, tmp_path: Path
) -> None:
    long = [list(range(10, 31))]
    held_out = tokens(tmp_path / "long", long)
    found = json.loads(evaluate(folder, "--held-out", held_out, "--length", 8, "--json").stdout)
    stretches = [long[0][start : start + 9] for start in (0, 8, 16)]
    total, count = by_hand(model, stretches)
    result = found["checkpoints"][0]["held_out"]["long"]
    assert (result["tokens"], count) == (20, 20)
    assert result["nll"] == pytest.approx(total / count, abs=1e-5)
    assert found["comparisons"] == []


def test_documents_are_told_apart_by_eos_where_there_is_no_index(tmp_path: Path) -> None:
    plain = open_held_out(tokens(tmp_path / "plain", _DOCUMENTS, index=False), eos=_EOS, limit=None, seed=0)
    indexed = open_held_out(tokens(tmp_path / "indexed", _DOCUMENTS), eos=None, limit=None, seed=0)
    spans = [[(span.start, span.stop) for span in each.documents] for each in (plain, indexed)]
    assert spans == [[(0, 5), (5, 7), (8, 20)]] * 2


def test_a_limit_draws_the_same_documents_for_a_seed_and_others_for_another(tmp_path: Path) -> None:
    held_out = tokens(tmp_path / "many", [[index % 60, index % 59, _EOS] for index in range(200)])
    drawn = [
        [span.start for span in open_held_out(held_out, eos=None, limit=20, seed=seed).documents] for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert drawn[0] == sorted(drawn[0])


def test_tokens_that_a_loss_mask_leaves_out_are_not_counted(
    folder: Path, model: torch.nn.Module, tmp_path: Path
) -> None:
    held_out = tokens(tmp_path / "masked", [[5, 9, 33, 1]], loss=[1, 0, 1, 1])
    found = json.loads(evaluate(folder, "--held-out", held_out, "--json").stdout)
    all_of, first = by_hand(model, [[5, 9, 33, 1]]), by_hand(model, [[5, 9]])
    result = found["checkpoints"][0]["held_out"]["masked"]
    assert result["tokens"] == 2
    assert result["nll"] == pytest.approx((all_of[0] - first[0]) / 2, abs=1e-5)


def test_bytes_of_a_token_are_those_of_the_text_also_within_a_letter(tmp_path: Path) -> None:
    made = byte_level_tokenizer(tmp_path)
    sizes = token_bytes(tmp_path / "tokenizer.json", 64)
    text = "hallo äb\nä x"
    assert sizes is not None
    assert sum(int(sizes[index]) for index in made.encode(text).ids) == len(text.encode()) == 14
    assert sizes[made.token_to_id("<eos>")] == 0


def test_the_interval_covers_what_paired_documents_say() -> None:
    """1,000 documents of mean 0.1 and deviation 1: the normal approximation of the interval is 0.1 ± 1.96 / sqrt(1000)."""
    drawn = np.random.default_rng(0).normal(0.1, 1.0, 1000)
    drawn += 0.1 - drawn.mean()
    half = 1.96 * drawn.std() / math.sqrt(1000)
    given: dict[str, Any] = {"checkpoint": "b", "against": "a", "on": "x", "metric": "m", "seed": 0}
    found = compare(difference=drawn, higher_is_better=True, **given)
    assert found.difference == pytest.approx(0.1)
    assert found.interval == pytest.approx((0.1 - half, 0.1 + half), abs=0.01)
    assert found.verdict == "better"
    assert compare(difference=drawn, higher_is_better=False, **given).verdict == "worse"
    assert compare(difference=drawn - 0.1, higher_is_better=True, **given).verdict == "no difference shown"
    assert compare(difference=drawn[:1], higher_is_better=True, **given).interval is None


def _mistakes(folder: Path, place: Path) -> dict[str, tuple[list[object], int, str]]:
    good = tokens(place / "good", _DOCUMENTS)
    foreign = tokens(place / "foreign", [[5, 64, 1]])
    bare = tokens(place / "bare", _DOCUMENTS, index=False)
    lone = tokens(place / "lone", [[1], [1]])
    return {
        "nothing": ([folder], 2, "give --tasks NAME, --held-out TOKENS"),
        "include": ([folder, "--tasks", "x", "--include-path", place / "no"], 3, "no such folder"),
        "held-out": ([folder, "--held-out", place / "no"], 3, "is not a folder"),
        "index": ([folder, "--held-out", bare], 2, "Add --eos ID"),
        "short": ([folder, "--held-out", lone], 2, "no document has two tokens or more"),
        "vocabulary": ([folder, "--held-out", foreign], 3, "token 1 is 64, but the model's vocabulary has 64"),
        "checkpoint": ([place / "nowhere", "--held-out", good], 3, "is not there"),
        "output": ([folder, "--held-out", good, "-o", place / "no" / "x.json"], 2, "does not exist"),
        "tokenizer": ([folder, "--held-out", good, "--tokenizer", place / "bare"], 3, "--tokenizer"),
    }


_MISTAKES = ("nothing", "include", "held-out", "index", "short", "vocabulary", "checkpoint", "output", "tokenizer")


@pytest.mark.parametrize("name", _MISTAKES)
def test_a_mistake_ends_with_its_exit_code_and_says_what_to_do(name: str, folder: Path, tmp_path: Path) -> None:
    words, code, said = _mistakes(folder, tmp_path)[name]
    done = evaluate(*words, "--json")
    assert (done.code, json.loads(done.stdout)["error"]["exit_code"]) == (code, code), done.stderr
    assert said in done.stderr


def test_without_lm_eval_the_command_says_how_to_install_it(folder: Path, cli: Callable[..., Finished]) -> None:
    before = "import sys; sys.modules['lm_eval'] = None"
    done = cli("evaluate", folder, "--tasks", "smolconv_cloze", before=before)
    assert done.code == 5, done.stderr
    assert 'pip install "lm-eval' in done.stderr


def test_the_shipped_task_has_one_right_answer_in_every_place() -> None:
    task = plain_task("smolconv_cloze", None)
    assert task is not None
    path = Path(task["dataset_kwargs"]["data_files"]["test"])
    assert path.parent == SHIPPED
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["query"] for row in rows}) == len(rows) == 32
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert [sum(row["gold"] == place for row in rows) for place in range(4)] == [8, 8, 8, 8]


# --- the engines themselves, in environments that have them: make test-evaluate ------------------------------------


@pytest.fixture
def cloze(tmp_path: Path) -> tuple[Path, list[dict[str, Any]]]:
    """A task of lm-eval's form: 40 questions of random letters, which the tiny tokenizer knows."""
    letters = np.random.default_rng(5).integers(0, 26, (40, 20))
    texts = [["".join(chr(97 + each) for each in row[at : at + 4]) for at in range(0, 20, 4)] for row in letters]
    rows = [{"ask": row[0], "say": row[1:], "right": index % 4} for index, row in enumerate(texts)]
    include = tmp_path / "tasks"
    include.mkdir()
    (include / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (include / "letters.yaml").write_text(
        "task: letters\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: ask\ndoc_to_choice: say\ndoc_to_target: right\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return include, rows


def accuracy_by_hand(folder: Path, rows: list[dict[str, Any]]) -> float:
    """By transformers alone: the choice whose tokens have the largest sum of log-probabilities after the question."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    text = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    right = 0
    for row in rows:
        sums = []
        for choice in row["say"]:
            before, ids = text.encode(row["ask"]).ids, text.encode(f"{row['ask']} {choice}").ids
            with torch.inference_mode():
                found = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(found[at - 1, ids[at]]) for at in range(len(before), len(ids))))
        right += int(np.argmax(sums)) == row["right"]
    return right / len(rows)


@pytest.mark.evaluate
@pytest.mark.parametrize("engine", ["lm-eval", "lighteval"])
def test_an_engines_accuracy_equals_a_computation_by_hand_in_every_layout(
    engine: str, folder: Path, cloze: tuple[Path, list[dict[str, Any]]], tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    include, rows = cloze
    convert(folder, tmp_path / "nanotron", "nanotron", tp=2)
    words = ["--tasks", "letters", "--include-path", include, "--engine", engine, "--json"]
    # lighteval gets a folder in either case, and each start of it takes minutes on a machine that is busy.
    first = [folder] if engine == "lm-eval" else []
    done = cli("evaluate", *first, tmp_path / "nanotron", *words)
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    expected = accuracy_by_hand(folder, rows)
    assert 0 < expected < 1
    for each in document["checkpoints"]:
        assert each["tasks"]["letters"]["acc"] == pytest.approx(expected)
        assert each["tasks"]["letters"]["samples"] == 40
        assert each["tasks"]["letters"]["stderr"]["acc"] == pytest.approx(
            math.sqrt(expected * (1 - expected) / 39), rel=1e-6
        )
    assert [each["verdict"] for each in document["comparisons"]] == ["no difference shown"] * len(first)


@pytest.mark.evaluate
def test_a_task_that_nobody_has_is_told_with_names_near_it(folder: Path, cli: Callable[..., Finished]) -> None:
    done = cli("evaluate", folder, "--tasks", "smolconv_kloze,hellaswagg")
    assert done.code == 2, done.stderr
    assert "smolconv_cloze" in done.stderr
