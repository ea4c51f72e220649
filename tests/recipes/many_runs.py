"""Several runs of the recipe in the same processes: the arguments of each are a line of JSON in a file."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.append(str(HERE.parents[2] / "recipes"))

import train  # noqa: E402 -- the path comes first

if __name__ == "__main__":
    for line in Path(sys.argv[1]).read_text().splitlines():
        code = train.main(json.loads(line))
        if code:
            sys.exit(f"{line} ended with {code}")
