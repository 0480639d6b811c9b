"""The card of a verification: it holds for the same two checkpoints, and anything that was changed is noticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import FIXTURES, convert, environment, files_below, run_cli
from fake_hub import FakeHub
from hf_models import edited

import smolconv
from smolconv.errors import CorruptFile
from smolconv.verification.proof import PROOF_SCHEMA, proof_schema, read_proof

NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
HF = FIXTURES / "nanotron" / "smollm3-tiny" / "expected_hf"
REPOSITORY = Path(__file__).resolve().parent.parent
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nanotron's checkpoint and the folder that nanotron's own converter wrote."""
    path = tmp_path_factory.mktemp("card") / "proof.json"
    done = run_cli("verify", NANOTRON, HF, "--length", "32", "--proof", path)
    assert done.code == 0, done.stderr
    return path


def changed(card: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads(card.read_text())
    edit(document)
    (tmp_path / "changed.json").write_text(json.dumps(document))
    return tmp_path / "changed.json"


def check(card: Path, a: Path = NANOTRON, b: Path = HF) -> tuple[str, ...]:
    return smolconv.check_proof(card, a, b).differences


def test_a_card_holds_for_another_process(card: Path) -> None:
    done = run_cli("verify", NANOTRON, HF, "--check-proof", card, "--json")
    assert done.code == 0 and json.loads(done.stdout)["differences"] == [], done.stderr


def test_digests_are_those_that_sha256_gives_of_the_stored_values(card: Path) -> None:
    from hashlib import sha256

    from safetensors.numpy import load_file

    expected = {name: value for path in HF.glob("model*.safetensors") for name, value in load_file(path).items()}
    found = read_proof(card).b.tensors
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].sha256 == sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def test_no_path_of_this_machine_is_on_the_card(card: Path) -> None:
    text = card.read_text()
    for path in (str(NANOTRON.parent), str(HF.parent), str(Path.home()), str(card.parent), str(REPOSITORY)):
        assert path not in text
    assert NANOTRON.name in text


TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a digest": (lambda d: d["b"]["tensors"][Q].update(sha256="0" * 64), "other than on the card"),
    "both digests": (lambda d: [d[side]["tensors"][Q].update(sha256="0" * 64) for side in "ab"], "other than on the card"),
    "a tensor left out": (lambda d: [d[side]["tensors"].pop(Q) for side in "ab"], "other than on the card"),
    "a shape": (lambda d: d["a"]["tensors"][Q].update(shape=[32, 128]), "other than on the card"),
    "a looser limit": (lambda d: d["logits"]["gates"]["max_abs"].update(limit=1.0), "limit of max_abs is 1 on the card"),
    "a looser share": (lambda d: d["logits"]["gates"]["top1"].update(limit=0.5), "limit of top1 is 0.5 on the card"),
    "a gate left out": (lambda d: d["logits"]["gates"].pop("kl"), "the card has no gate kl"),
    "a verdict": (lambda d: d.update(passed=False), "its numbers show the opposite"),
    "a gate's verdict": (lambda d: d["logits"]["gates"]["kl"].update(passed=False), "gate kl is called failed"),
    "a value over its limit": (lambda d: d["logits"]["gates"]["max_abs"].update(value=9.0), "gate max_abs is called passed"),
    "logits left out": (lambda d: d.update(logits=None), "the card has none"),
    "an NLL": (lambda d: d["logits"].update(nll_b=1.0), "nll_b is 1.0 on the card"),
    "a layout": (lambda d: d["a"].update(layout="deepspeed"), "A is a nanotron checkpoint here"),
    "swapped sides": (lambda d: d.update(a=d["b"], b=d["a"]), "A is a nanotron checkpoint here"),
    "positions": (lambda d: d["logits"].update(positions=2048), "of 2048 positions"),
    "the count of tensors": (lambda d: d["tensors"].update(compared=1, equal=1), "other ones are listed"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERED)
def test_a_card_that_was_tampered_with_does_not_hold(card: Path, tmp_path: Path, name: str) -> None:
    edit, says = TAMPERED[name]
    found = check(changed(card, tmp_path, edit))
    assert any(says in each for each in found), found


def test_a_changed_weight_is_noticed_on_either_side(card: Path, tmp_path: Path) -> None:
    other = edited(HF, tmp_path / "other", lambda tensors: tensors[Q].__setitem__((0, 0), 1e-3 + tensors[Q][0, 0]))
    assert any("B: 1 tensor other than on the card" in each for each in check(card, b=other))
    convert(other, tmp_path / "nanotron", "nanotron", tp=2)
    found = check(card, a=tmp_path / "nanotron", b=other)  # the same model on both sides, and not the card's
    assert any(each.startswith("A: ") for each in found) and any(each.startswith("B: ") for each in found)
    done = run_cli("verify", tmp_path / "nanotron", other, "--check-proof", card)
    assert done.code == 1 and "PROOF DOES NOT HOLD" in done.stdout


