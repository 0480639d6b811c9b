"""Pages are claims: each block of commands is run or says why it is not, and links lead somewhere.

Before each block of README.md and docs/ stands a comment: ``<!-- run -->``, ``<!-- not run: why -->`` or
``<!-- shown: what -->``, for what is no command. A page's blocks are run in order in one folder, ``PLACES``.
"""

from __future__ import annotations

import functools
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from conftest import FIXTURES, run_cli
from training import recipe_document, token_folder

import smolconv.commands.main  # noqa: F401  (the commands register themselves)
from smolconv.commands.app import app

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = ("README.md", *sorted(str(page.relative_to(REPOSITORY)) for page in (REPOSITORY / "docs").rglob("*.md")))
NANOTRON = FIXTURES / "nanotron" / "smollm3-tiny" / "tp2-pp1-dp2-zero1"
HF = FIXTURES / "nanotron" / "smollm2-tiny" / "expected_hf"
MARK = re.compile(r"<!-- (run|slow|not run|shown)(?:: (.+))? -->")
#: A command in a sentence or a table.
INLINE = re.compile(r"`(smolconv [^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """Lines of code of a page, and what the comment before them says is to be done with them."""

    page: str
    line: int
    kind: str
    reason: str
    lines: tuple[str, ...]

    def commands(self) -> list[list[str]]:
        """The words of each command of ours; ``$ `` begins one in what a terminal showed."""
        text = "\n".join(self.lines).replace("\\\n", " ")
        found = []
        for line in text.splitlines():
            words = line.strip().removeprefix("$ ")
            if words.startswith("smolconv "):
                given = shlex.split(words.partition(";")[0], comments=True)[1:]
                found.append(given[: next((i for i, word in enumerate(given) if word in (">", "|", "&&")), None)])
        return found


def blocks(page: str) -> Iterator[Block]:
    """Fenced ones, and lines that are indented by four after an empty line or a mark."""
    lines = (REPOSITORY / page).read_text().splitlines()
    at, mark = 0, ("", "")
    while at < len(lines):
        line = lines[at]
        if found := MARK.fullmatch(line.strip()):
            mark = (found[1], found[2] or "")
        elif line.startswith("```"):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            yield Block(page, at + 1, *mark, tuple(lines[at + 1 : end]))
            at, mark = end, ("", "")
        elif line.startswith("    ") and _begins_a_block(lines, at):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            yield Block(page, at + 1, *mark, tuple(lines[at:end]))
            at, mark = end - 1, ("", "")
        elif line.strip():
            mark = ("", "")
        at += 1


def _begins_a_block(lines: list[str], at: int) -> bool:
    """Not the second line of a list's entry."""
    before = next((lines[i] for i in range(at - 1, -1, -1) if lines[i].strip()), "")
    return not lines[at - 1].strip() or bool(MARK.fullmatch(before.strip())) or before.startswith("#")


def in_sentences() -> Iterator[tuple[str, str]]:
    """Page and text of each command that stands as inline code in a sentence or a table."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", (REPOSITORY / page).read_text(), flags=re.DOTALL | re.MULTILINE)
        for found in INLINE.findall(text):
            yield page, found


def quoted_messages() -> list[str]:
    """Parts of messages that docs/errors.md quotes, without what stands for names and numbers."""
    rows = re.findall(
        r"^\| `([^`]+)` \|", (REPOSITORY / "docs/errors.md").read_text().split("## Common messages")[1], re.M
    )
    parts = [part.strip() for row in rows for part in re.split(r"\.\.\.|\bDST(?:\.partial)?|\bN\b", row)]
    return [part.replace("lm_head.weight", "").strip() for part in parts if " " in part]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_message_that_the_errors_page_quotes_exists(message: str) -> None:
    sources = [path for name in ("commands", "smolconv") for path in (REPOSITORY / name).rglob("*.py")]
    joined = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in sources))
    assert message in joined


def in_the_table_of_the_readme() -> list[tuple[str, list[str]]]:
    """What one has, and the words of the command."""
    rows = [line for line in (REPOSITORY / "README.md").read_text().splitlines() if "| `smolconv " in line]
    return [(row.split(" | ")[0].removeprefix("| "), shlex.split(row.rsplit("`", 2)[1])[1:]) for row in rows]


ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", ALL, ids=lambda block: f"{block.page}:{block.line}")
def test_every_block_says_what_is_done_with_it(block: Block) -> None:
    assert block.kind, f"{block.page}:{block.line} has no mark: {block.lines[:2]}"
    assert block.reason or block.kind in ("run", "slow"), "a block that is not run says why"


_app = functools.cache(lambda: typer.main.get_command(app))


def parsed(words: list[str]) -> None:
    """Raise for a command, option or choice that there is not."""
    command: Any = _app()
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"smolconv has no command {' '.join(words)}"
        command = command.commands[rest.pop(0)]
    context = command.context_class(command, info_name=words[0])
    values, left, _ = command.make_parser(context).parse_args(rest)
    assert not left, f"{left} is too much in {words}"
    for param in command.params:
        if (value := values.get(param.name)) is not None and hasattr(param.type, "choices"):
            for each in value if isinstance(value, (list, tuple)) else [value]:
                param.type.convert(each, param, context)


def test_every_command_of_every_page_exists_with_its_options() -> None:
    there = [words for block in ALL for words in block.commands()] + [
        words for _, words in in_the_table_of_the_readme()
    ]
    assert len(there) > 60
    for words in there:
        parsed(words)


def parsed_in_a_sentence(text: str) -> None:
    """``parsed``, for a command that may end early and that may leave out arguments by ``...``."""
    words = [word for word in shlex.split(text)[1:] if word != "..."]
    known: dict[str, Any] = getattr(_app(), "commands")  # noqa: B009  (typer's own type does not say that it has some)
    if words[:1] in (["--help"], ["COMMAND"]) or all(hasattr(known.get(word), "commands") for word in words):
        return
    try:
        parsed(words)
    except Exception as error:  # typer has its own copy of click's classes
        if type(error).__name__ != "BadOptionUsage":
            raise
        parsed([*words, "1"])  # an option is named without its value


@pytest.mark.parametrize(("page", "text"), sorted(set(in_sentences())))
def test_every_command_in_a_sentence_exists_with_its_options(page: str, text: str) -> None:
    parsed_in_a_sentence(text)


@pytest.mark.parametrize(
    "text", ["smolconv convrt", "smolconv convert ... --too", "smolconv recipe shw", "smolconv evaluate -x"]
)
def test_a_command_in_a_sentence_that_there_is_not_would_be_noticed(text: str) -> None:
    with pytest.raises(Exception, match=r"convrt|--too|shw|-x"):
        parsed_in_a_sentence(text)


@pytest.mark.parametrize(
    "words", [["convrt", "a", "b"], ["convert", "a", "b", "--too", "hf"], ["convert", "a", "b", "--to", "megatron"]]
)
def test_a_command_that_there_is_not_would_be_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"convrt|--too|megatron"):
        parsed(words)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and Python-Markdown name them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def broken_links(page: Path) -> list[str]:
    found = []
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_every_link_leads_to_a_page_and_a_heading(page: str) -> None:
    assert broken_links(REPOSITORY / page) == []


def test_a_broken_link_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading: of `code`\n")
    (tmp_path / "page.md").write_text("[a](there.md#a-heading-of-code) [b](there.md#no) [c](none.md) [d](#e)\n")
    assert broken_links(tmp_path / "page.md") == ["there.md#no", "none.md", "#e"]


def section(page: Path, anchor: str) -> str:
    """The text below the heading that ``anchor`` names, up to the next heading."""
    text = re.sub(
        r"^(```.*?^```)", lambda m: m[0].replace("\n#", "\n  #"), page.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    for found in re.finditer(r"^(#+) (.+)$", text, flags=re.MULTILINE):
        if re.sub(r"[^\w\- ]", "", found[2].lower()).strip().replace(" ", "-") == anchor:
            end = re.search(r"^#+ ", text[found.end() :], flags=re.MULTILINE)
            return text[found.start() : found.end() + end.start()] if end else text[found.start() :]
    raise AssertionError(f"{page} has no heading {anchor}")


def ten_situations() -> list[list[str]]:
    """Situation, command and link of each row."""
    rows = section(REPOSITORY / "docs/start-here.md", "ten-situations").splitlines()
    return [row.strip("| ").split(" | ") for row in rows if row.startswith("| ") and not row.startswith("| situation")]


def test_there_are_ten_situations() -> None:
    assert len(ten_situations()) == 10


@pytest.mark.parametrize(("situation", "command", "where"), ten_situations())
def test_the_section_of_a_situation_has_its_command(situation: str, command: str, where: str) -> None:
    path, _, anchor = LINK.search(where)[1].partition("#")
    text = section(REPOSITORY / "docs" / (path or "start-here.md"), anchor)
    name = re.search(r"`(smolconv [\w-]+|smolconv\.\w+)", command)[1]
    shown = [name, name.removeprefix("smolconv "), f"`{name.removeprefix('smolconv ')}`"]
    assert any(word in text for word in shown), f"{situation}: {where} does not show {name}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [REPOSITORY / "README.md"]
    while todo:
        page = todo.pop()
        if page not in reached and page.suffix == ".md" and page.exists():
            reached.add(page)
            todo += [(page.parent / link.partition("#")[0]).resolve() for link in LINK.findall(page.read_text())]
    assert {REPOSITORY / page for page in PAGES} <= reached


def test_the_site_is_built_without_a_warning_and_has_every_page(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    runpy.run_path(str(REPOSITORY / "docs" / "build_site.py"))["build"](tmp_path / "site")
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())
    listed = re.findall(r"[\w/-]+\.md", json.dumps(settings["nav"]))
    assert sorted(listed) == sorted(set(listed))
    assert {page.removeprefix("docs/") for page in PAGES[1:]} <= set(listed)
    assert all((tmp_path / "site" / name).with_suffix(".html").exists() for name in listed if "README" not in name)


def test_the_reference_is_that_of_the_commands_and_docstrings() -> None:
    """Else: make reference."""
    made = runpy.run_path(str(REPOSITORY / "docs" / "build_reference.py"))["reference"]()
    assert (REPOSITORY / "docs" / "reference.md").read_text() == made


# --- blocks are run ---------------------------------------------------------------------------------------------------


def _model_with_tokenizer(folder: Path) -> Path:
    """The tiny model, and a tokenizer of single letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    shutil.copytree(HF, folder)
    pieces = ["<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ"]
    made = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    return folder


def _text(folder: Path) -> Path:
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(
            " ".join(["the quick brown fox jumps over the lazy dog"] * 50 * (number + 1))
        )
    return folder


def _recipe(path: Path) -> None:
    tokens = token_folder(path.parent / "some-tokens", lengths=(30, 60))
    document = recipe_document(HF, tokens, model={"dtype": "bfloat16"}, parallelism={"global_batch_sequences": 384})
    path.write_text(yaml.safe_dump(document))


#: What is in a page's folder before its first block.
PLACES: Mapping[str, Callable[[Path], object]] = {
    "docs/convert.md": lambda here: shutil.copytree(NANOTRON, here / "checkpoints"),
    "docs/data.md": lambda here: (_model_with_tokenizer(here / "smollm2-hf"), _text(here / "corpus")),
    "docs/deepspeed.md": lambda here: shutil.copytree(NANOTRON, here / "SRC"),
    "docs/proof.md": lambda here: (
        shutil.copytree(NANOTRON, here / "checkpoints"), shutil.copytree(NANOTRON.parent / "expected_hf", here / "smollm3-hf")
    ),
    "docs/estimate.md": lambda here: _recipe(here / "RECIPE.yaml"),
    "docs/evaluate.md": lambda here: (
        shutil.copytree(HF, here / "before"), shutil.copytree(HF, here / "run"), token_folder(here / "tokens" / "held-out", documents=20)
    ),
    "docs/watching.md": lambda here: [shutil.copytree(FIXTURES / "run" / "run", here / name) for name in ("RUN", "RUN_A", "RUN_B")],
    "docs/start-here.md": lambda here: (_model_with_tokenizer(here / "SRC"), _text(here / "text")),
}  # fmt: skip


def run_blocks(page: str, kind: str, here: Path) -> None:
    PLACES[page](here)
    for block in blocks(page):
        for words in block.commands() if block.kind == kind else ():
            done = run_cli(*words, cwd=here)
            assert done.code == 0, f"{page}:{block.line}: smolconv {shlex.join(words)}\n{done.stderr}"


@pytest.mark.parametrize("page", sorted({block.page for block in ALL if block.kind == "run"}))
def test_the_blocks_of_a_page_run_in_their_order(page: str, tmp_path: Path) -> None:
    run_blocks(page, "run", tmp_path)


#: What SRC is in the README's table, by its first column, and what else a row's command needs.
ROWS: Mapping[str, Callable[[Path], object]] = {
    "any checkpoint": lambda here: shutil.copytree(NANOTRON, here / "SRC"),
    "a nanotron checkpoint": lambda here: shutil.copytree(NANOTRON, here / "SRC"),
    "a nanotron run": lambda here: shutil.copytree(NANOTRON, here / "SRC"),
    "a folder from somebody else": lambda here: shutil.copytree(NANOTRON, here / "SRC"),
    "a transformers model": lambda here: shutil.copytree(HF, here / "SRC"),
    "a DeepSpeed run": lambda here: shutil.copytree(FIXTURES / "run" / "run" / "checkpoints", here / "SRC"),
    "two checkpoints": lambda here: (
        shutil.copytree(HF, here / "A"), shutil.copytree(HF, here / "B"), token_folder(here / "TOKENS", documents=20)
    ),
    "text": lambda here: (_model_with_tokenizer(here / "SRC"), _text(here / "TEXT")),
    "a checkpoint and token files": lambda here: (
        _model_with_tokenizer(here / "SRC"), token_folder(here / "TOKENS", documents=2000)
    ),
    "a nanotron training YAML": lambda here: shutil.copy(
        FIXTURES / "recipes" / "published" / "config_smollm2_135M.yaml", here / "config.yaml"
    ),
    "a recipe and N GPUs": lambda here: _recipe(here / "my.yaml"),
    "a recipe": lambda here: _recipe(here / "my.yaml"),
    "training runs": lambda here: shutil.copytree(FIXTURES / "run" / "run", here / "FOLDER" / "run"),
    "a run": lambda here: shutil.copytree(FIXTURES / "run" / "run", here / "RUN"),
}  # fmt: skip
#: Rows whose commands other tests run.
ELSEWHERE = {
    "a verified model": "test_publish.py",
    "a GGUF file of SmolLM2": "test_gguf.py", "a recipe, or a stopped run": "the first training run below",
    "a run that trains": "test_runs.py", "a command that fails": "test_doctor.py",
}  # fmt: skip


def test_the_commands_of_the_readmes_table_do_what_they_are_there_for(tmp_path: Path) -> None:
    table = in_the_table_of_the_readme()
    assert {have for have, _ in table} == {*ROWS, *ELSEWHERE}
    for number, (have, words) in enumerate(table):
        if have in ROWS:
            here = tmp_path / str(number)
            here.mkdir()
            ROWS[have](here)
            done = run_cli(*words, cwd=here)
            assert done.code == 0, f"{have}: smolconv {shlex.join(words)}\n{done.stderr}"


@pytest.mark.slow
def test_the_first_training_run_of_start_here_trains(tmp_path: Path) -> None:
    run_blocks("docs/start-here.md", "slow", tmp_path)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["exit_code"] == 0
