"""Generates the tiny recipe's data: short Python problems that are compositions of named operations.

A task is zero to two *middle* operations (each maps the value to one of the same type) and one *terminal*
(maps it to the result). A small model can learn each operation from many compositions, so holding whole
compositions out of training measures whether it composes, not whether it remembers.

    python recipes/tiny/tasks.py --out recipes/tiny/tasks --seed 0
"""

import argparse
import ast
import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

TEST_FRACTION, RL_FRACTION = 0.17, 0.25  # of the compositions; the others are for likelihood training
MIN_TRAIN_COMPOSITIONS = 4  # an operation of the test split occurs in at least so many train compositions
MIDDLE_SHARE = {0: 0.15, 1: 0.35, 2: 0.50}  # of the train split, by number of middle operations
SINGLE_SHARE = 0.1  # of the other splits, with one middle operation; the rest has two
FAMILY_SHARE = {"list": 0.45, "string": 0.30, "number": 0.25}
FOLDED_FROM, LOOP_FROM = 0.60, 0.80  # about 65 % stay sequential, because not every task has each style
MAX_INT, MAX_REPR, MAX_LINES, MAX_CHARS, MAX_LINE = 9999, 40, 7, 100, 68
NUM_CANDIDATES, MAX_FAILURES = 100, 6
VOWELS = "'aeiouAEIOU'"
COUNT = ("total = 0", "total += 1", "total")
DIGITS = tuple(range(1, 10))
WORDS = (
    "red",
    "fox",
    "cat",
    "dog",
    "sun",
    "sky",
    "blue",
    "tree",
    "fish",
    "bird",
    "moon",
    "star",
    "rain",
    "leaf",
    "cold",
    "warm",
    "apple",
    "bread",
    "stone",
    "green",
    "river",
    "wow",
    "noon",
    "level",
    "dad",
    "pop",
    "eve",
    "mom",
    "radar",
    "a",
    "an",
    "the",
    "one",
    "two",
    "ten",
    "big",
    "old",
    "new",
    "code",
    "list",
    "data",
)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. In templates, {s} is the value so far where any expression may stand, {p} where an
    operand must stand (parenthesised if compound), {k} and {j} are constants written as literals.

    Example: Op("take first", ("take the first {k}",), "{p}[:{k}]", k=(2, 3)).
    """

    name: str
    phrases: tuple[str, ...]
    expr: str = ""  # derived from elem and cond for a map or a filter
    elem: str = ""  # a map: the new element, in terms of the old one
    cond: str = ""  # a filter: which elements stay; in a terminal: when its loop takes the step
    body: tuple[str, ...] = ()  # a terminal that reads better as statements than as one expression
    loop: tuple[str, str, str] = ("", "", "")  # a terminal as a loop: start, step of element {e}, result
    over: str = ""  # iterable of that loop, where it is not the value's own elements
    needs: str = ""  # condition on the value so far; inputs that break it are not used as tests
    group: str = ""  # two middle operations of one group are never combined (sort, reverse)
    k: tuple[Any, ...] = ()
    j: tuple[Any, ...] = ()
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Family:
    """Operations over one input type, with the names that its programs use."""

    name: str
    var: str
    element: str
    empty: str  # initial value of an accumulating loop
    append: str
    comprehension: str
    middles: tuple[Op, ...]
    terminals: tuple[Op, ...]
    draw: Callable[[Random], Any]
    is_short: Callable[[Any], bool]  # short enough for the visible example


def draw_list(rng: Random) -> list[int]:
    """Half of the lists come from a narrow range, so that duplicates and given values do occur."""
    low, high = rng.choice([(-9, 15), (-3, 6)])
    size = rng.randint(0, 8) if rng.random() < 0.6 else rng.randint(3, 5)
    return [rng.randint(low, high) for _ in range(size)]


def draw_string(rng: Random) -> str:
    """One to three words with some capitals, digits and outer spaces; rarely the empty string."""
    words = []
    for _ in range(rng.choice([0] + [1] * 10 + [2] * 12 + [3] * 3)):
        word = rng.choice(WORDS)
        word = rng.choice([word, word, word, word.capitalize(), word.upper()])
        words.append(word + rng.choice(["", "", "", str(rng.randint(0, 99))]))
    return rng.choice([""] * 9 + [" "]) + " ".join(words) + rng.choice([""] * 9 + [" "])


def draw_number(rng: Random) -> int:
    """Mostly small; some of two digits, for the operations on digits."""
    return rng.randint(-9, 20) if rng.random() < 0.75 else rng.randint(21, 99)


LIST_MIDDLES = (
    Op("keep even", ("keep the even numbers", "drop the odd numbers"), cond="x % 2 == 0", group="parity"),
    Op("keep positive", ("keep the positive numbers", "keep only positives"), cond="x > 0", group="sign"),
    Op("add", ("add {k} to each", "increase each by {k}"), elem="x + {k}", group="shift", k=DIGITS),
    Op("multiply", ("multiply each by {k}", "scale each by {k}"), elem="x * {k}", k=(2, 3, 4, 5)),
    Op("square", ("square each", "take each squared"), elem="x * x"),
    Op("reverse", ("reverse the list", "reverse the order"), "{p}[::-1]", group="order"),
    Op("sort", ("sort the list", "sort ascending"), "sorted({s})", group="order"),
    Op("take first", ("take the first {k}", "keep the first {k}"), "{p}[:{k}]", k=(2, 3)),
)
LIST_TERMINALS = (
    Op("the list", ("return the list", "return the result"), "{s}", weight=4),
    Op(
        "sum",
        ("return the sum", "return the total"),
        "sum({s})",
        loop=("total = 0", "total += {e}", "total"),
        weight=2,
    ),
    Op("maximum", ("return the maximum or 0", "return the largest or 0"), "max({s}, default=0)"),
    Op("length", ("return the length", "return how many there are"), "len({s})", loop=COUNT),
    Op("first", ("return the first or 0", "return the first item or 0"), "{p}[0] if {p} else 0"),
)
STRING_MIDDLES = (
    Op("upper", ("make it upper case", "convert to upper case"), "{p}.upper()", group="case"),
    Op("lower", ("make it lower case", "convert to lower case"), "{p}.lower()", group="case"),
    Op("reverse", ("reverse it", "reverse the string"), "{p}[::-1]", group="order"),
    Op("remove spaces", ("remove the spaces", "drop all spaces"), "{p}.replace(' ', '')"),
    Op("keep letters", ("keep the letters", "keep only letters"), cond="c.isalpha()", group="digit"),
    Op("double", ("double each char", "write each char twice"), elem="c * 2"),
    Op("take first", ("take the first {k} chars", "keep the first {k} chars"), "{p}[:{k}]", k=(2, 3, 4)),
)
STRING_TERMINALS = (
    Op("the string", ("return the string", "return the result"), "{s}", weight=4),
    Op("length", ("return its length", "return how many chars it has"), "len({s})", loop=COUNT),
    Op(
        "count vowels",
        ("return the number of vowels", "count the vowels and return it"),
        f"sum(c in {VOWELS} for c in {{s}})",
        cond=f"c in {VOWELS}",
        loop=COUNT,
    ),
    Op("words", ("return the list of words", "split it into words and return them"), "{p}.split()"),
    Op(
        "is palindrome",
        ("return whether it is a palindrome", "return if it reads the same backwards"),
        "{p} == {p}[::-1]",
    ),
)
NUMBER_MIDDLES = (
    Op("add", ("add {k}", "increase it by {k}"), "{p} + {k}", group="shift", k=DIGITS),
    Op("subtract", ("subtract {k}", "decrease it by {k}"), "{p} - {k}", group="shift", k=DIGITS),
    Op("multiply", ("multiply by {k}", "scale it by {k}"), "{p} * {k}", k=(2, 3, 4, 5)),
    Op("square", ("square it", "take its square"), "{p} * {p}"),
    Op("absolute", ("take its absolute value", "make it absolute"), "abs({s})"),
    Op("remainder", ("take it modulo {k}", "take the remainder by {k}"), "{p} % {k}", k=(3, 4, 5, 6, 7)),
)
NUMBER_TERMINALS = (
    Op("the number", ("return it", "return the result"), "{s}", weight=4),
    Op("is even", ("return whether it is even", "return if it is even"), "{p} % 2 == 0"),
    Op(
        "sum to",
        ("return the sum of 1 to it", "add up 1 to it and return the sum"),
        "sum(range(1, {p} + 1))",
        over="for i in range(1, {p} + 1):",
        loop=("total = 0", "total += i", "total"),
        needs="0 <= n <= 60",
    ),
    Op(
        "digit sum",
        ("return the sum of its digits", "add up its digits and return it"),
        "sum(int(d) for d in str({s}))",
        over="for d in str({s}):",
        loop=("total = 0", "total += int(d)", "total"),
        needs="n >= 0",
    ),
    Op(
        "even or odd",
        ("return 'even' or 'odd'", "return 'even' if it is even else 'odd'"),
        "'even' if {p} % 2 == 0 else 'odd'",
        body=("if {p} % 2 == 0:", "    return 'even'", "return 'odd'"),
    ),
)
FAMILIES = (
    Family(
        "list",
        "xs",
        "x",
        "[]",
        "out.append({e})",
        "[{e} for x in {s}{c}]",
        LIST_MIDDLES,
        LIST_TERMINALS,
        draw_list,
        lambda value: 3 <= len(value) <= 5,
    ),
    Family(
        "string",
        "s",
        "c",
        "''",
        "out += {e}",
        "''.join({e} for c in {s}{c})",
        STRING_MIDDLES,
        STRING_TERMINALS,
        draw_string,
        lambda value: 3 <= len(value) <= 10,
    ),
    Family("number", "n", "i", "", "", "", NUMBER_MIDDLES, NUMBER_TERMINALS, draw_number, lambda value: True),
)
IDENTITIES = {family.terminals[0].name for family in FAMILIES}


def compose(family: Family, num_middles: int) -> Iterator[tuple[Op, ...]]:
    """All sensible ordered choices of middle operations, each with all terminals."""
    for middles in permutations(family.middles, num_middles):
        groups = [op.group for op in middles if op.group]
        if len(groups) == len(set(groups)):
            for terminal in family.terminals:
                if middles or terminal.name not in IDENTITIES:
                    yield *middles, terminal


def composition_name(family: Family, ops: tuple[Op, ...]) -> str:
    return f"{family.name}: " + " | ".join(op.name for op in ops)


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text only, so adding operations never moves others' splits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def split(family: Family, ops: tuple[Op, ...], seed: int) -> str:
    """The split of a composition. One operation alone is always trained on, so none is new at test time."""
    is_single = sum(op.name not in IDENTITIES for op in ops) < 2
    place = unit_hash(f"{seed}:{composition_name(family, ops)}")
    if is_single or place >= TEST_FRACTION + RL_FRACTION:
        return "train"
    return "test" if place < TEST_FRACTION else "rl"


def bind(family: Family, op: Op, rng: Random) -> Op:
    """Choose the wording and the constants, and write the expression of a map or a filter."""
    choices = {"{k}": op.k, "{j}": op.j}
    constants = {name: repr(rng.choice(values)) for name, values in choices.items() if values}

    def fill(text: str) -> str:
        for name, literal in constants.items():
            text = text.replace(name, literal)
        return text

    bound = replace(
        op,
        phrases=(fill(rng.choice(op.phrases)),),
        expr=fill(op.expr),
        elem=fill(op.elem),
        cond=fill(op.cond),
        body=tuple(map(fill, op.body)),
    )
    return bound if op.expr or op.body else replace(bound, expr=comprehension(family, bound))


def comprehension(family: Family, op: Op) -> str:
    """The template of a map, a filter or both: `[x * x for x in {s} if x > 0]`."""
    condition = f" if {op.cond}" if op.cond else ""
    return family.comprehension.replace("{e}", op.elem or family.element).replace("{c}", condition)


def is_map_or_filter(op: Op) -> bool:
    return bool(op.elem or op.cond)


def fuse(family: Family, middles: tuple[Op, ...]) -> tuple[Op, ...]:
    """Join a filter with the map that follows it: one comprehension or one loop does both."""
    if len(middles) == 2 and middles[0].cond and middles[1].elem:
        fused = replace(middles[1], cond=middles[0].cond)
        return (replace(fused, expr=comprehension(family, fused)),)
    return middles


@cache
def substitute(template: str, source: str) -> str:
    """Put the source expression into a template, in parentheses where an operand needs them."""
    node = ast.parse(source, mode="eval").body
    is_atom = isinstance(node, ast.Name | ast.Call | ast.Subscript | ast.ListComp)
    return template.replace("{p}", source if is_atom else f"({source})").replace("{s}", source)


def sequential(family: Family, ops: tuple[Op, ...]) -> list[str]:
    """One line for each operation: the main style, since lines compose."""
    lines = [f"{family.var} = {substitute(op.expr, family.var)}" for op in ops[:-1]]
    return lines + [substitute(line, family.var) for line in ops[-1].body or (f"return {ops[-1].expr}",)]


def folded(family: Family, ops: tuple[Op, ...]) -> list[str] | None:
    """As many of the last operations as read well, in the returned expression."""
    middles, terminal = fuse(family, ops[:-1]), ops[-1]
    if not terminal.expr or (not middles and not terminal.body):
        return None
    for start in range(max(len(middles), 1)):
        source, nested = family.var, (*middles[start:], terminal)
        for op in nested:
            if source != family.var and op.expr.count("{s}") + op.expr.count("{p}") > 1:
                break
            is_generator = op.expr == "sum({s})" and source.startswith("[") and source.count("[") == 1
            source = f"sum({source[1:-1]})" if is_generator else substitute(op.expr, source)
        else:
            if source.count(" for ") < 2 and len(source) < MAX_LINE - len("    return "):
                head = [f"{family.var} = {substitute(op.expr, family.var)}" for op in middles[:start]]
                return [*head, f"return {source}"]
    return None


def loop_lines(header: str, cond: str, step: str) -> list[str]:
    return [header, f"    if {cond}:", f"        {step}"] if cond else [header, f"    {step}"]


def looped(family: Family, ops: tuple[Op, ...]) -> list[str] | None:
    """An explicit loop: the terminal's own, with the map or filter before it, else the last map or filter."""
    var, middles, terminal = family.var, fuse(family, ops[:-1]), ops[-1]
    start, step, result = terminal.loop
    if step:
        last = middles[-1] if middles and is_map_or_filter(middles[-1]) and not terminal.over else Op("", ())
        element = last.elem or family.element
        if not last.elem or ("{e}" in step and not terminal.cond):
            head = [f"{var} = {substitute(op.expr, var)}" for op in (middles[:-1] if last.name else middles)]
            header = substitute(terminal.over or f"for {family.element} in {{s}}:", var)
            cond = " and ".join(part for part in (last.cond, terminal.cond) if part)
            body = loop_lines(header, cond, step.replace("{e}", element))
            return [*head, *([start] if start else []), *body, f"return {result}"]
    for index in reversed(range(len(middles))):
        op = middles[index]
        if is_map_or_filter(op):
            head = [f"{var} = {substitute(before.expr, var)}" for before in middles[:index]]
            step = family.append.replace("{e}", op.elem or family.element)
            body = loop_lines(f"for {family.element} in {var}:", op.cond, step)
            tail = sequential(replace(family, var="out"), (*middles[index + 1 :], terminal))
            return [*head, f"out = {family.empty}", *body, *tail]
    return None


