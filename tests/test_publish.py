"""What ``smolconv publish`` uploads, by the real client of the Hub against a local one, and what it refuses.

The client reads HF_ENDPOINT when it is imported, so one other process runs all commands.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import NamedTuple

import pytest
import yaml
from conftest import FIXTURES
from fake_hub import FakeHub

from smolconv.continual_pretraining.run.card import facts_of_run
from smolconv.errors import CorruptFile, UsageError
from smolconv.hub.card import _FRONT, CardFacts, TaskResult, Training, compose
from smolconv.layouts.layout import plain_text, repository_of

HF = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf"
TINY = FIXTURES / "nanotron" / "smollm2-tiny" / "tp2-pp1-dp2-zero1"
OTHER = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
TOKEN = "hf_fake"

SERVER = """
import contextlib, io, json, sys
from smolconv.commands.main import main
replies = sys.stdout
for line in sys.stdin:
    sys.argv = ["smolconv", *json.loads(line)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code or 0, out.getvalue(), err.getvalue()]), file=replies, flush=True)
"""


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Publisher:
    def __init__(self, hub: FakeHub, home: Path) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self.hub = hub
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], env={**clean, **settings}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def __call__(self, *words: object) -> Done:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        self.process.stdin.flush()
        done = Done(*json.loads(self.process.stdout.readline()))
        assert TOKEN not in done.stdout + done.stderr
        return done

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        there = self.hub.repositories[repo]
        return there.commits[there.branches[branch]]


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    with FakeHub() as hub:
        made = Publisher(hub, tmp_path_factory.mktemp("home"))
        yield made
        made.process.communicate(timeout=20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = Path(copytree(HF, tmp_path / "private-folder"))
    (made / "modeling_own.py").write_text("print('code')")
    (made / ".env").write_text("SECRET=1")
    return made


def metadata(card: bytes) -> dict[str, object]:
    found = yaml.safe_load(card.decode().split("---")[1])
    assert isinstance(found, dict)
    return found


def test_a_verified_folder_is_published_with_a_card_without_a_path_and_read_again(
    publisher: Publisher, folder: Path, tmp_path: Path
) -> None:
    done = publisher("publish", folder, "team/tiny", "--source", TINY, "--licence", "mit", "--private", "--json")
    assert done.code == 0, done.stderr
    said, files = json.loads(done.stdout), publisher.files("team/tiny")
    card = files["README.md"].decode()
    assert said["licence"] == "mit" and metadata(files["README.md"])["license"] == "mit"
    assert publisher.hub.repositories["team/tiny"].private
    assert "# tiny" in card and "tp2-pp1-dp2-zero1" in card and said["verified"].split(": ")[1].split(". ")[0] in card
    assert str(tmp_path) not in card and str(FIXTURES) not in card
    assert files["model.safetensors"] == (HF / "model.safetensors").read_bytes()
    assert not {"modeling_own.py", ".env"} & set(files) and "modeling_own.py" in said["warnings"][0]
    again = publisher("verify", "hf://team/tiny", TINY, "--tensors-only")
    assert again.code == 0, again.stderr

    # A branch that does not exist is made, code travels where that is asked for, main stays as it is.
    words = ("--revision", "step-7", "--with-code", "--json")
    done = publisher("publish", folder, "team/tiny", "--source", TINY, *words)
    assert done.code == 0 and "modeling_own.py" in publisher.files("team/tiny", "step-7"), done.stderr
    assert "modeling_own.py" not in publisher.files("team/tiny")
    assert metadata(publisher.files("team/tiny", "step-7")["README.md"])["license"] == "mit"  # of the branch's start


def test_a_pushed_conversions_digests_hold_where_it_is_fetched_and_no_file_names_its_path(
    publisher: Publisher, tmp_path: Path
) -> None:
    done = publisher("convert", TINY, tmp_path / "hf", "--to", "hf", "--no-optimizer", "--push", "team/pushed")
    assert done.code == 0, done.stderr
    files = publisher.files("team/pushed")
    assert not [
        name for name, data in files.items() if str(FIXTURES).encode() in data or str(tmp_path).encode() in data
    ]
    checked = publisher("inspect", "--check", "hf://team/pushed")
    assert checked.code == 0, checked.stderr
    changed = bytearray(files["model.safetensors"])
    changed[-1] ^= 1
    publisher.hub.commit("team/changed", {**files, "model.safetensors": bytes(changed)})
    assert publisher("inspect", "--check", "hf://team/changed").code == 3


def test_what_is_not_verified_is_not_uploaded(publisher: Publisher, folder: Path) -> None:
    unverified = publisher("publish", folder, "team/none")
    assert unverified.code == 2 and "--source" in unverified.stderr
    other = publisher("publish", folder, "team/none", "--source", OTHER)
    assert other.code == 1 and "Nothing was uploaded" in other.stderr
    for words in (("--licence", "my: own"), ("--revision", "a..b")):
        assert publisher("publish", folder, "team/none", "--source", TINY, *words).code == 2
    assert publisher("publish", folder / "nowhere", "team/none", "--source", TINY).code == 2
    assert "team/none" not in publisher.hub.repositories


def test_a_card_of_proof_goes_up_and_is_believed_for_its_own_weights_only(publisher: Publisher, folder: Path) -> None:
    done = publisher("publish", folder, "lab/proof", "--source", TINY)
    assert done.code == 0, done.stderr
    there = publisher.files("lab/proof")
    (folder / "smolconv_proof.json").write_bytes(there["smolconv_proof.json"])
    assert str(TINY.parent).encode() not in there["smolconv_proof.json"]
    fetched = publisher("verify", TINY, "hf://lab/proof", "--check-proof", folder / "smolconv_proof.json")
    assert fetched.code == 0 and "PROOF HOLDS" in fetched.stdout, fetched.stderr
    again = publisher("publish", folder, "lab/by-card")
    assert again.code == 0 and f"compared the weights with {TINY.name}" in again.stderr, again.stderr

    weights = folder / "model.safetensors"
    whole, damaged = weights.read_bytes(), bytearray(weights.read_bytes())
    damaged[-3] ^= 0x40
    weights.write_bytes(damaged)
    refused = publisher("publish", folder, "lab/changed")
    assert refused.code == 1 and "1 tensor other than on the card" in refused.stderr
    weights.write_bytes(whole)
    card = json.loads(there["smolconv_proof.json"])
    (folder / "smolconv_proof.json").write_text(json.dumps({**card, "spec_differences": ["x"]}))
    refused = publisher("publish", folder, "lab/changed")
    assert refused.code == 1 and "its numbers show the opposite" in refused.stderr
    assert "lab/changed" not in publisher.hub.repositories


def test_an_upload_that_breaks_off_leaves_no_commit_and_is_made_up_for(publisher: Publisher, folder: Path) -> None:
    publisher.hub.fail("POST /api/models/team/broken/commit", status=500)
    broken = publisher("publish", folder, "team/broken", "--source", TINY)
    assert broken.code == 4 and "Traceback" not in broken.stderr
    assert set(publisher.files("team/broken")) == {".gitattributes"}
    publisher.hub.failures.clear()
    done = publisher("publish", folder, "team/broken", "--source", TINY)
    assert done.code == 0 and "licence" in done.stderr
    assert "license" not in metadata(publisher.files("team/broken")["README.md"])


def test_a_public_repository_is_not_taken_for_a_private_one(publisher: Publisher, folder: Path) -> None:
    sha = publisher.hub.commit("team/public", {"README.md": b"mine"})
    done = publisher("publish", folder, "team/public", "--source", TINY, "--private")
    assert done.code == 2 and "public" in done.stderr
    assert publisher.hub.repositories["team/public"].branches["main"] == sha


def test_what_people_wrote_in_the_repositorys_card_stays(publisher: Publisher, folder: Path) -> None:
    theirs = "---\nlicense: other\nlicense_name: ours\ntags:\n- law\n---\n# My model\n\nBy hand.\n"
    publisher.hub.commit("team/written", {"README.md": theirs.encode(), "notes.txt": b"kept"})
    for _ in range(2):  # again: our section is replaced, not repeated
        assert publisher("publish", folder, "team/written", "--source", TINY).code == 0
    card = publisher.files("team/written")["README.md"]
    assert card.decode().count("How these weights were made") == 1 and b"# My model\n\nBy hand.\n" in card
    assert metadata(card)["tags"] == ["law", "smolconv"]
    assert (metadata(card)["license"], metadata(card)["license_name"]) == ("other", "ours")
    assert publisher.files("team/written")["notes.txt"] == b"kept"


FACTS = CardFacts(title="A model", verified="equal bit for bit.")
MIT = b"---\nlicense: mit\n---\n# Source\n"


def test_a_licence_is_carried_or_given_and_never_invented() -> None:
    none = compose(FACTS, None, None)
    assert none.licence is None and "license" not in metadata(none.card) and b"None was given" in none.card
    carried = compose(CardFacts(title="A", verified="yes", source_card=MIT), None, None)
    assert carried.licence == "mit" and b"# Source" not in carried.card
    given = compose(CardFacts(title="A", verified="yes", licence="apache-2.0"), MIT, None)
    assert given.licence == "apache-2.0" and b"# Source" in given.card
    for wrong in ("", "MIT License", "mit\nx: y", "a" * 80):
        with pytest.raises(UsageError):
            compose(CardFacts(title="A", verified="yes", licence=wrong), None, None)


@pytest.mark.parametrize("front", ["a: [", "&a [*a]", "1: 2", "self: 1\nlicense: mit", "- list"])
def test_metadata_that_cannot_be_read_is_refused(front: str) -> None:
    with pytest.raises(CorruptFile, match=r"README\.md"):
        compose(FACTS, f"---\n{front}\n---\ntext".encode(), None)


HOSTILE = "x\n---\nlicense: mit\n# <script>|[a](http://b)`<!-- smolconv: end -->"


def test_names_from_files_cannot_add_markdown_or_metadata() -> None:
    training = Training(
        recipe=HOSTILE, source=f"folder/{HOSTILE}", stages=((HOSTILE, ((HOSTILE, 1.0),)),), steps=3, tokens=12,
        sequence_length=4, schedule="none.", losses=((1, 2.5),), evaluations=((HOSTILE, 3.0, 2.0),),
        tasks=(TaskResult(task=HOSTILE, metric=HOSTILE, value=0.5),), task_engine=HOSTILE,
    )  # fmt: skip
    facts = CardFacts(title=HOSTILE, verified=HOSTILE, base_model="team/base", training=training)
    once = compose(facts, None, None)
    front, text = _FRONT.match(once.card.decode()), once.card.decode().split("\n---\n", 1)[1]
    assert front is not None
    assert once.licence is None and set(yaml.safe_load(front[1])) == {
        "base_model", "library_name", "model-index", "tags"
    }  # fmt: skip
    assert "<script>" not in text and "[a](" not in text and "\nlicense" not in text
    assert text.count("<!-- smolconv: end -->") == 1
    assert compose(facts, once.card, None).card == compose(facts, once.card, once.card).card == once.card
    assert plain_text("a" * 200) == "a" * 117 + "..."


def test_a_runs_card_tells_data_schedule_and_losses(tmp_path: Path) -> None:
    facts = facts_of_run(FIXTURES / "run" / "run", "law", "yes")
    assert facts.training is not None
    card = compose(facts, None, None).card.decode()
    recipe = yaml.safe_load((FIXTURES / "run/run/recipe.resolved.yaml").read_text())
    lines = (FIXTURES / "run/run/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (
        f"{last['step']:,} steps, {last['tokens']:,} tokens" in card
        and f"| {last['step']} | {last['loss']:.4f} |" in card
    )
    for stage in recipe["data"]["stages"]:
        assert all(plain_text(source["path"].rstrip("/").split("/")[-1]) in card for source in stage["sources"])
    assert f"peak {recipe['schedule']['peak_lr']:g}" in card
    assert not [path for stage in recipe["data"]["stages"] for path in (each["path"] for each in stage["sources"])
                if "/" in path and path in card]  # fmt: skip


def run_with_tasks(folder: Path, tasks: object) -> Path:
    """The run of the fixtures, with results on the checkpoint of its last step as ``smolconv evaluate -o`` writes them."""
    run = Path(copytree(FIXTURES / "run" / "run", folder / "run"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    (run / "evaluations").mkdir()
    document = {"schema": 1, "engine": "lm-eval", "checkpoints": [{"name": "step", "tasks": tasks}]}
    (run / "evaluations" / f"step-{last}.json").write_text(json.dumps(document))
    return run


ARC = {"acc": 0.4375, "acc_norm": 0.5, "stderr": {"acc": 0.0884}, "samples": 2376}


def test_results_of_tasks_are_a_table_and_metadata_that_the_hubs_client_reads(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = compose(facts_of_run(run_with_tasks(tmp_path, {"arc_easy": ARC}), "law", "yes"), None, None).card.decode()
    assert "**Tasks** by lm-eval" in card
    assert "| arc\\_easy | acc | 0.4375 | 0.0884 | 2,376 |" in card
    assert "| arc\\_easy | acc\\_norm | 0.5000 |  | 2,376 |" in card
    data = ModelCard(card).data
    assert data.model_name == "law"
    assert [(each.dataset_name, each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("arc_easy", "acc", 0.4375), ("arc_easy", "acc_norm", 0.5),
    ]  # fmt: skip


def test_a_checkpoint_that_was_not_evaluated_has_no_results_of_another_one(tmp_path: Path) -> None:
    run = run_with_tasks(tmp_path, {"arc_easy": ARC})
    (results,) = (run / "evaluations").iterdir()
    results.rename(results.with_name("step-1.json"))
    card = compose(facts_of_run(run, "law", "yes"), None, None).card
    assert b"arc" not in card and "model-index" not in metadata(card)


def test_results_that_others_wrote_stay_and_ours_are_those_of_the_weights(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    theirs = {"task": {"type": "text-generation"}, "dataset": {"name": "Bench", "type": "bench"},
              "metrics": [{"type": "acc", "value": 0.3}]}  # fmt: skip
    written = f"---\n{yaml.safe_dump({'model-index': [{'name': 'mine', 'results': [theirs]}]})}---\ntext\n".encode()
    facts = facts_of_run(run_with_tasks(tmp_path, {"arc_easy": ARC}), "law", "yes")

    def results(card: bytes) -> list[str]:
        found = ModelCard(card.decode()).data
        assert found.model_name == "mine"
        return [each.dataset_name for each in found.eval_results]

    once = compose(facts, None, written).card
    assert results(once) == ["Bench", "arc_easy", "arc_easy"]
    assert compose(facts, None, once).card == once
    assert results(compose(FACTS, None, once).card) == ["Bench"]  # other weights, which nobody evaluated


def test_results_that_cannot_be_read_are_refused_by_the_name_of_their_file(tmp_path: Path) -> None:
    for number, tasks in enumerate((["acc"], {"arc": [1]}, {"arc": {"acc": 1, "stderr": [2]}})):
        run = run_with_tasks(tmp_path / str(number), tasks)
        with pytest.raises(CorruptFile, match=r"step-\d+\.json"):
            facts_of_run(run, "law", "yes")


def test_the_hubs_cache_names_the_repository() -> None:
    assert repository_of(Path("/h/models--team--a-b/snapshots/0f")) == "team/a-b"
    assert repository_of(Path("/h/models--team--a-b")) is None
