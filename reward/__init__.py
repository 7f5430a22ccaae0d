"""From a completion to a verdict: extraction of the code, tests, format, and reward functions of the user."""

if __name__ != "coupled.reward":
    raise ImportError("import coupled.reward, not reward: the folder is a package of the distribution 'coupled'")

from coupled.reward.asserts import ParsedTest, parse_test, parse_tests
from coupled.reward.evalplus import arguments_test, evalplus_task
from coupled.reward.extract import Extraction, extract
from coupled.reward.functions import BUILT_IN, RewardSpec
from coupled.reward.judge import Judge
from coupled.reward.plan import Plan, plan
from coupled.reward.rows import PROGRAM_STYLES, known_task, style_of
from coupled.reward.score import PUBLISHED, Scorer
from coupled.reward.types import Judgement, RewardError, Status, Style, Task, UnsupportedTest, Verdict, stdio_test

__all__ = [
    "BUILT_IN",
    "PROGRAM_STYLES",
    "PUBLISHED",
    "Extraction",
    "Judge",
    "Judgement",
    "ParsedTest",
    "Plan",
    "RewardError",
    "RewardSpec",
    "Scorer",
    "Status",
    "Style",
    "Task",
    "UnsupportedTest",
    "Verdict",
    "arguments_test",
    "evalplus_task",
    "extract",
    "known_task",
    "parse_test",
    "parse_tests",
    "plan",
    "stdio_test",
    "style_of",
]