def is_short_enough(lines: list[str]) -> bool:
    num_chars = len("\n".join(lines))
    return num_chars <= MAX_CHARS and len(lines) <= MAX_LINES and max(map(len, lines)) <= MAX_LINE


def render(family: Family, ops: tuple[Op, ...], choice: float) -> str | None:
    """The solution in the style that `choice` in [0, 1) picks; where that style does not apply or gets too
    long, in another; None if all are too long."""
    styles: list[Callable[[Family, tuple[Op, ...]], list[str] | None]] = [sequential, folded]
    if choice >= LOOP_FROM:
        styles = [looped, folded, sequential]
    elif choice >= FOLDED_FROM:
        styles = [folded, looped, sequential]
    for style in styles:
        body = style(family, ops)
        lines = [f"def f({family.var}):", *(f"    {line}" for line in body or ())]
        if body and is_short_enough(lines):
            return "\n".join(lines)
    return None


@cache
def load(source: str) -> Callable[[Any], Any]:
    """Execute source of our own making and return its f."""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace["f"]


def evaluate(family: Family, ops: tuple[Op, ...], value: Any) -> Any:
    """The result operation by operation; None if an operation's need is not met or a value gets unwieldy."""
    identity = family.terminals[0]
    for op in ops:
        stage = (op,) if op is ops[-1] else (op, identity)
        if op.needs and not load(f"def f({family.var}):\n    return {op.needs}")(value):
            return None
        value = load("\n    ".join([f"def f({family.var}):", *sequential(family, stage)]))(value)
        if len(repr(value)) > MAX_REPR or (isinstance(value, int) and abs(value) > MAX_INT):
            return None
    return value


