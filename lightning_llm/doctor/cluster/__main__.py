"""One rank that `start_all` starts."""

import sys

from lightning_llm.doctor.cluster.start import started

sys.exit(started())
