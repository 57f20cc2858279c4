"""Write the algorithms alone, without the answers in sight (手撕练习).

    python -m interview.practice                   all exercises, and how far you are (= list)
    python -m interview.practice start softmax     writes practice/softmax.py, its body taken out
    python -m interview.practice check softmax     runs the cases on your version; exit 1: it fails
    python -m interview.practice hint softmax      the idea; next time the formula; then a line
    python -m interview.practice show softmax      the real one and yours

Your files and how far you are stand in practice/, which git ignores. The exercises themselves, with
their hints and cases, are in exercises.py: read there how to add one.
"""

import ast
import contextlib
import copy
import difflib
import faulthandler
import importlib.util
import itertools
import json
import multiprocessing
import numbers
import os
import re
import reprlib
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from torch import Tensor

from interview.exercises import EXERCISES, TOPICS, Case, Exercise, Mismatch
from metrics import terminal_width, written_aside

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "practice"
COMMAND = "python -m interview.practice"
WHITEBOARD = {"math", "random", "numpy", "torch"}  # modules whose imports are given
NOTHING_YET = "nothing is written here yet (还没写)"
Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
MEMORY = 8 * 2**30  # bytes that a version may take, where the system can say so


# ---- The real one, and the same with its body taken out -------------------------------------


def parsed(exercise: Exercise) -> tuple[ast.Module, list[str]]:
    """The real one's file as a tree and as lines."""
    text = (ROOT / exercise.path).read_text(encoding="utf-8")
    return ast.parse(text), text.splitlines()


def definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    """The functions and classes of a file by name."""
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name: node for node in tree.body if isinstance(node, kinds)}


def first_line(node) -> int:
    """Where a statement starts, a definition's decorators included."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def header(node, lines: list[str]) -> list[str]:
    """Decorators, signature and docstring of a function or class."""
    body = node.body[0]
    end = body.end_lineno if ast.get_docstring(node) is not None else first_line(body) - 1
    found = lines[first_line(node) - 1 : end]
    return [line for line in found if not line.lstrip().startswith("#")]


def without_body(node, lines: list[str]) -> list[str]:
    """A function as a stub."""
    indent = " " * (node.col_offset + 4)
    return [*header(node, lines), f"{indent}raise NotImplementedError  # your code (你的代码)"]


def class_without_bodies(node, exercise: Exercise, defined: dict, lines: list[str]) -> list[str]:
    """A class with the methods that its exercise asks for, each as a stub.

    A method that the real one inherits has to be written too: the base class is then left out.
    """
    methods = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
    base = defined.get(ast.unparse(node.bases[0])) if node.bases else None
    stub = header(node, lines)
    if base is not None and not methods.keys() >= set(exercise.methods):
        inherited = {child.name: child for child in base.body if isinstance(child, ast.FunctionDef)}
        methods = inherited | methods
        bases = ", ".join(ast.unparse(part) for part in base.bases)
        stub[0] = f"class {node.name}({bases}):"
    for name in exercise.methods:
        if name in methods:
            stub += ["", *without_body(methods[name], lines)]
    return stub


def imports(tree: ast.Module, stub: str, exercise: Exercise) -> list[str]:
    """The real one's imports that fit on a whiteboard, and those that its signature needs."""
    used = {node.id for node in ast.walk(ast.parse(stub)) if isinstance(node, ast.Name)}
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or node.names[0].name
            bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if module.split(".")[0] in WHITEBOARD or bound & used:
                found.append(ast.unparse(node))
    own = sorted(used & definitions(tree).keys() - {exercise.name})
    if own:
        module = exercise.path.removesuffix(".py").replace("/", ".")
        found.append(f"from {module} import {', '.join(own)}")
    return found


def stub_of(exercise: Exercise) -> str:
    """The file that `start` writes."""
    tree, lines = parsed(exercise)
    defined = definitions(tree)
    node = defined[exercise.name]
    if isinstance(node, ast.ClassDef):
        stub = class_without_bodies(node, exercise, defined, lines)
    else:
        stub = without_body(node, lines)
    stub = "\n".join(stub)
    about = [
        exercise.asked,
        exercise.asked_zh,
        "",
        f"Write it, then: {COMMAND} check {exercise.name}",
        "Bad input is not checked here: the errors that the docstring names need not be raised",
        "(不检查非法输入).",
    ]
    if exercise.names:
        about.append(textwrap.fill(f"The cases rely on this: {exercise.names}.", width=96))
    text = "\n".join(about)
    given = "\n".join(imports(tree, stub, exercise))
    return f'"""{text}\n"""\n\n{given}\n\n\n{stub}\n'


