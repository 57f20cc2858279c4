"""README.md and README.zh.md: what they name is there, their commands parse, both say the same."""

import functools
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro
from documents import COMMENT, MARKED, ROOT

import metrics
from interview import practice
from interview.exercises import EXERCISES

READMES = ["README.md", "README.zh.md"]
STAGES = ["stage1_mlp", "stage2_rnn", "stage3_attention"]


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


@pytest.fixture(params=READMES)
def text(request):
    return text_of(request.param)


# ---- Both say the same ----


def test_both_hold_the_same_numbers_in_the_same_order():
    english, chinese = (
        [(match["text"], match["meaning"]) for match in MARKED.finditer(text_of(document))]
        for document in READMES
    )
    assert english == chinese
    assert len(english) > 40


def test_both_have_the_same_comments_links_and_pictures():
    for pattern in (COMMENT.pattern, r"\]\(([^)]+)\)", r'src="([^"]+)"'):
        english, chinese = (re.findall(pattern, text_of(name), re.DOTALL) for name in READMES)
        others = {"README.md", "README.zh.md"}  # each links the other one
        assert [link for link in english if link not in others] == [
            link for link in chinese if link not in others
        ]


def test_both_have_the_same_commands():
    english, chinese = (commands_of(text_of(document)) for document in READMES)
    assert english == chinese


def test_both_quote_the_twelve_items_of_the_brief_in_both_languages():
    english, chinese = (brief_of(text_of(document)) for document in READMES)
    assert len(english) == len(chinese) == 12
    for row, translated in zip(english, chinese, strict=True):
        assert row[0] == translated[0]
        assert set(row[1].split(" <br> ")) == set(translated[1].split(" <br> "))


def brief_of(text: str) -> list[list[str]]:
    """The cells of the brief's table: number, item in both languages, place, evidence."""
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [row.strip("| ").split(" | ") for row in rows]


# ---- What they name is there ----


def test_every_name_of_the_briefs_table_is_in_the_file_beside_it(text):
    for number, _, place, _ in brief_of(text):
        files = [Path(link) for link in re.findall(r"\]\(([^)]+)\)", place)]
        modules = [importlib.import_module(file.stem) for file in files if file.suffix == ".py"]
        for name in re.findall(r"`(\w+)`", place):
            assert any(hasattr(module, name) for module in modules), (number, name)


def test_every_file_of_the_tree_is_there_and_nothing_at_the_top_is_left_out(text):
    (tree,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    found = set()
    folder = ROOT
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        path = (folder if indent else ROOT) / name
        assert path.exists(), line
        assert path.is_dir() == name.endswith("/"), line
        if not indent:
            found.add(name.strip("/"))
            folder = path
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git repository")
    tops = {path.split("/")[0] for path in done.stdout.split("\n") if path}
    assert tops - {".gitignore", ".ruff.toml"} <= found


def test_every_picture_is_there(text):
    pictures = re.findall(r'src="([^"]+)"', text)
    assert pictures
    for picture in pictures:
        assert (ROOT / picture).exists(), picture


# ---- Commands ----


def commands_of(text: str) -> list[list[str]]:
    """The words of every command, in blocks of shell and between backticks."""
    lines = re.findall(r"`((?:pip|py|python|dask|git) [^`\n]+)`", text)
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        lines += block.splitlines()
    commands = []
    for line in lines:
        words = []
        for word in shlex.split(line, comments=True):
            if word == "&&":
                commands.append(words)
                words = []
            else:
                words.append(word)
        commands.append(words)
    return [words for words in commands if words]


def without_work(function):
    """A function of the same signature, that does nothing."""

    @functools.wraps(function)
    def idle(*_, **__):
        return 0

    return idle


def test_every_command_parses(text, monkeypatch):
    idle = {name: without_work(command) for name, command in practice.COMMANDS.items()}
    monkeypatch.setattr(practice, "COMMANDS", idle)
    n_parsed = 0
    for command, *words in commands_of(text):
        if command not in ("python", "python3"):
            continue
        n_parsed += 1
        if words[0].startswith("stage"):
            stage = importlib.import_module(words[0].removesuffix(".py"))
            assert stage.parse(words[1:]).__class__.__name__.endswith("Command")
        elif words[:2] == ["-m", "interview.practice"]:
            assert practice.main(words[2:]) == 0
            assert all(name in EXERCISES for name in words[3:])
        elif words[0] == "-m" and words[1].startswith("interview."):
            module = importlib.import_module(words[1])
            assert tyro.cli(without_work(module.main), args=words[2:]) == 0
        elif words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words if word.endswith(".py"))
        else:
            assert words == ["-m", "venv", ".venv"]
    assert n_parsed > 20


@pytest.mark.parametrize("stage", STAGES)
def test_the_commands_that_reproduce_name_every_experiment_with_its_seeds(stage):
    module = importlib.import_module(stage)
    seeds = {}
    for command, *words in commands_of(text_of("README.md")):
        if command == "python" and words[0] == f"{stage}.py" and "--fresh" in words:
            parsed = module.parse(words[1:])
            assert not seeds.keys() & set(parsed.experiments)
            seeds |= dict.fromkeys(parsed.experiments, parsed.seeds)
    assert seeds.keys() == module.EXPERIMENTS.keys()
    rows = metrics.load_rows(ROOT / "figures" / stage.split("_")[0] / "runs.csv")
    for (experiment, value), found in rows.groupby(["experiment", "value"])["seed"]:
        assert len(found) == seeds[experiment], (experiment, value)
