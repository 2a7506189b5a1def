"""docs/security.md shows what Bridge and the installed megatron.training do with hostile documents."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".github/scripts/make_security.py"


def test_the_page_is_current() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
