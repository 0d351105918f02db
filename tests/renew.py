"""Write the golden files anew: `python -m tests.renew`."""

from pathlib import Path

import detachnet
from tests.models import Plain

GOLDEN = Path(__file__).parent / "golden"


def main() -> None:
    plan = detachnet.make_detachable(Plain(), ["conv1", "pool"], (3, 8, 8)).plan
    (GOLDEN / "plan.txt").write_text(f"{plan}\n")


if __name__ == "__main__":
    main()
