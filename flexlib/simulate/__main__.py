"""``python -m flexlib.simulate``."""

import sys

from flexlib.simulate.run import main

sys.exit(main())
