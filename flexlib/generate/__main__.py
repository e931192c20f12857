"""``python -m flexlib.generate``."""

import sys

from flexlib.generate.command import main

sys.exit(main())
