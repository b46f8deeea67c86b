"""python -I …/local/node: starts without the product. Of it, only executions.network is read, which the plane reads too."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path.insert(0, str(HERE.parents[1]))
sys.path.append(str(HERE.parents[4]))

if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        from node import launcher

        sys.exit(launcher.main(sys.argv[2]))
    if sys.argv[1:2] == ["egress"]:
        from node import egress

        sys.exit(egress.main(sys.argv[2]))
    from node import server

    sys.exit(server.main(sys.argv[1:]))