def test_a_card_of_a_failure_says_so_and_holds(tmp_path: Path) -> None:
    other = edited(HF, tmp_path / "other", lambda tensors: tensors[Q].neg_())
    done = run_cli("verify", HF, other, "--length", "32", "--proof", tmp_path / "proof.json")
    assert done.code == 1 and not read_proof(tmp_path / "proof.json").passed
    assert check(tmp_path / "proof.json", HF, other) == ()
    lied = changed(tmp_path / "proof.json", tmp_path, lambda d: d.update(passed=True))
    assert any("its numbers show the opposite" in each for each in check(lied, HF, other))


def test_adams_state_is_on_the_card_where_it_was_compared(tmp_path: Path) -> None:
    smolconv.convert(NANOTRON, tmp_path / "hf", to="hf")
    smolconv.verify(NANOTRON, tmp_path / "hf", logits=False, optimizer=True, proof=tmp_path / "proof.json")
    assert set(read_proof(tmp_path / "proof.json").a.optimizer) == {"exp_avg", "exp_avg_sq"}
    assert check(tmp_path / "proof.json", NANOTRON, tmp_path / "hf") == ()
    moved = changed(
        tmp_path / "proof.json", tmp_path, lambda d: d["b"]["optimizer"]["exp_avg"][Q].update(sha256="1" * 64)
    )
    assert any("exp_avg 1 tensor other" in each for each in check(moved, NANOTRON, tmp_path / "hf"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "a JSON object"), ("{", "not valid JSON"), ('{"schema": 2}', "schema is 2"), ("{}", "schema is None"),
        ('{"schema": 1}', "made"), ('{"schema": 1, "made": NaN}', "not valid JSON"), ("[" * 3000, "not valid JSON"),
    ],
    ids=["list", "cut", "version", "empty", "fields", "nan", "brackets"],
)  # fmt: skip
def test_what_is_no_card_is_refused_with_3(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(CorruptFile, match=says):
        read_proof(tmp_path / "card.json")
    done = run_cli("verify", NANOTRON, HF, "--check-proof", tmp_path / "card.json")
    assert done.code == 3, done.stderr


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.update(more=1), lambda d: d["logits"]["gates"]["kl"].update(limit="0"), lambda d: d.update(a=[]),
        lambda d: d["options"].update(length=1 << 40), lambda d: d["options"].update(engine="__import__"),
        lambda d: d["b"]["tensors"][Q].update(sha256="x" * 64), lambda d: d.update(reason="x" * 1_000_000),
    ],
)  # fmt: skip
def test_a_field_that_no_card_has_is_refused(
    card: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    with pytest.raises(CorruptFile, match=r"docs/proof\.md"):
        read_proof(changed(card, tmp_path, edit))


def test_inspect_shows_a_card_and_what_it_says_against_itself(card: Path, tmp_path: Path) -> None:
    shutil.copytree(HF, tmp_path / "hf")
    shutil.copy(card, tmp_path / "hf" / "smolconv_proof.json")
    document = json.loads(run_cli("inspect", tmp_path / "hf", "--json").stdout)
    assert document["proof"]["passed"] is True and document["problems"] == []
    assert "proof" in run_cli("inspect", tmp_path / "hf").stdout
    shutil.copy(changed(card, tmp_path, lambda d: d.update(passed=False)), tmp_path / "hf" / "smolconv_proof.json")
    assert "numbers show the opposite" in smolconv.inspect(tmp_path / "hf")["problems"][0]
    assert smolconv.inspect(HF)["proof"] is None


def test_a_proof_needs_the_text_that_others_have_too(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    done = run_cli("verify", NANOTRON, HF, "--text", tmp_path / "text.txt", "--proof", tmp_path / "proof.json")
    assert done.code == 2 and "others can repeat" in done.stderr and not (tmp_path / "proof.json").exists()
    done = run_cli("verify", NANOTRON, HF, "--proof", tmp_path / "no" / "proof.json")
    assert done.code == 2 and "does not exist" in done.stderr


def test_a_card_is_repeated_from_a_folder_on_the_hub(card: Path, tmp_path: Path) -> None:
    with FakeHub() as hub:
        hub.commit("lab/smol", files_below(HF))
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        done = run_cli("verify", NANOTRON, "hf://lab/smol", "--check-proof", card, env=settings)
        assert done.code == 0 and "PROOF HOLDS" in done.stdout, done.stderr + done.stdout
    assert environment()["HF_HUB_OFFLINE"] == "1"


def test_the_published_schema_is_the_cards() -> None:
    assert json.loads((REPOSITORY / "docs" / PROOF_SCHEMA).read_text()) == proof_schema()
