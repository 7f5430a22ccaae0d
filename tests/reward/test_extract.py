from __future__ import annotations

import warnings

import pytest

from coupled.reward import extract

GOOD = "def f():\n    return 1\n"


@pytest.mark.parametrize(
    ("completion", "code", "score"),
    [
        # the rule
        (f"```python\n{GOOD}```", GOOD, 1.0),
        ("```python\ndef f( return 1\n```", "def f( return 1\n", 0.5),
        (GOOD, None, 0.0),
        ("", None, 0.0),
        # text around it
        (f"Here it is:\n\n```python\n{GOOD}```\n\nIt returns 1.", GOOD, 1.0),
        (f"```python  \n{GOOD}```  ", GOOD, 1.0),
        (f"  ```python\n{GOOD}  ```", GOOD, 1.0),
        (f"    ```python\n{GOOD}```", None, 0.0),
        # several blocks: the first python one counts
        ("```python\na = 1\n```\n```python\nb = 2\n```", "a = 1\n", 1.0),
        ("```python\na =\n```\n```python\nb = 2\n```", "a =\n", 0.5),
        ("```bash\npip\n```\n```python\nb = 2\n```", "b = 2\n", 1.0),
        ("```\nplain\n```\n```python\nb = 2\n```", "b = 2\n", 1.0),
        ("```\nplain\n```", None, 0.0),
        ("```py\nx = 1\n```", None, 0.0),
        ("```Python\nx = 1\n```", None, 0.0),
        ("```pythonic\nx = 1\n```", None, 0.0),
        # a block that is never closed
        (f"```python\n{GOOD}", None, 0.0),
        ("```python", None, 0.0),
        ("```text\n```python\nx = 1\n", None, 0.0),
        # on one line there is no block
        ("```python x = 1 ```", None, 0.0),
        ("use ```python\nx = 1\n```", None, 0.0),
        # nothing to run
        ("```python\n```", "", 0.5),
        ("```python\n# nothing\n```", "# nothing\n", 0.5),
        ("```python\n    return x + 1\n```", "    return x + 1\n", 0.5),
        # other line ends, odd characters
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\n", 1.0),
        ("```python\nx = '\0'\n```", "x = '\0'\n", 0.5),
        ("```python\nx = '\ud800'\n```", "x = '\ud800'\n", 0.5),
        ("```python\ns = '''\n```\n'''\n```", "s = '''\n", 0.5),
    ],
)
def test_a_completion_has_this_code_and_this_format(completion: str, code: str | None, score: float) -> None:
    extraction = extract(completion)
    assert (extraction.code, extraction.format) == (code, score)


@pytest.mark.parametrize(
    "code",
    [
        "(" * 10_000,
        "-" * 100_000 + "1",
        "x" + ".a" * 50_000,
        "1" + "+1" * 50_000,
        "lambda:" * 20_000,
        "x = 1\n" * 100_000,
        "a" + "\u0315\u0300" * 45_000 + " = 1",
        "import " + "a." * 45_000 + "a",
        "from " + "a . \\\n" * 15_000 + "a import b",
    ],
    ids=["parentheses", "minus", "attributes", "plus", "lambda", "too long", "marks", "parts", "parts on lines"],
)
def test_code_that_would_exhaust_the_parser_is_code_that_does_not_parse(code: str) -> None:
    assert extract(f"```python\n{code}\n```").format == 0.5


def test_long_texts_and_chains_are_a_program() -> None:
    text = "仮名交じり文、" * 200
    code = f"# {'漢字' * 200}\ns = '{text}'\nx = a{'.b()' * 80}\nimport a.b.c\nñandú = 1"
    assert extract(f"```python\n{code}\n```").format == 1.0


def test_the_format_does_not_depend_on_how_the_caller_treats_warnings() -> None:
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            assert extract("```python\ns = '\\d'\nx = 1 is 1\n```").format == 1.0
