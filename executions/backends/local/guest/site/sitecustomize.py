"""Every Python that is started in a sandbox finds the packages that were installed there, behind the template's own."""

import os
import sys

sys.path.append(os.path.expanduser("~/.packages"))
del os, sys
