"""The card of a verification: it holds for the same two checkpoints, and anything that was changed is noticed."""

from __future__ import annotations

import json
import os
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
from smolconv.verification.proof import PROOF_SCHEMA, Proof, proof_schema, read_proof
from smolconv.verification.proof_check import differences, doubts, weaknesses

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


@pytest.fixture(scope="module")
def again(card: Path) -> Proof:
    """What another process found of the same two checkpoints."""
    done = run_cli("verify", NANOTRON, HF, "--length", "32", "--proof", card.parent / "again.json")
    assert done.code == 0, done.stderr
    return read_proof(card.parent / "again.json")


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


def gates(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document["logits"]["gates"]
    return found


#: What the card says against itself: noticed without the checkpoints.
CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a digest": (lambda d: d["b"]["tensors"][Q].update(sha256="0" * 64), "1 have other digests, first " + Q),
    "a shape": (lambda d: d["a"]["tensors"][Q].update(shape=[32, 128]), "1 have other digests"),
    "a verdict": (lambda d: d.update(passed=False), "numbers show the opposite"),
    "a gate's verdict": (lambda d: gates(d)["kl"].update(passed=False), "gate kl is called failed"),
    "a value over its limit": (lambda d: gates(d)["max_abs"].update(value=9.0), "gate max_abs is called passed"),
    "a value that is not the figure": (lambda d: gates(d)["max_abs"].update(value=0.0), "gate max_abs has 0.0, and max_abs is"),
    "a figure": (lambda d: d["logits"].update(kl_mean=1e-3), "and kl_mean is 0.001"),
    "a mean over the largest": (lambda d: d["logits"].update(mean_abs=1.0), "mean_abs is 1, more than max_abs"),
    "no gates": (lambda d: gates(d).clear(), "it has no gate max_abs, kl, top1"),
    "a gate left out": (lambda d: gates(d).pop("kl"), "it has no gate kl"),
    "a limit that was not asked for": (lambda d: d["options"]["gates"].update(kl=1.0), "and 1 was asked for"),
    "logits left out": (lambda d: d.update(logits=None), "the card has none"),
    "logits that were not asked for": (lambda d: d["options"].update(logits=False), "logits were not to be compared"),
    "the count of tensors": (lambda d: d["tensors"].update(compared=1, equal=1), "1 tensors are called compared"),
    "the count of equal ones": (lambda d: d["tensors"].update(equal=73), "73 tensors are called equal"),
    "an empty side": (lambda d: (d["a"]["tensors"].clear(), d["tensors"].update(compared=0, equal=0)), "it lists no tensors"),
    "a tensor of one side": (lambda d: (d["a"]["tensors"].pop(Q), d["tensors"].update(compared=73, equal=73)), "missing or unexpected"),
    "a tensor called missing": (lambda d: d["tensors"].update(missing=["x"]), "missing or unexpected"),
    "Adam's state": (lambda d: d["a"]["optimizer"].update(exp_avg={}), "tensors of Adam"),
    "the command": (lambda d: d.update(command=d["command"].replace("32", "2048")), "does not follow"),
    "more words": (lambda d: d.update(command=d["command"] + " --gate-kl 1"), "does not follow"),
    "the length": (lambda d: d["options"].update(length=64), "does not follow"),
    "a name": (lambda d: d["b"].update(name="hf://HuggingFaceTB/SmolLM3-3B"), "does not follow"),
}  # fmt: skip
#: What only the checkpoints tell.
LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "both digests": (lambda d: [d[side]["tensors"][Q].update(sha256="0" * 64) for side in "ab"], "other than on the card"),
    "a tensor left out of both": (
        lambda d: ([d[side]["tensors"].pop(Q) for side in "ab"], d["tensors"].update(compared=73, equal=73)),
        "other than on the card",
    ),
    "a looser limit": (lambda d: gates(d)["max_abs"].update(limit=1.0), "limit of max_abs is 1 on the card"),
    "a looser share": (lambda d: gates(d)["top1"].update(limit=0.5), "limit of top1 is 0.5 on the card"),
    "a gate that is not there": (lambda d: gates(d).update(nll=gates(d)["kl"]), "gate nll is only on the card"),
    "an NLL": (lambda d: d["logits"].update(nll_b=1.0), "nll_b is 1.0 on the card"),
    "a figure in both places": (
        lambda d: (d["logits"].update(kl_mean=-1.0), gates(d)["kl"].update(value=-1.0)), "kl_mean is -1.0 on the card",
    ),
    "a noise floor": (lambda d: d["logits"]["noise_floor"].update(max_abs=0.5), "noise_floor.max_abs is 0.5"),
    "no noise floor": (lambda d: d["logits"]["noise_floor"].clear(), "noise_floor.max_abs is None"),
    "top-1": (lambda d: d["logits"].update(top1_agreement=0.5), "top1_agreement is 0.5 on the card"),
    "the forward passes": (lambda d: d["logits"].update(forwards=["nanotron", "nanotron"]), "the forward passes were nanotron"),
    "a layout": (lambda d: d["a"].update(layout="deepspeed"), "A: nanotron here, and deepspeed on the card"),
    "a field of the spec": (lambda d: [d[side]["spec"].update(rope_theta=1.0) for side in "ab"], "rope_theta is"),
    "the architecture": (lambda d: [d[side]["spec"].update(architecture="llama") for side in "ab"], "'smollm3' here"),
    "swapped sides": (lambda d: d.update(a=d["b"], b=d["a"]), "A: nanotron here"),
    "positions": (lambda d: d["logits"].update(positions=2048), "of 2048 positions"),
    "the text": (lambda d: d["logits"].update(tokens_from="a novel"), "positions of a novel"),
    "the reason": (lambda d: d.update(reason="the model is good"), "the card's reason is 'the model is good'"),
    "logits left out in both places": (
        lambda d: (d.update(logits=None), d.update(reason="logits left out: not finite")), "logits are not on the card",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_card_that_contradicts_itself_is_doubted_without_the_checkpoints(
    card: Path, tmp_path: Path, name: str
) -> None:
    edit, says = CONTRADICTIONS[name]
    found = doubts(read_proof(changed(card, tmp_path, edit)))
    assert any(says in each for each in found), found


@pytest.mark.parametrize("name", LIES)
def test_a_card_that_lies_is_found_by_repeating_it(card: Path, tmp_path: Path, again: Proof, name: str) -> None:
    edit, says = LIES[name]
    found = differences(read_proof(changed(card, tmp_path, edit)), again)
    assert any(says in each for each in found), found


def test_the_card_itself_has_neither(card: Path, again: Proof) -> None:
    proof = read_proof(card)
    assert (doubts(proof), differences(proof, again), weaknesses(proof)) == ([], [], [])


def test_a_tampered_card_fails_the_command(card: Path, tmp_path: Path) -> None:
    lied = changed(card, tmp_path, LIES["both digests"][0])
    done = run_cli("verify", NANOTRON, HF, "--check-proof", lied)
    assert done.code == 1 and "other than on the card" in done.stdout and "PROOF DOES NOT HOLD" in done.stdout


def test_limits_that_were_asked_for_and_logits_left_out_are_told(tmp_path: Path) -> None:
    path = tmp_path / "proof.json"
    wide = ["--gate-max-abs", "1", "--gate-top1", "0.5"]
    assert run_cli("verify", NANOTRON, HF, "--length", "32", *wide, "--proof", path).code == 0
    done = run_cli("verify", NANOTRON, HF, "--check-proof", path)
    assert done.code == 0 and "the limit of max_abs is 1 because it was asked for" in done.stdout, done.stdout
    assert "--gate-max-abs 1 --gate-top1 0.5" in read_proof(path).command
    assert run_cli("verify", NANOTRON, HF, "--tensors-only", "--proof", path).code == 0
    found = smolconv.check_proof(path, NANOTRON, HF)
    assert found.holds and found.weaknesses == ("logits were not compared",)


def test_a_config_that_was_given_is_on_the_card(tmp_path: Path) -> None:
    """Both are read with another theta: only with that config the card holds."""
    document = json.loads((HF / "config.json").read_text())
    document["rope_theta"] = 12345.0
    document.get("rope_parameters", {}).update(rope_theta=12345.0)
    (tmp_path / "other.json").write_text(json.dumps(document))
    config = tmp_path / "other.json"
    smolconv.verify(HF, HF, config=config, config_b=config, length=32, proof=tmp_path / "proof.json")
    proof = read_proof(tmp_path / "proof.json")
    assert proof.command.endswith("--config other.json --config-b other.json")
    assert proof.a.spec["rope_theta"] == 12345.0
    assert smolconv.check_proof(tmp_path / "proof.json", HF, HF, config=config, config_b=config).holds
    assert any("rope_theta" in each for each in check(tmp_path / "proof.json", HF, HF))


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
    assert any("numbers show the opposite" in each for each in check(lied, HF, other))


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
        ('{"schema": 1, "schema": 1}', "a name occurs twice"), ('{"schema": 1}', "made"), ('{"schema": 1, "made": NaN}', "not valid JSON"), ("[" * 3000, "not valid JSON"),
    ],
    ids=["list", "cut", "version", "empty", "twice", "fields", "nan", "brackets"],
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
        lambda d: d.update(more=1), lambda d: d["options"]["gates"].update(nonsense=1.0), lambda d: d["logits"]["gates"]["kl"].update(limit="0"), lambda d: d.update(a=[]),
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