def choose_hidden(results: dict[str, Any], size: int, rng: Random) -> list[str]:
    """Take turns over the expected values, so that no single answer passes most of the tests."""
    by_value: dict[str, list[str]] = {}
    for literal, result in results.items():
        by_value.setdefault(repr(result), []).append(literal)
    queues = list(by_value.values())
    chosen: list[str] = []
    while len(chosen) < size and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue]
    return rng.sample(chosen[:size], len(chosen[:size]))


def phrase(family: Family, ops: tuple[Op, ...], literal: str, result: Any) -> str:
    """The prompt: one clause for each operation and a worked example."""
    clauses = ", ".join(op.phrases[0] for op in ops)
    return f"Write f({family.var}): {clauses}.\n>>> f({literal})\n{result!r}"


def make_task(family: Family, composition: tuple[Op, ...], seed: int, index: int) -> dict[str, Any] | None:
    """One row, or None where this draw gives no good problem: tests that vary and that notice each
    operation's absence. Raises AssertionError if the solution disagrees with its own operations."""
    name = composition_name(family, composition)
    rng = Random(f"{seed}:{name}:{index}")
    ops = tuple(bind(family, op, rng) for op in composition)
    inputs = {repr(value): value for value in (family.draw(rng) for _ in range(NUM_CANDIDATES))}
    results = {literal: evaluate(family, ops, value) for literal, value in inputs.items()}
    results = {literal: result for literal, result in results.items() if result is not None}

    def are_noticed(literal: str) -> list[bool]:
        """Whether this test fails the program without each middle operation, and the one without any."""
        fewer = [ops[:i] + ops[i + 1 :] for i in range(len(ops) - 1)] + ([ops[-1:]] if len(ops) > 2 else [])
        others = [evaluate(family, some, inputs[literal]) for some in fewer]
        return [other is not None and other != results[literal] for other in others]

    noticed = {literal: are_noticed(literal) for literal in results}
    shown = [literal for literal in results if family.is_short(inputs[literal])][:25]
    if not shown:
        return None
    visible = max(shown, key=lambda literal: (sum(noticed[literal]), results[literal] not in ("", [], 0)))
    expected = results.pop(visible)
    ranked = sorted(results, key=lambda literal: -sum(noticed[literal]))
    hidden = choose_hidden({literal: results[literal] for literal in ranked}, rng.randint(6, 8), rng)
    most_common = max(Counter(repr(results[literal]) for literal in hidden).values(), default=0)
    is_each_noticed = all(map(any, zip(*(noticed[literal] for literal in hidden), strict=True)))
    if len(hidden) < 6 or most_common > math.ceil(len(hidden) / 2) or not is_each_noticed:
        return None

    prompt = phrase(family, ops, visible, expected)
    solution = render(family, ops, unit_hash(f"{seed}:{prompt}"))
    if solution is None:
        return None
    tests = {visible: expected} | {literal: results[literal] for literal in hidden}
    for literal, result in tests.items():
        assert ast.literal_eval(repr(result)) == result, f"{name}: {result!r} does not survive repr"
        assert load(solution)(ast.literal_eval(literal)) == result, f"{name}: wrong on {literal}:\n{solution}"
    asserts = [f"assert f({literal}) == {result!r}" for literal, result in tests.items()]
    return {
        "family": family.name,
        "composition": name,
        "prompt": prompt,
        "entry_point": "f",
        "visible_tests": asserts[:1],
        "hidden_tests": asserts[1:],
        "solution": solution,
    }