def source_of(name: str, text: str) -> str:
    """The definition of this name in a file's text, without its docstrings; else the whole text."""
    try:
        node = definitions(ast.parse(text)).get(name)
    except SyntaxError:
        return text
    if node is None:
        return text
    lines = text.splitlines()
    left_out = set()
    for part in ast.walk(node):
        is_definition = isinstance(part, ast.FunctionDef | ast.ClassDef)
        if is_definition and ast.get_docstring(part) is not None and len(part.body) > 1:
            docstring = part.body[0]
            left_out |= set(range(docstring.lineno, docstring.end_lineno + 1))
    kept = range(first_line(node), node.end_lineno + 1)
    return "\n".join(lines[number - 1] for number in kept if number not in left_out)


# ---- Comparing a result with what is expected -----------------------------------------------


def shown(value, name: str = "") -> str:
    """A value on a line or a few: small arrays whole, large ones by their first numbers."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, dict | list | tuple) and holds_arrays(value):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return "\n".join(shown(part, f"{name}[{key!r}]") for key, part in pairs)
    equals = f"{name} = " if name else ""
    if isinstance(value, np.ndarray):
        if value.size > 24:
            return f"{equals}{digits_of(value.flatten()[:6])[:-1]}, …, shape {value.shape}"
        text = digits_of(value)
        return f"{equals}shape {value.shape}\n{text}" if value.ndim > 1 else f"{equals}{text}"
    if isinstance(value, str) and "\n" in value:
        return f"{equals}\n{value}".lstrip("\n")
    brief = reprlib.Repr()
    brief.maxlist = brief.maxtuple = brief.maxdict = 8
    brief.maxstring = brief.maxother = 200
    return equals + brief.repr(value)


def digits_of(array: np.ndarray) -> str:
    """An array's numbers with four decimals; 1e-17 is 0 beside a 1, but not beside a 1e-12."""
    is_large = array.size > 0 and np.abs(array).max() > 1e-3
    options = {"precision": 4, "suppress_small": bool(is_large), "max_line_width": 88}
    lines = np.array2string(array, separator=", ", **options).splitlines()
    return "\n".join(line for line in lines if line.strip())


def holds_arrays(value) -> bool:
    """Whether a dict, list or tuple holds arrays, at any depth."""
    parts = value.values() if isinstance(value, dict) else value
    for part in parts:
        if isinstance(part, Tensor | np.ndarray):
            return True
        if isinstance(part, dict | list | tuple) and holds_arrays(part):
            return True
    return False


def labelled(label: str, text: str) -> str:
    """Lines of text behind a label, all indented alike."""
    first, *rest = text.splitlines() or [""]
    return "\n".join([f"  {label:<9} {first}", *(f"  {'':<9} {line}" for line in rest)])


def differing(found, expected, place: str, remark: str) -> str:
    """The lines of a failing case about the two results."""
    lines = [
        labelled("expected", shown(expected, place)),
        labelled("yours", shown(found, place)),
    ]
    if remark:
        lines.append(labelled("", f"({remark})"))
    return "\n".join(lines)


def difference(found, expected, tolerance: float, place: str = "") -> str:
    """Empty if both are the same, else the lines that show where they differ first."""
    if isinstance(expected, dict) and isinstance(found, dict) and is_record(expected):
        if found.keys() != expected.keys():
            return differing(list(found), list(expected), place, "the keys")
        for key, part in expected.items():
            deeper = f"{place} {key}".strip()
            different = difference(found[key], part, tolerance, deeper)
            if different:
                return different
        return ""
    if isinstance(expected, Tensor | np.ndarray | float):
        remark = number_difference(found, expected, tolerance)
        return differing(found, expected, place, remark) if remark else ""
    if isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        same = not any(map(difference, found, expected, itertools.repeat(tolerance)))
    elif isinstance(expected, bool):
        same = isinstance(found, bool | np.bool_) and found == expected
    elif isinstance(expected, int):
        is_whole = isinstance(found, numbers.Integral) and not isinstance(found, bool)
        same = is_whole and found == expected
    else:
        same = type(found) is type(expected) and found == expected
    return "" if same else differing(found, expected, place, "")