def test_a_folder_whose_name_is_no_text_has_a_card_and_a_report(tmp_path: Path) -> None:
    named = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"hf\xff")))
    shutil.copytree(HF, named)
    card = tmp_path / "card.json"
    words = [HF, named, "--tensors-only", "--proof", card, "--report", tmp_path / "page.html"]
    done = run_cli("verify", *words)
    assert done.code == 0, done.stderr
    assert read_proof(card).b.name == "hf\\udcff"
    assert check(card, HF, named) == ()


def test_the_published_schema_is_the_cards() -> None:
    assert json.loads((REPOSITORY / "docs" / PROOF_SCHEMA).read_text()) == proof_schema()


@pytest.mark.parametrize("to", ["hf", "deepspeed"])
def test_a_conversion_that_was_verified_has_a_card_that_another_process_repeats(tmp_path: Path, to: str) -> None:
    assert run_cli("convert", NANOTRON, tmp_path / "out", "--to", to, "--verify").code == 0
    card = tmp_path / "out" / "smolconv_proof.json"
    proof = read_proof(card)
    assert proof.options.optimizer and proof.command.startswith(f"smolconv verify {NANOTRON.name} out --length 512")
    done = run_cli("verify", NANOTRON, tmp_path / "out", "--check-proof", card)
    assert done.code == 0, done.stdout
    done = run_cli("convert", NANOTRON, tmp_path / "out", "--to", to, "--verify", "--overwrite", "--json")
    assert json.loads(done.stdout)["verification"]["proof"] == card.name, done.stderr  # its own card is no foreign file
    # A card is about one pair of folders: no conversion carries it to another.
    done = run_cli("convert", tmp_path / "out", tmp_path / "next", "--to", "nanotron", "--json")
    assert not (tmp_path / "next" / card.name).exists()
    assert not [each for each in json.loads(done.stdout)["left_out"] if card.name in each]


