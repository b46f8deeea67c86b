"""python -I …/local/node: starts without the product, whose folder is not on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        from node import launcher

        sys.exit(launcher.main(sys.argv[2]))
    from node import server

    sys.exit(server.main(sys.argv[1:]))
