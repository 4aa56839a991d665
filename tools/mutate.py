"""Mutation testing of the exercises: is every small change of a master solution found out by its check?

    python tools/mutate.py                        # every exercise whose master changed since its last score
    python tools/mutate.py SHEET [EXERCISE]       # these, changed or not: python tools/mutate.py attention alibi_slopes
    python tools/mutate.py --check                # run nothing; exit 1 when a score is old or a mutant survives

A mutant is the solution with one change. Cosmic Ray's operators make most of them; the kinds it does not know, and that
this subject needs, are below (a statement, an argument, a method call or an operand left out; arguments exchanged;
another dtype, another reduction; a slice without its border). A mutant is killed when a case of the exercise fails. One
that does the same as the solution cannot be killed: the master lists it, with the reason,

    exercise(..., equivalent={"return e / total.masked_fill(total <= 0, 1.0)": "exponentials have no negative sum"})

where the key is the changed line as this program prints it, after the arrow. Scores: tests/mutation/SHEET.json.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llmcourse.practice import checking  # noqa: E402
from llmcourse.practice.comparing import compare  # noqa: E402
from llmcourse.practice.exercises import outcome_of  # noqa: E402

SCORES = ROOT / "tests" / "mutation"
VERSION = 2  # of the operators: a score made with others is old
MEMORY, WALL = 3 * 2**30, 60.0  # bytes and seconds that one mutant may take


@dataclass(frozen=True)
class Mutant:
    source: str
    line: int
    was: str
    now: str
    """the changed lines, without indentation: how the master names it in `equivalent`"""


# ------------------------------------------------------------------------------------ the operators

_REPLACED = {
    "ReplaceComparisonOperator": "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Lt_Gt Gt_Lt LtE_GtE GtE_LtE Eq_NotEq NotEq_Eq",
    "ReplaceBinaryOperator": "Add_Sub Sub_Add Mul_Div Div_Mul Div_FloorDiv FloorDiv_Div Mod_FloorDiv Pow_Mul "
    "BitAnd_BitOr BitOr_BitAnd BitXor_BitOr LShift_RShift RShift_LShift",
    "ReplaceUnaryOperator": "Delete_USub Delete_Invert Delete_Not",
}
COSMIC = [f"{kind}_{pair}" for kind, pairs in _REPLACED.items() for pair in pairs.split()] + [
    "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd",
    "ReplaceBreakWithContinue", "ReplaceContinueWithBreak", "ExceptionReplacer", "NumberReplacer", "RemoveDecorator",
    "ZeroIterationForLoop",
]  # fmt: skip

SWAPPED = {
    a: b
    for pair in (
        "float32 float64", "float double", "int64 int32", "min max", "amin amax", "argmin argmax", "any all",
        "sum mean", "minimum maximum", "floor ceil", "append extend", "triu tril", "zeros ones", "zeros_like ones_like",
        "cumsum cumprod", "sin cos", "exp log", "le lt", "ge gt", "repeat repeat_interleave",
    )
    for a, b in (pair.split(), pair.split()[::-1])
}  # fmt: skip


def _cosmic(source: str) -> Iterator[str]:
    """What Cosmic Ray's operators make of the text."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.operators.provider import OperatorProvider

    known = OperatorProvider()
    operators = [known[name]() for name in COSMIC]
    for place, node in enumerate(ast_nodes(get_ast(source))):
        for operator in operators:
            for i, _ in enumerate(operator.mutation_positions(node)):
                tree = get_ast(source)  # an operator changes the tree that it is given
                old = next(n for k, n in enumerate(ast_nodes(tree)) if k == place)
                siblings = old.parent.children if old.parent else []
                at = next((k for k, n in enumerate(siblings) if n is old), None)
                new = operator.mutate(old, i)
                if at is not None:
                    siblings[at : at + 1] = [new] if new is not None else []
                yield tree.get_code()


