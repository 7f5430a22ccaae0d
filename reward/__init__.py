"""From a completion to a verdict: extraction of the code, tests, format, and reward functions of the user."""

if __name__ != "coupled.reward":
    raise ImportError("import coupled.reward, not reward: the folder is a package of the distribution 'coupled'")

from coupled.reward.extract import Extraction, extract
from coupled.reward.functions import BUILT_IN, RewardSpec
from coupled.reward.judge import Judge
from coupled.reward.rows import evalplus_task, known_task
from coupled.reward.score import PUBLISHED, Scorer
from coupled.reward.styles import PROGRAM_STYLES, STYLES, Plan, TestStyle, num_runs, plan, style_of
from coupled.reward.styles.asserts import ParsedTest, parse_test, parse_tests
from coupled.reward.styles.evalplus import arguments_test
from coupled.reward.styles.stdio import stdio_test
from coupled.reward.types import Judgement, RewardError, Status, Task, UnsupportedTest, Verdict

__all__ = [
    "BUILT_IN",
    "PROGRAM_STYLES",
    "PUBLISHED",
    "STYLES",
    "Extraction",
    "Judge",
    "Judgement",
    "ParsedTest",
    "Plan",
    "RewardError",
    "RewardSpec",
    "Scorer",
    "Status",
    "Task",
    "TestStyle",
    "UnsupportedTest",
    "Verdict",
    "arguments_test",
    "evalplus_task",
    "extract",
    "known_task",
    "num_runs",
    "parse_test",
    "parse_tests",
    "plan",
    "stdio_test",
    "style_of",
]
