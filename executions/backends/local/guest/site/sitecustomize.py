"""Every Python that is started in a sandbox finds the packages that were installed there, behind the template's own."""

import sys

sys.path.append("/home/user/.packages")
del sys
