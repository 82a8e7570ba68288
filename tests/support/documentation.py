"""The fenced blocks of README.md and docs/*.md: the commands, programs and files in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = (
    r"\$EDITOR|benchmarks/gpu\.sh|slurm/submit_with_report\.sh|conda|export|git|make|mpirun|python|sbatch|source|srun|tail"
    r"|torchrun"
)
_COMMAND = re.compile(rf"([A-Z_]+=\S+ )*(\.venv/bin/)?({_PROGRAMS})( |$)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block."""

    page: str
    language: str
    """Empty: commands, and what they say."""
    text: str

    def commands(self) -> list[str]:
        """Return the commands as a shell takes them, each in one line, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [
            " ".join(line.partition("  #")[0].split()) for line in lines if _COMMAND.match(line)
        ]


def blocks() -> list[Block]:
    """Return all fenced blocks, in order."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(page=str(page.relative_to(ROOT)), language=language, text=text)
        for page in PAGES
        for language, text in fence.findall(page.read_text())
    ]
