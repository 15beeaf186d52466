"""``python -m mesh``."""

import sys

from mesh.main import main

sys.exit(main())
