"""All skills by name.

from skills import SKILLS
SKILLS["dates"].examples("train", seed=0, count=1600)
SKILLS["dates"].check(example, answer)
"""

from __future__ import annotations

from skill_arithmetic import ARITHMETIC
from skill_dates import DATES
from skill_extract import EXTRACT
from skill_kit import SPLITS, Example, Skill
from skill_labels import LABELS
from skill_routing import ROUTING
from skill_style import STYLE

__all__ = ["SKILLS", "SPLITS", "Example", "Skill"]

SKILLS = {skill.name: skill for skill in (DATES, EXTRACT, STYLE, ROUTING, ARITHMETIC, LABELS)}
