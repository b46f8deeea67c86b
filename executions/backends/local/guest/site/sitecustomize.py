"""Every Python that is started in a sandbox finds its agent's packages and its own, behind the template's."""

import os
import sys

sys.path += ["/opt/packages", os.path.expanduser("~/.packages")]
del os, sys