def fill_quota(
    family: Family, pool: list[tuple[Op, ...]], quota: int, seed: int, seen: set[str]
) -> list[dict[str, Any]]:
    """Go round the compositions until there are `quota` tasks; give up those that keep failing."""
    rows: list[dict[str, Any]] = []
    failures: Counter[tuple[Op, ...]] = Counter()
    draw = 0
    while pool and len(rows) < quota:
        kept = []
        for composition in pool:
            draw += 1
            row = make_task(family, composition, seed, draw) if len(rows) < quota else None
            if row is None or row["prompt"] in seen:
                failures[composition] += 1
            else:
                seen.add(row["prompt"])
                rows.append(row)
            if failures[composition] < MAX_FAILURES:
                kept.append(composition)
        pool = kept
    return rows


def generate(num_train: int, num_rl: int, num_test: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The three splits, shuffled and numbered."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "rl": [], "test": []}
    seen: set[str] = set()
    for family in FAMILIES:
        pools: dict[tuple[str, int], list[tuple[Op, ...]]] = {}
        for num_middles in MIDDLE_SHARE:
            for ops in compose(family, num_middles):
                name = split(family, ops, seed)
                copies = ops[-1].weight if name == "train" else 1
                pools.setdefault((name, num_middles), []).extend([ops] * copies)
        for key, pool in pools.items():
            Random(f"{seed}:{family.name}:{key}").shuffle(pool)
        for num_middles, share in MIDDLE_SHARE.items():
            quota = round(num_train * FAMILY_SHARE[family.name] * share)
            rows["train"] += fill_quota(family, pools["train", num_middles], quota, seed, seen)
        for name, size in (("rl", num_rl), ("test", num_test)):
            quota = round(size * FAMILY_SHARE[family.name])
            singles = fill_quota(family, pools[name, 1], round(SINGLE_SHARE * quota), seed, seen)
            doubles = fill_quota(family, pools[name, 2], quota - len(singles), seed, seen)
            rows[name] += singles + doubles
    numbered = 0
    for name, part in rows.items():
        Random(f"{seed}:{name}").shuffle(part)
        rows[name] = [{"uid": f"{row['family']}-{i:06d}"} | row for i, row in enumerate(part, start=numbered)]
        numbered += len(part)
    return rows


def check(rows: dict[str, list[dict[str, Any]]]) -> None:
    """No composition is in two splits, and no operation of the test split is rare in training."""
    train, rl, test = ({row["composition"] for row in rows[name]} for name in ("train", "rl", "test"))
    shared = (train & test) | (train & rl) | (rl & test)
    assert not shared, f"compositions in two splits: {sorted(shared)[:3]}"

    def op_names(composition: str) -> list[str]:
        family, names = composition.split(": ")
        return [f"{family}: {name}" for name in names.split(" | ")]

    counts = Counter(name for composition in train for name in op_names(composition))
    tested = {name for composition in test for name in op_names(composition)}
    rare = {name for name in tested if counts[name] < MIN_TRAIN_COMPOSITIONS}
    assert not rare, f"operations in fewer than {MIN_TRAIN_COMPOSITIONS} train compositions: {sorted(rare)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files of the splits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=8000)
    parser.add_argument("--num-rl", type=int, default=1200)
    parser.add_argument("--num-test", type=int, default=300)
    arguments = parser.parse_args()
    rows = generate(arguments.num_train, arguments.num_rl, arguments.num_test, arguments.seed)
    check(rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in part)
        if name == "train":  # large, and read by programs only; without a time stamp, so that it stays the same
            (arguments.out / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            (arguments.out / f"{name}.jsonl").write_text(text)
        print(f"{name}: {len(part)} tasks, {len({row['composition'] for row in part})} compositions")


if __name__ == "__main__":
    main()
