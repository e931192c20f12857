"""``python -m flexlib.generate``."""

import sys

from flexlib.generate.run import main

sys.exit(main())