def _edits(tree: ast.Module, text) -> Iterator[tuple[ast.AST, str]]:
    """Our own operators: a node, and the text in its place. `text` gives the text of a node."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Expr, ast.Raise, ast.Return, ast.Delete)):
            yield node, f"pass  # {text(node).splitlines()[0]}"
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield from ((node.test, value) for value in ("True", "False"))
        if isinstance(node, ast.comprehension):
            yield from ((test, value) for test in node.ifs for value in ("True", "False"))
        if isinstance(node, ast.BinOp):
            yield from ((node, text(side)) for side in (node.left, node.right))
        if isinstance(node, ast.Constant) and type(node.value) is float and 0 < abs(node.value) < float("inf"):
            yield node, repr(node.value * 2)
        if isinstance(node, ast.Attribute) and node.attr in SWAPPED:
            yield node, f"{text(node.value)}.{SWAPPED[node.attr]}"
        if isinstance(node, ast.Name) and node.id in SWAPPED and isinstance(node.ctx, ast.Load):
            yield node, SWAPPED[node.id]
        if isinstance(node, ast.Slice):
            lower, upper, step = (text(part) if part else "" for part in (node.lower, node.upper, node.step))
            more = f":{step}" if step else ""
            if lower:
                yield node, f":{upper}{more}"
            if upper:
                yield node, f"{lower}:{more}"
        if isinstance(node, ast.Call):
            parts = [text(a) for a in (*node.args, *node.keywords)]
            call = lambda parts, node=node: f"{text(node.func)}({', '.join(parts)})"
            if isinstance(node.func, ast.Attribute) and not isinstance(node.func.value, ast.Name):
                yield node, text(node.func.value)  # x.f(…) becomes x
            elif isinstance(node.func, ast.Attribute) and node.func.value.id not in ("torch", "F", "math", "np", "nn"):
                yield node, text(node.func.value)
            symmetric = text(node.func).split(".")[-1] in (
                "min",
                "max",
                "minimum",
                "maximum",
                "gcd",
                "isclose",
                "equal",
            )
            for i in range(0 if symmetric else len(node.args) - 1):
                yield node, call([*parts[:i], parts[i + 1], parts[i], *parts[i + 2 :]])
            for i in range(len(parts)):
                yield node, call(parts[:i] + parts[i + 1 :])


def _own(source: str) -> Iterator[str]:
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    at = lambda line, column: starts[line - 1] + column
    span = lambda n: (at(n.lineno, n.col_offset), at(n.end_lineno, n.end_col_offset))
    text = lambda n: data[slice(*span(n))].decode()
    for node, new in _edits(ast.parse(source), text):
        start, end = span(node)
        yield (data[:start] + new.encode() + data[end:]).decode()


class _Meaning(ast.NodeTransformer):
    """What a check can see of the code: no annotations, no docstrings, no texts of errors."""

    def visit_FunctionDef(self, node):
        node.returns = None
        for a in (*node.args.args, *node.args.posonlyargs, *node.args.kwonlyargs):
            a.annotation = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        node.body = [n for n in node.body if not isinstance(n, ast.Pass)] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_Raise(self, node):
        if isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            node.exc = node.exc.func
        return node

    def visit_AnnAssign(self, node):
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _meaning(source: str) -> str | None:
    try:
        return ast.dump(_Meaning().visit(ast.parse(source)))
    except (SyntaxError, ValueError):
        return None


def _changed(old: str, new: str) -> tuple[int, str, str]:
    """Line number and the changed lines, before and after."""
    a, b = old.splitlines(), new.splitlines()
    blocks = [o for o in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes() if o[0] != "equal"]
    i, j, k, m = blocks[0][1], blocks[-1][2], blocks[0][3], blocks[-1][4]
    one = lambda lines: re.sub(r"\s+", " ", " ".join(line.strip() for line in lines)).strip()
    tidy = lambda lines: re.sub(r"([(\[]|\w=) +(?=\S)", r"\1", one(lines))  # Cosmic Ray writes ( -1)
    return i + 1, tidy(a[i:j]), tidy(b[k:m])


def mutants(source: str) -> list[Mutant]:
    """All mutants of a solution's text, each once, in the order of its lines."""
    seen, found = {_meaning(source), None}, []
    for text in (*_cosmic(source), *_own(source)):
        meaning = _meaning(text)
        if meaning not in seen:
            seen.add(meaning)
            found.append(Mutant(text, *_changed(source, text)))
    return sorted(found, key=lambda m: m.line)


# ------------------------------------------------------------------------------------- running them


def _killed(ex: checking.Exercise, source: str) -> bool:
    """Whether a case finds the difference, in this process."""
    space = dict(vars(sys.modules[ex.module]))
    try:
        exec(compile(source, "<mutant>", "exec"), space)
    except BaseException:
        return True
    outcomes = ((c, want, outcome_of(space.get(ex.name), c)) for c, want in zip(ex.all_cases(), ex.expected()))
    return any(compare(want, got, c) for c, want, got in outcomes)


def _start(ex: checking.Exercise, mutant: Mutant, seconds: float, folder: str) -> int:
    """A process of its own with limits; exit code 0: survived. Anything else, a crash or a signal too: killed."""
    import resource

    pid = os.fork()
    if pid:
        return pid
    try:
        os.chdir(folder)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(nowhere, fd)
        resource.setrlimit(resource.RLIMIT_AS, (2 * MEMORY, 2 * MEMORY))
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)  # processor time: a busy machine kills nobody
        os._exit(1 if _killed(ex, mutant.source) else 0)
    finally:
        os._exit(2)