@pytest.mark.parametrize("options", [["--dtype", "bfloat16"], ["--vocab-size", "250"]], ids=["rounded", "cut"])
def test_a_conversion_that_changes_values_has_none(tmp_path: Path, options: list[str]) -> None:
    done = run_cli("convert", NANOTRON, tmp_path / "out", "--to", "hf", "--verify", "--json", *options)
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["verification"]["proof"] is None
    assert not (tmp_path / "out" / "smolconv_proof.json").exists()


def test_a_source_without_adam_has_a_card_of_its_weights(tmp_path: Path) -> None:
    """DeepSpeed's layout gets moments of zero, which the source has not."""
    done = run_cli("convert", HF, tmp_path / "out", "--to", "deepspeed", "--verify")
    assert done.code == 0, done.stderr
    assert check(tmp_path / "out" / "smolconv_proof.json", HF, tmp_path / "out") == ()
    assert not read_proof(tmp_path / "out" / "smolconv_proof.json").options.optimizer


@pytest.mark.parametrize(("step", "has_one"), [(2, False), (3, True)])
def test_an_earlier_step_has_none_since_verify_reads_the_latest(tmp_path: Path, step: int, has_one: bool) -> None:
    shutil.copytree(NANOTRON, tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "3", tmp_path / "run" / "2")
    done = run_cli(
        "convert", tmp_path / "run", tmp_path / "out", "--to", "hf", "--step", step, "--no-optimizer", "--verify"
    )
    card = tmp_path / "out" / "smolconv_proof.json"
    assert done.code == 0 and card.exists() == has_one, done.stderr
    assert not has_one or check(card, tmp_path / "run", tmp_path / "out") == ()