def is_record(value: dict) -> bool:
    """Whether a dict is several results under their names, and not itself one, as a tree is."""
    return any(not isinstance(part, dict) for part in value.values())


def number_difference(found, expected, tolerance: float) -> str:
    """Empty if two arrays or numbers are the same, else a remark on how they differ."""
    if isinstance(expected, Tensor) and not isinstance(found, Tensor):
        return f"a tensor must come back, not {type(found).__name__}"
    ours = found.detach().cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
    theirs = expected.detach().numpy() if isinstance(expected, Tensor) else np.asarray(expected)
    if ours.dtype.kind not in "iufb":
        return f"numbers must come back, not {type(found).__name__}"
    if ours.shape != theirs.shape:
        return f"the shape must be {theirs.shape}, not {ours.shape}"
    close = np.isclose(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    if close.all():
        return ""
    with np.errstate(invalid="ignore"):
        distance = np.where(close, 0, np.nan_to_num(np.abs(ours - theirs), nan=np.inf))
    place = np.unravel_index(distance.argmax(), distance.shape)
    at = f" at {[int(i) for i in place]}" if place else ""
    if not np.isfinite(ours[place]):
        return f"{ours[place]}{at}"
    remark = f"largest difference {distance.max():.3g}{at}"
    if place and ours.size > 24:
        remark += f": {theirs[place]:.4g} expected, yours {ours[place]:.4g}"
    if ours.dtype in (np.float32, np.float16) and distance.max() < 1e-3:
        remark += f"; the input is float64, and yours became {ours.dtype}"
    return remark


# ---- Running the cases ----------------------------------------------------------------------


def place_in(path: Path | None, error: BaseException) -> str:
    """The last line of the author's own file that an error passed, quoted."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"\nline {error.lineno}: {(error.text or '').strip()}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == str(path):
            return f"\nline {frame.lineno}: {frame.line}"
    return ""


def report_of(error: BaseException, path: Path | None = None) -> str:
    """An error of the author's code in a line or two, without a traceback."""
    place = place_in(path, error)
    if isinstance(error, NotImplementedError) and "raise NotImplementedError" in place:
        return labelled("", NOTHING_YET + place)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    first = " ".join(message.split())[:300]
    return labelled("error", f"{type(error).__name__}: {first}" + place)


def problem_of(case: Case, solution, path: Path | None = None) -> str:
    """Empty if a version does what the case asks, else the lines that say what it does."""
    inputs = "\n".join(shown(value, name) for name, value in case.inputs.items())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = case.use(solution, **copy.deepcopy(case.inputs))
            problem = difference(found, case.expected, case.tolerance)
    except Mismatch as mismatch:
        problem = labelled("yours", str(mismatch))
    except (Exception, SystemExit) as error:
        problem = report_of(error, path)
        if NOTHING_YET in problem:
            return problem
    return f"{labelled('input', inputs)}\n{problem}" if problem else ""


def solution_in(path: Path, name: str):
    """What the author's file defines under this name; Mismatch if it cannot be had."""
    spec = importlib.util.spec_from_file_location(f"practice_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Mismatch(report_of(error, path)) from None
    if not hasattr(module, name):
        raise Mismatch(labelled("error", f"{path.name} defines no {name}"))
    return getattr(module, name)


def limit_memory() -> None:
    """End a version that takes too much memory with a MemoryError, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))


def run_cases(name: str, path: Path, results: Path, seconds: float) -> None:
    """The work of the other process: lines of JSON; it ends itself after so many seconds.

    First the number of cases, then for each case what it tests and what is wrong, last null.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word
    cases = list(EXERCISES[name].cases())
    limit_memory()
    with open(results, "w", encoding="utf-8") as file, open(f"{results}.late", "w") as late:
        print(len(cases), file=file, flush=True)
        faulthandler.dump_traceback_later(seconds, exit=True, file=late)
        try:
            solution = solution_in(path, name)
            for case in cases:
                problem = problem_of(case, solution, path)
                print(json.dumps([case.what, problem]), file=file, flush=True)
        except Mismatch as mismatch:
            print(json.dumps(["the file can be read", str(mismatch)]), file=file)
        faulthandler.cancel_dump_traceback_later()
        print("null", file=file)


class Verdict(NamedTuple):
    """What the cases say of a version."""

    n_cases: int
    holding: list[str]  # what each case tests
    failing: list[tuple[str, str]]  # what it tests, and the lines that say what is wrong


def judged(name: str, path: Path, seconds: float) -> Verdict:
    """Run the cases on a file in a process of its own, which may crash or be ended."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        # a fork has torch loaded already, but is safe on Linux alone
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        process = context.Process(target=run_cases, args=(name, path, results, seconds))
        process.start()
        process.join(seconds + 300)  # it should have ended itself
        process.kill()
        process.join()
        if not results.exists():
            raise OSError(f"the cases could not be run: exit code {process.exitcode}")
        lines = results.read_text(encoding="utf-8").splitlines()
        late = Path(f"{results}.late").read_text(encoding="utf-8", errors="replace")
    n_cases, *rows = map(json.loads, lines)
    if rows and rows[-1] is None:
        rows.pop()
    elif "Timeout" in late:
        line = re.search(rf'File "{re.escape(str(path))}", line (\d+)', late)
        where = f", at line {line[1]}" if line else ""
        problem = labelled("error", f"still at work after {seconds:g} seconds{where}: ended")
        rows.append(["it comes to an end", problem])
    else:
        problem = labelled("error", f"it ended the whole process (exit code {process.exitcode})")
        rows.append(["it comes to an end", problem])
    holding = [what for what, problem in rows if not problem]
    return Verdict(n_cases, holding, [(what, problem) for what, problem in rows if problem])


# ---- How far you are ------------------------------------------------------------------------


def load_state(folder: Path) -> dict[str, dict]:
    """{exercise: {"state", "started", "minutes", "hints"}} of those that were touched."""
    path = folder / "state.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise OSError(f"{path} cannot be read ({error}): delete it to count anew") from None


def save_state(folder: Path, state: dict[str, dict]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with written_aside(folder / "state.json") as aside:
        aside.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def change_state(folder: Path, name: str, **changes) -> dict:
    """Change what is known of one exercise, and give it."""
    state = load_state(folder)
    state[name] = {"state": "open", "hints": 0} | state.get(name, {}) | changes
    save_state(folder, state)
    return state[name]


# ---- Commands -------------------------------------------------------------------------------


def named(name: str) -> Exercise:
    """The exercise of this name, in capitals or not; ValueError suggests the nearest."""
    by_name = {own.casefold(): exercise for own, exercise in EXERCISES.items()}
    if name.casefold() in by_name:
        return by_name[name.casefold()]
    near = difflib.get_close_matches(name.casefold(), by_name, n=3, cutoff=0.5)
    nearest = ", ".join(by_name[key].name for key in near)
    suggestion = f"did you mean {nearest}? " if near else ""
    raise ValueError(f"no exercise is called {name!r}: {suggestion}All names: {COMMAND} list")


def file_of(exercise: Exercise, folder: Path) -> Path:
    return folder.resolve() / f"{exercise.name}.py"


def short(path: Path) -> str:
    """A path as short as it can be written from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def list_exercises(folder: Path = FOLDER) -> int:
    """All exercises by topic and difficulty, and how far you are.

    Args:
        folder: where your files are.
    """
    state = load_state(folder)
    for topic in TOPICS:
        print(f"\n{topic}")
        own = [exercise for exercise in EXERCISES.values() if exercise.topic == topic]
        for exercise in sorted(own, key=stars_of):
            known = state.get(exercise.name, {})
            standing = known.get("state", "open")
            if known.get("minutes") is not None and standing == "passed":
                standing += f", {known['minutes']:.0f} min"
            stars = "★" * exercise.stars
            print(f"  {exercise.name:<22} {stars:<3}  {standing:<15} {exercise.asked_zh}")
    standings = [known.get("state") for name, known in state.items() if name in EXERCISES]
    n_passed = standings.count("passed")
    print(f"\n{n_passed} of {len(EXERCISES)} passed, {standings.count('failing')} failing")
    print(f"next: {COMMAND} start NAME, then check, hint or show NAME")
    return 0


def stars_of(exercise: Exercise) -> int:
    return exercise.stars


def start(name: Name, folder: Path = FOLDER) -> int:
    """Write a file with the signature and docstring of the real one, its body taken out.

    Args:
        name: of the exercise.
        folder: where your files are.
    """
    exercise = named(name)
    path = file_of(exercise, folder)
    stub = stub_of(exercise)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(stub)
    except FileExistsError:
        advice = "delete it to start anew"
        print(f"{short(path)} is there already, and was left as it is: {advice}", file=sys.stderr)
        return 1
    change_state(folder, exercise.name, started=time.time())
    print(f"{exercise.name} {'★' * exercise.stars}  {exercise.topic}")
    print(f"{exercise.asked}\n{exercise.asked_zh}\n")
    print(f"written: {short(path)}: fill in what says NotImplementedError, then")
    print(f"  {COMMAND} check {exercise.name}")
    print(f"  {COMMAND} hint {exercise.name}    if you are stuck")
    return 0


def check(name: Name, folder: Path = FOLDER, seconds: float = 60) -> int:
    """Run the cases on your version: what holds, and the first that fails. Exit 1 if one fails.

    Args:
        name: of the exercise.
        folder: where your files are.
        seconds: after which your version is ended.
    """
    exercise = named(name)
    if not 0 < seconds < 1e6:
        raise ValueError(f"--seconds must be above 0, and below a million, not {seconds:g}")
    path = file_of(exercise, folder)
    if not path.exists():
        print(f"{short(path)} is not there: {COMMAND} start {exercise.name}", file=sys.stderr)
        return 1
    verdict = judged(exercise.name, path, seconds)
    known = load_state(folder).get(exercise.name, {})
    minutes = known.get("minutes")
    if not verdict.failing and minutes is None and "started" in known:
        minutes = (time.time() - known["started"]) / 60
    standing = "failing" if verdict.failing else "passed"
    change_state(folder, exercise.name, state=standing, minutes=minutes)

    print(f"{exercise.name}: {len(verdict.holding)} of {verdict.n_cases} cases hold")
    for what in verdict.holding:
        print(f"  holds     {what}")
    if not verdict.failing:
        taken = "" if minutes is None else f", {minutes:.0f} min after its start"
        print(f"passed (通过){taken}. The real one: {COMMAND} show {exercise.name}")
        return 0
    what, problem = verdict.failing[0]
    print(f"  fails     {what}\n{problem}")
    others = [what for what, _ in verdict.failing[1:]]
    if others and NOTHING_YET not in problem:
        print(labelled("fail too", "\n".join(others)))
    return 1


def hint(name: Name, folder: Path = FOLDER) -> int:
    """The idea, then the formula, then the first line: one at a call.

    Args:
        name: of the exercise.
        folder: where your files are.
    """
    exercise = named(name)
    given = load_state(folder).get(exercise.name, {}).get("hints", 0)
    if given == len(exercise.hints):
        for label, text in zip(("idea", "formula", "line"), exercise.hints, strict=True):
            print(f"{label:<8} {text}")
        print(f"these are all (没有更多提示). The real one: {COMMAND} show {exercise.name}")
        return 0
    label = ("idea (思路)", "formula (公式)", "first line (第一行)")[given]
    print(f"{label}, {given + 1} of {len(exercise.hints)}: {exercise.hints[given]}")
    change_state(folder, exercise.name, hints=given + 1)
    return 0


def show(name: Name, folder: Path = FOLDER) -> int:
    """The real one and yours, without docstrings: side by side where the screen is wide enough.

    Args:
        name: of the exercise.
        folder: where your files are.
    """
    exercise = named(name)
    _, lines = parsed(exercise)
    path = file_of(exercise, folder)
    real = [f"# {exercise.path}", *source_of(exercise.name, "\n".join(lines)).splitlines()]
    if not path.exists():
        print("\n".join(real))
        print(f"\nnone of yours yet: {COMMAND} start {exercise.name}")
        return 0
    text = path.read_text(encoding="utf-8", errors="replace")
    yours = [f"# {short(path)}", *source_of(exercise.name, text).splitlines()]
    left = max(map(terminal_width, real))
    right = max(map(terminal_width, yours))
    if left + 3 + right > shutil.get_terminal_size().columns:
        print("\n".join([*real, "", *yours]))
        return 0
    for one, other in itertools.zip_longest(real, yours, fillvalue=""):
        print(f"{one}{' ' * (left - terminal_width(one))} | {other}".rstrip())
    return 0


COMMANDS = {
    "list": list_exercises,
    "start": start,
    "check": check,
    "hint": hint,
    "show": show,
}


def main(argv: list[str] | None = None) -> int:
    """One command; 0 well, 1 failing or not there, 2 for a wrong name or flag."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = sys.argv[1:] if argv is None else argv
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog=COMMAND, description=__doc__, args=arguments or ["list"]
        )
        sys.stdout.flush()
        return code
    except ValueError as error:
        print(f"practice: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"practice: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("practice: interrupted; nothing is lost", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
