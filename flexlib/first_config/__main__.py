"""``python -m flexlib.first_config``."""

import sys

from flexlib.first_config.command import main

sys.exit(main())
