"""docs/redis.md out of `common/redis`: `python -m tests.redis_page` writes it, `--check` says whether it is as generated."""

import re
import sys

from services.local.plan import ROOT
from tests.generated import write_or_check

PAGE = ROOT / "docs/redis.md"


def page() -> str:
    """The text: the table of names, channels, and every script with its comment."""
    names = (ROOT / "common/redis/names.py").read_text()
    head = names.split('"""')[1]
    state, cache = re.findall(r"((?:^    \S.*\n)+)", head, re.M)
    channels = re.findall(r'^CHANNEL_\w+ = "(\w+)"\n"""(.*)"""', names, re.M)
    scripts = re.findall(r'((?:^# [^\n]*\n)+)^([A-Z_]+) = """\n(.*?)"""', (ROOT / "common/redis/scripts.py").read_text(), re.M | re.S)
    channels_text = "; ".join(f"`{name}`: {text.rstrip('.')}" for name, text in channels)
    lines = ["# What is in redis", "", "Made from `common/redis` by `python -m tests.redis_page`; `make check` compares.", "",
             "## The state redis: never evicted, on disk within a second", "", *table(state), "",
             f"Channels: {channels_text}.",
             "", "## redis-cache: what can be computed again", "", *table(cache), "", "## Scripts", "",
             "What must happen at once or not at all."]
    for comment, name, code in scripts:
        lines += ["", f"### {name}", "", " ".join(line.removeprefix("# ") for line in comment.splitlines()), "", "```lua", code.rstrip(), "```"]
    return "\n".join(lines) + "\n"


def table(text: str) -> list[str]:
    """Rows of a Markdown table from lines of columns."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return ["| key | what | written by |", "|---|---|---|",
            *(f"| `{row[0]}` | {row[1]} | {row[2] if len(row) > 2 else ''} |" for row in rows)]


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
