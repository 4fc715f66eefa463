"""``python -m vico_ext``: the same as the command ``vico``."""

import sys

from vico_ext.cli import main

sys.exit(main())