def survivors(ex: checking.Exercise, these: Iterable[Mutant], jobs: int = 2) -> list[Mutant]:
    """The mutants that pass the exercise's check."""
    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    if why := ex.broken():
        raise SystemExit(f"{ex.id}: {why}")
    if _killed(ex, ex.section("solution")):
        raise SystemExit(f"{ex.id}: the solution itself, unchanged, does not pass when its text is run again")
    alone = time.process_time() - started
    left, running, found = list(these), {}, []
    with tempfile.TemporaryDirectory() as folder:
        while left or running:
            while left and len(running) < jobs:
                mutant = left.pop(0)
                running[_start(ex, mutant, 1 + 5 * alone, folder)] = (mutant, time.monotonic() + WALL)
            for pid, (mutant, end) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del running[pid]
                    if status == 0:
                        found.append(mutant)
                elif time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
    return sorted(found, key=lambda m: m.line)


# --------------------------------------------------------------------------------------- the scores


def without_wrong_answers(code: str) -> str:
    """A checker's code without its wrong answers and their sentences: no score depends on them."""
    lines = code.splitlines()
    for node in reversed(ast.parse(code).body):
        calls = getattr(node, "decorator_list", None) or [getattr(node, "value", None)]
        if any(isinstance(c, ast.Call) and getattr(c.func, "attr", "") == "wrong" for c in calls):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            del lines[first - 1 : node.end_lineno]
    return "\n".join(line for line in lines if line.strip())


def digest(ex: checking.Exercise) -> str:
    """Of all that the score depends on: set-up, shared helpers, solution and checker, and the operators."""
    text = Path(sys.modules[ex.module].__file__).read_text(encoding="utf8")
    parts = re.findall(r"^# %% (.*)\n((?:.|\n)*?)(?=^# %% |\Z)", text, re.M)
    own = ("setup", "checker", f"solution {ex.name}")
    kept = [str(VERSION), *(body.strip() for head, body in parts if head in own)]
    kept += [without_wrong_answers(body) for head, body in parts if head == f"checker {ex.name}"]
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]


def score(ex: checking.Exercise, jobs: int = 2) -> dict:
    """Run every mutant of one exercise."""
    every = mutants(ex.section("solution"))
    alive = survivors(ex, every, jobs)
    excused = [m for m in alive if m.now in ex.equivalent]
    wrong = {k: "names no mutant" for k in ex.equivalent if k not in {m.now for m in every}}
    wrong |= {k: "is killed" for k in ex.equivalent if k not in wrong and k not in {m.now for m in alive}}
    return {
        "digest": digest(ex), "mutants": len(every), "killed": len(every) - len(alive), "equivalent": len(excused),
        "survivors": [{"line": m.line, "was": m.was, "now": m.now} for m in alive if m.now not in ex.equivalent],
        "wrongly_listed": wrong,
    }  # fmt: skip


def read_scores(sheet: str) -> dict[str, dict]:
    """The scores by exercise, as they were last written."""
    file = SCORES / f"{sheet}.json"
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else {}


def old_or_bad(sheet: str) -> list[str]:
    """What is wrong with a sheet's scores, in words."""
    kept, said = read_scores(sheet), []
    for ex in checking.load_sheet(sheet).values():
        known = kept.get(ex.name)
        if not known or known["digest"] != digest(ex):
            said.append(f"{ex.id}: the score is old: run python tools/mutate.py {sheet} {ex.name}")
            continue
        said += [f"{ex.id}: survives, line {m['line']}: {m['was']}  ->  {m['now']}" for m in known["survivors"]]
        said += [f"{ex.id}: listed as equivalent, but {why}: {k}" for k, why in known["wrongly_listed"].items()]
    return said


def sample(ex: checking.Exercise, n: int) -> list[Mutant]:
    """A few mutants, the same ones every time."""
    every = mutants(ex.section("solution"))
    return random.Random(ex.id).sample(every, min(n, len(every)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sheet", nargs="?")
    parser.add_argument("exercise", nargs="?")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--check", action="store_true", help="run nothing; exit 1 when a score is old or bad")
    args = parser.parse_args(argv)
    bad = 0
    for sheet in [args.sheet] if args.sheet else checking.sheets():
        exercises, kept = checking.load_sheet(sheet), read_scores(sheet)
        if args.exercise:
            checking.find(f"{sheet}.{args.exercise}")
        for ex in [] if args.check else exercises.values():
            wanted = args.exercise == ex.name if args.exercise else args.sheet
            if wanted or (not args.sheet and kept.get(ex.name, {}).get("digest") != digest(ex)):
                started = time.monotonic()
                kept[ex.name] = new = score(ex, args.jobs)
                real = new["mutants"] - new["equivalent"]
                print(f"{ex.id}: {new['killed']} of {real} killed, {new['equivalent']} equivalent, "
                      f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
                kept = {name: kept[name] for name in (e.name for e in exercises.values()) if name in kept}
                SCORES.mkdir(exist_ok=True)
                text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
                (SCORES / f"{sheet}.json").write_text(text, encoding="utf8")
        said = [s for s in old_or_bad(sheet) if not args.exercise or s.startswith(f"{sheet}.{args.exercise}:")]
        print("\n".join(said))
        bad |= bool(said)
    return bad


if __name__ == "__main__":
    sys.exit(main())
